"""The sections of a run's page: what it is, its figures, curves and pictures, how they were measured, all settings."""

import math
import statistics
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

import numpy as np

from ldmcli.core import config as configuration
from ldmcli.core import files
from ldmcli.core.durations import duration_with_unit
from ldmcli.core.errors import LdmError
from ldmcli.data import shape_reading
from ldmcli.data.sources import is_shapes
from ldmcli.evaluation.compare import read_key
from ldmcli.reports import html
from ldmcli.reports.charts import Series, figure, finite, line_chart
from ldmcli.reports.copying import CURVE
from ldmcli.reports.evaluation_table import cells
from ldmcli.reports.html import safe
from ldmcli.reports.run_view import (
    RunView,
    evaluation_files,
    latest_metrics,
    logged_values,
    metric_label,
    neighbours,
    preview_texts,
    sample_files,
    validation_count,
)
from ldmcli.sampling.request import DISTILLED_BY

PREVIEWS = 6
KINDS = {"autoencoder": "Autoencoder", "diffusion": "Diffusion model", "classifier": "Classifier of noisy latents"}
STATES = ("running", "finished", "interrupted", "failed", "diverged")
TERMS = {"l1_loss": "L1", "l2_loss": "L2", "edge_loss": "edges", "perceptual_loss": "perceptual"}
FROM_ZERO = {"lr_factor", "data_wait", "images_per_s"}
GROUPS = (  # title, unit, {key in metrics.jsonl: name in the legend}
    ("Terms of the reconstruction loss", "", TERMS),
    ("KL of the posterior", "nats per image", {"kl_loss": "KL"}),
    ("Quantisation loss", "", {"quant_loss": "quantisation"}),
    ("Adversarial losses", "", {"g_loss": "generator", "disc_loss": "discriminator"}),
    ("Discriminator's logits", "", {"logits_real": "real", "logits_fake": "reconstructed"}),
    ("Codes in use", "codes", {"codes_used": "used", "perplexity": "perplexity"}),
    ("Gradient norms", "", {f"grad_norm_{name}": name for name in ("autoencoder", "discriminator", "model")}),
    ("Learning-rate factor", "share of the set rate", {"lr_factor": "factor"}),
    ("Throughput", "images/s", {"images_per_s": "images/s"}),
    ("Waiting for data", "share of the time", {"data_wait": "share"}),
    ("Model FLOPs utilisation", "share of a matrix product", {"mfu": "share"}),
)
QUARTERS = ("least noise", "second quarter", "third quarter", "most noise")  # of a classifier's timesteps
_NOT_DRAWN = {
    "step",
    "images",
    "trained_seconds",
    "peak_memory_bytes",
    "seconds_per_step",
    "images_per_s_device",
    "total_loss",
    "rec_loss",
    "nll_loss",
}


# ---------------------------------------------------------------- who and how


def header(run: RunView) -> str:
    """Name, state, and what identifies the run."""
    state = str(run.state.get("state") or "unknown")
    badge = f'<span class="state {state if state in STATES else "unknown"}">{safe(state)}</span>'
    reason = run.state.get("reason")
    reason = f'<p class="reason">{safe(reason)}</p>' if reason and state != "finished" else ""
    reason += "".join(f'<p class="reason">{safe(text)}</p>' for text in run.state.get("warnings") or [])
    title = f"<h1>{safe(run.name)}{badge}</h1>"
    identifying = html.definition_list(identity(run))
    return f'<header>{title}<p class="lead">{safe(headline(run))}</p>{reason}{identifying}</header>\n'


def headline(run: RunView) -> str:
    """Kind, data and how far it is, in one line."""
    what = KINDS.get(run.kind, "A run that has not begun")
    if calls := run.diffusion.distill.calls if run.diffusion else 0:
        what += f" of {calls} network call{'s' if calls > 1 else ''} an image, distilled and"
    timed = run.config is not None and run.config.train.max_minutes > 0  # then the steps are only a bound
    steps = run.config.train.steps if run.config and not timed else None
    steps_logged = [step for line in run.log if isinstance(step := line.get("step"), int)]
    step = max([*steps_logged, run.state.get("step") or 0]) if steps_logged else run.state.get("step")
    how_far = f", step {_count(step)}" + (f" of {_count(steps)}" if steps else "") if step is not None else ""
    source = (run.state.get("data") or {}).get("source")
    return what + (f" trained on {last_name(source)}" if source else "") + how_far


