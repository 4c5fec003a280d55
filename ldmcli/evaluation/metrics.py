"""`METRICS`: the table of what `evaluate` measures. A new metric is an entry here, and nothing else.

An entry says what the metric needs, how it is computed, what it is called, whether more is better, and which of its
numbers only say how much the value is worth. Checks of requests, the numbers, their keys and labels, `--compare`,
`--fail-above` and the report read it.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from ldmcli.core.errors import InputError
from ldmcli.evaluation.condition_fidelity import LABELS, LAYOUT, MAP, measure
from ldmcli.evaluation.extractors import Extractor, exact_products
from ldmcli.evaluation.features import FeatureSet, in_blocks
from ldmcli.evaluation.novelty import measure_novelty
from ldmcli.evaluation.reference_statistics import Statistics, gaussian
from ldmcli.evaluation.result import Scores
from ldmcli.maths.distance_errors import (
    Extrapolated,
    Moments,
    extrapolated_frechet,
    frechet_error,
    kid_error,
    mind_error,
)
from ldmcli.maths.kernel_distance import kid
from ldmcli.maths.metrics import frechet, frechet_from_features, inception_score, psnr, ssim
from ldmcli.maths.mind import mind
from ldmcli.maths.neighbour_errors import density_coverage_errors, precision_recall_errors
from ldmcli.maths.neighbour_metrics import NEAREST, NEIGHBOURS, density_coverage, precision_recall
from ldmcli.maths.pixels import pixels_to_tensor
from ldmcli.maths.uncertainty import Error

KID = {"subsets": 100, "subset_size": 1000, "seed": 2020}
KERNEL = "(x.y/D + 1)^3, unbiased"
IS_SPLITS = 10
MIND = {"directions": 1000, "seed": 2020}
BLOCK = 16

Images = Sequence[np.ndarray]  # uint8 (H, W, 3) each

# What a metric may need, and with it how `compute` is called.
IMAGES = "images"  # compute(images) -> a value for each image
PAIRS = "pairs"  # compute(made, real) -> a value for each pair of images of one size
PERCEPTUAL = "perceptual"  # compute(made, real, net) -> the same, by a perceptual network
STATISTICS = "statistics"  # compute(FeatureSets) -> Scores; of the reference mean and covariance are enough
FEATURES = "features"  # compute(FeatureSets) -> Scores; of the reference every row of features is needed
LOGITS = "logits"  # compute(FeatureSets) -> Scores; there need be no reference
CONDITION = "condition"  # compute(ConditionedSamples) -> Scores
NOVELTY = "novelty"  # compute(NoveltySets) -> Novelty
CODES = "codes"  # compute(how often each code stands in latents, or None without a codebook) -> Scores

OF_SETS = (STATISTICS, FEATURES, LOGITS)
OF_PAIRS = (PAIRS, PERCEPTUAL)
OF_EACH = (IMAGES, *OF_PAIRS)


@dataclass(frozen=True)
class FeatureSets:
    """Features of what is measured and of the reference, by one extractor. The reference is None for LOGITS only."""

    generated: FeatureSet
    reference: FeatureSet | Statistics | None
    extractor: Extractor


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A metric of `METRICS`.

    needs: one of the words above; says what `compute` gets and gives.
    label: for people; where the metric has several values, or one by another name than its own, {name: label} in the
        order of their weight, by the name that people type ("kid_mean"). "{net}" stands for the network it holds for.
    better: "lower" or "higher". unit, bound: for reports.
    beside: {name: label} of numbers that say how much the value is worth, and are nothing to get better at. A metric
        of `OF_EACH` has its deviation beside without saying so.
    condition: what the model must be conditioned on, of a metric that needs CONDITION.
    default_of: what it is measured of where no metrics are named: "model", "images", "autoencoder", "task", "pairs".
    titles: what reports call it, by the first word of its keys, where that is not how its label begins.
    bounds: the least and the greatest value that there is. at_any_n: of sets, whether it is as large for any number.
    errors: of a metric of sets, (FeatureSets, all numbers by name) -> {name: Error}; None: groups of images are left
        out.
    extrapolate: (FeatureSets, value, Error) -> its value at infinitely many images.
    """

    needs: str
    compute: Callable[..., Any]
    label: str | Mapping[str, str]
    better: str = "lower"
    beside: Mapping[str, str] = field(default_factory=dict)
    unit: str = ""
    bound: str = ""
    condition: str = ""
    default_of: tuple[str, ...] = ()
    titles: Mapping[str, str] = field(default_factory=dict)
    bounds: tuple[float, float] = (-math.inf, math.inf)
    at_any_n: bool = False
    errors: Callable[[FeatureSets, dict[str, float]], Mapping[str, Error | None]] | None = None
    extrapolate: Callable[[FeatureSets, float, Error], Extrapolated | None] | None = None

    def values(self, name: str) -> dict[str, str]:
        """{name: label} of its values, without what stands beside. name: its own in the table."""
        return {name: self.label} if isinstance(self.label, str) else dict(self.label)

    def labels(self, name: str) -> dict[str, str]:
        """{name: label} of all its numbers."""
        found = self.values(name)
        if self.needs in OF_EACH:
            found |= {f"{value}_std": f"{label}, deviation over images" for value, label in found.items()}
            found[f"{name}_equal_images"] = "pairs of equal images"
        return {**found, **self.beside}


