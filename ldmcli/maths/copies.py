"""Whether one picture is a copy of another, and what share of pictures are copies.

Pictures are compared after alignment: mirrored or not, and shifted by a few pixels, over what both then show. What is
left is measured in means over a 16 x 16 grid of brightness and 8 x 8 of colour, which compression hardly changes, and
in relation to the picture's own contrast on that grid, so that flat or blurred pictures are no nearer to anything.
"""

import io
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.special import betaincinv

WORKING_SIDE = 128  # px; larger pictures are compared reduced
THUMBNAIL = 32  # px, of the first alignment
COARSE = 8  # px a side: what candidates are looked up by
REACH = 3  # px, shift either way
GRIDS = (16, 8)  # a side, of brightness and of colour
QUALITIES = range(50, 96)  # of JPEG, whose marks a copy may have
FAINT = 16.0  # grey levels of contrast that are added to a picture's own
CALIBRATION = 0.02  # share of held-out pictures that may be nearer than the threshold
LEVEL = 0.95
QUANTILES = 400  # points a side of the distribution that an interval is read from

_YCC = np.array([[0.299, 0.587, 0.114], [-0.169, -0.331, 0.5], [0.5, -0.419, -0.081]])


# --- pictures --------------------------------------------------------------------------------------------------


def mirrored(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) left to right."""
    return np.ascontiguousarray(image[:, ::-1])


def reduced(image: np.ndarray, side: int) -> np.ndarray:
    """uint8 (side, side, 3), means of areas."""
    return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BOX))


def working(image: np.ndarray) -> np.ndarray:
    """A uint8 picture (H, W, 3) at the size in which it is compared: no side above 128 px."""
    factor = -(-max(image.shape[:2]) // WORKING_SIDE)
    return image if factor == 1 else np.asarray(Image.fromarray(image).reduce(factor))


def coarse(image: np.ndarray) -> np.ndarray:
    """(192,) float32: a uint8 picture in 8 x 8 means."""
    return reduced(image, COARSE).astype(np.float32).ravel()


def moved(image: np.ndarray, mirror: bool, dy: int, dx: int) -> np.ndarray:
    """A picture shifted down by dy and right by dx, then mirrored; its edges repeat."""
    height, width = image.shape[:2]
    rows = np.clip(np.arange(height) - dy, 0, height - 1)
    columns = np.clip(np.arange(width) - dx, 0, width - 1)
    found = image[rows[:, None], columns]
    return mirrored(found) if mirror else found


def as_jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    """A uint8 picture through a JPEG file of `quality` 1 … 100 and back, colour halved both ways."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


# --- distances -------------------------------------------------------------------------------------------------


