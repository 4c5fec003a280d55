"""`ldm eval-fid`: metrics of generated images, and limits that they must keep."""

import difflib
import math
import re
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import typer

from ldmcli.cli import options as opt
from ldmcli.cli.parsing import DATA, MODEL, OUTPUT, SAMPLING, ParsedOptions, Text, command, flag, option, setting
from ldmcli.core import config, console, launch
from ldmcli.core.errors import ThresholdError, UsageError
from ldmcli.core.runs import folder_for_results, locate
from ldmcli.core.world import joined

METRICS_HELP = (
    "fid, kid, mind, is, pr, dc; psnr, ssim, lpips (pairs, tasks sr and inpaint); layout, map (are they obeyed?); "
    "codebook (of --autoencoder: codes used); novelty (share that copies training pictures)."
)

Reference = setting(
    "data.source",
    "D",
    "Images to measure against, as for training.",
    panel=DATA,
    names="--data",
    default="the model's own",
)
ReferenceSplit = setting(
    "data.split",
    "NAME",
    "Rows to measure against: a split, or all of the set.",
    panel=DATA,
    default="the validation rows",
)
AlsoSplit = option(
    Text,
    "--also-split",
    "NAME",
    "Super-resolution and inpainting: a second reference, as train; its distances have the name behind them.",
    panel=DATA,
    default="none",
)
ReferenceCount = option(
    Text,
    "--reference-count",
    "all|N",
    "Rows of the reference: N evenly spread ones, or all, in little memory.",
    panel=DATA,
    default="all, at most 10000",
)
Images = option(
    Path | None, "--images", "DIR|FILE.npz", "Measure these images instead of a model's.", panel=DATA, default="none"
)
Pairs = option(
    tuple[Path, Path] | None,
    "--pairs",
    "DIR_A DIR_B",
    "Paired metrics of two folders with the same file names.",
    panel=DATA,
    default="none",
)
SEVERAL = ("model", "autoencoder")  # of which there may be several in a call
Metrics = option(Text, "--metrics", "NAME[,NAME]", METRICS_HELP, panel=SAMPLING, default="what fits")
NETWORKS_HELP = (
    "Network of the features: inception, effnet-lite0, effnet-lite2, vgg16, a weights file, a folder with DINOv2 or "
    "CLIP, or FILE.py:NAME of an encoder of your own"
)
Features = option(
    Text, "--features", "NAME|FILE", f"{NETWORKS_HELP}.", panel=SAMPLING, default="the best at hand, stated"
)
SeveralFeatures = option(
    Text,
    "--features",
    "NAME|FILE[,…]",
    f"{NETWORKS_HELP}; a,b: several, in one pass over the images.",
    panel=SAMPLING,
    default="the best at hand, stated",
)
EvalCount = option(
    int | None,
    "-n --count",
    "N",
    "Images that are measured.",
    panel=SAMPLING,
    min=2,
    default="all, of a model at most 1000",
)
GuideFactor = option(
    int | None,
    "--guide-factor",
    "N",
    "Lead each sample to its row made N times smaller, and compare the two.",
    panel=SAMPLING,
    min=2,
    default="none",
)
MeasuredModel = option(
    list[str] | None,
    "--model",
    "RUN",
    "Run folder of the model, RUN@STEP or RUN@best: one of its checkpoints; repeatable, for a table.",
    panel=MODEL,
    default="the newest suitable run",
)
MeasuredAutoencoder = option(
    list[str] | None,
    "--autoencoder",
    "RUN",
    "Measure this autoencoder's reconstructions instead; repeatable.",
    panel=MODEL,
    default="none",
)
SaveStatistics = option(
    Path | None,
    "--save-statistics",
    "FILE.npz",
    "Keep what was measured of the reference; --data FILE.npz gives the same numbers.",
    panel=OUTPUT,
    default="none",
)
Compare = option(
    Path | None,
    "--compare",
    "OLD.json",
    "Earlier --json document; ends with code 8 where a metric got worse.",
    panel=OUTPUT,
    default="none",
)
Junit = option(
    Path | None,
    "--junit",
    "FILE",
    "Write JUnit XML for continuous integration: a test case a metric.",
    panel=OUTPUT,
    default="none",
)
FailAbove = option(
    list[str] | None,
    "--fail-above",
    "METRIC=VALUE",
    "End with code 8 above this; repeatable. A bare number means fid.",
    panel=OUTPUT,
)
FailBelow = option(
    list[str] | None, "--fail-below", "METRIC=VALUE", "End with code 8 below this; repeatable.", panel=OUTPUT
)


