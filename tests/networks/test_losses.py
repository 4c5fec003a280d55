"""First-stage losses and the discriminator: recorded outputs of the original, closed forms, two processes."""

import json
import os
import socket

import pytest
import torch
from golden_cases import shared
from processes import call
from safetensors.torch import load_file

from ldmcli.core.errors import UsageError
from ldmcli.core.settings import LossSettings
from ldmcli.networks.discriminator import PatchDiscriminator
from ldmcli.networks.losses import (
    Adversary,
    adversarial_weight,
    codebook_stats,
    disc_factor,
    discriminator_loss,
    edge_distance,
    generator_loss,
)

VARIANTS = [f"{reg}.{gan}.step{step}" for reg in ("kl", "vq") for gan in ("hinge", "vanilla") for step in (0, 100)]
KEYS = {"total_loss", "kl_loss", "nll_loss", "rec_loss", "d_weight", "disc_factor", "g_loss", "quant_loss"}


def recorded_discriminator(config):
    net = PatchDiscriminator(3, config["disc"]["ndf"], config["disc"]["n_layers"])
    net.load_state_dict(load_file(shared("golden", "ae_losses", "discriminator.safetensors")), strict=True)
    return net


def stand_in(x, rec):
    return (x - rec).square().mean(dim=(1, 2, 3), keepdim=True)


def posterior_kl(moments):
    mean, logvar = moments.chunk(2, dim=1)
    logvar = logvar.clamp(-30, 20)
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(dim=(1, 2, 3))


@pytest.fixture(scope="module")
def recorded():
    folder = shared("golden", "ae_losses")
    return json.loads((folder / "config.json").read_text()), load_file(folder / "io.safetensors")


def run_variant(config, io, variant):
    reg, gan, step = variant.split(".")
    entry, step = config[reg], int(step[4:])
    settings = LossSettings(
        style="paper",
        l1=1.0,
        l2=0.0,
        edge=0.0,
        gan=gan,
        perceptual_weight=config["perceptual_weight"],
        kl_weight=entry.get("kl_weight", 1e-6),
        disc_weight=entry["disc_weight"],
        disc_start=entry["disc_start"],
    )
    weight = io["last_weight"].clone().requires_grad_()
    rec = torch.nn.functional.conv2d(io["feat"], weight, padding=1)
    factor, logvar = disc_factor(step, settings), torch.tensor(entry.get("logvar_init", 0.0), requires_grad=True)
    regulariser = posterior_kl(io["moments"]) if reg == "kl" else torch.tensor(entry["codebook_loss"])
    adversary = Adversary(logits_fake=recorded_discriminator(config)(rec), factor=factor)
    total, stats = generator_loss(
        reg,
        io["x"],
        rec,
        regulariser,
        settings,
        last_layer=weight,
        perceptual=stand_in,
        adversary=adversary,
        logvar=logvar if reg == "kl" else None,
        norms=True,
    )
    total.backward()
    net = recorded_discriminator(config)
    loss = discriminator_loss(net(io["x"]), net(rec.detach()), gan, factor)
    return stats | {"disc_loss": loss.detach()}, weight.grad, logvar.grad


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_are_those_of_the_original(recorded, variant):
    config, io = recorded
    stats, grad, logvar_grad = run_variant(config, io, variant)
    expected = {name.split("/")[-1]: value for name, value in config["results"][variant].items()}
    shared = (KEYS | {"disc_loss"}) & set(expected)
    assert len(shared) >= 8
    for name in shared:
        assert float(stats[name]) == pytest.approx(expected[name], rel=1e-5, abs=1e-7), name
    torch.testing.assert_close(grad, io[f"{variant}.grad_last_weight"], rtol=1e-4, atol=2e-5 * float(grad.abs().max()))
    if "grad_logvar" in expected:
        assert float(logvar_grad) == pytest.approx(expected["grad_logvar"], rel=1e-5)
    if "p_loss" in expected:
        assert float(stats["perceptual_loss"]) == pytest.approx(expected["p_loss"], rel=1e-5)


