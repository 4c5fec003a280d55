"""Preference of people between two methods: a page of pairs from folders of images, and scores of what raters answer.

The two-alternative forced choice of the paper (Tab. 5 in the conference's text, App. E.3.6), after Saharia et al.: in
task 1 a method's picture stands beside the true one, in task 2 beside the other method's; what both were made from
stands between them. Nothing on the page names a method: pictures come in random order, and each side of a trial has a
token that only hashing the method's name gives back (`ab_score.token`).
"""

import base64
import hashlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldmcli.core import console, files
from ldmcli.core.errors import InputError, ModelError, UsageError
from ldmcli.core.outputs import page_is_ours, write_page
from ldmcli.data import pictures
from ldmcli.data.decode import decode
from ldmcli.maths import rng
from ldmcli.studies.ab_page import page_text
from ldmcli.studies.ab_score import KIND, METHODS, PAIRS, score, token, veiled

MOST = 50  # pictures where nobody says how many
SECONDS_TO_ANSWER = 2
TRUE, BETTER = "Which of the two pictures is the real one?", "Which of the two pictures looks better?"
WITH_CONDITION = "Which of the two pictures is the better version of what was given?"


@dataclass(frozen=True)
class Item:
    """Pictures of one subject by method ("a", "b", and "truth" where it is known), and what they were made from: a
    picture, a text, or nothing."""

    sides: Mapping[str, Path]
    given: Path | str | None = None


@dataclass(frozen=True)
class Trial:
    """unit: what is compared, the same number where the trial is a repetition; left, right: methods of its item."""

    unit: int
    item: int
    left: str
    right: str


def plan_trials(count: int, pairs: Sequence[tuple[str, str]], repeats: int, seed: int) -> list[Trial]:
    """Every pair of methods of `count` items once, in random order with random sides; then `repeats` of the first half
    of them again, sides swapped, at random places of the second half. Depends on the arguments alone."""
    units = [(item, pair) for pair in pairs for item in range(count)]
    swapped = rng.uniform(seed, range(len(units)), "ab", "side").lt(0.5).tolist()
    order = rng.permutation(rng.key(seed, "ab", "order"), 0, len(units)).tolist()
    trials = []
    for number in order:
        item, (first, second) = units[number]
        trials.append(Trial(number, item, *((second, first) if swapped[number] else (first, second))))
    half = math.ceil(len(trials) / 2)
    if repeats > half:
        raise UsageError(f"--repeats {repeats}: at most half of the {len(trials)} pairs can be shown again")
    late = trials[half:]
    for number, trial in enumerate(trials[:half][:repeats]):
        place = rng.key(seed, "ab", "repeat", number) % (len(late) + 1)
        late.insert(place, Trial(trial.unit, trial.item, trial.right, trial.left))
    return trials[:half] + late


def study_document(
    items: Sequence[Item],
    names: Mapping[str, str],
    *,
    repeats: int = 0,
    exposure: float = 3.0,
    question: str = "",
    seed: int = 0,
) -> dict[str, Any]:
    """What the page holds, as JSON; the pictures in it as data URIs in random order. names: of the methods, veiled.

    exposure: seconds that a pair is seen, 0 = until it is answered. question: "" = by task and condition.
    """
    pairs = [pair for pair in PAIRS if all(side in items[0].sides for side in pair)]
    trials = plan_trials(len(items), pairs, repeats, seed)
    paths = sorted({*(path for item in items for path in item.sides.values()), *_given_pictures(items)})
    places = rng.permutation(rng.key(seed, "ab", "pictures"), 0, len(paths)).tolist()
    number = {paths[place]: k for k, place in enumerate(places)}
    images = [data_uri(paths[place]) for place in places]
    salt = hashlib.sha256(f"{seed}{images}".encode()).hexdigest()[:16]
    asked = [question or (WITH_CONDITION if items[0].given is not None else text) for text in (TRUE, BETTER)]

    def as_json(k: int, trial: Trial) -> dict[str, Any]:
        sides, given = items[trial.item].sides, items[trial.item].given
        both = (trial.left, trial.right)
        return {
            "unit": trial.unit,
            "question": 0 if "truth" in both else 1,
            "pictures": [number[sides[side]] for side in both],
            "tokens": [token(salt, k, side) for side in both],
            "given": number[given] if isinstance(given, Path) else given,
        }

    document = {
        "kind": KIND,
        "salt": salt,
        "methods": veiled(names),
        "exposure": exposure,
        "minutes": max(1, math.ceil(len(trials) * (exposure + SECONDS_TO_ANSWER) / 60)),
        "questions": asked,
        "trials": [as_json(k, trial) for k, trial in enumerate(trials)],
        "images": images,
    }
    return {"page": hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest(), **document}


def _given_pictures(items: Sequence[Item]) -> list[Path]:
    return [item.given for item in items if isinstance(item.given, Path)]


def data_uri(path: Path) -> str:
    """A picture as PNG without its metadata, which might name the method. Raises InputError for a damaged one."""
    buffer = io.BytesIO()
    image = decode(path)
    image.info.clear()
    image.save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


