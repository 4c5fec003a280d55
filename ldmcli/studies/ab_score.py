"""Scores of a two-alternative forced choice: what raters preferred, with intervals, and how well they agree.

Functions of plain data. `decoded` turns an exported document of answers into choices; `score` turns the choices of all
raters into the document that `ldm ab --score --json` prints (Tab. 5 and App. E.3.6 report its percentages).
"""

import base64
import hashlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from ldmcli.core.errors import InputError
from ldmcli.maths import rng

KIND = "ldm ab answers"
METHODS = ("a", "b", "truth")
PAIRS = (("a", "truth"), ("b", "truth"), ("a", "b"))  # task 1 of two methods, then task 2
Z95 = 1.959964
RESAMPLES = 4000
LEAST_RATERS = 5  # of fewer, resamples say too little


@dataclass(frozen=True)
class Choice:
    """One answer. unit: what was compared, the same number where a trial was shown again; chosen, other: of METHODS."""

    rater: str
    trial: int
    unit: int
    chosen: str
    other: str
    side: str  # left | right
    seconds: float


def token(salt: str, trial: int, method: str) -> str:
    """What stands for a method in a trial of the page: nobody sees from it which one it is."""
    return hashlib.sha256(f"{salt}/{trial}/{method}".encode()).hexdigest()[:12]


def veiled(names: Mapping[str, str]) -> str:
    """Names of the methods as text that does not meet the eye."""
    return base64.b64encode(json.dumps(dict(names)).encode()).decode("ascii")


def unveiled(text: str) -> dict[str, str]:
    """The names in what `veiled` gave."""
    return json.loads(base64.b64decode(text))


