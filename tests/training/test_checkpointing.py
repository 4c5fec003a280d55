"""Blocks that are computed again in the backward pass: the same gradients, less memory, and the plan knows how much."""

from dataclasses import replace
from functools import partial

import pytest
import tiny_models as tiny
import torch

from ldmcli.core.settings import AutoencoderConfig, LossSettings
from ldmcli.diffusion.loss import diffusion_loss
from ldmcli.diffusion.schedule import make_schedule
from ldmcli.networks import blocks
from ldmcli.networks.autoencoder import Autoencoder
from ldmcli.networks.blocks import attention, set_checkpointing
from ldmcli.networks.meta_device import on_meta_device
from ldmcli.networks.text_encoder import TextTransformer
from ldmcli.networks.unet import UNet
from ldmcli.sampling.memory import LiveTensorMeter
from ldmcli.training import cost

CPU = torch.device("cpu")
DEEP = replace(tiny.UNET, channels=32, channel_mult=(1, 2), num_res_blocks=2, groups=8)
X, IDS = torch.rand(2, 3, 16, 16), torch.arange(24).reshape(2, 12)
NETWORKS = {
    "unet": (lambda: UNet(DEEP, 3, 3, context_dim=None), lambda net: net(X, torch.tensor([3.0, 40.0]))),
    "unet, codes": (
        lambda: UNet(replace(DEEP, position="sinusoidal", patch=2), 3, 3),
        lambda net: net(X, torch.tensor([3.0, 40.0])),
    ),
    "text": (lambda: TextTransformer(32, 16, 3, 12, 2, 8), lambda net: net(IDS)),
    **{
        name: (lambda name=name: Autoencoder(tiny.STAGES[name]), lambda net: net(X, None).reconstruction)
        for name in ("kl", "vq", "paper")
    },
}


def made(name):
    torch.manual_seed(0)
    network = NETWORKS[name][0]()
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return network


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_stay_and_less_is_kept(name):
    found, kept = [], []
    for on in (False, True):
        network, run = made(name), NETWORKS[name][1]
        set_checkpointing(network, on)
        out = run(network)
        out.square().sum().backward()
        found.append([out, *(p.grad for p in network.parameters() if p.grad is not None)])
        kept.append(cost.peak_step_bytes(network, partial(run, network)))
    assert len(found[0]) == len(found[1])
    for a, b in zip(*found):  # what several blocks share is added up in another order
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert torch.equal(found[0][0], found[1][0])
    assert kept[1] < 0.85 * kept[0], kept


def kept_in_a_step(network, loss) -> int:
    """Bytes that the forward pass of a real step keeps for the backward pass, beside the weights."""
    weights, kept = {p.untyped_storage()._cdata for p in network.parameters()}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss()
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("kinds", [(), ("class",)])
@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_a_plan_counts_what_a_step_of_a_diffusion_model_keeps(kinds, prediction):
    model = tiny.tiny_model("kl", kinds=kinds, prediction=prediction)
    network, settings, schedule = model.network, model.config.diffusion, make_schedule(model.config.diffusion)
    images, shape = 8, model.network.latent_shape
    specs = {"class": {"class_names": ["a", "b"]}}
    planned = cost.diffusion_cost(model.config, specs, shape, (tiny.SIDE, tiny.SIDE)).activation_bytes
    z, t = torch.randn(images, *shape), torch.full((images,), 7.0)
    inputs = network.conditions.prepare({"class": [0, 1] * 4}) if kinds else {}
    found = kept_in_a_step(network, lambda: diffusion_loss(network, schedule, settings, z, z, t, inputs).mean())
    assert images * planned == pytest.approx(found, rel=0.15)


@pytest.mark.parametrize("stage", ["kl", "vq", "paper"])
def test_a_plan_counts_what_a_first_stage_keeps(stage):
    config = AutoencoderConfig(autoencoder=tiny.STAGES[stage], loss=LossSettings(disc_weight=0.0))
    planned = cost.autoencoder_costs(config, (32, 32))["autoencoder"].activation_bytes
    network, x = Autoencoder(config.autoencoder), torch.rand(4, 3, 32, 32)
    noise = torch.randn(4, *network.latent_shape(32, 32))
    assert 4 * planned == pytest.approx(kept_in_a_step(network, lambda: network(x, noise).reconstruction), rel=0.15)


