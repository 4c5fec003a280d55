"""Multipliers of the learning rate, and the decay of the weight average, as functions of the step.

Ours is warm-up, constant, cooldown. `lambda_linear` and `lambda_warmup_cosine` are the two schedulers of
CompVis/latent-diffusion, jumps included.
"""

from collections.abc import Sequence
from math import cos, pi


def warmup_factor(step: int, warmup: int) -> float:
    """Linear rise over the first `warmup` updates; update 0 already moves: 1/warmup, …, 1. In (0, 1]."""
    return min(1.0, (step + 1) / warmup) if warmup > 0 else 1.0


def cooldown_factor(progress: float, cooldown: float) -> float:
    """Constant, then a linear fall to 0 over the last share `cooldown` of a run. progress, cooldown: in [0, 1]."""
    if cooldown <= 0:
        return 1.0
    return min(1.0, max(0.0, (1.0 - progress) / cooldown))


def lr_factor(step: int, progress: float, warmup: int = 0, cooldown: float = 0.0) -> float:
    """Multiplier of the learning rate at update `step`, where the share `progress` of the run is done; positive while
    it is below 1."""
    return warmup_factor(step, warmup) * cooldown_factor(progress, cooldown)


def _cycle(n: int, cycle_lengths: Sequence[float]) -> tuple[int, float]:
    """Which cycle update n falls in, and its number there. The end of a cycle belongs to it, as in the original.

    The original fails past the last cycle; here the end of the last cycle goes on.
    """
    start = 0.0
    for i, length in enumerate(cycle_lengths):
        if n <= start + length:
            return i, n - start
        start += length
    return len(cycle_lengths) - 1, cycle_lengths[-1]


def lambda_linear(
    n: int,
    *,
    warm_up_steps: Sequence[int],
    f_min: Sequence[float],
    f_max: Sequence[float],
    f_start: Sequence[float],
    cycle_lengths: Sequence[float],
) -> float:
    """Linear warm-up, then a linear fall that counts from the start of the cycle: it jumps where warm-up ends.

    n: update, from 0. Lists have one entry a cycle. Source: LambdaLinearScheduler of CompVis/latent-diffusion.
    """
    i, n_cycle = _cycle(n, cycle_lengths)
    if n_cycle < warm_up_steps[i]:
        return f_start[i] + (f_max[i] - f_start[i]) * n_cycle / warm_up_steps[i]
    return f_min[i] + (f_max[i] - f_min[i]) * (cycle_lengths[i] - n_cycle) / cycle_lengths[i]


def lambda_warmup_cosine_cycles(
    n: int,
    *,
    warm_up_steps: Sequence[int],
    f_min: Sequence[float],
    f_max: Sequence[float],
    f_start: Sequence[float],
    cycle_lengths: Sequence[float],
) -> float:
    """Linear warm-up, then half a cosine to the end of the cycle; one entry a cycle.

    n: update, from 0. Source: LambdaWarmUpCosineScheduler2 of CompVis/latent-diffusion.
    """
    i, n_cycle = _cycle(n, cycle_lengths)
    if n_cycle < warm_up_steps[i]:
        return f_start[i] + (f_max[i] - f_start[i]) * n_cycle / warm_up_steps[i]
    share = min(1.0, (n_cycle - warm_up_steps[i]) / (cycle_lengths[i] - warm_up_steps[i]))
    return f_min[i] + 0.5 * (f_max[i] - f_min[i]) * (1 + cos(pi * share))


def lambda_warmup_cosine(
    n: int, *, warm_up_steps: int, lr_min: float, lr_max: float, lr_start: float, max_decay_steps: int
) -> float:
    """The same with one cycle; constant at lr_min afterwards. Source: LambdaWarmUpCosineScheduler, same place."""
    return lambda_warmup_cosine_cycles(
        n,
        warm_up_steps=[warm_up_steps],
        f_min=[lr_min],
        f_max=[lr_max],
        f_start=[lr_start],
        cycle_lengths=[max_decay_steps],
    )


def ema_decay_at(n: int, decay: float) -> float:
    """Decay of the weight average at its n-th update, counted from 1: min(decay, (1 + n) / (10 + n))."""
    return min(decay, (1 + n) / (10 + n))
