"""What an evaluation measures against: rows of a data set, images, or their statistics."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from ldmcli.core import console
from ldmcli.core.errors import InputError, UsageError
from ldmcli.core.settings import DataSettings
from ldmcli.data.rows import evenly_spaced
from ldmcli.evaluation.image_streams import ImageStream, open_images, rows_source
from ldmcli.evaluation.measure import REFERENCE_LIMIT, Instruments
from ldmcli.evaluation.metrics import FEATURES, OF_SETS, needing
from ldmcli.evaluation.reference_statistics import (
    ALL,
    Statistics,
    has_moments,
    is_sample_set,
    open_reference,
    read_statistics,
)
from ldmcli.evaluation.result import EvaluationResult


def limited(result: EvaluationResult, rows: Any, count: int | str | None = None) -> int:
    """How many rows of a data set are read: `count`, "all", or (None) at most 10,000; all for the split `all`. Raises
    InputError for more than there are."""
    if isinstance(count, int):
        if count > len(rows):
            raise InputError(f"{rows.source} ({rows.split}): {len(rows)} rows, but --reference-count asks for {count}")
        return count
    if count == ALL or rows.split == ALL or len(rows) <= REFERENCE_LIMIT:
        return len(rows)
    result.warnings.append(
        f"reference: {REFERENCE_LIMIT:,} of {len(rows):,} rows, evenly spread; --reference-count all takes every one"
    )
    return REFERENCE_LIMIT


def reference_rows(
    instruments: Instruments, result: EvaluationResult, data: Any, split: str, size: tuple[int, int], model: Any
) -> tuple[Any, DataSettings]:
    """Rows of the data, and the settings by which they become pixels.

    Of a small folder the held-out part may be a single image, of which no distribution can be made.
    """
    settings = data if isinstance(data, DataSettings) else DataSettings(source=str(data))
    settings = replace(settings, size=(size[0], size[1]))
    rows, whole = open_reference(settings, split)
    if whole and len(rows) < 2 and needing(instruments.metrics, *OF_SETS):
        rows = open_reference(settings, "train")[0]
        result.warnings.append(
            f"{rows.source}: too few images are held out to measure against; its {len(rows)} training "
            "images are the reference, which a model may have learned by heart"
        )
    elif whole > len(rows):
        result.protocol["held_out"] = {"rows": len(rows), "of": whole}
        if model is None:
            result.warnings.append(
                f"reference: {len(rows):,} of {whole:,} rows ({100 * len(rows) / whole:.2g} %), those "
                "that a training would hold out; --split all takes the whole set"
            )
    for note in rows.notes:
        console.say_once(f"{rows.source}: {note}")
    return rows, settings


def set_reference(
    instruments: Instruments,
    result: EvaluationResult,
    rows: Any,
    settings: DataSettings | None,
    data: Any,
    count: int | str | None,
    named: bool,
) -> ImageStream | Statistics | None:
    """What sets are compared with: rows of a data set, images, or their statistics; None where no metric does that.

    count: as `limited`; of images in a file or folder, the first. named: whether people named the metrics. Raises
    InputError for named ones that need what a file of statistics does not hold, UsageError for a number of images that
    statistics are not of, and for statistics alone where several networks measure.
    """
    if data is None or not instruments.extractors:
        return None
    if rows is not None and settings is not None:
        return rows_source(rows, settings, evenly_spaced(len(rows), limited(result, rows, count)))
    n = count if isinstance(count, int) else None
    extractor, *others = instruments.extractors
    if others and not is_sample_set(Path(data)):
        raise UsageError(f"{data}: holds statistics of one network; name that one alone with --features")
    statistics = None if others else read_statistics(Path(data), extractor, n)
    if statistics is None:
        return _images_alone(instruments, result, data, n)
    lacking = sorted(needing(instruments.metrics, FEATURES))
    if lacking and named and statistics.rows is None and statistics.images is None:
        raise InputError(f"--metrics {lacking[0]}: needs the images of the reference; {data} has mu and sigma only")
    if n is not None and statistics.images is None:
        raise UsageError(f"--reference-count {n}: {data} holds statistics of {statistics.n or 'other'} images")
    return statistics


def without_features(
    instruments: Instruments, result: EvaluationResult, reference: ImageStream | Statistics | None
) -> Instruments:
    """Without the usual metrics that need features which this reference does not have; that is said."""
    lacking = needing(instruments.metrics, FEATURES)
    if not lacking or not isinstance(reference, Statistics):
        return instruments
    if reference.rows is not None or reference.images is not None:
        return instruments
    result.warnings.append(f"no {', '.join(lacking)}: {reference.source} has mu and sigma only, no images")
    return replace(instruments, metrics=tuple(name for name in instruments.metrics if name not in lacking))


def _images_alone(instruments: Instruments, result: EvaluationResult, data: Any, n: int | None) -> ImageStream:
    """The images of an .npz; where mean and covariance that do not serve lie beside them, that is said."""
    if has_moments(Path(data)):
        names = " and ".join(extractor.name for extractor in instruments.extractors)
        others = "of another network than" if len(instruments.extractors) == 1 else "not of all of"
        result.warnings.append(f"{data}: its mean and covariance are {others} {names}; its images are the reference")
    return open_images(data, n)
