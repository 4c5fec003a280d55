"""Metrics of images against a reference, with the protocol that gives each number its meaning.

The request is checked, everything that could be missing is opened, then streams of images are measured by the metrics
of the table (`metrics.py`). The result is one dict, `ldm eval-fid --json` prints it. Keys carry their extractor
(`fid_inception2048`, `fd_effnet_lite0`, `kid_effnet_lite0_mean`); `lookup` finds them by their short names.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ldmcli import __version__
from ldmcli.core import console, runs
from ldmcli.core.errors import InputError, UsageError
from ldmcli.core.settings import DataSettings
from ldmcli.evaluation.baselines import guided_sources, task_sources
from ldmcli.evaluation.compare import compare, lookup, read_result, with_comparison
from ldmcli.evaluation.condition_fidelity import ConditionedSamples
from ldmcli.evaluation.features import FeatureSet, default_features, open_extractor
from ldmcli.evaluation.image_streams import (
    ImageStream,
    check_count,
    evenly_spaced,
    first_size,
    loaded,
    model_source,
    open_images,
    paired_sources,
    reconstructions,
    rows_source,
    sampling_protocol,
    trained_size,
)
from ldmcli.evaluation.measure import (
    REFERENCE_LIMIT,
    Instruments,
    condition_metrics,
    measure_reference,
    measure_stream,
    paired,
    set_metrics,
    warn_of_lossy,
)
from ldmcli.evaluation.metrics import CONDITION, FEATURES, METRICS, OF_SETS, PERCEPTUAL, needing
from ldmcli.evaluation.reference_statistics import ALL, Statistics, open_reference, read_statistics
from ldmcli.evaluation.request import BATCH, EvaluationRequest, check, is_npz, no_progress, opened
from ldmcli.evaluation.result import EvaluationResult
from ldmcli.networks.perceptual import perceptual_net

__all__ = ["METRICS", "compare", "evaluate", "lookup"]

GENERATED_LIMIT = 1_000  # samples of a model where nobody says how many

Measured = tuple[FeatureSet, FeatureSet | Statistics | None]  # what is measured, and the reference


def evaluate(
    *,
    model=None,
    autoencoder=None,
    images=None,
    data=None,
    split: str = "validation",
    pairs=None,
    metrics: Sequence[str] | None = None,
    features: str | None = None,
    n: int | None = None,
    seed: int | None = 0,
    steps: int | None = None,
    guidance: float | None = None,
    sampler: str | None = None,
    temperature: float | None = None,
    batch_size: int | None = None,
    size: tuple[int, int] | None = None,
    perceptual: str = "",
    weights: str = "ema",
    guide_factor: int | None = None,
    compare: str | Path | dict | None = None,
    progress: Callable[[int, str], Any] | None = None,
) -> dict[str, Any]:
    """Metrics of exactly one of: a model's samples, an autoencoder's reconstructions, images, or pairs of images.

    model, autoencoder: a run folder or what `load` gave. images: a folder or .npz. pairs: two folders (or .npz).
    data: reference; `DataSettings`, a data set's name, an .npz of samples or of statistics (mu, sigma); None = the
    data that the model was trained on. metrics: of `METRICS`; None = fid, of pairs psnr and ssim, of an autoencoder
    and of models of task sr and inpaint all three. layout and map: of models conditioned on those. weights: "ema" or
    "raw", of a model named by its run. guide_factor: lead sample k to row k made this many times smaller and compare
    the two (Tab. 4); for models without a task. n: images to measure; None = all, of a model at most 1,000. compare: an
    earlier result.
    Raises UsageError for requests without sense and InputError for missing weights, images or captions,
    before anything is generated.
    """
    request = EvaluationRequest(**locals())
    started = time.monotonic()
    request = opened(request)
    check(request)
    earlier = read_result(compare)
    result = EvaluationResult()
    instruments = open_instruments(request, result)
    if isinstance(model, (str, Path)):
        result.protocol["weights"] = weights if request.model.config.train.ema else "raw"
    named = model if model is not None else autoencoder
    if isinstance(named, (str, Path)):
        result.protocol |= runs.step_document(Path(named))
    generated, reference = MEASURES[request.subject](request, instruments, result)
    document = report(instruments, result, generated, reference, time.monotonic() - started)
    return document if earlier is None else with_comparison(document, earlier)


def open_instruments(request: EvaluationRequest, result: EvaluationResult) -> Instruments:
    """Opens everything that could be missing, and warns of what makes numbers incomparable.

    Raises InputError for weights that are missing or damaged, UsageError for unknown names.
    """
    chosen = request.chosen
    extractor = open_extractor(request.features) if needing(chosen, *OF_SETS) else None
    perceptual = perceptual_net(request.perceptual) if needing(chosen, PERCEPTUAL) else None
    if extractor is not None and request.features is None and default_features() != "inception":
        result.warnings.append(
            f"{extractor.display}, not FID: Inception's weights are not here "
            "(--features inception gets them, or says where to put them)"
        )
    if extractor is not None and not extractor.known:
        result.warnings.append(
            f"weights of {extractor.name} are not known (SHA-256 {extractor.sha256[:12]}): "
            "numbers of others do not compare"
        )
    return Instruments(chosen, extractor, perceptual, request.progress or no_progress)


# --- who is measured against what ------------------------------------------------------------------------------


def pairs_of_images(request: EvaluationRequest, instruments: Instruments, result: EvaluationResult) -> Measured:
    """Two folders, or two .npz, image by image."""
    first, second = paired_sources(Path(request.pairs[0]), Path(request.pairs[1]), request.n)
    return paired(instruments, result, first, second)


def autoencoder_images(request: EvaluationRequest, instruments: Instruments, result: EvaluationResult) -> Measured:
    """An autoencoder's reconstructions against their originals."""
    autoencoder = loaded(request.autoencoder, "autoencoder")
    data, size = _own_data(autoencoder, request.data), request.size or trained_size(autoencoder)
    if is_npz(data):
        original = open_images(data, request.n)
    else:
        rows, settings = _rows(instruments, result, data, request.split, size, autoencoder)
        count = _limited(result, rows) if request.n is None else _count(rows, request.n)
        original = rows_source(rows, settings, evenly_spaced(len(rows), count))
    protocol = {
        **original.protocol,
        "autoencoder": autoencoder.fingerprint,
        "float_to_uint8": "clamp, round half to even",
        "latent": "mode of the posterior",
    }
    stream = reconstructions(autoencoder, original, request.batch_size or BATCH)
    made = replace(original, name="reconstructions", protocol=protocol, key="", stream=stream)
    return paired(instruments, result, made, original)


