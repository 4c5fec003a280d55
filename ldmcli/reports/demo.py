"""`ldm demo`: the whole chain within minutes, on the embedded shapes or on anybody's images, measured at the end."""

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np

from ldmcli.conditions import CONDITIONS
from ldmcli.conditions.dataset import ConditionDataset
from ldmcli.conditions.parse import arguments_of
from ldmcli.conditions.text import Text
from ldmcli.core import config, console, files, runs
from ldmcli.core.durations import duration_with_unit
from ldmcli.core.errors import LdmError, ModelError, UsageError
from ldmcli.core.launch import world
from ldmcli.core.outputs import refuse_foreign
from ldmcli.core.settings import AutoencoderConfig, DataSettings, DiffusionConfig
from ldmcli.data.rows import evenly_spaced
from ldmcli.data.shape_reading import score
from ldmcli.data.shape_rows import is_shapes
from ldmcli.data.sources import open_rows
from ldmcli.evaluation.extractors import open_extractor
from ldmcli.maths.metrics import frechet_from_features
from ldmcli.maths.pixels import tensor_to_pixels
from ldmcli.reports.demo_plan import (
    DIFFUSION,
    POOR_PSNR,
    Plan,
    Size,
    Speed,
    Task,
    first_stage,
    first_stage_extension,
    plan,
    second_stage_seconds,
    shortcomings,
)
from ldmcli.reports.demo_speed import diffusion_seconds, first_stage_seconds, picture_seconds
from ldmcli.reports.report import write_demo_report, write_pages
from ldmcli.sampling.contact_sheets import in_rows, save_grid
from ldmcli.sampling.load import load
from ldmcli.training import checks
from ldmcli.training.distributed import Distributed
from ldmcli.training.loop import RunOptions, train

HELD_OUT = 128  # samples at most
WRITTEN = ("samples.png", "prompts.txt", "summary.json", "report.html", "plan.json")
NEVER = 1_000_000
OTHER_VERSION = "not the plan of a demo of this version; begin anew with --fresh"
TOO_FEW = (
    "one held-out picture is too few for a distance (of equal captions only the first counts); more pictures, or a "
    "larger --val-fraction, would do"
)


def _resolved(run_kind: str, values: dict[str, Any], preset: str = "") -> config.Resolved:
    layers = [config.preset_layer(run_kind, preset)] if preset else []
    return config.resolve(run_kind, [*layers, ("ldm demo", values)])


def _data_values(data: DataSettings) -> dict[str, Any]:
    default = DataSettings()
    return {f"data.{name}": value for name, value in vars(data).items() if value != getattr(default, name)}


def demo(
    data: DataSettings,
    *,
    minutes: float = 10,
    out: Path = Path("runs/demo"),
    preset: str = "",
    fresh: bool = True,
    seed: int = 0,
) -> dict[str, Any]:
    """Autoencoder, cached latents, diffusion model, samples, numbers, report; returns summary.json's content.

    `minutes` bounds the whole: networks, batches and times are chosen for what steps take here, and kept where a demo
    goes on in its folder. preset "paper" trains the second stage as the paper does, for comparison. Raises UsageError
    where another process writes in `out`, ModelError where a demo of other data, size, seed or preset lies there.
    """
    if not 0.2 <= minutes < math.inf:
        raise UsageError(f"--minutes {minutes}: a number of minutes is needed, at least 0.2")
    if (processes := world()[1]) > 1:
        raise UsageError(f"ldm demo: runs in one process, not in {processes}; `ldm train-ldm` takes several")
    if not runs.is_run(out / "autoencoder"):  # what an earlier demo wrote there is replaced
        refuse_foreign([out / name for name in WRITTEN])
    started = time.monotonic()
    rows = open_rows(data, split="train")
    size = checks.image_size(data)
    found = (name for name, one in CONDITIONS.items() if one.static and one.argument and one.available(rows, data))
    kinds = tuple(islice(found, 1))
    conditioned = f"conditioned on {' + '.join(kinds)}" if kinds else "unconditional"
    console.say(f"demo: {rows.source}, {size[0]}x{size[1]} px, {conditioned}; {minutes:g} minutes in all")
    base = {**_data_values(data), "data.size": size, "train.seed": seed}
    asked = {"data.source": data.source, **base, "condition.kinds": kinds, "preset": preset}
    asked = json.loads(json.dumps(asked, default=str))
    task, folder = Task(minutes=minutes, size=size, preset=preset, asked=asked), runs.RunFolder(out)
    folder.acquire()
    try:
        if not fresh:
            _check_same(task, out)
        with _plan_of_refused(out):
            summary = _chain(data, rows, task, base, kinds, out, fresh, started)
    finally:
        folder.release()
    for text in summary["warnings"]:
        console.warn(text)
    return summary


