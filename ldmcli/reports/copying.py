"""What a run's page says of copies: the window of a training between good and memorised, which checkpoint to use, and
the nearest pairs."""

import math
from dataclasses import dataclass
from typing import Any

from ldmcli.core import runs
from ldmcli.core.errors import UsageError
from ldmcli.evaluation.compare import higher_is_better
from ldmcli.evaluation.novelty import shows_copies
from ldmcli.evaluation.novelty_sheet import DOCUMENT, KIND, SHEET
from ldmcli.reports import html
from ldmcli.reports.charts import Series, figure, line_chart
from ldmcli.reports.html import safe
from ldmcli.reports.run_view import RunView, metric_label, read_dict
from ldmcli.training.best import SMALL_SET, find_metric

CURVE = ("val/copied", "val/copied_low", "val/copied_high", "val/copied_held_out")  # keys in metrics.jsonl
LEAST_EPOCHS = 10  # a choice: that often few pictures are seen before anybody is told to look for copies
FEW_EVALUATIONS = 4  # below which a window is said to be a coarse one


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of a training: its step, images seen so far, and numbers by key."""

    step: int
    images: int
    metrics: dict[str, float]


def evaluations(run: RunView) -> list[Evaluation]:
    """Those whose samples were looked through for copies, in order of steps."""
    found = {}
    for line in run.log:
        if isinstance(line.get("step"), int) and all(isinstance(line.get(key), int | float) for key in CURVE):
            values = {key[4:]: value for key, value in line.items() if key.startswith("val/")}
            numbers = {key: value for key, value in values.items() if isinstance(value, int | float)}
            found[line["step"]] = Evaluation(line["step"], line.get("images") or 0, numbers)
    return [found[step] for step in sorted(found)]


def beginning(found: list[Evaluation]) -> int:
    """Position of the first evaluation from which on every one shows copies; as many as there are where none is."""
    first = len(found)
    while first and shows_copies(found[first - 1].metrics):
        first -= 1
    return first


def judged_by(run: RunView, found: list[Evaluation]) -> str:
    """Key of the metric by which checkpoints are compared: that of train.keep_best, else the first of Fréchet distance,
    KID and validation loss that was measured."""
    wanted = run.config.train.keep_best if run.config is not None else ""
    for name in filter(None, (wanted, "fid", "kid", "val_loss")):
        try:
            return find_metric(found[0].metrics, name)[0]
        except UsageError:
            continue
    return ""


def best_of(found: list[Evaluation], key: str) -> Evaluation | None:
    """The best by a metric; of equal ones the earliest."""
    known = [one for one in found if key in one.metrics]
    sign = -1 if higher_is_better(key) else 1
    return min(known, key=lambda one: sign * one.metrics[key], default=None)


@dataclass(frozen=True)
class Window:
    """What the evaluations of a training say of good and memorised; None where there is no such evaluation.

    good: the first from which on, up to the best, the Fréchet distance lies within the 95 % interval of the best. best:
    by that distance, of those before copying that show no copies. copies: the first from which on all show copies.
    key: of the distance; "" where it was not measured with its interval.
    """

    good: Evaluation | None
    best: Evaluation | None
    copies: Evaluation | None
    key: str


def window(found: list[Evaluation]) -> Window:
    """The window of evaluations in order of steps."""
    first = beginning(found)
    copies = found[first] if first < len(found) else None
    clean = [one for one in found[:first] if not shows_copies(one.metrics)]
    key = _distance_key(clean)
    best = best_of(clean, key) if key else None
    if best is None:
        return Window(None, None, copies, "")
    good = best
    for one in reversed(found[: found.index(best)]):
        if one.metrics.get(key, math.inf) > best.metrics[f"{key}_high"]:
            break
        good = one
    return Window(good, best, copies, key)


def _distance_key(found: list[Evaluation]) -> str:
    """The key of the Fréchet distance, where every evaluation has the high end of its interval, too; else ""."""
    try:
        key = find_metric(found[0].metrics, "fid")[0] if found else ""
    except UsageError:
        return ""
    return key if all({key, f"{key}_high"} <= one.metrics.keys() for one in found) else ""


# --- sentences -------------------------------------------------------------------------------------------------


def share(value: float) -> str:
    """0.123 -> "12 %"."""
    return f"{100 * value:.0f} %" if value >= 0.0995 or not value else f"{100 * value:.1f} %"


def _read(one: Evaluation) -> str:
    """A share with its interval."""
    low, high = one.metrics["copied_low"], one.metrics["copied_high"]
    return f"{share(one.metrics['copied'])} of the samples (95 %: {share(low)} to {share(high)})"


def _where(run: RunView, one: Evaluation) -> str:
    """A step, and the epoch that it is in."""
    rows = (run.state.get("data") or {}).get("rows")
    epoch = f" (epoch {one.images / rows:.3g})" if isinstance(rows, int) and rows and one.images else ""
    return f"step {one.step:,}{epoch}"


def _checkpoint(run: RunView, step: int) -> str:
    """How the checkpoint of a step is used, or why it can't be."""
    best = run.state.get("best")
    if isinstance(best, dict) and best.get("step") == step:
        return f"use it as {run.name}@best"
    if step in runs.checkpoint_steps(run.path):
        return f"use it as {run.name}@{step}"
    return "its checkpoint was not kept: train.keep_best keeps it in another training"


