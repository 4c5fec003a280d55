"""`ldm data`: what ldm sees in a data set, before anything trains on it."""

import re
import statistics
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ldmcli.conditions import CONDITIONS
from ldmcli.core import console
from ldmcli.core.errors import InputError
from ldmcli.core.outputs import CONTACT
from ldmcli.core.settings import MAX_TEXT_LENGTH, DataSettings
from ldmcli.data.decode import BadImage, sanitise
from ldmcli.data.mixed_captions import MixedCaptions, check_templates
from ldmcli.data.near_copies import COMPARED, near_pairs, signature
from ldmcli.data.rows import WORKERS, Rows, parallel_map
from ldmcli.data.shape_rows import is_shapes
from ldmcli.data.shards import first_rows, open_shards
from ldmcli.data.sources import open_rows, split_sizes, validation_split
from ldmcli.reports.dataset_advice import Seen, advice_sentences, advise, command_lines
from ldmcli.sampling.contact_sheets import in_rows, save_grid

SPLITS = ("train", "validation")
SHEET, SHEET_COLUMNS, CELL = 64, 8, 96
STREAMED = 256  # rows that are looked at where a data set is only streamed
EXAMPLES = 5
MIXED = 6  # rows whose mixed captions are shown, each so often
LISTED = 100  # pairs of near copies

Row = tuple[Rows, int]


@dataclass(frozen=True)
class Look:
    """What one row turned out to be. `shape` is (height, width) in pixels; `reason` says why it cannot be used;
    `signature` is by what near copies are found, None of what is drawn."""

    row: Row
    name: str
    split: str
    shape: tuple[int, int] | None
    content: str
    reason: str = ""
    signature: np.ndarray | None = None


def inspect(settings: DataSettings, out: Path | None = None) -> dict[str, Any]:
    """Columns, counts, sizes, captions, classes, bad files and duplicates of a data set, what to train on it with, and
    out/contact.png.

    Every picture is decoded once (data.limit bounds that; of a stream the first 256 rows are looked at). Nothing is
    left out: what --skip-bad would leave out is listed, and what training would refuse stands in the notes. Raises
    InputError where there is no data set to be seen.
    """
    source = settings.source
    splits, notes, by_share = _opened(replace(settings, skip_bad=True))
    total = sum(map(len, splits.values()))
    with console.progress(total, "looking") as bar:
        found = [look for split, rows in splits.items() for look in _looks(rows, split, bar.advance)]
    good = [look for look in found if not look.reason]
    some = next(rows for rows in splits.values() if rows)[0][0]
    notes += _notes(splits, settings)
    pairs = _near_pairs(good, notes)
    near = _near_duplicates(good, pairs)
    result = {
        "source": sanitise(source),
        "rows": {split: len(rows) for split, rows in splits.items()},
        "columns": {role: sanitise(column) for role, column in some.columns.items()},
        "sizes": _sizes(good, settings),
        "captions": _captions(good, notes) if some.has("caption") else None,
        "mixed_captions": _mixed_captions(good, settings, notes) if settings.captions else None,
        "classes": _classes(good, notes) if some.has("label") else None,
        "objects": _objects(good, notes) if some.has("objects") else None,
        "bad": [{"file": look.name, "split": look.split, "reason": look.reason} for look in found if look.reason],
        "duplicates": _duplicates(good),
        "near_duplicates": near,
        "training": None,
        "notes": list(dict.fromkeys(map(sanitise, notes))),
        "contact_sheet": None,
    }
    if good and not (settings.streaming and not is_shapes(source)):
        result["training"] = advise(_seen(good, pairs, result, settings, by_share))
    if good:
        result["contact_sheet"] = str(_contact_sheet(good, settings, out or _default_out(source)))
    return result


def _default_out(source: str) -> Path:
    name = re.sub(r"[^A-Za-z0-9._]+", "-", source.rstrip("/").rpartition("/")[2]).strip("-.").lower()[:40]
    return Path("outputs") / f"data-{name or 'data'}"


