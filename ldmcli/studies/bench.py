"""`ldm bench`: how fast models train, sample, encode and decode on this machine (Tab. 6 and 18 of the paper)."""

import gc
import platform
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ldmcli import __version__
from ldmcli.core import console, files, runs
from ldmcli.core.errors import InputError, ModelError, ThresholdError, UsageError
from ldmcli.core.settings import AutoencoderConfig, DiffusionConfig
from ldmcli.maths import rng
from ldmcli.maths.pixels import tensor_to_pixels
from ldmcli.networks.meta_device import on_meta_device
from ldmcli.sampling import memory
from ldmcli.sampling.api import LoadedDiffusion
from ldmcli.sampling.draw import Draw, draw_images
from ldmcli.sampling.first_stage import LoadedAutoencoder
from ldmcli.sampling.machine import inference_dtype
from ldmcli.studies.bench_subjects import Asked, Subject, example_inputs, open_subject, opened_training
from ldmcli.studies.bench_timing import (
    PRODUCT_SECONDS,
    Timing,
    counted_waits,
    peak_memory,
    product_format,
    reset_peak_memory,
    timed,
)
from ldmcli.training import cost
from ldmcli.training.distributed import Distributed
from ldmcli.training.run_end import out_of_memory
from ldmcli.training.throughput import product_rate

SCHEMA = "ldm-bench-1"
WORKS = {"autoencoder": ("train", "encode", "decode"), "diffusion": ("train", "sample")}
ALL_WORKS = ("train", "sample", "encode", "decode")
# images at once where no --batch-size is given, at most: on a GPU, elsewhere
LARGEST_BATCH = (64, 8)
# what two rows must share so that one is compared with the other
SAME = ("model", "variant", "work", "batch", "size", "precision", "compile", "processes")


@dataclass(frozen=True, kw_only=True)
class BenchRequest:
    """What `ldm bench` is asked for. works: () = those of each model's kind; batch_sizes: () = the model's own, within
    LARGEST_BATCH; size: (height, width) px and steps of sampling: None = the model's own; seconds: of each measurement;
    rows: of a data set, for hours an epoch."""

    asked: tuple[Asked, ...]
    works: tuple[str, ...] = ()
    batch_sizes: tuple[int, ...] = ()
    size: tuple[int, int] | None = None
    steps: int | None = None
    seconds: float = 5.0
    rows: int = 0

    def __post_init__(self):
        if unknown := sorted(set(self.works) - set(ALL_WORKS)):
            raise UsageError(f"--work {unknown[0]}: choose among {', '.join(ALL_WORKS)}")
        if any(size < 1 for size in self.batch_sizes):
            raise UsageError("--batch-size: must be at least 1")


