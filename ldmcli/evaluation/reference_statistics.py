"""References that need not be computed again: statistics files, and features cached by content."""

import json
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ldmcli import __version__
from ldmcli.core import console
from ldmcli.core.errors import InputError, LdmError, UsageError
from ldmcli.core.files import atomic_path
from ldmcli.core.settings import DataSettings
from ldmcli.core.world import World
from ldmcli.data.cache import cache_key, cache_root
from ldmcli.data.joined_rows import JoinedRows
from ldmcli.data.rows import evenly_spaced
from ldmcli.data.sources import divided, held_out, open_rows, split_sizes, whole_rows
from ldmcli.evaluation.extractors import Extractor
from ldmcli.evaluation.features import FeatureSet, concatenated
from ldmcli.evaluation.image_streams import ImageStream, npz_source
from ldmcli.evaluation.passes import SAME, Pass, Tally, parts_in_order, run_pass, same_numbers
from ldmcli.maths.metrics import Gaussian

CHUNK = 1024  # images whose features are added to a covariance at once
KEPT = 10_000  # rows of features that are kept of a reference

ALL = "all"  # --split: every row of every split; --reference-count: every row of the split


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """A reference that is known by mean and covariance. n: images that they are of, None where nobody says.

    rows: features of some of them, or of all; images: some of them, whose features are not known yet. Either serves
    metrics that need more than mean and covariance. protocol: what the file says of itself.
    """

    mu: np.ndarray
    sigma: np.ndarray
    n: int | None
    source: str
    rows: FeatureSet | None = None
    images: ImageStream | None = None
    protocol: dict[str, Any] = field(default_factory=dict)


def open_reference(settings: DataSettings, split: str) -> tuple[Any, int]:
    """(rows to measure against, how many there are where those are what training would hold out of them, else 0).

    split: "train", "validation" (what is held out where the data have no such split), a split by name, or "all".
    """
    stored = split_sizes(settings)
    if split == ALL and ALL not in stored:
        names = list(stored) or ["train", "validation"]
        parts = [
            open_rows(_named(settings, name), split="validation") if stored else open_rows(settings, split=name)
            for name in names
        ]
        return JoinedRows(parts), 0
    if settings.split == ALL and ALL not in stored:
        settings = replace(settings, split="train")
    # a split that is named is meant whole; without one the rows that training leaves out are taken
    if split not in ("train", "validation") or settings.split == split == "validation":
        return open_rows(_named(settings, split), split="validation"), 0
    whole, undivided = whole_rows(settings, split)
    rows = divided(whole, settings, split, held_out(whole, settings) if undivided else None)
    return rows, len(whole) if undivided and split == "validation" else 0


def _named(settings: DataSettings, split: str) -> DataSettings:
    return replace(settings, split=split, val_split=split)


def gaussian(features: np.ndarray) -> Gaussian:
    """Mean and covariance of features (N, D), in float64."""
    found = Gaussian.empty(features.shape[1])
    for start in range(0, len(features), CHUNK):
        found.update(features[start : start + CHUNK])
    return found


def write_statistics(
    path: Path, reference: FeatureSet | Statistics, extractor: Extractor, protocol: dict[str, Any]
) -> None:
    """mu, sigma (float64, divisor n - 1), n, the protocol as JSON text, and up to `KEPT` rows of features, in an .npz
    that `data=` takes; of no more rows than that, every number comes out as of the images themselves."""
    if isinstance(reference, FeatureSet):
        moments, rows = gaussian(reference.features), _evenly(reference, KEPT)
        arrays = {"mu": moments.mean, "sigma": moments.covariance, "n": np.array(moments.n), **_arrays(rows)}
    else:
        arrays = {"mu": reference.mu, "sigma": reference.sigma, "n": np.array(reference.n or 0)}
        arrays |= {} if reference.rows is None else _arrays(reference.rows)
    arrays["protocol"] = np.array(
        json.dumps({"extractor": extractor.protocol, "reference": protocol, "ldm": __version__})
    )
    _save(path, arrays)


def _evenly(found: FeatureSet, most: int) -> FeatureSet:
    if len(found) <= most:
        return found
    return found.of(evenly_spaced(len(found), most))


def refuse_foreign_statistics(path: Path) -> None:
    """Raises UsageError where a file is there that is none of `write_statistics`."""
    if not os.path.lexists(path):
        return
    try:
        with np.load(path, allow_pickle=False) as file:
            ours = "ldm" in json.loads(str(file["protocol"]))
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        ours = False
    if not ours or path.is_symlink():
        raise UsageError(f"{path}: not written by ldm, so it is not replaced; move it away or name another file")