def _count(rows: Any, n: int) -> int:
    return check_count(len(rows), n, f"{rows.source} ({rows.split})")


def task(request: EvaluationRequest, instruments: Instruments, result: EvaluationResult) -> Measured:
    """A model's answers to degraded or masked rows, or its samples guided to small ones, against the rows themselves,
    and plain methods' beside them."""
    model, draw = request.model, request.draw
    size = request.size or trained_size(model)
    rows, settings = _rows(instruments, result, _own_data(model, request.data), request.split, size, model)
    count = min(len(rows), GENERATED_LIMIT) if request.n is None else _count(rows, request.n)
    ids = evenly_spaced(len(rows), count)
    truth = rows_source(rows, settings, ids)
    sources = task_sources if request.guide_factor is None else partial(guided_sources, factor=request.guide_factor)
    made, baselines, stated = sources(model, rows, ids, truth, size=size, **draw)
    measured = paired(instruments, result, made, truth)
    result.protocol |= {**stated, "sampling": sampling_protocol(model, draw)}
    if stated["task"] == "inpaint" and "biharmonic" not in baselines:
        result.warnings.append("no biharmonic filling beside it: install scikit-image for that")
    for name, stream in baselines.items():
        other = EvaluationResult()
        paired(instruments, other, stream, truth)
        for key, value in other.values.items():
            result.add(f"{key}_{name}", f"{other.labels[key]}, {name}", value)
    return measured


