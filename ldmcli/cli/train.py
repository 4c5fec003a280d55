"""`ldm train-ae`, `ldm train-ldm`, `ldm distill` and `ldm train-classifier`: options to one configuration, then the
training loop."""

import os
import re
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from ldmcli.cli import options as opt
from ldmcli.cli.parsing import (
    DATA,
    MODEL,
    TRAINING,
    ParsedOptions,
    Text,
    argument,
    command,
    guidance_of,
    option,
    setting,
)
from ldmcli.core import config, console, launch
from ldmcli.core.errors import DivergedError, Interrupted, ModelError, UsageError
from ldmcli.core.settings import PROCESS, AutoencoderConfig, ClassifierConfig, DiffusionConfig

GuidedModel = option(
    Text,
    "--model",
    "RUN",
    "Diffusion run that the classifier will lead: its autoencoder, latent scale and noise schedule are taken.",
    panel=MODEL,
    default="none",
)
Teacher = argument(Path, "RUN", "Diffusion run that knows how; RUN@STEP or RUN@best: one of its checkpoints.")
Calls = option(int, "--calls", "N", "Network calls an image, usually 1 to 4.", panel=MODEL, value=4, default="4", min=1)
BakedGuidance = option(
    Text,
    "--guidance",
    "SCALE",
    "Scale of the teacher's guidance that is baked in.",
    panel=MODEL,
    default="the teacher's",
)
DISTILL_STEPS = 1000
_TeachersData = setting(
    "data.source",
    "D",
    "Hub id, folder of images, parquet or webdataset files, save_to_disk folder, or shapes (embedded).",
    names="--data",
    panel=DATA,
    default="the teacher's",
)
_STUDENT_LOOP = {
    **opt.LOOP,
    "minutes": setting(
        "train.max_minutes",
        "MINUTES",
        "Train for this long, whatever --steps says.",
        names="--minutes",
        panel=TRAINING,
        default="0, no limit",
    ),
    "steps": setting("train.steps", "N", "Optimiser updates.", panel=TRAINING, default=str(DISTILL_STEPS)),
    "batch_size": setting(
        "train.batch_size",
        "N",
        "Images a step, over all processes and accumulation.",
        panel=TRAINING,
        default="the teacher's",
    ),
    "lr": setting("train.lr", "RATE", "Learning rate.", panel=TRAINING, default="a fifth of the teacher's"),
}
ENDLESS = 1_000_000  # steps, where minutes end a training
_AE_MODEL = {
    **opt.CONFIGURATION,
    "f": opt.Factor,
    "reg": opt.Reg,
    "embed_dim": opt.EmbedDim,
    "codebook_size": opt.CodebookSize,
    "attn": opt.Attention,
}
_LDM_MODEL = {
    "autoencoder": opt.Autoencoder,
    "condition": opt.Condition,
    "task": opt.Task,
    "scale": opt.Scale,
    "degradation": opt.Degradation,
    "init_from": opt.InitFrom,
    **opt.CONFIGURATION,
}
_CLASSIFIER_MODEL = {"autoencoder": opt.Autoencoder, "model": GuidedModel, **opt.CONFIGURATION}
_IMAGES = {**opt.ROWS, "crop": opt.Crop, "flip": opt.Flip}


@command(_IMAGES, _AE_MODEL, opt.LOOP, opt.RUN_OUTPUT, opt.TALK, opt.TRAIN_MACHINE, kind="autoencoder")
def train_ae(given: ParsedOptions) -> None:
    """Train an autoencoder, the first stage: images to small latents and back.

    Without --preset a small network is taken that trains on any machine.
    """
    resolved = resolve("autoencoder", given, given.layers())
    assert isinstance(resolved.config, AutoencoderConfig)
    autoencoder = resolved.config.autoencoder
    network = f"preset {given.preset}" if given.preset else f"the {autoencoder.family} network"
    named = f"{network}, f = {autoencoder.f}, {autoencoder.reg}"
    _run(given, resolved, named)


