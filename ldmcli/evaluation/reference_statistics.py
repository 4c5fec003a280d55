"""References that need not be computed again: statistics files, and features cached by content."""

import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ldmcli.core import console
from ldmcli.core.errors import InputError, LdmError
from ldmcli.core.files import atomic_path
from ldmcli.core.settings import DataSettings
from ldmcli.data.cache import cache_key, cache_root
from ldmcli.data.joined_rows import JoinedRows
from ldmcli.data.sources import divided, held_out, open_rows, split_sizes, whole_rows
from ldmcli.evaluation.features import Extractor, FeatureSet, extract
from ldmcli.evaluation.image_streams import ImageStream
from ldmcli.maths.metrics import Gaussian

SAME = ("weights_sha256", "layer", "resize")  # what two extractors must share for their numbers to compare


@dataclass(frozen=True)
class Statistics:
    """A reference that is known by mean and covariance only."""

    mu: np.ndarray
    sigma: np.ndarray
    n: int | None
    source: str


ALL = "all"  # --split: every row of every split


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
    for start in range(0, len(features), 1024):
        found.update(features[start : start + 1024])
    return found


def write_statistics(path: Path, features: np.ndarray, extractor: Extractor, protocol: dict[str, Any]) -> None:
    """mu, sigma (float64, divisor n - 1), n and the protocol as JSON text, in an .npz that `data=` takes."""
    found = gaussian(features)
    text = json.dumps({"extractor": extractor.protocol, **protocol})
    with atomic_path(path) as part, open(part, "wb") as file:
        np.savez(file, mu=found.mean, sigma=found.covariance, n=found.n, protocol=text)


def read_statistics(path: Path, extractor: Extractor) -> Statistics | None:
    """mu and sigma of an .npz, None where it has none. Raises InputError for statistics of another extractor."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if not {"mu", "sigma"} <= set(file.files):
                return None
            mu, sigma = file["mu"].astype(np.float64), file["sigma"].astype(np.float64)
            n = int(file["n"]) if "n" in file.files else None
            stored = json.loads(str(file["protocol"]))["extractor"] if "protocol" in file.files else {}
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: not a readable .npz of statistics or images ({error})") from error
    for name, values in (("mu", mu), ("sigma", sigma)):
        if not np.isfinite(values).all():
            raise InputError(f"{path}: {name} holds NaN or Inf; compute the statistics again")
    wrong = [key for key in SAME if key in stored and stored[key] != extractor.protocol[key]]
    if mu.shape != (extractor.dim,) or sigma.shape != (extractor.dim, extractor.dim) or wrong:
        raise InputError(
            f"{path}: statistics of another extractor ({', '.join(wrong) or f'shape {mu.shape}'}), "
            f"not of {extractor.name} with {extractor.dim} dimensions"
        )
    return Statistics(mu, sigma, n, str(path))


def reference_features(
    extractor: Extractor, source: ImageStream, advance: Callable[[int], None], limit: int
) -> FeatureSet:
    """Features of a reference, from the cache where the same content met the same extractor before."""
    path = _cache_path(extractor, source) if source.count <= limit else None
    if path is not None and path.is_file() and (kept := _read(path)) is not None:
        advance(source.count)
        return kept
    found = extract(source.stream(), extractor, advance)
    if path is not None and len(found):
        try:
            _write(path, found)
        except (LdmError, OSError) as error:
            console.warn(f"features of the reference are not kept: {error}")
    return found


def _cache_path(extractor: Extractor, source: ImageStream) -> Path | None:
    if not source.key:
        return None
    identity = [str(extractor.protocol[key]) for key in SAME]
    root = cache_root("")
    return None if root is None else root / "features" / f"{cache_key('reference-1', source.key, *identity)}.npz"


def _read(path: Path) -> FeatureSet | None:
    """What `_write` kept; None where it is damaged, so that it is computed again."""
    try:
        with np.load(path, allow_pickle=False) as file:
            sizes = {(int(height), int(width)) for height, width in file["sizes"]}
            features, hashes = file["features"], [str(name) for name in file["hashes"]]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return FeatureSet(features, features[:, :0], hashes, sizes) if np.isfinite(features).all() else None


def _write(path: Path, found: FeatureSet) -> None:
    with atomic_path(path) as part, open(part, "wb") as file:
        np.savez(file, features=found.features, hashes=np.array(found.hashes), sizes=np.array(sorted(found.sizes)))
