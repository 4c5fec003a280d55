"""What `--plan` says before anything runs: settings and their origins, parameters, FLOPs, memory, time.

Networks are built on torch's meta device, where tensors have shapes and no content: no weights, no data, no memory.
What depends on the data (vocabulary, classes, longest caption) is assumed, and each assumption is listed.
"""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldmcli.conditions.class_ import ASSUMED_CLASSES
from ldmcli.conditions.fit import assumed_specs, cost_notes
from ldmcli.core import config as configuration
from ldmcli.core import console, files, launch, runs
from ldmcli.core.config import Resolved
from ldmcli.core.durations import rough_duration
from ldmcli.core.presets import PRESETS
from ldmcli.core.settings import AutoencoderConfig, AutoencoderSettings, ClassifierConfig, DiffusionConfig
from ldmcli.core.world import default_device
from ldmcli.formats.open_model import format_of
from ldmcli.formats.run_folder import first_stage_run, read_config
from ldmcli.sampling.load import load_autoencoder
from ldmcli.training import checks, cost
from ldmcli.training.distillation import teacher_passes
from ldmcli.training.distributed import autocast_dtype

PROBE_SECONDS = 0.5


def plan(
    kind: str,
    resolved: Resolved,
    *,
    autoencoder: str = "",
    init_from: str = "",
    model: str = "",
    first_stage: str = "",
    rows: int | None = None,
    processes: int = 1,
) -> dict[str, Any]:
    """What a training would take; nothing is trained, downloaded or written, and no data is opened.

    autoencoder: run folder, "none" for pixels, "" for the default one; init_from: a run whose vocabulary and classes
    are taken over; model: the diffusion run that a classifier will lead; first_stage: preset that stands in where no
    autoencoder is named. rows: training rows where they are known; processes: that share the batch, each with a GPU or
    with its part of the machine's cores and memory. Raises what a training would before it opens data
    (`training.checks`).
    """
    notes: list[str] = []
    command = configuration.COMMAND_OF[kind]
    train, world = resolved.config.train, max(launch.world()[1], processes)
    device = default_device()
    dtype = autocast_dtype(train.mixed_precision, device)
    config = resolved.config
    if isinstance(config, AutoencoderConfig):
        image, latent, costs = _autoencoder_costs(config, world, notes)
    elif isinstance(config, ClassifierConfig):
        image, latent, costs = _classifier_costs(config, autoencoder, model, world, notes)
    else:
        image, latent, costs = _diffusion_costs(config, autoencoder, init_from, first_stage, world, notes)
        command = "ldm distill" if config.distill.calls else command
    sharing = world if device.type == "cpu" else 1  # processes that share one device's memory and speed
    a_sample = cost.step_flops(costs)
    if isinstance(config, DiffusionConfig) and config.distill.calls:
        passes = teacher_passes(config, read_config("diffusion", Path(init_from)))
        a_sample += passes * costs["model"].forward_flops
        notes.append(f"{passes} passes of the teacher a sample are counted in each step, its weights in memory are not")
    step, seen = a_sample * train.batch_size, train.batch_at(train.steps)[0]
    share = -(-train.batch_size // world)
    memory = _memory(costs, resolved.config, share, device, sharing, dtype)
    return {
        "command": command,
        "image": list(image),
        "latent": list(latent),
        "parameters": {
            name: sum(p.numel() for p in network.module.parameters())
            for name, network in costs.items()
            if name != "perceptual"
        },
        "flops": {"forward_per_image": costs[next(iter(costs))].forward_flops, "per_step": step},
        "batch": {"global": train.batch_size, "per_pass": memory["per_pass"], "processes": world},
        "epochs": seen / rows if rows else None,
        "memory": memory,
        "time": _time(step * sharing / world, seen / train.batch_size, train.max_minutes, device, dtype),
        "notes": notes + _memory_notes(memory, share, dtype) + _evaluation_notes(config, costs, device),
        "settings": [list(row) for row in configuration.describe(resolved)],
    }


# ---------------------------------------------------------------- networks


def _autoencoder_costs(config: AutoencoderConfig, world: int, notes: list[str]):
    checks.check_autoencoder(config, world)
    image = checks.image_size(config.data)
    costs = cost.autoencoder_costs(config, image)
    if "discriminator" in costs:
        notes.append(f"FLOPs and time are those from step {config.loss.disc_start} on, with the discriminator")
    network: Any = costs["autoencoder"].module
    return image, network.latent_shape(*image), costs


def _diffusion_costs(
    config: DiffusionConfig, autoencoder: str, init_from: str, first_stage: str, world: int, notes: list[str]
):
    settings, trained_at = _first_stage(autoencoder, init_from, first_stage, notes)
    image = checks.image_size(config.data, trained_at)
    checks.check_diffusion(config, settings, image, world)
    notes += checks.notes_of(config)
    stage = cost.meta_autoencoder(settings)
    begun = runs.locate(Path(init_from))[0] if init_from else None
    known = files.read_json(begun / "stats.json").get("conditions") or {} if begun else {}
    specs = assumed_specs(config, stage, known, notes)
    latent = stage.latent_shape(*image)
    notes += cost_notes(config)
    if config.task.name == "inpaint" or (config.task.name == "sr" and config.task.enlarged):
        what = "with its hole" if config.task.name == "inpaint" else "reduced and enlarged"
        notes.append(f"the first stage, which encodes each image {what}, is not counted")
    return image, latent, {"model": cost.diffusion_cost(config, specs, latent, image)}


def _classifier_costs(config: ClassifierConfig, autoencoder: str, model: str, world: int, notes: list[str]):
    settings, trained_at = _first_stage(autoencoder, model, "", notes)
    image = checks.image_size(config.data, trained_at)
    checks.check_classifier(config, settings, image, world)
    notes += checks.notes_of(config)
    latent = cost.meta_autoencoder(settings).latent_shape(*image)
    notes.append(f"class: {ASSUMED_CLASSES:,} classes assumed; the data say how many there are")
    return image, latent, {"model": cost.classifier_cost(config, ASSUMED_CLASSES, latent)}


def _first_stage(
    autoencoder: str, init_from: str, preset: str, notes: list[str]
) -> tuple[AutoencoderSettings, tuple[int, int]]:
    """Settings of the autoencoder that latents come from, and the size in pixels that it was trained at."""
    if autoencoder == "none":
        return AutoencoderSettings(f=1), (0, 0)
    path = Path(autoencoder or (runs.locate(Path(init_from))[0] / "autoencoder" if init_from else ""))
    if (autoencoder or init_from) and format_of(path) != "run":
        found = load_autoencoder(path, torch.device("cpu"))
        return found.network.settings, _size(found.config.data.size) if found.config else (0, 0)
    if autoencoder or init_from:
        config = read_config("autoencoder", first_stage_run(path))
    elif preset:
        notes.append(f"no autoencoder is named: {preset}, with which this model goes, is assumed")
        config = configuration.resolve("autoencoder", [(preset, dict(PRESETS[preset].values))]).config
    else:
        notes.append("no autoencoder is named: that of `ldm train-ae` without options is assumed")
        config = AutoencoderConfig()
    return config.autoencoder, _size(config.data.size)


def _size(size: Sequence[int]) -> tuple[int, int]:
    return size[0], size[1]


# ---------------------------------------------------------------- memory


def _memory(
    costs: dict[str, cost.NetworkCost],
    config,
    share: int,
    device: torch.device,
    sharing: int,
    dtype: torch.dtype | None,
) -> dict[str, Any]:
    """Bytes of one process, estimated, and what it may take of a device that `sharing` processes share. "per_pass":
    samples of its `share` of the batch that go through at once."""
    train = config.train
    trained = [network for name, network in costs.items() if name != "perceptual"]
    named = [pair for network in trained for pair in network.module.named_parameters()]
    weights = 4 * sum(p.numel() for _, p in named)
    main = 4 * sum(p.numel() for p in trained[0].module.parameters())
    parts: dict[str, Any] = {
        "weights": weights + cost.cast_bytes(named, dtype),
        "gradients": weights,
        "optimizer": cost.optimizer_bytes(named, train),
        "ema": main if train.ema else 0,
        "runtime": cost.RUNTIME_BYTES,
    }
    per_image = cost.kept_bytes(costs.values(), dtype, device)
    available = cost.available_bytes(device) // sharing
    room = cost.MEMORY_SHARE * (available - sum(parts.values()))
    micro = min(train.micro_batch, share) if train.micro_batch else cost.largest_micro_batch(share, per_image, room)
    parts["activations"] = micro * per_image
    total = sum(parts.values())
    return {
        **parts,
        "total": total,
        "available": available,
        "device": device.type,
        "fits": total <= available,
        "per_image": per_image,
        "per_pass": micro,
    }


def _memory_notes(memory: dict[str, Any], share: int, dtype: torch.dtype | None) -> list[str]:
    form = "float32" if dtype is None else f"{str(dtype).removeprefix('torch.')}, its copies of weights included"
    notes = [f"memory: an estimate of one process in {form}, without data; validation and previews fit beside it"]
    if memory["fits"] and memory["per_pass"] < share:
        notes.append(f"{memory['per_pass']} of {share} images go through at a time (--micro-batch); the batch stays")
    if memory["fits"]:
        return notes
    room = memory["available"] - (memory["total"] - memory["activations"])
    fitting = int(room // memory["per_image"]) if memory["per_image"] else 0
    how = f"--micro-batch {2 ** int(math.log2(fitting))} would" if fitting >= 1 else "not even --micro-batch 1 would"
    return [*notes, f"it does not fit: {how} (the global batch stays)"]


def _time(flops: float, steps: float, max_minutes: float, device: torch.device, dtype) -> dict[str, Any] | str:
    """Seconds at the rate that a convolution reaches on this machine; a bound, not a promise. steps: of whole
    batches."""
    rate = probe_flops_per_s(device, dtype)
    if not rate or not flops:
        return "unknown"
    seconds = flops / rate
    total = min(seconds * steps, max_minutes * 60) if max_minutes else seconds * steps
    return {
        "seconds_per_step": seconds,
        "seconds": total,
        "flops_per_s": rate,
        "how": "at best: at the rate of 3x3 convolutions here; narrow networks take two or three times as long",
    }


def _evaluation_notes(config, costs: dict[str, cost.NetworkCost], device: torch.device) -> list[str]:
    """What the samples of an evaluation take (train.eval_samples), at the rate of `_time`."""
    count = config.train.eval_samples
    if not count:
        return []
    sample, steps = config.sample, config.train.eval_steps or config.sample.steps
    passes = 2 if config.condition.kinds and sample.guidance != 1 else 1
    flops, rate = (
        count * steps * passes * costs["model"].forward_flops,
        probe_flops_per_s(device, None),
    )  # in full precision
    took = f", {rough_duration(flops / rate)} at best, decoding and features left out" if rate else ""
    return [f"each evaluation draws {count:,} samples in {steps} steps (train.eval_samples){took}"]


def probe_flops_per_s(device: torch.device, dtype: torch.dtype | None) -> float:
    """FLOP/s of a convolution with gradients on this machine, the best of the passes that fit in a fraction of a
    second; 0 where it cannot run. On a CPU one core is measured and multiplied: several would wait for each other
    wherever other programs run, and measure those."""
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    size = 4 if device.type == "cpu" else 64
    try:
        if threads > 1:
            torch.set_num_threads(1)
        return threads * _best_rate(device, dtype, size)
    except RuntimeError:
        return 0.0
    finally:
        if threads > 1:
            torch.set_num_threads(threads)


def _best_rate(device: torch.device, dtype: torch.dtype | None, size: int) -> float:
    layer = nn.Conv2d(96, 96, 3, padding=1).to(device)
    x = torch.zeros(size, 96, 16, 16, device=device).requires_grad_()
    best, passes, end = math.inf, 0, time.perf_counter() + PROBE_SECONDS
    while passes < 5 or time.perf_counter() < end:  # the first ones choose kernels
        passes += 1
        begun = time.perf_counter()
        with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            layer(x).float().sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - begun)
    return 3 * 2 * x.numel() * 96 * 9 / best


# ---------------------------------------------------------------- for people


def plan_text(plan: dict[str, Any], width: int = 80) -> str:
    """The plan for a terminal: settings with their origins, then what the run takes."""
    parts = [_settings_text(plan["settings"], width), *_sizes(plan), *_memory_lines(plan)]
    took = plan["time"]
    if isinstance(took, dict):
        parts.append(
            f"time        from {rough_duration(took['seconds'])} on ({took['seconds_per_step']:.3g} s a step), "
            f"at {took['flops_per_s'] / 1e9:,.0f} GFLOP/s"
        )
        parts += _wrapped("", took["how"], width)
    else:
        parts.append(f"time        {took}")
    for note in plan["notes"]:
        parts += _wrapped("note", note, width)
    return "\n".join(parts)


def _settings_text(rows: list[list[str]], width: int) -> str:
    names = max(len(path) for path, _, _ in rows)
    origins = min(max(len(origin) for *_, origin in rows), 24)
    room = max(width - names - origins - 4, 12)
    cut: list[list | tuple] = [(path, _clipped(value, room), _clipped(origin, origins)) for path, value, origin in rows]
    return console.table(cut, ["setting", "value", "from"]) + "\n"


def _clipped(text: str, room: int) -> str:
    return text if len(text) <= room else text[: room - 1] + "…"


def _sizes(plan: dict[str, Any]) -> list[str]:
    batch, flops = plan["batch"], plan["flops"]
    shape = "x".join(map(str, plan["latent"]))
    image = "x".join(map(str, plan["image"]))
    lines = [f"command     {plan['command']}", f"images      {image} px, latents {shape}"]
    lines += [f"parameters  {count:,} ({name})" for name, count in plan["parameters"].items()]
    processes = f", {batch['processes']} processes" if batch["processes"] > 1 else ""
    lines.append(f"batch       {batch['global']} images a step, {batch['per_pass']} a pass{processes}")
    if plan["epochs"]:
        lines.append(f"epochs      {plan['epochs']:.3g}")
    forward, step = _si(flops["forward_per_image"]), _si(flops["per_step"])
    return [*lines, f"work        {forward}FLOP forward an image, {step}FLOP a step"]


def _memory_lines(plan: dict[str, Any]) -> list[str]:
    memory, size = plan["memory"], files.human_bytes
    share = "for each process" if plan["batch"]["processes"] > 1 else "free"
    parts = ("weights", "gradients", "optimizer", "ema", "activations", "runtime")
    named = [f"{name} {size(memory[name])}" for name in parts]
    verdict = "fits" if memory["fits"] else "does not fit"
    where = "GPU" if memory["device"] == "cuda" else "machine"
    return [
        f"memory      about {size(memory['total'])} of {size(memory['available'])} {share} on this {where}: {verdict}",
        f"            {', '.join(named[:3])},",
        f"            {', '.join(named[3:])}",
    ]


def _wrapped(label: str, text: str, width: int) -> list[str]:
    import textwrap

    lines = textwrap.wrap(text, width - 12)
    return [f"{label if k == 0 else '':12}{line}" for k, line in enumerate(lines)]


def _si(value: float) -> str:
    """2.1e9 -> '2.1 G'."""
    for factor, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= factor:
            return f"{value / factor:.3g} {letter}"
    return f"{value:.3g} "
