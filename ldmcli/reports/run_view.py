"""What a run folder says, read for its report and its card: state, log, statistics, settings, previews, evaluations."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldmcli.conditions.outputs import preview_captions
from ldmcli.core import config as configuration
from ldmcli.core import files, runs
from ldmcli.core.errors import LdmError
from ldmcli.core.settings import DiffusionConfig
from ldmcli.evaluation.compare import read_key
from ldmcli.evaluation.metrics import report_title
from ldmcli.reports.charts import finite
from ldmcli.training.validation import VALIDATION_ROWS

TRAINING_FIGURES = {  # what only a training measures: name, which way is better
    "perceptual": ("Perceptual distance", "lower is better"),
    "val_loss": ("Validation loss", "lower is better"),
    "accuracy": ("Accuracy", "higher is better"),
    "accuracy_q1": ("Accuracy, least noise", "higher is better"),
    "accuracy_q2": ("Accuracy, second quarter", "higher is better"),
    "accuracy_q3": ("Accuracy, third quarter", "higher is better"),
    "accuracy_q4": ("Accuracy, most noise", "higher is better"),
}


@dataclass(frozen=True)
class RunView:
    """All that a run folder says, with nothing missing: what cannot be read is empty."""

    path: Path
    state: dict[str, Any]
    log: list[dict[str, Any]]
    stats: dict[str, Any]
    config: configuration.Config | None

    @property
    def kind(self) -> str:
        return str(self.state.get("kind") or "")

    @property
    def name(self) -> str:
        """The folder's name, not its place on somebody's disk."""
        return self.path.resolve().name

    @property
    def diffusion(self) -> DiffusionConfig | None:
        """The settings of a diffusion run."""
        return self.config if isinstance(self.config, DiffusionConfig) else None

    @property
    def conditions(self) -> tuple[str, ...]:
        """What a diffusion model is conditioned on, its task's included."""
        return tuple(self.diffusion.kinds) if self.diffusion else ()


def read_run(path: Path) -> RunView:
    """Reads a run folder, unfinished or damaged as it may be."""
    state = read_dict(path / "run.json")
    log = [line for line in runs.read_log(path) if isinstance(line, dict)]
    return RunView(path, state, log, read_dict(path / "stats.json"), read_config(path, str(state.get("kind"))))


def read_dict(path: Path) -> dict[str, Any]:
    """A JSON object; {} where there is none that can be read."""
    try:
        found = files.read_json(path)
    except LdmError:
        return {}
    return found if isinstance(found, dict) else {}


def read_config(path: Path, run_kind: str) -> configuration.Config | None:
    """The settings of a run; None where they can't be read."""
    try:
        return configuration.from_toml(run_kind, (path / "config.toml").read_text(encoding="utf-8"))
    except (LdmError, OSError, KeyError, ValueError):
        return None


def latest_metrics(run: RunView) -> dict[str, float]:
    """The newest validation of the log, else what run.json keeps: {metric: value}, without ends of intervals."""
    for line in reversed(run.log):
        found = {k.removeprefix("val/"): v for k, v in line.items() if k.startswith("val/")}
        if found:
            break
    else:
        found = run.state.get("metrics") or {}
    return {k: v for k, v in found.items() if finite([(0, v)]) and not read_key(k)[1]}


def metric_label(key: str) -> tuple[str, str, str]:
    """(name, unit, which way is better) of a metric; its key may carry an extractor, as fd_effnet_lite0."""
    if key in TRAINING_FIGURES:
        name, better = TRAINING_FIGURES[key]
        return name, "", better
    found = report_title(key)
    if found is None:
        return key.replace("_", " "), "", ""
    title, metric = found
    return title, metric.unit, ", ".join(filter(None, (f"{metric.better} is better", metric.bound)))


def validation_count(run: RunView, metric: str = "val_loss") -> int | None:
    """Rows that a validation looks at, or samples, for a metric."""
    rows = (run.state.get("data") or {}).get("validation_rows")
    if run.config is None or not isinstance(rows, int):
        return None
    if run.kind == "autoencoder":
        return run.config.train.measured_images(min(rows, run.config.train.eval_images))
    if isinstance(run.config, DiffusionConfig) and metric != "val_loss":
        return _sample_count(run.config, rows)
    return run.config.train.measured_images(min(rows, VALIDATION_ROWS))


def _sample_count(config: DiffusionConfig, rows: int) -> int:
    count = config.train.eval_samples
    return count if config.task.name == "generate" else min(count, rows)


def logged_values(log: Iterable[dict[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """{key: [(step, value)]} of the numbers in a log."""
    found: dict[str, list[tuple[float, float]]] = {}
    for line in log:
        step = line.get("step")
        if isinstance(step, int):
            for key, value in line.items():
                if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
                    found.setdefault(key, []).append((step, value))
    return found


def preview_texts(run: RunView) -> list[str]:
    """What each picture of a diffusion run's preview is conditioned on; [] where the sheet itself shows it, as of
    boxes."""
    request, specs = run.stats.get("preview") or {}, run.stats.get("conditions") or {}
    return preview_captions(request, run.conditions, specs)


def sample_files(path: Path) -> list[tuple[int, Path]]:
    """(step, file) of a run's previews, newest first."""
    named = [(file.stem.removeprefix("step-"), file) for file in (path / "samples").glob("step-*.png")]
    return sorted(((int(step), file) for step, file in named if step.isdecimal()), reverse=True)


def neighbours(run: RunView) -> dict[str, Any]:
    """What `ldm neighbours` found, as it lies in the run's folder; {} where nobody looked."""
    found = read_dict(run.path / "neighbours" / "neighbours.json")
    return found if found.get("kind") == "ldm neighbours" else {}


def evaluation_files(run: RunView) -> dict[str, dict[str, Any]]:
    """Results of evaluations that lie in the run's folder, by file name."""
    found = {path.stem: read_dict(path) for path in sorted(run.path.glob("eval*.json"))}
    return {name: one for name, one in found.items() if one}
