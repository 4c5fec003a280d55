"""How far a training is, by steps or by time, and what follows from it: its learning rate, evaluations, its end."""

from ldmcli.core.settings import TrainSettings
from ldmcli.training.distributed import Distributed
from ldmcli.training.lr_schedule import lr_factor
from ldmcli.training.state import TrainState


class RunClock:
    """The settings of [train] that speak of steps and minutes, against the progress of a run. Methods are collective
    where a limit of time is set: what one process has passed, all have."""

    def __init__(self, settings: TrainSettings, state: TrainState, dist: Distributed):
        self.settings, self.state, self.dist = settings, state, dist

    def time_is_up(self) -> bool:
        """Whether train.max_minutes of training are over."""
        limit = self.settings.max_minutes * 60
        late = bool(limit) and self.state.progress.trained_seconds >= limit
        return self.dist.all_reduce_max([float(late)])[0] > 0 if limit else False

    def share_done(self) -> float:
        """How much of the run is done, 0 to 1, by steps or by time, whichever is ahead."""
        s, p = self.settings, self.state.progress
        done = p.step / s.steps
        if s.max_minutes:
            done = max(done, min(1.0, p.trained_seconds / (s.max_minutes * 60)))
            done = self.dist.all_reduce_max([done])[0]
        return done

    def guide_is_due(self) -> bool:
        """Whether the weights after this step are kept as the guiding model: the first at or beyond train.guide_at."""
        at = self.settings.guide_at
        return bool(at) and not self.state.progress.guide_step and self.share_done() >= at

    def lr_factor(self) -> float:
        """Multiplier of every rate at this step."""
        return lr_factor(self.settings, self.state.progress.step, self.share_done())

    def evaluation_is_due(self) -> bool:
        """Whether an evaluation follows this step: by train.eval_every, or as one of train.evaluations, which lie at
        equal shares of the run, the last at its end."""
        every, count, progress = self.settings.eval_every, self.settings.evaluations, self.state.progress
        passed = min(int(self.share_done() * count), count - 1) if count else 0  # the end has one anyway
        has_come = passed > progress.evaluations
        progress.evaluations = max(passed, progress.evaluations)
        return has_come or bool(every) and progress.step % every == 0
