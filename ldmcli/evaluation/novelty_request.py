"""Copies among the samples of an evaluation: what they are compared with, and where the nearest pairs are kept."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ldmcli import __version__
from ldmcli.core import runs
from ldmcli.core.settings import DataSettings
from ldmcli.evaluation.features import FeatureSet
from ldmcli.evaluation.measure import Instruments, novelty_metrics
from ldmcli.evaluation.novelty import NoveltySets
from ldmcli.evaluation.novelty_sheet import keep_novelty
from ldmcli.evaluation.reference_statistics import open_reference
from ldmcli.evaluation.request import EvaluationRequest, own_data
from ldmcli.evaluation.result import EvaluationResult

STATED = ("step", "weights", "sampling")  # beside the nearest pairs in a run's folder


def novelty(
    request: EvaluationRequest,
    instruments: Instruments,
    result: EvaluationResult,
    generated: Sequence[FeatureSet],
    images: Sequence[np.ndarray],
    names: Sequence[str],
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
        names=names,
    )
    if request.name and training.fingerprint != trained_on(Path(request.name), training.fingerprint):
        result.warnings.append(
            f"novelty: {training.source} has other training rows now than those that {request.name} was trained on; "
            "name these with --data"
        )
    found = novelty_metrics(instruments, result, sets)
    if found is not None and request.novelty_folder is not None:
        beside: dict[str, Any] = {key: value for key, value in result.protocol.items() if key in STATED}
        keep_novelty(request.novelty_folder, found, {**beside, "ldm_version": __version__})


def trained_on(run: Path, otherwise: str) -> str:
    """Fingerprint of the rows that a run was trained on; `otherwise` where it does not say."""
    folder = runs.locate(run)[0]
    data = runs.RunFolder(folder).state().get("data") if folder.is_dir() else None
    return str((data or {}).get("fingerprint") or otherwise)
