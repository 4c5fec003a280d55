"""The text transformer and the small conditioners on their own; the recorded cases are in test_unet.py."""

import pytest
import torch

from ldmcli.core.errors import UsageError
from ldmcli.networks.text_encoder import SpatialRescaler, TextTransformer, pooled


def text(**changes) -> TextTransformer:
    torch.manual_seed(0)
    return TextTransformer(
        **{"vocab_size": 30, "width": 16, "layers": 2, "length": 9, "heads": 2, "head_channels": 4, **changes}
    ).eval()


def test_keys_are_those_of_the_published_checkpoints():
    state = text(logits_head=True).state_dict()
    assert len(state) == 13 * 2 + 6
    expected = {
        "transformer.token_emb.weight": (30, 16),
        "transformer.pos_emb.emb.weight": (9, 16),
        "transformer.attn_layers.layers.2.0.weight": (16,),
        "transformer.attn_layers.layers.2.1.to_q.weight": (8, 16),
        "transformer.attn_layers.layers.2.1.to_out.bias": (16,),
        "transformer.attn_layers.layers.3.1.net.0.0.weight": (64, 16),
        "transformer.attn_layers.layers.3.1.net.2.weight": (16, 64),
        "transformer.norm.bias": (16,),
        "transformer.to_logits.weight": (30, 16),
    }
    assert {key: tuple(state[key].shape) for key in expected} == expected


def test_the_logits_head_exists_only_on_request():
    assert not any("to_logits" in key for key in text().state_dict())


@torch.no_grad()
def test_word_order_changes_every_token_in_both_directions():
    model = text()
    a, b = model(torch.tensor([[1, 2, 3, 0]])), model(torch.tensor([[1, 3, 2, 0]]))
    assert ((a - b).abs().amax(dim=2) > 1e-4).all()  # the first token too: attention is not causal


@torch.no_grad()
def test_padding_takes_part():
    model = text()
    short, long = model(torch.tensor([[1, 2]])), model(torch.tensor([[1, 2, 0, 0]]))
    assert (short - long[:, :2]).abs().max() > 1e-4


def test_every_parameter_gets_a_finite_gradient_and_rows_beyond_the_text_none():
    model = text(layers=1)
    model(torch.arange(10).view(2, 5)).square().mul(torch.linspace(0, 1, 16)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
    assert not model.transformer.pos_emb.emb.weight.grad[5:].any()


def test_a_text_that_is_too_long_is_refused():
    with pytest.raises(UsageError, match="10 tokens: this model reads at most 9"):
        text()(torch.zeros(1, 10, dtype=torch.int64))


@torch.no_grad()
def test_rescaling_averages_2x2_blocks_and_mixes_channels():
    rescaler = SpatialRescaler(1, 2, 1)
    rescaler.channel_mapper.weight.copy_(torch.tensor([1.0, -2.0]).view(2, 1, 1, 1))
    out = rescaler(torch.tensor([[0.0, 1.0], [2.0, 5.0]]).view(1, 1, 2, 2))
    assert out.flatten().tolist() == [2.0, -4.0]


def test_pooling_keeps_the_size_of_independent_tokens():
    tokens = torch.randn(200, 16, 32, generator=torch.Generator().manual_seed(0))
    assert pooled(tokens).shape == (200, 32)
    assert pooled(tokens).std().item() == pytest.approx(1.0, abs=0.05)


@torch.no_grad()
def test_layers_add_to_the_embedding_rather_than_replace_it():
    model = text()
    for name, parameter in model.transformer.attn_layers.named_parameters():
        if "to_out" in name or "net.2" in name:
            parameter.zero_()
    tokens = torch.tensor([[4, 7, 1]])
    embedded = model.transformer.token_emb(tokens) + model.transformer.pos_emb.emb.weight[:3]
    assert torch.allclose(model(tokens), torch.layer_norm(embedded, (16,)), atol=1e-5)
