"""What a draw makes once instead of at every step, keys and values of tokens and low-precision weights; the latents are
those of making them anew."""

import contextlib
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from typed_lines import SMALL

from ldmcli.core import config
from ldmcli.core.settings import TrainSettings
from ldmcli.networks.blocks import CrossAttention, KeptKeys, attention, join_heads, split_heads
from ldmcli.sampling.draw import Draw, draw_latents
from ldmcli.studies.bench_subjects import Asked, open_subject
from ldmcli.training.distributed import Distributed

PROMPTS = ("a picture", "picture", "a a a")


def model_of(tmp_path, *kinds: str, **values):
    """A model of random weights, none of which is 0: attention that begins as nothing would hide every fault."""
    wanted = {**SMALL, "data.size": (16, 16), "condition.kinds": kinds, "sample.sampler": "dpm++", **values}

    def of(kind: str):
        known = config.paths(kind)
        return config.resolve(kind, [("test", {k: v for k, v in wanted.items() if k in known})]).config

    one = Asked(name="small", kind="diffusion", config=of("diffusion"), first_stage=of("autoencoder"))
    found = open_subject(one, Distributed(TrainSettings(mixed_precision="no")), tmp_path, None).diffusion
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for parameter in found.network.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.1)
    return found


@pytest.fixture
def made(monkeypatch):
    """The layers that make keys and values of tokens, one entry a time."""
    seen: list[CrossAttention] = []
    plain = CrossAttention.keys_and_values

    def counted(self, source):
        seen.append(self)
        return plain(self, source)

    monkeypatch.setattr(CrossAttention, "keys_and_values", counted)
    return seen


def cross_layers(model) -> list[CrossAttention]:
    return [module.attn2 for module in model.network.modules() if hasattr(module, "attn2")]


CASES = {
    "guided": ({}, {"guidance": 3.0}, 1),
    "not guided": ({}, {"guidance": 1.0}, 1),
    "an interval": ({}, {"guidance": 3.0, "guidance_interval": (0.3, 0.6)}, 2),
    "a negative prompt": ({"negative_prompt": "a picture picture"}, {"guidance": 3.0}, 1),
    "tiles": ({"size": (32, 48), "tile": 8}, {"guidance": 3.0}, 1),
    "two calls a step": ({}, {"guidance": 3.0, "sampler": "heun"}, 1),
}


@pytest.mark.parametrize("case", CASES)
def test_latents_are_those_of_keys_made_at_every_step(case, tmp_path, monkeypatch, made):
    more, settings, sets = CASES[case]
    model = model_of(tmp_path, "text")
    draw = Draw(ids=range(3), values={"text": PROMPTS}, settings={"steps": 4, **settings}, **more)
    found = draw_latents(model, draw)
    layers = cross_layers(model)
    assert layers and all(made.count(layer) == sets for layer in layers)
    again = draw_latents(model, draw)
    other = draw_latents(model, replace(draw, values={"text": PROMPTS[::-1]}))
    monkeypatch.setattr(KeptKeys, "of", lambda self, layer, tokens: layer.keys_and_values(tokens))
    assert torch.equal(found, draw_latents(model, draw)) and torch.equal(found, again)
    assert not torch.equal(found, other)  # nothing of a draw stays for the next
    assert torch.equal(other, draw_latents(model, replace(draw, values={"text": PROMPTS[::-1]})))


def test_several_conditions_with_scales_of_their_own(tmp_path, monkeypatch, made):
    model = model_of(tmp_path, "class", "text")
    values = {"text": PROMPTS, "class": [1, 2, 3]}
    draw = Draw(ids=range(3), values=values, settings={"steps": 3, "guidance": {"class": 2.0, "text": 3.0}})
    found = draw_latents(model, draw)
    assert all(made.count(layer) == 1 for layer in cross_layers(model))
    monkeypatch.setattr(KeptKeys, "of", lambda self, layer, tokens: layer.keys_and_values(tokens))
    assert torch.equal(found, draw_latents(model, draw))