def bench(request: BenchRequest) -> dict[str, Any]:
    """Measures everything; the document of --json. Collective where a launcher started several processes."""
    rows: list[dict[str, Any]] = []
    rates: dict[str, float] = {}
    gpu, device, processes = "", "", 1
    for asked in request.asked:
        dist = Distributed(asked.config.train)
        gpu, device, processes = dist.gpu_name, dist.device.type, dist.world_size
        with tempfile.TemporaryDirectory(prefix="ldm-bench-") as folder:
            try:
                rows += _of_model(request, asked, dist, Path(folder), rates)
            except Exception as error:
                if not out_of_memory(error) or dist.world_size > 1:
                    raise
                console.warn(f"{asked.name}: memory ran out; the rest of this model is left out")
        gc.collect()
    return {
        "schema": SCHEMA,
        "versions": {"ldm": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "machine": runs.machine(gpu, processes),
        "threads": torch.get_num_threads() if device == "cpu" else None,
        "product_flops_per_s": rates,
        "rows": rows,
    }


def _of_model(
    request: BenchRequest, asked: Asked, dist: Distributed, folder: Path, rates: dict[str, float]
) -> Iterator[dict[str, Any]]:
    subject = open_subject(asked, dist, folder, request.size)
    works = request.works or WORKS[asked.kind]
    if wrong := [work for work in works if work == "sample" and subject.diffusion is None]:
        raise UsageError(f"--work {wrong[0]}: {asked.name} is an autoencoder")
    # training changes the weights, so it comes last; the table has it first
    found = []
    for batch in request.batch_sizes or (_usual_batch(subject, dist),):
        for work in sorted(works, key=ALL_WORKS[::-1].index):
            console.say(f"{asked.name}: {work}, batch {batch}")
            meter = Meter(subject, dist, batch, request, rates)
            found.append(meter.train(folder) if work == "train" else getattr(meter, work)())
    return iter(sorted(found, key=lambda row: ALL_WORKS.index(row["work"])))


def _usual_batch(subject: Subject, dist: Distributed) -> int:
    most = LARGEST_BATCH[dist.device.type != "cuda"] * dist.world_size
    return min(subject.config.train.batch_size, most)


class Meter:
    """Measurements of one model at one batch size, over all processes; each gives a row of the document."""

    def __init__(self, subject: Subject, dist: Distributed, batch: int, request: BenchRequest, rates: dict[str, float]):
        self.subject, self.dist, self.batch, self.request, self.rates = subject, dist, batch, request, rates
        if batch < dist.world_size:
            raise UsageError(
                f"--batch-size {batch}: must be at least {dist.world_size}, one for each of {dist.world_size} processes"
            )
        self.own = -(-batch // dist.world_size)  # of this process, where each draws for itself
        # of what `ldm sample` and `ldm reconstruct` would take; "auto" may be another than a training's
        subject.stage.dtype = inference_dtype(subject.config.train.mixed_precision, dist.device)

    def train(self, folder: Path) -> dict[str, Any]:
        """The training loop's own steps."""
        reset_peak_memory(self.dist.device)
        with opened_training(self.subject, self.dist, self.batch, folder / "run") as trainer:
            trainer.step()
            with counted_waits(self.dist.device) as waits:
                trainer.step()
            waited, begun = trainer.batches.waited_s, time.perf_counter()
            timing = timed(trainer.step, self.request.seconds, self.dist)
            wait = (trainer.batches.waited_s - waited) / (time.perf_counter() - begun)
            row = self._row("train", timing, self._training_flops(), self.dist.dtype, steps=1, images=self.batch)
            row["micro_batch"] = trainer.progress.micro_batch
            row["wait"] = wait
        row["host_waits"] = None if waits is None else len(waits)
        if self.request.rows:
            row["hours_per_epoch"] = self.request.rows / row["images_per_s"] / 3600
        return row

    def sample(self) -> dict[str, Any]:
        """Noise to pixels, as `ldm sample` draws: the model's own sampler, steps and guidance."""
        model, dist = self.subject.diffusion, self.dist
        assert model is not None
        inputs = {k: v.to(dist.device) for k, v in example_inputs(self.subject, self.own).items()}
        settings = {} if self.request.steps is None else {"steps": self.request.steps}
        size = None if self.subject.size == model.trained_size else self.subject.size
        draw = Draw(ids=range(self.own), inputs=inputs, settings=settings, size=size)
        seen: list[int] = []
        counter = model.network.unet.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
        reset_peak_memory(dist.device)
        with self._compiled(model, model.network):
            draw_images(model, draw)
            counter.remove()
            timing = timed(lambda: draw_images(model, draw), self.request.seconds, dist)
        flops = self._sampling_flops(sum(seen) / self.own)
        row = self._row(
            "sample", timing, flops, self.subject.stage.dtype, steps=len(seen), images=self.own * dist.world_size
        )
        return row | {"sampling_steps": settings.get("steps", model.config.sample.steps), "network_calls": len(seen)}

    def encode(self) -> dict[str, Any]:
        """Pixels to latents."""
        stage, dist = self.subject.stage, self.dist
        pixels = torch.randint(0, 256, (self.own, 3, *self.subject.size), generator=torch.Generator().manual_seed(0))
        x = pixels.to(torch.uint8).to(dist.device)
        reset_peak_memory(dist.device)
        with self._compiled(stage, stage.network), stage.autocast():
            timing = timed(lambda: stage.encode(x), self.request.seconds, dist)
        flops = self._stage_flops("encode")
        return self._row("encode", timing, flops, self.subject.stage.dtype, images=self.own * dist.world_size)

    def decode(self) -> dict[str, Any]:
        """Latents to pixels, as whole numbers on the host."""
        stage, dist = self.subject.stage, self.dist
        z = rng.normal(0, range(self.own), self.subject.latent, "bench").to(dist.device)
        reset_peak_memory(dist.device)
        with self._compiled(stage, stage.network), torch.no_grad(), stage.autocast():
            timing = timed(lambda: tensor_to_pixels(memory.decode(stage, z)), self.request.seconds, dist)
        flops = self._stage_flops("decode")
        return self._row("decode", timing, flops, self.subject.stage.dtype, images=self.own * dist.world_size)

    @contextmanager
    def _compiled(self, model: LoadedAutoencoder | LoadedDiffusion, network: torch.nn.Module) -> Iterator[None]:
        """Compiles the networks of a model, where the settings say so, as commands do; afterwards they are not."""
        if self.subject.config.train.compile:
            model.compile()
        try:
            yield
        finally:
            for module in network.modules():
                module._compiled_call_impl = None

    def _row(
        self, work: str, timing: Timing, flops: float, dtype: torch.dtype | None, *, images: int, steps: int = 0
    ) -> dict[str, Any]:
        subject, dist = self.subject, self.dist
        precision = "float32" if dtype is None else str(dtype).removeprefix("torch.")
        format = product_format(dist.device, precision)
        if format not in self.rates:
            sides = (2048, 4096, 8192) if dist.device.type == "cuda" else (512, 1024)
            seconds = min(self.request.seconds, PRODUCT_SECONDS)
            self.rates[format] = dist.on_rank_0(lambda: product_rate(dist.device, dtype, sides, seconds))
        rate = flops * images / timing.seconds
        return {
            "model": subject.asked.name,
            "variant": subject.asked.variant,
            "work": work,
            "batch": self.batch,
            "size": list(subject.size),
            "latent": list(subject.latent),
            "precision": precision,
            "compile": subject.config.train.compile,
            "processes": dist.world_size,
            "images_per_s": images / timing.seconds,
            "steps_per_s": steps / timing.seconds if steps else None,
            "seconds": timing.seconds,
            "spread": timing.spread,
            "flops_per_image": flops,
            "tflops_per_s": rate / 1e12,
            "mfu": rate / dist.world_size / self.rates[format],
            "peak_memory_bytes": int(max(dist.gather(peak_memory(dist.device)))),
        }

    # FLOPs are counted on the meta device: what the model needs, whatever a kernel or a recomputation adds

    def _training_flops(self) -> float:
        subject, config = self.subject, self.subject.config
        if isinstance(config, AutoencoderConfig):
            costs = cost.autoencoder_costs(config, subject.size)
            perceptual = costs.get("perceptual")
            return cost.step_flops(costs) + (perceptual.training_flops if perceptual else 0.0)
        assert isinstance(config, DiffusionConfig)
        return cost.diffusion_cost(config, subject.specs or {}, subject.latent, subject.size).training_flops

    def _sampling_flops(self, network_rows: float) -> float:
        config, subject = self.subject.config, self.subject
        assert isinstance(config, DiffusionConfig)
        model = cost.meta_diffusion_model(config, subject.specs or {}, subject.latent)
        with on_meta_device(), cost.flop_counter() as counter:
            zeros = torch.zeros(1, *subject.latent)
            conditioning = model.embed(
                model.conditions.example(subject.size),
                subject.latent[1:],
                lambda x: torch.zeros(len(x), *subject.latent),
            )
            before = counter.get_total_flops()
            model.predict(zeros, torch.zeros(1), conditioning)
            once = counter.get_total_flops() - before
        encoded = self._stage_flops("encode") if model.conditions.encodes else 0.0
        return before + encoded + network_rows * once + self._stage_flops("decode")

    def _stage_flops(self, way: str) -> float:
        network = self.subject.stage.network
        if network.is_identity:
            return 0.0
        found = cost.meta_autoencoder(network.settings)
        with on_meta_device(), cost.flop_counter() as counter:
            if way == "encode":
                found.moments(torch.zeros(1, network.settings.in_channels, *self.subject.size))
            else:
                found.decode(torch.zeros(1, *self.subject.latent))
            return float(counter.get_total_flops())


# ---------------------------------------------------------------- two documents


def earlier(path: Path) -> dict[str, Any]:
    """The document of an earlier measurement. Raises InputError for a file that holds none."""
    try:
        old = files.read_json(path)
        known = old["schema"] == SCHEMA and all(row["images_per_s"] > 0 for row in old["rows"])
        known = known and {"machine", "versions"} <= set(old)
    except (ModelError, KeyError, TypeError):
        known = False
    if not known:
        raise InputError(f"--against {path}: no document of `ldm bench --json`")
    return old


def compare(document: dict[str, Any], old: dict[str, Any], path: Path) -> None:
    """Adds to each row "ratio": its images/s over those of the same row of `old`, which came from `path`; None where
    that has none. Raises InputError where the two share no row."""
    known = {_key(row): row["images_per_s"] for row in old["rows"]}
    for row in document["rows"]:
        before = known.get(_key(row))
        row["ratio"] = row["images_per_s"] / before if before else None
    if all(row["ratio"] is None for row in document["rows"]):
        raise InputError(f"--against {path}: no row of it is of the same {', '.join(SAME)}")
    if old["machine"] != document["machine"] or old["versions"] != document["versions"]:
        console.warn(f"--against {path}: was measured on another machine or with other versions")


def _key(row: dict[str, Any]) -> tuple:
    return tuple(str(row.get(name)) for name in SAME)


def check_ratios(rows: Sequence[dict[str, Any]], least: float) -> None:
    """Raises ThresholdError, which names the worst, where a row has become slower than `least` times the old one."""
    slow = [row for row in rows if row.get("ratio") is not None and row["ratio"] < least]
    if slow:
        row = min(slow, key=lambda one: one["ratio"])
        ratio = row["ratio"]
        raise ThresholdError(
            f"{row['model']} {row['work']}, batch {row['batch']}: {ratio:.3g} times the images/s of before, below "
            f"--fail-below {least:g}" + (f", and {len(slow) - 1} more" if len(slow) > 1 else "")
        )


def with_variant(asked: Asked, variant: str, **train: Any) -> Asked:
    """The same model with other settings of [train], under a name."""
    return replace(asked, variant=variant, config=replace(asked.config, train=replace(asked.config.train, **train)))
