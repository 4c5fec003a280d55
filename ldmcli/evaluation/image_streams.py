"""Where the images of an evaluation come from: streams of uint8 (H, W, 3) arrays, and what is to be said of them."""

import hashlib
import json
import pickle
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ldmcli.conditions import CONDITIONS
from ldmcli.conditions.class_ import Class
from ldmcli.conditions.dataset import ConditionDataset
from ldmcli.conditions.parse import arguments_of
from ldmcli.core.errors import InputError, UsageError
from ldmcli.core.files import sha256_file
from ldmcli.core.settings import DataSettings
from ldmcli.data import pictures
from ldmcli.data.cache import cache_key
from ldmcli.data.decode import decode
from ldmcli.data.pictures import by_pair_name, pair_name
from ldmcli.data.rows import evenly_spaced
from ldmcli.diffusion.sample import Guide
from ldmcli.diffusion.samplers import takes_eta
from ldmcli.maths.pixels import tensor_to_pixels
from ldmcli.sampling.classifier import ClassGuidance, LoadedClassifier, class_guidance
from ldmcli.sampling.draw import Draw, draw_images
from ldmcli.sampling.load import load
from ldmcli.sampling.machine import stated_precision
from ldmcli.sampling.request import SAMPLING, stated_distillation

LOSSY = (".jpg", ".jpeg")


@dataclass(frozen=True, kw_only=True)
class ImageStream:
    """Images that are read when they are asked for.

    read: gives the images of rising ranges of positions, in their order. key: names their content as far as it is known
    ahead, else ""; content: names what `key` leaves open, of a range. place: names where images lie that have no key.
    batch: images that are made at a time. action: what their reading is, "reading" or "sampling". protocol: where they
    come from and how they were made, JSON.
    """

    name: str
    count: int
    read: Callable[[Sequence[range]], Iterator[np.ndarray]]
    protocol: dict[str, Any] = field(default_factory=dict)
    lossy: bool = False
    key: str = ""
    names: Sequence[str] = ()  # of the images, where they are files
    content: Callable[[range], str] | None = None
    place: str = ""
    batch: int = 1
    action: str = "reading"

    def stream(self) -> Iterator[np.ndarray]:
        """All images from the beginning."""
        return self.read([range(self.count)])


def positions(blocks: Sequence[range]) -> Iterator[int]:
    """The positions of all blocks, one after the other."""
    return (k for block in blocks for k in block)


def check_count(count: int, n: int | None, what: str) -> int:
    """How many of `count` images are used: n, or all. Raises InputError where there are fewer than n."""
    if n is not None and n > count:
        raise InputError(f"{what}: {count} images, but -n asks for {n}")
    return count if n is None else n


# --- folders and files -----------------------------------------------------------------------------------------


def image_files(folder: Path, besides: Sequence[Path] = ()) -> list[Path]:
    """Pictures below `folder` in order of relative path without extension; `besides`: as for `data.pictures.find`."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder of images")
    found = pictures.image_files([folder], besides=besides)
    return sorted(found, key=lambda path: (pair_name(folder, path), path.suffix))


def read_image(path: Path) -> np.ndarray:
    """uint8 (H, W, 3), upright, transparency on white. Raises InputError, naming the file."""
    return np.array(decode(path))


def folder_source(folder: Path, n: int | None = None, besides: Sequence[Path] = ()) -> ImageStream:
    """Images of a folder at their own sizes."""
    files = image_files(folder, besides)
    files = files[: check_count(len(files), n, str(folder))]
    lossy = any(path.suffix.lower() in LOSSY for path in files)
    return ImageStream(
        name=str(folder),
        count=len(files),
        read=lambda blocks: (read_image(files[k]) for k in positions(blocks)),
        protocol={"source": str(folder), "resize": "none"},
        lossy=lossy,
        content=lambda block: cache_key(*(sha256_file(files[k]) for k in block)),
        place=f"{folder.resolve()}:{len(files)}",
        names=[path.relative_to(folder).as_posix() for path in files],
    )


def npz_source(path: Path, n: int | None = None) -> ImageStream:
    """`arr_0` of a sample set of guided-diffusion's kind, uint8 (N, H, W, 3), read image by image."""
    shape = _arr_0(path)[1]
    count = check_count(shape[0], n, str(path))

    def read(blocks: Sequence[range]) -> Iterator[np.ndarray]:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as member:
            _header(member, path)
            size, start = int(np.prod(shape[1:])), member.tell()
            for k in positions(blocks):
                member.seek(start + k * size)
                data = member.read(size)
                if len(data) < size:
                    raise InputError(f"{path}: arr_0 is cut short")
                yield np.frombuffer(bytearray(data), np.uint8).reshape(shape[1:])

    key = f"{sha256_file(path)}:{count}"
    return ImageStream(
        name=str(path), count=count, read=read, protocol={"source": str(path), "resize": "none"}, key=key
    )


