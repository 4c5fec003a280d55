"""Small pictures from large ones, for the training of super-resolution: bicubic, and blindly as LDM-BSR (App. D.6.1).

`DEGRADATIONS` holds the ways:

- "bicubic": reduced once by a cubic kernel (a = -0.5) widened by the scale, so that nothing aliases, with the border
  mirrored, as MATLAB's imresize does; the input of SR3 and of the paper's LDM-SR.
- "bsr": the degradation of BSRGAN (Zhang et al. 2021) in the order and with the numbers of the released code. At scale
  4 and 8 a quarter of the pictures is first halved, and the scale of what follows with it. Then come, in random order,
  two blurs, a reduction by a random factor, one to the final size (always after it), noise, and JPEG with probability
  0.9; JPEG once more ends it.
- "bsr-light": the same with one narrower blur, noise of 1 or 2 grey levels and JPEG of quality 80 and more.

Everything a picture goes through is drawn from its key. Pictures are float32 planes (3, H, W) in [0, 1] inside. The
reductions called linear, cubic (a = -0.75) and area do not widen their kernel, as OpenCV's resize does not.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO

import numpy as np
from PIL import Image
from scipy import fft

from ldmcli.core.errors import UsageError
from ldmcli.maths import rng

RESAMPLING = ("linear", "cubic", "area")
SHIFTED_KERNEL = 25  # pixels a side of the Gaussian before every s-th pixel is taken
HALVED = 0.25  # share of pictures that are halved before anything else
SOME_JPEG = 0.9  # probability of the JPEG in between
COLOURED, GREY = (
    0.4,
    0.4,
)  # shares of noise that is independent by channel, and the same for all; the rest is correlated


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """The numbers in which the blind degradations differ."""

    steps: tuple[str, ...]  # in any order, "fit" after "shrink"
    kernel_step: int  # a kernel's side is kernel_step times a whole number + 3
    narrower: float  # divides eigenvalues and deviations of blurs
    isotropic_sizes: tuple[int, int]  # that whole number, at least and at most, of round blurs; 2 … 11 of the others
    resized: float  # probability that "shrink" resizes by a random factor instead of taking every s-th pixel
    noise: tuple[int, int]  # grey levels of the deviation
    quality: tuple[int, int]  # of JPEG


BSR = Pipeline(
    steps=("blur", "blur", "shrink", "fit", "noise", "jpeg"),
    kernel_step=2,
    narrower=1.0,
    isotropic_sizes=(2, 11),
    resized=0.75,
    noise=(2, 25),
    quality=(30, 95),
)
BSR_LIGHT = Pipeline(
    steps=("blur", "shrink", "fit", "noise", "jpeg"),
    kernel_step=1,
    narrower=4.0,
    isotropic_sizes=(2, 4),
    resized=0.8,
    noise=(1, 2),
    quality=(80, 95),
)


def degrade(image: np.ndarray, scale: int, name: str, *key: *rng.Key) -> np.ndarray:
    """uint8 (H, W, 3) -> uint8 (H / scale, W / scale, 3): a function of picture, scale, name and key alone.

    scale: 2, 4 or 8; H and W are multiples of it. name: of `DEGRADATIONS`. key: a seed, then whatever names the draw
    (bicubic draws nothing). Raises UsageError for an unknown name, and for a size that the scale does not divide.
    """
    if name not in DEGRADATIONS:
        raise UsageError(f"--degradation {name}: choose among {', '.join(DEGRADATIONS)}")
    height, width = image.shape[:2]
    if height % scale or width % scale:
        raise UsageError(f"an image of {width}x{height} px at scale {scale}: both sides must be multiples of {scale}")
    planes = np.ascontiguousarray(image.transpose(2, 0, 1)).astype(np.float32) / 255
    return to_uint8(DEGRADATIONS[name](planes, scale, key))


def _bicubic(planes: np.ndarray, scale: int, key: rng.Key) -> np.ndarray:
    return resize(planes, planes.shape[1] // scale, planes.shape[2] // scale, "antialiased")


def _blind(pipeline: Pipeline) -> Callable[[np.ndarray, int, rng.Key], np.ndarray]:
    def apply(planes: np.ndarray, scale: int, key: rng.Key) -> np.ndarray:
        draw = np.random.Generator(np.random.PCG64(rng.key(*key)))
        if scale > 2 and draw.random() < HALVED:
            method = _method(draw) if draw.random() < 0.5 else "antialiased"
            planes = clipped(resize(planes, planes.shape[1] // 2, planes.shape[2] // 2, method))
            scale //= 2
        size = (planes.shape[1] // scale, planes.shape[2] // scale)
        for step in _order(pipeline.steps, draw):
            if step == "blur":
                planes = _blur(planes, scale, pipeline, draw)
            elif step == "shrink":
                planes = _shrink(planes, scale, pipeline, draw)
            elif step == "fit":
                planes = clipped(resize(planes, *size, _method(draw)))
            elif step == "noise":
                planes = add_noise(planes, pipeline.noise, draw)
            elif draw.random() < SOME_JPEG:
                planes = jpeg(planes, _whole(draw, *pipeline.quality))
        return jpeg(planes, _whole(draw, *pipeline.quality))

    return apply


DEGRADATIONS: dict[str, Callable[[np.ndarray, int, rng.Key], np.ndarray]] = {
    "bicubic": _bicubic,
    "bsr": _blind(BSR),
    "bsr-light": _blind(BSR_LIGHT),
}


# --- steps ---------------------------------------------------------------------------------------------------


def _order(steps: tuple[str, ...], draw: np.random.Generator) -> list[str]:
    order = [steps[k] for k in draw.permutation(len(steps))]
    first, second = sorted((order.index("shrink"), order.index("fit")))
    order[first], order[second] = "shrink", "fit"
    return order


def _whole(draw: np.random.Generator, low: int, high: int) -> int:
    return int(draw.integers(low, high, endpoint=True))


def _method(draw: np.random.Generator) -> str:
    return RESAMPLING[draw.integers(len(RESAMPLING))]


def _blur(planes: np.ndarray, scale: int, pipeline: Pipeline, draw: np.random.Generator) -> np.ndarray:
    """By a Gaussian, round or (as often) stretched in a random direction."""
    if draw.random() < 0.5:
        side = pipeline.kernel_step * _whole(draw, 2, 11) + 3
        eigenvalues = (4.0 + scale) / pipeline.narrower * draw.random(2)
        return convolve(planes, anisotropic_kernel(side, draw.random() * np.pi, *eigenvalues))
    side = pipeline.kernel_step * _whole(draw, *pipeline.isotropic_sizes) + 3
    kernel = gaussian_kernel(side, (2.0 + 0.2 * scale) / pipeline.narrower * draw.random())
    return separable(planes, *[blur_matrix(n, kernel) for n in planes.shape[1:]])


def _shrink(planes: np.ndarray, scale: int, pipeline: Pipeline, draw: np.random.Generator) -> np.ndarray:
    """By a factor between 1 and twice the scale, or by the scale: blurred, then the middle of each s x s block."""
    if draw.random() < pipeline.resized:
        factor = draw.uniform(1, 2 * scale)
        height, width = (max(int(n / factor), 1) for n in planes.shape[1:])
        return clipped(resize(planes, height, width, _method(draw)))
    kernel = shifted(gaussian_kernel(SHIFTED_KERNEL, draw.uniform(0.1, 0.6 * scale)), (scale - 1) / 2)
    return clipped(separable(planes, *[blur_matrix(n, kernel)[::scale] for n in planes.shape[1:]]))


def add_noise(planes: np.ndarray, levels: tuple[int, int], draw: np.random.Generator) -> np.ndarray:
    """Planes (3, H, W) in [0, 1] with Gaussian noise, clipped to [0, 1].

    40 % have noise for each channel, 40 % the same in all, of a deviation that is a whole number of grey levels in
    `levels`; 20 % correlated between channels, of covariance |L^2 Q^T diag(u) Q| with L the highest level, Q orthogonal
    and u uniform in [0, 1].
    """
    level, u = _whole(draw, *levels) / 255, draw.random()
    shape = planes.shape
    if u < GREY:
        noise = draw.standard_normal((1, *shape[1:]), np.float32) * np.float32(level)
    elif u >= 1 - COLOURED:
        noise = draw.standard_normal(shape, np.float32) * np.float32(level)
    else:
        basis = np.linalg.svd(draw.random((3, 3)))[0]
        covariance = np.abs((levels[1] / 255) ** 2 * basis.T @ np.diag(draw.random(3)) @ basis)
        values, vectors = np.linalg.eigh(covariance)
        mixing = (vectors * np.sqrt(np.maximum(values, 0))).astype(np.float32)
        noise = (mixing @ draw.standard_normal((3, shape[1] * shape[2]), np.float32)).reshape(shape)
    return clipped(planes + noise)


def jpeg(planes: np.ndarray, quality: int) -> np.ndarray:
    """Planes (3, H, W) in [0, 1] through a JPEG file of `quality` 1 … 100 (colour halved both ways) and back."""
    file = BytesIO()
    Image.fromarray(to_uint8(planes)).save(file, "JPEG", quality=quality)
    with Image.open(file) as image:
        return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1)).astype(np.float32) / 255


def clipped(planes: np.ndarray) -> np.ndarray:
    """Planes of any shape and range, cut to [0, 1]."""
    return np.clip(planes, 0.0, 1.0)


def to_uint8(planes: np.ndarray) -> np.ndarray:
    """Planes (3, H, W) in [0, 1] -> uint8 (H, W, 3), clipped and rounded."""
    return np.ascontiguousarray((clipped(planes) * 255).round().astype(np.uint8).transpose(1, 2, 0))


# --- kernels -------------------------------------------------------------------------------------------------


def gaussian_kernel(size: int, sigma: float) -> np.ndarray:
    """(size,) weights of sum 1; the round kernel of two dimensions is the outer product of it with itself."""
    x = np.arange(size) - (size - 1) / 2
    return _of_exponents(-(x**2) / (2 * max(sigma, 1e-4) ** 2))


def anisotropic_kernel(size: int, theta: float, l1: float, l2: float) -> np.ndarray:
    """(size, size) weights of sum 1: a Gaussian whose covariance has eigenvalue l1 (pixels^2) in the direction theta
    (radians, from x towards +y, which points down) and l2 across it."""
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    along, across = x * np.cos(theta) + y * np.sin(theta), y * np.cos(theta) - x * np.sin(theta)
    return _of_exponents(-(along**2) / (2 * max(l1, 1e-4)) - across**2 / (2 * max(l2, 1e-4)))


def _of_exponents(exponents: np.ndarray) -> np.ndarray:
    weights = np.exp(exponents - exponents.max())  # the largest is 1: narrow kernels do not vanish
    return weights / weights.sum()


def shifted(kernel: np.ndarray, by: float) -> np.ndarray:
    """A kernel (k,) of one dimension moved `by` positions towards its start, linearly interpolated; sum 1."""
    found = np.interp(np.minimum(np.arange(len(kernel)) + by, len(kernel) - 1), np.arange(len(kernel)), kernel)
    return found / found.sum()


# --- linear maps ---------------------------------------------------------------------------------------------


def separable(planes: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Planes (c, H, W) under weight matrices (h, H) and (w, W): (c, h, w) float32."""
    return rows @ planes @ columns.T


