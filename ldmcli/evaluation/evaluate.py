"""Metrics of images against a reference, with the protocol that gives each number its meaning.

The request is checked, everything that could be missing is opened, then streams of images are measured by the metrics
of the table (`metrics.py`). The result is one dict, `ldm eval-fid --json` prints it. Keys carry their extractor
(`fid_inception2048`, `fd_effnet_lite0`, `kid_effnet_lite0_mean`); `lookup` finds them by their short names.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ldmcli import __version__
from ldmcli.core import console, runs
from ldmcli.core.errors import UsageError
from ldmcli.core.world import World
from ldmcli.evaluation.compare import compare, lookup, read_result, with_comparison
from ldmcli.evaluation.extractors import Extractor, default_features, measuring_device, open_extractor
from ldmcli.evaluation.features import FeatureSet
from ldmcli.evaluation.image_streams import trained_size
from ldmcli.evaluation.judges import Teacher, judges_among, trained_against
from ldmcli.evaluation.measure import Instruments
from ldmcli.evaluation.metrics import METRICS, NOVELTY, OF_SETS, PERCEPTUAL, needing
from ldmcli.evaluation.novelty_sheet import check_place
from ldmcli.evaluation.protocols import applied
from ldmcli.evaluation.reference_statistics import Statistics, write_statistics
from ldmcli.evaluation.request import EvaluationRequest, check, no_progress, opened, own_data, with_row_settings
from ldmcli.evaluation.result import SCHEMA, EvaluationResult
from ldmcli.evaluation.subjects import MEASURES, Sets
from ldmcli.networks.perceptual import perceptual_net

__all__ = ["METRICS", "compare", "evaluate", "lookup"]


def evaluate(**arguments: Any) -> dict[str, Any]:
    """Metrics of exactly one of: a model's samples, an autoencoder's reconstructions, images, or pairs of images.

    arguments: the fields of `EvaluationRequest`, by name, which explains them. A list of models or autoencoders gives
    {"results": [a result each, with its name], "warnings": […]}, all against one reference. Raises UsageError for
    requests without sense and InputError for missing weights, images or captions, before anything is generated.
    """
    world = arguments.get("world") or World()
    arguments = applied(arguments)
    several = next((name for name in ("model", "autoencoder") if isinstance(arguments.get(name), (list, tuple))), None)
    if several is None:
        request, earlier = world.on_all_ranks(lambda: (_ready(arguments), read_result(arguments.get("compare"))))
        return _measured(request, earlier, {})
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
    world = request.world or World()
    instruments = replace(world.on_all_ranks(lambda: open_instruments(request, result)), known=known, world=world)
    if request.name:
        if request.model is not None:
            result.protocol["weights"] = request.weights if request.model.config.train.ema else "raw"
        result.protocol |= runs.step_document(Path(request.name))
    if (run := request.model if request.model is not None else request.autoencoder) is not None:
        result.protocol["precision"] = run.precision
    if request.novelty_folder is not None:
        check_place(request.novelty_folder)
    generated, reference = MEASURES[request.subject](request, instruments, result)

    def finished() -> dict[str, Any]:
        if request.save_statistics is not None:
            save_reference(request, instruments, result, reference)
        document = report(instruments, result, generated, reference, time.monotonic() - started)
        return document if earlier is None else with_comparison(document, earlier)

    document = world.on_rank_0(finished)
    for store in instruments.stores:
        store.remove()
    say_throughput(document)
    return document


def say_throughput(document: dict[str, Any]) -> None:
    """One line about how fast each stage was."""
    found = document["throughput"]
    stages = [
        f"{name} {one['images_per_s']:,.{0 if one['images_per_s'] >= 10 else 2}f} images/s ({one['seconds']:.1f} s)"
        if one["images_per_s"]
        else f"{name} {one['seconds']:.1f} s"
        for name, one in found["stages"].items()
    ]
    processes = f"{found['processes']} processes: " if found["processes"] > 1 else ""
    console.say(f"{processes}{', '.join(stages)}, in all {document['seconds']:.1f} s")


def _measured_each(subject: str, measured: list[Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """A result for each of several runs, all against the first one's data where none are named."""
    for name in ("compare", "save_statistics"):
        if arguments.get(name) is not None:
            raise UsageError(f"--{name.replace('_', '-')}: is about one result; name one --{subject}")
    world = arguments.get("world") or World()
    requests = world.on_all_ranks(lambda: [_ready({**arguments, subject: run}) for run in measured])
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
    perceptual = perceptual_net(request.perceptual).to(measuring_device()) if needing(chosen, PERCEPTUAL) else None
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
        "throughput": instruments.tally.document(instruments.world.world_size),
        "versions": {"ldm": __version__, "torch": torch.__version__, "numpy": np.__version__},
        "seconds": round(seconds, 2),
        "warnings": result.warnings,
    }
