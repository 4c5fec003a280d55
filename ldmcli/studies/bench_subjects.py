"""What `ldm bench` measures: models with weights drawn at random, or those of a run, and trainings of them on made-up
rows.

A training here is the training loop's own step with the objective's own loss; only its rows are made up, so that no
data set is needed and none has to be decoded.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ldmcli.conditions.fit import assumed_specs, run_tokenizer
from ldmcli.core import config as configuration
from ldmcli.core.config import Config, Resolved
from ldmcli.core.errors import UsageError
from ldmcli.core.runs import RunFolder
from ldmcli.core.settings import AutoencoderConfig, DiffusionConfig
from ldmcli.core.signals import StopRequest
from ldmcli.data.batches import Prefetcher
from ldmcli.diffusion.schedule import make_schedule
from ldmcli.formats.bundle import AutoencoderBundle, ClassifierBundle, Reading
from ldmcli.formats.open_model import read
from ldmcli.maths import rng
from ldmcli.networks.autoencoder import Autoencoder
from ldmcli.networks.conditioners import train_vocabulary
from ldmcli.networks.discriminator import PatchDiscriminator
from ldmcli.networks.latent_diffusion import DiffusionModel
from ldmcli.networks.latent_scale import LatentScale
from ldmcli.networks.perceptual import SCALE, SHIFT, PerceptualNet, perceptual_shapes
from ldmcli.sampling.api import LoadedDiffusion
from ldmcli.sampling.first_stage import LoadedAutoencoder, pixel_autoencoder
from ldmcli.sampling.load import build_autoencoder, build_diffusion
from ldmcli.training import checks, cost
from ldmcli.training.autoencoder import AutoencoderObjective
from ldmcli.training.diffusion import DiffusionObjective
from ldmcli.training.distributed import Distributed, arithmetic
from ldmcli.training.latents import LatentStore
from ldmcli.training.loop import Trainer
from ldmcli.training.run_setup import RunOptions
from ldmcli.training.throughput import ThroughputMeter

NO_END = 10**9  # steps: no checkpoint, log line or end falls into a measurement
POOL = 64  # distinct rows that are made up; more would only take memory


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A model to measure. kind: "autoencoder" or "diffusion"; config: its settings; model: a run or what `ldm convert`
    reads, None for weights drawn at random; first_stage: settings of the autoencoder that a diffusion model of the
    latter kind has, None = pixels; variant: what sets this row apart from others of the model."""

    name: str
    kind: str
    config: Config
    model: Path | None = None
    first_stage: AutoencoderConfig | None = None
    variant: str = ""


@dataclass
class Subject:
    """A model that is measured. size: (height, width) px; latent: (c, h, w); diffusion: None of an autoencoder."""

    asked: Asked
    config: Config
    stage: LoadedAutoencoder
    size: tuple[int, int]
    latent: tuple[int, int, int]
    diffusion: LoadedDiffusion | None = None
    specs: dict | None = None


def open_subject(asked: Asked, dist: Distributed, folder: Path, size: tuple[int, int] | None) -> Subject:
    """Builds or loads the model on the device. folder: for a vocabulary. Raises ModelError, UsageError."""
    with torch.random.fork_rng(devices=[dist.device] if dist.device.type == "cuda" else []):
        torch.manual_seed(0)
        found = _loaded(asked, dist, size) if asked.model else _random(asked, dist, folder, size)
    for module in (found.stage.network, found.diffusion and found.diffusion.network):
        if isinstance(module, nn.Module):
            module.eval().requires_grad_(False)
    return found


def _loaded(asked: Asked, dist: Distributed, size: tuple[int, int] | None) -> Subject:
    assert asked.model is not None
    bundle = read(asked.model, Reading())
    if isinstance(bundle, ClassifierBundle):
        raise UsageError(f"{asked.model}: a classifier; `ldm bench` measures autoencoders and diffusion models")
    if isinstance(bundle, AutoencoderBundle):
        stage = build_autoencoder(bundle, dist.device, asked.model)
        found = size or checks.image_size(asked.config.data)
        return Subject(asked, asked.config, stage, found, stage.network.latent_shape(*found))
    model = build_diffusion(bundle, dist.device, asked.model)
    found = size or model.trained_size
    return Subject(asked, asked.config, model.autoencoder, found, model.latent_shape(found), model, bundle.specs)