def _arr_0(path: Path) -> tuple[np.dtype, tuple[int, ...]]:
    try:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as member:
            return _header(member, path)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: no arr_0 of images in this file ({error})") from error


def _header(member, path: Path) -> tuple[np.dtype, tuple[int, ...]]:
    """dtype and shape from the array's header; nothing pickled is ever read."""
    try:
        version = np.lib.format.read_magic(member)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(member)
    except ValueError as error:
        raise InputError(f"{path}: arr_0 is not an array ({error})") from error
    if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or fortran:
        raise InputError(f"{path}: arr_0 is {dtype} {shape}; need uint8 (N, H, W, 3) in C order")
    return dtype, shape


def open_images(where: str | Path, n: int | None = None) -> ImageStream:
    """A folder of images or an .npz of samples."""
    path = Path(where)
    return npz_source(path, n) if path.suffix == ".npz" and path.is_file() else folder_source(path, n)


def first_size(source: ImageStream) -> tuple[int, int]:
    """(height, width) of the first image."""
    image = next(source.stream())
    return image.shape[0], image.shape[1]


def paired_sources(first: Path, second: Path, n: int | None = None) -> tuple[ImageStream, ImageStream]:
    """Two folders whose images pair by relative path without extension, or two .npz files that pair by position."""
    if first.suffix == ".npz" and second.suffix == ".npz":
        a, b = npz_source(first, n), npz_source(second, n)
        if a.count != b.count:
            raise InputError(f"{first} has {a.count} images, {second} {b.count}: need as many on both sides")
        return a, b
    named: list[dict[str, Path]] = [
        by_pair_name(folder, image_files(folder, (other,))) for folder, other in ((first, second), (second, first))
    ]
    sides: list[tuple[Path, Path, dict[str, Path], dict[str, Path]]] = [
        (first, second, named[0], named[1]),
        (second, first, named[1], named[0]),
    ]
    for here, there, own, other in sides:
        lonely = [path for name, path in own.items() if name not in other]
        if lonely:
            raise InputError(
                f"{lonely[0]}: has no partner in {there} ({len(lonely)} of {len(own)} images of {here} "
                "unmatched); pairs share path and name"
            )
    return folder_source(first, n, (second,)), folder_source(second, n, (first,))


# --- rows of a data set and models -----------------------------------------------------------------------------


def rows_source(rows, settings: DataSettings, ids: list[int]) -> ImageStream:
    """Rows of a data set, scaled to cover `settings.size` and cropped at the centre."""
    size = settings.size
    protocol = {
        "source": rows.source,
        "split": rows.split,
        "rows": len(rows),
        "fingerprint": rows.fingerprint,
        "resize": f"{settings.resize} (antialiased) to cover {size[0]}x{size[1]}, centre crop",
        "background": settings.background,
    }
    key = ":".join(map(str, (rows.fingerprint, len(ids), protocol["resize"], settings.background)))
    return ImageStream(
        name=f"{rows.source} ({rows.split})",
        count=len(ids),
        protocol=protocol,
        key=key,
        read=lambda blocks: (rows.pixels(ids[k], size, "center", (0.5, 0.5)) for k in positions(blocks)),
    )


