"""Curves out of a run's log: quality over steps and over seconds of training, and how fast it trained."""

from collections.abc import Iterable, Mapping, Sequence
from statistics import mean
from typing import Any

from ldmcli.reports.charts import finite

Curve = list[tuple[int, float, float]]  # step, seconds of training, value


def quality_curves(log: Iterable[Mapping[str, Any]]) -> dict[str, Curve]:
    """{metric: curve} of every metric that validations logged. Seconds are those of training, without evaluations;
    between two lines that know them they are interpolated by the step."""
    lines = [line for line in log if isinstance(line.get("step"), int)]
    clock = [(line["step"], float(line["trained_seconds"])) for line in lines if "trained_seconds" in line]
    found: dict[str, Curve] = {}
    for line in lines:
        for key, value in line.items():
            if key.startswith("val/") and finite([(0, value)]):
                at = seconds_at(clock, line["step"])
                found.setdefault(key.removeprefix("val/"), []).append((line["step"], at, float(value)))
    return found


def seconds_at(clock: Sequence[tuple[int, float]], step: int) -> float:
    """Seconds of training up to a step, by (step, seconds) in rising order; 0 where nothing is known."""
    before = max((one for one in clock if one[0] <= step), default=(0, 0.0))
    after = min((one for one in clock if one[0] > step), default=None)
    if after is not None:
        share = (step - before[0]) / (after[0] - before[0])
        return before[1] + share * (after[1] - before[1])
    return before[1] * step / before[0] if before[0] else 0.0


def training_speed(log: Iterable[Mapping[str, Any]]) -> float | None:
    """Images a second in training, a mean over the log without its first line, in which the machine warms up."""
    rates = [line["images_per_s"] for line in log if isinstance(line.get("images_per_s"), int | float)]
    return mean(rates[1:] or rates) if rates else None