def blur_matrix(n: int, kernel: np.ndarray) -> np.ndarray:
    """(n, n): convolution with a kernel (k,), position i reading i + k // 2 - tap, mirrored at the first and last
    position (which stand once)."""
    i = np.arange(n)[:, None]
    return _scatter(n, _mirrored(i + len(kernel) // 2 - np.arange(len(kernel)), n), np.tile(kernel, (n, 1)))


def convolve(planes: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Planes (c, H, W) with a square kernel (k, k), borders as `blur_matrix`: (c, H, W) float32."""
    height, width, k = *planes.shape[1:], len(kernel)
    before, after = k - 1 - k // 2, k // 2
    rows, columns = (_mirrored(np.arange(-before, n + after), n) for n in (height, width))
    padded = planes[:, rows][:, :, columns]
    shape = [fft.next_fast_len(n, real=True) for n in padded.shape[1:]]
    product = fft.rfft2(padded, shape) * fft.rfft2(kernel.astype(np.float32), shape)
    return fft.irfft2(product, shape)[:, k - 1 : k - 1 + height, k - 1 : k - 1 + width].astype(np.float32)


def resize(planes: np.ndarray, height: int, width: int, method: str) -> np.ndarray:
    """Planes (c, H, W) at another size, (c, height, width) float32, not clipped.

    method: "antialiased" (cubic, widened), or one of `RESAMPLING`.
    """
    sizes = list(zip(planes.shape[1:], (height, width)))
    if method == "area" and any(n < m for n, m in sizes):
        method = "area enlarged"  # where one side grows, both are interpolated
    return separable(planes, *[resize_matrix(n, m, method) for n, m in sizes])


@lru_cache(maxsize=32)
def resize_matrix(n: int, m: int, method: str) -> np.ndarray:
    """(m, n) float32 weights that make m positions of n. Rows sum to 1."""
    centre = (np.arange(m) + 0.5) * n / m - 0.5
    if method == "area":
        edges = np.arange(m + 1) * n / m
        j = np.arange(n)
        overlap = np.minimum(edges[1:, None], j + 1) - np.maximum(edges[:-1, None], j)
        return (np.maximum(overlap, 0) * m / n).astype(np.float32)
    if method == "area enlarged":
        first = np.floor(np.arange(m) * n / m)
        share = np.arange(1, m + 1) - (first + 1) * m / n
        centre = first + np.where(share <= 0, 0, share - np.floor(share))
    a, widen, support = {
        "linear": (0.0, 1.0, 1),
        "area enlarged": (0.0, 1.0, 1),
        "cubic": (-0.75, 1.0, 2),
        "antialiased": (-0.5, max(n / m, 1.0), 2),
    }[method]
    reach = int(np.ceil(support * widen))
    taps = np.floor(centre).astype(int)[:, None] + np.arange(1 - reach, reach + 1)
    distance = np.abs(centre[:, None] - taps) / widen
    weights = _cubic(distance, a) if support == 2 else np.maximum(1 - distance, 0)
    weights /= weights.sum(1, keepdims=True)
    return _scatter(n, _reflected(taps, n) if method == "antialiased" else np.clip(taps, 0, n - 1), weights)


def _cubic(d: np.ndarray, a: float) -> np.ndarray:
    """The cubic convolution kernel (Keys 1981) at distances d >= 0."""
    near = (a + 2) * d**3 - (a + 3) * d**2 + 1
    far = a * (d**3 - 5 * d**2 + 8 * d - 4)
    return np.where(d <= 1, near, np.where(d < 2, far, 0.0))


def _scatter(n: int, taps: np.ndarray, weights: np.ndarray) -> np.ndarray:
    matrix = np.zeros((len(taps), n), np.float32)
    np.add.at(matrix, (np.arange(len(taps))[:, None], taps), weights)
    return matrix


def _mirrored(index: np.ndarray, n: int) -> np.ndarray:
    """Indices folded into 0 … n - 1; the end positions stand once: … 2 1 0 1 2 …"""
    if n == 1:
        return np.zeros_like(index)
    folded = index % (2 * n - 2)
    return np.minimum(folded, 2 * n - 2 - folded)


def _reflected(index: np.ndarray, n: int) -> np.ndarray:
    """Indices folded into 0 … n - 1; the end positions stand twice: … 1 0 0 1 …"""
    folded = index % (2 * n)
    return np.minimum(folded, 2 * n - 1 - folded)