def test_the_discriminator_gives_the_recorded_logits_in_both_modes(recorded):
    config, io = recorded
    net = recorded_discriminator(config)
    torch.testing.assert_close(net.train()(io["x"]), io["logits_train_mode"], rtol=1e-5, atol=1e-6)
    net = recorded_discriminator(config)
    torch.testing.assert_close(net.eval()(io["x"]), io["logits_eval_mode"], rtol=1e-5, atol=1e-6)


def test_codebook_statistics_are_those_of_the_original(recorded):
    config, _ = recorded
    stats = codebook_stats(torch.tensor(config["vq"]["predicted_indices"]), config["vq"]["n_classes"])
    expected = config["results"]["vq.hinge.step0"]
    assert float(stats["perplexity"]) == pytest.approx(expected["train/perplexity"], rel=1e-5)
    assert int(stats["codes_used"]) == expected["train/cluster_usage"]
    assert float(stats["code_usage"]) == pytest.approx(6 / 16)


def test_the_paper_discriminators_have_their_published_size():
    def parameters(layers):
        return sum(p.numel() for p in PatchDiscriminator(3, 64, layers).parameters())

    assert parameters(3) == 2_765_633
    assert parameters(2) == 663_361


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_smallest_image_gives_one_logit_and_a_smaller_one_a_sentence(layers):
    net = PatchDiscriminator(3, 8, layers)
    assert net(torch.randn(2, 3, net.smallest_size, net.smallest_size)).shape == (2, 1, 1, 1)
    assert torch.isfinite(net(torch.randn(1, 3, net.smallest_size, net.smallest_size))).all()
    with pytest.raises(UsageError, match="disc_layers"):
        net(torch.randn(2, 3, net.smallest_size - 1, net.smallest_size - 1))


def tiny_autoencoder():
    torch.manual_seed(0)
    first, last = torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Conv2d(8, 3, 3, padding=1)
    return torch.nn.Sequential(first, torch.nn.Tanh(), last)


def total_of(settings, reg="kl", adversary=False, norms=False):
    net, x = tiny_autoencoder(), torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    rec = net(x)
    regulariser = rec.square().sum(dim=(1, 2, 3)) if reg == "kl" else rec.square().mean()
    enemy = Adversary(logits_fake=PatchDiscriminator(3, 8, 2)(rec)) if adversary else None
    total, stats = generator_loss(
        reg, x, rec, regulariser, settings, last_layer=net[2].weight, perceptual=stand_in, adversary=enemy, norms=norms
    )
    return net, total, stats


def test_the_mean_style_is_the_paper_style_per_pixel_value():
    options = dict(kl_weight=1e-3, perceptual_weight=0.5, edge=0.25, l2=0.1)
    _, paper, _ = total_of(LossSettings(style="paper", **options))
    _, mean, _ = total_of(LossSettings(style="mean", **options))
    assert paper.item() == pytest.approx(mean.item() * 3 * 24 * 24, rel=1e-6)


def test_a_vq_loss_is_averaged_in_both_styles():
    _, paper, _ = total_of(LossSettings(style="paper"), reg="vq")
    _, mean, _ = total_of(LossSettings(style="mean"), reg="vq")
    assert paper.item() == pytest.approx(mean.item(), rel=1e-7)


@pytest.mark.parametrize("only", ["l1", "l2", "edge", "perceptual", "gan", "kl"])
def test_each_term_alone_moves_encoder_and_decoder(only):
    off = dict(l1=0.0, l2=0.0, edge=0.0, perceptual_weight=0.0, kl_weight=0.0, disc_weight=0.0)
    name = {"perceptual": "perceptual_weight", "gan": "disc_weight", "kl": "kl_weight"}.get(only, only)
    net, total, stats = total_of(LossSettings(**(off | {name: 1.0})), adversary=only == "gan", norms=True)
    total.backward()
    assert all(float(parameter.grad.abs().max()) > 0 for parameter in net.parameters())
    assert all(torch.isfinite(value).all() for value in stats.values())
    assert ("grad_g" in stats) == (only == "gan")
    assert ("grad_perceptual" in stats) == (only == "perceptual")