WIDER = replace(tiny.STAGES["paper"], channels=16, groups=8)
STEPS = {
    "unet": (lambda: UNet(DEEP, 3, 3, context_dim=None), lambda net, x: net(x, x[:, 0, 0, 0])),
    "first stage": (lambda: Autoencoder(WIDER), lambda net, x: net(x, None).reconstruction),
}


@pytest.mark.parametrize("on", [False, True], ids=["kept", "computed again"])
@pytest.mark.parametrize("name", STEPS)
def test_a_plan_counts_what_a_step_takes_at_its_fullest(name, on):
    """Tensors that exist at once in a real step beside weights and gradients."""
    make, run = STEPS[name]
    with on_meta_device():
        shapes, x = make(), torch.zeros(1, 3, 32, 32)
    set_checkpointing(shapes, on)
    planned, images = cost.saved_activation_bytes(shapes, lambda: run(shapes, x)), 6
    network, x = make(), torch.rand(images, 3, 32, 32)
    set_checkpointing(network, on)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    known = [x, *network.buffers(), *network.parameters(), *(p.grad for p in network.parameters())]
    with LiveTensorMeter(known) as live:
        out = run(network, x)
        out.backward(torch.ones_like(out))
    assert images * planned == pytest.approx(live.peak, rel=0.15)


@pytest.mark.parametrize("name", STEPS)
def test_a_plan_counts_what_is_kept_in_bfloat16_on_a_gpu(name, monkeypatch):
    """On fake CUDA tensors: activations of two bytes, and copies of all weights."""
    make, run = STEPS[name]
    with on_meta_device():
        shapes, x = make(), torch.zeros(1, 3, 32, 32)
    found = cost.NetworkCost(shapes, 0, 0, cost.saved_activation_bytes(shapes, lambda: run(shapes, x)))
    images, dtype = 6, torch.bfloat16
    planned = images * cost.kept_bytes([found], dtype, torch.device("cuda"))
    planned += cost.cast_bytes(shapes.named_parameters(), dtype)
    monkeypatch.setattr(blocks, "_attention_on_cuda", blocks._attention_of_shapes)
    with tiny.bf16_of_cuda() as device:
        with device:
            network, x = make(), torch.empty(images, 3, 32, 32)
        kept = kept_in_a_step(network, lambda: run(network, x))
    assert planned == pytest.approx(kept, rel=0.15)
    assert cost.kept_bytes([found], dtype, CPU) == cost.kept_bytes([found], None, CPU) == found.activation_bytes


def test_attention_without_scores_is_counted_as_it_is_done():
    """FLOPs of fused attention, forward and backward, are those of its two products."""
    q, k, v = (torch.zeros(1, 2, length, 8, device="meta", requires_grad=True) for length in (16, 12, 12))
    with cost.flop_counter() as counter:
        out = attention(q, k, v)
        forward = counter.get_total_flops()
        out.sum().backward()
    assert forward == 2 * 2 * (2 * 16 * 12 * 8) and counter.get_total_flops() == 3 * forward
    with torch.no_grad():
        assert attention(q, k, v).shape == out.shape == (1, 2, 16, 8)


def test_a_plan_knows_of_checkpointing():
    config = AutoencoderConfig(autoencoder=tiny.STAGES["paper"], loss=LossSettings(disc_weight=0.0))
    less = replace(config, train=replace(config.train, checkpointing=True))
    usual, fewer = (cost.autoencoder_costs(one, (32, 32))["autoencoder"] for one in (config, less))
    assert fewer.activation_bytes < 0.75 * usual.activation_bytes
    assert fewer.forward_flops == usual.forward_flops and fewer.training_flops > 1.1 * usual.training_flops
