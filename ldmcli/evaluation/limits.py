"""Limits that metrics must keep, and which of them a result misses."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ldmcli.evaluation.compare import lookup


@dataclass(frozen=True)
class Limit:
    """metric: as people type it, "" for the Fréchet distance. above: larger values miss it, otherwise smaller ones."""

    metric: str
    value: float
    above: bool


def misses(result: Mapping[str, Any], limits: Sequence[Limit]) -> dict[str, list[str]]:
    """{key: why it fails} of the numbers of one result that miss a limit, as one without a value does, or that got
    worse than in --compare. Raises UsageError for a limit of a metric that was not measured."""
    found: dict[str, list[str]] = {}
    for limit in limits:
        key, value = lookup(dict(result), limit.metric)
        if value is None or not (value <= limit.value if limit.above else value >= limit.value):
            side = "above" if limit.above else "below"
            found.setdefault(key, []).append(f"{key} = {_shown(value)} is {side} {limit.value:g}")
    for key in result.get("worse", ()):
        change = result["compared"][key]
        text = f"{key} = {_shown(change['new'])} is worse than {_shown(change['old'])} in --compare"
        found.setdefault(key, []).append(text)
    return found


def _shown(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"
