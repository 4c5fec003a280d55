"""`ldm bench`: how fast models run on this machine."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ldmcli.cli import options as opt
from ldmcli.cli.manage import recipe_summary
from ldmcli.cli.parsing import MODEL, OUTPUT, SAMPLING, TRAINING, ParsedOptions, Text, command, flag, option
from ldmcli.cli.study import numbers
from ldmcli.core import config, console, launch
from ldmcli.core.errors import UsageError

if TYPE_CHECKING:
    from ldmcli.studies.bench_subjects import Asked

SUITES = ("gpu",)
Presets = option(
    list[str] | None, "--preset", "NAME", "Networks to measure, with random weights; repeatable.", panel=MODEL
)
Recipes = option(list[str] | None, "--recipe", "FILE", "The same of a recipe; repeatable.", panel=MODEL)
Models = option(
    list[str] | None,
    "--model",
    "RUN",
    "Trained models to measure: runs or what convert reads; repeatable.",
    panel=MODEL,
)
Suite = option(
    Text,
    "--suite",
    SUITES,
    "A fixed choice: published and own networks with variants, at most 8 minutes on one GPU.",
    panel=MODEL,
    default="none",
)
Tiny = flag("--tiny", "With --suite: networks of a few thousand weights, on any device, to try it.", panel=MODEL)
Works = option(
    Text,
    "--work",
    "NAME[,NAME]",
    "What to measure: train, sample, encode, decode.",
    panel=TRAINING,
    default="what the model is for",
)
BatchSizes = option(
    Text,
    "--batch-size",
    "N[,N]",
    "Images at a time, over all processes; several are measured one after the other.",
    panel=TRAINING,
    default="the model's, at most 64; 8 on a CPU",
)
Epoch = option(
    int, "--rows", "N", "Images of a data set, for hours an epoch.", panel=TRAINING, value=0, default="0", min=0
)
Seconds = option(
    float, "--seconds", "SECONDS", "Time for each number.", panel=TRAINING, value=5.0, default="5", min=0.01
)
Steps = option(int | None, "--steps", "N", "Sampling steps.", panel=SAMPLING, default="the model's", min=1)
Against = option(
    Path | None, "--against", "OLD.json", "Ratios to an earlier document of --json.", panel=OUTPUT, default="none"
)
FailBelow = option(
    float | None,
    "--fail-below",
    "RATIO",
    "With --against: end with code 8 where images/s fall below this share of before.",
    panel=OUTPUT,
    default="none",
    min=0,
)

_WHICH = {
    "preset": Presets,
    "recipe": Recipes,
    "model": Models,
    "suite": Suite,
    "tiny": Tiny,
    "assignments": opt.Assignments,
}
_HOW = {"work": Works, "batch_size": BatchSizes, "rows": Epoch, "seconds": Seconds, "steps": Steps}
_OUT = {"against": Against, "fail_below": FailBelow}
_MACHINE = {"gpus": opt.Gpus, "mixed_precision": opt.MixedPrecision, "compile": opt.Compile}


@command({"size": opt.Size}, _WHICH, _HOW, _OUT, _MACHINE, opt.TALK)
def bench(given: ParsedOptions) -> None:
    """How fast models train, sample, encode and decode here: images/s, TFLOP/s, memory, on made-up data.

    MFU is the share of what a matrix product in the same number format reaches, measured in the same run. Without
    --preset, --recipe or --model the default networks are measured.
    """
    if given.fail_below is not None and given.against is None:
        raise UsageError("--fail-below: needs --against, the document to compare with")
    if given.tiny and not given.suite:
        raise UsageError("--tiny: belongs to --suite")
    if given.suite:
        _check_suite(given)
    size, batch_sizes = config.size_of(given.size), numbers("--batch-size", given.batch_size or "")
    processes = max(given.gpus or 1, launch.world()[1])
    if batch_sizes and min(batch_sizes) < processes:  # before processes are started for it
        why = f", one for each of {processes} processes" if processes > 1 else ""
        raise UsageError(f"--batch-size {min(batch_sizes)}: must be at least {processes}{why}")
    code = launch.relaunch_if_needed(given.gpus, given.argv)
    if code is not None:
        raise typer.Exit(code)
    from ldmcli.reports.bench_table import bench_text
    from ldmcli.studies import bench as studies
    from ldmcli.studies.bench_suite import gpu_suite

    request = studies.BenchRequest(
        asked=tuple(_asked(given)) if not given.suite else (),
        works=tuple(word.strip() for word in (given.work or "").split(",") if word.strip()),
        batch_sizes=batch_sizes,
        size=size,
        steps=given.steps,
        seconds=given.seconds,
        rows=given.rows,
    )
    speaks = launch.world()[0] == 0
    # before anything is measured, which may take minutes
    old = studies.earlier(given.against) if speaks and given.against is not None else None
    document = gpu_suite(request, tiny=given.tiny) if given.suite else studies.bench(request)
    if not speaks:
        return
    if old is not None:
        studies.compare(document, old, given.against)
    if given.json:
        console.emit_json(document)
    else:
        console.out(bench_text(document))
    if given.fail_below is not None:
        studies.check_ratios(document["rows"], given.fail_below)


def _check_suite(given: ParsedOptions) -> None:
    """UsageError for an option that --suite, whose models and settings are fixed, would not heed."""
    fixed = {"--preset": given.preset, "--recipe": given.recipe, "--model": given.model, "--set": given.assignments}
    fixed |= {origin: True for origin, layer in given.layers() if "data.size" not in layer}
    if heedless := [name for name, value in fixed.items() if value]:
        raise UsageError(f"--suite: its models and settings are fixed; leave {heedless[0]} out")


def _asked(given: ParsedOptions) -> "list[Asked]":
    """The models that options name, in their order; the two default networks where none is named."""
    from ldmcli.studies.bench_subjects import Asked

    found = [_preset(name, given) for name in given.preset or ()]
    found += [_recipe(name, given) for name in given.recipe or ()]
    found += [_model(name, given) for name in given.model or ()]
    if found:
        return found
    stage: Any = _config("autoencoder", given).config
    return [
        Asked(name="default autoencoder", kind="autoencoder", config=stage),
        Asked(name="default model", kind="diffusion", config=_config("diffusion", given).config, first_stage=stage),
    ]


def _config(kind: str, given: ParsedOptions, *, preset: str = "", recipe: str = "") -> config.Resolved:
    layers = [layer for layer in given.layers() if set(layer[1]) <= set(config.paths(kind))]
    mine = [text for text in given.assignments or () if text.partition("=")[0].strip() in config.paths(kind)]
    return config.resolve(
        kind, config.gather(kind, preset=preset, recipe=recipe, environ=os.environ, named=layers, assignments=mine)
    )


def _stage_of(preset: str, given: ParsedOptions) -> Any:
    """Settings of the first stage that a preset was published with; of others the default one's."""
    extra = config.presets()[preset].extra if preset in config.presets() else {}
    return _config("autoencoder", given, preset=str(extra.get("first_stage", ""))).config


