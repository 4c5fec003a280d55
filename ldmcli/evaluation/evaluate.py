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
from ldmcli.core.errors import UsageError
from ldmcli.core.settings import DataSettings
from ldmcli.evaluation.baselines import guided_sources, task_sources
from ldmcli.evaluation.compare import compare, lookup, read_result, with_comparison
from ldmcli.evaluation.condition_fidelity import ConditionedSamples
from ldmcli.evaluation.extractors import Extractor, default_features, open_extractor
from ldmcli.evaluation.features import FeatureSet
from ldmcli.evaluation.image_streams import (
    CodeCounts,
    ImageStream,
    check_count,
    evenly_spaced,
    first_size,
    model_source,
    open_images,
    paired_sources,
    reconstructions,
    rows_source,
    sampling_protocol,
    trained_size,
)
from ldmcli.evaluation.judges import Teacher, judges_among, trained_against
from ldmcli.evaluation.measure import (
    Instruments,
    condition_metrics,
    measure_reference,
    measure_stream,
    novelty_metrics,
    paired,
    set_metrics,
    share_groups,
    warn_of_lossy,
)
from ldmcli.evaluation.metrics import (
    CODES,
    CONDITION,
    FEATURES,
    METRICS,
    NOVELTY,
    OF_SETS,
    PERCEPTUAL,
    STATISTICS,
    needing,
)
from ldmcli.evaluation.novelty import NoveltySets
from ldmcli.evaluation.novelty_sheet import check_place, keep_novelty
from ldmcli.evaluation.protocols import applied, differences, statement
from ldmcli.evaluation.reference_statistics import Statistics, open_reference, write_statistics
from ldmcli.evaluation.references import limited, reference_rows, set_reference, without_features
from ldmcli.evaluation.request import (
    BATCH,
    EvaluationRequest,
    check,
    given_conditions,
    is_npz,
    no_progress,
    opened,
    own_data,
    with_row_settings,
)
from ldmcli.evaluation.result import SCHEMA, EvaluationResult
from ldmcli.networks.perceptual import perceptual_net

__all__ = ["METRICS", "compare", "evaluate", "lookup"]

STATED = ("step", "weights", "sampling")  # beside the nearest pairs in a run's folder
GENERATED_LIMIT = 1_000  # samples of a model where nobody says how many

Sets = Sequence[FeatureSet | Statistics]  # what each network found in the same images; empty without images
Measured = tuple[Sequence[FeatureSet], Sets]  # what is measured, and the reference


def evaluate(**arguments: Any) -> dict[str, Any]:
    """Metrics of exactly one of: a model's samples, an autoencoder's reconstructions, images, or pairs of images.

    arguments: the fields of `EvaluationRequest`, by name, which explains them. A list of models or autoencoders gives
    {"results": [a result each, with its name], "warnings": […]}, all against one reference. Raises UsageError for
    requests without sense and InputError for missing weights, images or captions, before anything is generated.
    """
    arguments = applied(arguments)
    several = next((name for name in ("model", "autoencoder") if isinstance(arguments.get(name), (list, tuple))), None)
    if several is None:
        return _measured(_ready(arguments), read_result(arguments.get("compare")), {})
    runs_given = list(dict.fromkeys(arguments[several]))
    if len(runs_given) < 2:
        return evaluate(**{**arguments, several: next(iter(runs_given), None)})
    return _measured_each(several, runs_given, arguments)


def _ready(arguments: dict[str, Any]) -> EvaluationRequest:
    """The request of the arguments, its model opened, checked."""
    request = opened(EvaluationRequest(**arguments))
    check(request)
    return with_row_settings(request)