def _opened(settings: DataSettings) -> tuple[dict[str, list[Row]], list[str], bool]:
    """(rows by split, notes on splits, whether data.val_fraction says what is held out): without a train split, all
    that there are."""
    if settings.streaming and not is_shapes(settings.source):
        shards, divided = open_shards(settings, "train")
        rows = first_rows(shards, shards.index(), divided, "train", min(settings.limit or STREAMED, STREAMED))
        return {"train": [(rows, i) for i in range(len(rows))]}, ["a stream: only its first rows were looked at"], True
    sizes, by_share = split_sizes(settings), False
    if settings.split == "train" and sizes and "train" not in sizes:
        opened = {
            split: open_rows(replace(settings, split=split, val_split=split), split="validation") for split in sizes
        }
        notes = [f"there is no split train; training takes another with --split {next(iter(sizes))}"]
    else:
        opened = {split: open_rows(settings, split=split) for split in SPLITS}
        notes = []
        by_share = bool(sizes) and not validation_split(settings, list(sizes), settings.split)
        if opened["validation"].validation_is_train:
            del opened["validation"]
            notes.append("nothing is held out for validation")
        used = {settings.split, *(rows.split for rows in opened.values())}
        notes += [
            f"split {sanitise(split)} ({count:,} rows) is not used; --val-split {sanitise(split)} takes it"
            for split, count in sizes.items()
            if split not in used
        ]
    return {split: [(rows, i) for i in range(len(rows))] for split, rows in opened.items()}, notes, by_share


def _notes(splits: dict[str, list[Row]], settings: DataSettings) -> list[str]:
    """What rows themselves say, once their pictures were looked at."""
    opened = {id(rows): rows for part in splits.values() for rows, _ in part}.values()
    transparent = sum(rows.transparent for rows in opened)
    transparency = f"{transparent} pictures have transparent pixels, laid over {settings.background} (data.background)"
    return [note for rows in opened for note in rows.notes] + [transparency] * bool(transparent)


def _looks(rows: Sequence[Row], split: str, advance: Callable[[], None]) -> Iterable[Look]:
    for look in parallel_map(lambda row: _look(row, split), rows, WORKERS):
        advance()
        yield look


def _look(row: Row, split: str) -> Look:
    rows, i = row
    try:
        name = sanitise(rows.name(i))
        if is_shapes(rows.source):  # drawn on the fly, so never damaged
            return Look(row, name, split, rows.shape(i), rows.content_hash(i))
        image = rows.image(i)
        if rows.has("map"):
            rows.map(i)
        shape = (image.height, image.width)
        return Look(row, name, split, shape, rows.content_hash(i), signature=signature(image))
    except BadImage as error:
        return Look(row, error.name, split, None, "", error.reason)


# ---------------------------------------------------------------- sizes


