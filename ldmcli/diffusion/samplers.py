"""Samplers as plain functions: from noise down the levels, one denoiser, any array type.

`denoise(z, t, alpha, sigma)` gives (x0, ε), the clean latent that the model sees in z = α x0 + σ ε and the noise.
Text, guidance, masks and devices live in the denoiser; parametrisations in `schedule`. Along the probability flow
dz = x0 dα + ε dσ: a step that freezes x0 and ε is DDIM's, and the others improve on it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, log, sqrt
from typing import Any, Protocol

Denoise = Callable[[Any, float, float, float], tuple[Any, Any]]


class SamplingLevels(Protocol):
    """What a sampler reads of `schedule.NoiseLevels`: N timesteps, N + 1 values of α and σ."""

    @property
    def t(self) -> Sequence[float]: ...
    @property
    def alphas(self) -> Sequence[float]: ...
    @property
    def sigmas(self) -> Sequence[float]: ...


def _report(callback: Callable[[int, Any, Any], None] | None, i: int, z: Any, x0: Any) -> None:
    if callback is not None:
        callback(i, z, x0)


def _before(before_step: Callable[[int, Any], Any] | None, i: int, z: Any) -> Any:
    return z if before_step is None else before_step(i, z)


def _fresh(noise: Callable[[int], Any] | None, i: int) -> Any:
    if noise is None:
        raise ValueError("a step with fresh noise needs noise=")
    return noise(i)


def ddim_sigma(alpha: float, sigma: float, alpha_next: float, sigma_next: float, eta: float) -> float:
    """Standard deviation of the noise that DDIM adds between two levels (Song et al. 2021, eq. 16).

    With eta = 1 that of the posterior q(z_next | z, x0). Written for any α, σ; with α² + σ² = 1 it is
    eta √((1 − ᾱ')/(1 − ᾱ) · (1 − ᾱ/ᾱ')).
    """
    if eta == 0 or sigma_next == 0:
        return 0.0
    return eta * sigma_next / sigma * sqrt(max(0.0, sigma**2 - (sigma_next * alpha / alpha_next) ** 2))


def ddim(denoise: Denoise, z, levels: SamplingLevels, *, noise=None, eta: float = 0.0, callback=None, before_step=None):
    """DDIM (Song et al. 2021): eta = 0 deterministic, eta = 1 with the variance of the ancestral process.

    noise(i): fresh noise of step i, an array like z; read where a step has some. callback(i, z, x0) after a step.
    before_step(i, z) -> z: what the step starts from instead, in all samplers once a step (a known region is put in
    here). Steps of several evaluations, and the memory of multistep ones, see it as any other z.
    """
    for i, t in enumerate(levels.t):
        z = _before(before_step, i, z)
        alpha, sigma, alpha_next, sigma_next = *_level(levels, i), *_level(levels, i + 1)
        x0, eps = denoise(z, t, alpha, sigma)
        added = ddim_sigma(alpha, sigma, alpha_next, sigma_next, eta)
        z = alpha_next * x0 + sqrt(max(0.0, sigma_next**2 - added**2)) * eps
        if added > 0:
            z = z + added * _fresh(noise, i)
        _report(callback, i, z, x0)
    return z


def ddpm(denoise: Denoise, z, levels: SamplingLevels, *, noise=None, eta: float = 0.0, callback=None, before_step=None):
    """Ancestral sampling (Ho et al. 2020) with the posterior of the chain that has only these levels.

    With every timestep the original's chain. A step that ends clean has variance 0 and takes no noise. eta is not
    read.
    """
    for i, t in enumerate(levels.t):
        z = _before(before_step, i, z)
        alpha, sigma, alpha_next, sigma_next = *_level(levels, i), *_level(levels, i + 1)
        x0, _ = denoise(z, t, alpha, sigma)
        keep = alpha / alpha_next  # the transition from the next level up to this one: its scale …
        transition = sigma**2 - (keep * sigma_next) ** 2  # … and its variance
        z = (alpha_next * transition * x0 + keep * sigma_next**2 * z) / sigma**2
        added = ddim_sigma(alpha, sigma, alpha_next, sigma_next, 1.0)
        if added > 0:
            z = z + added * _fresh(noise, i)
        _report(callback, i, z, x0)
    return z


# Adams–Bashforth weights, newest first, by the number of earlier evaluations.
_ADAMS_BASHFORTH = ((1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def plms(denoise: Denoise, z, levels: SamplingLevels, *, noise=None, eta: float = 0.0, callback=None, before_step=None):
    """Pseudo linear multistep (Liu et al. 2022) as in CompVis/latent-diffusion: one evaluation more than steps.

    ε is extrapolated over up to four evaluations and put into the DDIM step. On straight paths (α + σ = 1), where
    dividing by a tiny α would ruin that, the velocity ε − x0 is extrapolated instead. noise and eta are not read.
    """
    straight = all(abs(alpha + sigma - 1) < 1e-9 for alpha, sigma in zip(levels.alphas, levels.sigmas))
    history: list[Any] = []
    for i, t in enumerate(levels.t):
        z = _before(before_step, i, z)
        alpha, sigma, alpha_next, sigma_next = *_level(levels, i), *_level(levels, i + 1)
        x0, eps = denoise(z, t, alpha, sigma)
        history = [eps - x0 if straight else eps, *history[:3]]
        if i == 0:
            ahead = min(1, len(levels.t) - 1)  # a single step looks at its own timestep again
            x0_ahead, eps_ahead = denoise(alpha_next * x0 + sigma_next * eps, levels.t[ahead], *_level(levels, ahead))
            slope = (history[0] + (eps_ahead - x0_ahead if straight else eps_ahead)) / 2
        else:
            slope = sum(weight * value for weight, value in zip(_ADAMS_BASHFORTH[len(history) - 1], history))
        if straight:
            x0, eps = z - sigma * slope, z + alpha * slope
        else:
            x0, eps = (z - sigma * slope) / alpha, slope
        z = alpha_next * x0 + sigma_next * eps
        _report(callback, i, z, x0)
    return z


def euler(
    denoise: Denoise, z, levels: SamplingLevels, *, noise=None, eta: float = 0.0, callback=None, before_step=None
):
    """Euler's method for the probability flow in z/α over σ/α (Karras et al. 2022), without dividing by α.

    For flow it is Euler in t. The step is that of deterministic DDIM. noise and eta are not read.
    """
    for i, t in enumerate(levels.t):
        z = _before(before_step, i, z)
        x0, eps = denoise(z, t, *_level(levels, i))
        alpha_next, sigma_next = _level(levels, i + 1)
        z = alpha_next * x0 + sigma_next * eps
        _report(callback, i, z, x0)
    return z


def heun(denoise: Denoise, z, levels: SamplingLevels, *, noise=None, eta: float = 0.0, callback=None, before_step=None):
    """Trapezoidal rule for dz = x0 dα + ε dσ with an Euler predictor; the last step is Euler's. 2N − 1 evaluations.

    The coordinates (α, σ) are finite at both ends, where those of Karras et al. (σ/α) grow without bound; for flow
    both are Heun in t. noise and eta are not read.
    """
    last = len(levels.t) - 1
    for i, t in enumerate(levels.t):
        z = _before(before_step, i, z)
        alpha, sigma, alpha_next, sigma_next = *_level(levels, i), *_level(levels, i + 1)
        x0, eps = denoise(z, t, alpha, sigma)
        predicted = alpha_next * x0 + sigma_next * eps
        if i < last:
            x0_next, eps_next = denoise(predicted, levels.t[i + 1], alpha_next, sigma_next)
            half_alpha, half_sigma = (alpha_next - alpha) / 2, (sigma_next - sigma) / 2
            z = predicted + half_alpha * (x0_next - x0) + half_sigma * (eps_next - eps)
        else:
            z = predicted
        _report(callback, i, z, x0)
    return z


def _half_log_snr(alpha: float, sigma: float) -> float:
    if alpha == 0 or sigma == 0:
        return -inf if alpha == 0 else inf
    return log(alpha) - log(sigma)


def dpm_solver_pp(
    denoise: Denoise,
    z,
    levels: SamplingLevels,
    *,
    noise=None,
    eta: float = 0.0,
    callback=None,
    before_step=None,
    order: int = 2,
):
    """DPM-Solver++(2M) (Lu et al. 2022): x0 extrapolated linearly in λ = ln(α/σ) from the last two evaluations.

    First order at the first step, at the last of fewer than 15, and where a step ends clean (λ = ∞; the result is
    x0 there). order = 1 is DDIM. noise and eta are not read.
    """
    steps = len(levels.t)
    before, h_before = None, 0.0
    for i, t in enumerate(levels.t):
        z = _before(before_step, i, z)
        alpha, sigma, alpha_next, sigma_next = *_level(levels, i), *_level(levels, i + 1)
        x0, _ = denoise(z, t, alpha, sigma)
        h = _half_log_snr(alpha_next, sigma_next) - _half_log_snr(alpha, sigma)
        first_order = order == 1 or before is None or (i == steps - 1 and steps < 15)
        mixed = x0
        if not first_order and 0 < h < inf and 0 < h_before < inf:
            # The value at λ + h/2, but never further ahead than one step back: where levels are uneven, as between
            # timesteps 50 and 0, the line would leave the data.
            mixed = x0 + min(1.0, h / (2 * h_before)) * (x0 - before)
        # σ'/σ z + α'(1 − e^{−h}) x0, the exponential written out: it is exact where σ' or α is 0.
        z = sigma_next / sigma * z + (alpha_next - alpha * sigma_next / sigma) * mixed
        before, h_before = x0, h
        _report(callback, i, z, x0)
    return z


def _level(levels: SamplingLevels, i: int) -> tuple[float, float]:
    return levels.alphas[i], levels.sigmas[i]


@dataclass(frozen=True)
class _SingleStep:
    t: Sequence[float]
    alphas: Sequence[float]
    sigmas: Sequence[float]


def repaint(
    sample: Callable[..., Any],
    denoise: Denoise,
    z,
    levels: SamplingLevels,
    times: int,
    *,
    noise,
    renoise,
    eta: float = 0.0,
    before_step=None,
    callback=None,
):
    """Every step `times` times, with new noise back up to where it began in between (RePaint, Lugmayr et al. 2022).

    A known region put in by `before_step(i, round, z)` and what the network makes of the rest come to agree this way.
    noise(i, round) is a step's own noise, renoise(i, round) that of the way back; callback(i, z, x0) is called after a
    step's last round. Steps stand alone, so multistep samplers go first order; jumps are one step long.
    """
    for i in range(len(levels.t)):
        step = _SingleStep(levels.t[i : i + 1], levels.alphas[i : i + 2], levels.sigmas[i : i + 2])
        (alpha, sigma), (alpha_next, sigma_next) = _level(step, 0), _level(step, 1)
        back = alpha / alpha_next  # the forward process between the two levels: its scale and variance
        variance = max(0.0, sigma**2 - (back * sigma_next) ** 2)
        for k in range(times):
            if k:
                z = back * z + sqrt(variance) * renoise(i, k)
            z = sample(
                denoise,
                z,
                step,
                eta=eta,
                noise=lambda _, i=i, k=k: noise(i, k),
                before_step=None if before_step is None else lambda _, z, i=i, k=k: before_step(i, k, z),
                callback=None if callback is None or k + 1 < times else lambda _, z, x0, i=i: callback(i, z, x0),
            )
    return z


@dataclass(frozen=True)
class Sampler:
    """A sampler and what to say about it: order of convergence, fresh noise or not, network evaluations of N steps;
    takes_eta: whether `eta` changes anything."""

    function: Callable[..., Any]
    order: int
    stochastic: bool
    evaluations: Callable[[int], int]
    description: str
    takes_eta: bool = False


def takes_eta(name: str) -> bool:
    """Whether the sampler of this name reads `eta`; one that there is not is left to who draws with it."""
    return name not in SAMPLERS or SAMPLERS[name].takes_eta


def _one_a_step(steps: int) -> int:
    return steps


def _one_more(steps: int) -> int:
    return steps + 1


def _two_a_step(steps: int) -> int:
    return 2 * steps - 1


SAMPLERS: dict[str, Sampler] = {
    "ddim": Sampler(
        ddim, 1, True, _one_a_step, "DDIM, the paper's; --eta 0 deterministic, 1 ancestral", takes_eta=True
    ),
    "ddpm": Sampler(ddpm, 1, True, _one_a_step, "ancestral sampling; wants many steps"),
    "plms": Sampler(plms, 2, False, _one_more, "multistep on the noise, as the original code has it"),
    "euler": Sampler(euler, 1, False, _one_a_step, "Euler on the probability flow; DDIM without noise"),
    "heun": Sampler(heun, 2, False, _two_a_step, "second order, two evaluations a step"),
    "dpm++": Sampler(dpm_solver_pp, 2, False, _one_a_step, "DPM-Solver++(2M): good images in 15 to 20 steps"),
}
