"""`ldm demo`, `data`, `report`, `runs`, `recipes`, `presets`, `doctor`: what stands around training."""

import itertools
import os
import platform
import re
import shutil
import sys
import textwrap
from pathlib import Path

from ldmcli.cli import options as opt
from ldmcli.cli.parsing import MODEL, OUTPUT, TRAINING, ParsedOptions, Text, argument, command, option
from ldmcli.cli.train import data_name, require_folder
from ldmcli.core import config, console
from ldmcli.core.errors import InputError, ModelError, UsageError
from ldmcli.core.outputs import CONTACT, refuse_foreign
from ldmcli.core.settings import DiffusionConfig

Minutes = option(
    float,
    "--minutes",
    "MINUTES",
    "Time for the whole chain; settings are chosen for it.",
    panel=TRAINING,
    value=10.0,
    default="10",
    min=0.2,
)
DemoSeed = option(int, "--seed", "N", "Decides every random draw.", panel=TRAINING, value=0, default="0", min=0)
DemoPreset = option(
    Text,
    "--preset",
    "NAME",
    "Settings of the diffusion model; `paper` trains as the paper does, to compare.",
    panel=MODEL,
    default="chosen for the machine",
)
DemoOut = option(
    Path | None, "--out -o", "DIR", "Folder for the runs, images and the report.", panel=OUTPUT, default="runs/demo"
)
ReportOut = option(
    Path | None,
    "--out -o",
    "DIR",
    "Folder for the report, as where the run's cannot be written.",
    panel=OUTPUT,
    default="the run's folder",
)
Source = argument(Text, "D", "Data set, as for --data.", default="shapes", required=False)
Run = argument(Path, "RUN", "Run folder.")
RecipeName = argument(Text, "NAME", "Recipe to show, as its file.", default="the list", required=False)
Root = argument(Path | None, "FOLDER", "Folder that holds runs.", default="runs", required=False)
_OTHER_ROWS = {name: alias for name, alias in opt.ROWS.items() if name != "data"}

# what a recipe trains, in the order of the list → heading
RECIPE_GROUPS = {
    "autoencoder": "First stages",
    "classifier": "Classifiers for guidance",
    "": "Unconditional",
    "class": "Classes",
    "text": "Text to image",
    "layout": "Layout to image",
    "map": "Semantic maps",
    "sr": "Super-resolution",
    "inpaint": "Inpainting",
}

_CHAIN = {"preset": DemoPreset, "minutes": Minutes, "seed": DemoSeed, "out": DemoOut, "fresh": opt.Fresh}


@command(opt.ROWS, _CHAIN, opt.TALK)
def demo(given: ParsedOptions) -> None:
    """The whole chain in minutes: autoencoder, diffusion model, samples, metrics, report.

    Without --data it runs on embedded shapes with captions, and needs no network.
    """
    settings = config.resolve("diffusion", given.layers("data.")).config.data
    out = given.out or Path("runs") / "demo"
    require_folder(out)
    from ldmcli.reports.demo import demo as run_demo
    from ldmcli.reports.demo_table import summary_text

    result = run_demo(
        settings, minutes=given.minutes, out=out, preset=given.preset or "", fresh=given.fresh, seed=given.seed
    )
    if given.json:
        console.emit_json(result)
    else:
        console.out(summary_text(result, out))


_DATA_SETTINGS = {"recipe": opt.Recipe, "assignments": opt.Assignments}


@command({"source": Source}, _OTHER_ROWS, _DATA_SETTINGS, {"out": opt.Out}, opt.TALK)
def data(given: ParsedOptions) -> None:
    """Show what ldm sees in a data set: columns, counts, sizes, bad files by name, and a contact sheet."""
    named = [("D", {"data.source": given.source})] if given.source is not None else []
    recipe = _data_layers(given.recipe) if given.recipe else []
    layers = [*recipe, *given.layers("data."), *named, *config.set_layers(given.assignments or ())]
    settings = config.resolve("diffusion", layers).config.data
    out = given.out or Path("outputs") / f"{data_name(settings.source)}-data"
    require_folder(out)
    # in the folder that this command names itself the sheet is its own, also as older versions wrote it, without a mark
    refuse_foreign([out / CONTACT], {CONTACT: ""} if given.out is None else {})
    from ldmcli.reports.dataset_report import inspect, inspect_text

    result = inspect(settings, out)
    if given.json:
        console.emit_json(result)
    else:
        console.out(inspect_text(result, console.width()))


