"""The first stage against recorded outputs, closed forms and its own invariants."""

import pytest
import torch
from golden_cases import decided, golden, randomised, relative

from ldmcli.core.errors import UsageError
from ldmcli.core.settings import FACTORS, AutoencoderSettings
from ldmcli.networks.autoencoder import Autoencoder, kl_divergence, posterior_sample, split_moments
from ldmcli.networks.vector_quantizer import VectorQuantizer, restart_dead_codes

EXACT, THROUGH_QUANTISER = 5e-6, 2e-5
# the decoder's convolutions are summed in another order on other CPUs, which moved an output by 7.9e-6 of the largest
DECODED = 1e-5
# 34 channels make 17 groups of two: one channel a group would cancel the biases before it
SMALL = {"channels": 34, "num_res_blocks": 1, "z_channels": 3, "embed_dim": 2, "codebook_size": 16}


def settings_of(config: dict) -> AutoencoderSettings:
    """Our settings for a configuration of the original."""
    dd = config["ddconfig"]
    return AutoencoderSettings(
        family="paper",
        f=2 ** (len(dd["ch_mult"]) - 1),
        reg="kl" if dd["double_z"] else "vq",
        z_channels=dd["z_channels"],
        embed_dim=config["embed_dim"],
        codebook_size=config.get("n_embed", 1),
        channels=dd["ch"],
        channel_mult=tuple(dd["ch_mult"]),
        num_res_blocks=dd["num_res_blocks"],
        attn_resolutions=tuple(dd["attn_resolutions"]),
        resolution=dd["resolution"],
        mid_attention=dd.get("attn_type") != "none",
        beta=0.25,
        legacy_beta=True,
    )


def loaded(case: str) -> tuple[Autoencoder, dict[str, torch.Tensor]]:
    config, state, io = golden(case)
    model = Autoencoder(settings_of(config)).eval()
    model.load_state_dict(state, strict=True)
    return model, io


def small(family: str, f: int, reg: str) -> Autoencoder:
    torch.manual_seed(0)
    mult = (1,) * f.bit_length() if family == "paper" else (1, 2)
    return Autoencoder(AutoencoderSettings(family=family, f=f, reg=reg, channel_mult=mult, **SMALL))


@torch.no_grad()
def test_kl_model_repeats_the_recorded_moments_and_reconstructions():
    model, io = loaded("kl_f4_attn")
    moments = model.moments(io["x"])
    mean, logvar = split_moments(moments)
    z = posterior_sample(moments, io["eps"])
    assert relative(moments, io["moments"]) < EXACT
    assert relative(mean, io["mean"]) < EXACT
    assert relative(logvar, io["logvar"]) < EXACT
    assert relative(model.kl(moments), io["kl"]) < EXACT
    assert relative(z, io["z"]) < EXACT
    assert relative(model.decode(mean), io["rec_mode"]) < DECODED
    out = model(io["x"], io["eps"])
    assert relative(out.reconstruction, io["rec_sample"]) < DECODED
    assert out.codebook_loss.item() == 0.0 and out.indices is None


@torch.no_grad()
def test_vq_model_repeats_the_recorded_codes_and_reconstructions():
    model, io = loaded("vq_f4_noattn")
    h = model.moments(io["x"])
    found = model.quantize(h)
    assert relative(h, io["h"]) < EXACT
    assert decided(io["h"], model.quantize.embedding.weight, EXACT * io["h"].abs().max().item()).all()
    assert torch.equal(found.indices, io["indices"])
    assert relative(found.z, io["quant"]) < EXACT
    assert torch.allclose(model.codes(found.indices), found.z, atol=1e-6)
    assert relative(model.decode(h), io["rec"]) < THROUGH_QUANTISER
    assert relative(model.decode(model.codes(io["indices"])), io["rec"]) < THROUGH_QUANTISER
    assert relative(model.decode(h, quantize=False), io["rec_noquant"]) < DECODED
    assert relative(model(io["x"]).reconstruction, io["rec"]) < THROUGH_QUANTISER


@pytest.mark.parametrize("legacy, name", [(True, "legacy"), (False, "fixed")])
def test_vq_loss_and_its_gradients_repeat_the_recorded_ones(legacy, name):
    config, state, io = golden("vq_f4_noattn")
    quantizer = VectorQuantizer(config["n_embed"], config["embed_dim"], config["beta"], legacy)
    quantizer.embedding.weight.data.copy_(state["quantize.embedding.weight"])
    h = io["h"].clone().requires_grad_()
    loss = quantizer(h).loss
    loss.backward()
    assert loss.item() == pytest.approx(io[f"vq_loss_{name}"].item(), rel=1e-5)
    assert relative(h.grad, io[f"grad_h_{name}"]) < EXACT
    assert relative(quantizer.embedding.weight.grad, io[f"grad_codebook_{name}"]) < EXACT


