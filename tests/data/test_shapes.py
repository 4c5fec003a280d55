"""The embedded shapes: what is drawn is what is said, nothing held out is shown, and the checker reads it back."""

import hashlib
from collections import Counter

import numpy as np
import pytest
from scipy import ndimage

from ldmcli.core.errors import UsageError
from ldmcli.data import shape_reading, shapes
from ldmcli.data.shape_sdf import EXTENTS, coverage

SIZE = (64, 64)


def specs(n: int, level: int = 1, split: str = "train", seed: int = 0) -> list[shapes.Spec]:
    return [shapes.spec(i, seed=seed, level=level, split=split) for i in range(n)]


def combination_of(spec: shapes.Spec) -> tuple[int, ...]:
    thing = spec.things[0]
    return thing.shape, thing.colour, spec.background, spec.place


def blurred(image: np.ndarray) -> np.ndarray:
    return ndimage.uniform_filter(image.astype(np.float32), (5, 5, 1), mode="nearest").round().astype(np.uint8)


def noisy(image: np.ndarray) -> np.ndarray:
    noise = np.random.default_rng(int(image.sum())).normal(0, 12, image.shape)
    return np.clip(image + noise, 0, 255).astype(np.uint8)


# --- which pictures ---------------------------------------------------------------------------------------------------


def test_a_row_depends_on_seed_index_level_and_split_alone():
    assert shapes.spec(5, seed=1) == shapes.spec(5, seed=1)
    variants = {
        shapes.spec(5),
        shapes.spec(6),
        shapes.spec(5, seed=1),
        shapes.spec(5, level=2),
        shapes.spec(5, level=3),
        shapes.spec(5, split="validation"),
    }
    assert len(variants) == 6


def test_the_first_rows_stay_as_they_were_published():
    assert [shapes.caption(one) for one in specs(3)] == [
        "a red cross at the top of a brown background",
        "a red square in the center of a cream background",
        "a green star at the top of a gray background",
    ]
    assert shapes.caption(shapes.spec(0, level=2)) == "a cyan square below a red star on a brown background"
    assert round(shapes.spec(0).things[0].x, 6) == 0.497983


def test_there_are_1680_combinations_and_128_are_held_out_over_all_values():
    assert shapes.COMBINATIONS == 1680 == len({shapes.combination(n) for n in range(1680)})
    assert len(set(shapes.HELD_OUT)) == 128
    for values in zip(*map(shapes.combination, shapes.HELD_OUT)):
        counts = Counter(values)
        assert min(counts.values()) >= 0.7 * max(counts.values())


def test_training_rows_show_no_held_out_combination_and_nearly_all_others():
    held_out = {shapes.combination(n) for n in shapes.HELD_OUT}
    seen = {combination_of(one) for one in specs(shapes.TRAIN_ROWS)}
    assert not seen & held_out
    assert len(seen) > 0.99 * (1680 - 128)


def test_validation_rows_are_the_held_out_combinations():
    held_out = {shapes.combination(n) for n in shapes.HELD_OUT}
    rows = specs(256, split="validation")
    assert {combination_of(one) for one in rows} == held_out
    assert rows[0] != rows[128] and combination_of(rows[0]) == combination_of(rows[128])


@pytest.mark.parametrize("level", [2, 3])
def test_prompts_of_several_objects_are_parted_between_train_and_validation(level):
    train = {shapes.caption(one) for one in specs(3000, level)}
    validation = {shapes.caption(one) for one in specs(500, level, "validation")}
    assert len(validation) > 450 and not train & validation


@pytest.mark.parametrize("level", [2, 3])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_paraphrase_says_the_same_and_nothing_of_the_other_split(level, split):
    other = {shapes.caption(one) for one in specs(500, level, "validation" if split == "train" else "train")}
    rows = [(one, text) for one in specs(2000, level, split) if (text := shapes.paraphrase(one))]
    assert len(rows) > (1800 if split == "train" else 60)
    assert not {text for _, text in rows} & other
    for one, text in rows[:40]:
        assert text != shapes.caption(one)
        assert shape_reading.check(shapes.render(one, SIZE), text)["all"]


def test_one_training_caption_in_ten_leaves_the_place_out():
    rows = specs(5000)
    assert 0.08 < sum(not one.says_place for one in rows) / len(rows) < 0.12
    silent = next(one for one in rows if not one.says_place)
    assert shapes.parse(shapes.caption(silent)).place is None and silent.place is not None
    assert all(one.says_place for one in specs(128, split="validation"))


