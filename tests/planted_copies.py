"""How exactly `ldm eval-fid --metrics novelty` reads planted copies: the table of docs/experiments.md.

    python tests/planted_copies.py SOURCE [--size 64] [--rows 0] [--quarters]

Pictures of the validation split and copies of training pictures (as they are, mirrored, JPEG of quality 50 to 90,
shifted by 2 px) are looked up once. Then, 200 times, the validation pictures are divided at random into held-out ones
and samples, a share of the samples is replaced by copies, and the share is read.
"""

import argparse

import numpy as np

from ldmcli.core.settings import DataSettings
from ldmcli.evaluation.novelty import TrainingPictures, nearest_pictures, read
from ldmcli.evaluation.reference_statistics import open_reference
from ldmcli.maths.copies import as_jpeg, mirrored, moved

SHARES = (0.0, 0.1, 0.5, 1.0)
COPIES = 240
DRAWS = 200


class Pictures:
    """Rows of a data set at a size, or the four quarters of each as rows of their own."""

    def __init__(self, rows, size: int, quarters: bool, limit: int):
        self.rows, self.quarters = rows, quarters
        self.whole = (size * 2, size * 2) if quarters else (size, size)
        self.count = len(rows) * (4 if quarters else 1)
        self.count = min(self.count, limit) if limit else self.count

    def __len__(self) -> int:
        return self.count

    def pixels(self, i: int, size: tuple[int, int], *where) -> np.ndarray:
        image = self.rows.pixels(i // 4 if self.quarters else i, self.whole, "center", (0.5, 0.5))
        if not self.quarters:
            return image
        y, x = (i % 4) // 2 * size[0], i % 2 * size[1]
        return np.ascontiguousarray(image[y : y + size[0], x : x + size[1]])


def copies_of(training: TrainingPictures, draw: np.random.Generator) -> list[np.ndarray]:
    """Copies of random training pictures, as many in each form."""
    forms = (
        lambda image: image,
        mirrored,
        lambda image: as_jpeg(image, int(draw.integers(50, 91))),
        lambda image: moved(image, False, *[(2, 0), (0, 2), (-2, 0), (0, -2), (2, 2), (-2, 2)][draw.integers(6)]),
    )
    rows = draw.choice(len(training), COPIES, replace=COPIES > len(training))
    return [forms[k % len(forms)](training.at(int(row))) for k, row in enumerate(rows)]


def errors(unseen: np.ndarray, copied: np.ndarray, held_out: int, share: float, draw: np.random.Generator) -> tuple:
    """(errors of the readings, in points; share of the intervals that have the truth in them; number of samples)."""
    n = min(500, len(unseen) - held_out)
    found, covered = [], 0
    for _ in range(DRAWS):
        order = draw.permutation(unseen)
        count = round(share * n)
        samples = np.concatenate([draw.choice(copied, count), order[held_out : held_out + n - count]])
        reading = read(samples, order[:held_out])
        found.append(100 * (reading.share - count / n))
        covered += reading.interval[0] <= count / n <= reading.interval[1]
    return np.array(found), covered / DRAWS, n


def main() -> None:
    """Prints a row for each number of held-out pictures and each share."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--rows", type=int, default=0)
    parser.add_argument("--quarters", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    draw, settings = np.random.default_rng(given.seed), DataSettings(source=given.source)
    rows = {split: open_reference(settings, split)[0] for split in ("train", "validation")}
    size = (given.size, given.size)
    training = TrainingPictures(Pictures(rows["train"], given.size, given.quarters, given.rows), size)
    other = TrainingPictures(Pictures(rows["validation"], given.size, given.quarters, 0), size)
    pictures = [other.at(i) for i in range(len(other))]
    distances = nearest_pictures(training, [*pictures, *copies_of(training, draw)], lambda n: None)[1]
    unseen, copied = distances[: len(pictures)], distances[len(pictures) :]
    print("| held out | samples | share | mean error | 95 % of errors | largest | covered |")
    print("|---|---|---|---|---|---|---|")
    for held_out in (100, 200, 300):
        for share in SHARES:
            if len(unseen) - held_out < 40:
                continue
            found, covered, n = errors(unseen, copied, held_out, share, draw)
            low, most = np.quantile(np.abs(found), 0.95), np.abs(found).max()
            print(
                f"| {held_out} | {n} | {100 * share:.0f} % | {found.mean():+.1f} | {low:.1f} | {most:.1f} | "
                f"{100 * covered:.0f} % |"
            )


if __name__ == "__main__":
    main()
