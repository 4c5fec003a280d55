"""`ldm ab`: preference of people between two methods. `ldm neighbours`: what of the training set samples resemble."""

import hashlib
from pathlib import Path

from ldmcli.cli import options as opt
from ldmcli.cli.generate import slug
from ldmcli.cli.measure import Features, Reference, ReferenceSplit, reference
from ldmcli.cli.parsing import DATA, MODEL, OUTPUT, SAMPLING, ParsedOptions, Text, argument, command, option
from ldmcli.cli.train import require_folder
from ldmcli.core import console
from ldmcli.core.errors import UsageError

Sides = argument(
    list[Path] | None,
    "A B",
    "Two folders of images with the same file names, or models (runs), whose answers to held-out rows are sampled.",
    default="none with --score",
    required=False,
)
Truth = option(
    Text,
    "--truth",
    "DIR|data",
    "True pictures of the same names, for task 1 (which one is real?); data: the rows that models are given.",
    panel=DATA,
    default="none, task 2 alone",
)
Given = option(
    Path | None,
    "--conditions",
    "DIR|FILE",
    "What both were made from, shown between them: pictures of the same names, a text a line, or JSON {name: text}.",
    panel=DATA,
    default="of models their own, else none",
)
Subjects = option(int | None, "-n --count", "N", "Pictures a method.", panel=SAMPLING, min=1, default="at most 50")
Exposure = option(
    float,
    "--exposure",
    "SECONDS",
    "How long a pair is seen before the choice; 0 = until it is made.",
    panel=OUTPUT,
    value=3.0,
    min=0,
    default="3",
)
Repeats = option(
    int,
    "--repeats",
    "N",
    "Pairs that are shown again with sides swapped, to see how steady a rater is.",
    panel=OUTPUT,
    value=0,
    min=0,
    default="0",
)
Question = option(
    Text, "--question", "TEXT", "What raters are asked of each pair.", panel=OUTPUT, default="by task and conditions"
)
Answers = option(
    list[Path] | None, "--score", "FILE...", "Score answers that raters exported, one file a rater.", panel=OUTPUT
)
Page = option(Path | None, "--out -o", "PAGE.html", "The page.", panel=OUTPUT, default="below outputs/, stated")

_PAGE = {
    "sides": Sides,
    "truth": Truth,
    "conditions": Given,
    "count": Subjects,
    "exposure": Exposure,
    "repeats": Repeats,
    "question": Question,
    "score": Answers,
    "out": Page,
    "overwrite": opt.Overwrite,
}
Looked = option(Path | None, "--images", "DIR", "Pictures in place of a model's samples.", panel=MODEL, default="none")
Samples = option(int, "-n --count", "N", "Samples.", panel=SAMPLING, value=8, min=1, default="8")
Neighbours = option(int, "-k", "N", "Neighbours a sample.", panel=SAMPLING, value=10, min=1, default="10")
NeighboursOut = option(
    Path | None, "--out -o", "DIR", "Folder for sheet and numbers.", panel=OUTPUT, default="neighbours/ in the run"
)
_TRAINING = {name: alias for name, alias in opt.ROWS.items() if name not in ("split", "size", "data")}
_DRAWN = ("steps", "guidance", "guidance_interval", "autoguidance", "sampler", "eta", "temperature", "spacing")


@command(_PAGE, {**opt.ROWS, "data": Reference, "split": ReferenceSplit}, opt.DRAWING, opt.TALK)
def ab(given: ParsedOptions) -> None:
    """Let people choose between two methods: one offline page of blind pairs, and scores of their answers.

    A two-alternative forced choice as in the paper's user study. `ldm ab --score FILE ...` reads what raters export.
    """
    sides = [*(given.sides or ())]
    if given.score:
        return _score(given, [*given.score, *sides])
    if len(sides) != 2:
        raise UsageError("name two folders of images or models, or --score with files of answers")
    result = _page(given, *sides)
    if given.json:
        console.emit_json(result)
    else:
        console.out(result["page"])


@command(
    {"data": Reference, **_TRAINING},
    {"model": opt.Model, "images": Looked, "weights": opt.Weights},
    {"count": Samples, "k": Neighbours, "features": Features},
    opt.DRAWING,
    {"out": NeighboursOut},
    opt.TALK,
)
def neighbours(given: ParsedOptions) -> None:
    """Show the nearest training pictures of samples, and how far they are from them.

    Beside the distances stand those of held-out pictures, which no model has seen. Distances are between features of a
    network; the paper's Figs. 32 to 34 take --features vgg16.
    """
    if given.model is not None and given.images is not None:
        raise UsageError("--model and --images exclude each other: say whose neighbours are wanted")
    model = given.model if given.images is not None or given.model is not None else _newest()
    name = slug(given.images.stem if given.images is not None else Path(model).name)
    if given.out is not None:
        require_folder(given.out)
    data = reference(given, {"model": model} if model else {})
    if isinstance(data, str):
        raise UsageError(f"--data {data}: holds no pictures of a training; name a data set")
    from ldmcli.studies.neighbours import neighbours_to_folder

    result = neighbours_to_folder(
        given.out,
        Path("outputs") / f"{name}-neighbours",
        model=model,
        images=given.images,
        data=data,
        n=given.count,
        k=given.k,
        features=given.features,
        seed=given.seed,
        settings={name: value for name, value in opt.sampling_of(given).items() if value is not None},
        batch_size=given.batch_size,
        weights=given.weights,
    )
    if given.json:
        console.emit_json(result)
    else:
        console.out(_distances(result))


