"""The nearest training pictures of samples, in the features of a network (the paper's Figs. 32 to 34: VGG-16).

Whether a model repeats what it was trained on shows in the distances: beside those of samples stand those of held-out
pictures, which no model has seen. Training pictures are read in blocks, so memory does not grow with their number.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ldmcli import __version__
from ldmcli.conditions.pictures import labelled
from ldmcli.core import console, files
from ldmcli.core.errors import InputError, UsageError
from ldmcli.core.outputs import refuse_foreign, refuse_foreign_document
from ldmcli.core.runs import folder_for_results
from ldmcli.core.settings import DataSettings
from ldmcli.data.rows import evenly_spaced
from ldmcli.evaluation.baselines import task_of
from ldmcli.evaluation.extractors import Extractor, open_extractor
from ldmcli.evaluation.features import content_hash, in_blocks
from ldmcli.evaluation.image_streams import (
    ImageStream,
    first_size,
    loaded,
    model_source,
    open_images,
    sampling_protocol,
    trained_size,
)
from ldmcli.evaluation.reference_statistics import open_reference
from ldmcli.maths.nearest import Nearest
from ldmcli.reports.report import write_pages
from ldmcli.sampling.contact_sheets import grid, png_bytes

KIND = "ldm neighbours"
SHEET, DOCUMENT = "neighbours.png", "neighbours.json"
HELD_OUT = 200  # pictures that no model has seen, for comparison
QUANTILES = {"least": 0.0, "q05": 0.05, "median": 0.5, "q95": 0.95}
BLOCK = 64  # training pictures compared at a time
BATCH = 8


def quantiles(distances: np.ndarray) -> dict[str, float]:
    """What is shown of distances (n,)."""
    return {name: float(np.quantile(distances, share)) for name, share in QUANTILES.items()}


def closer_share(samples: np.ndarray, held_out: np.ndarray) -> float:
    """Share of samples that are nearer to a training picture than 95 % of held-out pictures are: about 0.05 for a model
    that draws from the distribution and repeats nothing, 1 for one that repeats pictures."""
    return float((samples < np.quantile(held_out, 0.05)).mean())


def find_neighbours(
    *,
    model: str | None = None,
    images: Path | None = None,
    data: DataSettings | None = None,
    n: int = 8,
    k: int = 10,
    features: str | None = None,
    seed: int = 0,
    settings: dict[str, Any] | None = None,
    batch_size: int | None = None,
    weights: str = "ema",
    progress: Callable[[int, str], Any] = console.progress,
) -> tuple[dict[str, Any], np.ndarray]:
    """(document, sheet) of n samples of a model, or of the first n pictures of a folder, and their k nearest training
    pictures. The sheet is uint8 (H, W, 3): a sample, then its neighbours with their distances, a row each.

    data: where the training pictures are; None = what the model was trained on. features: as for `eval-fid`. Raises
    UsageError for a model that edits pictures, InputError where there are fewer than k training pictures.
    """
    extractor = open_extractor(features)
    network = loaded(model, "diffusion", weights) if model is not None else None
    if network is not None and task_of(network) != "generate":
        raise UsageError(f"{model}: a model for {task_of(network)}, which starts from a picture; use --images")
    source = open_images(images, None) if images is not None else None
    size = first_size(source) if source is not None else trained_size(network)
    own = data or (network.config.data if network is not None and network.config is not None else None)
    if own is None:
        raise UsageError("--data: say which pictures the model was trained on")
    own = replace(own, size=size)
    training, held_out = open_reference(own, "train")[0], open_reference(own, "validation")[0]
    if len(training) < k:
        raise InputError(f"-k {k}: {training.source} ({training.split}) has {len(training)} pictures")
    drawn: dict[str, Any] = {"seed": seed, "settings": dict(settings or {})}
    if source is None:
        source = model_source(network, held_out, n, size=size, batch_size=batch_size or BATCH, **drawn)
    shown = _taken(source, n)
    control = evenly_spaced(len(held_out), min(HELD_OUT, len(held_out)))
    with progress(len(training) + len(control), "features") as bar:
        queries = extractor.features(shown)
        unseen = _features(extractor, (_pixels(held_out, i, size) for i in control), bar)
        nearest = Nearest(np.concatenate([queries, *unseen]), k)
        hashes: set[str] = set()
        for first, block in _blocks(training, size, hashes):
            nearest.add(np.arange(first, first + len(block)), extractor.features(block))
            bar.advance(len(block))
    document = _document(nearest, shown, hashes, training)
    document |= {
        "k": k,
        "data": {"source": training.source, "split": training.split, "fingerprint": training.fingerprint},
        "extractor": extractor.protocol,
        "generated": source.protocol,
        "ldm_version": __version__,
    }
    if network is not None:
        document |= {"model": str(model), "sampling": sampling_protocol(network, drawn)}
    return document, _sheet(shown, nearest, training, size)


def _taken(source: ImageStream, n: int) -> list[np.ndarray]:
    stream = source.stream()
    return [image for image, _ in zip(stream, range(min(n, source.count)))]


def _pixels(rows: Any, i: int, size: tuple[int, int]) -> np.ndarray:
    return rows.pixels(i, size, "center", (0.5, 0.5))


def _blocks(rows: Any, size: tuple[int, int], hashes: set[str]) -> Iterator[tuple[int, list[np.ndarray]]]:
    """(number of the first, pictures) of all rows; their content hashes are added to `hashes`."""
    for first, block in enumerate(in_blocks((_pixels(rows, i, size) for i in range(len(rows))), BLOCK)):
        hashes |= {content_hash(image) for image in block}
        yield first * BLOCK, block


def _features(extractor: Extractor, stream: Iterable[np.ndarray], bar: Any) -> list[np.ndarray]:
    found = []
    for block in in_blocks(stream, BLOCK):
        found.append(extractor.features(block))
        bar.advance(len(block))
    return found


def _document(nearest: Nearest, shown: list[np.ndarray], hashes: set[str], training: Any) -> dict[str, Any]:
    own, unseen = nearest.distances[: len(shown), 0], nearest.distances[len(shown) :, 0]
    pairs = zip(nearest.numbers[: len(shown)].tolist(), nearest.distances[: len(shown)].tolist())
    return {
        "kind": KIND,
        "samples": [
            [{"row": row, "name": training.name(row), "distance": distance} for row, distance in zip(*pair)]
            for pair in pairs
        ],
        "nearest": {"samples": quantiles(own), "held_out": quantiles(unseen) if len(unseen) else None},
        "n": len(own),
        "n_held_out": len(unseen),
        "n_training": len(training),
        "closer_than_held_out": closer_share(own, unseen) if len(unseen) else None,
        "copies": sum(content_hash(image) in hashes for image in shown),
    }


def _sheet(shown: list[np.ndarray], nearest: Nearest, training: Any, size: tuple[int, int]) -> np.ndarray:
    rows = []
    for k, image in enumerate(shown):
        cells = [labelled(_fitted(image, size), f"sample {k}")]
        for row, distance in zip(nearest.numbers[k], nearest.distances[k]):
            cells.append(labelled(_pixels(training, int(row), size), f"{distance:.3g}"))
        rows.append(cells)
    return grid(rows)


def _fitted(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Pictures of a folder may have sizes of their own; on the sheet all have one."""
    if image.shape[:2] == size:
        return image
    from PIL import Image

    return np.asarray(Image.fromarray(image).resize(size[::-1]))


# --- the command ------------------------------------------------------------------------------------------------------


def neighbours_to_folder(out: Path | None, default: Path, **request: Any) -> dict[str, Any]:
    """`find_neighbours` as neighbours.png and neighbours.json, and what --json prints. out: None = neighbours/ in the
    model's run, whose report and card are written again, or `default` where there is no run."""
    run = folder_for_results(request["model"]) if out is None and request.get("model") else None
    folder = out or (run / "neighbours" if run is not None else default)
    refuse_foreign([folder / SHEET])
    refuse_foreign_document(folder / DOCUMENT, KIND)
    document, sheet = find_neighbours(**request)
    files.write_bytes(folder / SHEET, png_bytes(sheet))
    files.write_json(folder / DOCUMENT, document)
    if run is not None:
        write_pages(run)
    return {"out": str(folder), "sheet": str(folder / SHEET), **document}