def test_straight_through_gradient_repeats_the_recorded_one():
    model, io = loaded("vq_f4_noattn")
    h = io["h"].clone().requires_grad_()
    model.quantize(h).z.square().sum().backward()
    assert relative(h.grad, io["grad_h_straight_through"]) < EXACT


def test_a_tie_between_codes_goes_to_the_first():
    quantizer = VectorQuantizer(3, 2, 0.25, False)
    quantizer.embedding.weight.data = torch.tensor([[5.0, 5.0], [1.0, 0.0], [1.0, 0.0]])
    assert quantizer(torch.tensor([1.0, 0.1]).view(1, 2, 1, 1)).indices.item() == 1


def test_beta_weighs_the_commitment_term_and_legacy_beta_the_codebook_term():
    gradients = {}
    for legacy in (False, True):
        quantizer = VectorQuantizer(1, 1, 0.25, legacy)
        quantizer.embedding.weight.data.fill_(1.0)
        z = torch.full((1, 1, 1, 1), 3.0, requires_grad=True)
        quantizer(z).loss.backward()
        gradients[legacy] = (z.grad.item(), quantizer.embedding.weight.grad.item())
    assert gradients[False] == (0.25 * 4.0, -4.0)  # d/dz 0.25 (z - e)², d/de (e - z)² at z - e = 2
    assert gradients[True] == (4.0, 0.25 * -4.0)


def test_nearest_code_in_parts_equals_brute_force():
    generator = torch.Generator().manual_seed(0)
    quantizer = VectorQuantizer(64, 4, 0.25, False)
    quantizer.embedding.weight.data = torch.randn(64, 4, generator=generator)
    rows = torch.randn(20_000, 4, generator=generator)  # more than one part of the distance matrix
    codebook = quantizer.embedding.weight.detach()
    expected = torch.cdist(rows.double(), codebook.double()).argmin(dim=1)
    clear = decided(rows.T[None, :, None], codebook).flatten()
    assert clear.float().mean() > 0.999 and torch.equal(quantizer.nearest(rows)[clear], expected[clear])


def test_kl_is_zero_for_a_standard_normal_and_sums_over_elements():
    moments = torch.zeros(2, 4, 3, 3)
    assert kl_divergence(moments).tolist() == [0.0, 0.0]
    moments[0, :2] = 2.0  # mean 2 on 18 elements: 0.5 · 4 each
    assert kl_divergence(moments).tolist() == [36.0, 0.0]


def test_log_variance_is_clamped_before_use():
    moments = torch.tensor([0.0, 99.0]).view(1, 2, 1, 1)
    assert split_moments(moments)[1].item() == 20.0
    assert split_moments(-moments)[1].item() == -30.0
    assert posterior_sample(-moments, torch.ones(1, 1, 1, 1)).item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("f", FACTORS[1:])
@pytest.mark.parametrize("reg", ["kl", "vq"])
@pytest.mark.parametrize("family", ["fast", "paper"])
def test_every_parameter_gets_a_finite_gradient_at_every_factor(family, reg, f):
    model = small(family, f, reg)
    side = max(32, f)
    x = torch.randn(1, 3, side, 2 * side, generator=torch.Generator().manual_seed(1))
    noise = torch.ones(1, *model.latent_shape(side, 2 * side)) if reg == "kl" else None
    out = model(x, noise)
    assert out.reconstruction.shape == x.shape
    assert out.z.shape == (1, *model.latent_shape(side, 2 * side))
    ((out.reconstruction - x).square().mean() + out.codebook_loss + 1e-3 * model.kl(out.moments).sum()).backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    flat = [n for n, p in model.named_parameters() if p.grad is not None and not p.grad.any()]
    # the bias of the keys adds one number to all of a query's logits: its gradient is 0 but for rounding
    assert silent == [] and [name for name in flat if not name.endswith("attn_1.k.bias")] == []


@pytest.mark.parametrize("family", ["fast", "paper"])
@pytest.mark.parametrize("reg", ["kl", "vq"])
def test_factor_1_is_the_identity_without_parameters(family, reg):
    model = Autoencoder(AutoencoderSettings(family=family, f=1, reg=reg))
    x = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    out = model(x)
    assert list(model.state_dict()) == []
    assert model.moments(x) is x and model.decode(x) is x and out.reconstruction is x
    assert model.kl(x).tolist() == [0.0, 0.0] and model.latent_channels == 3