def identity(run: RunView) -> list[tuple[str, object]]:
    """What distinguishes this run from others."""
    state, data, machine = run.state, run.state.get("data") or {}, run.state.get("machine") or {}
    rows = f"{_count(data.get('rows'))} to train, {_count(data.get('validation_rows'))} to validate" if data else ""
    left_out = f", {len(data['left_out'])} left out" if data.get("left_out") else ""
    weights: Any = state.get("weights")
    weights = {"ema": "moving average (EMA)", "raw": "as trained"}.get(weights, weights)
    cores = f"{machine['cpu_count']} cores" if machine.get("cpu_count") else ""
    python = f"Python {machine['python']}" if machine.get("python") else ""
    parts = [machine.get("device"), machine.get("system"), cores, python]
    return [
        ("Data", ", ".join(str(part) for part in (last_name(data.get("source")), data.get("split")) if part)),
        ("Rows", rows + left_out),
        ("Size", _size(run)),
        ("Command", state.get("command")),
        ("Seed", state.get("seed")),
        ("Weights", weights),
        ("Distilled", distillation(run)),
        ("Begun from", begun_from(run)),
        *[("Built on", f"{last_name(p.get('path'))}, {str(p.get('sha256', ''))[:16]}") for p in _parents(run)],
        ("Data fingerprint", data.get("fingerprint")),
        ("Machine", ", ".join(str(part) for part in parts if part)),
        ("Version", state.get("version") and f"ldm {state['version']}"),
        ("Last change", str(state.get("updated") or "").replace("T", " ")),
    ]


def begun_from(run: RunView) -> str:
    """The run whose weights this one began with, and what is in them; "" of one that began anew."""
    origin = run.state.get("begun_from")
    if not isinstance(origin, dict):
        return ""
    seconds = origin.get("seconds")
    took = f", {duration_with_unit(seconds)}" if isinstance(seconds, int | float) else ""
    return f"{last_name(origin.get('name'))} ({_count(origin.get('steps'))} steps{took} before)"


def distillation(run: RunView) -> str:
    """What a distilled model is, and of what teacher; "" of all others."""
    if run.diffusion is None or not (few := run.diffusion.distill).calls:
        return ""
    scales = {"guidance": few.guidance, "autoguidance": few.autoguidance}
    named = " and ".join(f"{name} {scale:g}" for name, scale in scales.items() if scale != 1)
    baked = f"{named} of the teacher baked in, " if named else ""
    return f"{few.calls} calls, {baked}{DISTILLED_BY}; teacher {few.teacher[:16]}"


def _parents(run: RunView) -> list[dict[str, Any]]:
    return [parent for parent in run.state.get("parents") or [] if isinstance(parent, dict)]


def last_name(path: object) -> str:
    """A path without the folders above it; hub ids and short relative paths stay whole."""
    text = str(path or "")
    return PurePath(text).name if PurePath(text).is_absolute() else text


def _size(run: RunView) -> str:
    size, latent = run.stats.get("size"), run.stats.get("latent_shape")
    found = f"{size[0]}×{size[1]} px" if size else ""
    return found + (f", latents {'×'.join(map(str, latent))}" if latent else "")


