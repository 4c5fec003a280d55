"""The outlines of the embedded shapes as signed distances, and the share of each pixel that they cover.

A distance is in units of the shape's half extent: u to the right, v down, negative inside.
"""

from functools import cache

import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "ring", "heart", "cross")
_TRIANGLE_INRADIUS = 0.577
_STAR_TIP, _STAR_NOTCH = 1.05, 0.48  # radii of the outer and inner corners
_HEART_SIDE = 0.586  # half side of the square inside; also the radius of the two discs
_CROSS_ARM = 0.34
_ROOT_HALF = float(np.sqrt(0.5))


def _circle(u, v):
    return np.sqrt(u * u + v * v) - 1.0


def _square(u, v):
    return np.maximum(np.abs(u), np.abs(v)) - 0.88


def _triangle(u, v):
    v = v - _TRIANGLE_INRADIUS / 2
    return np.maximum(v, np.abs(u) * 0.8660254 - v * 0.5) - _TRIANGLE_INRADIUS


def _star(u, v):
    """Folded by its symmetry onto one straight edge, from a tip (angle 0) to a notch (angle 36 degrees)."""
    v = v - 0.1
    sector = 2 * np.pi / 5
    radius, angle = np.sqrt(u * u + v * v), np.arctan2(u, -v)
    angle = np.abs(angle - sector * np.round(angle / sector))
    notch_x, notch_y = _STAR_NOTCH * np.cos(sector / 2), _STAR_NOTCH * np.sin(sector / 2)
    length = np.hypot(_STAR_TIP - notch_x, notch_y)
    normal_x, normal_y = notch_y / length, (_STAR_TIP - notch_x) / length
    return radius * (normal_x * np.cos(angle) + normal_y * np.sin(angle)) - _STAR_TIP * normal_x


def _ring(u, v):
    return np.abs(np.sqrt(u * u + v * v) - 0.75) - 0.25


def _heart(u, v):
    """A square on its corner with a disc on each of the two upper sides."""
    u, v = np.abs(u) * _ROOT_HALF, (v - 0.086) * _ROOT_HALF
    s, t = u + v, u - v
    square = np.maximum(np.abs(s), np.abs(t))
    t = t - _HEART_SIDE
    return np.minimum(square, np.sqrt(s * s + t * t)) - _HEART_SIDE


def _cross(u, v):
    a, b = np.abs(u), np.abs(v)
    return np.minimum(np.maximum(a - _CROSS_ARM, b - 1), np.maximum(a - 1, b - _CROSS_ARM))


_DISTANCES = dict(zip(SHAPES, (_circle, _square, _triangle, _star, _ring, _heart, _cross)))
EXTENTS = {  # left, top, right, bottom in units of the half extent
    "circle": (-1, -1, 1, 1),
    "square": (-0.88, -0.88, 0.88, 0.88),
    "triangle": (-1, -1.5 * _TRIANGLE_INRADIUS, 1, 1.5 * _TRIANGLE_INRADIUS),
    "star": (-0.9986, -0.95, 0.9986, 0.9495),
    "ring": (-1, -1, 1, 1),
    "heart": (-1, -0.9144, 1, 0.9147),
    "cross": (-1, -1, 1, 1),
}


def coverage(shape: int, x: float, y: float, radius: float, window: tuple[slice, slice]) -> np.ndarray:
    """Share of each pixel of `window` that the shape covers: float32 (h, w) in [0, 1]. x, y, radius in pixels."""
    rows, columns = window
    u = ((np.arange(columns.start, columns.stop, dtype=np.float32) + 0.5 - x) / radius)[None, :]
    v = ((np.arange(rows.start, rows.stop, dtype=np.float32) + 0.5 - y) / radius)[:, None]
    return np.clip(0.5 - _DISTANCES[SHAPES[shape]](u, v) * radius, 0.0, 1.0)


@cache
def template(shape: int) -> tuple[float, float, float]:
    """Area and centroid (x, y) of a shape of half extent 1."""
    alpha = coverage(shape, 150.0, 150.0, 100.0, (slice(0, 300), slice(0, 300)))
    grid = (np.arange(300) + 0.5 - 150) / 100
    area = float(alpha.sum())
    return area / 1e4, float((alpha.sum(0) * grid).sum() / area), float((alpha.sum(1) * grid).sum() / area)