def test_factor_1_with_one_level_stated_is_a_network():
    model = Autoencoder(AutoencoderSettings(family="paper", f=1, channel_mult=(1,), **SMALL))
    assert not model.is_identity
    assert model.moments(torch.zeros(1, 3, 8, 8)).shape == (1, 4, 8, 8)


def test_attention_follows_the_nominal_resolution_not_the_image():
    settings = AutoencoderSettings(
        family="paper", channel_mult=(1, 1, 1), resolution=64, attn_resolutions=(16,), mid_attention=False, **SMALL
    )
    names = [name for name in Autoencoder(settings).state_dict() if ".q.weight" in name]
    assert names == ["encoder.down.2.attn.0.q.weight", "decoder.up.2.attn.0.q.weight", "decoder.up.2.attn.1.q.weight"]


@pytest.mark.parametrize("family", ["fast", "paper"])
def test_an_image_that_f_does_not_divide_is_refused_with_the_nearest_size(family):
    with pytest.raises(UsageError, match="30x65.*multiples of 4.*nearest is 32x64"):
        small(family, 4, "kl").moments(torch.zeros(1, 3, 30, 65))


def test_last_layer_is_the_weight_of_the_last_convolution():
    model = small("paper", 4, "kl")
    assert model.last_layer is dict(model.named_parameters())["decoder.conv_out.weight"]
    with pytest.raises(UsageError, match="f = 1"):
        _ = Autoencoder(AutoencoderSettings(f=1)).last_layer


def test_default_fast_autoencoder_has_about_0_9_million_parameters_and_no_norm():
    model = Autoencoder(AutoencoderSettings())
    assert 0.85e6 < sum(p.numel() for p in model.parameters()) < 0.95e6
    assert not any(isinstance(m, torch.nn.GroupNorm) for m in model.modules())


def test_reviving_replaces_dead_codes_only_and_repeats_under_the_same_generator():
    codebook, vectors = torch.zeros(5, 2), torch.arange(6.0).view(3, 2) + 1
    dead = torch.tensor([False, True, False, True, False])
    new = restart_dead_codes(codebook, dead, vectors, torch.Generator().manual_seed(4))
    again = restart_dead_codes(codebook, dead, vectors, torch.Generator().manual_seed(4))
    rows = {tuple(row) for row in vectors.tolist()}
    assert torch.equal(new, again) and not codebook.any()
    assert not new[[0, 2, 4]].any()
    assert {tuple(row) for row in new[dead].tolist()} < rows and not torch.equal(new[1], new[3])


def test_more_dead_codes_than_vectors_are_all_revived():
    new = restart_dead_codes(
        torch.zeros(7, 2), torch.ones(7, dtype=torch.bool), torch.ones(2, 2), torch.Generator().manual_seed(0)
    )
    assert torch.equal(new, torch.ones(7, 2))


@torch.no_grad()
def test_own_small_models_repeat_the_figures_they_once_gave():
    x = torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16)
    sums = {}
    for family in ("paper", "fast"):
        model = randomised(small(family, 4, "kl").eval())
        for parameter in model.parameters():  # a start that does not depend on torch's initialisers
            parameter.copy_(torch.cos(torch.arange(parameter.numel()) * 1.7).view_as(parameter) * 0.2)
        sums[family] = model(x).reconstruction.double().abs().mean().item()
    assert sums == pytest.approx(OWN_FIGURES, rel=1e-5)


OWN_FIGURES = {"paper": 0.17873721, "fast": 0.95484181}


@pytest.mark.parametrize(("in_use", "dtype"), [(True, torch.bfloat16), (True, None), (False, torch.bfloat16)])
def test_maps_are_channels_last_where_that_is_faster_on_a_cpu(in_use, dtype):
    network = Autoencoder(
        AutoencoderSettings(family="paper", f=4, channels=32, channel_mult=(1, 2, 2), num_res_blocks=1)
    )
    torch.manual_seed(0)
    z, formats = torch.randn(1, network.settings.z_channels, 8, 8), []
    for layer in network.decoder.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_pre_hook(
                lambda _, given: formats.append(given[0].is_contiguous(memory_format=torch.channels_last))
            )
    with torch.set_grad_enabled(not in_use), torch.autocast("cpu", dtype, enabled=dtype is not None):
        found = network.decoder(z)
    wide = [last for last in formats if last is not None]
    assert all(wide) if in_use and dtype else not all(wide)
    with torch.no_grad():
        expected = network.decoder(z)
    assert (found.float() - expected).abs().max() < 0.05 * expected.abs().max()
