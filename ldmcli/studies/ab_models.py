"""Pictures of models for a page of `ldm ab`: equal rows, conditions and seeds for both, in folders beside the page."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldmcli.conditions import CONDITIONS, outputs
from ldmcli.conditions.pictures import holed
from ldmcli.core import box, console
from ldmcli.core.errors import InputError, UsageError
from ldmcli.core.runs import is_run
from ldmcli.core.settings import TASK_CONDITIONS, DataSettings
from ldmcli.data.rows import evenly_spaced
from ldmcli.evaluation.baselines import task_of
from ldmcli.evaluation.image_streams import check_columns, condition_source, loaded, trained_size
from ldmcli.evaluation.reference_statistics import open_reference
from ldmcli.sampling.api import LoadedDiffusion
from ldmcli.sampling.contact_sheets import in_rows
from ldmcli.sampling.draw import Draw, draw_images
from ldmcli.sampling.image_folder import ImageFolder, in_batches
from ldmcli.sampling.inpainting import inpaint_images
from ldmcli.sampling.super_resolution import upscale_images
from ldmcli.studies.ab import MOST, Item, items_of_folders

Make = Callable[[Sequence[int]], Sequence[np.ndarray]]  # numbers of subjects to uint8 (H, W, 3) pictures
BATCH = 8
MODEL_FILES = ("model_index.json", "config.json")  # of diffusers folders
CHECKPOINTS = (".ckpt", ".safetensors")


def is_model(path: Path) -> bool:
    """Whether a model lies at a path, rather than a folder of images: a run (also RUN@STEP), what others wrote."""
    run = Path(str(path).rpartition("@")[0] or path)
    if box.is_meant(path) or is_run(path) or is_run(run) or path.suffix.lower() in CHECKPOINTS:
        return True
    return any((path / name).is_file() for name in MODEL_FILES)


@dataclass(frozen=True)
class Subjects:
    """What both models are given. ids: rows; truth: whether their pictures are shown."""

    rows: Any
    ids: Sequence[int]
    size: tuple[int, int]
    seed: int
    settings: Mapping[str, Any]
    task: str
    batch_size: int
    overwrite: bool


def items_of_models(
    sources: Mapping[str, Path],
    folder: Path,
    *,
    truth: Path | None = None,
    rows_as_truth: bool = False,
    data: DataSettings | None = None,
    split: str = "validation",
    n: int | None = None,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    batch_size: int | None = None,
    overwrite: bool = False,
) -> list[Item]:
    """Items of which at least one side is a model's. sources: a model or a folder of images for "a" and "b".

    Sample k of each model has noise of (seed, k) and is conditioned on the same held-out row; of tasks sr and inpaint
    both are given the same small or masked picture. A folder's pictures must be called as samples are: 000000.png, ….
    data: rows, None = those that the first model was trained on. Raises UsageError for models of different tasks.
    """
    models = {side: loaded(path, "diffusion") for side, path in sources.items() if is_model(path)}
    first = next(iter(models.values()))
    for side, model in models.items():
        if task_of(model) != task_of(first) or model.config.task.scale != first.config.task.scale:
            raise UsageError(
                f"{sources[side]}: of another task or scale than the other model; they answer alike pictures"
            )
    needs_rows = rows_as_truth or any(model.conditions.kinds for model in models.values())
    subjects = _subjects(first, needs_rows, data, split, n, seed, dict(settings or {}), batch_size or BATCH, overwrite)
    folders = dict(sources)
    for side, model in models.items():
        console.say(f"{side}: {len(subjects.ids)} samples of {sources[side]}")
        folders[side] = folder / side
        _write(folders[side], subjects, model.fingerprint, answers(model, first, subjects))
    if rows_as_truth:
        truth = folder / "truth"
        _write(truth, subjects, "rows", lambda ids: [_true_pixels(subjects, subjects.ids[k]) for k in ids])
    given = _given(first, folder / "given", subjects)
    items = items_of_folders(folders["a"], folders["b"], truth, n=len(subjects.ids), seed=seed)
    return [replace(item, given=one) for item, one in zip(items, given)]


def _subjects(model, needs_rows, data, split, n, seed, settings, batch_size, overwrite) -> Subjects:
    size, rows, count = trained_size(model), None, n or MOST
    if needs_rows:
        rows, _ = open_reference(replace(data or model.config.data, size=size), split)
        check_columns(rows, tuple(model.conditions.kinds), model.config.data)
        if n is not None and n > len(rows):
            raise InputError(f"-n {n}: {rows.source} ({rows.split}) has {len(rows)} rows")
        count = min(count, len(rows))
    ids = evenly_spaced(len(rows), count) if rows is not None else list(range(count))
    return Subjects(rows, ids, size, seed, settings, task_of(model), batch_size, overwrite)


def _true_pixels(subjects: Subjects, row: int) -> np.ndarray:
    return subjects.rows.pixels(row, subjects.size, "center", (0.5, 0.5))


def answers(model: LoadedDiffusion, first: LoadedDiffusion, subjects: Subjects) -> Make:
    """A function of numbers of subjects to the model's uint8 (H, W, 3) pictures. What a task gives is made as the
    model `first` was trained."""
    if subjects.rows is None:
        return lambda ids: list(draw_images(model, Draw(ids=ids, seed=subjects.seed, settings=subjects.settings)))
    own, given = (condition_source(one, subjects.rows, subjects.size, subjects.seed) for one in (model, first))
    tasks = TASK_CONDITIONS.values()

    def make(ids: Sequence[int]) -> Sequence[np.ndarray]:
        rows = [subjects.ids[k] for k in ids]
        values = {name: own.foreign_values(name, rows) for name in model.conditions.kinds if name not in tasks}
        shared: dict[str, Any] = {"seed": subjects.seed, "ids": ids, "values": values}
        if subjects.task == "generate":
            return list(draw_images(model, Draw(**shared, size=subjects.size, settings=subjects.settings)))
        shown = given.values(TASK_CONDITIONS[subjects.task], rows, rows)
        if subjects.task == "sr":
            return list(upscale_images(model, np.stack(shown), **shared, **subjects.settings))
        images, holes = (np.stack(part) for part in zip(*shown))
        filled = inpaint_images(model, images, holes, **shared, **subjects.settings)
        return list(np.where(holes[..., None], filled, images))

    return make


def _given(model: LoadedDiffusion, folder: Path, subjects: Subjects) -> list[Path | str | None]:
    """What raters see between two pictures: the small or masked picture, the map or boxes, a caption, a class."""
    kinds = tuple(model.conditions.kinds)
    if not kinds:
        return [None] * len(subjects.ids)
    dataset = condition_source(model, subjects.rows, subjects.size, subjects.seed)
    spatial = outputs.spatial(kinds)

    def texts(name: str) -> list[str]:
        names = model.conditions.conditioners[name].names
        return [CONDITIONS[name].described(value, names) for value in dataset.foreign_values(name, subjects.ids)]

    def pictures(ids: Sequence[int]) -> list[np.ndarray]:
        rows = [subjects.ids[k] for k in ids]
        if subjects.task != "generate":
            shown = dataset.values(TASK_CONDITIONS[subjects.task], rows, rows)
            return shown if subjects.task == "sr" else [holed(*one) for one in shown]
        values = dataset.foreign_values(spatial[0], rows)
        return [outputs.picture(spatial[0], value, subjects.size, model.conditions) for value in values]

    if subjects.task == "generate" and not spatial:
        return [", ".join(parts) for parts in zip(*(texts(name) for name in kinds))]
    return list(_write(folder, subjects, f"given to {model.fingerprint}", pictures))


def _write(folder: Path, subjects: Subjects, model: str, make: Make) -> list[Path]:
    """Pictures 000000.png … of all subjects in a folder, those that are missing; returns their paths."""
    request = {
        "model": model,
        "command": "ab",
        "total": len(subjects.ids),
        "format": "png",
        "seed": subjects.seed,
        "size": list(subjects.size),
        "settings": {name: str(value) for name, value in subjects.settings.items()},
        "rows": None if subjects.rows is None else subjects.rows.fingerprint,
    }
    results = ImageFolder(folder, request, overwrite=subjects.overwrite)
    results.write(
        in_batches(results.todo, subjects.batch_size),
        lambda ids: ((Image.fromarray(picture), {}) for picture in make(ids)),
        None,
        lambda: in_rows([np.asarray(Image.open(name).convert("RGB")) for name in results.names[:64]]),
        action=folder.name,
    )
    return results.names
