"""The direction of Muon's steps, its iterations and its momentum."""

import pytest
import torch

from ldmcli.core.errors import UsageError
from ldmcli.core.settings import DiffusionSettings, TrainSettings
from ldmcli.networks.unet import ResBlock
from ldmcli.training.optimizer import PhaseOptimizer, orthogonalise

SHAPES = [(1, 8, 8), (3, 16, 144), (2, 144, 16), (4, 12, 20), (1, 1, 9)]


def newton_schulz(x: torch.Tensor, iterations: int) -> torch.Tensor:
    """Iterations on whole matrices, as Jordan et al. (2024) write them."""
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    return x.mT if tall else x


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spectrum", ["even", "steep", "one direction", "zero"])
@pytest.mark.parametrize("iterations", [1, 3, 5])
def test_orthogonalised_through_the_gram_matrix_as_through_whole_matrices(shape, spectrum, iterations):
    generator = torch.Generator().manual_seed(0)
    u, s, v = torch.linalg.svd(torch.randn(shape, generator=generator, dtype=torch.float64), full_matrices=False)
    falling = {"even": 0.0, "steep": 1.0, "one direction": 40.0}.get(spectrum)
    x = torch.zeros_like(u @ v) if falling is None else u @ ((-falling * torch.arange(s.shape[1])).exp()[:, None] * v)
    want = newton_schulz(x, iterations)
    assert torch.allclose(orthogonalise(x, iterations), want, rtol=0, atol=1e-9)
    assert torch.allclose(orthogonalise(x.float(), iterations).double(), want, rtol=0, atol=2e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_end_near_one(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(orthogonalise(x))
    assert values.min() > 0.5 and values.max() < 1.3


def test_an_iteration_multiplies_small_singular_values_by_its_linear_coefficient():
    values = torch.tensor([1.0, 1e-4], dtype=torch.float64)
    for iterations in (1, 3, 4):
        small = torch.linalg.svdvals(orthogonalise(torch.diag(values)[None], iterations)).min()
        assert small == pytest.approx(1e-4 * 3.4445**iterations, rel=1e-2)


@pytest.mark.parametrize("iterations", [1, 3, 5])
@pytest.mark.parametrize("every", [1, 2])
def test_scale_and_shift_of_a_norm_are_orthogonalised_each_by_itself(every, iterations):
    settings = TrainSettings(optimizer="muon", lr=0.1, muon_momentum=0.0, muon_every=every, muon_iterations=iterations)
    block = ResBlock(4, 4, DiffusionSettings(channels=4, groups=2, scale_shift=True))
    plain = ResBlock(4, 4, DiffusionSettings(channels=4, groups=2, scale_shift=False))
    for module, maps in ((block, 2), (plain, 1)):
        weight = module.emb_layers[1].weight
        assert weight.shape == (4 * maps, 16)
        for parameter in module.parameters():
            parameter.grad = torch.randn(parameter.shape)
        wanted = [w - 0.1 * orthogonalise(g[None], iterations)[0]
                  for w, g in zip(weight.detach().chunk(maps), weight.grad.chunk(maps))]  # fmt: skip
        PhaseOptimizer(module.named_parameters(), settings).step(1.0)
        torch.testing.assert_close(weight.detach(), torch.cat(wanted), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("momentum", [0.0, 0.8, 0.95])
@pytest.mark.parametrize("shape", [(6, 4), (3, 2, 3, 3)])
def test_muon_follows_nesterov_momentum_of_its_setting(shape, momentum):
    settings = TrainSettings(optimizer="muon", lr=0.1, muon_momentum=momentum)
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(shape))
    optimizer = PhaseOptimizer([("hidden.weight", weight)], settings)
    wanted, velocity = weight.detach().flatten(1), torch.zeros(shape).flatten(1)
    scale = max(1.0, wanted.shape[0] / wanted.shape[1]) ** 0.5
    for _ in range(3):
        weight.grad = torch.randn(shape)
        gradient = weight.grad.flatten(1)
        velocity = momentum * velocity + (1 - momentum) * gradient
        direction = momentum * velocity + (1 - momentum) * gradient
        wanted = wanted - 0.1 * scale * orthogonalise(direction[None])[0]
        optimizer.step(1.0)
    torch.testing.assert_close(weight.detach().flatten(1), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("keep", [None, 1.0, 0.0])
@pytest.mark.parametrize("every", [1, 2])
def test_weight_decay_reaches_what_either_optimiser_trains_at_its_rate(every, keep):
    def trained(weight_decay: float) -> list[torch.Tensor]:
        settings = TrainSettings(optimizer="muon", lr=0.1, adam_lr=0.01, weight_decay=weight_decay, muon_every=every)
        torch.manual_seed(0)
        named = [("hidden.weight", torch.nn.Parameter(torch.randn(6, 4))), ("bias", torch.nn.Parameter(torch.randn(6)))]
        optimizer = PhaseOptimizer(named, settings)
        for _, parameter in named:
            parameter.grad = torch.randn_like(parameter)
        before = [parameter.detach().clone() for _, parameter in named]
        optimizer.step(0.5, None if keep is None else torch.tensor(keep))
        return [parameter.detach() - then for (_, parameter), then in zip(named, before)] + before

    hidden, bias, *_ = trained(0.0)
    decayed_hidden, decayed_bias, old_hidden, old_bias = trained(0.2)
    on = 1.0 if keep is None else keep
    torch.testing.assert_close(decayed_hidden - hidden, -on * 0.1 * 0.5 * 0.2 * old_hidden, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(decayed_bias - bias, -on * 0.01 * 0.5 * 0.2 * old_bias, rtol=1e-3, atol=1e-6)


def test_momentum_is_a_share_below_one_and_iterations_are_counted():
    with pytest.raises(UsageError, match=r"muon_momentum = 1.0: must be at least 0 and below 1"):
        TrainSettings(optimizer="muon", muon_momentum=1.0)
    with pytest.raises(UsageError, match=r"muon_iterations = 0: must be at least 1"):
        TrainSettings(optimizer="muon", muon_iterations=0)