def _measured(
    request: EvaluationRequest, earlier: dict | None, known: dict[str, tuple[FeatureSet, ...]]
) -> dict[str, Any]:
    """The document of a request. known: features of originals by the keys of their streams, which are added."""
    started = time.monotonic()
    result = EvaluationResult()
    instruments = replace(open_instruments(request, result), known=known)
    if request.name:
        if request.model is not None:
            result.protocol["weights"] = request.weights if request.model.config.train.ema else "raw"
        result.protocol |= runs.step_document(Path(request.name))
    if request.novelty_folder is not None:
        check_place(request.novelty_folder)
    generated, reference = MEASURES[request.subject](request, instruments, result)
    if request.save_statistics is not None:
        save_reference(request, instruments, result, reference)
    document = report(instruments, result, generated, reference, time.monotonic() - started)
    return document if earlier is None else with_comparison(document, earlier)


def state_protocol(
    request: EvaluationRequest, instruments: Instruments, result: EvaluationResult, n: int, rows: int | None
) -> None:
    """States the protocol of a request, before anything is generated, and says what it lacks where it lacks something.
    rows: of the reference, None where nobody knows how many."""
    if not request.protocol:
        return
    features = next((one.name for one in instruments.extractors[:1] if one.known), None)
    conditioned = bool(given_conditions(request))
    reasons = differences(request.protocol, request.differs, n=n, rows=rows, features=features, conditioned=conditioned)
    result.protocol["protocol"] = statement(request.protocol, reasons)
    if reasons:
        console.warn(f"not the protocol {request.protocol}, so without its name: {'; '.join(reasons)}")


