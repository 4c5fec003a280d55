"""From noise to a latent (Sec. 3.2, 3.3): a sampler over the guided denoiser, with noise that depends on seed and
sample alone, and regions that are kept."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from ldmcli.core.console import warn_once
from ldmcli.core.errors import ModelError, UsageError
from ldmcli.core.settings import FEW_CALLS, DistillSettings, SampleSettings
from ldmcli.diffusion.guidance import GuidancePath, Predict, autoguided, denoiser, guidance_path
from ldmcli.diffusion.samplers import SAMPLERS, Denoise, repaint, takes_eta
from ldmcli.diffusion.schedule import NoiseLevels, Schedule, q_sample, sampling_levels
from ldmcli.diffusion.tiling import tiled_predict
from ldmcli.maths import rng
from ldmcli.maths.number_format import autocast_format, narrow_range_advice
from ldmcli.networks.conditioning import Encode
from ldmcli.networks.latent_diffusion import DiffusionModel

Guide = Callable[[Denoise], Denoise]
Callback = Callable[[int, Tensor, Tensor], None]  # (step, z after it, x0 predicted in it)


@dataclass(frozen=True)
class InitLatents:
    """Where an image-to-image run begins. z_0: (B or 1, c, h, w) clean latents; strength: share of the way to noise, in
    (0, 1]."""

    z_0: Tensor
    strength: float = 1.0


@dataclass(frozen=True)
class KnownRegion:
    """A region that a sample keeps. z_0: (B, c, h, w) clean latents as the model sees them; keep: (B, 1, h, w) or
    (1, 1, h, w), 1 = keep z_0, 0 = sample; resample: how often each step is done (RePaint, Lugmayr et al. 2022)."""

    z_0: Tensor
    keep: Tensor
    resample: int = 1

    def composite(self, z: Tensor, known: Tensor) -> Tensor:
        """`known` where it is kept, z elsewhere."""
        return self.keep * known + (1 - self.keep) * z


@dataclass(frozen=True)
class KeyedNoise:
    """Standard normal noise of the samples `ids`, (len(ids), *shape): each number depends on (seed, sample, purpose,
    step) alone, so a sample is the same in any batch and on any number of devices."""

    seed: int
    ids: Sequence[int]
    shape: tuple[int, ...]
    device: torch.device

    def __call__(self, purpose: str, *step: int) -> Tensor:
        return rng.normal(self.seed, self.ids, self.shape, purpose, *step, device=self.device)


def check_sampling(settings: SampleSettings, schedule: Schedule, distilled: DistillSettings) -> None:
    """Raises UsageError for an unknown sampler, an impossible number of steps, or for what a distilled model has not
    learned: it knows its own levels, walked through by DDIM, and the guidance that is baked in."""
    if settings.sampler not in SAMPLERS:
        raise UsageError(f"--sampler {settings.sampler}: choose one of {', '.join(SAMPLERS)}")
    sampling_levels(schedule, settings.steps, settings.spacing)
    if not distilled.calls:
        return
    few = f"this model was distilled to {distilled.calls} calls"
    scales = settings.guidance.values() if isinstance(settings.guidance, Mapping) else (settings.guidance,)
    if any(scale != 1 for scale in scales):
        raise UsageError(f"--guidance: {few}, with guidance {distilled.guidance:g} baked in; leave it out")
    for name, known in {"steps": distilled.calls, "autoguidance": 1.0, **FEW_CALLS}.items():
        if (value := getattr(settings, name)) != known:
            raise UsageError(f"--{name} {value}: {few} of {FEW_CALLS['sampler']}; leave it out")


def with_overrides(settings: SampleSettings, **values) -> SampleSettings:
    """`settings` with those of `values` that are not None; eta is 0, and says so where it was asked for, with a sampler
    that does not take it. Raises UsageError for a setting that there is not."""
    known = [one.name for one in fields(settings)]
    if unknown := sorted(values.keys() - set(known)):
        raise UsageError(f"{unknown[0]}: no such setting of sampling; there are {', '.join(known)}")
    chosen = replace(settings, **{name: value for name, value in values.items() if value is not None})
    if chosen.eta == 0 or takes_eta(chosen.sampler):
        return chosen
    if values.get("eta"):
        takes = ", ".join(name for name, sampler in SAMPLERS.items() if sampler.takes_eta)
        warn_once("eta", f"--eta {chosen.eta:g} has no effect with --sampler {chosen.sampler}; {takes} takes it")
    return replace(chosen, eta=0.0)


def sample_conditioned(
    model: DiffusionModel,
    schedule: Schedule,
    settings: SampleSettings,
    *,
    ids: Sequence[int],
    seed: int,
    inputs: Mapping[str, Tensor] | None = None,
    negative: Mapping[str, Tensor] | None = None,
    encode: Encode | None = None,
    shape: tuple[int, int, int] | None = None,
    init: InitLatents | None = None,
    known: KnownRegion | None = None,
    guide: Guide | None = None,
    guiding: DiffusionModel | None = None,
    tile: int = 0,
    callback: Callback | None = None,
) -> Tensor:
    """Final latents (len(ids), c, h, w) for samples `ids`; sample k depends on (seed, k) alone.

    inputs: prepared conditions, a row a sample; negative: what takes the place of their null, or of a part of it.
    encode: the first stage's encoder, for conditions that are images. shape: (c, h, w), None = as trained. guide: a
    denoiser to a denoiser (`gradient_guidance`); guiding: the worse model of settings.autoguidance. tile: latent
    positions a side above which the networks see overlapping tiles; 0 = all at once. callback(i, z, x0): after each
    step. Raises ModelError where the model gives NaN or Inf.
    """
    device, shape = next(model.parameters()).device, shape or model.latent_shape
    inputs = {name: tensor.to(device) for name, tensor in (inputs or {}).items()}
    path = guidance_path(model, settings.guidance, inputs, negative, len(ids), shape[1:], encode)

    def predict_of(network: DiffusionModel) -> Predict:
        return tiled_predict(network.predict, tile, network.unet.size_factor) if tile else network.predict

    led = guide
    if settings.autoguidance != 1 and guiding is not None:
        given = guidance_path(guiding, 1.0, inputs, None, len(ids), shape[1:], encode)
        worse = denoiser(predict_of(guiding), schedule, given)

        def led(denoise: Denoise) -> Denoise:
            better = autoguided(denoise, worse, schedule, settings.autoguidance, settings.guidance_interval)
            return guide(better) if guide else better

    return sample_latents(
        predict_of(model),
        schedule,
        settings,
        path,
        KeyedNoise(seed, ids, shape, device),
        ids=ids,
        init=init,
        known=known,
        guide=led,
        callback=callback,
    )


def sample_latents(
    predict: Predict,
    schedule: Schedule,
    settings: SampleSettings,
    path: GuidancePath,
    noise: Callable[..., Tensor],
    *,
    ids: Sequence[int],
    z_T: Tensor | None = None,
    init: InitLatents | None = None,
    known: KnownRegion | None = None,
    guide: Guide | None = None,
    before_step: Callable[[int, Tensor], Tensor] | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Final latents from a network and conditionings, (len(ids), c, h, w).

    noise(purpose, *step): as `KeyedNoise`; purposes are z_T, step, known and renoise ("again"). z_T: the initial noise
    instead. settings.temperature scales the initial noise and that of the steps (the original: of the steps only). ids
    name samples in errors. before_step, callback: as the samplers take them. A known region comes back as it was.
    """
    levels = sampling_levels(schedule, settings.steps, settings.spacing, strength=init.strength if init else 1.0)
    z = settings.temperature * noise("z_T") if z_T is None else z_T
    if init is not None:
        z = q_sample(init.z_0, z, levels.alphas[0], levels.sigmas[0])
    denoise = denoiser(predict, schedule, path, settings.guidance_interval)
    denoise, seen = _watched(guide(denoise) if guide else denoise)

    def step_noise(*step: int) -> Tensor:
        return settings.temperature * noise("step", *step)

    sample = SAMPLERS[settings.sampler].function
    if known is None:
        z = sample(denoise, z, levels, eta=settings.eta, noise=step_noise, before_step=before_step, callback=callback)
        return _finite(z, seen, ids)
    replaced = replace_known_region(known, levels, lambda *step: noise("known", *step))

    def keep(*where) -> Tensor:
        *step, z = where
        return replaced(*step, before_step(step[0], z) if before_step else z)

    if known.resample > 1:
        z = repaint(
            sample,
            denoise,
            z,
            levels,
            known.resample,
            noise=step_noise,
            renoise=lambda *step: noise("again", *step),
            eta=settings.eta,
            before_step=keep,
            callback=callback,
        )
    else:
        z = sample(denoise, z, levels, eta=settings.eta, noise=step_noise, before_step=keep, callback=callback)
    return _finite(known.composite(z, known.z_0), seen, ids)


def replace_known_region(
    known: KnownRegion, levels: NoiseLevels, noise: Callable[..., Tensor]
) -> Callable[..., Tensor]:
    """(i, …, z) -> z for a sampler's `before_step`: before step i the known part is q_sample(z_0) with noise(i, …).

    As the original does (its mask 1 = keep): the last step is not followed by another.
    """

    def replaced(*where) -> Tensor:
        *step, z = where
        i = step[0]
        return known.composite(z, q_sample(known.z_0, noise(*step), levels.alphas[i], levels.sigmas[i]))

    return replaced


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
        f"{narrow_range_advice(autocast_format(z.device))}"
    )
