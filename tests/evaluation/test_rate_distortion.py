"""The progressive coder against what is known in closed form."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ldmcli.core.settings import DiffusionConfig, DiffusionSettings
from ldmcli.diffusion.schedule import make_schedule, prediction_target
from ldmcli.evaluation.rate_distortion import LAST_SNR, coder_timesteps, prior_kl, rate_distortion, step_kl

DEVIATION = 0.7  # of the Gaussian that the data are


class _Rows:
    """A pixel is a sample of N(0, DEVIATION²), rounded to whole pixels."""

    source, split, notes = "gaussian", "validation", ()

    def __len__(self):
        return 48

    def pixels(self, i, size, crop, at):
        values = np.random.default_rng(i).normal(0, DEVIATION / 4, (*size, 3))
        return np.clip((values + 1) * 127.5, 0, 255).round().astype(np.uint8)


def _model(settings: DiffusionSettings) -> SimpleNamespace:
    """A model in latents of deviation DEVIATION that knows E[z_0 | z_t] exactly."""
    schedule = make_schedule(settings)
    alphas, sigmas = (torch.from_numpy(part).float() for part in (schedule.alphas, schedule.sigmas))

    def predict(z_t, t, conditioning):
        alpha, sigma = (part[t.long()].view(-1, 1, 1, 1) for part in (alphas, sigmas))
        z_0 = DEVIATION**2 * alpha / (DEVIATION**2 * alpha**2 + sigma**2) * z_t
        return prediction_target(settings.prediction, z_0, (z_t - alpha * z_0) / sigma, alpha, sigma)

    return SimpleNamespace(
        config=DiffusionConfig(diffusion=settings),
        schedule=schedule,
        trained_size=(16, 16),
        device=torch.device("cpu"),
        autoencoder=SimpleNamespace(encode=lambda x: x * 4, decode=lambda z: z / 4),
        conditions=SimpleNamespace(kinds=(), prepare=lambda values: {}),
        network=SimpleNamespace(latent_shape=(3, 16, 16), predict=predict, embed=lambda *given: None),
    )


@pytest.mark.parametrize("prediction", ("eps", "v", "x0", "flow"))
def test_an_ideal_model_of_a_gaussian_reaches_what_is_known(prediction):
    """E‖z_0 − E[z_0 | z_t]‖² is s² / (1 + SNR·s²) of a Gaussian of deviation s, and with it every term of the bound,
    which lies above the mutual information ½ log2(1 + SNR·s²)."""
    levels = rate_distortion(_model(DiffusionSettings(prediction=prediction)), _Rows(), n=48, levels=256)
    left = [DEVIATION**2 / (1 + level.snr * DEVIATION**2) for level in levels]
    steps = [0.5 * (after.snr - level.snr) * rest for level, after, rest in zip(levels, levels[1:], left)]
    for index in (len(levels) // 2, len(levels) - 1):
        level, information = levels[index], 0.5 * math.log2(1 + levels[index].snr * DEVIATION**2)
        assert level.rate == pytest.approx(sum(steps[:index]) / math.log(2), rel=0.03, abs=0.01)
        assert level.rate > 0.98 * information
        assert level.latent_rmse == pytest.approx(math.sqrt(left[index]), rel=0.03)
        assert level.rmse == pytest.approx(127.5 * level.latent_rmse / 4, rel=0.02)
    if prediction == "flow":  # whose timesteps are close enough for the bound to be tight
        assert level.rate < 1.06 * information


def test_the_curve_runs_from_noise_to_clean_latents():
    levels = rate_distortion(_model(DiffusionSettings(prediction="eps")), _Rows(), n=20)
    timesteps, rates, errors = zip(*((one.timestep, one.rate, one.latent_rmse) for one in levels))
    assert list(timesteps) == sorted(timesteps, reverse=True) and timesteps[0] == 999
    assert list(rates) == sorted(rates) and rates[0] < 0.01
    assert errors[0] == pytest.approx(DEVIATION, rel=0.05) and errors[-1] < 0.05


@pytest.mark.parametrize("prediction", ("eps", "flow"))
def test_the_coder_ends_where_noise_is_a_hundredth(prediction):
    schedule = make_schedule(DiffusionSettings(prediction=prediction))
    steps = coder_timesteps(schedule, 64)
    ratio = (schedule.alphas / schedule.sigmas) ** 2
    assert steps[0] == 999 and ratio[steps[-1]] <= LAST_SNR
    assert steps[-1] == 0 or ratio[steps[-1] - 1] > LAST_SNR


def test_the_terms_are_divergences_of_gaussians():
    """Against torch's own KL of the same Gaussians."""
    z_0, z_0_hat = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).double().split(1)
    alpha, sigma = 0.1, math.sqrt(1 - 0.01)
    normal = torch.distributions.Normal
    known = torch.distributions.kl_divergence(normal(alpha * z_0, sigma), normal(0.0, 1.0)).sum()
    assert prior_kl(z_0, alpha, sigma).item() == pytest.approx(float(known), rel=1e-9)
    # q(z_s | z_t, z_0) of a variance-preserving process, t noisier than s
    (alpha_t, sigma_t), (alpha_s, sigma_s) = (0.6, 0.8), (0.8, 0.6)
    ratio = alpha_t / alpha_s
    variance = (sigma_t**2 - ratio**2 * sigma_s**2) * sigma_s**2 / sigma_t**2
    shift = alpha_s * (sigma_t**2 - ratio**2 * sigma_s**2) / sigma_t**2
    both = (normal(shift * z, math.sqrt(variance)) for z in (z_0, z_0_hat))
    known = torch.distributions.kl_divergence(*both).sum()
    found = step_kl(z_0, z_0_hat, (alpha_t / sigma_t) ** 2, (alpha_s / sigma_s) ** 2)
    assert found.item() == pytest.approx(float(known), rel=1e-9)