def _sizes(good: Sequence[Look], settings: DataSettings) -> dict[str, Any] | None:
    if not good:
        return None
    shapes = [look.shape for look in good if look.shape is not None]
    by_area = sorted(shapes, key=lambda shape: shape[0] * shape[1])
    counted = Counter(shapes).most_common(EXAMPLES)
    sizes = {
        "smallest": _by(by_area[0]),
        "median": _by(by_area[len(by_area) // 2]),
        "largest": _by(by_area[-1]),
        "different": len(set(shapes)),
        "common": {_by(shape): count for shape, count in counted},
    }
    if any(settings.size):
        small = sum(h < settings.size[0] or w < settings.size[1] for h, w in shapes)
        sizes["enlarged_at_size"] = small
    return sizes


def _by(shape: tuple[int, int]) -> str:
    """Height and width as options write them."""
    return f"{shape[0]}x{shape[1]}"


def _usable(good: Sequence[Look], get: Callable[[Rows, int], Any], what: str, notes: list[str]) -> list[Any]:
    """What `get` gives of each row; rows that it refuses are left out, and `notes` takes how many and why."""
    found, refused = [], []
    for rows, i in (look.row for look in good):
        try:
            found.append(get(rows, i))
        except InputError as error:
            refused.append(str(error))
    if refused:
        notes.append(f"{what} of {len(refused)} rows cannot be used, so training with them ends: {refused[0]}")
    return found


def _captions(good: Sequence[Look], notes: list[str]) -> dict[str, Any]:
    texts = _usable(good, lambda rows, i: rows.caption(i), "captions", notes)
    filled = [text for text in texts if text.strip()]
    words = [len(text.split()) for text in filled]
    spread = [filled[round(k * (len(filled) - 1) / max(EXAMPLES - 1, 1))] for k in range(min(EXAMPLES, len(filled)))]
    long = sum(count > MAX_TEXT_LENGTH - 2 for count in words)  # a word is one token or more; two mark the ends
    if long:
        notes.append(
            f"{long} captions have more than {MAX_TEXT_LENGTH - 2} words: a model reads {MAX_TEXT_LENGTH} "
            "tokens unless condition.text_length says more, so their ends are cut"
        )
    return {
        "with_text": len(filled),
        "empty": len(texts) - len(filled),
        "different": len(set(filled)),
        "words_median": statistics.median(words) if words else 0,
        "words_most": max(words, default=0),
        "characters_most": max(map(len, filled), default=0),
        "examples": [sanitise(text) for text in dict.fromkeys(spread)],
    }


def _mixed_captions(good: Sequence[Look], settings: DataSettings, notes: list[str]) -> list[dict[str, Any]] | None:
    """Captions by the templates of data.captions, of rows spread over the data: each one of a training at random, and
    by the first template. None where templates name columns that there are not, which stands in the notes."""
    picked = [good[round(k * (len(good) - 1) / max(MIXED - 1, 1))].row for k in range(min(MIXED, len(good)))]
    mixed = {id(rows): MixedCaptions(rows, settings) for rows, _ in picked}
    try:
        for rows, _ in picked:
            check_templates(rows, settings.captions)
        return [
            {
                "file": sanitise(rows.name(i)),
                "first": sanitise(mixed[id(rows)].first(i, (0, i, "validation"))),
                "drawn": [sanitise(mixed[id(rows)].drawn(i, (i, k, "training"))) for k in range(MIXED)],
            }
            for rows, i in picked
        ]
    except InputError as error:
        notes.append(f"training with data.captions ends: {error}")
        return None


def _classes(good: Sequence[Look], notes: list[str]) -> dict[str, int]:
    """Rows of each class, in the order of the classes; those without a row too."""
    names = good[0].row[0].class_names if good else []
    counts = Counter(_usable(good, lambda rows, i: rows.label(i), "labels", notes))
    return {sanitise(name): counts[k] for k, name in enumerate(names)}


def _objects(good: Sequence[Look], notes: list[str]) -> dict[str, Any]:
    found = _usable(good, lambda rows, i: rows.objects(i)["category"], "boxes", notes)
    counts = [len(categories) for categories in found]
    return {
        "per_image_median": statistics.median(counts) if counts else 0,
        "per_image_most": max(counts, default=0),
        "categories": len({int(one) for categories in found for one in categories}),
    }


def _duplicates(good: Sequence[Look]) -> dict[str, Any]:
    """Files of equal content, and how many of them lie on both sides of the split."""
    groups: dict[str, list[Look]] = {}
    for look in good:
        groups.setdefault(look.content, []).append(look)
    copies = [group for group in groups.values() if len(group) > 1]
    return {
        "groups": len(copies),
        "rows": sum(map(len, copies)),
        "in_both_splits": sum(len({look.split for look in group}) > 1 for group in copies),
        "examples": [[look.name for look in group[:EXAMPLES]] for group in copies[:EXAMPLES]],
    }


def _near_pairs(good: Sequence[Look], notes: list[str]) -> list[tuple[Look, Look, str]]:
    """(look, look, how they differ) of different files that show nearly the same."""
    known = {look.content: look for look in good if look.signature is not None}
    looks = list(known.values())
    if len(looks) > COMPARED:
        notes.append(f"near copies were looked for among the first {COMPARED:,} pictures only")
        looks = looks[:COMPARED]
    if len(looks) < 2:
        return []

    @lru_cache(maxsize=64)
    def picture(k: int) -> Any:
        rows, i = looks[k].row
        return rows.image(i)

    found = near_pairs(np.stack([look.signature for look in looks if look.signature is not None]), picture)
    return [(looks[pair.first], looks[pair.second], pair.how) for pair in found]


def _near_duplicates(good: Sequence[Look], pairs: Sequence[tuple[Look, Look, str]]) -> dict[str, Any] | None:
    """Pairs of near copies; None where pictures are drawn."""
    if all(look.signature is None for look in good):
        return None
    return {
        "count": len(pairs),
        "in_both_splits": sum(a.split != b.split for a, b, _ in pairs),
        "pairs": [{"files": [a.name, b.name], "how": how} for a, b, how in pairs[:LISTED]],
    }


def _seen(
    good: Sequence[Look],
    pairs: Sequence[tuple[Look, Look, str]],
    report: dict[str, Any],
    data: DataSettings,
    share: bool,
) -> Seen:
    """What advice follows from. share: whether data.val_fraction says what is held out."""
    rows, training = good[0].row[0], [look for look in good if look.split == "train"]
    texts = _usable(good, lambda rows, i: rows.caption(i), "captions", []) if report["captions"] else []
    captions, classes = [text for text in texts if text.strip()], report["classes"] or {}
    useless = {"caption": not (captions or data.captions), "label": len(classes) < 2}  # by column
    there = (name for name, one in CONDITIONS.items() if one.user_given and one.column and one.available(rows, data))
    return Seen(
        settings=data,
        different=_groups({look.content for look in training}, [(a.content, b.content) for a, b, _ in pairs]),
        rows=sum(report["rows"].values()),
        held_out=report["rows"].get("validation", 0),
        by_share=share,
        short_side=int(statistics.median(min(look.shape) for look in training or good if look.shape)),
        kind=next((name for name in there if not useless.get(CONDITIONS[name].column)), ""),
        texts=captions or list(classes),
        bad=bool(report["bad"]),
    )


def _groups(contents: set[str], pairs: Sequence[tuple[str, str]]) -> int:
    """How many groups `contents` fall into when those of a pair belong together."""
    leader = {content: content for content in contents}

    def of(content: str) -> str:
        while leader[content] != content:
            content = leader[content]
        return content

    for a, b in pairs:
        if a in leader and b in leader:
            leader[of(a)] = of(b)
    return sum(content == own for content, own in leader.items())


def _contact_sheet(good: Sequence[Look], settings: DataSettings, out: Path) -> Path:
    """Rows spread evenly over the data as training sees them, in out/contact.png."""
    count = min(SHEET, len(good))
    picked = [good[round(k * (len(good) - 1) / max(count - 1, 1))] for k in range(count)]
    size = settings.size if any(settings.size) else (CELL, CELL)
    pictures = [rows.pixels(i, size) for rows, i in (look.row for look in picked)]
    save_grid(out / CONTACT, in_rows(pictures, SHEET_COLUMNS))
    return out / CONTACT


# ---------------------------------------------------------------- for people


def inspect_text(report: dict[str, Any], width: int = 80) -> str:
    """The report for a terminal."""
    lines = [_line("data", report["source"])]
    lines.append(_line("rows", ", ".join(f"{count:,} {split}" for split, count in report["rows"].items())))
    lines.append(_line("columns", ", ".join(f"{role} = {name}" for role, name in report["columns"].items())))
    lines += _size_lines(report["sizes"]) + _caption_lines(report["captions"])
    lines += [_line("" if k else "mixed", text) for k, text in enumerate(_mixed_texts(report["mixed_captions"]))]
    if report["classes"] is not None:
        named = ", ".join(f"{name} {count:,}" for name, count in list(report["classes"].items())[:20])
        more = f", and {len(report['classes']) - 20} more" if len(report["classes"]) > 20 else ""
        lines.append(_line("classes", f"{len(report['classes'])}: {named}{more}"))
    if report["objects"] is not None:
        found = report["objects"]
        lines.append(
            _line(
                "objects",
                f"{found['per_image_median']:g} an image (median), at most "
                f"{found['per_image_most']}, {found['categories']} categories",
            )
        )
    lines += _trouble_lines(report)
    lines += [_line("note", note) for note in report["notes"]]
    if report["contact_sheet"]:
        lines.append(_line("pictures", report["contact_sheet"]))
    wrap = textwrap.TextWrapper(width, subsequent_indent=" " * 12, break_on_hyphens=False, drop_whitespace=True)
    advice, commands = report["training"], []
    if advice is not None:
        lines += [_line(label, text) for label, text in advice_sentences(advice)]
        commands = ["", *command_lines(advice, width)]
    return "\n".join([*("\n".join(wrap.wrap(line)) for line in lines), *commands])


def _line(label: str, text: str) -> str:
    return f"{label:12}{text}"


def _size_lines(sizes: dict[str, Any] | None) -> list[str]:
    if sizes is None:
        return []
    if sizes["different"] == 1:
        text = f"all {sizes['median']} (height x width)"
    else:
        common = ", ".join(f"{size} ({count:,})" for size, count in sizes["common"].items())
        text = (
            f"{sizes['smallest']} to {sizes['largest']}, median {sizes['median']} (height x width); "
            f"{sizes['different']} different, most often {common}"
        )
    enlarged = sizes.get("enlarged_at_size")
    return [_line("sizes", text + (f"; {enlarged:,} would be enlarged" if enlarged else ""))]


def _caption_lines(captions: dict[str, Any] | None) -> list[str]:
    if captions is None:
        return []
    empty = f", {captions['empty']:,} empty" if captions["empty"] else ""
    words = f"{captions['words_median']:g} words (median), at most {captions['words_most']}"
    lines = [_line("captions", f"{captions['with_text']:,}{empty}; {captions['different']:,} different; {words}")]
    return lines + [_line("", f"“{text}”") for text in captions["examples"]]


def _mixed_texts(mixed: list[dict[str, Any]] | None) -> list[str]:
    """What rows may be called in a training, a line a row."""
    return [f"{one['file']}: {'; '.join(f'“{text}”' for text in dict.fromkeys(one['drawn']))}" for one in mixed or []]


def _trouble_lines(report: dict[str, Any]) -> list[str]:
    bad, copies = report["bad"], report["duplicates"]
    lines = [_line("bad", f"{len(bad)} files; --skip-bad leaves them out" if bad else "no file")]
    lines += [_line("", f"{one['file']}: {one['reason']}") for one in bad]
    if copies["groups"]:
        both = f", {copies['in_both_splits']} of them in both splits" if copies["in_both_splits"] else ""
        lines.append(_line("duplicates", f"{copies['groups']} pictures stored more than once{both}"))
        lines += [_line("", " = ".join(group)) for group in copies["examples"]]
    if near := report["near_duplicates"]:
        lines += _near_lines(near)
    return lines


def _near_lines(near: dict[str, Any]) -> list[str]:
    if not near["count"]:
        return []
    both = f", {near['in_both_splits']} of them across the splits" if near["in_both_splits"] else ""
    lines = [_line("near copies", f"{near['count']:,} pair{'s' * (near['count'] > 1)}{both}")]
    lines += [_line("", f"{' ~ '.join(pair['files'])} ({pair['how']})") for pair in near["pairs"][:EXAMPLES]]
    return lines + [_line("", f"and {near['count'] - EXAMPLES:,} more")] * (near["count"] > EXAMPLES)
