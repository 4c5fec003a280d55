"""Masks of LaMa's kinds: shares, sizes, determinism, and that training sees them."""

import numpy as np
import pytest
import tiny

from ldmcli.core.settings import MASKS
from ldmcli.data.lama_masks import KINDS, MOST_COVERED, lama_mask


def shares(kind, size, n=60):
    return np.array([lama_mask(kind, *size, 3, i).mean() for i in range(n)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(16, 16), (64, 96), (256, 256)])
def test_a_mask_covers_up_to_half_of_the_picture_and_never_nothing(kind, size):
    found = shares(kind, size, 12)
    assert (found > 0).all() and (found <= MOST_COVERED).all()


def test_kinds_have_their_own_look():
    """Thin masks have the most rim for what they cover, thick ones the least."""

    def rim(mask):
        inside = mask[:-1, :-1] & mask[1:, :-1] & mask[:-1, 1:] & mask[1:, 1:]
        return 1 - inside.sum() / mask.sum()

    found = {kind: np.mean([rim(lama_mask(kind, 256, 256, 0, i)) for i in range(40)]) for kind in KINDS}
    assert found["lama-thin"] > 1.5 * found["lama-medium"] > 1.5 * found["lama-thick"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_is_a_function_of_kind_size_and_key(kind):
    one = lama_mask(kind, 64, 48, 7, "training", 3)
    assert one.shape == (64, 48) and one.dtype == bool
    assert np.array_equal(one, lama_mask(kind, 64, 48, 7, "training", 3))
    assert not np.array_equal(one, lama_mask(kind, 64, 48, 7, "training", 4))


def test_pixels_grow_with_the_picture():
    """What is 100 px wide of 256 is as wide a share of 128."""
    at = {side: shares("lama-thick", (side, side)).mean() for side in (128, 256)}
    assert at[128] == pytest.approx(at[256], abs=0.07)


def test_boxes_are_as_frequent_as_in_the_configurations():
    """A mask of boxes alone is made of whole rows and columns: its corners are right angles."""

    def boxes_only(mask):
        rows = {tuple(row) for row in mask if row.any()}
        return len(rows) <= 2 * KINDS["lama-thick"][256].boxes[1]

    found = np.mean([boxes_only(lama_mask("lama-thick", 256, 256, 1, i)) for i in range(150)])
    assert 0.13 < found < 0.33, "0.3 / 1.3 are of boxes"


def test_a_training_takes_the_kind_that_is_set(tmp_path):
    assert set(KINDS) == set(MASKS[1:])
    tiny.train_ldm(tmp_path / "run", "none", "--task", "inpaint", "--set", "task.masks=lama-thin", steps=1)
    assert 'masks = "lama-thin"' in (tmp_path / "run" / "config.toml").read_text()
    ending = tiny.train_ldm(tmp_path / "no", "none", "--task", "inpaint", "--set", "task.masks=thin", steps=1, code=2)
    assert "lama-thin" in ending.line