# --- computing -------------------------------------------------------------------------------------------------


def _fid(sets: FeatureSets) -> Scores:
    """Fréchet distance; only of Inception's features is it called FID (Heusel et al. 2017, Eq. 6)."""
    if isinstance(sets.reference, Statistics):
        own = gaussian(sets.generated.features)
        value = frechet(own.mean, own.covariance, sets.reference.mu, sets.reference.sigma)
    else:
        value = frechet_from_features(sets.generated.features, _rows(sets))
    name = "fid" if sets.extractor.display == "FID" else "fd"
    return Scores({name: value}, {"covariance_divisor": "n - 1"})


def _fid_errors(sets: FeatureSets, values: dict[str, float]) -> dict[str, Error]:
    return dict.fromkeys(values, frechet_error(Moments.of_rows(sets.generated.features), _moments(sets)))


def _fid_extrapolated(sets: FeatureSets, value: float, error: Error) -> Extrapolated | None:
    reference = _moments(sets) if isinstance(sets.reference, Statistics) else _rows(sets)
    return extrapolated_frechet(sets.generated.features, reference, value, error)


def _moments(sets: FeatureSets) -> Moments:
    """The reference as a Gaussian."""
    given = sets.reference
    if not isinstance(given, Statistics):
        return Moments.of_rows(_rows(sets))
    return Moments.of_statistics(
        given.mu, given.sigma, given.rows.features if given.rows is not None else None, given.n
    )


def _kid(sets: FeatureSets) -> Scores:
    """Kernel Inception Distance (Bińkowski et al. 2018, Sec. 4), over subsets no larger than the smaller set."""
    generated, reference = sets.generated.features, _rows(sets)
    size = min(KID["subset_size"], len(generated), len(reference))
    mean, std = kid(generated, reference, subsets=KID["subsets"], subset_size=size, seed=KID["seed"])
    return Scores({"kid_mean": mean, "kid_std": std}, {"kid": {**KID, "kernel": KERNEL, "subset_size": size}})


def _kid_errors(sets: FeatureSets, values: dict[str, float]) -> dict[str, Error | None]:
    generated, reference = sets.generated.features, _rows(sets)
    size = min(KID["subset_size"], len(generated), len(reference))
    return {"kid_mean": kid_error(generated, reference, size, KID["subsets"], values["kid_std"])}


def _inception_score(sets: FeatureSets) -> Scores:
    """Inception Score (Salimans et al. 2016, Sec. 4); None for fewer images than splits."""
    mean = std = None
    warnings = []
    if not sets.generated.logits.shape[1]:
        warnings.append(f"no IS: {sets.extractor.title} has no classes")
    elif len(sets.generated) >= IS_SPLITS:
        mean, std = inception_score(sets.generated.logits, splits=IS_SPLITS)
    else:
        warnings.append(f"no IS: {len(sets.generated)} images for {IS_SPLITS} splits")
    protocol = {"is": {"splits": IS_SPLITS, "shuffle": True, "seed": 2020}}
    return Scores({"is_mean": mean, "is_std": std}, protocol, warnings)


