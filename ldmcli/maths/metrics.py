"""Numerics of the metrics, in float64: Fréchet distance, Inception Score, PSNR, SSIM, and all of features in one call.

Features come from elsewhere; nothing here knows an extractor. `generated` always stands before `reference`. KID is in
`kernel_distance`, MIND in `mind`, metrics of neighbours in `neighbour_metrics`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, log10
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.ndimage import correlate1d

from ldmcli.core.errors import InputError, UsageError
from ldmcli.maths.feature_rows import Array, mean_of, need_two, numbers, pair_of, rows_of, tiles
from ldmcli.maths.kernel_distance import kid
from ldmcli.maths.mind import mind
from ldmcli.maths.neighbour_metrics import density_coverage, precision_recall

FEATURE_METRICS = ("fid", "kid", "pr", "is", "mind", "dc")  # of features alone, as `metrics_from_features` takes them


@dataclass
class Gaussian:
    """Mean and covariance of rows that arrive in batches, merged by (n, mean, M2) in float64 (Chan et al. 1979).

    mean: (D,); m2: (D, D), the sum of outer products of deviations. Sums of squares would lose the covariance of
    features with a large mean.
    """

    n: int
    mean: Array
    m2: Array

    @classmethod
    def empty(cls, dimensions: int) -> "Gaussian":
        return cls(0, np.zeros(dimensions), np.zeros((dimensions, dimensions)))

    def update(self, features: ArrayLike) -> None:
        """Adds rows, (B, D), any B."""
        rows = rows_of(features, "batch of").astype(np.float64, copy=False)
        if rows.shape[1] != len(self.mean):
            raise InputError(f"features have {rows.shape[1]} dimensions, those before {len(self.mean)}")
        if len(rows):
            mean = rows.mean(axis=0)
            centred = rows - mean
            self.merge(Gaussian(len(rows), mean, centred.T @ centred))

    def merge(self, other: "Gaussian") -> None:
        """Adds what another one has seen, as from another process."""
        n = self.n + other.n
        if n == 0:
            return
        delta = other.mean - self.mean
        self.m2 = self.m2 + other.m2 + np.outer(delta, delta) * (self.n * other.n / n)
        self.mean = self.mean + delta * (other.n / n)
        self.n = n

    @property
    def covariance(self) -> Array:
        """(D, D) with divisor n − 1; InputError below two rows."""
        need_two(self.n, "this set")
        return self.m2 / (self.n - 1)


def factor_of(sigma: Array) -> Array:
    """F with F Fᵀ = Σ, (D, rank). Eigenvalues that are rounding noise are dropped: their roots would not be small."""
    values, vectors = np.linalg.eigh((sigma + sigma.T) / 2)
    kept = values > len(sigma) * np.finfo(np.float64).eps * max(values[-1], 0.0)
    return vectors[:, kept] * np.sqrt(values[kept])


def frechet_of(mu1: Array, factor1: Array, mu2: Array, factor2: Array) -> float:
    """Fréchet distance of means (D,) and factors of covariances, F Fᵀ = Σ."""
    return _frechet(mu1, mu2, factor1, factor2, float((factor1**2).sum() + (factor2**2).sum()))


def _frechet(mu1: Array, mu2: Array, factor1: Array, factor2: Array, traces: float) -> float:
    # tr (Σ₁Σ₂)^½ is the sum of the singular values of F₁ᵀF₂.
    product = factor1.T @ factor2
    cross = np.linalg.svd(product, compute_uv=False).sum() if product.size else 0.0
    return float((mu1 - mu2) @ (mu1 - mu2) + traces - 2 * cross)


def frechet(mu1: ArrayLike, sigma1: ArrayLike, mu2: ArrayLike, sigma2: ArrayLike) -> float:
    """Fréchet distance ‖μ₁−μ₂‖² + tr Σ₁ + tr Σ₂ − 2 tr (Σ₁Σ₂)^½ of two Gaussians (Heusel et al. 2017, Eq. 6).

    mu: (D,), sigma: (D, D). Raises InputError for other shapes, NaN and Inf.

    Not clamped: equal Gaussians give ±1e-14 or so. Exact to rounding for singular covariances, too.
    """
    mu1, mu2 = numbers(mu1, "mu1"), numbers(mu2, "mu2")
    sigma1, sigma2 = numbers(sigma1, "sigma1"), numbers(sigma2, "sigma2")
    shapes = [mu1.shape, mu2.shape, sigma1.shape, sigma2.shape]
    d = mu1.shape[0] if mu1.ndim else 0
    if shapes != [(d,), (d,), (d, d), (d, d)] or d == 0:
        raise InputError(f"means and covariances of shapes {shapes}: need (D,), (D,), (D, D), (D, D)")
    if not all(np.isfinite(array).all() for array in (mu1, mu2, sigma1, sigma2)):
        raise InputError("means or covariances hold NaN or Inf")
    return _frechet(mu1, mu2, factor_of(sigma1), factor_of(sigma2), np.trace(sigma1) + np.trace(sigma2))


def centred_factor(rows: Array) -> tuple[Array, Array, float]:
    """Mean, F with F Fᵀ = Σ, tr Σ. With fewer rows than dimensions the centred rows are F: no Σ is formed."""
    mean, scale = mean_of(rows), np.sqrt(len(rows) - 1)
    if len(rows) <= rows.shape[1]:
        scaled = (rows - mean) / scale
        return mean, scaled.T, float((scaled**2).sum())
    sigma = np.zeros((rows.shape[1], rows.shape[1]))
    for part in tiles(len(rows)):
        scaled = (rows[part] - mean) / scale
        sigma += scaled.T @ scaled
    return mean, factor_of(sigma), float(np.trace(sigma))


def frechet_from_features(generated: ArrayLike, reference: ArrayLike) -> float:
    """Fréchet distance of the Gaussians fitted to two sets of features, (N, D) each; InputError below two rows."""
    a, b = pair_of(generated, reference)
    need_two(len(a), "the generated set")
    need_two(len(b), "the reference set")
    mu1, factor1, trace1 = centred_factor(a)
    mu2, factor2, trace2 = centred_factor(b)
    return _frechet(mu1, mu2, factor1, factor2, trace1 + trace2)


def inception_score(
    logits: ArrayLike, *, splits: int = 10, shuffle: bool = True, seed: int = 2020
) -> tuple[float, float]:
    """Inception Score (Salimans et al. 2016): mean and population deviation over splits of exp E[KL(p(y|x) ‖ p(y))],
    at least 1 and at most the number of classes.

    logits: (N, classes). Rows are shuffled by RandomState(seed); split i is rows ⌊iN/splits⌋ … (torch-fidelity).
    """
    rows = rows_of(logits, "logit").astype(np.float64, copy=False)
    n = len(rows)
    if n < splits:
        raise InputError(f"Inception Score in {splits} splits: there are only {n} images")
    if shuffle:
        rows = rows[np.random.RandomState(seed).permutation(n)]
    shifted = rows - rows.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    p = np.exp(log_p)
    scores = []
    for i in range(splits):
        part = slice(i * n // splits, (i + 1) * n // splits)
        marginal = p[part].mean(axis=0)
        # a class whose probability underflows everywhere adds 0, not 0 · −∞
        log_marginal = np.log(marginal, out=np.zeros_like(marginal), where=marginal > 0)
        scores.append(np.exp((p[part] * (log_p[part] - log_marginal)).sum(axis=1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def metrics_from_features(
    generated: ArrayLike,
    reference: ArrayLike | None = None,
    metrics: Sequence[str] | None = None,
    *,
    logits: ArrayLike | None = None,
    kid_subsets: int = 100,
    kid_subset_size: int = 1000,
    mind_directions: int = 1000,
    seed: int = 2020,
) -> dict[str, float | None]:
    """Metrics of (N, D) feature arrays, in float64: fid, kid_mean, kid_std, precision, recall, is_mean, is_std, mind,
    density, coverage.

    metrics: of "fid", "kid", "pr", "is", "mind", "dc"; None = all, "is" only where its `logits` (N, classes) of the
    generated images are given. precision and recall are None when a set has three images or fewer, density and coverage
    when one has five or fewer. float32 arrays, also memory-mapped ones, are read block by block.
    """
    if metrics is None:
        metrics = [name for name in FEATURE_METRICS if name != "is" or logits is not None]
    unknown = [name for name in metrics if name not in FEATURE_METRICS]
    if unknown:
        raise UsageError(f"no metric {unknown[0]!r}: choose among {', '.join(FEATURE_METRICS)}")
    of_pairs = [name for name in metrics if name != "is"]
    values: dict[str, float | None] = {}
    if of_pairs:
        if reference is None:
            raise InputError(f"{', '.join(of_pairs)}: compared with a reference, whose features are missing")
        if "fid" in metrics:
            values["fid"] = frechet_from_features(generated, reference)
        if "kid" in metrics:
            values["kid_mean"], values["kid_std"] = kid(
                generated, reference, subsets=kid_subsets, subset_size=kid_subset_size, seed=seed
            )
        if "pr" in metrics:
            values["precision"], values["recall"] = precision_recall(generated, reference)
    if "is" in metrics:
        if logits is None:
            raise InputError("the Inception Score needs logits of the generated images")
        values["is_mean"], values["is_std"] = inception_score(logits, seed=seed)
    if "mind" in metrics and reference is not None:
        values["mind"] = mind(generated, reference, directions=mind_directions, seed=seed)
    if "dc" in metrics and reference is not None:
        values["density"], values["coverage"] = density_coverage(generated, reference)
    return values


def _as_bytes(image: Array) -> Array:
    """Whole numbers that are all 0 … 255 as uint8; other arrays as they are."""
    whole = np.issubdtype(image.dtype, np.integer) and image.size and image.min() >= 0 and image.max() <= 255
    return image.astype(np.uint8) if whole else image


def _images(a: ArrayLike, b: ArrayLike) -> tuple[Array, Array]:
    first, second = (_as_bytes(numbers(image, "an image", None)) for image in (a, b))
    for image in (first, second):
        if image.dtype != np.uint8 or image.ndim != 3 or image.size == 0:
            raise InputError(f"an image of shape {image.shape} and type {image.dtype}: need uint8 (H, W, C)")
    if first.shape != second.shape:
        raise InputError(f"images of shapes {first.shape} and {second.shape}: need the same size")
    return first.astype(np.float64), second.astype(np.float64)


def psnr(a: ArrayLike, b: ArrayLike) -> float:
    """Peak signal-to-noise ratio 10 log₁₀(255² / MSE) of two uint8 (H, W, C) images, in dB; inf for equal images."""
    x, y = _images(a, b)
    mse = float(((x - y) ** 2).mean())
    return 10 * log10(255**2 / mse) if mse > 0 else inf


def ssim(a: ArrayLike, b: ArrayLike) -> float:
    """Structural similarity of two uint8 (H, W, C) images (Wang et al. 2004, Eq. 13), in [−1, 1].

    Gaussian window of 11 × 11, σ 1.5, divisor N; only positions that the window covers fully; mean over positions
    and channels. InputError below 11 × 11 pixels.
    """
    x, y = _images(a, b)
    if min(x.shape[:2]) < 11:
        raise InputError(f"SSIM needs images of at least 11 x 11 pixels, these have {x.shape[1]} x {x.shape[0]}")
    taps = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    taps /= taps.sum()

    def blur(image: Array) -> Array:
        return correlate1d(correlate1d(image, taps, axis=0), taps, axis=1)[5:-5, 5:-5]

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    similarity /= (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    return float(similarity.mean())


def image_metrics(a: ArrayLike, b: ArrayLike) -> dict[str, Any]:
    """{"psnr": dB, inf for equal images; "ssim": the Wang form} of two uint8 (H, W, C) images."""
    return {"psnr": psnr(a, b), "ssim": ssim(a, b)}