# --- folders ----------------------------------------------------------------------------------------------------------


def items_of_folders(
    a: Path, b: Path, truth: Path | None = None, conditions: Path | None = None, n: int | None = None, seed: int = 0
) -> list[Item]:
    """Items of folders whose pictures have the same names; n of them by the seed, None = at most 50.

    conditions: a folder of pictures of the same names, a JSON file {name: text}, or a text file with a line for each
    picture in order of names. Raises InputError for what has no partner.
    """
    folders = {"a": a, "b": b} | ({"truth": truth} if truth is not None else {})
    named = {side: _by_name(folder, [*folders.values(), conditions]) for side, folder in folders.items()}
    names = sorted(named["a"])
    for side, found in named.items():
        lonely = sorted(set(names) ^ set(found))
        if lonely:
            raise InputError(
                f"{lonely[0]}: in only one of {a} and {folders[side]} ({len(lonely)} pictures without a partner); "
                "pictures of one subject have the same name in each folder"
            )
    given = dict.fromkeys(names) if conditions is None else _conditions(conditions, names, list(folders.values()))
    if n is not None and n > len(names):
        raise InputError(f"-n {n}: {a} holds {len(names)} pictures")
    chosen = rng.permutation(rng.key(seed, "ab", "items"), 0, len(names))[: n or MOST]
    return [
        Item({side: found[names[k]] for side, found in named.items()}, given[names[k]]) for k in sorted(chosen.tolist())
    ]


def _by_name(folder: Path, besides: Sequence[Path | None]) -> dict[str, Path]:
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder of images")
    others = [path for path in besides if path is not None and path != folder]
    return pictures.by_pair_name(folder, pictures.image_files([folder], besides=others))


def _conditions(where: Path, names: Sequence[str], besides: Sequence[Path]) -> dict[str, Path | str | None]:
    """What each of the pictures `names` was made from."""
    found: Mapping[str, Any]
    if where.is_dir():
        found = _by_name(where, besides)
    elif not where.is_file():
        raise InputError(f"--conditions {where}: no such file or folder")
    elif where.suffix.lower() == ".json":
        try:
            found = files.read_json(where)
        except ModelError as error:
            raise InputError(f"--conditions {error}") from error
        if not isinstance(found, dict):
            raise InputError(f"--conditions {where}: not an object of texts by picture, as {{name: text}}")
        found = {str(Path(name).with_suffix("").as_posix()): str(text) for name, text in found.items()}
    else:
        lines = where.read_text(encoding="utf-8", errors="replace").splitlines()
        if len(lines) != len(names):
            raise InputError(f"--conditions {where}: {len(lines)} lines for {len(names)} pictures; give a line each")
        found = dict(zip(names, lines))
    missing = [name for name in names if name not in found]
    if missing:
        raise InputError(f"--conditions {where}: nothing for {missing[0]} ({len(missing)} of {len(names)} missing)")
    return {name: found[name] for name in names}


# --- the commands -----------------------------------------------------------------------------------------------------


def write_study(out: Path, items: Sequence[Item], names: Mapping[str, str], **how: Any) -> dict[str, Any]:
    """Writes the page `out` of `study_document`, and returns what --json prints. Raises UsageError where a file is
    there that is no page of ldm."""
    check_page(out)
    _warn_of_sizes(items)
    document = study_document(items, names, **how)
    text = page_text(document)
    write_page(out, text)
    size = len(text)
    console.say(
        f"{len(document['trials'])} pairs of {len(items)} subjects, about {document['minutes']} min a rater; "
        f"{files.human_bytes(size)}. Send the page to raters; `ldm ab --score FILE …` reads what they send back."
    )
    return {
        "page": str(out),
        "sha256": document["page"],
        "pictures": len(items),
        "trials": len(document["trials"]),
        "minutes": document["minutes"],
        "methods": dict(names),
        "questions": document["questions"],
    }


def check_page(out: Path) -> None:
    """Raises UsageError where no page can be written."""
    if out.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--out {out}: a page, as in study.html")
    if out.exists() and not page_is_ours(out):
        raise UsageError(f"{out}: not written by ldm, or changed since; move it away or choose another --out")


def _warn_of_sizes(items: Sequence[Item]) -> None:
    sizes = {side: decode(path).size for side, path in items[0].sides.items()}
    if len(set(sizes.values())) > 1:
        shown = ", ".join(f"{side} {width}x{height}" for side, (width, height) in sizes.items())
        console.warn(f"pictures of one subject have other sizes ({shown}); raters may see the difference")


def score_files(paths: Sequence[Path], seed: int = 0) -> dict[str, Any]:
    """The scores of exported answers (`ab_score.score`). Raises InputError."""
    documents = {}
    for path in paths:
        if not path.is_file():
            raise InputError(f"{path}: no such file of answers")
        try:
            documents[str(path)] = files.read_json(path)
        except ModelError as error:
            raise InputError(f"{error}; raters export answers with the last button of the page") from error
    return score(documents, seed)


__all__ = ["METHODS", "Item", "items_of_folders", "plan_trials", "score_files", "study_document", "write_study"]
