"""Multipliers of the learning rate, and the decay of the weight average, as functions of the step.

The rate warms up, stays, and cools down over the last share of a run; or it goes through the cycles of the two
schedulers of CompVis/latent-diffusion, jumps included.
"""

from collections.abc import Sequence
from math import cos, pi
from typing import NamedTuple

from ldmcli.core.settings import TrainSettings


def warmup_factor(step: int, warmup: int) -> float:
    """Linear rise over the first `warmup` updates; update 0 already moves: 1/warmup, …, 1. In (0, 1]."""
    return min(1.0, (step + 1) / warmup) if warmup > 0 else 1.0


def cooldown_factor(progress: float, cooldown: float) -> float:
    """Constant, then a linear fall to 0 over the last share `cooldown` of a run. progress, cooldown: in [0, 1]."""
    if cooldown <= 0:
        return 1.0
    return min(1.0, max(0.0, (1.0 - progress) / cooldown))


class Cycle(NamedTuple):
    """A cycle of the learning rate, in steps; start, top, low: multipliers at its beginning, after its warm-up, at its
    end."""

    steps: float
    warmup: int
    start: float
    top: float
    low: float


def cycle_factor(n: float, cycles: Sequence[Cycle], shape: str) -> float:
    """Multiplier at update `n`, counted from 0: linear warm-up, then a fall to the end of the cycle.

    shape: "linear" (LambdaLinearScheduler of CompVis/latent-diffusion; the fall counts from the start of the cycle, so
    it jumps where warm-up ends) or "warmup_cosine" (LambdaWarmUpCosineScheduler, and 2 for several cycles). The end of
    a cycle belongs to it. The original fails past the last cycle; here its end goes on.
    """
    cycle = cycles[-1]
    for cycle in cycles:
        if n <= cycle.steps:
            break
        n -= cycle.steps
    else:
        n = cycle.steps
    if n < cycle.warmup:
        return cycle.start + (cycle.top - cycle.start) * n / cycle.warmup
    if shape == "linear":
        return cycle.low + (cycle.top - cycle.low) * (cycle.steps - n) / cycle.steps
    share = (n - cycle.warmup) / (cycle.steps - cycle.warmup)
    return cycle.low + 0.5 * (cycle.top - cycle.low) * (1 + cos(pi * share))


def cycles_of(train: TrainSettings) -> list[Cycle]:
    """The cycles that the settings say; a single number stands for each of them."""
    steps = train.cycle_steps or (train.steps,)
    columns = (steps, train.cycle_warmup, train.cycle_start, train.cycle_max, train.cycle_min)
    return [Cycle(*row) for row in zip(*(column * (len(steps) // len(column)) for column in columns))]


def lr_factor(train: TrainSettings, step: int, progress: float) -> float:
    """Multiplier of the learning rate at update `step`, where the share `progress` of the run is done. With the
    schedule "constant" it is positive while `progress` is below 1. A single cycle as long as the run follows
    `progress`, which a run of limited time is ahead of its steps in."""
    if train.schedule == "constant":
        return warmup_factor(step, train.warmup) * cooldown_factor(progress, train.cooldown)
    n = step if train.cycle_steps else max(step, progress * train.steps)
    return cycle_factor(n, cycles_of(train), train.schedule)


def ema_decay_at(n: int, decay: float) -> float:
    """Decay of the weight average at its n-th update, counted from 1: min(decay, (1 + n) / (10 + n))."""
    return min(decay, (1 + n) / (10 + n))
