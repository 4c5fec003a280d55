"""Random holes: functions of their key, of both kinds, within the stated share at every size."""

import numpy as np
import pytest
from scipy import ndimage

from ldmcli.data.masks import KINDS, SHARE, mask_kind, masked_share, random_mask

SIZES = [(16, 16), (20, 52), (64, 64), (96, 32), (256, 256), (1024, 1024)]


def test_a_mask_is_a_function_of_its_key():
    first = random_mask(64, 48, 3, 17, "mask")
    assert first.shape == (64, 48) and first.dtype == bool
    assert np.array_equal(first, random_mask(64, 48, 3, 17, "mask"))
    keys = [(4, 17, "mask"), (3, 18, "mask"), (3, 17, "other"), (3, "17", "mask")]
    others = [random_mask(64, 48, *key) for key in keys]
    for k, one in enumerate(others):
        assert all(not np.array_equal(one, other) for other in [first, *others[:k]])


def test_masks_of_neighbouring_keys_have_nothing_in_common():
    masks = np.stack([random_mask(32, 32, 0, i) for i in range(400)]).reshape(400, -1).astype(float)
    masks -= masks.mean(0)
    together = (masks[1:] * masks[:-1]).mean() / (masks**2).mean()
    assert abs(together) < 0.06  # the correlation of a pixel from one mask to the next


@pytest.mark.parametrize("size", SIZES)
def test_holes_cover_the_stated_share(size):
    found = masked_share([random_mask(*size, 1, i).mean() for i in range(60 if size[0] < 1000 else 8)])
    assert SHARE[0] <= found["min"] < found["mean"] < found["max"] <= SHARE[1]


def test_share_over_many_masks():
    found = masked_share([random_mask(64, 64, 0, i).mean() for i in range(500)])
    assert found["n"] == 500 and SHARE[0] <= found["min"] and found["max"] <= SHARE[1]
    assert 0.25 < found["mean"] < 0.35 and 0.12 < found["std"] < 0.18
    assert found["p10"] < 0.13 and found["p90"] > 0.45  # small holes and large ones both occur


def test_kinds_occur_as_often_as_stated_and_look_it():
    kinds = [mask_kind(0, i) for i in range(2000)]
    for kind, probability in KINDS.items():
        assert kinds.count(kind) / 2000 == pytest.approx(probability, abs=0.04)
    filled = {kind: [] for kind in KINDS}
    for i, kind in enumerate(kinds[:300]):
        mask = random_mask(64, 64, 0, i)
        for where in ndimage.find_objects(ndimage.label(mask)[0]):
            filled[kind].append(mask[where].mean())
    # A lone box fills its bounding box; a stroke has round ends and leaves corners free.
    assert np.mean(np.array(filled["boxes"]) == 1) > 0.4
    assert np.mean(np.array(filled["strokes"]) == 1) < 0.1
    assert np.mean(filled["strokes"]) < np.mean(filled["boxes"])


def test_a_mask_looks_alike_at_every_size():
    pairs = [(random_mask(64, 64, 5, i), random_mask(256, 256, 5, i)[2::4, 2::4]) for i in range(40)]
    assert np.mean([(a == b).mean() for a, b in pairs]) > 0.95


def test_the_statistic_counts_pixels():
    half, none = np.zeros((4, 4), bool), np.zeros((4, 4), bool)
    half[:2] = True
    found = masked_share([half.mean(), none.mean()])
    assert (found["mean"], found["std"], found["min"], found["max"], found["median"]) == (0.25, 0.25, 0, 0.5, 0.25)
    with pytest.raises(ValueError, match="no masks"):
        masked_share([])