Protocol = option(
    Text,
    "--protocol",
    "NAME|list",
    "Measure as a table of the paper does; list: all of them. What is given besides wins, and the name is withheld.",
    panel=SAMPLING,
    default="none",
)
Masks = option(
    Text,
    "--masks",
    "KIND|DIR",
    "Inpainting: random masks of a kind (own, lama-thin, lama-medium, lama-thick), or files by the images' names or in "
    "order; white is to be filled.",
    panel=SAMPLING,
    default="as trained",
)
Pasted = option(
    int | None,
    "--blend",
    "PX",
    "Inpainting: pixels around a hole by which brightness and colour are fitted; 0 = pasted as drawn (paper).",
    panel=SAMPLING,
    min=0,
    default="8",
)
Whole = flag(
    "--whole", "Inpainting: the networks see whole pictures (paper), not windows around holes.", panel=SAMPLING
)
Balanced = flag(
    "--balanced", "As many samples of each class, instead of the classes of the data's rows.", panel=SAMPLING
)
_MEASURED = {
    "images": Images,
    "pairs": Pairs,
    "model": MeasuredModel,
    "weights": opt.Weights,
    "autoencoder": MeasuredAutoencoder,
}
_HOW = {
    "protocol": Protocol,
    "balanced": Balanced,
    "masks": Masks,
    "blend": Pasted,
    "whole": Whole,
    "negative_prompt": opt.NegativePrompt,
    "metrics": Metrics,
    "features": SeveralFeatures,
    "count": EvalCount,
}
_LED = {"guide_factor": GuideFactor, **opt.GUIDING, **opt.CLASSIFIER}
_LIMITS = {
    "save_statistics": SaveStatistics,
    "compare": Compare,
    "fail_above": FailAbove,
    "fail_below": FailBelow,
    "junit": Junit,
}


_REFERENCE = {"data": Reference, "split": ReferenceSplit, "reference_count": ReferenceCount, "also_split": AlsoSplit}


@command({**opt.ROWS, **_REFERENCE}, _MEASURED, opt.DRAWING, _HOW, _LED, _LIMITS, opt.USE_MACHINE, opt.TALK)
def eval_fid(given: ParsedOptions) -> None:
    """Metrics of generated images against a data set: FID, KID, IS, precision and recall, PSNR, SSIM, LPIPS.

    One of --model, --images, --autoencoder and --pairs says what is measured.
    """
    if given.protocol == "list":
        return list_protocols(given.json)
    limits = limits_of(given)
    code = launch.relaunch_if_needed(given.gpus, given.argv)
    if code is not None:
        raise typer.Exit(code)
    report = given.junit if console.is_rank_0() else None
    with errors_in(report):
        from ldmcli.evaluation.evaluate import evaluate
        from ldmcli.evaluation.limits import misses
        from ldmcli.sampling.machine import leave_taken_cores

        request = request_of(given)
        with joined() as world:
            leave_taken_cores(world)
            result = evaluate(**request, **({"world": world} if world.world_size > 1 else {}))
        if not world.is_rank_0:
            return
        show(result, given.json)
        missed = [misses(one, limits) for one in result.get("results", [result])]
    if "novelty_folder" in request:
        from ldmcli.reports.report import write_pages

        write_pages(request["novelty_folder"])
    if report is not None:
        from ldmcli.reports.junit import write_report

        write_report(report, result, missed)
    if any(missed):
        raise ThresholdError("; ".join(text for one in missed for texts in one.values() for text in texts))


def errors_in(report: Path | None) -> AbstractContextManager[None]:
    """A context whose failures are written to a report, where there is to be one. Raises UsageError where its file is
    not ours."""
    if report is None:
        return nullcontext()
    from ldmcli.reports.junit import claim, errors_reported

    claim(report)
    return errors_reported(report)


def limits_of(given: ParsedOptions) -> list[Any]:
    """The limits of --fail-above and --fail-below. Raises UsageError for what is none, and for unknown metrics."""
    from ldmcli.evaluation.limits import Limit

    found = []
    for name, texts, above in (("--fail-above", given.fail_above, True), ("--fail-below", given.fail_below, False)):
        for text in texts or ():
            metric, value = parse_limit(name, text)
            check_name(name, metric)
            found.append(Limit(metric, value, above))
    return found


def show(result: dict[str, Any], json: bool) -> None:
    """The document on stdout, as JSON or as a table; its warnings on stderr, below the table."""
    from ldmcli.reports.evaluation_table import describe_all

    if json:
        console.emit_json(result)
    else:
        console.out(describe_all(result, console.width()))
    warnings = [text for one in (result, *result.get("results", ())) for text in one.get("warnings", ())]
    for text in dict.fromkeys(warnings):
        console.warn(text)


