"""The checkpoint of the best evaluation so far (train.keep_best)."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ldmcli.core import runs
from ldmcli.core.config import Config
from ldmcli.core.errors import UsageError
from ldmcli.core.settings import DiffusionConfig
from ldmcli.evaluation.compare import higher_is_better, lookup
from ldmcli.evaluation.novelty import shows_copies

SMALL_SET = 5_000  # pictures: a model of fewer repeats them before its distance stops falling


def metric_to_keep(config: Config, rows: int) -> str:
    """The metric by which the best checkpoint of a training on so many rows stays: as train.keep_best says; where it
    says nothing, the Fréchet distance of a small set whose samples are measured; "" = none stays."""
    train = config.train
    if train.keep_best:
        return "" if train.keep_best == "none" else train.keep_best
    measured = isinstance(config, DiffusionConfig) and train.eval_samples and (train.eval_every or train.evaluations)
    return "fid" if measured and not config.data.streaming and rows < SMALL_SET else ""


def small_set_note(config: DiffusionConfig, rows: int) -> str:
    """What a training on few pictures should be told that would show when it begins to repeat them; "" = nothing, also
    where data.limit makes them few: who asks for a part of a set tries something."""
    train = config.train
    if config.task.name != "generate" or config.data.streaming or config.data.limit or not rows < SMALL_SET:
        return ""
    if train.eval_samples and train.eval_novelty and (train.eval_every or train.evaluations):
        return ""
    missing = "" if train.eval_samples else " --set train.eval_samples=256 --set train.evaluations=10"
    missing += "" if train.eval_novelty else " --set train.eval_novelty=true"
    return (
        f"few pictures ({rows:,}): a model repeats them after a while; `ldm train-ldm` with{missing} shows when, and "
        "keeps the best checkpoint from before"
    )


@dataclass(frozen=True)
class Best:
    """An evaluation, as run.json keeps it: its step, the key of the metric, and its value."""

    step: int
    metric: str
    value: float

    def is_worse_than(self, value: float) -> bool:
        """Whether another value of the metric is better; of equal ones the earlier stands."""
        higher = self.metric == "accuracy" or higher_is_better(
            self.metric
        )  # that of classifiers is no metric of images
        return value > self.value if higher else value < self.value


def find_metric(metrics: Mapping[str, Any], name: str) -> tuple[str, float | None]:
    """(key, value) of the metric that train.keep_best names: by its key, or as --fail-above names it ("fid", "kid").

    Raises UsageError where `metrics` has none of that name.
    """
    frechet = next((key for key in metrics if key.startswith(("fid_", "fd_"))), None)
    try:
        return lookup({"metrics": dict(metrics), "frechet": frechet}, name)
    except UsageError:
        raise UsageError(
            f"train.keep_best = {name!r}: evaluations of this training measure {', '.join(metrics)}"
        ) from None


class BestCheckpoint:
    """Which checkpoint of a run is the best one. name: of the metric; "" = none is kept."""

    def __init__(self, folder: runs.RunFolder, name: str):
        self.folder, self.name = folder, name
        self.best: Best | None = None

    @property
    def step(self) -> int | None:
        """Of the checkpoint to keep; None while there is none."""
        return None if self.best is None else self.best.step

    def restore(self) -> None:
        """Takes up the best of the evaluations in the log whose checkpoints are there, and puts it into run.json."""
        saved = set(runs.checkpoint_steps(self.folder.path)) if self.name else set()
        for line in runs.read_log(self.folder.path):
            if line.get("step") in saved:
                self.observe(line["step"], _validation(line.items()))
        self.write()

    def lacks(self, metrics: Mapping[str, Any]) -> bool:
        """Whether an evaluation has not measured the metric."""
        try:
            return bool(self.name) and not find_metric(metrics, self.name)
        except UsageError:
            return True

    def observe(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Takes note of an evaluation at `step`; whether it is the best so far. One that lacks the metric, or whose
        samples are copies of training pictures (train.eval_novelty), is not."""
        if not self.name or self.lacks(metrics) or shows_copies(metrics):
            return False
        key, value = find_metric(metrics, self.name)
        if not isinstance(value, int | float) or not math.isfinite(value):
            return False
        if self.best is not None and not self.best.is_worse_than(value):
            return False
        self.best = Best(step, key, float(value))
        return True

    def write(self) -> None:
        """Puts the best evaluation into run.json; nothing is left there where none is kept."""
        found = asdict(self.best) if self.best else None
        if self.folder.state().get("best") != found:
            self.folder.update(best=found)


def _validation(items: Iterable[tuple[str, Any]]) -> dict[str, float]:
    return {name.removeprefix("val/"): value for name, value in items if name.startswith("val/")}