def _data_layers(recipe: str) -> list[config.Layer]:
    """What a recipe of any training says of data."""
    layers = config.recipe_layers(config.read_recipe(config.recipe_path(recipe)).kind or "diffusion", recipe)
    return [
        (origin, {path: value for path, value in values.items() if path.startswith("data.")})
        for origin, values in layers
    ]


@command({"run": Run, "out": ReportOut}, opt.TALK)
def report(given: ParsedOptions) -> None:
    """Write the report of a run again: one HTML file that opens offline."""
    from ldmcli.core.runs import folder_for_results, is_run, locate

    run = locate(given.run)[0]
    if not is_run(run):
        raise ModelError(f"{given.run}: no run folder (it holds no run.json); `ldm runs` lists runs")
    if given.out is None and folder_for_results(given.run) is None:
        raise UsageError(f"{given.run}: comes with ldm, and nothing is written there; say where with --out DIR")
    from ldmcli.reports.report import write_report

    if given.out is not None:
        require_folder(given.out)
    path = write_report(run, out=given.out)
    if given.json:
        console.emit_json({"report": str(path)})
    else:
        console.out(path)


@command({"root": Root}, opt.TALK)
def runs(given: ParsedOptions) -> None:
    """List runs with kind, state, step, data and latest metric, newest last."""
    from ldmcli.core.runs import list_runs

    if given.root and not given.root.is_dir():
        raise InputError(f"{given.root}: no such folder")
    rows = list_runs(given.root or Path("runs"))
    if given.json:
        console.emit_json({"runs": rows})
    elif not rows:
        console.say(f"no runs below {given.root or 'runs'}/; `ldm demo` makes some")
    else:
        names = ("path", "kind", "state", "step", "data")
        cells = [[*(row.get(name, "") for name in names), _metrics(row)] for row in rows]
        console.out(console.table(cells, [*names, "metrics"]))


def _metrics(row: dict) -> str:
    """The newest evaluation, and the best one where it was kept."""
    numbers = {name: value for name, value in row["metrics"].items() if isinstance(value, (int, float))}
    shown = [f"{name} {value:.4g}" for name, value in list(numbers.items())[:3]]
    if best := row.get("best"):
        shown.append(f"best {best['metric']} {best['value']:.4g} @{best['step']}")
    return ", ".join(shown)


@command({"recipe": RecipeName}, opt.TALK)
def recipes(given: ParsedOptions) -> None:
    """List the recipes that come with ldm, or show one; use one with --recipe NAME.

    A recipe is a TOML file: a command, what it needs and what to expect, and the settings. `ldm recipes NAME > my.toml`
    starts one of your own.
    """
    if given.recipe:
        path = config.recipe_path(given.recipe, "recipes")
        if given.json:
            console.emit_json(recipe_summary(path))
        else:
            console.out(path.read_text(encoding="utf-8-sig").rstrip("\n"))
        return
    found = [recipe_summary(path) for path in sorted(config.RECIPES.glob("*.toml"), key=_by_number)]
    if given.json:
        console.emit_json({"recipes": found})
    elif not found:
        console.say("no recipes here")
    else:
        console.out(_recipe_list(found))


def _listed(title: str, rows: list[dict]) -> str:
    """Names and summaries below a title, as wide as the terminal."""
    width = max(len(row["name"]) for row in rows)
    lines = [
        textwrap.fill(
            row["summary"],
            console.width(),
            initial_indent=f"  {row['name']:<{width}}  ",
            subsequent_indent=" " * (width + 4),
            break_long_words=False,
        )
        for row in rows
    ]
    return "\n".join([title, *lines])


