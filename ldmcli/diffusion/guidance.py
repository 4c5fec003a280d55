"""Classifier-free guidance (Ho & Salimans 2021) with one condition or several.

    ε̂ = ε(∅) + s (ε(y) − ε(∅))

With several conditions the network is evaluated with none of them, then with one more at a time in the order of
`guidance_order`, and each difference has a scale of its own,

    ε̂ = ε(∅) + Σ_k s_k (ε(y₁ … y_k) − ε(y₁ … y_{k−1})).

It follows from p(z, y₁, y₂) = p(z) p(y₁|z) p(y₂|z, y₁) with each likelihood raised to its own power: the score of a
factor is the difference of two neighbours on that path. With equal scales it is the first line; with two conditions,
planes before words, it is the rule of InstructPix2Pix (Brooks et al. 2023). Conditions without a scale of their own are
always there, as are the planes of a task.

Autoguidance (Karras et al. 2024) leads away from a guiding model, a worse version of the model with the same
conditions, as it was early in its training:

    ε̂ = ε₀(y) + w (ε(y) − ε₀(y)).

Where classifier-free guidance acts, too, its ε̂ stands in place of ε(y).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from ldmcli.core.errors import UsageError
from ldmcli.diffusion.samplers import Denoise
from ldmcli.diffusion.schedule import Schedule, to_x0_eps
from ldmcli.networks.blocks import KeptKeys
from ldmcli.networks.conditioners import CONDITIONERS, Conditioning, Conditions, guidance_order
from ldmcli.networks.conditioning import Encode

Predict = Callable[[Tensor, Tensor, Conditioning], Tensor]


class Embeds(Protocol):
    """What guidance needs of a model: its conditions, and τ_θ(y) of prepared inputs for latents of (h, w)."""

    conditions: Conditions

    def embed(
        self, inputs: Mapping[str, Tensor], size: tuple[int, int], encode: Encode | None = None
    ) -> Conditioning: ...


@dataclass(frozen=True)
class GuidancePath:
    """Conditionings from the null to the one given, and the scale of each step between two of them.

    With one conditioning there is nothing to guide against.
    """

    conditionings: tuple[Conditioning, ...]
    scales: tuple[float, ...] = ()

    def weights(self) -> list[float]:
        """Weight of each conditioning's output, the null's first; the sum is 1. One condition: 1 − s and s."""
        return [before - after for before, after in zip((1.0, *self.scales), (*self.scales, 0.0))]


def guidance_steps(
    conditions: Sequence[str], scale: float | Mapping[str, float]
) -> list[tuple[tuple[str, ...], float]]:
    """The steps from null to given: [(conditions switched on, scale)]. One number switches all on at once.

    conditions: those of the model. Raises UsageError for a scale of one that the model lacks or that has no null.
    """
    if not isinstance(scale, Mapping):
        return [(tuple(name for name in conditions if CONDITIONERS[name].droppable), float(scale))]
    able = guidance_order(conditions)
    for name in scale:
        if name not in able:
            takes = ", ".join(able) or "no condition that could be guided"
            raise UsageError(f"--guidance {name}={scale[name]:g}: this model takes {takes}")
    return [((name,), float(scale[name])) for name in able if name in scale]


def guidance_path(
    model: Embeds,
    scale: float | Mapping[str, float],
    inputs: Mapping[str, Tensor],
    negative: Mapping[str, Tensor] | None,
    n: int,
    size: tuple[int, int],
    encode: Encode | None = None,
) -> GuidancePath:
    """The path of `inputs` (prepared, n rows on the model's device) for latents of `size` (h, w).

    negative: inputs that take the place of the null, or of a part of it (a negative prompt). encode: the first stage's
    encoder, for conditions that are images. At scale 1 there is no null, which a model need not have then.
    """
    given, steps = model.embed(inputs, size, encode), guidance_steps(model.conditions.kinds, scale)
    switched_on = {name for names, _ in steps for name in names}
    if scale == 1 or not switched_on:
        return GuidancePath((given,))
    null, changed = dict(negative or {}), [name for name in inputs if _condition(name) in switched_on]
    if not null.keys() >= set(changed):
        null = {**model.conditions.null(n, inputs), **null}
    current = {**inputs, **{name: null[name].to(inputs[name].device) for name in changed}}
    path = []
    for names, _ in steps:
        path.append(model.embed(current, size, encode))
        current |= {name: x for name, x in inputs.items() if _condition(name) in names}
    return GuidancePath((*path, given), tuple(scale for _, scale in steps))


def _condition(name: str) -> str:
    """The condition that an input "condition.name" belongs to."""
    return name.partition(".")[0]


def _stacked(conditionings: Sequence[Conditioning]) -> Conditioning:
    """Several conditionings of n rows each as one of all rows."""

    def stack(parts: Sequence[Tensor | None]) -> Tensor | None:
        present = [part for part in parts if part is not None]
        return torch.cat(present) if present else None

    return Conditioning(
        context=stack([one.context for one in conditionings]),
        concat=stack([one.concat for one in conditionings]),
        vector=stack([one.vector for one in conditionings]),
    )


def denoiser(
    predict: Predict, schedule: Schedule, path: GuidancePath, interval: tuple[float, float] = (0.0, 1.0)
) -> Denoise:
    """The function that samplers call: (z, t, α, σ) -> (x0, ε), each like z (B, c, h, w), with guidance.

    predict: the network's output (B, c, h, w) for z, timesteps (B,) and a conditioning. Outside `interval` of t / (T −
    1) only the conditioning that was given counts. Conditionings of weight 0 are not computed (scale 1: what was given
    alone, scale 0: the null alone), the others in one call. Keys and values of tokens are made in the first call.

    Samples of one call may stand at levels of their own: t is (B,) then, and α and σ are (B,) or (B, 1, 1, 1).
    """
    given, acts = path.conditionings[-1], _acts(schedule, interval)
    weighted = [(weight, one) for weight, one in zip(path.weights(), path.conditionings) if weight != 0]

    kept, together = KeptKeys(), cache(lambda: _stacked([one for _, one in weighted]))

    def output(z: Tensor, t: float | Tensor, n: int, conditioning: Conditioning) -> list[Tensor]:
        if isinstance(t, Tensor):
            times = t.float().repeat(n)
        else:
            times = torch.full((n * len(z),), t, device=z.device, dtype=torch.float32)
        with kept:
            return list(predict(torch.cat([z] * n) if n > 1 else z, times, conditioning).float().chunk(n))

    def inside(z: Tensor, t: float | Tensor) -> Tensor:
        outputs = output(z, t, len(weighted), weighted[0][1] if len(weighted) == 1 else together())
        if len(outputs) == 1:
            return outputs[0]
        total = weighted[0][0] * outputs[0]
        for (weight, _), out in zip(weighted[1:], outputs[1:]):
            total = total + weight * out
        return total

    def guided(z: Tensor, t: float | Tensor) -> Tensor:
        if isinstance(t, Tensor):
            if interval == (0.0, 1.0):
                return inside(z, t)
            return torch.where(acts(t).reshape(-1, 1, 1, 1), inside(z, t), output(z, t, 1, given)[0])
        return inside(z, t) if acts(t) else output(z, t, 1, given)[0]

    def denoise(z: Tensor, t: Any, alpha: Any, sigma: Any) -> tuple[Tensor, Tensor]:
        return to_x0_eps(schedule.prediction, guided(z, t), z, alpha, sigma)

    return denoise


def autoguided(
    denoise: Denoise, guiding: Denoise, schedule: Schedule, scale: float, interval: tuple[float, float] = (0.0, 1.0)
) -> Denoise:
    """`denoise` led away from `guiding` by `scale` (1 = not at all), both (z, t, α, σ) -> (x0, ε) as `denoiser` makes
    them. Outside `interval` of t / (T − 1) it is `denoise` alone."""
    acts = _acts(schedule, interval)

    def led(z: Tensor, t: Any, alpha: Any, sigma: Any) -> tuple[Tensor, Tensor]:
        found = denoise(z, t, alpha, sigma)
        if not isinstance(t, Tensor) and not acts(t):
            return found
        more: Any = scale - 1
        if isinstance(t, Tensor):
            more = more * acts(t).reshape(-1, 1, 1, 1).to(z.dtype)
        x0, eps = (own + more * (own - other) for own, other in zip(found, guiding(z, t, alpha, sigma)))
        return x0, eps

    return led


def _acts(schedule: Schedule, interval: tuple[float, float]) -> Callable[[Any], Any]:
    """t -> whether guidance acts there, of a number or of (B,) of them."""
    last = schedule.num_timesteps - 1

    def acts(t: Any) -> Any:
        if isinstance(t, Tensor):
            return (t >= interval[0] * last) & (t <= interval[1] * last)
        return interval[0] <= t / last <= interval[1]

    return acts