def _check_same(task: Task, out: Path) -> None:
    """Raises ModelError where a demo of another task was begun in `out`; its minutes may be others."""
    if not (out / "plan.json").is_file() or not runs.is_run(out / "autoencoder"):
        return
    try:
        begun = dict(files.read_json(out / "plan.json")["task"]["asked"])
    except (KeyError, TypeError, ValueError):
        raise ModelError(f"{out / 'plan.json'}: {OTHER_VERSION}") from None
    names = [name for name in {**begun, **task.asked} if begun.get(name) != task.asked.get(name)]
    if names:
        table = "; ".join(f"{name}: {begun.get(name)} -> {task.asked.get(name)}" for name in names)
        raise ModelError(
            f"{out}: was started with other settings ({table}); choose another --out, or begin anew with --fresh"
        )


@contextmanager
def _plan_of_refused(out: Path) -> Iterator[None]:
    """Leaves plan.json as it was where what is done inside is refused or fails."""
    path = out / "plan.json"
    before = path.read_text(encoding="utf-8") if path.is_file() else None
    try:
        yield
    except LdmError:
        if before is not None:
            files.write_text(path, before)
        elif not runs.is_run(out / "autoencoder"):
            path.unlink(missing_ok=True)
        raise


def _chain(
    data: DataSettings,
    rows: Any,
    task: Task,
    base: dict[str, Any],
    kinds: tuple[str, ...],
    out: Path,
    fresh: bool,
    started: float,
) -> dict[str, Any]:
    """Both trainings, samples, numbers and report. base: settings of both by dotted name; started: seconds of
    `time.monotonic`."""
    values, seed = base | {"condition.kinds": kinds}, base["train.seed"]
    ae, ldm = out / "autoencoder", out / "diffusion"
    made = _plan(task, rows, values, out, fresh)
    console.say(made.text())
    curve = _first_stage(made, base, ae, fresh)
    if not (fresh or made.second_stage) and runs.is_run(ldm):
        console.say("the diffusion model begins anew, in the latents of the first stage as it is now")
        fresh = True
    spent = max(time.monotonic() - started, curve[-1][0])
    made = replace(made, second_stage=second_stage_seconds(made, spent))
    files.write_json(out / "plan.json", made.document())
    _second_stage(made, values, ldm, fresh, ae)
    about = {"data": rows.source, "minutes": task.minutes, "preset": task.preset or "default", "seed": seed}
    summary: dict[str, Any] = about | _measure(data, made, kinds, out, seed) | _course(made, curve, ae, ldm)
    if summary["n"] < 2:
        summary["warnings"].append(TOO_FEW)
    summary["seconds"] = round(time.monotonic() - started, 1)
    files.write_json(out / "summary.json", summary)
    _report(out, [ae, ldm], summary)
    return summary


def _course(made: Plan, curve: list[tuple[float, float]], ae: Path, ldm: Path) -> dict[str, Any]:
    """What was planned, what became of it, and what was not good enough."""
    states = {"autoencoder": runs.read_run(ae), "diffusion model": runs.read_run(ldm)}
    found = [f"{name}: {text}" for name, state in states.items() for text in state.get("warnings") or []]
    steps = {name: state["step"] for name, state in states.items()}
    seconds = {name: state["trained_seconds"] for name, state in states.items()}
    poor = shortcomings(made, curve, steps["diffusion model"], seconds["diffusion model"])
    return {"steps": steps, "trained_seconds": seconds, "plan": made.document(), "warnings": found + poor}