def _recipe_list(found: list[dict]) -> str:
    blocks = []
    for title in [title for title in RECIPE_GROUPS.values() if any(row["group"] == title for row in found)]:
        rows = [row for row in found if row["group"] == title]
        blocks.append(_listed(f"{title} ({rows[0]['command']})", rows))
    example = "`ldm recipes NAME` shows one: command, needs, what to expect, settings."
    return console.clean("\n\n".join([*blocks, example]))


@command(opt.TALK)
def presets(given: ParsedOptions) -> None:
    """List presets, such as the paper's networks; use one with --preset NAME."""
    found = [
        {"name": name, "command": config.COMMAND_OF[preset.kind], "summary": preset.summary}
        for name, preset in config.presets().items()
    ]
    if given.json:
        console.emit_json({"presets": found})
        return
    commands = dict.fromkeys(row["command"] for row in found)
    rows = [{**row, "summary": row["summary"].removeprefix(f"{row['name']}: ")} for row in found]
    blocks = [_listed(command, [row for row in rows if row["command"] == command]) for command in commands]
    console.out(console.clean("\n\n".join(blocks)))


def recipe_summary(path: Path) -> dict[str, object]:
    """Name, command, group and summary of a recipe, and the fields of its head as {"hardware": text, …}.

    The head is the comment that begins the file: a line that says what it is, then fields as in "# Time: 3 minutes",
    each going on over the lines below it that are indented.
    """
    recipe = config.read_recipe(path)
    lines = itertools.takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8-sig").splitlines())
    summary, *rest = [line.removeprefix("#").removeprefix(" ") for line in lines] or [""]
    fields = re.findall(r"^([A-Z][a-z]+):(.*(?:\n[ \t]+.*)*)", "\n".join(rest), re.MULTILINE)
    head = {name.lower(): " ".join(text.replace("\\\n", "\n").split()) for name, text in fields}
    said = next((kind for kind, name in config.COMMAND_OF.items() if head.get("command", "").startswith(name)), None)
    kind = recipe.kind or said or "diffusion"
    return {
        "name": path.stem,
        "command": config.COMMAND_OF[kind],
        "group": RECIPE_GROUPS[_recipe_group(kind, path)],
        "summary": summary.strip(),
        "head": head,
    }


def _recipe_group(kind: str, path: Path) -> str:
    if kind in ("autoencoder", "classifier"):
        return kind
    settings = config.resolve(kind, config.recipe_layers(kind, path)).config
    assert isinstance(settings, DiffusionConfig)
    if settings.task.name != "generate":
        return settings.task.name
    return next((kind for kind in reversed(list(RECIPE_GROUPS)) if kind in settings.condition.kinds), "")


def _by_number(path: Path) -> list[object]:
    """Sorts ldm2 before ldm16."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.stem)]


@command(opt.TALK)
def doctor(given: ParsedOptions) -> None:
    """Check this machine: versions, devices, cores, memory and disk, and what is missing."""
    machine = machine_summary()
    if given.json:
        console.emit_json(machine)
    else:
        console.out(console.key_values(machine))


def machine_summary() -> dict[str, object]:
    """What decides whether and how fast training runs here."""
    import psutil
    import torch

    from ldmcli import __version__
    from ldmcli.core.files import human_bytes

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    devices = [torch.cuda.get_device_name(index) for index in range(count)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "ldm": __version__,
        "python": sys.version.split()[0],
        "system": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        **{name: _version(name) for name in ("accelerate", "datasets", "transformers", "safetensors", "lpips")},
        "devices": devices or ["cpu"],
        "cores": cores,
        "memory free": human_bytes(psutil.virtual_memory().available),
        "disk free here": human_bytes(shutil.disk_usage(Path.cwd()).free),
        "cache": os.environ.get("LDM_CACHE") or "~/.cache/ldm",
        "offline": os.environ.get("HF_HUB_OFFLINE") == "1",
    }


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "missing: pip install " + package
