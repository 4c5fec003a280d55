"""Multipliers of the learning rate, and the decay of the weight average, as functions of the step.

The rate warms up, stays, and cools down over the last share of a run.
"""


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


def ema_decay_at(n: int, decay: float) -> float:
    """Decay of the weight average at its n-th update, counted from 1: min(decay, (1 + n) / (10 + n))."""
    return min(decay, (1 + n) / (10 + n))