def test_with_every_weight_zero_each_parameter_still_gets_a_gradient_of_zero():
    off = dict(l1=0.0, l2=0.0, edge=0.0, kl_weight=0.0)
    net, total, _ = total_of(LossSettings(**off))
    total.backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in net.parameters())


def test_the_adaptive_weight_balances_both_gradients_at_the_last_layer():
    net, _, stats = total_of(LossSettings(disc_weight=0.5, disc_start=0), adversary=True, norms=True)
    expected = 0.5 * stats["grad_nll"] / (stats["grad_g"] + 1e-4)
    assert 0 < float(expected) < 1e4
    torch.testing.assert_close(stats["d_weight"], expected)


def test_the_adaptive_weight_is_clamped_and_zero_without_a_graph():
    weight = torch.ones(3, requires_grad=True)
    settings = LossSettings(disc_weight=2.0)
    assert float(adversarial_weight((weight * 1e6).sum(), (weight * 0).sum(), settings, weight)) == 2e4
    with torch.no_grad():
        assert float(adversarial_weight(weight.sum(), weight.sum(), settings, weight)) == 0
    fixed = LossSettings(disc_weight=2.0, adaptive_weight=False)
    assert float(adversarial_weight((weight * 1e6).sum(), weight.sum(), fixed, weight)) == 2


def test_the_discriminator_factor_begins_at_its_step():
    settings = LossSettings(disc_weight=0.5, disc_start=5)
    assert [disc_factor(step, settings) for step in (4, 5, 6)] == [0, 1, 1]
    assert disc_factor(10, LossSettings(disc_weight=0.0, disc_start=5)) == 0


def test_before_its_start_the_discriminator_gets_a_zero_gradient():
    net = PatchDiscriminator(3, 8, 2)
    x = torch.randn(2, 3, 16, 16)
    discriminator_loss(net(x), net(-x), "hinge", 0.0).backward()
    assert not any(parameter.grad.any() for parameter in net.parameters())
    discriminator_loss(net(x), net(-x), "hinge", 1.0).backward()
    assert any(parameter.grad.any() for parameter in net.parameters())


def test_the_edge_term_ignores_brightness_and_sees_a_step():
    x = torch.zeros(1, 1, 4, 4)
    assert float(edge_distance(x, x + 0.3)) == 0
    step = x.clone()
    step[..., 2:] = 1.0  # one of three horizontal differences is 1
    assert float(edge_distance(x, step)) == pytest.approx(1 / 6)


def _train_mode_gradients(rank, world, port, shares, folder):
    if world > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    torch.manual_seed(3)
    net = PatchDiscriminator(3, 8, 2).double()
    scale = torch.nn.Conv2d(3, 3, 1).double()
    x = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    own = scale(x[sum(shares[:rank]) : sum(shares[: rank + 1])])
    logits = net(own)
    # the mean over the global batch, written as a mean over processes as DistributedDataParallel takes it
    loss = logits.square().mean(dim=(1, 2, 3)).sum() * world / len(x)
    settings = LossSettings(disc_weight=1.0)
    lam = adversarial_weight((own**3).mean(dim=(1, 2, 3)).sum() * world / len(x), loss, settings, scale.weight)
    loss.backward()
    parameters = [*net.parameters(), *scale.parameters()]
    for parameter in parameters if world > 1 else []:
        torch.distributed.all_reduce(parameter.grad)
        parameter.grad /= world
    result = [p.grad for p in parameters] + [b.double() for b in net.buffers()] + [lam.double()]
    torch.save([r.clone() for r in result], f"{folder}/{world}-{rank}.pt")
    if world > 1:
        torch.distributed.destroy_process_group()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("shares", [(3, 3), (4, 2)])
def test_two_processes_have_the_batch_statistics_gradients_and_weight_of_one(tmp_path, shares):
    _train_mode_gradients(0, 1, 0, (6,), tmp_path)
    call(2, _train_mode_gradients, 2, free_port(), shares, str(tmp_path))
    one, first, second = (torch.load(tmp_path / name) for name in ("1-0.pt", "2-0.pt", "2-1.pt"))
    for a, b, c in zip(one, first, second, strict=True):
        torch.testing.assert_close(b, c, rtol=0, atol=0)
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
