"""Layouts become the token sequences of the published builders, and come back from them."""

import json

import numpy as np
import pytest
from golden_cases import shared

from ldmcli.networks.layout import WHOLE, Layout

CASES = [
    f"{name}.{form}"
    for name in ("full_image", "crop_and_flip", "small_no_crop_token")
    for form in ("bbox", "center_points")
]


def flagged(
    category: int,
    categories: int,
    *,
    group: bool = False,
    occluded: bool = False,
    depiction: bool = False,
    inside: bool = False,
) -> int:
    """The token of a category with the marks of OpenImages: group 1, occluded 2, depiction 4, inside 8."""
    return category + categories * (group + 2 * occluded + 4 * depiction + 8 * inside)


def recorded(name: str) -> tuple[dict, Layout, list[int]]:
    """A recorded case, how it makes tokens, and the categories of its objects with their marks."""
    case = json.loads(shared("golden", "layout_tokens.json").read_text())[name]
    layout = Layout(
        case["max_objects"], case["no_tokens"], case["encode_crop"], "box" if name.endswith("bbox") else "centre"
    )
    marks = (["group"] if case["use_group"] else []) + (
        ["occluded", "depiction", "inside"] if case["use_additional"] else []
    )
    kinds = [
        flagged(one["cat"], case["no_object_classes"], **{mark: one.get(mark, False) for mark in marks})
        for one in case["objects"]
    ]
    return case, layout, kinds


@pytest.mark.parametrize("name", CASES)
def test_tokens_are_those_of_the_original_builders(name):
    case, layout, kinds = recorded(name)
    found = layout.tokens(
        [one["bbox"] for one in case["objects"]], kinds, crop=case.get("crop", WHOLE), flip=case.get("flip", False)
    )
    assert found.tolist() == case["tokens"]
    assert (layout.length, layout.empty) == (case["length"], case["none_token"])


@pytest.mark.parametrize("name", CASES)
def test_tokens_read_back_give_the_recorded_boxes(name):
    case, layout, _ = recorded(name)
    categories, where, crop = layout.read(case["tokens"])
    assert categories.tolist() == [category for category, _ in case["inverse"]]
    assert np.abs(where - np.array([place for _, place in case["inverse"]])).max() < 1e-12
    if case["inverse_crop"] is None:
        assert crop is None
    else:
        assert np.abs(crop - np.array(case["inverse_crop"])).max() < 1e-12


@pytest.mark.parametrize("vocabulary", [16, 8192])
def test_grid_points_are_the_recorded_ones(vocabulary):
    case = json.loads(shared("golden", "layout_tokens.json").read_text())
    layout = Layout(vocabulary=vocabulary)
    for x, y, token in case[f"coordinate_tokens_{vocabulary}"]:
        assert layout.points(np.array([[x, y]])).tolist() == [token]
    assert Layout().grid == case["sections_8192"] == 90


def test_a_sequence_by_hand():
    """A grid of 4 x 4 points, 0 … 15: a box over the right half is told by points (1.5 → 2, 0) and (3, 3)."""
    layout = Layout(slots=2, vocabulary=17)
    assert layout.tokens([[0.5, 0, 0.5, 1]], [7]).tolist() == [7, 2, 15, 16, 16, 16, 0, 15]
    assert layout.tokens([[0.5, 0, 0.5, 1]], [7], flip=True).tolist() == [7, 0, 14, 16, 16, 16, 0, 15]
    assert layout.tokens(np.zeros((0, 4)), []).tolist() == [16] * 6 + [0, 15]


def test_halves_go_to_the_even_point():
    assert Layout(vocabulary=9).points(np.array([[0.25, 0.75]])).tolist() == [2 * 3 + 0]


@pytest.mark.parametrize("crop", [True, False])
def test_objects_outside_the_crop_are_left_out_and_those_beyond_the_last_place_as_well(crop):
    layout = Layout(slots=2, crop=crop)
    boxes = [[0, 0, 0.1, 0.1], [0.6, 0.6, 0.2, 0.2], [0.7, 0.7, 0.1, 0.1]]
    categories, _, _ = layout.read(layout.tokens(boxes, [1, 2, 3], crop=(0.5, 0.5, 0.5, 0.5)))
    assert categories.tolist() == [2]
    assert layout.read(layout.tokens(boxes, [1, 2, 3]))[0].tolist() == [1, 2]


def test_boxes_that_reach_out_are_clipped():
    layout = Layout()
    inside, out = layout.tokens([[0.5, 0.5, 0.5, 0.5]], [3]), layout.tokens([[0.5, 0.5, 9, 9]], [3])
    assert inside.tolist() == out.tolist()
