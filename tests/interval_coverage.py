"""How often 95 % intervals cover the truth, by simulation; docs/experiments.md has the figures.

    python tests/interval_coverage.py gaussians [--sets 100] [--seed 0] [-n 100 500 1000]
    python tests/interval_coverage.py DATA …    the same of the features of random rows of a data set, at 64 px
    python tests/interval_coverage.py DATA --blur 1 …    how often --compare tells sets apart: random rows from random
        others, and from the first quarter of the rows blurred by so many pixels (Gaussian, standard deviation)

A line a case: of how many sets the interval covers the truth, and how wide it is in deviations of the value over sets
(3.92 would be exact). The truth of KID and of the extrapolated distance is that of the populations, of the others their
mean at these sizes.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
from PIL import Image, ImageFilter

from ldmcli.core.settings import DataSettings
from ldmcli.data.sources import open_rows
from ldmcli.evaluation.compare import compare
from ldmcli.evaluation.extractors import open_extractor
from ldmcli.evaluation.features import FeatureSet, extract
from ldmcli.evaluation.metrics import METRICS, FeatureSets
from ldmcli.maths.distance_errors import Moments, extrapolated_frechet, frechet_error, kid_error, mind_error
from ldmcli.maths.kernel_distance import kid
from ldmcli.maths.metrics import frechet_from_features
from ldmcli.maths.mind import mind
from ldmcli.maths.neighbour_errors import density_coverage_errors, precision_recall_errors
from ldmcli.maths.neighbour_metrics import density_coverage, precision_recall
from ldmcli.maths.uncertainty import interval

DIRECTIONS = 200
Pair = tuple[np.ndarray, np.ndarray]
Found = dict[str, tuple[float, float, float]]  # value, low, high


def measured(a: np.ndarray, b: np.ndarray, neighbours: bool = True) -> Found:
    """Values and intervals of all metrics of two sets."""
    found: Found = {}

    def add(name, value, error, bounds=(0.0, np.inf)):
        found[name] = (value, *interval(value, error, bounds))

    value = frechet_from_features(a, b)
    error = frechet_error(Moments.of_rows(a), Moments.of_rows(b))
    add("fid", value, error)
    beyond = extrapolated_frechet(a, b, value, error)
    if beyond.holds:
        found["fid extrapolated"] = (beyond.value, *beyond.interval)
    else:
        found["fid extrapolated, n < 2 d"] = (beyond.value, *beyond.interval)
    size = min(1000, len(a), len(b))
    mean, std = kid(a, b, subset_size=size)
    add("kid", mean, kid_error(a, b, size, 100, std), (-np.inf, np.inf))
    add("mind", mind(a, b, directions=DIRECTIONS), mind_error(a, b, DIRECTIONS, 2020))
    if neighbours:
        for names, values, errors in (
            (("precision", "recall"), precision_recall(a, b, 3), precision_recall_errors),
            (("density", "coverage"), density_coverage(a, b, 5), density_coverage_errors),
        ):
            for name, one, error in zip(names, values, errors(a, b, values, 3 if "recall" in names else 5)):
                add(name, one, error, (0.0, np.inf if name == "density" else 1.0))
    return found


def coverage(draw: Callable[[int], Pair], n: int, sets: int, truths: dict[str, float]) -> Iterator[str]:
    """Lines of a table: metric, sets covered, width in deviations. truths: by metric; others: the mean over sets."""
    found = [measured(*draw(n)) for _ in range(sets)]
    for name in found[0]:
        value, low, high = np.array([one[name] for one in found]).T
        truth = truths.get(name.partition(",")[0], value.mean())
        covered = ((low <= truth) & (truth <= high)).mean()
        width = (high - low).mean() / max(value.std(), 1e-300)
        yield f"{name:28} truth {truth:9.4g}  covered {100 * covered:5.1f} %  width {width:5.2f} deviations"


@dataclass(frozen=True)
class Drawn:
    """Pairs of sets of n rows, (n, d) each: equal Gaussians, one that is shifted and wider, or two mixtures of four."""

    kind: str
    d: int
    rng: np.random.Generator

    @property
    def scale(self) -> np.ndarray:
        return 1 / np.sqrt(np.arange(1, self.d + 1))

    def __call__(self, n: int) -> Pair:
        a, b = self.rng.normal(size=(2, n, self.d)) * self.scale
        if self.kind == "shifted and wider":
            return 1.2 * a + 0.3 / np.sqrt(self.d), b
        if self.kind == "mixtures":
            means = np.random.default_rng(4).normal(size=(4, self.d)) * self.scale
            first, second = self.rng.choice(4, n, p=[0.4, 0.3, 0.2, 0.1]), self.rng.choice(4, n)
            return a / 2 + means[first], b / 2 + means[second]
        return a, b

    def truths(self) -> dict[str, float]:
        if self.kind == "equal":
            return {"fid extrapolated": 0.0, "kid": 0.0}
        large = self(8000)
        found = {"kid": kid(*large, subset_size=8000)[0], "fid extrapolated": frechet_from_features(*large)}
        if self.kind == "shifted and wider":
            found["fid extrapolated"] = 0.3**2 + 0.2**2 * float((self.scale**2).sum())
        return found


def gaussians(sets: int, seed: int, sizes: list[int]) -> None:
    for d in (16, 64):
        for kind in ("equal", "shifted and wider", "mixtures"):
            draw = Drawn(kind, d, np.random.default_rng(seed))
            truths = draw.truths()
            for n in sizes:
                for line in coverage(draw, n, sets, truths):
                    print(f"{kind:18} d {d:3} n {n:5}  {line}", flush=True)


@dataclass(frozen=True)
class Resampled:
    """Random rows against other rows of one set: the populations are the same, but for contrast times `wide`."""

    rows: np.ndarray
    wide: float
    rng: np.random.Generator

    def __call__(self, n: int) -> Pair:
        ids, mean = self.rng.permutation(len(self.rows)), self.rows.mean(axis=0)
        return mean + self.wide * (self.rows[ids[:n]] - mean), self.rows[ids[n : 2 * n]]


def resampled(rows: np.ndarray, sets: int, seed: int, sizes: list[int]) -> None:
    for wide in (1.0, 1.1):
        draw = Resampled(rows, wide, np.random.default_rng(seed))
        truths = {"kid": 0.0, "fid extrapolated": 0.0} if wide == 1 else {}
        for n in sizes:
            for line in coverage(draw, n, sets, truths):
                print(f"contrast x {wide:<7} d {rows.shape[1]:3} n {n:5}  {line}", flush=True)


def document(generated: np.ndarray, reference: np.ndarray) -> dict:
    """What an evaluation by the usual metrics says of these features, as far as comparing needs it."""
    found = {"metrics": {}, "estimates": {}, "n_generated": len(generated), "n_reference": len(reference)}
    sides = [FeatureSet(rows, rows, [str(i) for i in range(len(rows))], set()) for rows in (generated, reference)]
    sets = FeatureSets(*sides, SimpleNamespace(display="FD (net)"))
    for name in ("fid", "kid", "mind"):
        values = METRICS[name].compute(sets).values
        for value, error in METRICS[name].errors(sets, values).items():
            if values.get(value) is not None:
                found["metrics"][value] = values[value]
                found["estimates"][value] = {"error_generated": error.generated, "error_reference": error.reference}
    return found


def told_apart(rows: np.ndarray, changed: np.ndarray, sets: int, seed: int, sizes: list[int]) -> None:
    """Prints of how many pairs of sets --compare calls any of the usual metrics really different."""
    rng, first = np.random.default_rng(seed), len(changed)
    for n in sizes:
        alike, other = 0, 0 if n <= first else None
        for _ in range(sets):
            ids, rest = rng.permutation(first), first + rng.permutation(len(rows) - first)
            reference = rows[rest[:n]]
            old, new = (document(rows[rest[k * n : (k + 1) * n]], reference) for k in (1, 2))
            alike += any(one["real"] for one in compare(new, old)["metrics"].values())
            if other is not None:
                worse = document(changed[ids[:n]], reference)
                other += any(one["real"] for one in compare(worse, old)["metrics"].values())
        print(f"n {n:5}  of {sets} pairs called different: alike {alike}, changed {other}", flush=True)


def features_of(source: str, name: str, blur: float) -> tuple[np.ndarray, np.ndarray]:
    """Features (N, D) of the training rows of a data set, and of the first quarter of them, blurred."""
    rows, extractor = open_rows(DataSettings(source=source, size=(64, 64)), split="train"), open_extractor(name)
    images = [rows.pixels(i, (64, 64), "center", (0.5, 0.5)) for i in range(len(rows))]
    way = ImageFilter.GaussianBlur(blur)
    blurred = [np.asarray(Image.fromarray(image).filter(way)) for image in images[: len(images) // 4 if blur else 0]]
    whole = extract(images, extractor).features
    return whole, extract(blurred, extractor).features if blur else whole[:0]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what")
    parser.add_argument("--sets", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--blur", type=float, default=0.0)
    parser.add_argument("--features", default="effnet-lite0")
    parser.add_argument("-n", type=int, nargs="+", default=[100, 500, 1000])
    arguments = parser.parse_args()
    if arguments.what == "gaussians":
        gaussians(arguments.sets, arguments.seed, arguments.n)
    else:
        features, changed = features_of(arguments.what, arguments.features, arguments.blur)
        if len(changed):
            told_apart(features, changed, arguments.sets, arguments.seed, arguments.n)
        else:
            resampled(features.astype(np.float64), arguments.sets, arguments.seed, arguments.n)