def _count(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else "?"


# ---------------------------------------------------------------- figures


def key_figures(run: RunView) -> str:
    """Tiles: the newest validation metrics, then what the training took."""
    entries = [tile(name, value, _validation_remark(run, name)) for name, value in latest_metrics(run).items()]
    entries += best_tile(run)
    speed = [value for _, value in finite([(0, line.get("images_per_s")) for line in run.log])]
    if speed:
        entries.append(("Throughput", f"{figure(statistics.median(speed))} images/s", "median of the log"))
    # the log misses the steps after its last line; run.json is written at the end
    times = [*run.log, run.state]
    seconds = [value for _, value in finite([(0, line.get("trained_seconds")) for line in times])]
    if seconds:
        entries.append(("Training time", duration_with_unit(max(seconds)), f"{_count(_images(run))} images seen"))
    peak = [value for _, value in finite([(0, line.get("peak_memory_bytes")) for line in run.log])]
    if peak:
        entries.append(("Peak memory", files.human_bytes(max(peak)), "main process"))
    bad = sum(str(line.get("event", "")).startswith("not applied") for line in run.log)
    if bad:
        entries.append(("Updates not applied", f"{bad:,}", "NaN or Inf"))
    spikes = max((value for _, value in finite([(0, line.get("spikes")) for line in [*run.log, run.state]])), default=0)
    if spikes:
        entries.append(("Gradients scaled down", f"{spikes:,.0f}", "out of all proportion to those before"))
    return html.tiles(entries)


def _images(run: RunView) -> object:
    return next((line["images"] for line in reversed(run.log) if "images" in line), None)


def tile(key: str, value: float, remark: str) -> tuple[str, str, str]:
    """A metric as a key figure."""
    name, unit, better = metric_label(key)
    return name, f"{figure(value)} {unit}".strip(), "; ".join(part for part in (remark, better) if part)


def best_tile(run: RunView) -> list[tuple[str, str, str]]:
    """The best evaluation as a key figure, with the name under which its checkpoint is used; [] where none was kept."""
    best = run.state.get("best")
    if not isinstance(best, dict) or not {"step", "metric", "value"} <= best.keys():
        return []
    name, value, _ = tile(str(best["metric"]), best["value"], "")
    return [(f"Best: {name}", value, f"step {_count(best['step'])}; use it as {run.name}@best")]


def _validation_remark(run: RunView, metric: str) -> str:
    count = validation_count(run, metric)
    return f"n = {count:,}" if count else ""


# ---------------------------------------------------------------- curves


def curves(run: RunView) -> str:
    """Charts of metrics.jsonl; those without a place of their own are folded away."""
    values = logged_values(run.log)
    # copies have a section of their own, ends of intervals are bands
    used = {*CURVE, *(key for key in values if key.startswith("val/") and read_key(key[4:])[1])}

    def chart(title: str, unit: str, names: dict[str, str], note: str = "") -> str:
        found = {key: name for key, name in names.items() if key in values}
        used.update(found)
        lines = [Series(name, values[key], _band(values, key)) for key, name in found.items()]
        return line_chart(title, lines, unit=unit, from_zero=bool(FROM_ZERO & found.keys()), note=note)

    charts = [
        chart("Loss", "", {"loss_model": "training", "val/val_loss": "validation"}),
        chart("Loss", "", {"loss_autoencoder": "autoencoder"}),
        chart("Accuracy by noise", "share", {f"val/accuracy_q{k}": name for k, name in enumerate(QUARTERS, 1)}),
    ]
    for key in [key for key in values if key.startswith("val/") and key not in used]:
        name, unit, better = metric_label(key[4:])
        charts.append(chart(f"{name} on validation", unit, {key: name}, better))
    charts += [chart(*group) for group in GROUPS]
    rest = [chart(key, "", {key: key}) for key in values if key not in used | _NOT_DRAWN]
    main = f'<div class="charts">{"".join(charts)}</div>' if any(charts) else ""
    more = html.folded("More curves", f'<div class="charts">{"".join(rest)}</div>' if any(rest) else "")
    return html.section("How it went", main + more)


def _band(values: dict[str, list[tuple[float, float]]], key: str) -> list[tuple[float, float, float]]:
    """(step, low, high) of the 95 % interval of a curve; [] where the log has none."""
    low, high = dict(values.get(f"{key}_low", [])), dict(values.get(f"{key}_high", []))
    return [(step, low[step], high[step]) for step in low if step in high]


# ---------------------------------------------------------------- pictures


def previews(run: RunView) -> str:
    """The newest preview with the values that it is conditioned on, and earlier ones."""
    found = [
        (step, image) for step, path in evenly_spaced(sample_files(run.path)) if (image := html.read_picture(path))
    ]
    if not found:
        return ""
    step, newest = found[0]
    earlier = "".join(
        html.picture(image, f"preview of step {at:,}", f"step {at:,}", width=image.width) for at, image in found[1:]
    )
    earlier = f'<h3>Earlier, newest first</h3><div class="strip">{earlier}</div>' if earlier else ""
    if run.kind == "autoencoder":
        lead = "Validation images and their reconstructions, in turn by rows."
        shown = html.picture(newest, "images above their reconstructions", f"step {step:,}")
    elif run.kind == "classifier":
        lead = "Noisy latents of validation images, decoded, with the class found; a row a quarter of the timesteps."
        shown = html.picture(newest, "noisy images with their classes", f"step {step:,}")
    else:
        texts = preview_texts(run)
        explanation = ": what was asked for, and what the model made of it." if texts else "."
        lead = f"Fixed seeds, step {step:,}{explanation}"
        shown = _prompt_cards(newest, texts, run) or html.picture(newest, f"samples of step {step:,}", f"step {step:,}")
    return html.section("What it makes", shown + earlier, safe(lead))


def _prompt_cards(sheet, texts: Sequence[str], run: RunView) -> str:
    size = run.stats.get("size")
    cells = html.cut(sheet, size)[: len(texts)] if size and texts else []
    return html.cards(cells, texts, mark_samples(run, cells, texts)) if cells else ""


def mark_samples(run: RunView, pictures: Sequence, texts: Sequence[str]) -> list[str]:
    """ "right" or "wrong" for pictures of the embedded shapes, whose captions can be checked; [] for other data."""
    if not is_shapes(str((run.state.get("data") or {}).get("source"))):
        return []
    found = []
    for image, text in zip(pictures, texts):
        try:
            found.append("right" if shape_reading.check(np.asarray(image), text)["all"] else "wrong")
        except LdmError:  # a prompt that is no caption of theirs
            found.append("")
    return found


def evenly_spaced(entries: Sequence, most: int = PREVIEWS) -> list:
    """At most `most` entries: the first, the last and evenly between."""
    if len(entries) <= most:
        return list(entries)
    return [entries[round(k * (len(entries) - 1) / (most - 1))] for k in range(most)]


# ---------------------------------------------------------------- evaluations, protocol, settings


def evaluations(run: RunView, summary: dict[str, Any] | None = None) -> str:
    """Every evaluation that lies in the folder (eval*.json), and `summary`."""
    found = evaluation_files(run) | ({"summary": summary} if summary else {})
    return html.section("Evaluations", "".join(_evaluation(name, one) for name, one in found.items()))


def _evaluation(name: str, found: dict[str, Any]) -> str:
    heads, rows = cells(found)
    if not rows:
        return f"<h3>{safe(name)}</h3>{html.table(flat(found), ('', ''))}"
    how = html.folded("How it was measured", html.table(flat(beside_numbers(found)), ("", "")))
    return f"<h3>{safe(name)}</h3>{html.table(rows, heads)}{how}"


def beside_numbers(found: dict[str, Any]) -> dict[str, Any]:
    """The document of an evaluation without its numbers and what they are worth."""
    numbers = ("metrics", "labels", "estimates", "of_each")
    return {key: value for key, value in found.items() if key not in numbers}


def nearest_training_pictures(run: RunView) -> str:
    """What `ldm neighbours` found of the run."""
    text = neighbours_text(neighbours(run))
    sheet = html.read_picture(run.path / "neighbours" / "neighbours.png") if text else None
    shown = html.picture(sheet, "samples and their nearest training pictures") if sheet is not None else ""
    return html.section("Nearest training pictures", shown or f"<p>{safe(text)}</p>", safe(text) if shown else "")


def neighbours_text(found: dict[str, Any]) -> str:
    """A sentence on the distances of samples to training pictures; "" without any, or where they are damaged."""
    try:
        share, n, k = found["closer_than_held_out"], int(found["n"]), int(found["k"])
        medians = {name: figure(one["median"]) for name, one in found["nearest"].items() if one}
    except (KeyError, TypeError, ValueError):
        return ""
    text = f"{n} samples and their {k} nearest training pictures; median distance to the nearest {medians['samples']}"
    if share is None:
        return f"{text}."
    return (
        f"{text}, of held-out pictures {medians['held_out']}. {100 * share:.0f} % of the samples are nearer than 95 % "
        "of held-out pictures (5 % where nothing is repeated)."
    )


def flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """(name, value for reading) of a nested result; long lists are only counted."""
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, dict):
            rows += flat(value, f"{name} · ")
        elif isinstance(value, list | tuple):
            plain = len(value) <= 8 and not any(isinstance(item, dict | list) for item in value)
            rows.append((name, ", ".join(map(readable, value)) if plain else f"{len(value):,} entries"))
        else:
            rows.append((name, readable(value)))
    return rows


