"""How steps went, as the host learns it: on CUDA a step late, so that it never waits for work that was just begun."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ldmcli.core import runs
from ldmcli.core.errors import DivergedError
from ldmcli.maths.number_format import narrow_range_advice
from ldmcli.training.gradient_guard import GradientGuard, Pending
from ldmcli.training.logger import TrainLogger
from ldmcli.training.state import TrainState


@dataclass(frozen=True)
class Step:
    """A step whose work was begun: its rows, its statistics and, on its way to the host, how it went."""

    number: int
    rows: Tensor
    stats: dict[str, Any]
    report: Pending


class Outcomes:
    """What follows from refused updates and spikes: counts in `progress`, lines, the end of a diverged run. Methods are
    collective where a step is refused: all processes see the same gradients."""

    def __init__(
        self,
        state: TrainState,
        guard: GradientGuard,
        logger: TrainLogger,
        folder: runs.RunFolder,
        main_network: str,
        row_name: Callable[[int], str],
    ):
        self.state, self.guard, self.logger, self.folder = state, guard, logger, folder
        self.main_network, self.row_name = main_network, row_name
        self._unread: Step | None = None

    def add(self, step: Step) -> None:
        """A step that was just begun. Settles those before it, and this one where that costs no waiting."""
        before, self._unread = self._unread, step
        self._settle(before)
        if not self.guard.late:
            self.settle()

    def settle(self) -> None:
        """Waits for the last step: `progress` is complete when this returns.

        Raises DivergedError after train.max_bad_steps refused ones in a row.
        """
        last, self._unread = self._unread, None
        self._settle(last)

    def _settle(self, step: Step | None) -> None:
        if step is None:
            return
        found, progress = self.guard.settle(step.report), self.state.progress
        if found.spike:
            self.logger.log_spike(step.number, *found.spike)
        if not found.refused:
            progress.bad_in_a_row = 0
            return
        if self.guard.late and self.state.ema and self.main_network in found.refused:
            self.state.ema.count -= 1
            progress.ema_count = self.state.ema.count
        if progress.loss_scale <= 1:  # above 1 float16 is looking for its scale
            self._count_bad(step)

    def _count_bad(self, step: Step) -> None:
        progress = self.state.progress
        progress.bad_in_a_row += 1
        rows = [self.row_name(int(i)) for i in step.rows]
        self.logger.log_nonfinite(step.number, progress.bad_in_a_row, rows, step.stats)
        if progress.bad_in_a_row >= self.state.settings.max_bad_steps:
            raise DivergedError(
                f"{self.folder.path}: NaN or Inf in {progress.bad_in_a_row} steps in a row up to step "
                f"{step.number}; bad-batch.json has the rows and values, the last good checkpoint "
                f"stands; lower --lr or raise train.warmup{narrow_range_advice(self.state.dist.dtype)}"
            )