def _newest() -> str:
    from ldmcli.core.runs import newest_run

    run = str(newest_run("diffusion"))
    console.say(f"model: {run} (the newest diffusion run)")
    return run


def _distances(result: dict) -> str:
    """Distances to the nearest training picture, as a table, and what they mean."""
    found = {"samples": (result["n"], result["nearest"]["samples"])}
    if result["n_held_out"]:
        found["held-out pictures"] = (result["n_held_out"], result["nearest"]["held_out"])
    headers = ["nearest training picture of", "n", "least", "5 %", "median", "95 %"]
    rows = [[name, n, *(f"{value:.4g}" for value in numbers.values())] for name, (n, numbers) in found.items()]
    lines = [console.table(rows, headers)]
    if result["closer_than_held_out"] is not None:
        share = f"{100 * result['closer_than_held_out']:.0f} %"
        lines.append(f"{share} of samples are nearer than 95 % of held-out pictures (5 % where nothing is repeated)")
    if result["copies"]:
        lines.append(f"{result['copies']} samples are exact copies of training pictures")
    return "\n".join([*lines, result["sheet"]])


def _page(given: ParsedOptions, a: Path, b: Path) -> dict:
    digest = hashlib.sha256(f"{a} {b} {given.truth} {given.conditions} {given.seed}".encode("utf-8", "replace"))
    out = given.out or Path("outputs") / f"ab-{digest.hexdigest()[:6]}.html"
    require_folder(out.parent)
    from ldmcli.studies.ab import check_page, items_of_folders, write_study
    from ldmcli.studies.ab_models import is_model, items_of_models

    check_page(out)
    names = {"a": str(a), "b": str(b)}
    if is_model(a) or is_model(b):
        if given.conditions is not None:
            raise UsageError("--conditions: models have their own; it belongs to two folders of images")
        data = reference(given, {"model": str(a if is_model(a) else b)})
        if isinstance(data, str):
            raise UsageError(f"--data {data}: holds no rows to condition on; name a data set")
        items = items_of_models(
            {"a": a, "b": b},
            out.with_suffix(""),
            truth=None if given.truth in (None, "data") else Path(given.truth),
            rows_as_truth=given.truth == "data",
            data=data,
            split=given.split or "validation",
            n=given.count,
            seed=given.seed,
            settings={k: v for k, v in opt.sampling_of(given).items() if v is not None},
            batch_size=given.batch_size,
            overwrite=given.overwrite,
        )
    else:
        idle = [name for name, _ in given.layers("data.")]
        idle += [f"--{name.replace('_', '-')}" for name in (*_DRAWN, "batch_size") if getattr(given, name) is not None]
        if idle:
            raise UsageError(f"{idle[0]}: says what models are given and how they sample; both sides are folders")
        truth = Path(given.truth) if given.truth else None
        items = items_of_folders(a, b, truth, given.conditions, given.count, given.seed)
    if given.truth:
        names["truth"] = given.truth
    how = {"repeats": given.repeats, "exposure": given.exposure, "question": given.question or "", "seed": given.seed}
    return write_study(out, items, names, **how)


def _score(given: ParsedOptions, paths: list[Path]) -> None:
    from ldmcli.studies.ab import score_files

    result = score_files(paths, given.seed)
    if given.json:
        console.emit_json(result)
    else:
        console.out(describe(result))


def describe(result: dict) -> str:
    """The scores as lines for people: a comparison a row, then the raters."""
    names = result["methods"]
    rows = []
    for key, found in result["comparisons"].items():
        a, b = key.split("_vs_")
        cells = [_share(found["share"]), _interval(found["interval"]), _interval(found["interval_raters"])]
        alpha = "none" if found["alpha"] is None else f"{found['alpha']:.2f}"
        rows.append([f"task {found['task']}: {names[a]} over {names[b]}", *cells, found["n"], found["raters"], alpha])
    headers = ["preferred", "share", "95 %", "95 % by raters", "answers", "raters", "alpha"]
    raters = [
        [one["rater"], one["answers"], "" if one["complete"] else "broken off", _share(one["consistency"])]
        + [f"{one['median_seconds']:.1f} s" if one["median_seconds"] is not None else "none"]
        for one in result["raters"]
    ]
    foot = f"left chosen in {_share(result['left'])}, median time {result['median_seconds']:.1f} s"
    if result["repeats"]:
        foot += f", the same answer to {_share(result['consistency'])} of {result['repeats']} pairs shown again"
    people = console.table(raters, ["rater", "answers", "", "consistent", "median"])
    return "\n".join([console.table(rows, headers), "", people, foot])


def _share(value: float | None) -> str:
    return "none" if value is None else f"{100 * value:.1f} %"


def _interval(bounds: list[float] | None) -> str:
    return "none" if bounds is None else f"{100 * bounds[0]:.1f} to {100 * bounds[1]:.1f} %"