def _preset(name: str, given: ParsedOptions) -> "Asked":
    from ldmcli.studies.bench_subjects import Asked

    known = config.presets()
    kind = known[name].kind if name in known else "diffusion"
    found = _config(kind, given, preset=name).config
    return Asked(
        name=name, kind=kind, config=found, first_stage=None if kind != "diffusion" else _stage_of(name, given)
    )


def _recipe(name: str, given: ParsedOptions) -> "Asked":
    from ldmcli.studies.bench_subjects import Asked

    path = config.recipe_path(name)
    summary = recipe_summary(path)
    kind = {command: kind for kind, command in config.COMMAND_OF.items()}[str(summary["command"])]
    if kind == "classifier":
        raise UsageError(f"--recipe {name}: a classifier; `ldm bench` measures autoencoders and diffusion models")
    found = _config(kind, given, recipe=str(path)).config
    head: Any = summary["head"]
    words = str(head.get("command", "")).split()
    named = words[words.index("--autoencoder") + 1] if "--autoencoder" in words else ""
    stage = None
    if kind == "diffusion" and named != "none":
        stage = _stage_of_run(Path(named).name, given) or _stage_of(config.read_recipe(path).preset, given)
    return Asked(name=path.stem, kind=kind, config=found, first_stage=stage)


def _stage_of_run(name: str, given: ParsedOptions) -> Any:
    """Settings of a first stage whose run is named after its recipe or preset; None where neither is known."""
    if (config.RECIPES / f"{name}.toml").is_file():
        return _config("autoencoder", given, recipe=name).config
    preset = config.presets().get(name)
    return _config("autoencoder", given, preset=name).config if preset and preset.kind == "autoencoder" else None


def _model(name: str, given: ParsedOptions) -> "Asked":
    from ldmcli.formats.bundle import AutoencoderBundle, ClassifierBundle, Reading
    from ldmcli.formats.open_model import read
    from ldmcli.studies.bench_subjects import Asked

    bundle = read(Path(name), Reading())
    if isinstance(bundle, ClassifierBundle):
        raise UsageError(f"--model {name}: a classifier; `ldm bench` measures autoencoders and diffusion models")
    kind = "autoencoder" if isinstance(bundle, AutoencoderBundle) else "diffusion"
    layers = [*given.layers(), *config.set_layers(given.assignments or ())]
    for origin, layer in layers:
        if fixed := [path for path in layer if path.partition(".")[0] not in ("train", "sample", "data")]:
            raise UsageError(f"{origin} {fixed[0]}: a trained model keeps it; only train, sample and data can change")
    resolved = config.resolve(kind, [(name, config.flat(bundle.config)), *layers])
    return Asked(name=Path(name).name, kind=kind, config=resolved.config, model=Path(name))