def _random(asked: Asked, dist: Distributed, folder: Path, size: tuple[int, int] | None) -> Subject:
    config = asked.config
    own = config if isinstance(config, AutoencoderConfig) else asked.first_stage
    if own is None:
        stage = pixel_autoencoder(dist.device)
    else:
        with torch.device(dist.device):
            network = Autoencoder(own.autoencoder)
        stage = LoadedAutoencoder(network, LatentScale.identity(network.latent_channels), "", own, dist.device)
    found = size or checks.image_size(config.data, own.data.size if own else (0, 0))
    latent = stage.network.latent_shape(*found)
    if not isinstance(config, DiffusionConfig):
        return Subject(asked, config, stage, found, latent)
    specs = assumed_specs(config, stage.network, {})
    if config.condition.kinds:  # the words of no caption: for the null, which guidance and dropout need
        train_vocabulary(["a picture"], 64, folder / "tokenizer")
    with torch.device(dist.device):
        model = DiffusionModel(
            config.diffusion, config.condition, specs, run_tokenizer(config, folder), latent, config.kinds
        )
    return Subject(asked, config, stage, found, latent, LoadedDiffusion(model, stage, config, ""), specs)


def example_inputs(subject: Subject, count: int) -> dict[str, Tensor]:
    """Prepared inputs of all conditions for `count` rows, on the CPU; a hole covers the middle quarter."""
    if subject.diffusion is None:
        return {}
    inputs = subject.diffusion.conditions.example(subject.size)
    for name, tensor in inputs.items():
        if name.endswith(".hole"):
            height, width = subject.size
            tensor[:, height // 4 : -(height // 4), width // 4 : -(width // 4)] = True
    return {name: tensor.repeat(count, *[1] * (tensor.ndim - 1)) for name, tensor in inputs.items()}


# ---------------------------------------------------------------- trainings


class _Rows:
    """Made-up rows: random pictures, which stand there decoded and cut."""

    def __init__(self, size: tuple[int, int], count: int = POOL):
        draw = np.random.default_rng(0)
        self._pixels = draw.integers(0, 256, (count, *size, 3), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._pixels)

    def name(self, index: int) -> str:
        """As errors name a row."""
        return f"made-up row {index}"

    def pixels(self, index: int, *how: Any) -> np.ndarray:
        """uint8 (height, width, 3)."""
        return self._pixels[index]


class _Moments:
    """In the place of a cache of latents: random moments of each row."""

    def __init__(self, channels: int, latent: tuple[int, int, int]):
        self._moments = rng.normal(0, range(POOL), (channels, *latent[1:]), "bench").numpy()

    def moments(self, ids: list[int], *how: Any) -> np.ndarray:
        """float32 (n, channels, h, w)."""
        return self._moments[ids]


class _Inputs:
    """In the place of the conditions of rows: the same inputs for each."""

    def __init__(self, inputs: dict[str, Tensor]):
        self._inputs = inputs

    def batch(self, ids: np.ndarray, *how: Any) -> dict[str, Tensor]:
        """Prepared inputs of rows."""
        return {name: tensor[: len(ids)] for name, tensor in self._inputs.items()}


class SyntheticDiffusion(DiffusionObjective):
    """The objective of `ldm train-ldm` on made-up latents, and planes made of made-up pictures."""

    def __init__(self, subject: Subject, dist: Distributed):
        model, config = subject.diffusion, subject.config
        assert model is not None and isinstance(config, DiffusionConfig)
        self.config, self.dist, self.size, self.specs = config, dist, subject.size, subject.specs or {}
        self.autoencoder, self.model, self.encode = subject.stage, model.network, subject.stage.encode_unchecked
        self.networks = {"model": model.network}
        self.latents = LatentStore(subject.stage, config.data, dist, subject.size)
        self.latents.scale = subject.stage.scale
        self.schedule = make_schedule(config.diffusion)
        self.rows = self.validation = _Rows((1, 1))
        self.bad = []
        channels = self.latents.shape[0] * (1 if self.latents.deterministic else 2)
        self.latents.cache = cast(Any, _Moments(channels, self.latents.shape))
        self.inputs = cast(Any, _Inputs(example_inputs(subject, config.train.batch_size)))

    def activation_bytes(self) -> float:
        """Bytes that the backward pass keeps of one image: nothing is encoded."""
        found = cost.diffusion_cost(self.config, self.specs, self.latents.shape, self.size)
        return cost.kept_bytes([found], self.dist.dtype, self.dist.device)


class SyntheticAutoencoder(AutoencoderObjective):
    """The objective of `ldm train-ae` on made-up pictures, with all its networks from the first step on; LPIPS has
    weights drawn at random."""

    def __init__(self, subject: Subject, dist: Distributed):
        config = subject.config
        assert isinstance(config, AutoencoderConfig)
        self.config = replace(config, loss=replace(config.loss, disc_start=0))
        self.dist, self.size, self.autoencoder = dist, subject.size, subject.stage.network
        loss = config.loss
        self.perceptual = _random_perceptual(loss.perceptual, dist.device) if loss.perceptual_weight > 0 else None
        self.networks = {"autoencoder": self.autoencoder}
        if loss.disc_weight > 0:
            self.networks["discriminator"] = PatchDiscriminator(3, loss.disc_channels, loss.disc_layers)
        self.latent_shape = subject.latent
        codes = config.autoencoder.codebook_size if self.autoencoder.is_vq else 0
        self.used_codes, self._last_vectors = torch.zeros(codes, dtype=torch.bool), None
        self.rows = self.validation = _Rows(self.size)
        self.bad = []


def _random_perceptual(name: str, device: torch.device) -> PerceptualNet:
    """LPIPS with weights drawn at random: they are a download, and what they say is not what takes time."""
    network = perceptual_shapes(name).to_empty(device=device)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.02)
    network.shift.copy_(torch.tensor(SHIFT)[:, None, None])
    network.scale.copy_(torch.tensor(SCALE)[:, None, None])
    return network