def model_source(
    model,
    rows,
    n: int,
    *,
    seed: int,
    batch_size: int,
    size: tuple[int, int],
    settings: dict[str, Any],
    balanced: bool = False,
    classifier: LoadedClassifier | None = None,
    classifier_scale: float = 1.0,
) -> ImageStream:
    """n images of a diffusion model, conditioned on n rows spread evenly over the reference; balanced: on each class in
    turn, of a model that takes nothing else. A classifier leads them to the same classes."""
    conditions = () if balanced else tuple(model.conditions.kinds)
    told = conditions if classifier is None or balanced else tuple(dict.fromkeys((*conditions, Class.name)))
    check_columns(rows, told, model.config.data)
    ids = evenly_spaced(len(rows), n) if told else []
    dataset: Any = condition_source(model, rows, size, seed) if told else None
    classes = len(model.class_names) if balanced else 0
    spatial = any(not CONDITIONS[name].static for name in conditions)

    def read(blocks: Sequence[range]) -> Iterator[np.ndarray]:
        for batch in batches(blocks, batch_size):
            start, end = batch.start, batch.stop
            if spatial and dataset is not None:
                block = ids[start:end]
                led = _led(model, dataset, block, classifier, classifier_scale)
                yield from sample_for_rows(model, dataset, block, start, seed, size, settings, classes=led)
                continue
            begin = 0 if end % len(batch) else start  # sample k takes entry k modulo their number
            values: dict[str, list] = {name: dataset.foreign_values(name, ids[begin:end]) for name in told}
            if balanced:
                values = {Class.name: [k % classes for k in range(begin, end)]}
            how = {
                "n": end // (end - begin) if values else end,
                "first": start,
                "seed": seed,
                "size": size,
                "batch_size": batch_size,
            }
            how |= {"classifier": classifier, "classifier_scale": classifier_scale, **settings}
            yield from (np.asarray(image) for image in model.sample(**arguments_of(values), **how))

    protocol = {
        **_made_by(model, seed),
        **({"classes": "each in turn"} if balanced else {}),
        **({} if classifier is None else {"classifier": classifier.fingerprint, "classifier_scale": classifier_scale}),
    }
    return ImageStream(
        name="model",
        count=n,
        read=read,
        protocol=protocol,
        key=cache_key(json.dumps([protocol, settings, size, n], default=str)),
        content=partial(_values_hash, dataset, told, ids) if told else None,
        batch=batch_size,
        action="sampling",
    )


def _led(model, dataset, ids: list[int], classifier: LoadedClassifier | None, scale: float) -> ClassGuidance | None:
    """What leads samples to the classes of rows."""
    if classifier is None:
        return None
    return class_guidance(model, classifier, dataset.foreign_values(Class.name, ids), scale)


def _values_hash(dataset, told: Sequence[str], ids: list[int], block: range) -> str:
    """Hash of what samples of a block are told."""
    values = [dataset.foreign_values(name, ids[block.start : block.stop]) for name in told]
    return hashlib.sha256(pickle.dumps(values)).hexdigest()


def _made_by(model, seed: int) -> dict[str, Any]:
    return {
        "source": "model",
        "fingerprint": model.fingerprint,
        "conditions": list(model.conditions.kinds),
        "seed": seed,
        "float_to_uint8": "clamp, round half to even",
        "resize": "none",
        **stated_precision(model.precision),
    }


def batches(blocks: Sequence[range], size: int) -> Iterator[range]:
    """The blocks in parts of at most `size` positions."""
    return (range(k, min(k + size, block.stop)) for block in blocks for k in range(block.start, block.stop, size))


def check_columns(rows, conditions: tuple[str, ...], data: DataSettings) -> None:
    """Raises InputError where rows lack what the conditions of a model are made of. data: settings of its training."""
    for condition in conditions:
        column = CONDITIONS[condition].column
        if rows is None or not CONDITIONS[condition].available(rows, data):
            raise InputError(
                f"this model is conditioned on {condition}: name a data set with a {column} column (--data)"
            )


