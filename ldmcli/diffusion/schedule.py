"""Noise schedules, parametrisations and the levels that a sampler visits.

The forward process is z_t = α_t x0 + σ_t ε (`q_sample`). Variance preserving (VP) for eps, v and x0: α² = ᾱ,
σ² = 1 − ᾱ. Flow: α = 1 − t, σ = t, with t = (i + ½)/T at timestep i. Every difference between parametrisations ends
here: samplers see (x0, ε).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import floor, sqrt

import numpy as np
import torch
from torch import Tensor

from ldmcli.core.errors import UsageError
from ldmcli.core.settings import DiffusionSettings

Scale = Tensor | float


def _cosine(timesteps: int, start: float, end: float) -> np.ndarray:
    offset = 8e-3
    u = np.arange(timesteps + 1, dtype=np.float64) / timesteps + offset
    alphas_cumprod = np.cos(u / (1 + offset) * np.pi / 2) ** 2
    return np.clip(1 - alphas_cumprod[1:] / alphas_cumprod[:-1], 0, 0.999)


BETAS: dict[str, Callable[[int, float, float], np.ndarray]] = {
    "linear": lambda timesteps, start, end: np.linspace(sqrt(start), sqrt(end), timesteps) ** 2,
    "sqrt_linear": lambda timesteps, start, end: np.linspace(start, end, timesteps),
    "sqrt": lambda timesteps, start, end: np.sqrt(np.linspace(start, end, timesteps)),
    "cosine": _cosine,
}


def betas(name: str, timesteps: int, start: float, end: float) -> np.ndarray:
    """β_t, (timesteps,) float64, under the names of CompVis/latent-diffusion.

    "linear" is linear in √β, "sqrt_linear" linear in β, "sqrt" the root of that; "cosine" reads neither end.
    """
    if name not in BETAS:
        raise UsageError(f"diffusion.schedule = {name!r}: choose one of {', '.join(BETAS)}")
    if not 0 < start <= end < 1:
        raise UsageError(f"diffusion.beta_start = {start}, beta_end = {end}: need 0 < beta_start <= beta_end < 1")
    return BETAS[name](timesteps, start, end)


@dataclass(frozen=True, eq=False)
class Schedule:
    """α and σ of every timestep, 0 (clean) … T−1, (T,) float64 each; `prediction` is what the network outputs."""

    alphas: np.ndarray
    sigmas: np.ndarray
    prediction: str
    name: str
    _tables: dict = field(default_factory=dict, init=False, repr=False)

    @property
    def num_timesteps(self) -> int:
        return len(self.alphas)

    @property
    def flow(self) -> bool:
        return self.prediction == "flow"

    @property
    def alphas_cumprod(self) -> np.ndarray:
        """ᾱ, (T,) float64; for flow α²/(α² + σ²), the ᾱ at which a VP process has the same signal-to-noise ratio."""
        signal = self.alphas**2
        return signal / (signal + self.sigmas**2)

    def tables(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """α and σ of every timestep as tensors on a device, (T,) each: brought there once, for the copy makes the host
        wait. A compiled function takes them over if they were asked for before it was compiled."""
        key = (str(device), dtype)
        if key in self._tables:
            return self._tables[key]
        alphas, sigmas = (torch.as_tensor(values, dtype=dtype).to(device) for values in (self.alphas, self.sigmas))
        if not torch.compiler.is_compiling():
            self._tables[key] = alphas, sigmas
        return alphas, sigmas


def make_schedule(settings: DiffusionSettings) -> Schedule:
    """The process that the settings describe; flow reads only the number of timesteps."""
    if settings.prediction == "flow":
        t = (np.arange(settings.timesteps, dtype=np.float64) + 0.5) / settings.timesteps
        return Schedule(alphas=1 - t, sigmas=t, prediction="flow", name="flow")
    beta = betas(settings.schedule, settings.timesteps, settings.beta_start, settings.beta_end)
    alphas_cumprod = np.cumprod(1 - beta)
    return Schedule(np.sqrt(alphas_cumprod), np.sqrt(1 - alphas_cumprod), settings.prediction, settings.schedule)


def ddpm_coefficients(schedule: Schedule, v_posterior: float = 0.0) -> dict[str, np.ndarray]:
    """Coefficients of the ancestral process and weights of the variational bound, (T,) float64 each.

    The twelve names that a checkpoint of CompVis/latent-diffusion holds, and `lvlb_weights_eps`, `lvlb_weights_x0`
    (the x0 form as the original has it, with its missing brackets). VP only.
    """
    if schedule.flow:
        raise ValueError("a flow has no posterior of a Markov chain")
    bar = schedule.alphas_cumprod
    previous = np.append(1.0, bar[:-1])
    alpha = bar / previous
    beta = 1 - alpha
    variance = (1 - v_posterior) * beta * (1 - previous) / (1 - bar) + v_posterior * beta
    with np.errstate(divide="ignore"):
        weights_eps = beta**2 / (2 * variance * alpha * (1 - bar))
    weights_x0 = 0.5 * np.sqrt(bar) / (2 - bar)
    for weights in (weights_eps, weights_x0):
        weights[0] = weights[min(1, len(weights) - 1)]  # the variance at t = 0 is 0
    return {
        "betas": beta,
        "alphas_cumprod": bar,
        "alphas_cumprod_prev": previous,
        "sqrt_alphas_cumprod": np.sqrt(bar),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - bar),
        "log_one_minus_alphas_cumprod": np.log(1 - bar),
        "sqrt_recip_alphas_cumprod": np.sqrt(1 / bar),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / bar - 1),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),
        "posterior_mean_coef1": beta * np.sqrt(previous) / (1 - bar),
        "posterior_mean_coef2": (1 - previous) * np.sqrt(alpha) / (1 - bar),
        "lvlb_weights_eps": weights_eps,
        "lvlb_weights_x0": weights_x0,
    }


def alpha_sigma(schedule: Schedule, t: Tensor) -> tuple[Tensor, Tensor]:
    """α and σ at timesteps t in [0, T−1], any shape; float64 for float64 t, otherwise float32.

    Flow takes any real t; VP has values at whole timesteps and takes the nearest.
    """
    dtype = torch.float64 if t.dtype == torch.float64 else torch.float32
    if schedule.flow:
        t = t.to(dtype)
        # T − ½ − t before the division: 1 − σ would lose the last digits of a small α in float32.
        return (schedule.num_timesteps - 0.5 - t) / schedule.num_timesteps, (t + 0.5) / schedule.num_timesteps
    i = t.round().long() if t.is_floating_point() else t.long()
    alphas, sigmas = schedule.tables(t.device, dtype)
    return alphas[i], sigmas[i]


def _per_sample(scale: Scale, x: Tensor) -> Scale:
    """(B,) → (B, 1, 1, …) so that it multiplies samples; numbers and scales that already fit stay."""
    if isinstance(scale, Tensor) and scale.ndim == 1 and x.ndim > 1:
        return scale.reshape(-1, *[1] * (x.ndim - 1))
    return scale


def q_sample(z_0: Tensor, noise: Tensor, alpha: Scale, sigma: Scale) -> Tensor:
    """z_t = α_t z_0 + σ_t ε, a sample of the forward process q(z_t | z_0) = N(α_t z_0, σ_t² I).

    z_0, noise: (B, …), noise ~ N(0, I); alpha, sigma: (B,), or numbers.
    """
    return _per_sample(alpha, z_0) * z_0 + _per_sample(sigma, z_0) * noise


def prediction_target(prediction: str, x0: Tensor, eps: Tensor, alpha: Scale, sigma: Scale) -> Tensor:
    """What the network should output at z_t = α x0 + σ ε: ε, x0, v = α ε − σ x0, or the velocity u = ε − x0.

    x0, eps: (B, …); alpha, sigma: (B,), or numbers. v: Salimans & Ho 2022.
    """
    match prediction:
        case "eps":
            return eps
        case "x0":
            return x0
        case "v":
            return _per_sample(alpha, x0) * eps - _per_sample(sigma, x0) * x0
        case "flow":
            return eps - x0
    raise ValueError(f"no parametrisation {prediction!r}")


def to_x0_eps(prediction: str, output: Tensor, z_t: Tensor, alpha: Scale, sigma: Scale) -> tuple[Tensor, Tensor]:
    """x0 and ε from the network's output at z_t; α x0 + σ ε = z_t holds for each of the four.

    z_t, output: (B, …); alpha, sigma: (B,), or numbers. v assumes α² + σ² = 1 and flow α + σ = 1, so neither
    divides; eps divides by α, x0 by σ.
    """
    alpha, sigma = _per_sample(alpha, z_t), _per_sample(sigma, z_t)
    match prediction:
        case "eps":
            return (z_t - sigma * output) / alpha, output
        case "x0":
            return output, (z_t - alpha * output) / sigma
        case "v":
            return alpha * z_t - sigma * output, alpha * output + sigma * z_t
        case "flow":
            return z_t - sigma * output, z_t + alpha * output
    raise ValueError(f"no parametrisation {prediction!r}")


def loss_weight(name: str, prediction: str, alpha: Tensor, sigma: Tensor, gamma: float = 5.0) -> Tensor:
    """Factor of a sample's loss, shape of alpha: 1, or min-SNR-γ (Hang et al. 2023).

    min_snr is min(SNR, γ) on the error of x0: divided by SNR for eps, by SNR + 1 for v.
    """
    if name == "uniform":
        return torch.ones_like(alpha)
    snr = (alpha / sigma) ** 2
    divisors = {"eps": snr, "v": snr + 1, "x0": torch.ones_like(snr)}
    if name != "min_snr" or prediction not in divisors:
        raise UsageError(f"diffusion.loss_weight = {name!r} does not go with diffusion.prediction = {prediction!r}")
    return snr.clamp(max=gamma) / divisors[prediction]


def sample_timesteps(settings: DiffusionSettings, u: Tensor, schedule: Schedule) -> Tensor:
    """Training timesteps in [0, T−1] from one number in [0, 1) a sample; (B,) float32, whole numbers for VP.

    uniform, or t/T = sigmoid(N(t_mean, t_std)) (Esser et al. 2024); both by the inverse of the distribution, so that
    a timestep is a function of its sample's key.
    """
    u = u.double()
    if settings.t_sampling == "logit_normal":
        u = torch.sigmoid(settings.t_mean + settings.t_std * torch.special.ndtri(u))
    t = u * schedule.num_timesteps
    t = t - 0.5 if schedule.flow else t.floor()
    return t.clamp(0, schedule.num_timesteps - 1).float()


@dataclass(frozen=True)
class NoiseLevels:
    """The noise levels that a sampler visits: N evaluations at timesteps t, falling, with their α and σ, and where the
    last step ends.

    alphas and sigmas have N + 1 entries; the last is (1, 0), clean, or another of ENDINGS.
    """

    t: tuple[float, ...]
    alphas: tuple[float, ...]
    sigmas: tuple[float, ...]


def _round(x: float) -> int:
    return floor(x + 0.5)  # round() takes halves to even numbers: two neighbours could meet


def _linspace(schedule: Schedule, steps: int) -> list[float]:
    last = schedule.num_timesteps - 1
    return [_round(last * (1 - k / max(1, steps - 1))) for k in range(steps)]


def _uniform(schedule: Schedule, steps: int) -> list[float]:
    total = schedule.num_timesteps
    if schedule.flow:  # times t_0 (1 − k/N), t_0 that of timestep T − 1: all N steps down to time 0 are equal
        return [(total - 0.5) * (1 - k / steps) - 0.5 for k in range(steps)]
    return [_round(total * (1 - k / steps)) - 1 for k in range(steps)]


def _shifted(schedule: Schedule, steps: int, subset: Sequence[int], spacing: str) -> list[float]:
    if subset[-1] + 1 >= schedule.num_timesteps:
        raise UsageError(
            f"{steps} steps: spacing {spacing!r} would evaluate timestep {subset[-1] + 1} of "
            f"0 … {schedule.num_timesteps - 1}, as in the original code; take 10, 20, 50, 100, 200 or 250 steps, "
            "or spacing linspace"
        )
    return [float(t + 1) for t in reversed(subset)]


def _original(schedule: Schedule, steps: int) -> list[float]:
    subset = list(range(0, schedule.num_timesteps, schedule.num_timesteps // steps))
    return _shifted(schedule, steps, subset, "original")


def _original_quad(schedule: Schedule, steps: int) -> list[float]:
    subset = (np.linspace(0, sqrt(0.8 * schedule.num_timesteps), steps) ** 2).astype(int).tolist()
    return _shifted(schedule, steps, subset, "original_quad")


def _leading(schedule: Schedule, steps: int) -> list[float]:
    stride = schedule.num_timesteps // steps
    return [float(k * stride) for k in reversed(range(steps))]


def _leading_open(schedule: Schedule, steps: int) -> list[float]:
    stride = schedule.num_timesteps // (steps + 1)
    return [float(k * stride) for k in reversed(range(1, steps + 1))]


def _shifted_by_one(
    spacing: Callable[[Schedule, int], list[float]], name: str
) -> Callable[[Schedule, int], list[float]]:
    def later(schedule: Schedule, steps: int) -> list[float]:
        return _shifted(schedule, steps, [int(t) for t in reversed(spacing(schedule, steps))], name)

    return later


def _trailing(schedule: Schedule, steps: int) -> list[float]:
    falling = np.arange(schedule.num_timesteps, 0, -schedule.num_timesteps / steps)
    return (falling.round()[:steps] - 1).tolist()


def _linspace_open(schedule: Schedule, steps: int) -> list[float]:
    return np.linspace(0, schedule.num_timesteps - 1, steps + 1).round()[:0:-1].tolist()


def _linspace_real(schedule: Schedule, steps: int) -> list[float]:
    return np.linspace(0, schedule.num_timesteps - 1, steps)[::-1].tolist()


SPACINGS: dict[str, Callable[[Schedule, int], list[float]]] = {
    "linspace": _linspace,
    "uniform": _uniform,
    "original": _original,
    "original_quad": _original_quad,
    "leading": _leading,
    "leading+1": _shifted_by_one(_leading, "leading+1"),
    "leading_open": _leading_open,
    "leading_open+1": _shifted_by_one(_leading_open, "leading_open+1"),
    "trailing": _trailing,
    "linspace_open": _linspace_open,
    "linspace_real": _linspace_real,
}

# Where the last step ends, as (α, σ). "sigma_min" is the level of timestep 0 in the coordinates z/α of Karras et al.,
# which samplers written in them do not scale back.
ENDINGS: dict[str, Callable[[Schedule], tuple[float, float]]] = {
    "clean": lambda schedule: (1.0, 0.0),
    "first": lambda schedule: (float(schedule.alphas[0]), float(schedule.sigmas[0])),
    "sigma_min": lambda schedule: (1.0, float(schedule.sigmas[0] / schedule.alphas[0])),
}


def _spacing_and_ending(schedule: Schedule, spacing: str) -> tuple[str, str]:
    """Names in SPACINGS and ENDINGS of "SPACING", "SPACING/ENDING" or ""."""
    name, _, ending = spacing.partition("/")
    name = name or ("uniform" if schedule.flow else "linspace")
    if name not in SPACINGS:
        raise UsageError(f"sample.spacing = {spacing!r}: choose one of {', '.join(SPACINGS)}")
    ending = ending or ("first" if name.startswith("original") else "clean")
    if ending not in ENDINGS:
        raise UsageError(f"sample.spacing = {spacing!r}: what follows / is one of {', '.join(ENDINGS)}")
    return name, ending


def sampling_timesteps(schedule: Schedule, steps: int, spacing: str = "") -> list[float]:
    """The timesteps at which a sampler of `steps` steps evaluates the network, falling.

    linspace: whole numbers from T−1 to 0. uniform: equal steps from T−1 to clean (flow: real numbers).
    original, original_quad: the subsets of the DDIM code of CompVis/latent-diffusion, whose number may differ from
    `steps` (400 gives 500) and which do not exist for some. "" = uniform for flow, linspace otherwise.
    Those of the schedulers of diffusers: leading (every ⌊T/N⌋-th from 0; +1: one later), trailing (back from T−1),
    linspace_real (not rounded: Euler); _open: N + 1 points of which the last, 0, is left out (DPM-Solver).
    A part after / names in ENDINGS where the last step ends: "first" for the originals, else "clean".
    """
    name, _ = _spacing_and_ending(schedule, spacing)
    if not 1 <= steps <= schedule.num_timesteps:
        raise UsageError(f"steps = {steps}: the model has {schedule.num_timesteps} timesteps, take 1 to as many")
    return [float(t) for t in SPACINGS[name](schedule, steps)]


def _between(schedule: Schedule, t: Sequence[float]) -> tuple[Tensor, Tensor]:
    """α and σ at real timesteps: σ/α linear between whole ones, as in diffusers."""
    ratio = np.interp(t, np.arange(schedule.num_timesteps), schedule.sigmas / schedule.alphas)
    alphas = 1 / np.sqrt(1 + ratio**2)
    return torch.from_numpy(alphas), torch.from_numpy(ratio * alphas)


def sampling_levels(schedule: Schedule, steps: int, spacing: str = "", *, strength: float = 1.0) -> NoiseLevels:
    """The levels of `steps` steps, or of their last share `strength` in (0, 1], at least one, for image-to-image.

    Image-to-image starts from α_0 x0 + σ_0 ε with α_0, σ_0 the first of the result.
    """
    if not 0 < strength <= 1:
        raise UsageError(f"strength = {strength}: must be above 0 and at most 1")
    t = sampling_timesteps(schedule, steps, spacing)
    t = t[len(t) - max(1, _round(strength * len(t))) :]
    if schedule.flow or all(step.is_integer() for step in t):
        alphas, sigmas = alpha_sigma(schedule, torch.tensor(t, dtype=torch.float64))
    else:
        alphas, sigmas = _between(schedule, t)
    end = ENDINGS[_spacing_and_ending(schedule, spacing)[1]](schedule)
    return NoiseLevels(tuple(t), (*alphas.tolist(), end[0]), (*sigmas.tolist(), end[1]))