def _inception_score_errors(sets: FeatureSets, values: dict[str, float]) -> dict[str, Error]:
    _, std = inception_score(sets.generated.logits, splits=IS_SPLITS)
    error = Error(std / math.sqrt(IS_SPLITS - 1), None, f"exact (t of {IS_SPLITS} splits)", IS_SPLITS - 1)
    return {"is_mean": error}


def _precision_recall(sets: FeatureSets) -> Scores:
    """Improved precision and recall (Kynkäänniemi et al. 2019, Eq. 1–2), in [0, 1]; None where a set is too small."""
    precision, recall = precision_recall(sets.generated.features, _rows(sets), NEIGHBOURS)
    few = [f"no precision and recall: a set has no more than {NEIGHBOURS} images"] if precision is None else []
    stated = {"k": NEIGHBOURS, "precision": "share of generated images inside balls of reference images"}
    return Scores({"precision": precision, "recall": recall}, {"pr": stated}, few)


def _precision_recall_errors(sets: FeatureSets, values: dict[str, float]) -> dict[str, Error]:
    return _by_halves(sets, NEIGHBOURS, precision_recall_errors, values, ("precision", "recall"))


def _by_halves(
    sets: FeatureSets, k: int, errors: Callable[..., Any], values: dict[str, float], names: tuple[str, str]
) -> dict[str, Error]:
    """Errors of metrics of neighbours; none where a half of a set has no k-th one."""
    generated, reference = sets.generated.features, _rows(sets)
    if min(len(generated), len(reference)) < 2 * k + 2:
        return {}
    return dict(zip(names, errors(generated, reference, (values[names[0]], values[names[1]]), k)))


def _mind(sets: FeatureSets) -> Scores:
    """MIND (arXiv 2605.06797): sliced Wasserstein distance; the larger set is cut to the size of the smaller one."""
    generated, reference = sets.generated.features, _rows(sets)
    value = mind(generated, reference, directions=MIND["directions"], seed=MIND["seed"])
    return Scores({"mind": value}, {"mind": {**MIND, "rows": min(len(generated), len(reference))}})


def _mind_errors(sets: FeatureSets, values: dict[str, float]) -> dict[str, Error | None]:
    return {"mind": mind_error(sets.generated.features, _rows(sets), MIND["directions"], MIND["seed"])}


def _density_coverage(sets: FeatureSets) -> Scores:
    """Density and coverage (Naeem et al. 2020, Eq. 4–5); None where a set is too small."""
    density, coverage = density_coverage(sets.generated.features, _rows(sets), NEAREST)
    few = [f"no density and coverage: a set has no more than {NEAREST} images"] if density is None else []
    stated = {"k": NEAREST, "balls": "of reference images, without their border"}
    return Scores({"density": density, "coverage": coverage}, {"dc": stated}, few)


def _density_coverage_errors(sets: FeatureSets, values: dict[str, float]) -> dict[str, Error]:
    return _by_halves(sets, NEAREST, density_coverage_errors, values, ("density", "coverage"))


def codebook_use(counts: np.ndarray | None) -> Scores:
    """Share of the codes (0 … 1) that stand in any latent, and the perplexity exp(-sum p log p) of how often each does,
    1 … codebook size; None for an autoencoder without a codebook."""
    if counts is None or not counts.sum():
        return Scores({"codebook_used": None, "codebook_perplexity": None})
    p = counts[counts > 0] / counts.sum()
    used, perplexity = float((counts > 0).mean()), float(np.exp(-(p * np.log(p)).sum()))
    return Scores({"codebook_used": used, "codebook_perplexity": perplexity}, {"codebook_size": len(counts)})


def _rows(sets: FeatureSets) -> np.ndarray:
    """Features of the reference, (N, D)."""
    rows = sets.reference.rows if isinstance(sets.reference, Statistics) else sets.reference
    if rows is None:
        raise InputError("this metric compares with a reference: its features are missing")
    return rows.features


