"""Captions by templates over columns, of every kind of data."""

import csv
import io
import json
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from ldmcli.core.errors import InputError
from ldmcli.core.settings import DataSettings
from ldmcli.data.mixed_captions import MixedCaptions, check_templates
from ldmcli.data.rows import Rows
from ldmcli.data.shards import open_shards
from ldmcli.data.sources import open_rows
from ldmcli.data.streaming import StreamedRows
from ldmcli.maths.colour_words import COLOUR_WORDS

COLOURS = {"red": "#DD2E44", "orange": "#F4900C", "green": "#78B159", "blue": "#55ACEE", "purple": "#AA8ED6"}
STYLES = ["flat", "drawn"]
KINDS = ["folder", "csv", "parquet", "saved", "tar", "parquet stream", "tar stream", "saved stream"]
TEMPLATES = ("{caption}", "a {colours} {name}", "{name}, {keywords:2}", "{style} style")


def thing(k: int) -> dict:
    """A row, but for its picture; each fifth has no keywords."""
    words = [] if k % 5 == 4 else [f"word{k}", "common", f"other{k}"]
    return {"caption": f"an old thing {k}", "name": f"thing{k}", "keywords": words, "style": k % 2}


def png(k: int) -> bytes:
    image, file = Image.new("RGB", (24, 24), "white"), io.BytesIO()
    ImageDraw.Draw(image).rectangle((4, 4, 19, 19), list(COLOURS.values())[k % 5])
    image.putpixel((10, 10), (k, k, k))  # so that no two are alike
    image.save(file, "PNG")
    return file.getvalue()


def told(k: int) -> dict:
    return {**thing(k), "style": STYLES[k % 2]}


