"""Copies are found in whatever form, other pictures are not, and the share has the chance of both sides in it."""

import numpy as np
import pytest
from scipy import ndimage

from ldmcli.maths import copies


def picture(seed: int, size: int = 48) -> np.ndarray:
    """Soft coloured noise of full contrast, unlike that of any other seed."""
    noise = np.random.default_rng(seed).normal(size=(size, size, 3))
    soft = ndimage.gaussian_filter(noise, (3, 3, 0))
    return np.clip(128 + 60 * soft / soft.std(), 0, 255).astype(np.uint8)


def blurred(image: np.ndarray, sigma: float) -> np.ndarray:
    return ndimage.gaussian_filter(image.astype(float), (sigma, sigma, 0)).astype(np.uint8)


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("dy, dx", [(0, 0), (2, 0), (-3, 1), (3, -3)])
def test_the_move_that_made_a_picture_is_found(mirror, dy, dx):
    row = picture(0)
    image = copies.moved(row, mirror, dy, dx)
    assert copies.best_move_for(image, row, 3) == (mirror, dy, dx)
    assert copies.copy_distance(image, row) == 0


def test_errors_are_those_of_a_table():
    draw = np.random.default_rng(0)
    row, other = draw.integers(0, 256, (2, 16, 24, 3), dtype=np.uint8)
    errors = copies.shifted_errors(row, other[None], 2)[0]
    for mirror in (0, 1):
        for dy in range(-2, 3):
            for dx in range(-2, 3):
                seen = other[:, ::-1] if mirror else other
                wanted = np.square(np.roll(row, (dy, dx), (0, 1))[2:-2, 2:-2] * 1.0 - seen[2:-2, 2:-2]).mean()
                assert errors[mirror, dy + 2, dx + 2] == pytest.approx(wanted, rel=1e-4)


FORMS = {
    "mirrored": lambda image: copies.mirrored(image),
    "JPEG 50": lambda image: copies.as_jpeg(image, 50),
    "JPEG 73": lambda image: copies.as_jpeg(image, 73),
    "shifted": lambda image: copies.moved(image, False, -2, 2),
    "blurred": lambda image: blurred(image, 1),
    "darker": lambda image: (image * 0.97).astype(np.uint8),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_copy_in_any_form_is_far_nearer_than_another_picture(form):
    row, others = picture(0), [picture(k) for k in range(1, 30)]
    nearest = min(copies.copy_distance(other, row) for other in others)
    assert copies.copy_distance(FORMS[form](row), row) < nearest / 4


@pytest.mark.parametrize("sigma", [1, 3, 8])
def test_a_blurred_picture_is_no_nearer_to_others(sigma):
    rows = [picture(k) for k in range(12)]
    usual = [min(copies.copy_distance(picture(k), row) for row in rows) for k in range(50, 58)]
    found = [min(copies.copy_distance(blurred(picture(k), sigma), row) for row in rows) for k in range(50, 58)]
    assert np.median(found) > 0.7 * np.median(usual)


def test_large_pictures_are_compared_reduced_and_small_ones_at_all():
    assert copies.working(picture(0, 300)).shape == (100, 100, 3)
    tiny = picture(0, 8)
    assert copies.reach_of((8, 8)) == 1 and copies.copy_distance(copies.mirrored(tiny), tiny) == 0
    assert copies.copy_distance(picture(1, 8), tiny) > 0.2


# --- shares ----------------------------------------------------------------------------------------------------


def test_the_threshold_is_an_order_statistic_of_held_out_pictures():
    limit = copies.threshold(np.arange(100.0)[::-1])
    assert (limit.value, limit.rank, limit.n) == (1.0, 2, 100)
    assert limit.false_share == 2 / 101
    assert copies.threshold(np.array([3.0, 2.0])).rank == 1


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 1])
def test_shares_are_read_without_bias_and_intervals_cover_them(share):
    draw, errors, covered = np.random.default_rng(7), [], 0
    for _ in range(200):
        copied = draw.random(500) < share
        distances = np.where(copied, 0.0, draw.gamma(9, size=500))
        value, (low, high) = copies.copied_share(distances, copies.threshold(draw.gamma(9, size=200)))
        errors.append(value - copied.mean())
        covered += low <= share <= high
    assert covered >= 180
    assert abs(np.mean(errors)) < 0.01 and np.quantile(np.abs(errors), 0.95) < 0.03


def test_no_copies_and_nothing_else_are_the_ends():
    limit = copies.threshold(np.linspace(1, 2, 50))
    value, (low, high) = copies.copied_share(np.full(100, 5.0), limit)
    assert value == low == 0 and 0 < high < 0.05
    value, (low, high) = copies.copied_share(np.zeros(100), limit)
    assert value == high == 1 and 0.9 < low < 1
