"""From noise to a latent: guidance (Ho & Salimans), its interval, and noise that depends on seed and sample alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ldmcli.core.errors import UsageError
from ldmcli.core.settings import SampleSettings
from ldmcli.maths import rng
from ldmcli.maths.samplers import SAMPLERS
from ldmcli.maths.schedule import Schedule, levels, to_x0_eps
from ldmcli.networks.conditions import Conditioning
from ldmcli.networks.diffusion import DiffusionModel


@dataclass(frozen=True)
class Guidance:
    """eps = eps_u + scale (eps_c - eps_u), applied where t / (T - 1) lies in `interval`; elsewhere conditional only."""

    scale: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)


def _pair(null: Tensor | None, given: Tensor | None) -> Tensor | None:
    return None if given is None else torch.cat([null, given])


def denoiser(
    model: DiffusionModel, schedule: Schedule, given: Conditioning, null: Conditioning | None, guidance: Guidance
) -> Callable:
    """The function that samplers call: (z, t, alpha, sigma) -> (x0, eps), each like z (B, c, h, w).

    scale 1: the conditional model in one call; 0: the unconditional one in one call; else both in one call of 2B.
    Without `null` there is nothing to guide against and `guidance` must be 1.
    """
    last = schedule.timesteps - 1

    def call(z: Tensor, t: float, conditioning: Conditioning) -> Tensor:
        return model.predict(z, torch.full((len(z),), t, device=z.device, dtype=torch.float32), conditioning).float()

    def output(z: Tensor, t: float) -> Tensor:
        inside = guidance.interval[0] <= t / last <= guidance.interval[1]
        scale = guidance.scale if inside else 1.0
        if null is None or scale == 1:
            return call(z, t, given)
        if scale == 0:
            return call(z, t, null)
        both = Conditioning(
            *[_pair(getattr(null, part), getattr(given, part)) for part in ("context", "concat", "vector")]
        )
        without, with_condition = call(torch.cat([z, z]), t, both).chunk(2)
        return without + scale * (with_condition - without)

    def denoise(z: Tensor, t: float, alpha: float, sigma: float) -> tuple[Tensor, Tensor]:
        return to_x0_eps(schedule.prediction, output(z, t), z, alpha, sigma)

    return denoise


def check_sampling(settings: SampleSettings, schedule: Schedule) -> None:
    """Raises UsageError for an unknown sampler or an impossible number of steps."""
    if settings.sampler not in SAMPLERS:
        raise UsageError(f"--sampler {settings.sampler}: choose one of {', '.join(SAMPLERS)}")
    levels(schedule, settings.steps, settings.spacing)


def draw_latents(
    model: DiffusionModel,
    schedule: Schedule,
    settings: SampleSettings,
    *,
    ids: Sequence[int],
    seed: int,
    inputs: dict[str, Tensor] | None,
    negative: dict[str, Tensor] | None = None,
    shape: tuple[int, int, int] | None = None,
    z_T: Tensor | None = None,
    start: Tensor | None = None,
    strength: float = 1.0,
) -> Tensor:
    """Final latents (len(ids), c, h, w) for samples `ids`; sample k depends on (seed, k) alone.

    inputs: prepared conditions, n rows each; negative: what takes the null's place. start: clean latents from which an
    image-to-image run begins, noised to `strength` of the way. z_T overrides the initial noise.
    """
    device = next(model.parameters()).device
    shape = shape or model.latent_shape
    way = levels(schedule, settings.steps, settings.spacing, strength=strength)
    moved = {name: tensor.to(device) for name, tensor in (inputs or {}).items()}
    given = model.embed(moved)
    null = None
    if model.conditions.kinds:
        null = model.embed({k: v.to(device) for k, v in (negative or model.conditions.null(len(ids))).items()})
    if z_T is None:
        z_T = rng.normal(seed, ids, shape, "z_T", device=device)
    z = z_T if start is None else way.alphas[0] * start + way.sigmas[0] * z_T
    denoise = denoiser(model, schedule, given, null, Guidance(settings.guidance, settings.guidance_interval))
    return SAMPLERS[settings.sampler].function(
        denoise, z, way, eta=settings.eta, noise=lambda step: rng.normal(seed, ids, shape, "step", step, device=device)
    )


def with_overrides(settings: SampleSettings, **values) -> SampleSettings:
    """`settings` with those of `values` that are not None."""
    return replace(settings, **{name: value for name, value in values.items() if value is not None})