def dataset(count: int):
    import datasets

    columns = {name: [thing(k)[name] for k in range(count)] for name in thing(0)}
    text = datasets.Value("string")
    features = {"image": datasets.Image(), "caption": text, "name": text, "keywords": datasets.List(text)}
    features["style"] = datasets.ClassLabel(names=STYLES)
    pictures = [{"bytes": png(k), "path": None} for k in range(count)]
    return datasets.Dataset.from_dict({"image": pictures, **columns}, datasets.Features(features))


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    """The same 30 rows in each kind of storage; lists are texts in CSV."""
    root, count = tmp_path_factory.mktemp("kinds"), 30
    found = {kind: root / kind for kind in ("folder", "csv", "parquet", "saved", "tar")}
    for kind in ("folder", "csv", "parquet", "tar"):
        found[kind].mkdir()
    for kind in ("folder", "csv"):
        for k in range(count):
            (found[kind] / f"{k}.png").write_bytes(png(k))
    lines = [json.dumps({"file_name": f"{k}.png", **told(k)}) for k in range(count)]
    (found["folder"] / "metadata.jsonl").write_text("\n".join(lines))
    with (found["csv"] / "metadata.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, ["file_name", *thing(0)])
        table.writeheader()
        table.writerows(
            {"file_name": f"{k}.png", **told(k), "keywords": ", ".join(thing(k)["keywords"])} for k in range(count)
        )
    made = dataset(count)
    made.to_parquet(found["parquet"] / "train.parquet", batch_size=10)
    made.save_to_disk(found["saved"])
    with tarfile.open(found["tar"] / "0.tar", "w") as archive:
        for k in range(count):
            for name, content in ((f"{k}.png", png(k)), (f"{k}.json", json.dumps(told(k)).encode())):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    return found


def opened(sources, kind: str, *templates: str) -> MixedCaptions:
    streamed = kind.endswith("stream")
    settings = DataSettings(
        source=str(sources[kind.partition(" ")[0]]), size=(24, 24), captions=templates, streaming=streamed
    )
    if not streamed:
        return MixedCaptions(open_rows(settings), settings)
    shards, divided = open_shards(settings, "train")
    rows = StreamedRows(shards, shards.index(), settings, seed=0, batch=4, divided=divided)
    return MixedCaptions(rows, settings)


def number(mixed: MixedCaptions, i: int) -> int:
    return int(mixed.rows.caption(i).rpartition(" ")[2])


def possible(k: int, kind: str) -> dict[str, set[str]]:
    """Texts of a thing by template."""
    one = told(k)
    words, name = one["keywords"], one["name"]
    pairs = {f", {a}, {b}" for a in words for b in words if a != b} or {""}
    pairs = {f", {', '.join(words)}" if words else ""} if kind == "csv" else pairs
    colour = list(COLOURS)[k % 5]
    article = "an" if colour == "orange" else "a"
    texts = ({one["caption"]}, {f"{article} {colour} {name}"}, {name + p for p in pairs}, {f"{one['style']} style"})
    return dict(zip(TEMPLATES, texts))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_data_gives_captions_by_all_templates(sources, kind):
    mixed = opened(sources, kind, *TEMPLATES)
    check_templates(mixed.rows, TEMPLATES)
    seen = Counter()
    for position in range(120):
        i = position % (20 if kind.endswith("stream") else len(mixed.rows))
        text, texts = mixed.drawn(i, (3, position, "training")), possible(number(mixed, i), kind)
        [by] = [template for template, those in texts.items() if text in those]
        seen[by] += 1
        assert text == mixed.drawn(i, (3, position, "training")), "a function of row and key"
        assert mixed.first(i, (3, position, "validation")) in texts["{caption}"]
    assert min(seen[template] for template in TEMPLATES) > 15, seen


def test_draws_go_by_seed_position_and_purpose_and_take_all_of_a_list_in_time(sources):
    mixed = opened(sources, "parquet", "{keywords:1}")
    i = next(i for i in range(len(mixed.rows)) if number(mixed, i) % 5 != 4)
    words = set(thing(number(mixed, i))["keywords"])
    for keys in (
        [(0, position, "training") for position in range(40)],
        [(seed, 0, "training") for seed in range(40)],
        [(seed, 0, "validation") for seed in range(40)],
    ):
        assert {mixed.drawn(i, key) for key in keys} == words
    apart = [mixed.drawn(i, (seed, 0, purpose)) for seed in range(40) for purpose in ("training", "validation")]
    assert apart[::2] != apart[1::2]


@pytest.mark.parametrize("template, count", [("{keywords}", 3), ("{keywords:2}", 2), ("{keywords:9}", 3)])
def test_lists_give_as_many_as_asked_for_and_none_twice(sources, template, count):
    mixed = opened(sources, "parquet", template)
    i = next(i for i in range(len(mixed.rows)) if number(mixed, i) % 5 != 4)
    orders = {mixed.drawn(i, (0, position, "training")) for position in range(60)}
    assert {len(set(text.split(", "))) for text in orders} == {count} and len(orders) == 6


def test_a_list_that_is_named_twice_goes_on_with_other_words(sources):
    mixed = opened(sources, "parquet", "{keywords:1} or {keywords:1}")
    i = next(i for i in range(len(mixed.rows)) if number(mixed, i) % 5 != 4)
    assert all(len(set(mixed.drawn(i, (0, p, "training")).split(" or "))) == 2 for p in range(20))


def test_a_template_that_stands_twice_is_drawn_twice_as_often_and_an_empty_one_gives_its_turn_to_the_next(sources):
    mixed = opened(sources, "parquet", "{name}", "{name}", "{caption}")
    counts = Counter("old" in mixed.drawn(0, (0, position, "training")) for position in range(600))
    assert 150 < counts[True] < 250
    mixed = opened(sources, "parquet", "{keywords}", "{name}")
    without = next(i for i in range(len(mixed.rows)) if number(mixed, i) % 5 == 4)
    assert {mixed.drawn(without, (0, p, "training")) for p in range(20)} == {f"thing{number(mixed, without)}"}
    assert mixed.first(without, (0, 0, "validation")) == ""


def test_a_colour_that_is_said_already_is_not_said_again(tmp_path):
    (tmp_path / "0.png").write_bytes(png(0))
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", "name": "Red apple"}))
    settings = DataSettings(source=str(tmp_path), captions=("a {colours} {name}",))
    assert MixedCaptions(open_rows(settings), settings).first(0, (0, 0, "validation")) == "a Red apple"


def test_of_several_captions_the_first_stands_for_all_unless_some_are_asked_for(tmp_path):
    (tmp_path / "0.png").write_bytes(png(0))
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", "text": ["one", "two"]}))
    settings = DataSettings(source=str(tmp_path), captions=("{caption}", "{caption:1}"))
    mixed = MixedCaptions(open_rows(settings), settings)
    assert mixed.first(0, (0, 0, "validation")) == "one"
    assert {mixed.drawn(0, (0, position, "training")) for position in range(40)} == {"one", "two"}


@pytest.mark.parametrize("kind", KINDS)
def test_the_vocabulary_has_all_words_and_no_text_is_longer(sources, kind):
    mixed = opened(sources, kind, *TEMPLATES)
    some = range(20)
    texts = list(mixed.all_words(some))
    words = {word.strip(",") for text in texts for word in text.split()}
    for i in some:
        assert set(thing(number(mixed, i))["keywords"]) <= words
        for position in range(8):
            text = mixed.drawn(i, (0, position, "training"))
            assert {word.strip(",") for word in text.split()} <= words
            assert len(text) <= max(map(len, texts))
    assert set(COLOUR_WORDS) <= words


@pytest.mark.parametrize("kind", KINDS)
def test_a_column_that_is_not_there_is_told_with_those_that_are(sources, kind):
    mixed = opened(sources, kind, "{nme}")
    with pytest.raises(InputError) as caught:
        check_templates(mixed.rows, ("{name}", "{colours} {nme}"))
    line = str(caught.value)
    assert "names nme" in line and "did you mean name?" in line and "\n" not in line
    assert "there are caption, " in line and all(name in line for name in ("name", "keywords", "style", "colours"))


def test_what_is_no_text_is_told_with_its_row(tmp_path):
    (tmp_path / "0.png").write_bytes(png(0))
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", "text": "x", "odd": {"a": 1}}))
    settings = DataSettings(source=str(tmp_path), captions=("{odd}",))
    with pytest.raises(InputError, match=r"0\.png: .* in column odd is no text"):
        MixedCaptions(open_rows(settings), settings).first(0, (0, 0, "validation"))


def test_colours_of_a_row_are_looked_for_once(sources, monkeypatch):
    looked: list[int] = []
    pixels = Rows.pixels
    monkeypatch.setattr(Rows, "pixels", lambda self, i, *more: looked.append(i) or pixels(self, i, *more))
    mixed = opened(sources, "parquet", "{colours}", "{name}")
    for position in range(200):
        mixed.drawn(position % 5, (0, position, "training"))
    assert sorted(looked) == [0, 1, 2, 3, 4]


def test_shapes_have_captions_and_at_level_1_their_label():
    settings = DataSettings(source="shapes", limit=4, captions=("a {label}, {caption}",))
    rows = open_rows(settings)
    check_templates(rows, settings.captions)
    text = MixedCaptions(rows, settings).first(0, (0, 0, "validation"))
    assert text == f"a {rows.class_names[rows.label(0)]}, {rows.caption(0)}"
    with pytest.raises(InputError, match="names label"):
        check_templates(open_rows(replace(settings, source="shapes:2")), settings.captions)


def test_two_shapes_can_be_told_in_either_order():
    settings = DataSettings(source="shapes:2", limit=40, captions=("{caption}", "{paraphrase}"))
    rows = open_rows(settings)
    check_templates(rows, settings.captions)
    mixed = MixedCaptions(rows, settings)
    texts = {mixed.drawn(0, (0, position, "training")) for position in range(20)}
    assert texts == {rows.caption(0), *rows.words(0, "paraphrase")} and rows.cell(0, "paraphrase") in texts
    assert all(mixed.drawn(i, (0, i, "training")) for i in range(len(rows)))