def request_of(given: ParsedOptions) -> dict[str, Any]:
    """The arguments of `evaluate` that the options give. Raises UsageError where they exclude each other."""
    metrics = tuple(name for name in re.split(r"[,+\s]+", (given.metrics or "").lower()) if name)
    measured = what_is_measured(given)
    if given.weights == "raw" and "model" not in measured:
        raise UsageError("--weights raw: belongs to --model; nothing else has two kinds of weights")
    request = {
        **measured,
        "data": reference(given, measured),
        "metrics": metrics or None,
        "features": given.features,
        "perceptual": given.perceptual,
        "guide_factor": given.guide_factor,
        **{name: getattr(given, name) for name in ("guide_scale", "guide_rule", "guide_metric")},
        "classifier": given.classifier,
        "classifier_scale": given.classifier_scale,
        "compare": given.compare,
        "n": given.count,
        "seed": given.seed if given.seed or not given.protocol else None,
        "protocol": given.protocol,
        "balanced": given.balanced or None,
        "masks": given.masks,
        "blend": given.blend,
        "whole": given.whole or None,
        **opt.sampling_of(given),
        "negative_prompt": given.negative_prompt or None,
        "batch_size": given.batch_size,
        "size": config.size_of(given.size),
        "weights": "raw" if given.weights == "raw" else None,
        "mixed_precision": given.mixed_precision,
        "compile": given.compile or None,
        "split": given.split or None,
        "also_split": given.also_split,
        "reference_count": reference_count_of(given.reference_count),
        "save_statistics": given.save_statistics,
        "progress": console.progress,
        "novelty_folder": folder_of(measured) if "novelty" in metrics else None,
    }
    return {name: value for name, value in request.items() if value is not None}


def folder_of(measured: dict[str, Any]) -> Path | None:
    """The run folder of the one model that is measured, where its nearest pairs are kept; None for anything else."""
    name = measured.get("model")
    return folder_for_results(name) if isinstance(name, str) else None


def list_protocols(json: bool) -> None:
    """Prints the protocols: what each sets, and the numbers that were published."""
    from ldmcli.evaluation.protocols import PROTOCOLS, statement
    from ldmcli.reports.evaluation_table import published

    if json:
        stated = {name: {**statement(name, []), "sets": dict(one.sets)} for name, one in PROTOCOLS.items()}
        console.emit_json(stated)
        return
    rows = []
    for name, one in PROTOCOLS.items():
        numbers = ", ".join(f"{key} {published(value)}" for key, value in one.published.items())
        n = one.sets["n"]
        sets = [
            f"n {n:,}" if isinstance(n, int) else f"n {n}",
            f"{one.sets['steps']} steps" if "steps" in one.sets else "",
        ]
        rows.append((name, one.table, ", ".join(filter(None, sets)), numbers))
    console.out(console.table(rows, ["protocol", "of", "takes", "published"]))


def what_is_measured(given: ParsedOptions) -> dict[str, Any]:
    """The one of model, images, autoencoder and pairs that was given; the newest diffusion run where none was."""
    found = {name: getattr(given, name) for name in ("model", "images", "autoencoder", "pairs") if getattr(given, name)}
    if len(found) > 1:
        raise UsageError(f"{' and '.join(f'--{name}' for name in found)} exclude each other: say which is measured")
    if found:
        return {name: value[0] if name in SEVERAL and len(value) == 1 else value for name, value in found.items()}
    from ldmcli.core.runs import newest_run

    run = str(newest_run("diffusion"))
    console.say(f"model: {run} (the newest diffusion run)")
    return {"model": run}


def reference(given: ParsedOptions, measured: dict[str, Any]):
    """What to measure against: data settings, an .npz, or None where no option speaks of data.

    Options that leave the data set open (--limit, --split) change what the measured run was trained on.
    """
    if given.data is not None and given.data.endswith(".npz"):
        return given.data
    layers = given.layers("data.")
    runs = measured.get("model") or measured.get("autoencoder")
    name = runs[0] if isinstance(runs, list) else runs
    if given.data is None and layers:
        run = locate(Path(name))[0] if name else None
        if run is None or not (run / "config.toml").is_file():
            return None
        stored = config.read_recipe(run / "config.toml").values
        layers.insert(0, (f"run {run}", {path: value for path, value in stored.items() if path.startswith("data.")}))
    return config.resolve("diffusion", layers).config.data if layers else None


def reference_count_of(text: str | None) -> int | str | None:
    """Rows of a reference: a number, "all", or None where nothing was said. Raises UsageError."""
    if text is None or text == "all":
        return text
    if not text.isdecimal():
        raise UsageError(f"--reference-count {text}: a number of rows from 2 on, or all")
    return int(text)


def parse_limit(option: str, text: str) -> tuple[str, float]:
    """Metric and value of `METRIC=VALUE`; a bare number has the metric "", which means the Fréchet distance."""
    name, equals, value = text.rpartition("=")
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if math.isnan(number) or (equals and not name.strip()):
        raise UsageError(f"{option} {text}: write METRIC=VALUE, as in fid=30, or a number")
    return name.strip().lower(), number


def check_name(option: str, name: str) -> None:
    """UsageError for a metric that no evaluation has, before one is made."""
    from ldmcli.evaluation.metrics import METRICS, first_words

    words = first_words()
    if name.split("_")[0] not in ("", *METRICS, *words):
        proper = [*METRICS, *(word for word, metric in words.items() if metric not in words)]
        hint = config.did_you_mean(difflib.get_close_matches(name, proper, n=1)) or f"; there are {', '.join(proper)}"
        raise UsageError(f"{option} {name}: no such metric{hint}")