def _plan(task: Task, rows, values: dict[str, Any], out: Path, fresh: bool) -> Plan:
    """The plan for what steps take on this machine; of a demo that goes on, with what it was begun with."""
    given = _resolved("diffusion", values, task.preset).config
    dist = Distributed(given.train)
    count = 0 if given.data.streaming else len(rows)
    task = replace(task, rows=count, gpu=dist.device.type == "cuda", batch=given.train.batch_size)
    stage = cast(AutoencoderConfig, _resolved("autoencoder", first_stage(task)).config)

    def seconds(size: Size) -> float:
        chosen = {} if task.preset else size.values
        config = cast(DiffusionConfig, _resolved("diffusion", {**values, **DIFFUSION, **chosen}, size.preset).config)
        return diffusion_seconds(config, stage.autoencoder, task.size, dist)

    path = out / "plan.json"
    if not fresh and path.is_file() and runs.is_run(out / "autoencoder"):
        made = _plan_again(task, path, seconds)
    else:
        speed = Speed(first_stage=first_stage_seconds(stage, task.size, dist), picture=picture_seconds(rows, task.size))
        made = plan(task, speed, seconds)
    files.write_json(path, made.document())
    return made


def _plan_again(task: Task, path: Path, seconds: Callable[[Size], float]) -> Plan:
    """The plan of a demo that goes on: what it was begun with, and the time that is asked for now. More minutes are for
    the diffusion model, once that was begun on a first stage that is good enough; else for both, as of a new demo."""
    begun = files.read_json(path)
    try:
        speed, kept, rows = Speed(**begun["speed"]), Size(**begun["size"]), int(begun["rows"])
        before, second_stage = begun["task"]["minutes"], float(begun["second_stage"])
    except (KeyError, TypeError, ValueError):
        raise ModelError(f"{path}: {OTHER_VERSION}") from None
    more = max(task.minutes - before, 0) * 60
    if second_stage and more and runs.read_run(path.parent / "autoencoder")["metrics"]["psnr"] < POOR_PSNR:
        return plan(task, speed, seconds)
    made = plan(task, speed, lambda size: speed.diffusion, kept)
    return replace(made, rows=rows, second_stage=second_stage + more) if second_stage else made


def _first_stage(made: Plan, base: dict[str, Any], out: Path, fresh: bool) -> list[tuple[float, float]]:
    """Trains the first stage, longer than planned where it is not good enough; (seconds, PSNR) of its evaluations."""
    if made.second_stage and runs.read_run(out).get("state") == "finished":  # of a demo that was stopped later
        return _curve(out)
    values = {**base, **made.first_stage_values}
    _train("autoencoder", {**values, "train.max_minutes": round(made.ae_seconds / 60, 4)}, out, fresh)
    curve = _curve(out)
    longer = first_stage_extension(made, curve)
    if longer > curve[-1][0] * 1.2:
        console.say(
            f"the first stage reconstructs at {curve[-1][1]:.1f} dB, and {POOR_PSNR:g} is a minimum: it goes on for "
            f"{duration_with_unit(longer - curve[-1][0])}, which the diffusion model will lack"
        )
        _train("autoencoder", {**values, "train.max_minutes": round(longer / 60, 4)}, out, False)
        curve = _curve(out)
    return curve


def _second_stage(made: Plan, values: dict[str, Any], out: Path, fresh: bool, ae: Path) -> None:
    task = made.task
    chosen = {} if task.preset else made.size.values
    limit = {"data.limit": made.rows} if made.rows else {}
    steps = {"train.steps": made.max_steps or NEVER, "train.max_minutes": round(made.second_stage / 60, 4)}
    _train("diffusion", {**values, **limit, **DIFFUSION, **chosen, **steps}, out, fresh, made.size.preset, str(ae))


def _curve(run: Path) -> list[tuple[float, float]]:
    """(seconds of training, PSNR in dB) of a first stage's evaluations; time is shared out by steps."""
    state = runs.read_run(run)
    pairs = [(line["step"], line["val/psnr"]) for line in runs.read_log(run) if "val/psnr" in line]
    each = state.get("trained_seconds", 0.0) / max(state["step"], 1)
    return [(step * each, float(psnr)) for step, psnr in pairs if step] or [(0.0, state["metrics"]["psnr"])]


