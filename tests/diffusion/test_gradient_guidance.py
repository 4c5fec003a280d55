"""Guiding by images and classifiers: the gradient that moves a sample, and what it must not move."""

import pytest
import torch
from golden_cases import clear_of_ties

from ldmcli.core.settings import AutoencoderSettings, ConditionSettings, DiffusionSettings, SampleSettings
from ldmcli.diffusion.gradient_guidance import (
    classifier_guide,
    downsampled,
    half_squared_error,
    image_guide,
    latent_decoder,
)
from ldmcli.diffusion.guidance import GuidancePath, denoiser
from ldmcli.diffusion.sample import sample_conditioned
from ldmcli.diffusion.samplers import SAMPLERS
from ldmcli.diffusion.schedule import make_schedule, sampling_levels
from ldmcli.networks.autoencoder import Autoencoder
from ldmcli.networks.latent_diffusion import DiffusionModel
from ldmcli.networks.latent_scale import LatentScale
from ldmcli.sampling.first_stage import LoadedAutoencoder

SCHEDULE = make_schedule(DiffusionSettings(prediction="eps"))
ALPHA, SIGMA = 0.6, 0.8


def latents(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gaussian(z, t, alpha, sigma):
    """The exact denoiser of data N(0, 1): x0 = α z."""
    return alpha * z, (z - alpha * alpha * z) / sigma


@pytest.fixture(scope="module")
def model() -> DiffusionModel:
    torch.manual_seed(0)
    settings = DiffusionSettings(channels=16, channel_mult=(1,), groups=4, attention_resolutions=(1,), head_channels=8)
    model = DiffusionModel(
        settings,
        ConditionSettings(kinds=("class",), context_dim=16),
        {"class": {"class_names": ["a", "b"]}},
        None,
        (3, 8, 8),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module", params=["kl", "vq"])
def decode(request):
    torch.manual_seed(1)
    settings = AutoencoderSettings(
        f=4,
        channels=16,
        channel_mult=(1,),
        num_res_blocks=1,
        embed_dim=3,
        z_channels=3,
        reg=request.param,
        codebook_size=16,
    )
    network = Autoencoder(settings).eval().requires_grad_(False)
    if request.param == "vq":
        network.quantize.embedding.weight.copy_(latents(16, 3))
    return latent_decoder(LoadedAutoencoder(network, LatentScale.identity(3), ""))


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(10 * torch.log10(4 / (a - b).square().mean()))


def drawn(model, wrap=None, scale=2.0, ids=(0, 1), sampler="ddim"):
    settings = SampleSettings(steps=8, sampler=sampler, guidance=scale)
    with torch.no_grad():
        return sample_conditioned(
            model,
            SCHEDULE,
            settings,
            ids=ids,
            seed=0,
            guide=wrap,
            inputs=model.conditions.prepare({"class": [k % 2 for k in ids]}),
        )


@pytest.mark.parametrize("sampler", ["ddim", "dpm++"])
def test_guided_samples_fit_the_small_image_better_and_the_more_the_stronger(decode, sampler):
    """With the exact denoiser of N(0, 1): a random network denoises nothing, so nothing holds of what it draws."""
    low, fit = downsampled(decode(latents(1, 3, 8, 8, seed=9)), (8, 8)), []
    for scale in (0.0, 0.3, 1.0):
        denoise = image_guide(gaussian, decode, low, scale)
        z = SAMPLERS[sampler].function(denoise, latents(2, 3, 8, 8), sampling_levels(SCHEDULE, 20))
        assert torch.isfinite(z).all() and z.std() < 2
        fit.append(psnr(downsampled(decode(z), (8, 8)), low))
    assert fit[0] + 0.5 < fit[1] < fit[2] and fit[2] > fit[0] + 1.5


def test_scale_0_changes_nothing_bit_for_bit(model, decode):
    low = torch.zeros(1, 3, 8, 8)
    plain = drawn(model)
    assert torch.equal(plain, drawn(model, lambda denoise: image_guide(denoise, decode, low, 0.0)))
    assert torch.equal(
        plain, drawn(model, lambda denoise: classifier_guide(denoise, lambda z, t: z.sum((1, 2, 3)), 0.0))
    )


def test_the_image_guide_works_on_what_classifier_free_guidance_gives(model, decode):
    """Composition: the guide's x0 is that of the guided ε, moved; another scale of guidance gives another picture."""
    low, z = torch.zeros(1, 3, 8, 8), latents(2, 3, 8, 8)
    given, null = (model.embed({"class.label": torch.tensor(labels)}) for labels in ([0, 1], [2, 2]))
    free = denoiser(model.predict, SCHEDULE, GuidancePath((null, given), (3.0,)))
    guided = image_guide(free, decode, low, rule="paper")
    with clear_of_ties():
        x0, eps = guided(z, 500.0, ALPHA, SIGMA)
    with torch.enable_grad():
        z_t = z.clone().requires_grad_()
        error = half_squared_error(
            downsampled(decode(free(z_t, 500.0, ALPHA, SIGMA)[0]), (8, 8)), low.expand(2, -1, -1, -1)
        )
        gradient = torch.autograd.grad(error.sum(), z_t)[0]
    plain_eps = free(z, 500.0, ALPHA, SIGMA)[1]
    assert torch.allclose(eps, plain_eps + SIGMA * gradient, atol=1e-4, rtol=1e-3)  # ε − σ ∇ log p, log p = −error
    assert torch.allclose(ALPHA * x0 + SIGMA * eps, z, atol=1e-4)


def test_a_sample_s_guide_sees_that_sample_alone(model, decode):
    low = torch.cat([torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8)])
    with clear_of_ties():
        both = drawn(model, lambda denoise: image_guide(denoise, decode, low), ids=(0, 1))
    alone = drawn(model, lambda denoise: image_guide(denoise, decode, low[1:]), ids=(1,))
    assert torch.allclose(both[1:], alone, atol=1e-3)


@pytest.mark.parametrize("units", [1e-3, 1.0, 1e3])
def test_the_step_does_not_depend_on_the_units_of_the_distance(units):
    low, z = torch.zeros(1, 3, 4, 4), latents(2, 3, 8, 8)
    first, other = (
        image_guide(gaussian, lambda x: x, low, 0.5, lambda a, b, unit=unit: unit * half_squared_error(a, b))(
            z, 0, ALPHA, SIGMA
        )
        for unit in (1.0, units)
    )
    assert torch.allclose(first[0], other[0], atol=1e-5)


def test_a_sample_that_fits_is_left_alone_and_a_hopeless_one_moves_within_bounds():
    z = latents(1, 3, 8, 8)
    x0 = gaussian(z, 0, ALPHA, SIGMA)[0]
    fits = image_guide(gaussian, lambda x: x, downsampled(x0, (4, 4)))(z, 0, ALPHA, SIGMA)[0]
    assert torch.allclose(fits, x0, atol=1e-4)
    far = image_guide(gaussian, lambda x: x, torch.full((1, 3, 4, 4), 1e4))(z, 0, ALPHA, SIGMA)[0]
    assert (far - x0).square().mean().sqrt() <= 1.0 + 1e-4


def test_any_distance_will_do():
    low, z = torch.full((1, 3, 4, 4), 0.5), latents(2, 3, 8, 8)

    def away(x):
        return (downsampled(x, (4, 4)) - low).abs().mean((1, 2, 3))

    guided = image_guide(gaussian, lambda x: x, low, distance=lambda a, b: (a - b).abs().mean((1, 2, 3)))
    assert (away(guided(z, 0, ALPHA, SIGMA)[0]) < away(gaussian(z, 0, ALPHA, SIGMA)[0])).all()


def test_a_classifier_s_gradient_has_adm_s_sign_and_size():
    """log p(c | z_t) = −½ |z − 1|²: ∇ = 1 − z, so ε gains s σ (z − 1)."""
    z = latents(2, 3, 4, 4)
    x0, eps = gaussian(z, 0, ALPHA, SIGMA)
    guided = classifier_guide(gaussian, lambda z, t: -0.5 * (z - 1).square().sum((1, 2, 3)), 0.5)
    found, guided_eps = guided(z, 0, ALPHA, SIGMA)
    assert torch.allclose(guided_eps, eps + 0.5 * SIGMA * (z - 1), atol=1e-5)
    assert torch.allclose(ALPHA * found + SIGMA * guided_eps, z, atol=1e-5)
    assert (found - 1).square().mean() < (x0 - 1).square().mean()


def test_guiders_wrap_guiders():
    """Both pulls are there: for linear log-likelihoods the sum of the two changes."""
    z, eps = latents(1, 3, 4, 4), gaussian(latents(1, 3, 4, 4), 0, ALPHA, SIGMA)[1]
    first = classifier_guide(gaussian, lambda z, t: z[:, 0].sum((1, 2)))
    both = classifier_guide(first, lambda z, t: z[:, 1].sum((1, 2)))
    change = both(z, 0, ALPHA, SIGMA)[1] - eps
    assert torch.allclose(change[:, :2], torch.full((1, 2, 4, 4), -SIGMA), atol=1e-5)
    assert (change[:, 2] == 0).all()
    assert not both(z, 0, ALPHA, SIGMA)[0].requires_grad


def test_an_image_guide_wraps_a_classifier():
    """The picture's gradient passes through the network, the classifier's is a constant beside it."""
    z, low = latents(2, 3, 4, 4), torch.zeros(1, 3, 4, 4)
    led = classifier_guide(gaussian, lambda z, t: z[:, 0].sum((1, 2)))
    x0, eps = image_guide(led, lambda x: x, low, 0.1, rule="paper")(z, 0, ALPHA, SIGMA)
    first = led(z, 0, ALPHA, SIGMA)
    assert torch.allclose(eps, first[1] + 0.1 * SIGMA * ALPHA * first[0], atol=1e-5) and not x0.requires_grad
