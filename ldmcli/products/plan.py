"""What `--plan` says before anything runs: settings and their origins, parameters, FLOPs, memory, time.

Networks are built on torch's meta device, where tensors have shapes and no content: no weights, no data, no memory.
What only the data can tell (vocabulary, classes, longest caption) is assumed, and each assumption is listed.
"""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldmcli.core import config as configuration
from ldmcli.core import console, files, launch
from ldmcli.core.config import Resolved
from ldmcli.core.errors import UsageError
from ldmcli.core.settings import AutoencoderConfig, ConditionSettings, DiffusionConfig
from ldmcli.drivers.condition_data import cache_note, check_settings
from ldmcli.drivers.context import autocast_dtype
from ldmcli.drivers.loaded import default_device
from ldmcli.drivers.objective_ae import DEFAULT_SIZE
from ldmcli.drivers.optim import is_hidden_matrix
from ldmcli.formats.run import read_config
from ldmcli.networks.autoencoder import Autoencoder
from ldmcli.networks.conditions import MAX_TEXT_LENGTH
from ldmcli.networks.diffusion import DiffusionModel
from ldmcli.networks.discriminator import PatchDiscriminator
from ldmcli.networks.layout import MAX_OBJECTS, VOCABULARY
from ldmcli.networks.planes import MapCondition
from ldmcli.networks.presets import PRESETS

ASSUMED_CLASSES, ASSUMED_CATEGORIES, ASSUMED_MAP_CLASSES = 1000, 300, 182  # ImageNet, OpenImages, COCO stuff
RUNTIME_BYTES = 600 << 20  # interpreter, torch and the libraries of data, measured at the start of a training
PROBE_SECONDS = 0.5


@dataclass
class _Work:
    """A trained network with what one sample costs: FLOPs forward and forward with backward, bytes kept between."""

    module: nn.Module
    forward: float
    both: float
    kept: float