def _train(
    run_kind: str, values: dict[str, Any], out: Path, fresh: bool, preset: str = "", autoencoder: str = ""
) -> None:
    schedule = {
        "train.steps": NEVER,
        "train.save_every": NEVER,
        "train.sample_every": 250,
        "train.eval_every": 0,
        "train.eval_frechet": False,
        "train.log_every": 25,
    }
    resolved = _resolved(run_kind, {**schedule, **values}, preset)
    train(run_kind, resolved, out, RunOptions(fresh=fresh, command_line=["ldm", "demo"], autoencoder=autoencoder))


def _report(out: Path, parts: list[Path], summary: dict[str, Any]) -> None:
    for part in parts:
        write_pages(part)
    console.say(f"report: {write_demo_report(out, parts, summary)}")


def _measure(data: DataSettings, made: Plan, kinds: tuple[str, ...], out: Path, seed: int) -> dict[str, Any]:
    """Samples of held-out requests beside reconstructions and real images, all scored the same way."""
    size, model = made.task.size, cast(Any, load(out / "diffusion"))
    held = open_rows(replace(data, size=size), split="validation")
    picked = _distinct(held, kinds, min(made.samples, HELD_OUT))
    count = len(picked)
    real = np.stack([held.pixels(i, size, "center", (0.5, 0.5)) for i in picked])
    source = ConditionDataset(held, model.config, size, training=False)
    values = {name: source.values(name, picked, picked) for name in kinds}
    arguments: dict[str, Any] = arguments_of(values) if values else {"n": count}
    started = time.monotonic()
    samples = np.stack([np.asarray(image) for image in model.sample(seed=seed, batch_size=32, **arguments)])
    seconds = time.monotonic() - started
    rebuilt = np.concatenate(
        [
            tensor_to_pixels(model.autoencoder.decode(model.autoencoder.encode(real[i : i + 32])))
            for i in range(0, count, 32)
        ]
    )
    save_grid(out / "samples.png", in_rows(list(samples), 16))
    if "prompt" in arguments:
        files.write_text(out / "prompts.txt", "\n".join(arguments["prompt"]) + "\n")
    result: dict[str, Any] = {
        "n": count,
        "sampling_images_per_s": count / seconds,
        "ae_psnr": runs.read_run(out / "autoencoder")["metrics"]["psnr"],
    }
    if is_shapes(data.source):
        result |= _shape_scores(arguments["prompt"], samples, rebuilt, real)
    return result | _frechet(samples, rebuilt, real, held)


def _distinct(held, kinds: tuple[str, ...], most: int) -> list[int]:
    """Up to `most` validation rows, spread over all; of each caption only the first."""
    if Text.name not in kinds:
        return evenly_spaced(len(held), min(most, len(held)))
    first: dict[str, int] = {}
    for i in range(len(held)):
        first.setdefault(held.caption(i), i)
    rows = list(first.values())
    return [rows[k] for k in evenly_spaced(len(rows), min(most, len(rows)))]


def _shape_scores(prompts: list[str], samples, rebuilt, real) -> dict[str, Any]:
    """The checker's shares on samples (top level), reconstructions and real images."""
    return {**score(samples, prompts), "reconstructions": score(rebuilt, prompts), "real": score(real, prompts)}


def _frechet(samples, rebuilt, real, held) -> dict[str, Any]:
    """Fréchet distances to the real images; nothing of a single image, which has no covariance."""
    if len(samples) < 2:
        return {}
    extractor = open_extractor()
    features = {
        name: np.asarray(extractor.features(images), np.float64)
        for name, images in (("samples", samples), ("rebuilt", rebuilt), ("real", real))
    }
    return {
        "fd": frechet_from_features(features["samples"], features["real"]),
        "fd_reconstructions": frechet_from_features(features["rebuilt"], features["real"]),
        "fd_protocol": f"{extractor.display}: {len(samples)} samples against the {len(real)} held-out images of "
        f"the same requests ({held.split}); fewer images than the {extractor.dim} feature "
        "dimensions, so only comparable with itself",
    }
