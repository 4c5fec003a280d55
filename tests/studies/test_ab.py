"""Preference of people: the plan of a page, what it hides, scores of simulated raters, and pictures of models."""

import base64
import hashlib
import json
import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tiny import ldm

from ldmcli.studies import ab_score
from ldmcli.studies.ab import items_of_folders, plan_trials, study_document
from ldmcli.studies.ab_page import page_text

COLOURS = {
    "good-method": (200, 60, 60),
    "bad-method": (60, 60, 200),
    "real-ones": (60, 180, 60),
    "low-res": (99, 99, 99),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """Four folders of 12 pictures of the same names; each is of its folder's colour, and says so in its metadata."""
    root = tmp_path_factory.mktemp("ab")
    for name, colour in COLOURS.items():
        (root / name).mkdir()
        for k in range(12):
            info = PngInfo()
            info.add_text("ldm", f"made by {name}")
            image = Image.new("RGB", (8, 8) if name == "low-res" else (16, 16), (*colour[:2], colour[2] + k))
            image.save(root / name / f"{k:02d}.png", pnginfo=info)
    return root


def study(root: Path, *, truth: bool = True, conditions: Path | None = None, **how) -> dict:
    real = root / "real-ones" if truth else None
    names = {"a": str(root / "good-method"), "b": str(root / "bad-method"), "truth": str(root / "real-ones")}
    return study_document(items_of_folders(root / "good-method", root / "bad-method", real, conditions), names, **how)


def colour_of(document: dict, number: int) -> np.ndarray:
    content = base64.b64decode(document["images"][number].partition(",")[2])
    from io import BytesIO

    with Image.open(BytesIO(content)) as image:
        assert "ldm" not in image.info
        return np.asarray(image)[0, 0]


def method_of(document: dict, number: int) -> str:
    """The method of a picture, from its colour alone."""
    red, green, _ = colour_of(document, number)
    return {200: "a", 60: "truth" if green == 180 else "b"}[int(red)]


def answered(document: dict, rater: str, preference: dict, seed: int = 0, count: int | None = None) -> dict:
    """What a rater exports who prefers the first of a pair with the probability that `preference` names, and looks at
    pictures alone."""
    draw, answers = np.random.default_rng(seed), []
    for k, trial in enumerate(document["trials"][:count]):
        shown = [method_of(document, number) for number in trial["pictures"]]
        pair = tuple(shown) if tuple(shown) in preference else tuple(shown[::-1])
        at = shown.index(pair[0] if draw.random() < preference[pair] else pair[1])
        chosen, other = trial["tokens"][at], trial["tokens"][1 - at]
        side = ("left", "right")[at]
        answers.append(
            {"trial": k, "unit": trial["unit"], "chosen": chosen, "other": other, "side": side, "seconds": 1}
        )
    shared = {name: document[name] for name in ("kind", "page", "salt", "methods")}
    return {**shared, "rater": rater, "trials": len(document["trials"]), "answers": answers}


# --- the plan ---------------------------------------------------------------------------------------------------------

PAIRS = [("a", "truth"), ("b", "truth"), ("a", "b")]


def test_each_pair_is_shown_once_with_sides_and_order_by_the_seed():
    trials = plan_trials(100, PAIRS, 0, seed=3)
    assert len({trial.unit for trial in trials}) == len(trials) == 300
    assert {(trial.item, frozenset((trial.left, trial.right))) for trial in trials} == {
        (item, frozenset(pair)) for item in range(100) for pair in PAIRS
    }
    for a, b in PAIRS:
        left = sum(trial.left == a for trial in trials if {trial.left, trial.right} == {a, b})
        assert 30 < left < 70
    assert [trial.unit for trial in trials] != sorted(trial.unit for trial in trials)
    assert trials == plan_trials(100, PAIRS, 0, seed=3) != plan_trials(100, PAIRS, 0, seed=4)


def test_repeats_come_late_with_sides_swapped():
    trials = plan_trials(20, PAIRS, 10, seed=0)
    count = Counter(trial.unit for trial in trials)
    assert len(trials) == 70 and sorted(count.values())[-10:] == [2] * 10
    for unit in [unit for unit, times in count.items() if times == 2]:
        first, again = [(k, trial) for k, trial in enumerate(trials) if trial.unit == unit]
        assert first[0] < 30 <= again[0]
        assert (first[1].left, first[1].right) == (again[1].right, again[1].left)


# --- the page ---------------------------------------------------------------------------------------------------------


def test_nothing_on_the_page_names_a_method_or_a_side(folders):
    document = study(folders, conditions=folders / "low-res", repeats=5)
    text = page_text(document)
    for name in COLOURS:
        assert name not in text
    trial = {"unit", "question", "pictures", "tokens", "given"}
    assert all(set(one) == trial for one in document["trials"])
    tokens = [one for each in document["trials"] for one in each["tokens"]]
    assert len(set(tokens)) == len(tokens), "a token that occurs twice tells which sides are of one method"
    methods = [tuple(colour_of(document, k)[:2]) for k in range(len(document["images"]))]
    changes = sum(one != other for one, other in zip(methods, methods[1:]))
    assert changes > len(methods) / 2, "pictures stand in blocks of one method"


@pytest.mark.parametrize("seed", [0, 1])
def test_tokens_stand_for_the_methods_that_are_seen(folders, seed):
    document = study(folders, seed=seed, repeats=3)
    for k, trial in enumerate(document["trials"]):
        shown = [method_of(document, number) for number in trial["pictures"]]
        assert trial["tokens"] == [ab_score.token(document["salt"], k, method) for method in shown]
        assert trial["question"] == (0 if "truth" in shown else 1)


def test_the_page_runs_its_own_script_and_loads_nothing(folders, tmp_path):
    (tmp_path / "words.txt").write_text("\n".join(f"</script><b>{k}" for k in range(12)))
    text = page_text(study(folders, conditions=tmp_path / "words.txt"))
    [script] = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text and "default-src 'none'" in text
    data = re.search(r'<script type="application/json" id="study">(.*?)</script>', text, re.DOTALL)[1]
    assert json.loads(data)["trials"][0]["given"].startswith("</script><b>") and "</script><b>" not in data
    assert not re.search(r"""(src|href)=["']?https?:""", text)


def test_the_same_request_is_the_same_page_and_other_pictures_are_another(folders, tmp_path):
    first, again, other = (study(folders, seed=seed)["page"] for seed in (0, 0, 1))
    assert first == again != other


# --- scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [12, 50, 200])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.7])
def test_wilsons_interval_covers_the_true_share(n, share):
    """Exact coverage over all outcomes of n answers."""
    inside = [low <= share <= high for low, high in (ab_score.wilson(k, n) for k in range(n + 1))]
    chances = [math.comb(n, k) * share**k * (1 - share) ** (n - k) for k in range(n + 1)]
    assert 0.92 < sum(p for p, covered in zip(chances, inside) if covered) < 0.985


def test_wilsons_interval_as_published():
    assert ab_score.wilson(0, 10) == (0, pytest.approx(0.2775, abs=1e-4))
    assert ab_score.wilson(7, 10) == (pytest.approx(0.3968, abs=1e-4), pytest.approx(0.8922, abs=1e-4))
    assert ab_score.wilson(0, 0) == (0, 1)


def test_resampled_raters_cover_a_share_that_differs_between_raters():
    """Raters who disagree: Wilson's interval of pooled answers is too narrow, that of raters is not."""
    draw, covered = np.random.default_rng(0), {"raters": 0, "wilson": 0}
    for study_number in range(100):
        own = np.clip(draw.normal(0.6, 0.2, 15), 0, 1)
        counts = [(int(draw.binomial(40, share)), 40) for share in own]
        pooled = ab_score.wilson(sum(k for k, _ in counts), 600)
        by_rater = ab_score.resampled_raters(counts, study_number, resamples=400)
        for name, (low, high) in {"raters": by_rater, "wilson": pooled}.items():
            covered[name] += low <= 0.6 <= high
    assert covered["raters"] >= 86 and covered["wilson"] <= 75


@pytest.mark.parametrize(
    "raters, expected",
    [
        (("0100000010", "1110010000"), 0.095),  # Krippendorff 2011, two observers
        (("123321412...", "1233224125.3", ".3332342251.", "12332441251."), 0.743),
        (("aab", "aab"), 1.0),
        (("ab", "ba"), -0.5),
        (("aaa", "aaa"), None),
        (("ab",), None),
    ],
)
def test_krippendorffs_alpha(raters, expected):
    """A row a rater, "." where there is no value."""
    units = [[value for value in unit if value != "."] for unit in zip(*raters)]
    found = ab_score.krippendorff_alpha(units)
    assert found == (None if expected is None else pytest.approx(expected, abs=1e-3))


PREFERENCE = {("a", "b"): 0.7, ("a", "truth"): 0.4, ("b", "truth"): 0.15}


def test_scores_of_raters_who_look_at_pictures_alone(folders):
    document = study(folders, repeats=6)
    raters = {f"{k}.json": answered(document, f"rater {k}", PREFERENCE, seed=k) for k in range(12)}
    found = ab_score.score(raters)
    for (a, b), share in PREFERENCE.items():
        one = found["comparisons"][f"{a}_vs_{b}"]
        low, high = one["interval"]
        assert one["n"] == 144 and one["raters"] == 12 and one["task"] == (1 if b == "truth" else 2)
        assert low <= share <= high and low <= one["share"] <= high
        assert one["interval_raters"][0] <= one["share"] <= one["interval_raters"][1]
        assert abs(one["alpha"]) < 0.25, "these raters answer independently of one another"
    assert found["repeats"] == 72 and 0.4 < found["consistency"] < 0.85
    assert found["methods"]["a"].endswith("good-method") and found["median_seconds"] == 1
    assert all(one["complete"] for one in found["raters"])


def test_a_rater_who_is_always_sure_agrees_with_all_and_with_himself(folders):
    document = study(folders, repeats=6, truth=False)
    sure = {("a", "b"): 1.0}
    found = ab_score.score({str(k): answered(document, str(k), sure, seed=k) for k in range(3)})
    only = found["comparisons"]["a_vs_b"]
    assert list(found["comparisons"]) == ["a_vs_b"] and found["consistency"] == 1
    assert only["share"] == 1 and only["alpha"] is None and only["interval_raters"] is None


def test_answers_that_were_broken_off_are_scored_and_said_to_be(folders):
    document = study(folders)
    [rater] = ab_score.score({"x": answered(document, "x", PREFERENCE, count=5)})["raters"]
    assert rater["answers"] == 5 and not rater["complete"]


# --- the command ------------------------------------------------------------------------------------------------------


def test_from_folders_to_scores(folders, tmp_path):
    page = tmp_path / "study.html"
    line = ("ab", folders / "good-method", folders / "bad-method", "--truth", folders / "real-ones", "--out", page)
    made = ldm(*line, "--json")
    assert made.code == 0 and made.json["trials"] == 36
    data = json.loads(re.search(r'id="study">(.*?)</script>', page.read_text(), re.DOTALL)[1])
    assert data["page"] == made.json["sha256"] and data["exposure"] == 3
    for k in range(2):
        (tmp_path / f"{k}.json").write_text(json.dumps(answered(data, f"r{k}", PREFERENCE, seed=k)))
    told = ldm("ab", "--score", tmp_path / "0.json", tmp_path / "1.json")
    assert told.code == 0 and "task 1:" in told.stdout and "task 2:" in told.stdout and "r1" in told.stdout
    assert ldm(*line, "--seed", 1).code == 0, "its own page is replaced"
    page.write_text("mine")
    refused = ldm(*line)
    assert refused.code == 2 and "not written by ldm" in refused.line and page.read_text() == "mine"


def changed(document: dict, **values) -> str:
    return json.dumps({**document, **values})


@pytest.mark.parametrize(
    "second, words",
    [
        (lambda good: "[]", "no answers of an `ldm ab` page"),
        (lambda good: "{", "damaged"),
        (lambda good: changed(good, rater="other", page="0" * 64), "another page"),
        (lambda good: json.dumps(good), "rater 'one'"),
        (lambda good: changed(good, rater="other", salt="x"), "damaged or were changed"),
        (lambda good: changed(good, rater="other", answers=good["answers"] * 2), "two answers to one trial"),
    ],
)
def test_answers_that_cannot_be_scored(folders, tmp_path, second, words):
    good = answered(study(folders), "one", PREFERENCE)
    (tmp_path / "good.json").write_text(json.dumps(good))
    (tmp_path / "second.json").write_text(second(good))
    ending = ldm("ab", "--score", tmp_path / "good.json", tmp_path / "second.json")
    assert ending.code == 3 and words in ending.line and ending.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "options, code, words",
    [
        (("{root}/good-method",), 2, "name two folders"),
        (("{root}/good-method", "{root}/none"), 3, "no such folder"),
        (("{root}/good-method", "{root}/bad-method", "-n", 13), 3, "holds 12 pictures"),
        (("{root}/good-method", "{root}/bad-method", "--repeats", 7), 2, "at most half"),
        (("{root}/good-method", "{root}/bad-method", "--steps", 3), 2, "--steps"),
        (("{root}/good-method", "{root}/bad-method", "--limit", 3), 2, "--limit"),
        (("{root}/good-method", "{root}/bad-method", "--conditions", "{tmp}/short.txt"), 3, "1 lines for 12"),
        (("{root}/good-method", "{root}/bad-method", "--conditions", "{tmp}/none.txt"), 3, "no such file"),
        (("{root}/good-method", "{root}/bad-method", "--out", "{tmp}/page"), 2, "a page"),
        (("{root}/good-method", "{tmp}/fewer"), 3, "without a partner"),
    ],
)
def test_what_cannot_be_shown_is_said_in_a_line(folders, tmp_path, options, code, words):
    (tmp_path / "short.txt").write_text("one line\n")
    (tmp_path / "fewer").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "fewer" / "00.png")
    out = () if "--out" in options else ("--out", tmp_path / "page.html")
    ending = ldm("ab", *(str(one).format(root=folders, tmp=tmp_path) for one in options), *out)
    assert ending.code == code and words in ending.line
    assert not (tmp_path / "page.html").exists()


