"""Do distances put damaged pictures in order of the damage?

Real pictures of a data set are cut into two disjoint halves. One half is damaged more and more (noise, blur, JPEG) and
measured against the other one, which stays as it is. Printed: a table of each distance by level, and whether it rises
from level to level. Level 0 is no damage: the floor.

    python docs/measure/ordering.py --data emoji64 --features effnet-lite0,effnet-lite2 -n 1000
"""

import argparse
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from ldmcli.core.allocator import keep_freed_memory
from ldmcli.core.settings import DataSettings
from ldmcli.data.rows import evenly_spaced
from ldmcli.data.sources import open_rows
from ldmcli.evaluation.extractors import open_extractor
from ldmcli.evaluation.features import extract
from ldmcli.maths.metrics import metrics_from_features

METRICS = {"fid": "FD", "mind": "MIND", "kid_mean": "KID"}


def noised(image: np.ndarray, deviation: float, rng: np.random.Generator) -> np.ndarray:
    """Gaussian noise; deviation in grey levels."""
    return np.clip(image + rng.normal(0, deviation, image.shape), 0, 255).round().astype(np.uint8)


def blurred(image: np.ndarray, sigma: float, rng: np.random.Generator) -> np.ndarray:
    """Gaussian blur; sigma in pixels."""
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(sigma)))


def compressed(image: np.ndarray, quality: float, rng: np.random.Generator) -> np.ndarray:
    """Through a JPEG file of this quality, 4:2:0."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=int(quality))
    return np.asarray(Image.open(file))


DAMAGES: dict[str, tuple[Callable[[np.ndarray, float, np.random.Generator], np.ndarray], tuple[float, ...]]] = {
    "noise (deviation in grey levels)": (noised, (4, 8, 16, 32)),
    "blur (sigma in px)": (blurred, (0.5, 1, 2, 4)),
    "JPEG (quality)": (compressed, (75, 50, 25, 10)),
}


def pictures(data: str, n: int, size: int, seed: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Two disjoint halves of at most n pictures each, uint8 (size, size, 3)."""
    rows = open_rows(DataSettings(source=data, size=(size, size)), split="train")
    ids = np.random.default_rng(seed).permutation(evenly_spaced(len(rows), min(len(rows), 2 * n))).tolist()
    images = [rows.pixels(i, (size, size), "center", (0.5, 0.5)) for i in ids]
    return images[: len(images) // 2], images[len(images) // 2 :]


def measured(extractor, images: list[np.ndarray], reference: np.ndarray) -> dict[str, float]:
    """FD, MIND and KID of pictures against features of the reference."""
    found = extract(images, extractor).features
    size = min(1000, len(found), len(reference))
    values = metrics_from_features(found, reference, ["fid", "kid", "mind"], kid_subset_size=size)
    return {name: float(values[name] or 0.0) for name in METRICS}


def ordering(data: str, n: int, size: int, networks: list[str], seed: int) -> list[dict]:
    """A row for each network, damage and metric: values by level, and whether they rise."""
    rng = np.random.default_rng(seed)
    damaged, clean = pictures(data, n, size, seed)
    rows = []
    for name in networks:
        extractor = open_extractor(name)
        reference = extract(clean, extractor).features
        floor = measured(extractor, damaged, reference)
        for title, (damage, levels) in DAMAGES.items():
            found = [floor]
            for level in levels:
                found.append(measured(extractor, [damage(image, level, rng) for image in damaged], reference))
            for metric, label in METRICS.items():
                values = [one[metric] for one in found]
                row = {"network": name, "damage": title, "levels": [0, *levels], "metric": label, "values": values}
                rows.append(row | {"rises": values == sorted(values), "n": [len(damaged), len(clean)]})
                shown = "  ".join(f"{value:9.4g}" for value in values)
                print(f"{name:14} {title:34} {label:5} {shown}  {'rises' if rows[-1]['rises'] else 'DOES NOT RISE'}")
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", default="shapes")
    parser.add_argument("--features", default="effnet-lite0,effnet-lite2")
    parser.add_argument("-n", type=int, default=1000, help="pictures a half")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    keep_freed_memory()
    table = ordering(given.data, given.n, given.size, given.features.split(","), given.seed)
    if given.json:
        given.json.write_text(json.dumps(table, indent=1))
