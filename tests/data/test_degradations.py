"""Small pictures from large ones: kernels and reductions by hand and as recorded, steps, noise, and determinism."""

import json
import time

import numpy as np
import pytest
from golden_cases import shared
from scipy import ndimage

from ldmcli.core.errors import UsageError
from ldmcli.data import degradations
from ldmcli.data.degradations import (
    BSR,
    BSR_LIGHT,
    DEGRADATIONS,
    add_noise,
    anisotropic_kernel,
    blur_matrix,
    convolve,
    degrade,
    gaussian_kernel,
    jpeg,
    resize,
    resize_matrix,
    separable,
    shifted,
)


def picture(height: int = 64, width: int = 64, seed: int = 0) -> np.ndarray:
    """A smooth picture with some edges, uint8."""
    noise = np.random.default_rng(seed).random((height, width, 3))
    soft = ndimage.gaussian_filter(noise, (3, 3, 0))
    soft = (soft - soft.min()) / (soft.max() - soft.min())
    soft[height // 4 : height // 2, width // 4 : width // 2] = (1.0, 0.2, 0.1)
    return (soft * 255).astype(np.uint8)


def planes(seed: int = 0, height: int = 20, width: int = 13) -> np.ndarray:
    return np.random.default_rng(seed).random((3, height, width)).astype(np.float32)


def recorded(name: str):
    return json.loads(shared("golden", "degradation.json").read_text())[name]


# --- as recorded from the original -----------------------------------------------------------------------------


def test_gaussian_kernels_as_recorded():
    for case in recorded("gaussian_kernels"):
        kernel = gaussian_kernel(case["size"], case["sigma"])
        assert np.abs(np.outer(kernel, kernel) - case["kernel"]).max() < 2e-10


def test_anisotropic_kernels_as_recorded():
    for case in recorded("anisotropic_kernels"):
        kernel = anisotropic_kernel(case["ksize"], case["theta"], case["l1"], case["l2"])
        assert np.abs(kernel - case["kernel"]).max() < 2e-10


def test_antialiased_bicubic_as_recorded():
    case = recorded("antialiased_bicubic")
    image = np.array(case["image"], np.float32).transpose(2, 0, 1)
    for result in case["results"]:
        out = np.array(result["out"])
        assert np.abs(resize(image, *out.shape[:2], "antialiased").transpose(1, 2, 0) - out).max() < 1.5e-6


# --- by hand ---------------------------------------------------------------------------------------------------

HALF = [-0.09375, 0.59375, 0.59375, -0.09375]  # a = -0.75 half-way between two positions


@pytest.mark.parametrize(
    "n, m, method, row, weights",
    [
        (4, 2, "linear", 0, [0.5, 0.5, 0, 0]),
        (6, 2, "linear", 1, [0, 0, 0, 0, 1, 0]),  # the middle of three, the others unseen: it aliases, as OpenCV does
        (2, 4, "linear", 0, [1, 0]),  # beyond the first centre: the border's value
        (2, 4, "linear", 1, [0.75, 0.25]),
        (8, 4, "cubic", 1, [0, *HALF, 0, 0, 0]),
        (8, 4, "cubic", 0, [HALF[0] + HALF[1], HALF[2], HALF[3], 0, 0, 0, 0, 0]),
        (3, 2, "area", 0, [2 / 3, 1 / 3, 0]),
        (4, 2, "area", 1, [0, 0, 0.5, 0.5]),
        (2, 3, "area enlarged", 1, [0.5, 0.5]),
        (2, 3, "area enlarged", 2, [0, 1]),
        (5, 5, "cubic", 2, [0, 0, 1, 0, 0]),
        # a = -0.5 widened twice: the kernel at 1/4, 3/4, 5/4, 7/4, halved; the border stands twice
        (8, 4, "antialiased", 2, [0, 0, -0.01171875, -0.03515625, 0.11328125, 0.43359375, 0.43359375, 0.11328125][:8]),
    ],
)
def test_weights_by_hand(n, m, method, row, weights):
    found = resize_matrix(n, m, method)
    assert found.shape == (m, n)
    assert np.allclose(found.sum(1), 1, atol=1e-6)
    if method == "antialiased":  # taps 1 … 8 with centre 4.5: the last falls beyond the border and onto position 7
        weights = [
            0,
            -0.01171875,
            -0.03515625,
            0.11328125,
            0.43359375,
            0.43359375,
            0.11328125,
            -0.03515625 - 0.01171875,
        ]
    assert np.allclose(found[row], weights, atol=1e-6)


def test_area_enlarges_where_one_side_grows():
    image = planes()
    mixed = resize(image, 10, 26, "area")
    assert np.allclose(
        mixed, separable(image, resize_matrix(20, 10, "area enlarged"), resize_matrix(13, 26, "area enlarged"))
    )


def test_kernels_by_hand():
    kernel = gaussian_kernel(3, 1.0)
    middle = 1 / (1 + 2 * np.exp(-0.5))
    assert np.allclose(kernel, [middle * np.exp(-0.5), middle, middle * np.exp(-0.5)])
    assert np.allclose(gaussian_kernel(4, 0.0), [0, 0.5, 0.5, 0])  # without width: what lies in the middle
    long = anisotropic_kernel(9, 0.0, 4.0, 0.25)
    assert long[4].sum() > 0.75 and np.allclose(long, long[::-1]) and long[4, 8] > long[8, 4]
    assert np.allclose(anisotropic_kernel(9, np.pi / 2, 4.0, 0.25), long.T)
    down = anisotropic_kernel(9, np.pi / 4, 4.0, 0.25)
    assert down[8, 8] > 100 * down[0, 8]  # towards +x and +y, which points down
    assert np.isclose(anisotropic_kernel(6, 1.0, 0.0, 0.0).sum(), 1)


def test_shifted_kernel_reads_the_middle_of_a_block():
    kernel = shifted(gaussian_kernel(25, 0.3), 1.5)  # scale 4: positions 0 … 3 have their middle at 1.5
    ramp = np.broadcast_to(np.arange(32, dtype=np.float32), (3, 32, 32))
    found = separable(ramp, np.eye(32, dtype=np.float32), blur_matrix(32, kernel)[::4])
    assert np.allclose(found[0, 0, 1:-1], np.arange(32).reshape(8, 4).mean(1)[1:-1], atol=1e-4)


@pytest.mark.parametrize("size", [3, 6, 7, 14, 25])
def test_convolution_against_scipy(size):
    image, one = planes(), np.random.default_rng(1).random(size) / size
    both = np.random.default_rng(2).random((size, size)) / size**2
    for found, kernel in (
        (convolve(image, both), both),
        (separable(image, blur_matrix(20, one), blur_matrix(13, one)), np.outer(one, one)),
    ):
        wanted = np.stack([ndimage.convolve(plane, kernel, mode="mirror") for plane in image])
        assert np.abs(found - wanted).max() < 3e-6


# --- steps -----------------------------------------------------------------------------------------------------


def draws(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


@pytest.mark.parametrize("levels", [(2, 25), (1, 2), (10, 10)])
def test_noise_levels_and_kinds(levels):
    grey = np.full((3, 32, 32), 0.5, np.float32)
    kinds = {"grey": [], "coloured": [], "correlated": []}
    for seed in range(1000, 1600):
        noise = (add_noise(grey, levels, draws(seed)) - 0.5) * 255
        together = np.corrcoef(noise.reshape(3, -1))[np.triu_indices(3, 1)]
        deviations = noise.std((1, 2))
        kind = (
            "grey"
            if np.abs(noise[0] - noise[2]).max() < 1e-3
            else (
                "coloured"
                if max(np.abs(together)) < 0.13 and max(deviations) < 1.15 * min(deviations)
                else "correlated"
            )
        )
        kinds[kind].append(noise.std())
    shares = {kind: len(found) / 600 for kind, found in kinds.items()}
    assert shares["grey"] == pytest.approx(0.4, abs=0.06) and shares["correlated"] == pytest.approx(0.2, abs=0.06)
    for kind in ("grey", "coloured"):
        found = np.array(kinds[kind])
        # A picture or two of correlated noise look as if they were not.
        assert levels[0] * 0.9 < np.quantile(found, 0.03) and found.max() < levels[1] * 1.07
        assert found.mean() == pytest.approx(sum(levels) / 2, rel=0.12)
    assert max(kinds["correlated"]) < levels[1] * 1.05


def test_jpeg_loses_more_at_low_quality_and_keeps_flat_pictures():
    image = picture().transpose(2, 0, 1).astype(np.float32) / 255
    errors = [np.abs(jpeg(image, quality) - image).mean() for quality in (95, 80, 30)]
    assert 0 < errors[0] < errors[1] < errors[2] < 0.1
    flat = np.full((3, 16, 16), 0.5, np.float32)
    assert np.abs(jpeg(flat, 30) - flat).max() < 0.01


def test_the_final_reduction_comes_after_the_random_one():
    orders = {tuple(degradations._order(BSR.steps, draws(seed))) for seed in range(400)}
    assert all(order.index("shrink") < order.index("fit") for order in orders)
    assert all(sorted(order) == sorted(BSR.steps) for order in orders)
    assert len({order[0] for order in orders}) == 4 and len(orders) > 100  # any but the final reduction may be first


def test_every_step_is_taken(monkeypatch):
    seen = []
    for name in ("_blur", "_shrink", "add_noise", "jpeg"):
        real = getattr(degradations, name)
        monkeypatch.setattr(degradations, name, lambda *a, real=real, name=name: (seen.append(name), real(*a))[1])
    for i in range(40):
        degrade(picture(), 4, "bsr", 0, i)
    assert seen.count("_blur") == 80 and seen.count("_shrink") == seen.count("add_noise") == 40
    assert 40 + 28 < seen.count("jpeg") <= 80  # one always, one with probability 0.9
    seen.clear()
    for i in range(40):
        degrade(picture(), 4, "bsr-light", 0, i)
    assert seen.count("_blur") == 40


# --- the whole -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DEGRADATIONS)
@pytest.mark.parametrize("scale, size", [(2, (32, 20)), (4, (64, 48)), (4, (24, 100)), (8, (64, 32)), (8, (8, 8))])
def test_sizes_values_and_determinism(kind, scale, size):
    image = picture(*size)
    for i in range(6):
        found = degrade(image, scale, kind, 0, i, "degrade")
        assert found.dtype == np.uint8 and found.shape == (size[0] // scale, size[1] // scale, 3)
        assert np.array_equal(found, degrade(image, scale, kind, 0, i, "degrade"))
    if kind != "bicubic" and min(size) > 8:
        assert not np.array_equal(found, degrade(image, scale, kind, 0, 6, "degrade"))
        assert not np.array_equal(found, degrade(image, scale, kind, 1, 5, "degrade"))


def test_bicubic_is_the_antialiased_reduction():
    image = picture()
    wanted = resize(image.transpose(2, 0, 1).astype(np.float32), 16, 16, "antialiased").transpose(1, 2, 0)
    assert np.abs(degrade(image, 4, "bicubic", 0) - np.clip(wanted, 0, 255)).max() <= 0.51
    stripes = np.zeros((32, 32, 3), np.uint8)
    stripes[:, ::2] = 255
    assert np.abs(degrade(stripes, 4, "bicubic", 0)[1:-1, 1:-1].astype(int) - 128).max() <= 3  # nothing aliases


@pytest.mark.parametrize("kind", ["bsr", "bsr-light"])
@pytest.mark.parametrize("axis", [0, 1])
def test_the_picture_stays_where_it_is(kind, axis):
    """An edge in the middle stays there on average: kernels of even side move one picture by half a pixel only."""
    image = np.full((64, 64, 3), (100, 60, 160), np.uint8)
    image[:, 32:] = (200, 120, 80)
    image = image.transpose(1, 0, 2) if axis == 0 else image
    mean = np.mean([degrade(np.ascontiguousarray(image), 4, kind, 0, i) for i in range(150)], axis=0).mean(1 - axis)
    assert np.abs(mean[0] - (100, 60, 160)).max() < 8 and np.abs(mean[-1] - (200, 120, 80)).max() < 8
    moved = (mean.mean(0) - (150, 90, 120)) / (100, 60, -80) * 16  # small pixels towards the dark side
    assert np.abs(moved).max() < 0.2


def test_bsr_takes_more_away_than_bsr_light():
    image = np.kron(picture(16, 16), np.ones((8, 8, 1), np.uint8))
    clean = degrade(image, 4, "bicubic", 0).astype(float)
    errors = {
        kind: np.mean([np.abs(degrade(image, 4, kind, 0, i) - clean).mean() for i in range(40)])
        for kind in ("bsr", "bsr-light")
    }
    assert errors["bsr"] > 1.5 * errors["bsr-light"] > 1.5


def test_the_variants_have_the_numbers_of_the_original():
    assert (BSR.noise, BSR.quality, BSR.resized, BSR.steps.count("blur")) == ((2, 25), (30, 95), 0.75, 2)
    assert (BSR_LIGHT.noise, BSR_LIGHT.quality, BSR_LIGHT.resized, BSR_LIGHT.steps.count("blur")) == (
        (1, 2),
        (80, 95),
        0.8,
        1,
    )
    assert (BSR_LIGHT.narrower, BSR_LIGHT.isotropic_sizes, BSR_LIGHT.kernel_step) == (4, (2, 4), 1)


def test_wrong_requests():
    with pytest.raises(UsageError, match="--degradation blur: choose among bicubic, bsr, bsr-light"):
        degrade(picture(), 4, "blur", 0)
    with pytest.raises(UsageError, match="30x64 px at scale 4"):
        degrade(picture(64, 30), 4, "bicubic", 0)


def test_speed():
    image = picture(256, 256)
    degrade(image, 4, "bsr-light", 0)
    started = time.process_time()
    for i in range(20):
        degrade(image, 4, "bsr-light", 0, i)
    assert (time.process_time() - started) / 20 < 0.1  # 5 ms on an idle core; loaded test machines get room
