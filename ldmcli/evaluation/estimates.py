"""What a number is worth: its 95 % interval, the floor of the reference against itself, and a distance's limit.

Errors of a metric come from its entry in the table (`Metric.errors`); without one, from leaving out groups of images.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ldmcli.evaluation.features import FeatureSet
from ldmcli.evaluation.metrics import LOGITS, FeatureSets, Metric
from ldmcli.evaluation.reference_statistics import Statistics
from ldmcli.evaluation.result import EvaluationResult, Scores, key_of
from ldmcli.maths.distance_errors import Extrapolated
from ldmcli.maths.uncertainty import GROUPS, Error, interval, jackknife, mean_error

SPLITS = 5  # of the reference, for the floor
NUMBERS = 2**24  # of features in both parts of a split; above them there are fewer splits, at least 2
LEAST = 2 * GROUPS  # images of a set whose groups are left out
UNKNOWN: dict[str, Any] = {"interval": None, "method": "", "error_generated": None, "error_reference": None}


def add_of_images(
    result: EvaluationResult, key: str, values: Sequence[float], metric: Metric, network: str | None
) -> None:
    """What a mean over images is worth. values: of each image, those that are not finite left out."""
    finite = [value for value in values if math.isfinite(value)]
    error = mean_error(finite)
    stated = UNKNOWN if error is None else _stated(float(np.mean(finite)), error, metric.bounds)
    result.estimates[key] = {**stated, "floor": None, "network": network}


def add_of_sets(result: EvaluationResult, name: str, metric: Metric, sets: FeatureSets, scores: Scores) -> None:
    """What the values of a metric of sets are worth; of a Fréchet distance also its limit, a number of its own.

    name: of the metric in the table.
    """
    numbers = {value: number for value, number in scores.values.items() if number is not None}
    known = {value: numbers[value] for value in metric.values(name) if value in numbers}
    if not known or scores.estimates:
        return
    errors = left_out(metric, sets, known) if metric.errors is None else metric.errors(sets, numbers)
    floors = {} if metric.needs == LOGITS else floor(metric, sets, known)
    protocol = sets.extractor.protocol
    network = f"{protocol['name']}@{str(protocol['weights_sha256'])[:12]}"
    for value, number in known.items():
        error = errors.get(value)
        stated = UNKNOWN if error is None else _stated(number, error, metric.bounds)
        key = key_of(value, sets.extractor.suffix)
        result.estimates[key] = {**stated, "floor": floors.get(value), "network": network}
        if metric.extrapolate is None or error is None:
            continue
        found = metric.extrapolate(sets, number, error)
        result.estimates[key]["extrapolated"] = None if found is None else _limit(found, sets)
        if found is not None:
            label = metric.labels(name)[f"{value}_extrapolated"].replace("{net}", sets.extractor.title)
            result.add(f"{key}_extrapolated", label, found.value)


def frechet_interval(metric: Metric, sets: FeatureSets, value: float) -> tuple[float, float] | None:
    """The 95 % interval of a Fréchet distance by its influence function alone; None where it has no finite ends.

    metric: that of the table; value: its distance of these sets.
    """
    error = metric.errors and metric.errors(sets, {"fd": value})["fd"]
    ends = _stated(value, error, metric.bounds)["interval"] if error else None
    return None if ends is None else (ends[0], ends[1])


def _stated(value: float, error: Error, bounds: tuple[float, float]) -> dict[str, Any]:
    ends = list(interval(value, error, bounds))
    if not all(map(math.isfinite, ends)):
        return UNKNOWN
    return {
        "interval": ends,
        "method": error.method,
        "error_generated": error.generated,
        "error_reference": error.reference,
    }


def _limit(found: Extrapolated, sets: FeatureSets) -> dict[str, Any]:
    note = "" if found.holds else "fewer than 2 images a dimension: no line, so the value is too high; an upper bound"
    return {
        "value": found.value,
        "interval": list(found.interval),
        "points": [list(point) for point in found.points],
        "r2": found.r2,
        "of": "generated" if isinstance(sets.reference, Statistics) else "both",
        "note": note,
    }


def left_out(metric: Metric, sets: FeatureSets, values: dict[str, float]) -> dict[str, Error | None]:
    """Errors of any metric by the jackknife: of each side, as far as its rows are known, without a tenth of it."""

    def without(side: FeatureSets) -> np.ndarray:
        found = metric.compute(side).values
        return np.array([math.nan if found.get(value) is None else found[value] for value in values])

    generated, reference = sets.generated, sets.reference
    if len(generated) < LEAST or (isinstance(reference, FeatureSet) and len(reference) < LEAST):
        return {}
    own = jackknife(len(generated), lambda ids: without(replace(sets, generated=generated.of(ids.tolist()))))
    other = np.full(len(values), math.nan)
    if isinstance(reference, FeatureSet):
        other = jackknife(len(reference), lambda ids: without(replace(sets, reference=reference.of(ids.tolist()))))
    variances = {value: (own[k], other[k]) for k, value in enumerate(values)}
    return {value: _jackknifed(*pair) for value, pair in variances.items() if math.isfinite(pair[0])}


def _jackknifed(own: float, other: float) -> Error:
    known = math.isfinite(other)
    method = f"jackknife of {GROUPS} groups" + ("" if known else ", without the error of the reference")
    return Error(math.sqrt(own), math.sqrt(other) if known else None, method, GROUPS - 1)


# --- floor -----------------------------------------------------------------------------------------------------


def floor(metric: Metric, sets: FeatureSets, values: dict[str, float]) -> dict[str, dict[str, Any] | None]:
    """The metric of two disjoint parts of the reference, as large as the sets are where it has so many rows, and that
    of the generated images at these sizes. None where the reference is too small.

    Parts are drawn in the order of the images' hashes, so the order of files does not count.
    """
    rows = sets.reference.rows if isinstance(sets.reference, Statistics) else sets.reference
    if rows is None or len(rows) < 4:
        return {}
    count, m = len(sets.generated), len(rows)
    a = min(count, m // 2)
    b = m - a
    splits = max(2, min(SPLITS, NUMBERS // max(1, (a + b) * sets.extractor.dim)))
    orders = np.argsort(rows.hashes, kind="stable"), np.argsort(sets.generated.hashes, kind="stable")
    found: dict[str, list[tuple[float | None, float | None]]] = {value: [] for value in values}
    for split in range(splits):
        rng = np.random.default_rng([split, m, count])
        ids, own = rng.permutation(orders[0]), rng.permutation(orders[1])[:a]
        second = rows.of(ids[a:].tolist())
        real = metric.compute(replace(sets, generated=rows.of(ids[:a].tolist()), reference=second)).values
        here = metric.compute(replace(sets, generated=sets.generated.of(own.tolist()), reference=second)).values
        for value, pairs in found.items():
            pairs.append((real.get(value), here.get(value)))
    return {value: _floor(pairs, a, b) for value, pairs in found.items()}


def _floor(pairs: list[tuple[float | None, float | None]], a: int, b: int) -> dict[str, Any] | None:
    real = [value for value, _ in pairs if value is not None]
    here = [value for _, value in pairs if value is not None]
    if len(real) < len(pairs):
        return None
    return {
        "value": float(np.mean(real)),
        "std": float(np.std(real)),
        "n_generated": a,
        "n_reference": b,
        "splits": len(pairs),
        "here": float(np.mean(here)) if len(here) == len(pairs) else None,
    }