class BenchTrainer(Trainer):
    """The training loop, a step at a time, on an objective that is given."""

    def __init__(self, objective, resolved: Resolved, folder: RunFolder, dist: Distributed, request: StopRequest):
        self._given = objective
        super().__init__(resolved, folder, dist, RunOptions(), request)
        self.progress.step = 1  # the first step logs
        workers = max(1, self.config.data.workers)
        self.batches = Prefetcher(
            lambda step: dist.pinned(objective.batch(step)), 1, depth=max(3, workers + 1), workers=workers
        )
        self.meter = ThroughputMeter(self.batches)

    def _make_objective(self):
        return self._given

    def step(self) -> None:
        """One step, and what follows a step that does not log."""
        self._train_step()
        self._after_step()


def training_settings(config: Config, batch_size: int) -> Config:
    """The configuration for a measurement: of `batch_size` images a step, without an end."""
    train = replace(
        config.train,
        batch_size=batch_size,
        half_batch_steps=0,
        steps=NO_END,
        log_every=NO_END,
        save_every=NO_END,
        sample_every=0,
        eval_every=0,
        evaluations=0,
        eval_samples=0,
        max_minutes=0.0,
        max_hours=0.0,
        track=(),
    )
    return replace(config, train=train)


@contextmanager
def opened_training(subject: Subject, dist: Distributed, batch_size: int, folder: Path) -> Iterator[BenchTrainer]:
    """The training of a subject, ready for its first step; afterwards the model is as for use again, with the weights
    that training left."""
    config = training_settings(subject.config, batch_size)
    used = replace(subject, config=config)
    networks = [subject.stage.network] if subject.diffusion is None else [subject.diffusion.network]
    for network in networks:
        network.requires_grad_(True)
    objective = SyntheticAutoencoder(used, dist) if subject.diffusion is None else SyntheticDiffusion(used, dist)
    resolved = Resolved(configuration.kind_of(config), objective.config, {})
    # without its handlers: Ctrl-C ends a measurement at once, and nothing of it is saved
    trainer = BenchTrainer(objective, resolved, RunFolder(folder), dist, StopRequest())
    try:
        with arithmetic(config.train):
            yield trainer
    finally:
        trainer.batches.close()
        for network in networks:
            network.eval().requires_grad_(False)