def unpaired(request: EvaluationRequest, instruments: Instruments, result: EvaluationResult) -> Measured:
    """Samples of a model, or given images, against a reference that need not have as many."""
    model, data = request.model, request.data
    if model is None:
        source = open_images(request.images, request.n)
        size = request.size or first_size(source)
    else:
        size, data = request.size or trained_size(model), _own_data(model, data)
    rows: Any = None
    settings = None
    if data is not None and not is_npz(data):
        rows, settings = _rows(instruments, result, data, request.split, size, model)
    if model is not None:
        n = request.n or (GENERATED_LIMIT if rows is None else min(len(rows), GENERATED_LIMIT))
        source = model_source(model, rows, n, size=size, **request.draw)
        result.protocol["sampling"] = sampling_protocol(model, request.draw)
    reference = _reference(instruments, result, rows, settings, data)
    generated, images = measure_stream(instruments, result, source)
    if needing(instruments.metrics, CONDITION):
        training, _ = _rows(instruments, result, data, "train", size, model)
        ids = evenly_spaced(len(rows), len(images))
        how = {"config": model.config, "size": size, "progress": instruments.progress}
        samples = ConditionedSamples(images=images, rows=rows, training=training, ids=ids, **how)
        condition_metrics(instruments, result, samples)
    result.protocol["generated"] = source.protocol
    warn_of_lossy(result, source, reference.lossy if isinstance(reference, ImageStream) else False)
    found = measure_reference(instruments, result, reference)
    set_metrics(instruments, result, generated, found)
    return generated, found


MEASURES: dict[str, Callable[[EvaluationRequest, Instruments, EvaluationResult], Measured]] = {
    "pairs": pairs_of_images,
    "autoencoder": autoencoder_images,
    "task": task,
    "model": unpaired,
    "images": unpaired,
}


# --- references ------------------------------------------------------------------------------------------------


def _limited(result: EvaluationResult, rows: Any) -> int:
    """How many rows of a data set are read where nobody says how many; all for the split `all`."""
    if rows.split == ALL or len(rows) <= REFERENCE_LIMIT:
        return len(rows)
    result.warnings.append(
        f"reference: {REFERENCE_LIMIT:,} of {len(rows):,} rows, evenly spread; --split all takes every row of the set"
    )
    return REFERENCE_LIMIT


def _own_data(run: Any, data: Any) -> Any:
    """The reference that was named, else the data that the run was trained on."""
    if data is None and run.config is None:
        raise UsageError("name the reference with --data: this model does not say what it was trained on")
    return run.config.data if data is None else data


def _rows(
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


def _reference(
    instruments: Instruments, result: EvaluationResult, rows: Any, settings: DataSettings | None, data: Any
) -> ImageStream | Statistics | None:
    """What sets are compared with: rows of a data set, images, or their statistics; None where no metric does that."""
    if data is None or instruments.extractor is None:
        return None
    if rows is not None and settings is not None:
        return rows_source(rows, settings, evenly_spaced(len(rows), _limited(result, rows)))
    statistics = read_statistics(Path(data), instruments.extractor)
    lacking = sorted(needing(instruments.metrics, FEATURES)) if statistics is not None else []
    if lacking:
        raise InputError(f"--metrics {lacking[0]}: needs the images of the reference; {data} has mu and sigma only")
    return statistics if statistics is not None else open_images(data)


# --- the result ------------------------------------------------------------------------------------------------


def report(
    instruments: Instruments,
    result: EvaluationResult,
    generated: FeatureSet,
    reference: FeatureSet | Statistics | None,
    seconds: float,
) -> dict[str, Any]:
    """The document that `ldm eval-fid --json` prints."""
    extractor = instruments.extractor
    count = reference.n if isinstance(reference, Statistics) else len(reference) if reference is not None else 0
    if isinstance(reference, Statistics):
        result.protocol["reference"] = {"source": reference.source, "statistics": "mu, sigma"}
    dim = extractor.dim if extractor else 0
    return {
        "metrics": result.values,
        "labels": result.labels,
        "frechet": extractor.metric_key if extractor and "fid" in instruments.metrics else None,
        "n_generated": len(generated),
        "n_reference": count,
        "reliable": len(generated) > dim and (count is None or count > dim or reference is None),
        "extractor": extractor.protocol if extractor else None,
        **result.protocol,
        "versions": {"ldm": __version__, "torch": torch.__version__, "numpy": np.__version__},
        "seconds": round(seconds, 2),
        "warnings": result.warnings,
    }