def _measured_each(subject: str, measured: list[Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """A result for each of several runs, all against the first one's data where none are named."""
    for name in ("compare", "save_statistics"):
        if arguments.get(name) is not None:
            raise UsageError(f"--{name.replace('_', '-')}: is about one result; name one --{subject}")
    requests = [_ready({**arguments, subject: run}) for run in measured]
    first = getattr(requests[0], subject)
    data, size = own_data(first, arguments.get("data")), arguments.get("size")
    warnings = []
    if arguments.get("data") is None:
        warnings.append(f"no --data: the reference of all is what {requests[0].name or 'the first'} was trained on")
    sizes = {trained_size(getattr(request, subject)) for request in requests}
    if size is None and len(sizes) > 1:
        shown = ", ".join(f"{width}x{height}" for height, width in sorted(sizes))
        warnings.append(f"each is measured at its own size ({shown}), which do not compare; give all one with --size")
    metrics = arguments.get("metrics")
    if not metrics and subject == "autoencoder" and any(request.autoencoder.network.is_vq for request in requests):
        metrics = (*requests[0].chosen, "codebook")
    known: dict[str, tuple[FeatureSet, ...]] = {}
    found = [_measured(replace(request, data=data, metrics=metrics), None, known) for request in requests]
    named = [
        {"name": request.name or f"{subject} {k + 1}", **result}
        for k, (request, result) in enumerate(zip(requests, found))
    ]
    return {"schema": SCHEMA, "results": named, "warnings": warnings}


def save_reference(
    request: EvaluationRequest, instruments: Instruments, result: EvaluationResult, reference: Sets
) -> None:
    """Writes the reference's statistics where the request wants them. Raises UsageError where there are none."""
    if not reference or not instruments.extractors:
        raise UsageError("--save-statistics: nothing was measured against a reference")
    path = Path(str(request.save_statistics))
    write_statistics(path, reference[0], instruments.extractors[0], result.protocol.get("reference", {}))
    result.protocol["saved_statistics"] = str(path)


def open_instruments(request: EvaluationRequest, result: EvaluationResult) -> Instruments:
    """Opens everything that could be missing, and warns of what makes numbers incomparable.

    Raises InputError for weights that are missing or damaged, UsageError for unknown names.
    """
    chosen = request.chosen
    extractors = open_networks(request.networks) if needing(chosen, *OF_SETS, NOVELTY) else ()
    perceptual = perceptual_net(request.perceptual) if needing(chosen, PERCEPTUAL) else None
    if extractors and request.features is None and default_features() != "inception":
        result.warnings.append(
            f"{extractors[0].display}, not FID: Inception's weights are not here "
            "(--features inception gets them, or says where to put them)"
        )
    for extractor in extractors:
        if not extractor.known:
            result.warnings.append(
                f"weights of {extractor.name} are not known (SHA-256 {extractor.sha256[:12]}): "
                "numbers of others do not compare"
            )
    judges = judges_among(_teachers(request), extractors, perceptual) if extractors or perceptual is not None else []
    if judges:
        result.protocol["trained_against"] = [judge.document() for judge in judges]
        result.warnings += [judge.warning() for judge in judges]
    return Instruments(chosen, extractors, perceptual, request.progress or no_progress)


def _teachers(request: EvaluationRequest) -> list[Teacher]:
    """Networks that what is measured was trained against, or is led by."""
    run = request.model if request.model is not None else request.autoencoder
    led = request.guide_factor is not None and request.guiding.metric == "lpips" and request.guiding.scale
    by = [Teacher(**perceptual_net(request.perceptual).identity, where="--guide-metric")] if led else []
    return by + ([] if run is None else trained_against(run))


def _protocol_of(extractor: Extractor, result: EvaluationResult) -> dict[str, Any]:
    """The protocol of a network, with the settings by which what it measures was trained against it."""
    judged = result.protocol.get("trained_against", ())
    where = [entry["where"] for entry in judged if entry["judges"] == extractor.suffix]
    return extractor.protocol | ({"trained_against": where} if where else {})


def open_networks(names: Sequence[Any]) -> tuple[Extractor, ...]:
    """The extractors by these names (`open_extractor`), each once. Raises UsageError where numbers of two would stand
    under one key."""
    found = list({(one.name, one.sha256): one for one in map(open_extractor, names)}.values())
    for k, extractor in enumerate(found):
        if any(extractor.suffix == other.suffix for other in found[:k]):
            raise UsageError(
                f"--features: two networks whose numbers are called …_{extractor.suffix}; measure by one at a time"
            )
    return tuple(found)


# --- who is measured against what ------------------------------------------------------------------------------


def pairs_of_images(request: EvaluationRequest, instruments: Instruments, result: EvaluationResult) -> Measured:
    """Two folders, or two .npz, image by image."""
    first, second = paired_sources(Path(request.pairs[0]), Path(request.pairs[1]), request.count)
    return paired(instruments, result, first, second)


def autoencoder_images(request: EvaluationRequest, instruments: Instruments, result: EvaluationResult) -> Measured:
    """An autoencoder's reconstructions against their originals."""
    autoencoder = request.autoencoder
    data, size = own_data(autoencoder, request.data), request.size or trained_size(autoencoder)
    if is_npz(data):
        original = open_images(data, request.count)
    else:
        rows, settings = reference_rows(instruments, result, data, request.split, size, autoencoder)
        count = limited(result, rows) if request.n is None else _count(rows, request.n)
        original = rows_source(rows, settings, evenly_spaced(len(rows), count))
    state_protocol(request, instruments, result, original.count, original.count)
    protocol = {
        **original.protocol,
        "autoencoder": autoencoder.fingerprint,
        "float_to_uint8": "clamp, round half to even",
        "latent": "mode of the posterior",
    }
    counts = CodeCounts(autoencoder) if needing(instruments.metrics, CODES) else None
    stream = reconstructions(autoencoder, original, request.batch_size or BATCH, counts)
    made = replace(original, name="reconstructions", protocol=protocol, key="", stream=stream)
    measured = paired(instruments, result, made, original)
    for name in needing(instruments.metrics, CODES):
        result.add_scores(METRICS[name].compute(counts.found if counts else None), METRICS[name].labels(name))
    return measured


def _count(rows: Any, n: int | str) -> int:
    return len(rows) if isinstance(n, str) else check_count(len(rows), n, f"{rows.source} ({rows.split})")


def task(request: EvaluationRequest, instruments: Instruments, result: EvaluationResult) -> Measured:
    """A model's answers to degraded or masked rows, or its samples guided to small ones, against the rows themselves,
    and plain methods' beside them."""
    model, draw = request.model, request.draw
    size = request.size or trained_size(model)
    rows, settings = reference_rows(instruments, result, own_data(model, request.data), request.split, size, model)
    count = min(len(rows), GENERATED_LIMIT) if request.n is None else _count(rows, request.n)
    ids = evenly_spaced(len(rows), count)
    truth = rows_source(rows, settings, ids)
    sources: Callable[..., Any] = partial(task_sources, **request.filling)
    if request.guide_factor is not None:
        sources = partial(guided_sources, factor=request.guide_factor, guiding=request.guiding)
    state_protocol(request, instruments, result, count, len(rows))
    made, baselines, stated = sources(model, rows, ids, truth, size=size, **draw)
    groups = share_groups(stated.pop("shares", ()))
    measured = paired(instruments, result, made, truth, groups)
    result.protocol |= {**stated, "sampling": sampling_protocol(model, draw)}
    if stated["task"] == "inpaint" and "biharmonic" not in baselines:
        result.warnings.append("no biharmonic filling beside it: install scikit-image for that")
    for name, stream in baselines.items():
        other = EvaluationResult()
        paired(instruments, other, stream, truth, groups)
        result.take(other, f"_{name}", f", {name}")
        for group, found in other.groups.items():
            result.groups[group]["metrics"] |= {f"{key}_{name}": value for key, value in found["metrics"].items()}
    if request.also_split is not None:
        second_reference(request, instruments, result, measured[0], size)
    if result.groups:
        result.protocol["by_masked_share"] = result.groups
    return measured


def novelty(
    request: EvaluationRequest,
    instruments: Instruments,
    result: EvaluationResult,
    generated: Sequence[FeatureSet],
    images: Sequence[np.ndarray],
    size: tuple[int, int],
) -> None:
    """Adds what share of the samples copies the training rows of the data, and keeps the nearest pairs in the run's
    folder where the request wants it."""
    data = request.data if request.model is None else own_data(request.model, request.data)
    settings = replace(data if isinstance(data, DataSettings) else DataSettings(source=str(data)), size=size)
    training, held_out = (open_reference(settings, split)[0] for split in ("train", "validation"))
    sets = NoveltySets(
        images=images,
        features=generated,
        extractors=instruments.extractors,
        training=training,
        held_out=held_out,
        settings=settings,
        size=size,
        progress=instruments.progress,
    )
    found = novelty_metrics(instruments, result, sets)
    if found is not None and request.novelty_folder is not None:
        beside: dict[str, Any] = {key: value for key, value in result.protocol.items() if key in STATED}
        keep_novelty(request.novelty_folder, found, {**beside, "ldm_version": __version__})


def second_reference(
    request: EvaluationRequest,
    instruments: Instruments,
    result: EvaluationResult,
    generated: Sequence[FeatureSet],
    size: tuple[int, int],
) -> None:
    """Adds what sets have against the rows of another split (the second number of Tab. 4), with its name behind."""
    other, split = EvaluationResult(), str(request.also_split)
    of_sets = replace(instruments, metrics=tuple(instruments.needing(STATISTICS, FEATURES)))
    data = own_data(request.model, request.data)
    rows, settings = reference_rows(of_sets, other, data, split, size, request.model)
    ids = evenly_spaced(len(rows), limited(other, rows, request.reference_count))
    streamed = request.reference_count is not None
    found = measure_reference(of_sets, other, rows_source(rows, settings, ids), streamed)
    set_metrics(of_sets, other, generated, found)
    result.take(other, f"_{split}", f", against {split}")
    result.protocol["also_reference"] = other.protocol["reference"]
    result.warnings += [f"{split}: {text}" for text in other.warnings]


def unpaired(request: EvaluationRequest, instruments: Instruments, result: EvaluationResult) -> Measured:
    """Samples of a model, or given images, against a reference that need not have as many."""
    model, data = request.model, request.data
    if model is None:
        source = open_images(request.images, request.count)
        size = request.size or first_size(source)
    else:
        size, data = request.size or trained_size(model), own_data(model, data)
    rows: Any = None
    settings = None
    if data is not None and not is_npz(data):
        rows, settings = reference_rows(instruments, result, data, request.split, size, model)
    if model is not None:
        some = GENERATED_LIMIT if rows is None else min(len(rows), GENERATED_LIMIT)
        n = (some if rows is None else len(rows)) if isinstance(request.n, str) else request.n or some
        led = {"classifier": request.classifier, "classifier_scale": request.classifier_scale}
        source = model_source(model, rows, n, size=size, balanced=request.balanced, **request.draw, **led)
        result.protocol["sampling"] = sampling_protocol(model, request.draw)
    count, named = request.reference_count, bool(request.metrics)
    reference = None
    if needing(instruments.metrics, *OF_SETS):
        reference = set_reference(instruments, result, rows, settings, data, count, named)
        instruments = without_features(instruments, result, reference)
    known = reference.count if isinstance(reference, ImageStream) else reference.n if reference is not None else None
    state_protocol(request, instruments, result, source.count, known)
    generated, images = measure_stream(instruments, result, source)
    if needing(instruments.metrics, CONDITION):
        training, _ = reference_rows(instruments, result, data, "train", size, model)
        ids = evenly_spaced(len(rows), len(images))
        how = {"config": model.config, "size": size, "progress": instruments.progress}
        samples = ConditionedSamples(images=images, rows=rows, training=training, ids=ids, **how)
        condition_metrics(instruments, result, samples)
    if needing(instruments.metrics, NOVELTY):
        novelty(request, instruments, result, generated, images, size)
    result.protocol["generated"] = source.protocol
    warn_of_lossy(result, source, reference.lossy if isinstance(reference, ImageStream) else False)
    save = request.save_statistics is not None
    streamed = save or request.reference_count is not None
    found = measure_reference(instruments, result, reference, streamed, save)
    if needing(instruments.metrics, *OF_SETS):
        set_metrics(instruments, result, generated, found)
    return generated, found


MEASURES: dict[str, Callable[[EvaluationRequest, Instruments, EvaluationResult], Measured]] = {
    "pairs": pairs_of_images,
    "autoencoder": autoencoder_images,
    "task": task,
    "model": unpaired,
    "images": unpaired,
}


# --- the result ------------------------------------------------------------------------------------------------


def report(
    instruments: Instruments, result: EvaluationResult, generated: Sequence[FeatureSet], reference: Sets, seconds: float
) -> dict[str, Any]:
    """The document that `ldm eval-fid --json` prints. Of several networks the first one's distance is that of
    `frechet`, `extractor` and `reliable`."""
    extractor = next(iter(instruments.extractors), None)
    real = next(iter(reference), None)
    count = real.n if isinstance(real, Statistics) else len(real) if real is not None else 0
    n, dim = len(generated[0]), extractor.dim if extractor else 0
    protocols = [_protocol_of(one, result) for one in instruments.extractors]
    return {
        "schema": SCHEMA,
        "metrics": result.values,
        "labels": result.labels,
        **({"estimates": result.estimates} if result.estimates else {}),
        "frechet": extractor.metric_key if extractor and "fid" in instruments.metrics else None,
        "n_generated": n,
        "n_reference": count,
        "reliable": n > dim and (count is None or count > dim or real is None),
        "extractor": protocols[0] if protocols else None,
        "extractors": protocols,
        **result.protocol,
        **({"of_each": result.of_each} if result.of_each else {}),
        "versions": {"ldm": __version__, "torch": torch.__version__, "numpy": np.__version__},
        "seconds": round(seconds, 2),
        "warnings": result.warnings,
    }
