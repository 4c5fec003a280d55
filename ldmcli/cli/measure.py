"""`ldm eval-fid`: metrics of generated images, and limits that they must keep."""

import math
from pathlib import Path
from typing import Annotated

from ldmcli.cli import options as opt
from ldmcli.core import config, console
from ldmcli.core.errors import InputError, ThresholdError, UsageError

# names that people write for numbers that go by a longer one
_SHORT = {"kid": "kid_mean", "is": "is_mean", "pr": "precision", "fd": "fid"}

Reference = Annotated[opt.Text, opt.setting("data.source", "--data", panel=opt.DATA, metavar="D",
    default="the model's own", help="Images to measure against, as for training.")]
Images = Annotated[Path | None, opt.option("--images", panel=opt.DATA, metavar="DIR|FILE.npz", default="none",
    help="Measure these images instead of a model's.")]
Pairs = Annotated[tuple[Path, Path] | None, opt.option("--pairs", panel=opt.DATA, metavar="DIR_A DIR_B",
    default="none", help="Paired metrics of two folders with the same file names.")]
Metrics = Annotated[opt.Text, opt.option("--metrics", panel=opt.SAMPLING, metavar="NAME[,NAME]",
    default="fid, or psnr,ssim for pairs", help="fid, kid, is, pr, psnr, ssim, lpips.")]
Features = Annotated[opt.Text, opt.option("--features", panel=opt.SAMPLING, metavar="NAME|FILE",
    default="the best at hand, stated", help="Network of the features: inception, effnet-lite0, or a file.")]
EvalCount = Annotated[int | None, opt.option("-n", "--count", panel=opt.SAMPLING, metavar="N", min=2,
    default="chosen, stated", help="Images that are measured.")]
MeasuredAutoencoder = Annotated[opt.Text, opt.option("--autoencoder", panel=opt.MODEL, metavar="RUN", default="none",
    help="Measure this autoencoder's reconstructions instead.")]
Compare = Annotated[Path | None, opt.option("--compare", panel=opt.OUTPUT, metavar="OLD.json", default="none",
    help="Earlier --json document; ends with code 8 where a metric got worse.")]
FailAbove = Annotated[list[str] | None, opt.option("--fail-above", panel=opt.OUTPUT, metavar="METRIC=VALUE",
    help="End with code 8 above this; repeatable. A bare number means fid.")]
FailBelow = Annotated[list[str] | None, opt.option("--fail-below", panel=opt.OUTPUT, metavar="METRIC=VALUE",
    help="End with code 8 below this; repeatable.")]


_MEASURED = {"images": Images, "pairs": Pairs, "model": opt.Model, "autoencoder": MeasuredAutoencoder}
_HOW = {"metrics": Metrics, "features": Features, "count": EvalCount}
_LIMITS = {"compare": Compare, "fail_above": FailAbove, "fail_below": FailBelow}


@opt.takes({**opt.ROWS, "data": Reference}, _MEASURED, opt.DRAWING, _HOW, _LIMITS, opt.TALK)
def eval_fid(given: opt.Given) -> None:
    """Metrics of generated images against a data set: FID, KID, IS, precision and recall, PSNR, SSIM, LPIPS.

    One of --model, --images, --autoencoder and --pairs says what is measured.
    """
    measured = {"--model": given.model, "--images": given.images, "--autoencoder": given.autoencoder,
                "--pairs": given.pairs}
    named = [name for name, value in measured.items() if value is not None]
    if len(named) > 1:
        raise UsageError(f"{' and '.join(named)} exclude each other: say which one is measured")
    limits = [(*parse_limit("--fail-above", text), True) for text in given.fail_above or ()]
    limits += [(*parse_limit("--fail-below", text), False) for text in given.fail_below or ()]
    metrics = [name for name in (given.metrics or "").replace(" ", "").split(",") if name] or None
    if given.compare is not None and not given.compare.is_file():
        raise InputError(f"--compare {given.compare}: no such file")
    data = data_settings(given)
    from ldmcli.drivers.evaluate import evaluate

    result = evaluate(model=given.model, autoencoder=given.autoencoder, images=given.images, data=data,
                      pairs=given.pairs, metrics=metrics, features=given.features, n=given.count, seed=given.seed,
                      steps=given.steps, guidance=given.guidance, sampler=given.sampler,
                      batch_size=given.batch_size, compare=given.compare)
    if given.json:
        console.emit_json(result)
    else:
        console.out(describe(result))
    check_limits(result, limits)


def data_settings(given: opt.Given):
    """Data settings from the options over those of the measured run; None where no option speaks of data."""
    layers = given.layers("data.")
    if not layers:
        return None
    run = given.values.get("model") or given.values.get("autoencoder")
    if given.data is None and run and (Path(run) / "config.toml").is_file():
        stored = config.read_toml(Path(run) / "config.toml")
        layers.insert(0, (f"run {run}", {path: value for path, value in stored.items() if path.startswith("data.")}))
    return config.resolve("diffusion", layers).config.data


def parse_limit(option: str, text: str) -> tuple[str, float]:
    """Metric and value of `METRIC=VALUE`, or of a bare number, which means the Fréchet distance."""
    name, _, value = text.rpartition("=")
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if math.isnan(number):
        raise UsageError(f"{option} {text}: write METRIC=VALUE, as in fid=30, or a number")
    name = name.strip().lower() or "fid"
    return _SHORT.get(name, name), number


def numbers(result: dict) -> dict[str, float]:
    """The metrics of an evaluation's document by name."""
    inside = result.get("metrics")
    source = inside if isinstance(inside, dict) else result
    return {name: value for name, value in source.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool)}


def check_limits(result: dict, limits: list[tuple[str, float, bool]]) -> None:
    """ThresholdError where a metric misses a limit (a NaN misses every limit) or --compare found one worse."""
    found = numbers(result)
    missed = []
    for name, limit, above in limits:
        if name not in found:
            raise UsageError(f"--fail-{'above' if above else 'below'} {name}={limit:g}: {name} was not measured; "
                             f"measured: {', '.join(found)}")
        value = found[name]
        if not (value <= limit if above else value >= limit):
            missed.append(f"{name} = {value:.4g} is {'above' if above else 'below'} {limit:g}")
    missed += [f"{name} is worse than in --compare" for name in result.get("worse", ())]
    if missed:
        raise ThresholdError("; ".join(missed))


def describe(result: dict) -> str:
    """The document of an evaluation as lines for people."""
    found = numbers(result)
    about = {key: value for key, value in result.items() if key not in found and key not in ("metrics", "worse")}
    rows = [(name, f"{value:.4g}") for name, value in found.items()]
    return "\n".join([console.table(rows, ["metric", "value"]), console.facts(about)]).rstrip()