def decoded(document: Any, where: str) -> list[Choice]:
    """Choices of an exported document. Raises InputError, naming `where`, for anything else."""
    if not isinstance(document, dict) or document.get("kind") != KIND:
        raise InputError(f"{where}: no answers of an `ldm ab` page; raters export them with its last button")
    found = []
    try:
        salt, rater = str(document["salt"]), str(document["rater"]).strip()
        for answer in document["answers"]:
            trial = int(answer["trial"])
            of = {token(salt, trial, method): method for method in METHODS}
            sides = of[answer["chosen"]], of[answer["other"]]
            side = {"left": "left", "right": "right"}[answer["side"]]
            found.append(Choice(rater, trial, int(answer["unit"]), *sides, side, float(answer["seconds"])))
        unveiled(document["methods"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{where}: answers that are damaged or were changed ({error!r}); export them again") from error
    if len({choice.trial for choice in found}) < len(found):
        raise InputError(f"{where}: two answers to one trial; export them again")
    return found


def one_page(documents: Mapping[str, Any]) -> None:
    """Raises InputError where answers are of different pages, or two documents (by their names) are of one rater."""
    pages: dict[str, str] = {}
    raters: dict[str, str] = {}
    for where, document in documents.items():
        pages.setdefault(str(document.get("page")), where)
        if len(pages) > 1:
            raise InputError(f"{where}: answers of another page than {next(iter(pages.values()))}; score them apart")
        rater = str(document.get("rater")).strip()
        first = raters.setdefault(rater, where)
        if first != where:
            raise InputError(f"{where}: rater {rater!r}, as in {first}; give the later export alone, or rename one")


def score(documents: Mapping[str, Any], seed: int = 0) -> dict[str, Any]:
    """The document of a study. documents: exported answers by name of their file, at least one.

    Shares are of the first of a pair, in [0, 1], with Wilson's 95 % interval of all answers. From five raters on
    `interval_raters` is the percentile interval of 4,000 resamples of raters, which holds where answers of one rater
    resemble one another. Trials that were shown again count for consistency alone. Raises InputError.
    """
    read = {where: decoded(document, where) for where, document in documents.items()}
    one_page(documents)
    choices = [choice for found in read.values() for choice in found]
    if not choices:
        raise InputError(f"{next(iter(documents))}: no answers yet")
    first = [choice for found in read.values() for choice in _presentations(found)[0]]
    again = [pair for found in read.values() for pair in _presentations(found)[1]]
    document = next(iter(documents.values()))
    return {
        "page": document["page"],
        "methods": unveiled(document["methods"]),
        "trials": document.get("trials"),
        "answers": len(choices),
        "comparisons": {
            f"{a}_vs_{b}": compared(own, a, b, seed)
            for a, b in PAIRS
            if (own := [choice for choice in first if {choice.chosen, choice.other} == {a, b}])
        },
        "raters": [_rater(document, read[where]) for where, document in documents.items()],
        "consistency": _consistency(again),
        "repeats": len(again),
        "left": sum(choice.side == "left" for choice in choices) / len(choices),
        "median_seconds": median(choice.seconds for choice in choices),
    }


def _presentations(choices: Sequence[Choice]) -> tuple[list[Choice], list[tuple[Choice, Choice]]]:
    """(a rater's first answer to each unit, pairs of it and the answer to the same unit shown again)."""
    first: dict[int, Choice] = {}
    again = []
    for choice in sorted(choices, key=lambda choice: choice.trial):
        earlier = first.setdefault(choice.unit, choice)
        if earlier is not choice:
            again.append((earlier, choice))
    return list(first.values()), again


def _consistency(again: Sequence[tuple[Choice, Choice]]) -> float | None:
    return sum(one.chosen == other.chosen for one, other in again) / len(again) if again else None


def _rater(document: Mapping[str, Any], choices: Sequence[Choice]) -> dict[str, Any]:
    seconds = [choice.seconds for choice in choices]
    return {
        "rater": str(document["rater"]).strip(),
        "answers": len(choices),
        "complete": len(choices) == document.get("trials"),
        "consistency": _consistency(_presentations(choices)[1]),
        "median_seconds": median(seconds) if seconds else None,
    }


def compared(choices: Sequence[Choice], a: str, b: str, seed: int = 0) -> dict[str, Any]:
    """Preference for `a` over `b` among choices between the two, with intervals and agreement of raters."""
    won: Counter[str] = Counter(choice.chosen for choice in choices)
    votes: dict[int, list[str]] = defaultdict(list)
    by_rater: dict[str, list[bool]] = defaultdict(list)
    for choice in choices:
        votes[choice.unit].append(choice.chosen)
        by_rater[choice.rater].append(choice.chosen == a)
    counts = [(sum(own), len(own)) for own in by_rater.values()]
    low, high = wilson(won[a], len(choices))
    return {
        "task": 1 if b == "truth" else 2,
        "n": len(choices),
        "preferred": {a: won[a], b: won[b]},
        "share": won[a] / len(choices),
        "interval": [low, high],
        "raters": len(counts),
        "interval_raters": list(resampled_raters(counts, seed)) if len(counts) >= LEAST_RATERS else None,
        "alpha": krippendorff_alpha(list(votes.values())),
    }


def wilson(successes: int, n: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval of a share (Wilson 1927), by default of 95 %. (0, 1) for n = 0."""
    if n == 0:
        return 0.0, 1.0
    share, over = successes / n, z * z / n
    middle = (share + over / 2) / (1 + over)
    half = z / (1 + over) * math.sqrt(share * (1 - share) / n + over / (4 * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def resampled_raters(
    counts: Sequence[tuple[int, int]], seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """95 % percentile interval of the pooled share when whole raters are drawn anew. counts: (successes, answers)
    of each rater, who has at least one answer."""
    table = np.array(counts, np.float64)
    uniform = rng.uniform(seed, range(resamples * len(counts)), "raters").numpy()
    drawn = table[(uniform * len(counts)).astype(np.int64).reshape(resamples, len(counts))].sum(1)
    low, high = np.percentile(drawn[:, 0] / drawn[:, 1], [2.5, 97.5])
    return float(low), float(high)


def krippendorff_alpha(units: Sequence[Sequence[str]]) -> float | None:
    """Agreement of raters on nominal values (Krippendorff 2011): 1 = always, 0 = as by chance. units: the values that
    raters gave to each unit; those with a single value say nothing. None without two raters of one unit, and where one
    value alone occurs."""
    rated = [Counter(values) for values in units if len(values) > 1]
    total = sum(counts.total() for counts in rated)
    of_value: Counter[str] = sum(rated, Counter())
    if len(of_value) < 2:
        return None
    observed = sum(
        sum(count * (counts.total() - count) for count in counts.values()) / (counts.total() - 1) for counts in rated
    )
    expected = sum(count * (total - count) for count in of_value.values()) / (total - 1)
    return 1 - observed / expected