def _of_each(function: Callable[[np.ndarray, np.ndarray], float]) -> Callable[[Images, Images], list[float]]:
    return lambda made, real: [function(a, b) for a, b in zip(made, real)]


def _lpips(made: Images, real: Images, net: Any) -> list[float]:
    """LPIPS (Zhang et al. 2018, Eq. 1) of each pair, at least 0."""
    return [value for block in in_blocks(zip(made, real), BLOCK) for value in _lpips_of_block(net, block)]


def _lpips_of_block(net: Any, pairs: list[tuple[np.ndarray, np.ndarray]]) -> list[float]:
    shapes = {image.shape for pair in pairs for image in pair}
    if any(a.dtype != np.uint8 or a.shape != b.shape for a, b in pairs):
        raise InputError(f"LPIPS: images of {sorted(shapes)}: need uint8 pairs of one size")
    if len(shapes) > 1:
        return [value for pair in pairs for value in _lpips_of_block(net, [pair])]
    device = next(net.buffers()).device
    x, y = (pixels_to_tensor(torch.from_numpy(np.stack(side)), device) for side in zip(*pairs))
    with torch.inference_mode(), exact_products():
        return net(x, y).flatten().tolist()


# --- the table -------------------------------------------------------------------------------------------------


def _fidelity(condition: str) -> Metric:
    """Whether samples show their condition; beside it, against the next row's, and of the rows' own pictures."""
    values = {name: label for name, label in LABELS.items() if name.startswith(f"{condition}_")}
    beside = {
        f"{name}_{ending}": f"{label}, {meaning}"
        for name, label in values.items()
        for ending, meaning in (("shuffled", "against the next condition"), ("real", "of real pictures"))
    }
    compute = partial(measure, condition)
    return Metric(needs=CONDITION, compute=compute, label=values, better="higher", beside=beside, condition=condition)


METRICS: dict[str, Metric] = {
    "fid": Metric(
        needs=STATISTICS,
        compute=_fid,
        label={"fid": "FID", "fd": "FD ({net})"},
        beside={
            "fid_extrapolated": "FID, of infinitely many images",
            "fd_extrapolated": "FD ({net}), of infinitely many images",
            "fid_low": "FID, low end of 95 %",
            "fid_high": "FID, high end of 95 %",
            "fd_low": "FD ({net}), low end of 95 %",
            "fd_high": "FD ({net}), high end of 95 %",
        },
        bounds=(0, math.inf),
        errors=_fid_errors,
        extrapolate=_fid_extrapolated,
        default_of=("model", "images", "autoencoder", "task"),
        titles={"fd": "Fréchet distance"},
    ),
    "kid": Metric(
        needs=FEATURES,
        compute=_kid,
        label={"kid_mean": "KID ({net})"},
        beside={"kid_std": "KID ({net}), deviation over subsets"},
        at_any_n=True,
        errors=_kid_errors,
        default_of=("model", "images"),
    ),
    "mind": Metric(
        needs=FEATURES,
        compute=_mind,
        label={"mind": "MIND ({net})"},
        default_of=("model", "images"),
        bounds=(0, math.inf),
        errors=_mind_errors,
    ),
    "is": Metric(
        needs=LOGITS,
        compute=_inception_score,
        label={"is_mean": "IS ({net})"},
        better="higher",
        beside={"is_std": "IS ({net}), deviation over splits"},
        bounds=(1, math.inf),
        errors=_inception_score_errors,
    ),
    "pr": Metric(
        needs=FEATURES,
        compute=_precision_recall,
        label={"precision": "precision ({net})", "recall": "recall ({net})"},
        better="higher",
        bounds=(0, 1),
        errors=_precision_recall_errors,
    ),
    "dc": Metric(
        needs=FEATURES,
        compute=_density_coverage,
        label={"density": "density ({net})", "coverage": "coverage ({net})"},
        better="higher",
        bounds=(0, math.inf),  # of coverage 1, as its interval knows
        errors=_density_coverage_errors,
    ),
    "psnr": Metric(
        needs=PAIRS,
        compute=_of_each(psnr),
        label="PSNR (dB)",
        better="higher",
        unit="dB",
        default_of=("pairs", "autoencoder", "task"),
    ),
    "ssim": Metric(
        needs=PAIRS,
        compute=_of_each(ssim),
        label="SSIM (Wang)",
        better="higher",
        bound="at most 1",
        bounds=(-1, 1),
        default_of=("pairs", "autoencoder", "task"),
    ),
    "lpips": Metric(needs=PERCEPTUAL, compute=_lpips, label="LPIPS ({net})", bounds=(0, math.inf)),
    "codebook": Metric(
        needs=CODES,
        compute=codebook_use,
        label={"codebook_used": "codes used (share)", "codebook_perplexity": "perplexity of codes"},
        better="higher",
        titles={"codebook": "codebook"},
    ),
    "novelty": Metric(
        needs=NOVELTY,
        compute=measure_novelty,
        label={"copied": "copied training pictures", "copied_features": "copied ({net})"},
        beside={
            "copied_low": "copied training pictures, low end of 95 %",
            "copied_high": "copied training pictures, high end of 95 %",
            "copied_held_out": "copied training pictures, of held-out ones",
        },
        titles={"copied": "Share that copies training pictures"},
    ),
    LAYOUT: _fidelity(LAYOUT),
    MAP: _fidelity(MAP),
}