@command(
    _IMAGES,
    {"cache": opt.Cache},
    _LDM_MODEL,
    opt.LOOP,
    {"snr_gamma": opt.SnrGamma},
    opt.RUN_OUTPUT,
    opt.TALK,
    opt.TRAIN_MACHINE,
)
def train_ldm(given: ParsedOptions) -> None:
    """Train a diffusion model in the latents of an autoencoder, the second stage.

    --autoencoder none works on pixels.
    """
    layers = given.layers()
    if given.snr_gamma is not None:
        layers.append(("--snr-gamma", {"diffusion.loss_weight": "min_snr"}))
    resolved = resolve("diffusion", given, layers)
    assert isinstance(resolved.config, DiffusionConfig)
    begun = given.init_from
    autoencoder = given.autoencoder or (
        _autoencoder_of(Path(begun)) if begun else _newest_autoencoder(needed=not given.plan)
    )
    where = f"in latents of {autoencoder}" if autoencoder not in ("", "none") else "on pixels"
    if given.init_from:
        where = f"from the weights of {given.init_from}"
    conditions, task = "+".join(resolved.config.condition.kinds) or "none", resolved.config.task.name
    only_sr = [name for name in ("scale", "degradation") if getattr(given, name) is not None]
    if only_sr and task != "sr":
        raise UsageError(f"--{only_sr[0]} belongs to --task sr; this is --task {task}")
    what = "diffusion" if task == "generate" else f"diffusion for {task}"
    _run(
        given,
        resolved,
        f"{what} {where}, condition: {conditions}",
        autoencoder=autoencoder,
        init_from=given.init_from or "",
    )


@command(
    {**_IMAGES, "data": _TeachersData},
    {"cache": opt.Cache},
    {"teacher": Teacher, "calls": Calls, "guidance": BakedGuidance, "assignments": opt.Assignments},
    _STUDENT_LOOP,
    opt.RUN_OUTPUT,
    opt.TALK,
    opt.TRAIN_MACHINE,
)
def distill(given: ParsedOptions) -> None:
    """Make of a diffusion run a model of few network calls an image, its guidance baked in.

    Network, conditions, data and optimiser are the run's.
    """
    from ldmcli.training.distillation import student_settings

    scale = guidance_of(given.guidance)
    if isinstance(scale, dict):
        raise UsageError("--guidance: one scale, of all conditions together, is baked in; give a number")
    lowest: list[config.Layer] = [
        (f"{given.teacher}", student_settings(given.teacher, given.calls, scale)),
        ("ldm distill", {"train.steps": ENDLESS if given.minutes else DISTILL_STEPS, "train.cooldown": 0.4}),
    ]
    resolved = resolve("diffusion", given, given.layers(), lowest=lowest)
    autoencoder = _autoencoder_of(given.teacher, "RUN")
    what = f"{given.teacher} in {given.calls} network calls an image"
    _run(given, resolved, what, autoencoder=autoencoder, init_from=str(given.teacher))


@command(
    _IMAGES,
    {"cache": opt.Cache},
    _CLASSIFIER_MODEL,
    opt.LOOP,
    opt.RUN_OUTPUT,
    opt.TALK,
    opt.TRAIN_MACHINE,
    kind="classifier",
)
def train_classifier(given: ParsedOptions) -> None:
    """Train a classifier of noisy latents, which leads samples to classes: `ldm sample --classifier RUN`.

    It must know the latents and the noise of the models that it leads; --model takes both over.
    """
    layers = given.layers()
    if given.model:
        layers.insert(0, (f"--model {given.model}", _process_of(Path(given.model))))
    resolved = resolve("classifier", given, layers)
    autoencoder = given.autoencoder or (
        _autoencoder_of(Path(given.model), "--model") if given.model else _newest_autoencoder(needed=not given.plan)
    )
    where = f"in noisy latents of {autoencoder}" if autoencoder not in ("", "none") else "on noisy pixels"
    _run(given, resolved, f"classifier {where}", autoencoder=autoencoder, model=given.model or "")


def _process_of(run: Path) -> dict[str, object]:
    """The settings of a diffusion run that a classifier must share."""
    from ldmcli.core import runs

    run = runs.locate(run)[0]
    if runs.read_run(run).get("kind") != "diffusion":
        raise ModelError(f"--model {run}: not a diffusion run; name a run of `ldm train-ldm`")
    stored = config.read_recipe(run / "config.toml").values
    return {path: stored[path] for path in PROCESS if path in stored}


def resolve(
    kind: str, given: ParsedOptions, named: list[config.Layer], *, lowest: Sequence[config.Layer] = ()
) -> config.Resolved:
    """The configuration of a training command from all of its sources; `lowest` take the place of defaults."""
    if given.train_batch_size is not None:
        processes = max(launch.world()[1], given.gpus or 1)
        named = [*named, ("--train-batch-size", {"train.batch_size": given.train_batch_size * processes})]
    layers = config.gather(
        kind,
        preset=given.values.get("preset") or "",
        recipe=given.values.get("recipe") or "",
        environ=os.environ,
        named=named,
        assignments=given.assignments or (),
    )
    return config.resolve(kind, [*lowest, *layers])


