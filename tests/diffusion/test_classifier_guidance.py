"""Classifier guidance against a closed form: with the exact classifier of a mixture of Gaussians and the exact denoiser
of all of it, scale 1 gives the exact score of one component, for every process and sampler."""

import math

import pytest
import torch

from ldmcli.core.settings import DiffusionSettings
from ldmcli.diffusion.gradient_guidance import MAX_CLASS_SHIFT, classifier_guide
from ldmcli.diffusion.samplers import SAMPLERS
from ldmcli.diffusion.schedule import alpha_sigma, make_schedule, sampling_levels

MEANS, SPREAD = torch.tensor([-0.9, 0.1, 0.9]).double(), 0.3  # of components of equal weight, in every element alike
PROCESSES = ("eps", "v", "x0", "flow")
SHAPE = (2, 1, 1)  # one latent


def log_components(z, alpha, sigma):
    """log N(z; α μ_c, (α² s² + σ²) I), (B, classes), but for what all have in common."""
    variance = alpha**2 * SPREAD**2 + sigma**2
    return torch.stack([-0.5 * (z - alpha * mean).square().sum((1, 2, 3)) / variance for mean in MEANS], dim=1)


def component_denoiser(c: int):
    """The exact (x0, ε) of component c alone."""

    def denoise(z, t, alpha, sigma):
        x0 = MEANS[c] + alpha * SPREAD**2 / (alpha**2 * SPREAD**2 + sigma**2) * (z - alpha * MEANS[c])
        return x0, (z - alpha * x0) / sigma

    return denoise


def mixture_denoiser(z, t, alpha, sigma):
    """The exact (x0, ε) of the mixture: the components' x0, weighted by p(c | z_t)."""
    weights = log_components(z, alpha, sigma).softmax(1)
    x0 = sum(weights[:, c, None, None, None] * component_denoiser(c)(z, t, alpha, sigma)[0] for c in range(len(MEANS)))
    return x0, (z - alpha * x0) / sigma


def exact_classifier(schedule, c: int):
    """log p(c | z_t, t)."""

    def log_prob(z, t):
        alpha, sigma = (float(x) for x in alpha_sigma(schedule, torch.tensor(float(t), dtype=torch.float64)))
        return log_components(z, alpha, sigma).log_softmax(1)[:, c]

    return log_prob


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("prediction", PROCESSES)
@pytest.mark.parametrize("t", [5.0, 300.0, 700.0, 990.0])
def test_scale_1_gives_the_score_of_the_class(prediction, t):
    """ε − σ ∇ log p(c | z_t) = −σ ∇ log p(z_t | c): sign and size at once."""
    schedule, z = make_schedule(DiffusionSettings(prediction=prediction)), noise(6, *SHAPE)
    alpha, sigma = (float(x) for x in alpha_sigma(schedule, torch.tensor(t, dtype=torch.float64)))
    for c in range(len(MEANS)):
        guided = classifier_guide(mixture_denoiser, exact_classifier(schedule, c), 1.0)(z, t, alpha, sigma)
        for found, exact in zip(guided, component_denoiser(c)(z, t, alpha, sigma)):
            assert torch.allclose(found, exact, atol=1e-8), (c, t)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("prediction", PROCESSES)
def test_samples_fall_into_the_class_with_every_sampler(sampler, prediction):
    """64 samples of the middle class: the mean is its own within four standard errors, and none is another class's."""
    schedule = make_schedule(DiffusionSettings(prediction=prediction))
    levels, n = sampling_levels(schedule, 40), 64
    denoise = classifier_guide(mixture_denoiser, exact_classifier(schedule, 1), 1.0)
    z = SAMPLERS[sampler].function(
        denoise, noise(n, *SHAPE), levels, noise=lambda *step: noise(n, *SHAPE, seed=1 + step[0])
    )
    assert abs(float(z.mean()) - float(MEANS[1])) < 4 * SPREAD / math.sqrt(2 * n)
    assert (log_components(z, 1.0, 1e-3).argmax(1) == 1).float().mean() > 0.9


def test_what_a_classifier_errs_by_at_pure_noise_is_bounded():
    """A gradient that no exact classifier has moves x0 by scale times the bound, however small α is."""
    schedule, z = make_schedule(DiffusionSettings(prediction="flow")), noise(2, *SHAPE)
    alpha, sigma = (float(x) for x in alpha_sigma(schedule, torch.tensor(999.0, dtype=torch.float64)))
    x0 = mixture_denoiser(z, 999.0, alpha, sigma)[0]
    moved = classifier_guide(mixture_denoiser, lambda z, t: 50 * z.sum((1, 2, 3)), 3.0)(z, 999.0, alpha, sigma)[0]
    assert torch.allclose((moved - x0).square().mean((1, 2, 3)).sqrt(), torch.tensor(3 * MAX_CLASS_SHIFT).double())
