"""What is measured against what: pairs, reconstructions, answers of models with a task, samples, images.

Each subject opens its streams on every process, which then share the work (`passes.py`); numbers of sets are rank 0's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ldmcli.core import console
from ldmcli.data.rows import evenly_spaced
from ldmcli.evaluation.baselines import guided_sources, task_sources
from ldmcli.evaluation.condition_fidelity import ConditionedSamples
from ldmcli.evaluation.features import FeatureSet
from ldmcli.evaluation.image_streams import (
    CodeCounts,
    ImageStream,
    check_count,
    first_size,
    model_source,
    open_images,
    paired_sources,
    reconstructions,
    rows_source,
    sampling_protocol,
    trained_size,
)
from ldmcli.evaluation.measure import (
    Instruments,
    condition_metrics,
    measure_reference,
    measure_stream,
    paired,
    set_metrics,
    share_groups,
    warn_of_lossy,
)
from ldmcli.evaluation.metrics import CODES, CONDITION, FEATURES, METRICS, NOVELTY, OF_SETS, STATISTICS, needing
from ldmcli.evaluation.novelty_request import novelty
from ldmcli.evaluation.protocols import differences, statement
from ldmcli.evaluation.reference_statistics import Statistics
from ldmcli.evaluation.references import limited, reference_rows, set_reference, without_features
from ldmcli.evaluation.request import BATCH, EvaluationRequest, given_conditions, is_npz, own_data
from ldmcli.evaluation.result import EvaluationResult
from ldmcli.sampling.machine import stated_precision

GENERATED_LIMIT = 1_000  # samples of a model where nobody says how many

Sets = Sequence[FeatureSet | Statistics]  # what each network found in the same images; empty without images
Measured = tuple[Sequence[FeatureSet], Sets]  # what is measured, and the reference


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


def pairs_of_images(request: EvaluationRequest, instruments: Instruments, result: EvaluationResult) -> Measured:
    """Two folders, or two .npz, image by image."""
    first, second = instruments.world.on_all_ranks(
        lambda: paired_sources(Path(request.pairs[0]), Path(request.pairs[1]), request.count)
    )
    return paired(instruments, result, first, second)


def autoencoder_images(request: EvaluationRequest, instruments: Instruments, result: EvaluationResult) -> Measured:
    """An autoencoder's reconstructions against their originals."""
    autoencoder, precision = request.autoencoder, stated_precision(request.autoencoder.precision)
    original = instruments.world.on_all_ranks(lambda: _originals(request, instruments, result))
    state_protocol(request, instruments, result, original.count, original.count)
    protocol = {
        **original.protocol,
        "autoencoder": autoencoder.fingerprint,
        "float_to_uint8": "clamp, round half to even",
        "latent": "mode of the posterior",
        **precision,
    }
    counts = CodeCounts(autoencoder) if needing(instruments.metrics, CODES) else None
    batch = request.batch_size or BATCH
    made = replace(
        original,
        name="reconstructions",
        protocol=protocol,
        key=original.key and ":".join([original.key, autoencoder.fingerprint, *precision.values()]),
        read=reconstructions(autoencoder, original, batch, counts),
        batch=batch,
        action="reconstructing",
    )
    measured = paired(instruments, result, made, original, counts=counts)
    for name in needing(instruments.metrics, CODES):
        result.add_scores(METRICS[name].compute(counts.found if counts else None), METRICS[name].labels(name))
    return measured


def _originals(request: EvaluationRequest, instruments: Instruments, result: EvaluationResult) -> ImageStream:
    """The images that an autoencoder reconstructs."""
    autoencoder = request.autoencoder
    data, size = own_data(autoencoder, request.data), request.size or trained_size(autoencoder)
    if is_npz(data):
        return open_images(data, request.count)
    rows, settings = reference_rows(instruments, result, data, request.split, size, autoencoder)
    count = limited(result, rows) if request.n is None else _count(rows, request.n)
    return rows_source(rows, settings, evenly_spaced(len(rows), count))