def curve_text(run: RunView) -> str:
    """When copying begins, which checkpoint to use, and why; "" where no evaluation looked for copies."""
    found = evaluations(run)
    if not found:
        return ""
    first, key = beginning(found), judged_by(run, found)
    before, after, last = found[:first], found[first:], found[-1]
    if not after:
        text = (
            f"No copying that lasts: the last evaluation, step {last.step:,}, reads {_read(last)} as copies of "
            f"training pictures, of held-out pictures {share(last.metrics['copied_held_out'])}."
        )
    else:
        text = (
            f"Copying begins at {_where(run, after[0])}: {_read(after[0])} are nearer to a training picture than "
            f"held-out pictures are, of which {share(after[0].metrics['copied_held_out'])} are read as copies. "
            + (f"It lasts to the end, where it is {share(last.metrics['copied'])}. " if len(after) > 1 else "")
        ).rstrip()
    return " ".join(filter(None, (text, _window_text(run, found), _advice(run, before, after, key), _few(found))))


def _window_text(run: RunView, found: list[Evaluation]) -> str:
    """From which step on samples are good, and where that ends; "" where no interval says what is good."""
    seen = window(found)
    if seen.good is None or seen.best is None:
        return ""
    low, high = (figure(seen.best.metrics.get(f"{seen.key}_{end}", math.nan)) for end in ("low", "high"))
    since = (
        f"Good from {_where(run, seen.good)} on: {metric_label(seen.key)[0]} {figure(seen.good.metrics[seen.key])}, "
        f"within the 95 % interval of the best, {low} to {high} at step {seen.best.step:,}."
    )
    if seen.copies is None:
        return f"{since} The window between good and memorised is open at the end."
    return f"{since} The window between good and memorised is steps {seen.good.step:,} to {seen.copies.step:,}."


def _few(found: list[Evaluation]) -> str:
    """That the evaluations are far apart; "" where they are not."""
    if len(found) >= FEW_EVALUATIONS:
        return ""
    count = f"{len(found)} evaluation{'s' * (len(found) > 1)}"
    return f"This is read from {count} only: train.evaluations = 10 says it finer."


