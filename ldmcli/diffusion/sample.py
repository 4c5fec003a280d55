"""From noise to a latent: guidance, its interval, known regions, and noise that depends on seed and sample alone.

Guidance (Ho & Salimans 2021) of several conditions: the network is asked with none of the guided kinds, then with one
kind more at a time, in the order of `guidance_order`, and each difference is weighted with its own scale,

    out = out(none) + Σ_k s_k (out(… and k) − out(…)).

It follows from p(z, c₁, c₂) = p(z) p(c₁|z) p(c₂|z, c₁) with each likelihood raised to its own power: the score of a
factor is the difference of two neighbours on that path. With equal scales it is ordinary guidance; with two kinds,
planes before words, it is the rule of InstructPix2Pix (Brooks et al. 2023). Kinds without a scale of their own are
always there.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from ldmcli.core.errors import ModelError, UsageError
from ldmcli.core.settings import SampleSettings
from ldmcli.diffusion.samplers import SAMPLERS, resampled
from ldmcli.diffusion.schedule import Levels, Schedule, levels, to_x0_eps
from ldmcli.maths import rng
from ldmcli.maths.tiles import blend, overlapping_tiles
from ldmcli.networks.conditioners import CONDITIONERS, Conditioning, guidance_order
from ldmcli.networks.latent_diffusion import DiffusionModel

Denoise = Callable[[Tensor, float, float, float], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Guidance:
    """out = out(null) + scale (out(given) - out(null)) where t / (T - 1) lies in `interval`; elsewhere out(given).

    A tuple of scales belongs to a path of conditionings, one a step of it (see the head of this module).
    """

    scale: float | tuple[float, ...] = 1.0
    interval: tuple[float, float] = (0.0, 1.0)

    def weights(self) -> list[float]:
        """Weight of each conditioning on the path, the null first; the sum is 1."""
        scales = self.scale if isinstance(self.scale, tuple) else (self.scale,)
        return [before - after for before, after in zip((1.0, *scales), (*scales, 0.0))]


@dataclass(frozen=True)
class Known:
    """A region that a sample has to keep. z0: (B, c, h, w) clean latents as the model sees them; keep: (B, 1, h, w) or
    (1, 1, h, w), 1 = keep z0, 0 = draw; resample: how often each step is done (RePaint)."""

    z0: Tensor
    keep: Tensor
    resample: int = 1


@dataclass(frozen=True)
class Steering:
    """What shapes a draw beside conditions. wrap: a denoiser to a denoiser (`gradient_guidance`); tile: latent
    positions a side above which the network sees overlapping tiles; 0 = all at once."""

    known: Known | None = None
    wrap: Callable[[Denoise], Denoise] | None = None
    tile: int = 0


def guided_kinds(kinds: Sequence[str], scale: float | Mapping[str, float]) -> list[tuple[tuple[str, ...], float]]:
    """The steps from null to given: [(kinds switched on, scale)]. One number switches all on at once.

    Raises UsageError for a kind that the model does not take or that has no null.
    """
    if not isinstance(scale, Mapping):
        return [(tuple(kind for kind in kinds if CONDITIONERS[kind].droppable), float(scale))]
    able = guidance_order(kinds)
    for kind in scale:
        if kind not in able:
            takes = ", ".join(able) or "no condition that could be guided"
            raise UsageError(f"--guidance {kind}={scale[kind]:g}: this model takes {takes}")
    return [((kind,), float(scale[kind])) for kind in able if kind in scale]


def tiled_predict(predict: Callable, tile: int, unit: int) -> Callable:
    """`DiffusionModel.predict` on tiles of `tile` latent positions a side, a third of it overlapping.

    (z (B, c, h, w), t (B,), conditioning) -> like z. Planes are cut alike, tokens and vector go to every tile. Tiles
    begin at multiples of `unit`, the UNet's size factor.
    """

    def tiled(z: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        if max(z.shape[-2:]) <= tile:
            return predict(z, t, conditioning)
        plan = overlapping_tiles((z.shape[-2], z.shape[-1]), tile, tile // 3, unit=unit)

        def of_tile(k: int) -> Tensor:
            planes = conditioning.concat
            planes = None if planes is None else plan.cut(planes, plan.corners[k])
            part = Conditioning(conditioning.context, planes, conditioning.vector)
            return predict(plan.cut(z, plan.corners[k]), t, part).float()

        return blend(of_tile, plan)

    return tiled


def _together(parts: list[Tensor | None]) -> Tensor | None:
    found = [part for part in parts if part is not None]
    return torch.cat(found) if found else None


def denoiser(
    model: DiffusionModel,
    schedule: Schedule,
    given: Conditioning,
    null: Conditioning | Sequence[Conditioning] | None,
    guidance: Guidance,
    *,
    tile: int = 0,
) -> Denoise:
    """The function that samplers call: (z, t, alpha, sigma) -> (x0, eps), each like z (B, c, h, w).

    null: what stands before `given` on the path of guidance, one conditioning or several; None: nothing to guide
    against. Conditionings of weight 0 are not computed (scale 1: `given` alone, scale 0: the null alone), the others
    in one call.
    """
    last, predict = schedule.timesteps - 1, model.predict
    if tile:
        predict = tiled_predict(model.predict, tile, model.unet.size_factor)
    path = [] if null is None else [null] if isinstance(null, Conditioning) else list(null)
    weights = guidance.weights() if path else [1.0]
    used = [(weight, part) for weight, part in zip(weights, [*path, given]) if weight != 0]

    def call(z: Tensor, t: float, conditioning: Conditioning) -> Tensor:
        times = torch.full((len(z),), t, device=z.device, dtype=torch.float32)
        return predict(z, times, conditioning).float()

    def output(z: Tensor, t: float) -> Tensor:
        inside = guidance.interval[0] <= t / last <= guidance.interval[1]
        if not inside or len(used) == 1:
            return call(z, t, used[0][1] if inside else given)
        parts = [part for _, part in used]
        joined = Conditioning(
            *[_together([getattr(part, name) for part in parts]) for name in ("context", "concat", "vector")]
        )
        outputs = call(torch.cat([z] * len(used)), t, joined).chunk(len(used))
        return sum((weight * out for (weight, _), out in zip(used[1:], outputs[1:])), used[0][0] * outputs[0])

    def denoise(z: Tensor, t: float, alpha: float, sigma: float) -> tuple[Tensor, Tensor]:
        return to_x0_eps(schedule.prediction, output(z, t), z, alpha, sigma)

    return denoise


def check_sampling(settings: SampleSettings, schedule: Schedule) -> None:
    """Raises UsageError for an unknown sampler or an impossible number of steps."""
    if settings.sampler not in SAMPLERS:
        raise UsageError(f"--sampler {settings.sampler}: choose one of {', '.join(SAMPLERS)}")
    levels(schedule, settings.steps, settings.spacing)


def known_region(known: Known, way: Levels, noise: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """(i, …, z) -> z for a sampler's `before_step`: before step i the known part is z0 with noise(i, …) at that level.

    As the original does (its mask 1 = keep): the last step is not followed by another blend.
    """

    def put_in(*where) -> Tensor:
        *step, z = where
        noised = way.alphas[step[0]] * known.z0 + way.sigmas[step[0]] * noise(*step)
        return known.keep * noised + (1 - known.keep) * z

    return put_in


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
    steering: Steering | None = None,
) -> Tensor:
    """Final latents (len(ids), c, h, w) for samples `ids`; sample k depends on (seed, k) alone.

    inputs: prepared conditions, n rows each; negative: what takes the place of their null, or of a part of it. start:
    clean latents from which an image-to-image run begins, noised to `strength` of the way. z_T overrides the initial
    noise. settings.temperature scales the initial noise and that of the steps (the original: of the steps only). A
    known region comes back as it was. Raises ModelError where the model gives NaN or Inf, naming step and sample.
    """
    device, steering = next(model.parameters()).device, steering or Steering()
    shape = shape or model.latent_shape
    way = levels(schedule, settings.steps, settings.spacing, strength=strength)
    given, path, scales = _path(model, settings.guidance, inputs or {}, negative, len(ids), shape[1:], device)
    if z_T is None:
        z_T = settings.temperature * rng.normal(seed, ids, shape, "z_T", device=device)
    z = z_T if start is None else way.alphas[0] * start + way.sigmas[0] * z_T
    guidance = Guidance(scales, settings.guidance_interval)
    denoise = denoiser(model, schedule, given, path, guidance, tile=steering.tile)
    if steering.wrap is not None:
        denoise = steering.wrap(denoise)
    denoise, seen = _watched(denoise)

    def noise(purpose: str, factor: float = 1.0) -> Callable[..., Tensor]:
        return lambda *step: factor * rng.normal(seed, ids, shape, purpose, *step, device=device)

    sample, known = SAMPLERS[settings.sampler].function, steering.known
    fresh = noise("step", settings.temperature)
    if known is None:
        return _finite(sample(denoise, z, way, eta=settings.eta, noise=fresh), seen, ids)
    before_step = known_region(known, way, noise("known"))
    if known.resample > 1:
        z = resampled(
            sample,
            denoise,
            z,
            way,
            known.resample,
            noise=fresh,
            again=noise("again"),
            eta=settings.eta,
            before_step=before_step,
        )
    else:
        z = sample(denoise, z, way, eta=settings.eta, noise=fresh, before_step=before_step)
    return _finite(known.keep * known.z0 + (1 - known.keep) * z, seen, ids)


def _watched(denoise: Denoise) -> tuple[Denoise, list[tuple[float, Tensor]]]:
    """The function, and a list that gets (t, which samples were finite) of each call; nothing waits for a device."""
    seen: list[tuple[float, Tensor]] = []

    def watched(z: Tensor, t: float, alpha: float, sigma: float) -> tuple[Tensor, Tensor]:
        x0, eps = denoise(z, t, alpha, sigma)
        seen.append((t, x0.isfinite().flatten(1).all(1)))
        return x0, eps

    return watched, seen


def _finite(z: Tensor, seen: list[tuple[float, Tensor]], ids: Sequence[int]) -> Tensor:
    """z, or ModelError that names samples and the first step where NaN or Inf came up."""
    good = z.isfinite().flatten(1).all(1)
    if bool(good.all()):
        return z
    where = "at the end of the sampler"
    for k, (t, fine) in enumerate(seen, 1):
        if not bool(fine.all()):
            good, where = fine, f"from call {k} of {len(seen)} of the network on (t = {t:g})"
            break
    bad = [i for i, fine in zip(ids, good.tolist()) if not fine]
    more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
    raise ModelError(
        f"the model gives NaN or Inf in sample {bad[0]}{more}, {where}; nothing was written of it. Try a "
        "lower --guidance, another --sampler, more --steps, or an earlier checkpoint"
    )


def _path(
    model: DiffusionModel,
    scale: float | Mapping[str, float],
    inputs: dict[str, Tensor],
    negative: dict[str, Tensor] | None,
    n: int,
    size: tuple[int, int],
    device: torch.device,
) -> tuple[Conditioning, list[Conditioning] | None, tuple[float, ...]]:
    """The conditioning asked for, those before it on the path of guidance, and the scale of each step."""
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    given, steps = model.embed(inputs, size), guided_kinds(model.conditions.kinds, scale)
    if not steps or not any(kinds for kinds, _ in steps):
        return given, None, (1.0,)
    null = model.conditions.null(n, inputs) | (negative or {})
    null = {name: tensor.to(device) for name, tensor in null.items()}
    told = {**inputs, **{name: null[name] for kinds, _ in steps for name in inputs if name.split(".")[0] in kinds}}
    path = []
    for kinds, _ in steps:
        path.append(model.embed(told, size))
        told |= {name: inputs[name] for name in inputs if name.split(".")[0] in kinds}
    return given, path, tuple(scale for _, scale in steps)


def with_overrides(settings: SampleSettings, **values) -> SampleSettings:
    """`settings` with those of `values` that are not None. Raises UsageError for a setting that there is not."""
    known = [one.name for one in fields(settings)]
    if unknown := sorted(values.keys() - set(known)):
        raise UsageError(f"{unknown[0]}: no such setting of sampling; there are {', '.join(known)}")
    return replace(settings, **{name: value for name, value in values.items() if value is not None})