def test_values_are_drawn_evenly():
    rows = specs(8000, level=2)
    for counts, n in (
        (Counter(one.things[0].colour for one in rows), 8),
        (Counter(one.things[1].shape for one in rows), 7),
        (Counter(one.background for one in rows), 6),
        (Counter(one.relations for one in rows), 4),
    ):
        assert len(counts) == n and max(counts.values()) < 1.15 * len(rows) / n


def test_unknown_levels_and_splits_are_usage_errors():
    with pytest.raises(UsageError, match="shapes:4"):
        shapes.spec(0, level=4)
    with pytest.raises(UsageError, match="'test'"):
        shapes.spec(0, split="test")


# --- pixels -----------------------------------------------------------------------------------------------------------


def test_objects_are_about_22_pixels_at_64_and_never_touch_the_border():
    widths = []
    for level in shapes.LEVELS:
        for one in specs(1500, level):
            for x, y, w, h in shapes.boxes(one, SIZE):
                assert x >= 1 and y >= 1 and x + w <= 63 and y + h <= 63
            if level == 1:
                widths.append(2 * one.things[0].radius * 64)
    assert 21.5 < np.mean(widths) < 22.5 and min(widths) > 19 and max(widths) < 25


@pytest.mark.parametrize("level", [2, 3])
def test_objects_leave_a_gap_of_three_pixels_between_them(level):
    for one in specs(1000, level):
        labels, count = ndimage.label(ndimage.binary_dilation(shapes.segment(one, SIZE) > 0))
        assert count == level


@pytest.mark.parametrize("name", shapes.SHAPES)
def test_the_extent_of_each_outline_is_that_of_its_pixels(name):
    alpha = coverage(shapes.SHAPES.index(name), 100, 100, 80, (slice(0, 200), slice(0, 200))) > 0.5
    rows, columns = np.flatnonzero(alpha.any(1)), np.flatnonzero(alpha.any(0))
    found = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
    assert np.abs(found - (100 + 80 * np.array(EXTENTS[name]))).max() <= 1.5


@pytest.mark.parametrize("size", [(64, 64), (48, 96)])
def test_boxes_and_class_map_agree_with_the_picture(size):
    for one in specs(100, 3):
        image, classes = shapes.render(one, size), shapes.segment(one, size)
        ground = np.array(list(shapes.BACKGROUNDS.values())[one.background])
        assert (image[classes == 0] == ground).all(-1).mean() > 0.9
        assert set(np.unique(classes)) == {0} | {1 + thing.shape for thing in one.things}
        for thing, (x, y, w, h) in zip(one.things, shapes.boxes(one, size)):
            mine = np.zeros(size, bool)
            mine[max(int(y), 0) : int(y + h) + 1, max(int(x), 0) : int(x + w) + 1] = True
            rows, columns = np.nonzero((classes == 1 + thing.shape) & mine)
            assert abs(columns.min() - x) <= 1.5 and abs(columns.max() + 1 - x - w) <= 1.5
            assert abs(rows.min() - y) <= 1.5 and abs(rows.max() + 1 - y - h) <= 1.5


def test_the_middle_of_a_square_has_its_colour_and_edges_are_mixed():
    one = next(one for one in specs(100) if one.things[0].shape == shapes.SHAPES.index("square"))
    image, thing = shapes.render(one, SIZE), one.things[0]
    assert tuple(image[int(thing.y * 64), int(thing.x * 64)]) == list(shapes.COLOURS.values())[thing.colour]
    assert tuple(image[0, 0]) == list(shapes.BACKGROUNDS.values())[one.background]
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 2


def test_sizes_show_the_same_picture():
    one = shapes.spec(3)
    large = shapes.render(one, (256, 256)).reshape(64, 4, 64, 4, 3).mean((1, 3))
    assert np.abs(large - shapes.render(one, SIZE)).mean() < 0.5


# --- words ------------------------------------------------------------------------------------------------------------


def test_captions_say_what_parse_reads():
    for level in shapes.LEVELS:
        for one in specs(300, level):
            read = shapes.parse(shapes.caption(one))
            assert read.things == tuple((thing.colour, thing.shape) for thing in one.things)
            assert read.background == one.background and read.relations == one.relations
            assert read.place == (one.place if one.says_place else None)


def test_the_contracts_prompt_is_read():
    read = shapes.parse("a red circle on a navy background")
    assert read.things == ((0, 0),) and read.place is None
    assert list(shapes.BACKGROUNDS)[read.background] == "navy"


def test_spellings_and_missing_words_are_read_as_far_as_they_go():
    assert shapes.parse("An ORANGE  ring in the centre of a grey background") == shapes.Expectation(
        ((4, 4),), (), list(shapes.PLACES).index("center"), list(shapes.BACKGROUNDS).index("gray")
    )
    assert shapes.parse("hearts") == shapes.Expectation(((None, 5),))
    assert shapes.parse("a photo of a cat") == shapes.Expectation(())
    assert shapes.parse("a red circle beside a blue star").relations == (None,)