def _autoencoder_of(run: Path, named: str = "--init-from") -> str:
    """The first stage of a run that another one begins with."""
    from ldmcli.core import files, runs

    run = runs.locate(run)[0]
    if runs.read_run(run).get("kind") != "diffusion":
        raise ModelError(f"{named} {run}: not a diffusion run; name a run of `ldm train-ldm`")
    pixels = files.read_json(run / "stats.json").get("autoencoder") == "pixels"
    return "none" if pixels else str(run / "autoencoder")


def _newest_autoencoder(*, needed: bool) -> str:
    """Its path; "" where there is none and none is needed (a plan then takes the default network)."""
    from ldmcli.core.runs import newest_run

    try:
        return str(newest_run("autoencoder"))
    except ModelError:
        if not needed:
            return ""
        raise ModelError(
            "no autoencoder run below runs/: train one with `ldm train-ae`, name one with --autoencoder, "
            "or say --autoencoder none for pixels"
        ) from None


def data_name(source: str) -> str:
    """A data set's name as part of a folder's."""
    last = source.rstrip("/").rpartition("/")[2]
    return re.sub(r"[^A-Za-z0-9._]+", "-", last).strip("-.").lower()[:40] or "data"


def run_name(resolved: config.Resolved) -> str:
    """The stated name of a run where --out gives none: its data and what it is, as in shapes-ae, photos-text."""
    if isinstance(resolved.config, ClassifierConfig):
        return f"{data_name(resolved.config.data.source)}-classifier"
    if not isinstance(resolved.config, DiffusionConfig):
        return f"{data_name(resolved.config.data.source)}-ae"
    task = resolved.config.task.name
    parts = [*resolved.config.condition.kinds, *([task] if task != "generate" else [])]
    if calls := resolved.config.distill.calls:
        parts.append(f"{calls}-calls")
    return f"{data_name(resolved.config.data.source)}-{'-'.join(parts) or 'ldm'}"


def _run(given: ParsedOptions, resolved: config.Resolved, what: str, **models: str) -> None:
    if given.plan:
        _show_plan(given, resolved, models)
        return
    out = given.out or Path("runs") / run_name(resolved)
    require_folder(out)
    code = launch.relaunch_if_needed(given.gpus, given.argv)
    if code is not None:
        raise typer.Exit(code)
    console.say(f"{given.command} → {out}: {what}")
    # a scheduler may ask for a checkpoint before the loop listens; unhandled, that signal would end the process
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    from ldmcli.training.loop import RunOptions, train

    command_line = [console.redact(word) for word in ("ldm", *given.argv)]
    options = RunOptions(fresh=given.fresh, allow=tuple(given.allow or ()), command_line=command_line, **models)
    try:
        state = train(resolved.kind, resolved, out, options)
    except (Interrupted, DivergedError):  # any other refusal may come from a folder that is somebody else's
        _write_pages(out)
        raise
    _write_pages(out)
    if given.json:
        console.emit_json({"out": str(out), **state})


def _write_pages(out: Path) -> None:
    """Report and model card, by one process."""
    from ldmcli.core.runs import is_run

    if launch.world()[0] != 0 or not is_run(out):
        return
    from ldmcli.reports.report import write_pages

    write_pages(out)


def _show_plan(given: ParsedOptions, resolved: config.Resolved, models: dict[str, Any]) -> None:
    from ldmcli.core.presets import PRESETS
    from ldmcli.reports.cost_estimate import plan, plan_text

    recipe, preset = given.values.get("recipe"), given.values.get("preset")
    preset = config.read_recipe(config.recipe_path(recipe)).preset if recipe else preset
    stage = str(PRESETS[preset].extra.get("first_stage", "")) if preset in PRESETS else ""
    costs = plan(resolved.kind, resolved, first_stage=stage, processes=given.gpus or 1, **models)
    if given.json:
        console.emit_json(costs)
    else:
        console.out(plan_text(costs, console.width()))


def require_folder(path: Path) -> None:
    """UsageError where `path` is a file, or stands below one."""
    for part in (path, *path.parents):
        if part.exists():
            if not part.is_dir():
                raise UsageError(f"--out {path}: {part} is a file; choose another folder")
            if not os.access(part, os.W_OK):
                raise UsageError(f"--out {path}: no permission to write in {part}; choose another folder")
            return
