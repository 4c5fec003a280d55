"""`ldm study`: many runs looked at together."""

import os
import re
from pathlib import Path

from ldmcli.cli import options as opt
from ldmcli.cli.parsing import MODEL, OUTPUT, SAMPLING, TRAINING, ParsedOptions, Text, command, option
from ldmcli.cli.train import data_name, require_folder
from ldmcli.core import config, console
from ldmcli.core.errors import UsageError

ALL_FACTORS = "1,2,4,8,16"
SAMPLING_STEPS = "10,20,50,100,200"

Factors = option(
    Text,
    "--f",
    "N[,N]",
    "Downsampling factors: 1 (pixels), 2, 4, 8, 16, 32.",
    panel=MODEL,
    default=f"{ALL_FACTORS}; 4 with --grid",
)
StudyReg = option(str, "--reg", ("kl", "vq"), "Regulariser of the first stages.", panel=MODEL, value="kl", default="kl")
Parameters = option(
    Text,
    "--parameters",
    "N",
    "Parameters of each diffusion model, as in 8M.",
    panel=MODEL,
    default="those of the default network",
)
Autoencoders = option(
    list[str] | None,
    "--autoencoder",
    "RUN",
    "A finished first stage, taken instead of training one; repeatable.",
    panel=MODEL,
)
Runs = option(
    list[str] | None, "--runs", "RUN", "A finished model, measured beside the others; repeatable.", panel=MODEL
)
Grid = option(
    list[str] | None,
    "--grid",
    "SECTION.NAME=A,B",
    "Compare values of a setting; repeatable, every combination is trained.",
    panel=MODEL,
)
Minutes = option(
    float | None, "--minutes", "MINUTES", "Training of each diffusion model.", panel=TRAINING, default="none", min=0.01
)
StudySteps = option(
    int | None,
    "--steps",
    "N",
    "Updates of each diffusion model, instead of minutes.",
    panel=TRAINING,
    default="10,000",
    min=1,
)
StageMinutes = option(
    float | None,
    "--ae-minutes",
    "MINUTES",
    "Training of each first stage.",
    panel=TRAINING,
    default="as --minutes",
    min=0.01,
)
StageSteps = option(
    int | None, "--ae-steps", "N", "Updates of each first stage.", panel=TRAINING, default="as --steps", min=1
)
Seeds = option(Text, "--seeds", "N[,N]", "Seeds; each trains every model once more.", panel=TRAINING, default="0")
StudyCount = option(
    int, "-n --count", "N", "Images that each measurement takes.", panel=SAMPLING, value=256, default="256", min=10
)
SamplingSteps = option(
    Text,
    "--sampling-steps",
    "N[,N]",
    "Sampling steps at which distance and speed are measured.",
    panel=SAMPLING,
    default=SAMPLING_STEPS,
)
EvalSamples = option(
    int,
    "--eval-samples",
    "N",
    "Samples that are measured eight times while a model trains; 0 = none.",
    panel=SAMPLING,
    value=128,
    default="128",
    min=0,
)
StudyFeatures = option(
    Text,
    "--features",
    "NAME|FILE",
    "Network of the features, as eval-fid takes it.",
    panel=SAMPLING,
    default="the best at hand, stated",
)
StudyOut = option(
    Path | None,
    "--out -o",
    "DIR",
    "Folder of the study; the same command again goes on where it was.",
    panel=OUTPUT,
    default="runs/DATA-study",
)

_COMPARED = {"f": Factors, "grid": Grid, "runs": Runs}
_MODEL = {
    "reg": StudyReg,
    "condition": opt.Condition,
    "parameters": Parameters,
    "autoencoder": Autoencoders,
    "assignments": opt.Assignments,
}
_LENGTH = {
    "minutes": Minutes,
    "steps": StudySteps,
    "ae_minutes": StageMinutes,
    "ae_steps": StageSteps,
    "seeds": Seeds,
    "batch_size": opt.BatchSize,
}
_MEASURED = {
    "count": StudyCount,
    "sampling_steps": SamplingSteps,
    "eval_samples": EvalSamples,
    "features": StudyFeatures,
}