def read_statistics(path: Path, extractor: Extractor, n: int | None = None) -> Statistics | None:
    """Statistics of an .npz, None where it has no mu and sigma. Of a sample set of guided-diffusion's kind, which has
    images (arr_0) beside them, both are found; None where its mean and covariance are of another extractor.

    n: how many of those images are used. Raises InputError for statistics alone of another extractor.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            if not {"mu", "sigma"} <= set(file.files):
                return None
            mu, sigma = file["mu"].astype(np.float64), file["sigma"].astype(np.float64)
            count = int(file["n"]) or None if "n" in file.files else None
            protocol = json.loads(str(file["protocol"])) if "protocol" in file.files else {}
            stored, pictured = protocol.get("extractor", {}), "arr_0" in file.files
            rows = _feature_set(file) if "features" in file.files else None
    except (OSError, ValueError, KeyError, TypeError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: not a readable .npz of statistics or images ({error})") from error
    named = [("mu", mu), ("sigma", sigma), *([("features", rows.features)] if rows is not None else [])]
    for name, values in named:
        if not np.isfinite(values).all():
            raise InputError(f"{path}: {name} holds NaN or Inf; compute the statistics again")
    wrong = [key for key in SAME if key in stored and stored[key] != extractor.protocol[key]]
    if mu.shape != (extractor.dim,) or sigma.shape != (extractor.dim, extractor.dim) or wrong:
        if pictured:
            return None
        raise InputError(
            f"{path}: statistics of another extractor ({', '.join(wrong) or f'shape {mu.shape}'}), "
            f"not of {extractor.name} with {extractor.dim} dimensions"
        )
    images = npz_source(path, n) if pictured else None
    of = protocol.get("reference", {})
    return Statistics(mu=mu, sigma=sigma, n=count, source=str(path), rows=rows, images=images, protocol=of)


def has_moments(path: Path) -> bool:
    """Whether an .npz has a mean and a covariance."""
    with zipfile.ZipFile(path) as archive:
        return {"mu.npy", "sigma.npy"} <= set(archive.namelist())


def is_sample_set(path: Path) -> bool:
    """Whether an .npz has images, or is no .npz that can be read; then whoever opens it says what is wrong."""
    try:
        with zipfile.ZipFile(path) as archive:
            return "arr_0.npy" in archive.namelist() or not {"mu.npy", "sigma.npy"} <= set(archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return True


def streamed_statistics(
    extractors: Sequence[Extractor],
    source: ImageStream,
    advance: Callable[[int], None],
    keep: bool,
    world: World | None = None,
    tally: Tally | None = None,
) -> tuple[Statistics, ...]:
    """Mean and covariance of a stream of any length by each network, in memory for `KEPT` rows of features at most; ()
    on processes other than rank 0. keep: so many rows, evenly spaced, are kept. Collective."""
    world, tally = world or World(), tally or Tally()
    moments = [Gaussian.empty(extractor.dim) for extractor in extractors]
    kept: list[list[FeatureSet]] = [[] for _ in extractors]
    waiting: list[list[np.ndarray]] = [[] for _ in extractors]
    wanted = set(evenly_spaced(source.count, min(source.count, KEPT))) if keep else set()
    run = Pass(label="reference", streams=(source,), extractors=(tuple(extractors),))
    store = run.store(world)
    for block, part in parts_in_order(run, store, world, tally, advance):
        side = part.sides[0]
        of_block = [k for k in range(len(block)) if block.start + k in wanted]
        for found, some, rows, (features, logits) in zip(moments, kept, waiting, side.found):
            some.append(FeatureSet(features, logits, side.hashes, set(side.sizes)).of(of_block))
            rows.append(features)
            if sum(map(len, rows)) >= CHUNK or block.stop == source.count:  # many rows at once: a merge costs D² each
                found.update(np.concatenate(rows))
                rows.clear()
    if not world.is_rank_0:
        return ()
    store.remove()
    sets = [concatenated(some) if keep else None for some in kept]
    return tuple(
        Statistics(mu=found.mean, sigma=found.covariance, n=found.n, source=source.name, rows=some)
        for found, some in zip(moments, sets)
    )


def reference_features(
    extractors: Sequence[Extractor],
    source: ImageStream,
    advance: Callable[[int], None],
    limit: int,
    world: World | None = None,
    tally: Tally | None = None,
) -> tuple[FeatureSet, ...]:
    """Features of a reference by each network, from the cache where the same content met the same network before; one
    pass over the images gives all that are missing. () on processes other than rank 0. Collective."""
    world, tally = world or World(), tally or Tally()
    paths = [_cache_path(extractor, source) if source.count <= limit else None for extractor in extractors]
    known = [_read(path) if world.is_rank_0 else None for path in paths]
    missing: list[int] = world.on_rank_0(lambda: [k for k, found in enumerate(known) if found is None])
    if not missing:
        advance(source.count)
        tally.known += source.count
    else:
        run = Pass(label="reference", streams=(source,), extractors=(tuple(extractors[k] for k in missing),))
        store = run.store(world)
        made = run_pass(run, store, world, tally, advance).sides[0]
        for k, found in zip(missing, made if world.is_rank_0 else ()):
            known[k] = found
            _keep(paths[k], found)
        store.remove()
    return tuple(found for found in known if found is not None)


def _keep(path: Path | None, found: FeatureSet) -> None:
    if path is None or not len(found):
        return
    try:
        _save(path, _arrays(found))
    except (LdmError, OSError) as error:
        console.warn(f"features of the reference are not kept: {error}")


def _cache_path(extractor: Extractor, source: ImageStream) -> Path | None:
    if not source.key:
        return None
    root = cache_root("")
    name = cache_key("reference-1", source.key, *same_numbers(extractor))
    return None if root is None else root / "features" / f"{name}.npz"


def _read(path: Path | None) -> FeatureSet | None:
    """What `_keep` kept; None where there is nothing, or it is damaged, so that it is computed again."""
    if path is None or not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            found = _feature_set(file)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return found if np.isfinite(found.features).all() else None


def _save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with atomic_path(path) as part, open(part, "wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def _arrays(found: FeatureSet) -> dict[str, np.ndarray]:
    sizes = np.array(sorted(found.sizes))
    return {"features": found.features, "hashes": np.array(found.hashes), "sizes": sizes}


def _feature_set(file: Mapping[str, np.ndarray]) -> FeatureSet:
    """What `_arrays` gave; logits are not kept."""
    sizes = {(int(height), int(width)) for height, width in file["sizes"]}
    features = file["features"]
    return FeatureSet(features, features[:, :0], [str(name) for name in file["hashes"]], sizes)
