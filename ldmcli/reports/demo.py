"""`ldm demo`: the whole chain within minutes, on the embedded shapes or on anybody's images, measured at the end."""

import time
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ldmcli.conditions import CONDITIONS
from ldmcli.conditions.dataset import ConditionDataset
from ldmcli.conditions.parse import arguments_of
from ldmcli.conditions.text import Text
from ldmcli.core import config, console, files, runs
from ldmcli.core.errors import UsageError
from ldmcli.core.outputs import refuse_foreign
from ldmcli.core.settings import DataSettings
from ldmcli.data.shape_reading import score
from ldmcli.data.sources import open_rows
from ldmcli.evaluation.extractors import open_extractor
from ldmcli.maths.metrics import frechet_from_features
from ldmcli.maths.pixels import tensor_to_pixels
from ldmcli.reports.report import write_demo_report, write_pages
from ldmcli.sampling.contact_sheets import in_rows, save_grid
from ldmcli.sampling.load import load
from ldmcli.training.loop import RunOptions, train

# shares of the minutes; the rest is starting, encoding, sampling, measuring (about a minute on two cores)
_AE_SHARE, _LDM_SHARE = 0.12, 0.72
HELD_OUT = 128
POOR_PSNR = 22.0  # dB; below it shapes and colours of small images are not discernible any more
FEW_STEPS = 100  # of the first stage


def _resolved(run_kind: str, values: dict[str, Any], preset: str = "") -> config.Resolved:
    layers = [config.preset_layer(run_kind, preset)] if preset else []
    return config.resolve(run_kind, [*layers, ("ldm demo", values)])


def _data_values(data: DataSettings) -> dict[str, Any]:
    default = DataSettings()
    return {f"data.{name}": value for name, value in vars(data).items() if value != getattr(default, name)}


def plan_for(rows, data: DataSettings, minutes: float) -> dict[str, Any]:
    """Settings chosen for the data and the time: image size, conditions, steps as upper bounds."""
    size = data.size if any(data.size) else (64, 64)
    found = (name for name, one in CONDITIONS.items() if one.static and one.argument and one.available(rows, data))
    kinds = tuple(islice(found, 1))
    return {"size": size, "kinds": kinds, "ae_minutes": minutes * _AE_SHARE, "ldm_minutes": minutes * _LDM_SHARE}


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

    `minutes` bounds the whole. preset "paper" trains the second stage as the paper does, for comparison.
    """
    if minutes < 0.2:
        raise UsageError(f"--minutes {minutes}: at least 0.2")
    if not runs.is_run(out / "autoencoder"):  # what an earlier demo wrote there is replaced
        refuse_foreign([out / name for name in ("samples.png", "prompts.txt", "summary.json", "report.html")])
    started = time.monotonic()
    rows = open_rows(data, split="train")
    chosen = plan_for(rows, data, minutes)
    base = {**_data_values(data), "data.size": chosen["size"], "train.seed": seed}
    console.say(
        f"demo: {rows.source}, {chosen['size'][0]}x{chosen['size'][1]} px, told "
        f"{' + '.join(chosen['kinds']) or 'nothing'}; {minutes:g} minutes in all"
    )
    ae, ldm = out / "autoencoder", out / "diffusion"
    _train("autoencoder", {**base, "train.lr": 0.02}, chosen["ae_minutes"], ae, fresh)
    # so short a training is misled by more guidance: stars and counts suffer at 2 and 3
    conditions = {"condition.kinds": chosen["kinds"], "sample.guidance": 1.5}
    _train("diffusion", {**base, **conditions}, chosen["ldm_minutes"], ldm, fresh, preset, str(ae))
    summary = {
        "data": rows.source,
        "minutes": minutes,
        "preset": preset or "default",
        "seed": seed,
        **_measure(data, chosen, ae, ldm, out, seed),
    }
    summary["warnings"] = shortcomings(runs.read_run(ae), runs.read_run(ldm), minutes)
    summary["seconds"] = round(time.monotonic() - started, 1)
    files.write_json(out / "summary.json", summary)
    _report(out, [ae, ldm], summary)
    for text in summary["warnings"]:
        console.warn(text)
    return summary


def shortcomings(ae: dict[str, Any], ldm: dict[str, Any], minutes: float) -> list[str]:
    """What of the two runs (run.json's contents) is not good enough for what follows, and what would help."""
    found = [
        f"{name}: {text}"
        for name, run in (("autoencoder", ae), ("diffusion model", ldm))
        for text in run.get("warnings") or []
    ]
    psnr, steps = ae["metrics"]["psnr"], ae["step"]
    if psnr >= POOR_PSNR:
        return found
    if steps < FEW_STEPS:
        remedy = (
            f"{steps} steps are too few: give more than --minutes {minutes:g}, a smaller --size, or a machine "
            "that does nothing else"
        )
    else:
        remedy = (
            f"after {steps:,} steps these images want more: a longer first stage (`ldm train-ae`, then `ldm "
            "train-ldm --autoencoder RUN`), or a larger --minutes"
        )
    return [
        *found,
        f"the autoencoder reconstructs held-out images at {psnr:.1f} dB only ({POOR_PSNR:g} is a minimum), "
        f"and no sample can be better than its reconstructions; {remedy}",
    ]


def _train(
    run_kind: str,
    values: dict[str, Any],
    minutes: float,
    out: Path,
    fresh: bool,
    preset: str = "",
    autoencoder: str = "",
) -> None:
    never = 1_000_000
    schedule = {
        "train.max_minutes": minutes,
        "train.steps": never,
        "train.save_every": never,
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


def _measure(data: DataSettings, chosen: dict[str, Any], ae: Path, ldm: Path, out: Path, seed: int) -> dict[str, Any]:
    """Samples of held-out requests beside reconstructions and real images, all scored the same way."""
    model: Any = load(ldm)
    held = open_rows(replace(data, size=chosen["size"]), split="validation")
    picked = _distinct(held, chosen["kinds"])
    count = len(picked)
    real = np.stack([held.pixels(i, chosen["size"], "center", (0.5, 0.5)) for i in picked])
    source = ConditionDataset(held, model.config, chosen["size"], training=False)
    values = {name: source.values(name, picked, picked) for name in chosen["kinds"]}
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
        "ae_psnr": runs.read_run(ae)["metrics"]["psnr"],
    }
    if held.source.startswith("shapes"):
        result |= _shape_scores(arguments["prompt"], samples, rebuilt, real)
    return result | _frechet(samples, rebuilt, real, held)


def _distinct(held, kinds: tuple[str, ...]) -> list[int]:
    """Up to 128 validation rows, of each caption only the first; spread over the rows where there are no captions."""
    if Text.name not in kinds:
        return np.linspace(0, len(held) - 1, min(HELD_OUT, len(held))).round().astype(int).tolist()
    first: dict[str, int] = {}
    for i in range(len(held)):
        first.setdefault(held.caption(i), i)
    return list(first.values())[:HELD_OUT]


def _shape_scores(prompts: list[str], samples, rebuilt, real) -> dict[str, Any]:
    """The checker's shares on samples (top level), reconstructions and real images."""
    return {**score(samples, prompts), "reconstructions": score(rebuilt, prompts), "real": score(real, prompts)}


def _frechet(samples, rebuilt, real, held) -> dict[str, Any]:
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