def readable(value: object) -> str:
    """A value of a result as text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return figure(value) if math.isfinite(value) else str(value)
    return "–" if value is None else str(value)


def protocol(run: RunView) -> str:
    """How the numbers of this page came about."""
    text = protocol_text(run)
    lead = f"{text} Throughput and memory are those of the log, at the size of training."
    return html.section("How it was measured", f'<p class="lead">{safe(lead)}</p>') if text else ""


def protocol_text(run: RunView) -> str:
    """What the validation metrics of a run are; '' while there is nothing to say."""
    count, size = validation_count(run), run.stats.get("size")
    if not count or not latest_metrics(run):
        return ""
    weights = "moving average of the weights" if run.state.get("weights") == "ema" else "weights as trained"
    pixels = f" at {size[0]}×{size[1]} px" if size else ""
    if run.kind == "autoencoder":
        what = (
            f"{count:,} held-out images{pixels}, cropped in the middle, against their reconstructions in 8 bit. "
            "The latent is the mode of the posterior. PSNR, SSIM and perceptual distance are means over images; a "
            "Fréchet distance of so few images compares with itself only."
        )
    else:
        error = "Mean error of the network's output"
        if run.diffusion and run.diffusion.distill.calls:
            error = "Mean squared distance of where one call ends from where its teacher does, as a velocity,"
        what = (
            f"{error} on {count:,} held-out latents, at fixed noise and timesteps that spread evenly over those of "
            "training. It compares runs of one autoencoder only."
        ) + _sample_protocol(run)
    return f"{what} Computed with the {weights}."


def _sample_protocol(run: RunView) -> str:
    """How samples were measured (train.eval_samples); '' where they were not."""
    if run.diffusion is None or not run.diffusion.train.eval_samples:
        return ""
    train, sample = run.diffusion.train, run.diffusion.sample
    return (
        f" The other metrics are those of `ldm eval-fid` on {train.eval_samples:,} samples of seed {train.seed}, "
        f"{train.eval_steps or sample.steps} steps of {sample.sampler}, guidance {sample.guidance:g}, conditioned on "
        "held-out rows and measured against these; with so few images a distance compares with its own kind only."
    )


def settings(run: RunView) -> str:
    """The whole configuration, folded; values that differ from the defaults stand out."""
    return html.section("Configuration", setting_tables(run))


def setting_tables(run: RunView) -> str:
    """A folded table of all settings, a part for each section."""
    if run.config is None:
        return ""
    values, changed, parts = configuration.flat(run.config), changed_settings(run), []
    for name in dict.fromkeys(path.partition(".")[0] for path in values):
        here = {path: value for path, value in values.items() if path.startswith(f"{name}.")}
        lines = "".join(_setting(path, value, path in changed) for path, value in here.items())
        parts.append(f'<h3>{safe(name)}</h3><div class="scroll"><table>{lines}</table></div>')
    return html.folded(f"All {len(values)} settings; {len(changed)} differ from the defaults", "".join(parts))


def changed_settings(run: RunView) -> dict[str, str]:
    """Settings that differ from the command's defaults, with their values as TOML."""
    if run.config is None:
        return {}
    defaults = configuration.defaults(run.kind)
    rows = configuration.describe(configuration.Resolved(run.kind, run.config, dict.fromkeys(defaults, "")))
    values = configuration.flat(run.config)
    return {path: text for path, text, _ in rows if values[path] != defaults[path]}


def _setting(path: str, value: object, changed: bool) -> str:
    shown = ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    kind = "changed" if changed else ""
    return f'<tr class="{kind}"><td><code>{safe(path)}</code></td><td><code>{safe(shown)}</code></td></tr>'