def reach_of(size: tuple[int, int]) -> int:
    """How far pictures of (height, width) are shifted, in px."""
    return min(REACH, min(size) // 8)


def shifted_errors(image: np.ndarray, others: np.ndarray, reach: int) -> np.ndarray:
    """(n, 2, 2·reach + 1, 2·reach + 1) mean squared errors of a picture (H, W, 3) against each of `others` (n, H, W, 3)
    over what both show: others as they are and mirrored, by (shift down, shift right) from -reach on of `image`."""
    whole = torch.from_numpy(image.astype(np.float32) - 128).permute(2, 0, 1)[None]
    inner = np.stack([others, others[:, :, ::-1]], 1).astype(np.float32) - 128
    height, width = image.shape[0] - 2 * reach, image.shape[1] - 2 * reach
    inner = inner[:, :, reach : reach + height, reach : reach + width]
    kernels = torch.from_numpy(inner).flatten(0, 1).permute(0, 3, 1, 2).contiguous()
    cross = F.conv2d(whole, kernels)[0]
    squares = F.conv2d(whole.square().sum(1, keepdim=True), torch.ones(1, 1, height, width))[0]
    errors = (squares + kernels.square().sum((1, 2, 3))[:, None, None] - 2 * cross) / kernels[0].numel()
    # windows are counted from the top left; the one at (0, 0) shows the picture shifted down and right by `reach`
    return errors.flip(1, 2).clamp(min=0).reshape(len(others), 2, 2 * reach + 1, 2 * reach + 1).numpy()


def best_move(errors: np.ndarray) -> tuple[bool, int, int]:
    """(mirrored, shift down, shift right) of the least of the errors (2, 2·reach + 1, 2·reach + 1)."""
    mirror, y, x = np.unravel_index(int(errors.argmin()), errors.shape)
    reach = errors.shape[1] // 2
    return bool(mirror), int(y) - reach, int(x) - reach


def _grid_means(values: np.ndarray) -> list[np.ndarray]:
    """Means of (H, W, 3) differences or grey levels over the grids: brightness, and two planes of colour."""
    planes = torch.from_numpy((values.astype(np.float64) @ _YCC.T).transpose(2, 0, 1))
    sides = (GRIDS[0], GRIDS[1], GRIDS[1])
    return [F.adaptive_avg_pool2d(plane[None], side)[0].numpy() for plane, side in zip(planes, sides)]


def grid_distance(a: np.ndarray, b: np.ndarray, border: int) -> float:
    """Root of the summed mean squares of what differs between two aligned pictures (H, W, 3) on the grids, in grey
    levels; the outer `border` px do not count."""
    difference = a.astype(np.float64) - b
    inside = np.zeros(a.shape[:2], bool)
    inside[border : a.shape[0] - border, border : a.shape[1] - border] = True
    return float(np.sqrt(sum(np.square(plane).mean() for plane in _grid_means(difference * inside[..., None]))))


def contrast(image: np.ndarray) -> float:
    """Root of the summed variances of a picture on the grids, in grey levels."""
    return float(np.sqrt(sum(plane.var() for plane in _grid_means(image))))


def copy_distance(image: np.ndarray, row: np.ndarray) -> float:
    """How far a picture is from being a copy of `row`, both uint8 of one size: the distance of the aligned pictures on
    the grids, where `row` may have been through a JPEG file of quality 50 … 95, over the picture's contrast
    (+ 16 grey levels). 0 = a copy."""
    reach = reach_of(image.shape[:2])
    aligned = moved(row, *best_move_for(image, row, reach))
    found = grid_distance(image, aligned, reach)
    harmed = grid_distance(aligned, as_jpeg(aligned, QUALITIES[0]), reach)
    if harmed / 16 < found <= 2 * harmed:  # a picture that differs by more was no worse a JPEG file of it
        found = min(found, _jpeg_distance(image, aligned, reach, found))
    return found / (contrast(image) + FAINT)


def aligned_distance(image: np.ndarray, row: np.ndarray) -> tuple[float, tuple[bool, int, int]]:
    """`copy_distance` without the search for a JPEG file, a hundredth of the work, and the move of `row` (mirrored,
    down, right) that aligns it with `image`."""
    reach = reach_of(image.shape[:2])
    move = best_move_for(image, row, reach)
    return grid_distance(image, moved(row, *move), reach) / (contrast(image) + FAINT), move


def best_move_for(image: np.ndarray, row: np.ndarray, reach: int) -> tuple[bool, int, int]:
    """The move of `row` by which it comes nearest to `image`."""
    mirror, dy, dx = best_move(shifted_errors(row, image[None], reach)[0])
    return mirror, dy, dx


def _jpeg_distance(image: np.ndarray, aligned: np.ndarray, border: int, without: float) -> float:
    """The distance to the JPEG file that is nearest, of all qualities where some of them are nearer than the picture
    `without`: those of a picture that is no such file are not."""

    def nearest(qualities: range) -> float:
        return min(grid_distance(image, as_jpeg(aligned, quality), border) for quality in qualities)

    few = nearest(QUALITIES[::6])
    return nearest(QUALITIES) if few < 0.75 * without else few


# --- shares ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Threshold:
    """Below `value` a distance is that of a copy: the `rank`-th least distance of `n` held-out pictures.

    Whatever their distribution, the share of such pictures below it is distributed as Beta(rank, n + 1 - rank).
    """

    value: float
    rank: int
    n: int

    @property
    def false_share(self) -> float:
        """The expected share of pictures below it that are no copies."""
        return self.rank / (self.n + 1)


def threshold(held_out: np.ndarray, share: float = CALIBRATION) -> Threshold:
    """The threshold that about `share` of held-out pictures, whose distances these are (n ≥ 1), are below; more where
    so many of them are copies themselves, so that copies are below it, too."""
    n, copies = len(held_out), int((held_out == 0).sum())
    rank = min(max(1, round(share * n), copies + 1), n)
    return Threshold(float(np.sort(held_out)[rank - 1]), rank, n)


def copied_share(distances: np.ndarray, limit: Threshold) -> tuple[float, tuple[float, float]]:
    """(share of copies, its 95 % interval), both in [0, 1], of pictures with these distances (n ≥ 1).

    Of F below the threshold, where a share φ of what is no copy is by chance, (F - φ) / (1 - φ) are copies. The
    interval takes in the chance in both: F by Clopper and Pearson's distributions, φ by that of the order statistic.
    """
    below, n = int((distances < limit.value).sum()), len(distances)
    value = (below / n - limit.false_share) / (1 - limit.false_share)
    points = (np.arange(QUANTILES) + 0.5) / QUANTILES
    phi = betaincinv(limit.rank, limit.n + 1 - limit.rank, points)[:, None]
    low = betaincinv(below, n - below + 1, points) if below else np.zeros(QUANTILES)
    high = betaincinv(below + 1, n - below, points) if below < n else np.ones(QUANTILES)
    tail = (1 - LEVEL) / 2
    bounds = [np.quantile((one[None] - phi) / (1 - phi), share) for one, share in ((low, tail), (high, 1 - tail))]
    return min(max(value, 0.0), 1.0), (min(max(float(bounds[0]), 0.0), 1.0), min(max(float(bounds[1]), 0.0), 1.0))
