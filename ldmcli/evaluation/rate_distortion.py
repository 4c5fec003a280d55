"""Rate and distortion over the timestep: perceptual and semantic compression (Fig. 2), and the variational bound.

A diffusion model is a progressive coder of z_0 (Ho et al. 2020, Sec. 4.3): what is sent up to timestep t costs the
terms of the variational bound above t, and lets x̂0 be decoded. The terms are those of Kingma et al. 2021 (Eq. 13
there), of a process of K steps: ½ (SNR(s) − SNR(t)) ‖z_0 − ẑ_0(z_t, t)‖² for a step from t to s < t; the paper has the
same bound in App. B. They hold for every prediction and schedule, flow included, whose α² + σ² is not 1.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldmcli.data.rows import evenly_spaced
from ldmcli.diffusion.schedule import Schedule, alpha_sigma, q_sample, to_x0_eps
from ldmcli.evaluation.image_streams import check_columns, condition_source
from ldmcli.maths import rng
from ldmcli.maths.pixels import pixels_to_tensor

LEVELS = 64  # steps K of the coder, at most
LAST_SNR = 1e4  # where it ends, as the chain of Ho et al. does: noise of a hundredth of the latents' deviation
BATCH = 16


@dataclass(frozen=True)
class Level:
    """At timestep t: rate in bits a dimension (pixels x channels of the image) that has been sent before, and what is
    decoded from it: root mean squared error in latents, and of pixels in 0 … 255."""

    timestep: int
    snr: float
    rate: float
    latent_rmse: float
    rmse: float


def prior_kl(z_0: Tensor, alpha: float, sigma: float) -> Tensor:
    """KL(q(z_T | z_0) ‖ N(0, 1)) in nats of each sample, (B,). z_0: (B, c, h, w)."""
    each = sigma**2 + (alpha * z_0) ** 2 - 1 - 2 * math.log(sigma)
    return 0.5 * each.sum(dim=(1, 2, 3))


def step_kl(z_0: Tensor, z_0_hat: Tensor, snr_t: float, snr_s: float) -> Tensor:
    """KL(q(z_s | z_t, z_0) ‖ p(z_s | z_t)) in nats of each sample, (B,), for a step to the higher ratio snr_s."""
    return 0.5 * (snr_s - snr_t) * (z_0 - z_0_hat).square().sum(dim=(1, 2, 3))


def coder_timesteps(schedule: Schedule, levels: int) -> list[int]:
    """The timesteps that the coder visits, from T-1 down, at most `levels` of them evenly over the logarithm of the
    signal-to-noise ratio. They end at the smallest that is still noisier than `LAST_SNR`."""
    log_snr = 2 * np.log(schedule.alphas / schedule.sigmas)
    last = int(np.argmax(log_snr <= math.log(LAST_SNR)))
    wanted = np.linspace(log_snr[-1], log_snr[last], levels)
    nearest = np.abs(log_snr[None] - wanted[:, None]).argmin(axis=1)
    return sorted({int(t) for t in nearest}, reverse=True)


@torch.no_grad()
def rate_distortion(model: Any, rows: Any, *, n: int, seed: int = 0, levels: int = LEVELS) -> list[Level]:
    """The curve of a diffusion model on n rows, conditioned on what they say, from pure noise to clean latents.

    The last level's rate is the bound without its last term, the likelihood of z_0 given the last z_t.
    Raises InputError for a data set without the columns that the model is conditioned on.
    """
    schedule = model.schedule
    steps = coder_timesteps(schedule, levels)
    nats, latent_error, pixel_error = (np.zeros(len(steps)) for _ in range(3))
    dimensions, count = 0, 0
    for x, z_0, conditioning, ids in _batches(model, rows, n, seed):
        noise = rng.normal(seed, ids, tuple(z_0.shape[1:]), "rate-distortion").to(z_0)
        dimensions, count = x[0].numel(), count + len(x)
        for index, (t, following) in enumerate(zip(steps, [*steps[1:], None])):
            alpha, sigma = (float(part) for part in alpha_sigma(schedule, torch.tensor(t, dtype=torch.float64)))
            z_t = q_sample(z_0, noise, alpha, sigma)
            times = torch.full((len(z_0),), float(t), device=z_0.device)
            output = model.network.predict(z_t, times, conditioning)
            z_0_hat = to_x0_eps(schedule.prediction, output.float(), z_t, alpha, sigma)[0]
            latent_error[index] += float((z_0 - z_0_hat).double().square().sum())
            decoded = model.autoencoder.decode(z_0_hat).clamp(-1, 1).cpu()
            pixel_error[index] += float(((decoded - x) * 127.5).double().square().sum())
            if index == 0:
                nats[0] += float(prior_kl(z_0.double(), alpha, sigma).sum())
            if following is not None:
                snr_t, snr_s = _snr(schedule, t), _snr(schedule, following)
                nats[index + 1] += float(step_kl(z_0.double(), z_0_hat.double(), snr_t, snr_s).sum())
    total = dimensions * count
    rates = np.cumsum(nats) / math.log(2) / total
    latent_total = total * math.prod(model.network.latent_shape) / dimensions
    return [
        Level(
            timestep=t,
            snr=_snr(schedule, t),
            rate=float(rates[i]),
            latent_rmse=math.sqrt(latent_error[i] / latent_total),
            rmse=math.sqrt(pixel_error[i] / total),
        )
        for i, t in enumerate(steps)
    ]


def _snr(schedule: Schedule, t: int) -> float:
    return float(schedule.alphas[t] ** 2 / schedule.sigmas[t] ** 2)


def _batches(model: Any, rows: Any, n: int, seed: int) -> Iterator[tuple[Tensor, Tensor, Any, Sequence[int]]]:
    """Pixels (B, 3, H, W) in [-1, 1], latents, the conditioning of their rows, and their numbers."""
    names = tuple(model.conditions.kinds)
    check_columns(rows, names, model.config.data)
    chosen, size = evenly_spaced(len(rows), n), model.trained_size
    source = condition_source(model, rows, size, seed) if names else None
    for start in range(0, n, BATCH):
        ids = chosen[start : start + BATCH]
        pixels = np.stack([rows.pixels(i, size, "center", (0.5, 0.5)) for i in ids])
        x = pixels_to_tensor(torch.from_numpy(pixels), torch.device("cpu"))
        z_0 = model.autoencoder.encode(x).to(model.device)
        values = {name: source.foreign_values(name, ids) for name in names} if source else {}
        inputs = {key: value.to(model.device) for key, value in model.conditions.prepare(values).items()}
        conditioning = model.network.embed(inputs, tuple(z_0.shape[-2:]), model.autoencoder.encode)
        yield x, z_0, conditioning, range(start, start + len(ids))
