"""`ldm demo`, `data`, `report`, `runs`, `recipes`, `presets`, `doctor`: what stands around training."""

import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Annotated

from ldmcli.cli import options as opt
from ldmcli.cli.train import data_name, require_folder
from ldmcli.core import config, console
from ldmcli.core.errors import ModelError

Minutes = Annotated[float, opt.option("--minutes", value=10.0, panel=opt.TRAINING, metavar="MINUTES", default="10",
    min=0.1, help="Time for the whole chain; settings are chosen for it.")]
DemoSeed = Annotated[int, opt.option("--seed", value=0, panel=opt.TRAINING, metavar="N", default="0", min=0,
    help="Decides every random draw.")]
DemoPreset = Annotated[opt.Text, opt.option("--preset", panel=opt.MODEL, metavar="NAME", default="the quickest known",
    help="Settings of the diffusion model; `paper` trains as the paper does, to compare.")]
DemoOut = Annotated[Path | None, opt.option("--out", "-o", panel=opt.OUTPUT, metavar="DIR", default="runs/demo",
    help="Folder for the runs, images and the report.")]
Source = Annotated[opt.Text, opt.argument("Data set, as for --data.", "D", default="shapes", required=False)]
Run = Annotated[Path, opt.argument("Run folder.", "RUN")]
Root = Annotated[Path | None, opt.argument("Folder that holds runs.", "FOLDER", default="runs", required=False)]
_OTHER_ROWS = {name: alias for name, alias in opt.ROWS.items() if name != "data"}


_CHAIN = {"preset": DemoPreset, "minutes": Minutes, "seed": DemoSeed, "out": DemoOut, "fresh": opt.Fresh}


@opt.takes(opt.ROWS, _CHAIN, opt.TALK)
def demo(given: opt.Given) -> None:
    """The whole chain in minutes: autoencoder, diffusion model, samples, metrics, report.

    Without --data it runs on embedded shapes with captions, and needs no network.
    """
    settings = config.resolve("diffusion", given.layers("data.")).config.data
    out = given.out or Path("runs") / "demo"
    require_folder(out)
    from ldmcli.products.demo import demo as run_demo

    result = run_demo(settings, minutes=given.minutes, out=out, preset=given.preset or "", fresh=given.fresh,
                      seed=given.seed)
    if given.json:
        console.emit_json(result)


@opt.takes({"source": Source}, _OTHER_ROWS, {"out": opt.Out}, opt.TALK)
def data(given: opt.Given) -> None:
    """Show what ldm sees in a data set: columns, counts, sizes, bad files by name, and a contact sheet."""
    named = [("D", {"data.source": given.source})] if given.source is not None else []
    settings = config.resolve("diffusion", [*given.layers("data."), *named]).config.data
    out = given.out or Path("outputs") / f"{data_name(settings.source)}-data"
    require_folder(out)
    from ldmcli.products.inspect import inspect, inspect_text

    result = inspect(settings, out)
    if given.json:
        console.emit_json(result)
    else:
        console.out(inspect_text(result, console.width()))


@opt.takes({"run": Run}, opt.TALK)
def report(given: opt.Given) -> None:
    """Write the report of a run again: one HTML file that opens offline."""
    from ldmcli.core.runs import is_run

    if not is_run(given.run):
        raise ModelError(f"{given.run}: no run folder (it holds no run.json); `ldm runs` lists runs")
    from ldmcli.products.report import write_report

    path = write_report(given.run)
    if given.json:
        console.emit_json({"report": str(path)})
    else:
        console.out(path)


@opt.takes({"root": Root}, opt.TALK)
def runs(given: opt.Given) -> None:
    """List runs with kind, state, step, data and latest metric, newest last."""
    from ldmcli.core.runs import list_runs

    rows = list_runs(given.root or Path("runs"))
    if given.json:
        console.emit_json({"runs": rows})
    elif not rows:
        console.say(f"no runs below {given.root or 'runs'}/; `ldm demo` makes some")
    else:
        names = ("path", "kind", "state", "step", "data")
        cells = [[*(row.get(name, "") for name in names), _metrics(row.get("metrics") or {})] for row in rows]
        console.out(console.table(cells, [*names, "metrics"]))


def _metrics(found: dict) -> str:
    numbers = {name: value for name, value in found.items() if isinstance(value, (int, float))}
    return ", ".join(f"{name} {value:.4g}" for name, value in list(numbers.items())[:3])


@opt.takes(opt.TALK)
def recipes(given: opt.Given) -> None:
    """List the recipes that come with ldm: what each is for; use one with --recipe NAME."""
    found = [recipe_summary(path) for path in sorted(config.RECIPES.glob("*.toml"))]
    _show_list(given, "recipes", found)


@opt.takes(opt.TALK)
def presets(given: opt.Given) -> None:
    """List presets, such as the paper's networks; use one with --preset NAME."""
    found = [{"name": name, "command": config.COMMAND_OF[preset.kind], "summary": preset.summary}
             for name, preset in config.presets().items()]
    _show_list(given, "presets", found)


def recipe_summary(path: Path) -> dict[str, str]:
    """Name, command and the first line of the comment at the head of a recipe."""
    sections = {setting.partition(".")[0] for setting in config.read_toml(path)}
    kind = "autoencoder" if sections & {"autoencoder", "loss"} else "diffusion"
    first = path.read_text(encoding="utf-8").split("\n", 1)[0]
    return {"name": path.stem, "command": config.COMMAND_OF[kind], "summary": first.lstrip("# ").strip()}


def _show_list(given: opt.Given, name: str, found: list[dict[str, str]]) -> None:
    if given.json:
        console.emit_json({name: found})
    elif not found:
        console.say(f"no {name} here")
    else:
        console.out(console.table([[row["name"], row["command"], row["summary"]] for row in found],
                                  ["name", "for", "what"]))


@opt.takes(opt.TALK)
def doctor(given: opt.Given) -> None:
    """Check this machine: versions, devices, cores, memory and disk, and what is missing."""
    facts = machine_facts()
    if given.json:
        console.emit_json(facts)
    else:
        console.out(console.facts(facts))


def machine_facts() -> dict[str, object]:
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