# --- models -----------------------------------------------------------------------------------------------------------


def shown(page: Path) -> dict:
    return json.loads(re.search(r'id="study">(.*?)</script>', page.read_text(), re.DOTALL)[1])


@pytest.mark.parametrize("kind, given", [("plain", None), ("text", str), ("map", int), ("sr", int), ("inpaint", int)])
def test_models_answer_the_same_rows_with_the_same_noise(tiny_runs, tmp_path, kind, given):
    page, run = tmp_path / "page.html", tiny_runs[kind]
    line = ("ab", run, run, "--truth", "data", "-n", 2, "--steps", 1, "--out", page, "--val-fraction", 0.2)
    assert (ending := ldm(*line)).code == 0, ending.stderr
    sides = {name: tiny.pictures(tmp_path / "page" / name) for name in ("a", "b", "truth")}
    assert all(np.array_equal(a, b) for a, b in zip(sides["a"], sides["b"])) and len(sides["a"]) == 2
    document = shown(page)
    assert len(document["trials"]) == 6
    assert all(
        trial["given"] is None if given is None else type(trial["given"]) is given for trial in document["trials"]
    )
    if kind == "inpaint":
        holes = [(image != before).any(-1) for image, before in zip(sides["a"], sides["truth"])]
        assert all(0 < hole.mean() < 1 for hole in holes), "what is known stays"
    before = page.read_bytes()
    assert ldm(*line).code == 0 and page.read_bytes() == before
    other = ldm(*line, "--seed", 1)
    assert other.code == 2 and "another request" in other.line
    assert ldm(*line, "--seed", 1, "--overwrite").code == 0


def test_models_of_different_tasks_are_not_compared(tiny_runs, tmp_path):
    ending = ldm("ab", tiny_runs["sr"], tiny_runs["plain"], "--out", tmp_path / "page.html")
    assert ending.code == 2 and "another task" in ending.line and not list(tmp_path.iterdir())