# --- reading back -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size, change, n",
    [
        (SIZE, lambda x: x, 1500),
        (SIZE, blurred, 500),
        (SIZE, noisy, 500),
        ((32, 32), lambda x: x, 500),
        ((40, 96), lambda x: x, 200),
        ((200, 200), lambda x: x, 30),
    ],
)
def test_the_checker_agrees_with_every_real_picture(size, change, n):
    rows = specs(n, split="train", seed=7)
    found = shape_reading.score(
        [change(shapes.render(one, size)) for one in rows], [shapes.caption(one) for one in rows]
    )
    wanted = ("colour", "shape", "position", "background", "count", "all")
    assert {key: found[key] for key in wanted} == dict.fromkeys(wanted, 1.0) and found["n"] == n


@pytest.mark.parametrize("level", [2, 3])
@pytest.mark.parametrize("size", [SIZE, (32, 32)])
def test_the_checker_agrees_with_real_pictures_of_several_objects(level, size):
    rows = specs(300, level, seed=7)
    found = shape_reading.score([shapes.render(one, size) for one in rows], [shapes.caption(one) for one in rows])
    assert found["all"] == 1.0


@pytest.mark.parametrize("level", [2, 3])
def test_a_blur_costs_the_checker_little_with_several_objects(level):
    rows = specs(200, level, seed=7)
    found = shape_reading.score([blurred(shapes.render(one, SIZE)) for one in rows], rows)
    assert found["colour"] == found["position"] == 1.0 and found["all"] >= 0.98


def test_each_wrong_word_fails_its_own_verdict_and_no_other():
    one = next(one for one in specs(1000) if shapes.caption(one).startswith("a red circle on the left"))
    image = shapes.render(one, SIZE)
    background = list(shapes.BACKGROUNDS)[shape_reading.read(image)[0]]
    right = f"a red circle on the left of a {background} background"
    other = "white" if background != "white" else "black"
    verdicts = ("colour", "shape", "position", "background", "count")
    for prompt, wrong in (
        (right, None),
        (right.replace("red", "blue"), "colour"),
        (right.replace("circle", "ring"), "shape"),
        (right.replace("left", "right"), "position"),
        (right.replace(background, other), "background"),
    ):
        found = shape_reading.check(image, prompt)
        assert [key for key in verdicts if found[key] is False] == ([wrong] if wrong else [])
        assert found["all"] is (wrong is None)


def test_a_swapped_relation_is_noticed():
    one = shapes.spec(0, level=2)
    image, prompt = shapes.render(one, SIZE), shapes.caption(one)
    assert " below " in prompt
    assert shape_reading.check(image, prompt)["position"] is True
    assert shape_reading.check(image, prompt.replace("below", "above"))["position"] is False
    assert shape_reading.check(image, prompt.replace("below", "left of"))["position"] is False


def test_an_empty_picture_shows_nothing_that_was_asked_for():
    found = shape_reading.check(np.full((64, 64, 3), 255, np.uint8), "a red circle on the left of a white background")
    assert found["background"] is True
    assert [found[k] for k in ("colour", "shape", "position", "count", "all")] == [False] * 5 and found["iou"] == 0.0


def test_noise_and_constant_pictures_of_any_colour_do_not_break_the_checker():
    rng = np.random.default_rng(0)
    for image in (rng.integers(0, 256, (64, 64, 3), np.uint8), np.zeros((32, 32, 3), np.uint8)):
        assert shape_reading.check(image, "a red circle above a blue star on a white background")["all"] is False


def test_a_second_object_breaks_the_count_only():
    two = shapes.spec(0, level=2)
    prompt = f"{shapes.caption(two).partition(' below ')[0]} on a brown background"
    found = shape_reading.check(shapes.render(two, SIZE), prompt)
    assert found["colour"] is True and found["shape"] is True and found["count"] is False and found["all"] is False


def test_what_no_prompt_asks_for_is_left_out_of_the_means():
    one = shapes.spec(0)
    found = shape_reading.score([shapes.render(one, SIZE)], ["a thing"])
    assert np.isnan(found["colour"]) and np.isnan(found["position"]) and np.isnan(found["background"])


@pytest.mark.parametrize("level, expected", [(1, "55446c19f0ef8538"), (2, "83df3b4f062b8144"), (3, "377f4b8d2f193808")])
def test_the_text_that_rows_are_hashed_by_never_changes(level, expected):
    """Fingerprints of runs and keys of latent caches on disk come from it."""
    assert hashlib.sha256(repr(specs(1, level)[0]).encode()).hexdigest().startswith(expected)