def condition_source(model, rows, size: tuple[int, int], seed: int):
    """Values of rows in an evaluation (`ConditionDataset`): cut in the middle, degraded and masked by (seed, row)."""
    config = replace(model.config, train=replace(model.config.train, seed=seed))
    source = ConditionDataset(rows, config, size, training=False)
    for name in model.conditions.kinds:
        CONDITIONS[name].validate(rows)
    source.align_categories(model.conditions)
    return source


def sample_for_rows(
    model,
    dataset,
    ids: list[int],
    first: int,
    seed: int,
    size,
    settings: dict[str, Any],
    guide: Guide | None = None,
    classes: ClassGuidance | None = None,
) -> np.ndarray:
    """Samples first, first + 1, … for rows `ids`: uint8 (n, H, W, 3)."""
    values = {name: dataset.foreign_values(name, ids) for name in model.conditions.kinds}
    negative = settings.get("negative_prompt", "")
    settings = {name: value for name, value in settings.items() if name != "negative_prompt"}
    draw = Draw(ids=range(first, first + len(ids)), seed=seed, values=values, settings=settings, size=size, guide=guide)
    return draw_images(model, replace(draw, negative_prompt=negative, classes=classes))


class CodeCounts:
    """How often each code of a VQ autoencoder stands in latents. found: (codebook size,), None without a codebook."""

    def __init__(self, autoencoder):
        self.autoencoder = autoencoder
        network = autoencoder.network
        self.found = np.zeros(network.settings.codebook_size, np.int64) if network.is_vq else None

    def add(self, z) -> None:
        """Counts the codes of normalised latents."""
        if self.found is not None:
            indices = self.autoencoder.quantize(self.autoencoder.scale.restore(z))[1]
            self.found += np.bincount(indices.flatten().cpu().numpy(), minlength=len(self.found))

    def taken(self) -> dict[str, np.ndarray]:
        """{"codes": what was counted since it was taken last}; {} without a codebook."""
        if self.found is None:
            return {}
        taken, self.found = self.found, np.zeros_like(self.found)
        return {"codes": taken}


def reconstructions(
    autoencoder, source: ImageStream, batch_size: int, counts: CodeCounts | None = None
) -> Callable[[Sequence[range]], Iterator[np.ndarray]]:
    """How a source's images are read after `encode` (the mode) and `decode`."""
    import torch

    def read(blocks: Sequence[range]) -> Iterator[np.ndarray]:
        originals = source.read(blocks)
        for batch in batches(blocks, batch_size):
            images = np.stack(list(islice(originals, len(batch))))
            with autoencoder.autocast():
                z = autoencoder.encode(torch.from_numpy(images))
                rebuilt = tensor_to_pixels(autoencoder.decode(z))
            if counts is not None:
                counts.add(z)
            yield from rebuilt

    return read


def loaded(run: Any, run_kind: str, weights: str = "ema", **how: Any):
    """A run of this kind, from its folder (weights "ema" or "raw", how: mixed_precision and compile of `load`) or as it
    is. Raises UsageError for another kind."""
    if isinstance(run, (str, Path)):
        run = load(run, weights=weights, **how)
    if run.kind != run_kind:
        raise UsageError(f"this is a run of kind {run.kind}; evaluation asked for {run_kind}")
    return run


def trained_size(run) -> tuple[int, int]:
    """(height, width) in pixels that a run was trained at."""
    if run.kind == "diffusion":
        return run.trained_size
    height, width = run.config.data.size if run.config is not None else (0, 0)
    return (height, width) if height or width else (64, 64)


def sampling_protocol(model, draw: dict[str, Any]) -> dict[str, Any]:
    """Sampler and its settings in effect."""
    chosen = {**asdict(model.config.sample), **draw["settings"]}
    named = {key: chosen[key] for key in ("negative_prompt",) if key in chosen}
    named |= stated_distillation(model.config.distill)
    if not takes_eta(chosen["sampler"]):
        chosen["eta"] = 0.0
    used = {key: chosen[key] for key in SAMPLING if (key, chosen[key]) != ("autoguidance", 1.0)}
    return used | {"seed": draw["seed"]} | named