def plan(kind: str, resolved: Resolved, *, autoencoder: str = "", init_from: str = "", first_stage: str = "",
         rows: int | None = None, processes: int = 1) -> dict[str, Any]:
    """What a training would take; nothing is trained, downloaded or written, and no data is opened.

    autoencoder: run folder, "none" for pixels, "" for the default one; init_from: a run whose vocabulary and classes
    are taken over; first_stage: preset that stands in where no autoencoder is named. rows: training rows where they are
    known; processes: that share the batch, each with a GPU or with its part of the machine's cores and memory. Raises
    UsageError (sizes or processes that do not fit) or ModelError.
    """
    notes: list[str] = []
    if kind == "autoencoder":
        image, latent, works = _autoencoder_works(resolved.config, notes)
    else:
        image, latent, works = _diffusion_works(resolved.config, autoencoder, init_from, first_stage, notes)
    train, world = resolved.config.train, max(launch.world()[1], processes)
    if world > train.batch_size:
        raise UsageError(f"--batch-size {train.batch_size}: fewer images than processes ({world})")
    device = default_device()
    sharing = world if device.type == "cpu" else 1  # processes that share one device's memory and speed
    dtype = autocast_dtype(train.mixed_precision, device)
    step = _step_flops(works) * train.batch_size
    micro = min(train.micro_batch or math.inf, -(-train.batch_size // world))
    memory = _memory(works, resolved.config, int(micro), device, sharing)
    return {
        "command": configuration.COMMAND_OF[kind],
        "image": list(image),
        "latent": list(latent),
        "parameters": {name: sum(p.numel() for p in work.module.parameters()) for name, work in works.items()},
        "flops": {"forward_per_image": works[next(iter(works))].forward, "per_step": step},
        "batch": {"global": train.batch_size, "per_pass": int(micro), "processes": world},
        "epochs": train.steps * train.batch_size / rows if rows else None,
        "memory": memory,
        "time": _time(step * sharing / world, train.steps, train.max_minutes, device, dtype),
        "notes": notes + _memory_notes(memory),
        "settings": [list(row) for row in configuration.describe(resolved)],
    }


# ---------------------------------------------------------------- networks


def _autoencoder_works(config: AutoencoderConfig, notes: list[str]):
    image = tuple(config.data.size) if any(config.data.size) else DEFAULT_SIZE
    with torch.device("meta"):
        network = Autoencoder(config.autoencoder)
        latent = network.latent_shape(*image)
        pixels = torch.zeros(1, config.autoencoder.in_channels, *image)
        noise = torch.zeros(1, *latent)
    works = {"autoencoder": _work(network, lambda: network(pixels, noise).reconstruction)}
    if config.loss.disc_weight > 0:
        with torch.device("meta"):
            critic = PatchDiscriminator(3, config.loss.disc_channels, config.loss.disc_layers).eval()
        works["discriminator"] = _work(critic, lambda: critic(pixels))
        notes.append(f"FLOPs and time are those from step {config.loss.disc_start} on, with the discriminator")
    if config.loss.perceptual_weight > 0:
        notes.append("the perceptual network is not counted")
    return image, latent, works


def _diffusion_works(config: DiffusionConfig, autoencoder: str, init_from: str, first_stage: str, notes: list[str]):
    stage = _first_stage(autoencoder, init_from, first_stage, notes)
    own = tuple(stage.data.size) if any(stage.data.size) else DEFAULT_SIZE
    image = tuple(config.data.size) if any(config.data.size) else own
    check_settings(config, image)
    if note := cache_note(config):
        notes.append(note)
    with torch.device("meta"):
        latent = Autoencoder(stage.autoencoder).latent_shape(*image)
        condition, f = _countable(config.condition, notes), stage.autoencoder.f
        facts = _facts(config, init_from, latent, f, notes)
        model = DiffusionModel(config.diffusion, condition, facts, None, latent, config.kinds)
        model.conditions.first_stage = lambda x: torch.zeros(1, *latent, device="meta")
        inputs = _inputs(model, image)
        z, t = torch.zeros(1, *latent), torch.zeros(1)
    if config.task.name == "inpaint" or (config.task.name == "sr" and config.task.enlarged):
        what = "with its hole" if config.task.name == "inpaint" else "reduced and enlarged"
        notes.append(f"the first stage, which encodes each image {what}, is not counted")
    factor = model.unet.size_factor
    if latent[1] % factor or latent[2] % factor:
        need = factor * stage.autoencoder.f
        raise UsageError(f"--size {image[0]}x{image[1]}: this UNet needs sides that are multiples of {need}")
    return image, latent, {"model": _work(model, lambda: model(z, t, inputs))}


def _first_stage(autoencoder: str, init_from: str, preset: str, notes: list[str]) -> AutoencoderConfig:
    """Configuration of the autoencoder that latents come from."""
    if autoencoder == "none":
        pixels = configuration.resolve("autoencoder", [("--autoencoder none", {"autoencoder.f": 1})])
        return pixels.config
    path = Path(autoencoder or (Path(init_from) / "autoencoder" if init_from else ""))
    if autoencoder or init_from:
        return read_config("autoencoder", path)
    if preset:
        notes.append(f"no autoencoder is named: {preset}, with which this model was published, is assumed")
        return configuration.resolve("autoencoder", [(preset, dict(PRESETS[preset].values))]).config
    notes.append("no autoencoder is named: that of `ldm train-ae` without options is assumed")
    return AutoencoderConfig()


def _facts(config: DiffusionConfig, init_from: str, latent: tuple[int, int, int], f: int,
           notes: list[str]) -> dict[str, dict[str, Any]]:
    """What conditions learn from data, as `DiffusionModel` takes it: from an earlier run, else assumed."""
    kinds, facts = config.kinds, {}
    if init_from and kinds:
        facts = files.read_json(Path(init_from) / "stats.json").get("conditions") or {}
    if "text" in kinds and "text" not in facts:
        text = config.condition
        facts["text"] = {"length": text.text_length or MAX_TEXT_LENGTH, "vocabulary": text.vocabulary_size}
        notes.append(f"text: captions of {facts['text']['length']} tokens from {text.vocabulary_size:,} words assumed; "
                     "the data may need fewer")
    if "class" in kinds and "class" not in facts:
        facts["class"] = {"class_names": [str(k) for k in range(ASSUMED_CLASSES)]}
        notes.append(f"class: {ASSUMED_CLASSES:,} classes assumed; the data say how many there are")
    if "layout" in kinds and "layout" not in facts:
        facts["layout"] = {"categories": [str(k) for k in range(ASSUMED_CATEGORIES)],
                           "length": 3 * MAX_OBJECTS + 2, "vocabulary": VOCABULARY,
                           "planes": config.condition.layout_planes}
        notes.append(f"layout: up to {MAX_OBJECTS} objects assumed; the data may need fewer")
    if "map" in kinds and "map" not in facts:
        facts["map"] = MapCondition.learn([ASSUMED_MAP_CLASSES - 1], [], f)
        notes.append(f"map: {ASSUMED_MAP_CLASSES} classes assumed; the data say how many there are")
    facts |= {"lowres": {"scale": config.task.scale, "f": f, "latent": latent[0] if config.task.enlarged else 0},
              "masked": {"channels": latent[0], "fill": config.task.fill}}
    return {kind: facts[kind] for kind in kinds}


def _countable(condition: ConditionSettings, notes: list[str]) -> ConditionSettings:
    """A frozen text encoder would have to be downloaded to be counted; the paper's stands in for it."""
    if "text" not in condition.kinds or condition.text_encoder == "joint":
        return condition
    notes.append(f"text encoder {condition.text_encoder}: not opened; the paper's transformer is counted in its place")
    return replace(condition, text_encoder="joint")


def _inputs(model: DiffusionModel, image: tuple[int, int]) -> dict[str, Tensor]:
    """One row of conditions."""
    entries = model.conditions.entries
    inputs = {}
    if "text" in entries:
        inputs["text.ids"] = torch.zeros(1, entries["text"].length, dtype=torch.int64)
        inputs["text.mask"] = torch.ones(1, entries["text"].length, dtype=torch.bool)
    if "class" in entries:
        inputs["class.label"] = torch.zeros(1, dtype=torch.int64)
    if "layout" in entries:
        inputs["layout.ids"] = torch.zeros(1, entries["layout"].layout.length, dtype=torch.int64)
    if "map" in entries:
        inputs["map.index"] = torch.zeros(1, *image, dtype=torch.int16)
    if "lowres" in entries:
        small = [side // entries["lowres"].scale for side in image]
        inputs["lowres.image"] = torch.zeros(1, 3, *small, dtype=torch.uint8)
    if "masked" in entries:
        inputs["masked.image"] = torch.zeros(1, 3, *image, dtype=torch.uint8)
        inputs["masked.hole"] = torch.zeros(1, *image, dtype=torch.bool)
    return inputs


# ---------------------------------------------------------------- counting


def _work(module: nn.Module, run: Callable[[], Tensor]) -> _Work:
    """Counts one pass over one sample on the meta device."""
    from torch.utils.flop_counter import FlopCounterMode

    weights = {p.untyped_storage()._cdata for p in module.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            result = run()
        forward = counter.get_total_flops()
        result.sum().backward()
    return _Work(module, float(forward), float(counter.get_total_flops()), float(sum(kept.values())))


def _step_flops(works: dict[str, _Work]) -> float:
    """FLOPs of a training step a sample. With a discriminator: both passes of the autoencoder, one without gradients;
    of the discriminator, forward and input gradient for the one, real and fake with all gradients for the other."""
    main = next(iter(works.values()))
    critic = works.get("discriminator")
    if critic is None:
        return main.both
    return main.both + main.forward + 2 * critic.forward + 2 * critic.both


def _memory(works: dict[str, _Work], config, micro: int, device: torch.device, sharing: int) -> dict[str, Any]:
    """Bytes of one process, estimated, and what it may take of a device that `sharing` processes share."""
    train = config.train
    named = [pair for work in works.values() for pair in work.module.named_parameters()]
    weights = 4 * sum(p.numel() for _, p in named)
    main = 4 * sum(p.numel() for p in next(iter(works.values())).module.parameters())
    parts = {
        "weights": weights,
        "gradients": weights,
        "optimizer": _optimizer_bytes(named, train),
        "ema": main if train.ema else 0,
        "activations": micro * sum(work.kept for work in works.values()),
        "runtime": RUNTIME_BYTES,
    }
    total, available = sum(parts.values()), available_bytes(device) // sharing
    return {**parts, "total": total, "available": available, "device": device.type, "fits": total <= available,
            "per_image": sum(work.kept for work in works.values())}  # fmt: skip


def _optimizer_bytes(named: Iterable[tuple[str, nn.Parameter]], train) -> int:
    """AdamW keeps two numbers a weight; Muon one, or two where it orthogonalises now and then."""
    muon = 4 * (2 if train.muon_every > 1 else 1)
    on_muon = train.optimizer == "muon"
    return sum(p.numel() * (muon if on_muon and is_hidden_matrix(n, p) else 8) for n, p in named)


def available_bytes(device: torch.device) -> int:
    """Memory that a training may take: free memory of the GPU, else of the machine within its container's limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    from ldmcli.data.tables import memory_bytes

    return min(psutil.virtual_memory().available, memory_bytes())


def _memory_notes(memory: dict[str, Any]) -> list[str]:
    notes = ["memory: an estimate of one process in float32, without data; validation and previews fit beside it"]
    if memory["fits"]:
        return notes
    room = memory["available"] - (memory["total"] - memory["activations"])
    fitting = int(room // memory["per_image"]) if memory["per_image"] else 0
    how = f"--micro-batch {2 ** int(math.log2(fitting))} would" if fitting >= 1 else "not even --micro-batch 1 would"
    return [*notes, f"it does not fit: {how} (the global batch stays)"]


def _time(flops: float, steps: int, max_minutes: float, device: torch.device, dtype) -> dict[str, Any] | str:
    """Seconds at the rate that a convolution reaches on this machine; a bound, not a promise."""
    rate = probe_flops_per_s(device, dtype)
    if not rate or not flops:
        return "unknown"
    seconds = flops / rate
    total = min(seconds * steps, max_minutes * 60) if max_minutes else seconds * steps
    return {"seconds_per_step": seconds, "seconds": total, "flops_per_s": rate,
            "how": "at best: at the rate of 3x3 convolutions here; narrow networks take two or three times as long"}


def probe_flops_per_s(device: torch.device, dtype: torch.dtype | None) -> float:
    """FLOP/s of a convolution with gradients on this machine, the best of the passes that fit in a fraction of a
    second; 0 where it cannot run. On a CPU one core is measured and multiplied: several would wait for each other
    wherever other programs run, and tell of those."""
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


def plan_text(facts: dict[str, Any], width: int = 80) -> str:
    """The plan for a terminal: settings with their origins, then what the run takes."""
    parts = [_settings_text(facts["settings"], width), *_sizes(facts), *_memory_lines(facts)]
    took = facts["time"]
    if isinstance(took, dict):
        parts.append(f"time        from {_clock(took['seconds'])} on ({took['seconds_per_step']:.3g} s a step), "
                     f"at {took['flops_per_s'] / 1e9:,.0f} GFLOP/s")
        parts += _wrapped("", took["how"], width)
    else:
        parts.append(f"time        {took}")
    for note in facts["notes"]:
        parts += _wrapped("note", note, width)
    return "\n".join(parts)


def _settings_text(rows: list[list[str]], width: int) -> str:
    names = max(len(path) for path, _, _ in rows)
    origins = min(max(len(origin) for *_, origin in rows), 24)
    room = max(width - names - origins - 4, 12)
    cut = [(path, _clipped(value, room), _clipped(origin, origins)) for path, value, origin in rows]
    return console.table(cut, ["setting", "value", "from"]) + "\n"


def _clipped(text: str, room: int) -> str:
    return text if len(text) <= room else text[: room - 1] + "…"


def _sizes(facts: dict[str, Any]) -> list[str]:
    batch, flops = facts["batch"], facts["flops"]
    shape = "x".join(map(str, facts["latent"]))
    image = "x".join(map(str, facts["image"]))
    lines = [f"command     {facts['command']}", f"images      {image} px, latents {shape}"]
    lines += [f"parameters  {count:,} ({name})" for name, count in facts["parameters"].items()]
    processes = f", {batch['processes']} processes" if batch["processes"] > 1 else ""
    lines.append(f"batch       {batch['global']} images a step, {batch['per_pass']} a pass{processes}")
    if facts["epochs"]:
        lines.append(f"epochs      {facts['epochs']:.3g}")
    forward, step = _si(flops["forward_per_image"]), _si(flops["per_step"])
    return [*lines, f"work        {forward}FLOP forward an image, {step}FLOP a step"]


def _memory_lines(facts: dict[str, Any]) -> list[str]:
    memory, size = facts["memory"], files.human_bytes
    share = "for each process" if facts["batch"]["processes"] > 1 else "free"
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


def _clock(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h" if seconds < 172800 else (
        f"{seconds / 86400:.1f} days")
