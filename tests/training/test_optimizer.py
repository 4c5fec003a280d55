"""The direction of Muon's steps."""

import pytest
import torch

from ldmcli.training.optimizer import orthogonalise

SHAPES = [(1, 8, 8), (3, 16, 144), (2, 144, 16), (4, 12, 20), (1, 1, 9)]


def newton_schulz(x: torch.Tensor) -> torch.Tensor:
    """Five iterations on whole matrices, as Jordan et al. (2024) write them."""
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    return x.mT if tall else x


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spectrum", ["even", "steep", "one direction", "zero"])
def test_orthogonalised_through_the_gram_matrix_as_through_whole_matrices(shape, spectrum):
    generator = torch.Generator().manual_seed(0)
    u, s, v = torch.linalg.svd(torch.randn(shape, generator=generator, dtype=torch.float64), full_matrices=False)
    falling = {"even": 0.0, "steep": 1.0, "one direction": 40.0}.get(spectrum)
    x = torch.zeros_like(u @ v) if falling is None else u @ ((-falling * torch.arange(s.shape[1])).exp()[:, None] * v)
    want = newton_schulz(x)
    assert torch.allclose(orthogonalise(x), want, rtol=0, atol=1e-9)
    assert torch.allclose(orthogonalise(x.float()).double(), want, rtol=0, atol=2e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_end_near_one(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(orthogonalise(x))
    assert values.min() > 0.5 and values.max() < 1.3