def test_passes_outside_and_passes_with_gradients_make_their_own(tmp_path, made):
    model = model_of(tmp_path, "text")
    layer, tokens = cross_layers(model)[0], torch.randn(2, 5, model.config.condition.context_dim)
    x = torch.randn(2, 4, layer.to_q.in_features)
    for _ in range(2):
        layer(x, tokens)
    assert len(made) == 2
    layer.requires_grad_(True)
    with KeptKeys():
        for _ in range(2):
            layer(x, tokens).sum().backward()
    assert len(made) == 4
    layer.requires_grad_(False)
    with KeptKeys() as kept:
        layer(x, tokens)
        with kept:
            layer(x, tokens)
        layer(x, tokens.clone())  # other tokens
    assert len(made) == 6


def test_self_attention_keeps_nothing(tmp_path, made):
    layer = cross_layers(model_of(tmp_path, "text"))[0]
    square = CrossAttention(8, 2, 4)
    with KeptKeys():
        for _ in range(3):
            square(torch.randn(1, 4, 8))
    assert len(made) == 3 and layer is not square


class CastsOfWeights(TorchDispatchMode):
    """Counts how often each weight of a convolution or linear map is turned into bfloat16."""

    def __init__(self, network: torch.nn.Module):
        super().__init__()
        layers = [module for module in network.modules() if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear))]
        self.places = {weight.data_ptr() for layer in layers for weight in layer.parameters()}
        self.found: list[int] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        low = (kwargs or {}).get("dtype") == torch.bfloat16
        if function is torch.ops.aten._to_copy.default and low and args[0].data_ptr() in self.places:
            self.found.append(args[0].data_ptr())
        return function(*args, **(kwargs or {}))


def test_weights_are_cast_once_a_draw_and_stay_without_gradients(tmp_path, monkeypatch):
    model = model_of(tmp_path, "text")
    model.autoencoder.dtype = torch.bfloat16
    draw = Draw(ids=range(3), values={"text": PROMPTS}, settings={"steps": 4, "guidance": 3.0})
    with CastsOfWeights(model.network.unet) as casts:
        found = draw_latents(model, draw)
    assert casts.found and len(casts.found) == len(set(casts.found))
    assert not any(p.requires_grad for p in model.network.parameters())
    monkeypatch.setattr("ldmcli.sampling.draw.cast_once", lambda network: contextlib.nullcontext())
    with CastsOfWeights(model.network.unet) as casts:
        assert torch.equal(found, draw_latents(model, draw))
    assert len(casts.found) > 3 * len(set(casts.found))  # those of kept keys aside


def test_with_a_guide_no_weight_can_get_a_gradient(tmp_path):
    model, seen = model_of(tmp_path, "text"), []
    model.autoencoder.dtype = torch.bfloat16

    def guide(denoise):
        def guided(z, t, alpha, sigma):
            seen.append(any(p.requires_grad for p in model.network.parameters()))
            return denoise(z, t, alpha, sigma)

        return guided

    draw_latents(model, Draw(ids=range(2), values={"text": PROMPTS[:2]}, settings={"steps": 2}, guide=guide))
    assert seen == [False, False]


def test_gradients_of_training_are_added_up_in_the_order_of_queries_keys_and_values():
    """A sum in another order is another training, if only in the last bits."""
    layer = CrossAttention(64, 4, 16)
    for seed in range(4):
        x = torch.randn(3, 40, 64, generator=torch.Generator().manual_seed(seed), requires_grad=True)
        h = x * 1.5
        layer(h).square().sum().backward()
        found, x.grad = x.grad, None
        h = x * 1.5
        q, k, v = (split_heads(part, 4) for part in (layer.to_q(h), layer.to_k(h), layer.to_v(h)))
        layer.to_out(join_heads(attention(q, k, v))).square().sum().backward()
        assert torch.equal(found, x.grad)
