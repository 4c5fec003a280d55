"""The objective of classifiers of noisy latents (App. C, D.4): cross-entropy on z_t at random timesteps."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldmcli.conditions.pictures import labelled
from ldmcli.core import console, files, runs
from ldmcli.core.errors import InputError, ModelError, UsageError
from ldmcli.core.settings import ClassifierConfig
from ldmcli.data.augment import batch_indices
from ldmcli.data.batches import rank_slice
from ldmcli.data.rows import evenly_spaced
from ldmcli.diffusion.schedule import alpha_sigma, make_schedule, q_sample, sample_timesteps
from ldmcli.formats.run_folder import first_stage_run, read_config
from ldmcli.maths import rng
from ldmcli.maths.pixels import tensor_to_pixels
from ldmcli.networks.noisy_classifier import NoisyClassifier
from ldmcli.sampling.classifier import same_schedule
from ldmcli.sampling.contact_sheets import save_grid
from ldmcli.sampling.first_stage import LoadedAutoencoder
from ldmcli.sampling.load import load_autoencoder
from ldmcli.training import checks, cost
from ldmcli.training.data import open_data
from ldmcli.training.distributed import Distributed
from ldmcli.training.latents import LatentStore
from ldmcli.training.validation import VALIDATION_ROWS

QUARTERS = 4  # of the timesteps, over which accuracy is told
SHOWN = 8  # pictures a row of a preview


class ClassifierObjective:
    """Classification of noisy latents of a frozen autoencoder; `Objective` says what each member is."""

    kind = "classifier"
    main_network = "model"
    monitored = "loss_model"

    def __init__(
        self,
        config: ClassifierConfig,
        run: Path,
        dist: Distributed,
        autoencoder: str,
        *,
        model: str = "",
        check: Callable[[], None] = lambda: None,
    ):
        self.config, self.run, self.dist = config, run, dist
        self.autoencoder_path = dist.on_all_ranks(lambda: first_stage_run(Path(autoencoder)))
        self.model_path = Path(model) if model else None
        self.autoencoder: LoadedAutoencoder = dist.on_all_ranks(
            lambda: load_autoencoder(self.autoencoder_path, dist.device)
        )
        self.schedule = make_schedule(config.diffusion)
        stored = dist.on_all_ranks(self._known_statistics)
        own = self.autoencoder.config
        self.size = checks.image_size(config.data, tuple(own.data.size) if own else (0, 0))
        stage = self.autoencoder.network.settings
        dist.on_all_ranks(lambda: checks.check_classifier(config, stage, self.size, dist.world_size))
        self.latents = LatentStore(self.autoencoder, config.data, dist, self.size)
        self.rows, self.validation, self.bad = open_data(
            config, dist, self.size, look=_check_labels, fill_cache=lambda rows: self.latents.fill_cache(rows, check)
        )
        self.names = list(self.rows.class_names)
        self._labels = [] if config.data.streaming else [self.rows.label(i) for i in range(len(self.rows))]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(rng.key(config.train.seed, "init"))
            self.model = NoisyClassifier(config.diffusion, config.classifier.pool, len(self.names), self.latents.shape)
        self.networks: dict[str, torch.nn.Module] = {"model": self.model}
        if dist.is_rank_0:
            for note in checks.notes_of(config):
                console.say(note)
        self.latents.open_cache(self.rows)
        self.latents.fit_scale(self.rows, config.diffusion.latent_scale, stored)
        self.count = config.train.measured_images(min(len(self.validation), VALIDATION_ROWS))
        held = self.validation.select(evenly_spaced(len(self.validation), self.count))
        self.held_out = self.latents.modes(held)
        self.held_out_labels = torch.tensor([held.label(i) for i in range(self.count)])

    def _known_statistics(self) -> dict[str, Any]:
        """stats.json of an earlier start of this run, else of the model that it will guide; {} without either. Raises
        ModelError where the autoencoder is not theirs, UsageError where the settings are another process."""
        model = runs.locate(self.model_path)[0] if self.model_path else None
        path = next((one / "stats.json" for one in (self.run, model) if one and (one / "stats.json").exists()), None)
        stored = files.read_json(path) if path else {}
        wanted, found = stored.get("autoencoder"), self.autoencoder.fingerprint
        if path and wanted != found:
            raise ModelError(
                f"{path.parent}: has latents of another autoencoder (hash {str(wanted)[:12]}) than "
                f"{self.autoencoder_path} ({found[:12]}); name that one, or begin anew with --fresh"
            )
        if self.model_path:
            theirs = read_config("diffusion", self.model_path).diffusion
            same = theirs.latent_scale == self.config.diffusion.latent_scale
            if not same or not same_schedule(make_schedule(theirs), self.schedule):
                raise UsageError(
                    f"--model {self.model_path}: has another process than [diffusion] says; leave its settings "
                    "(prediction, schedule, betas, timesteps, latent_scale) to the model"
                )
        return stored

    def describe(self) -> str:
        """The first line of a training."""
        count = sum(p.numel() for p in self.model.parameters())
        return (
            f"classifier of {len(self.names)} classes in noisy latents {'x'.join(map(str, self.latents.shape))} of "
            f"{self.autoencoder_path.name}; {self.schedule.name} noise, {count / 1e6:.2f} M parameters"
        )

    def validation_note(self) -> str:
        """What a validation of this run leaves out because the run is short; "" = nothing."""
        usual = min(len(self.validation), VALIDATION_ROWS)
        return "" if self.count == usual else f"a short run: validation on {self.count} of {usual} images"

    def parents(self) -> list[dict[str, str]]:
        """The run of the autoencoder, and that of the model where one was named."""
        found = [{"path": str(self.autoencoder_path), "sha256": self.autoencoder.fingerprint}]
        if self.model_path and (weights := runs.locate(self.model_path)[0] / "model.safetensors").exists():
            found.append({"path": str(self.model_path), "sha256": files.tensors_metadata(weights)["content_sha256"]})
        return found

    def activation_bytes(self) -> float:
        """Bytes that one image takes in a step, without weights."""
        found = cost.classifier_cost(self.config, len(self.names), self.latents.shape)
        return cost.kept_bytes([found], self.dist.dtype, self.dist.device)

    def learning_rate(self, phase: str) -> float | None:
        """No phase has a rate of its own."""
        return None

    def in_ema(self, name: str) -> bool:
        """All parameters are averaged."""
        return True

    def init_weights(self) -> dict[str, Tensor]:
        """None: a classifier begins with weights of its own."""
        return {}

    def phases(self, step: int) -> tuple[str, ...]:
        """One network, every step."""
        return ("model",)

    def batch(self, step: int) -> dict[str, Tensor]:
        """This process's share of a step, on the CPU; every number in it depends on (seed, position) alone."""
        train, dist = self.config.train, self.dist
        mine = rank_slice(train.batch_at(step)[1], dist.rank, dist.world_size)
        ids, where = batch_indices(self.rows, self.config, step, mine)
        at, seed = where.tolist(), train.seed
        latents = self.latents.batch(self.rows, self.config, ids, where)  # first: a stream passes over bad pictures
        labels = [self._labels[i] if self._labels else self.rows.label(int(i)) for i in ids]
        return {
            "row": torch.from_numpy(ids.copy()),
            "label": torch.tensor(labels),
            "noise": self.latents.noise(train, at, "noise"),
            "t": sample_timesteps(self.config.diffusion, rng.uniform(seed, at, "timestep"), self.schedule),
            **latents,
        }

    def loss(self, phase: str, networks: dict, batch: dict[str, Tensor], step: int, norms: bool):
        """(mean cross-entropy of a micro-batch in nats, statistics)."""
        z_0, device = self.latents.of_batch(batch), self.dist.device
        t = batch["t"].to(device)
        z_t = q_sample(z_0, self.latents.noise_of(batch["noise"]), *alpha_sigma(self.schedule, t))
        logits, labels = networks["model"](z_t, t).float(), batch["label"].to(device)
        return F.cross_entropy(logits, labels), {"accuracy": (logits.argmax(1) == labels).float().mean()}

    def after_update(self, step: int) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def extra_state(self) -> dict[str, Tensor]:
        """Nothing beside weights and optimiser."""
        return {}

    def load_extra_state(self, tensors: dict[str, Tensor]) -> None:
        """Nothing."""

    def _noisy(self, quarter: int, ids: list[int]) -> tuple[Tensor, Tensor]:
        """(z_t, t) of validation rows, at timesteps spread evenly over a quarter of them, by fixed noise."""
        share = (quarter + (torch.tensor(ids, dtype=torch.float64) + 0.5) / self.count) / QUARTERS
        t = sample_timesteps(replace(self.config.diffusion, t_sampling="uniform"), share, self.schedule)
        t = t.to(self.dist.device)
        noise = rng.normal(self.config.train.seed, ids, self.latents.shape, "validation", quarter)
        z_0 = self.held_out[ids].to(self.dist.device)
        return q_sample(z_0, noise.to(self.dist.device), *alpha_sigma(self.schedule, t)), t

    @torch.no_grad()
    def evaluate(self, stopped: Callable[[], bool]) -> dict[str, float]:
        """val_loss (nats), accuracy, and accuracy in each quarter of the timesteps (q1: least noise), of validation
        rows that are seen in each."""
        mine = rank_slice(self.count, self.dist.rank, self.dist.world_size)
        blocks = [list(range(k, min(k + 64, mine.stop))) for k in range(mine.start, mine.stop, 64)]
        losses, right = 0.0, [0.0] * QUARTERS
        for quarter, ids in self._quarters(blocks):
            with self.dist.autocast():
                logits = self.model(*self._noisy(quarter, ids)).float()
            labels = self.held_out_labels[ids].to(logits.device)
            losses += float(F.cross_entropy(logits, labels, reduction="sum"))
            right[quarter] += float((logits.argmax(1) == labels).sum())
        total = np.sum(self.dist.gather([losses, *right]), axis=0) / self.count
        by_quarter = {f"accuracy_q{k + 1}": float(share) for k, share in enumerate(total[1:])}
        return {"val_loss": float(total[0]) / QUARTERS, "accuracy": float(total[1:].mean()), **by_quarter}

    @staticmethod
    def _quarters(blocks: list[list[int]]) -> Iterator[tuple[int, list[int]]]:
        return ((quarter, ids) for quarter in range(QUARTERS) for ids in blocks)

    @torch.no_grad()
    def preview(self, path: Path) -> None:
        """Writes a sheet: noisy latents of validation rows, decoded, a row a quarter of the timesteps, each with the
        class that is found in it."""
        ids, autoencoder = list(range(min(SHOWN, self.count))), self.latents.autoencoder_in_use
        rows = []
        for quarter in range(QUARTERS):
            z_t, t = self._noisy(quarter, ids)
            found = self.model(z_t, t).argmax(1).tolist()
            pictures = tensor_to_pixels(autoencoder.decode(z_t), finite=False)
            rows.append([labelled(one, self.names[k]) for one, k in zip(pictures, found)])
        save_grid(path, rows)

    def run_statistics(self) -> dict[str, Any]:
        """stats.json: scale and shape of the latents, names of the classes, hash of the autoencoder."""
        return {
            **self.latents.statistics(self.config.diffusion.latent_scale),
            "class_names": self.names,
            "autoencoder": self.autoencoder.fingerprint,
        }

    def initial_statistics(self) -> dict[str, Any]:
        """All of it: latents are measured before the first step."""
        return self.run_statistics()

    def save_inference_files(self, weights: dict[str, Tensor], metadata: dict[str, str], stats: dict[str, Any]) -> None:
        """Writes what use needs: weights and statistics."""
        files.write_json(self.run / "stats.json", stats)
        files.save_tensors(self.run / "model.safetensors", weights, metadata)


def _check_labels(rows: Any) -> None:
    """Raises InputError for rows without classes, or with one alone."""
    if not rows.has("label"):
        raise InputError(
            f"{rows.source}: a classifier needs a label column, and there is none in split {rows.split}; name it with "
            "--label-column"
        )
    if len(rows.class_names) < 2:
        raise InputError(f"{rows.source}: {len(rows.class_names)} class; a classifier needs at least 2")