@command(opt.ROWS, _COMPARED, _MODEL, _LENGTH, _MEASURED, {"out": StudyOut, "plan": opt.Plan}, opt.TALK)
def study(given: ParsedOptions) -> None:
    """The paper's study of compression on your data: LDM-f at equal parameters and equal training, on one page.

    --grid compares any other setting, --runs takes finished models. Stopped, the same command goes on.
    """
    layers = (
        *config.environment_layers("diffusion", os.environ),
        *given.layers(),
        *config.set_layers(given.assignments or ()),
    )
    only_runs = given.runs and not (given.f or given.grid)
    factors = given.f or ("" if only_runs else "4" if given.grid else ALL_FACTORS)
    from ldmcli.studies.plan import StudyRequest, describe_plan

    request = StudyRequest(
        layers=layers,
        first_stage_layers=tuple(config.environment_layers("autoencoder", os.environ)),
        factors=numbers("--f", factors),
        reg=given.reg,
        minutes=given.minutes or 0.0,
        steps=given.steps or 0,
        first_stage_minutes=given.ae_minutes or 0.0,
        first_stage_steps=given.ae_steps or 0,
        parameters=count_of("--parameters", given.parameters or "0"),
        seeds=numbers("--seeds", given.seeds or "0"),
        grid=dict(grid_line(text) for text in given.grid or ()),
        autoencoders=tuple(given.autoencoder or ()),
        runs=tuple(given.runs or ()),
        n=given.count,
        sampling_steps=numbers("--sampling-steps", given.sampling_steps or SAMPLING_STEPS),
        eval_samples=given.eval_samples,
        features=given.features,
    )
    if given.plan:
        table, total = describe_plan(request)
        if given.json:
            console.emit_json({"trainings": table, **total})
        else:
            console.out(plan_text(table, total))
        return
    source = next((layer["data.source"] for _, layer in reversed(layers) if "data.source" in layer), "shapes")
    out = given.out or Path("runs") / f"{data_name(str(source))}-study"
    require_folder(out)
    from ldmcli.studies.study import study as run_study

    found = run_study(request, out, [console.redact(word) for word in ("ldm", *given.argv)])
    if given.json:
        console.emit_json({"out": str(out), **found})


def numbers(name: str, text: str) -> tuple[int, ...]:
    """Whole numbers with commas between."""
    try:
        return tuple(int(part) for part in re.split(r"\s*,\s*|\s+", text.strip())) if text.strip() else ()
    except ValueError:
        raise UsageError(f"{name} {text}: whole numbers with commas between, as in 1,2,4") from None


def count_of(name: str, text: str) -> int:
    """A number of parameters: 8000000, 8e6, 8M."""
    factor = {"k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9}.get(text[-1:].lower())
    try:
        value = float(text[:-1]) * factor if factor else float(text)
    except ValueError:
        raise UsageError(f"{name} {text}: write a number, as in 8M or 8000000") from None
    if not 0 <= value < 1e13:
        raise UsageError(f"{name} {text}: must be a positive number of parameters")
    return int(value)


def grid_line(text: str) -> tuple[str, tuple[str, ...]]:
    """Setting and values of `section.name=a,b,c`; values that are lists stand in brackets, as in [1,2]."""
    path, equals, values = text.partition("=")
    found = tuple(part.strip() for part in re.findall(r"\[[^\]]*\]|[^,]+", values) if part.strip())
    if not equals or not found:
        raise UsageError(f"--grid {text}: write SECTION.NAME=A,B, as in --grid train.lr=0.005,0.01")
    return path.strip().replace("-", "_"), found


def plan_text(table: list[dict], total: dict) -> str:
    """The plan as a table, and what all of it takes."""
    rows = [
        [row["name"], row["latent"], f"{row['parameters'] / 1e6:.2f} M", row["gflop"], row["length"]] for row in table
    ]
    lines = console.table(rows, ["training", "latent", "parameters", "GFLOP an image", "length"])
    return f"{lines}\n{total['note']}"