# --- reading the table -----------------------------------------------------------------------------------------


def needing(names: Iterable[str], *needs: str) -> list[str]:
    """Those of the metrics that need one of these, in their order."""
    return [name for name in names if METRICS[name].needs in needs]


def first_words() -> dict[str, str]:
    """{first word of a key: metric}, of every number of the table: "kid", "precision", "fd"."""
    return {value.partition("_")[0]: name for name, metric in METRICS.items() for value in metric.labels(name)}


def report_title(key: str) -> tuple[str, Metric] | None:
    """(what a report calls a number, its metric) of a key, which may carry an extractor: "FD, effnet lite0"."""
    first, _, rest = key.partition("_")
    name = first_words().get(first)
    if name is None:
        return None
    metric = METRICS[name]
    values = metric.values(name)
    label = next(label for value, label in values.items() if value.partition("_")[0] == first)
    title = metric.titles.get(first, label.partition(" (")[0])
    return title + (f", {rest.replace('_', ' ')}" if rest else ""), metric


# --- image by image --------------------------------------------------------------------------------------------


def image_values(
    names: Iterable[str], made: Images, real: Images = (), perceptual: Any = None
) -> dict[str, list[float]]:
    """{metric: a value for each image, or pair of images} of metrics of `OF_EACH`.

    made, real: uint8 (H, W, 3), as many on both sides; of IMAGES real is not looked at.
    """
    arguments = {IMAGES: (made,), PAIRS: (made, real), PERCEPTUAL: (made, real, perceptual)}
    return {name: METRICS[name].compute(*arguments[METRICS[name].needs]) for name in names}


def finite_mean(values: Sequence[float], otherwise: float) -> float:
    """Mean of those that are finite: infinite PSNRs, of equal images, are left out."""
    finite = [value for value in values if math.isfinite(value)]
    return float(np.mean(finite)) if finite else otherwise


def reconstruction_metrics(
    real: np.ndarray, made: np.ndarray, perceptual: Any = None, extractor: Extractor | None = None
) -> dict[str, float]:
    """psnr (dB), ssim, and where their networks are given perceptual and a Fréchet distance under its own key.

    real, made: uint8 (N, H, W, 3). The measure of an autoencoder while it trains; SSIM needs 11 px a side.
    """
    names = ["psnr", *(["ssim"] if min(real.shape[1:3]) >= 11 else []), *(["lpips"] if perceptual is not None else [])]
    values = image_values(names, list(made), list(real), perceptual)
    out = {"psnr": finite_mean(values["psnr"], 100.0)}
    out |= {{"lpips": "perceptual"}.get(name, name): float(np.mean(values[name])) for name in names[1:]}
    if extractor is not None:
        features = [extractor.features(side) for side in (made, real)]
        out[extractor.metric_key] = frechet_from_features(*features)
    return out
