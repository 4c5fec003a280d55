"""How near planted near copies of pictures come, and how near other pictures of the data are: what `NEAR` of
`data/near_copies.py` stands between.

    python docs/measure/near_copies.py emoji64 --limit 1500
"""

import argparse
import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageOps

from ldmcli.core.settings import DataSettings
from ldmcli.data.near_copies import NEAR, NearPair, near_pairs, signature
from ldmcli.data.sources import open_rows

PLANTED = 100  # pictures in each form


def as_jpeg(picture: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def shifted(picture: Image.Image, down: int, right: int) -> Image.Image:
    return Image.fromarray(np.roll(np.asarray(picture), (down, right), (0, 1)))


def resized(picture: Image.Image, factor: float) -> Image.Image:
    size = round(picture.width * factor), round(picture.height * factor)
    return picture.resize(size, Image.Resampling.BICUBIC)


FORMS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "mirrored": ImageOps.mirror,
    "JPEG 90": lambda one: as_jpeg(one, 90),
    "JPEG 50": lambda one: as_jpeg(one, 50),
    "mirrored, JPEG 75": lambda one: as_jpeg(ImageOps.mirror(one), 75),
    "1 px to the right": lambda one: shifted(one, 0, 1),
    "1 px down": lambda one: shifted(one, 1, 0),
    "half the side": lambda one: resized(one, 0.5),
    "twice the side": lambda one: resized(one, 2),
}


def pairs(pictures: list[Image.Image]) -> list[NearPair]:
    return near_pairs(np.stack([signature(one) for one in pictures]), pictures.__getitem__)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("--limit", type=int, default=0)
    given = parser.parse_args()
    rows = open_rows(DataSettings(source=given.data, limit=given.limit), split="train")
    pictures = [rows.image(i) for i in range(len(rows))]
    print(f"{len(pictures)} pictures; near copies are those below {NEAR:g}")
    step = max(1, len(pictures) // PLANTED)
    for name, change in FORMS.items():
        found = [pairs([one, change(one)]) for one in pictures[::step][:PLANTED]]
        print(f"{name}: {sum(map(len, found))} of {len(found)} found")
    for pair in pairs(pictures):
        print(f"{pair.distance:.4f} {pair.how}: {rows.name(pair.first)}, {rows.name(pair.second)}")


if __name__ == "__main__":
    main()