def _count(rows: Any, n: int | str) -> int:
    return len(rows) if isinstance(n, str) else check_count(len(rows), n, f"{rows.source} ({rows.split})")


def task(request: EvaluationRequest, instruments: Instruments, result: EvaluationResult) -> Measured:
    """A model's answers to degraded or masked rows, or its samples guided to small ones, against the rows themselves,
    and plain methods' beside them."""
    size = request.size or trained_size(request.model)
    truth, (made, baselines, stated) = instruments.world.on_all_ranks(
        lambda: _task_streams(request, instruments, result, size)
    )
    groups = share_groups(stated.pop("shares", ()))
    measured = paired(instruments, result, made, truth, groups)
    result.protocol |= {**stated, "sampling": sampling_protocol(request.model, request.draw)}
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


def _task_streams(
    request: EvaluationRequest, instruments: Instruments, result: EvaluationResult, size: tuple[int, int]
) -> tuple[ImageStream, Any]:
    """The true pictures, and what `task_sources` or `guided_sources` gives beside them."""
    model = request.model
    rows, settings = reference_rows(instruments, result, own_data(model, request.data), request.split, size, model)
    count = min(len(rows), GENERATED_LIMIT) if request.n is None else _count(rows, request.n)
    ids = evenly_spaced(len(rows), count)
    truth = rows_source(rows, settings, ids)
    sources: Callable[..., Any] = partial(task_sources, **request.filling)
    if request.guide_factor is not None:
        sources = partial(guided_sources, factor=request.guide_factor, guiding=request.guiding)
    state_protocol(request, instruments, result, count, len(rows))
    return truth, sources(model, rows, ids, truth, size=size, **request.draw)


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

    def source() -> ImageStream:
        data = own_data(request.model, request.data)
        rows, settings = reference_rows(of_sets, other, data, split, size, request.model)
        return rows_source(rows, settings, evenly_spaced(len(rows), limited(other, rows, request.reference_count)))

    streamed = request.reference_count is not None
    found = measure_reference(of_sets, other, instruments.world.on_all_ranks(source), streamed)
    set_metrics(of_sets, other, generated, found)
    result.take(other, f"_{split}", f", against {split}")
    result.protocol["also_reference"] = other.protocol["reference"]
    result.warnings += [f"{split}: {text}" for text in other.warnings]


@dataclass(frozen=True, kw_only=True)
class _Unpaired:
    """What is measured, and its reference. rows: the data set's, where it is one; data, size: what is in force."""

    source: ImageStream
    reference: ImageStream | Statistics | None
    rows: Any
    data: Any
    size: tuple[int, int]


def _unpaired_streams(request: EvaluationRequest, instruments: Instruments, result: EvaluationResult) -> _Unpaired:
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
    known = reference.count if isinstance(reference, ImageStream) else reference.n if reference is not None else None
    state_protocol(request, instruments, result, source.count, known)
    return _Unpaired(source=source, reference=reference, rows=rows, data=data, size=size)


def unpaired(request: EvaluationRequest, instruments: Instruments, result: EvaluationResult) -> Measured:
    """Samples of a model, or given images, against a reference that need not have as many."""
    of = instruments.world.on_all_ranks(lambda: _unpaired_streams(request, instruments, result))
    source, reference, rows, size = of.source, of.reference, of.rows, of.size
    instruments = without_features(instruments, result, reference)
    generated, images = measure_stream(instruments, result, source)
    if needing(instruments.metrics, CONDITION):
        training, _ = reference_rows(instruments, result, of.data, "train", size, request.model)
        ids = evenly_spaced(len(rows), len(images))
        how = {"config": request.model.config, "size": size, "progress": instruments.progress}
        samples = ConditionedSamples(images=images, rows=rows, training=training, ids=ids, **how)
        condition_metrics(instruments, result, samples)
    if needing(instruments.metrics, NOVELTY):
        instruments.world.on_rank_0(
            lambda: novelty(request, instruments, result, generated, images, source.names, size)
        )
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