def _advice(run: RunView, before: list[Evaluation], after: list[Evaluation], key: str) -> str:
    """Which checkpoint to use, and why."""
    chosen = best_of([one for one in before if not shows_copies(one.metrics)], key)
    if chosen is None:
        return "No evaluation came before that, so none is free of copies: train on more pictures, or evaluate earlier."
    name = metric_label(key)[0]
    text = (
        f"Use the checkpoint of {_where(run, chosen)}, the best {'before' if after else 'of all'} by {name} "
        f"({figure(chosen.metrics[key])}); {_checkpoint(run, chosen.step)}."
    )
    later = best_of(after, key)
    if later is not None and best_of([chosen, later], key) is later:
        text += (
            f" {name} is better later ({figure(later.metrics[key])} at step {later.step:,}), but there "
            f"{share(later.metrics['copied'])} of the samples are copies, which such a number rewards."
        )
    return text


def unwatched_text(run: RunView) -> str:
    """That nobody looked for copies where few pictures were trained on for long, and what looks; "" elsewhere."""
    rows, config = (run.state.get("data") or {}).get("rows"), run.diffusion
    if config is None or config.task.name != "generate" or not isinstance(rows, int) or not 0 < rows < SMALL_SET:
        return ""
    if evaluations(run) or kept(run):
        return ""
    epochs = [line["images"] / rows for line in run.log if isinstance(line.get("images"), int)]
    if epochs and epochs[-1] < LEAST_EPOCHS:
        return ""
    seen = f", each seen {epochs[-1]:.3g} times" if epochs else ""
    return (
        f"Trained on {rows:,} pictures{seen}: so few are repeated after a while, and nobody has looked for copies. "
        f"`ldm eval-fid --model {run.name} --metrics novelty` looks once; train.eval_samples and train.eval_novelty "
        "look while it trains, and keep the best checkpoint from before."
    )


def kept(run: RunView) -> dict[str, Any]:
    """What `ldm eval-fid --metrics novelty` found of the run; {} where nobody looked."""
    found = read_dict(run.path / DOCUMENT)
    return found if found.get("kind") == KIND else {}


def pairs_text(found: dict[str, Any]) -> str:
    """A sentence on the share of copies and its controls; "" without any, or where they are damaged."""
    try:
        planted, held_out = found["controls"]["planted"], found["controls"]["held_out"]
        lowest = min(planted["found"].values())
        checked = (
            f"Controls: of training pictures planted as they are, mirrored, as JPEG and shifted at least "
            f"{share(lowest)} of each form are found; held-out pictures are read as {share(held_out['read'])} copies."
        )
        step = f" of step {found['step']:,}" if isinstance(found.get("step"), int) else ""
        if found["copied"] is None:
            return f"{found['n']:,} samples{step} were looked through for copies, but the share is withheld. {checked}"
        low, high = found["interval"]
        return (
            f"{share(found['copied'])} of {found['n']:,} samples{step} copy one of {found['n_training']:,} training "
            f"pictures (95 %: {share(low)} to {share(high)}), compared with {found['n_held_out']:,} held-out pictures. "
            f"{checked}"
        )
    except (KeyError, TypeError, ValueError):
        return ""


# --- the section -----------------------------------------------------------------------------------------------


def section(run: RunView) -> str:
    """Does it copy: the curve of a training, what follows from it, and the nearest pairs; "" where nobody looked."""
    found, text = evaluations(run), pairs_text(kept(run))
    points = [(float(one.step), one.metrics["copied"]) for one in found]
    band = [(float(one.step), one.metrics["copied_low"], one.metrics["copied_high"]) for one in found]
    held_out = [(float(one.step), one.metrics["copied_held_out"]) for one in found]
    lines = [Series("samples", points, band), Series("held-out pictures", held_out)]
    note = "the band is the 95 % interval"
    chart = line_chart("Share that copies training pictures", lines, unit="share", from_zero=True, note=note)
    said = curve_text(run)
    said = said or unwatched_text(run)
    body = (f"<p>{safe(said)}</p>" if said else "") + (f'<div class="charts">{chart}</div>' if chart else "")
    if text:
        sheet = html.read_picture(run.path / SHEET)
        what = "samples above, the training picture that each is nearest to below, with the distance (0 = a copy)"
        body += f"<p>{safe(text)}</p>" + (html.picture(sheet, what, what) if sheet is not None else "")
    return html.section("Does it copy?", body)
