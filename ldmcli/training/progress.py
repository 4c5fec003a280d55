"""What a training carries from step to step beside tensors, with a guard against spikes and divergence.

A gradient out of proportion to those before it is scaled down and counted; a loss that has risen for good is reported.
Both classes are stored in a checkpoint's state.json, under the names of their fields.
"""

import math
from dataclasses import dataclass, field
from typing import Any

NORM_WINDOW = 50  # updates over which the usual gradient norm is averaged
RISE_RATIO = 10.0  # a loss this many times its lowest, in RISE_WINDOWS log windows in a row, has risen for good
RISE_WINDOWS = 2


@dataclass
class StabilityMonitor:
    """Gradient norms and losses so far. Plain numbers, so that JSON holds them."""

    usual: dict[str, list[float]] = field(default_factory=dict)  # phase → [updates seen, mean log of their norms]
    spikes: int = 0  # updates whose gradient was scaled down
    lowest: float = 0.0  # of the mean losses of log windows; 0 = none yet
    lowest_step: int = 0
    high: int = 0  # log windows in a row whose loss has risen
    high_since: int = 0  # step of the first of them

    def observe_loss(self, loss: float, step: int) -> None:
        """The mean loss of a log window that ended at `step`. Losses that are not positive say nothing."""
        if self.lowest and loss > RISE_RATIO * self.lowest or not math.isfinite(loss):
            self.high_since = self.high_since if self.high else step
            self.high += 1
            return
        self.high = 0
        if loss > 0 and (not self.lowest or loss < self.lowest):
            self.lowest, self.lowest_step = loss, step

    @property
    def has_risen(self) -> bool:
        """Whether the loss stands at more than ten times its lowest, and not for one log window only."""
        return self.high >= RISE_WINDOWS

    def warnings(self) -> list[str]:
        """What the user must know of the training as it stands, one sentence each."""
        if not self.has_risen:
            return []
        return [
            f"the loss has been more than ten times its lowest ({self.lowest:.3g} at step {self.lowest_step:,}) since "
            f"step {self.high_since:,}: the training has diverged; begin anew with a lower --lr, a longer "
            "train.warmup or a tighter train.clip"
        ]


@dataclass
class Progress:
    """Counters, loss scale and precision."""

    step: int = 0
    images: int = 0
    ema_count: int = 0
    trained_seconds: float = 0.0
    evaluations: int = 0  # of train.evaluations that have come
    guide_step: int = 0  # whose weights are kept as the guiding model; 0 = none yet
    bad_in_a_row: int = 0
    loss_scale: float = 1.0
    good_steps: int = 0
    precision: str = ""  # of the autocast; "auto" is decided once a run, so that going on is exact
    micro_batch: int = 0  # samples at a time: as set, or chosen by free memory; 0 = not chosen yet
    course: StabilityMonitor = field(default_factory=StabilityMonitor)

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "Progress":
        """From state.json, which may hold more, and of an older version less."""
        kept = {name: state[name] for name in cls.__dataclass_fields__ if name in state}
        return cls(**kept | {"course": StabilityMonitor(**kept.get("course", {}))})
