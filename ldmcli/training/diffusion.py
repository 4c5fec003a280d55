"""The objective of diffusion models (Sec. 3.2, 3.3): denoising of latents under conditions, one phase a step."""

from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldmcli.conditions import CONDITIONS
from ldmcli.conditions.condition import FitData
from ldmcli.conditions.dataset import ConditionDataset, ConditionInputs, check_columns
from ldmcli.conditions.fit import check_rows, fit_conditions, open_early, run_tokenizer
from ldmcli.conditions.text import TOKENIZER
from ldmcli.core import console, files, runs
from ldmcli.core.errors import ModelError
from ldmcli.core.settings import DiffusionConfig
from ldmcli.data.augment import batch_indices
from ldmcli.data.batches import rank_slice
from ldmcli.diffusion.loss import diffusion_loss
from ldmcli.diffusion.schedule import make_schedule, sample_timesteps
from ldmcli.formats.run_folder import first_stage_run, guiding_weights
from ldmcli.maths import rng
from ldmcli.networks.latent_diffusion import DiffusionModel
from ldmcli.sampling.api import LoadedDiffusion
from ldmcli.sampling.first_stage import LoadedAutoencoder
from ldmcli.sampling.load import load_autoencoder
from ldmcli.sampling.memory import peak_bytes
from ldmcli.training import checks, cost, inherit
from ldmcli.training.best import small_set_note
from ldmcli.training.data import open_data
from ldmcli.training.distillation import Distillation, open_teacher
from ldmcli.training.distributed import Distributed
from ldmcli.training.latents import LatentStore
from ldmcli.training.validation import DiffusionValidation


class DiffusionObjective:
    """Denoising in the latents of a frozen autoencoder; `Objective` says what each member is."""

    kind = "diffusion"
    main_network = "model"
    monitored = "loss_model"
    distillation: Distillation | None = None  # the run that init_from names is the teacher then

    def __init__(
        self,
        config: DiffusionConfig,
        run: Path,
        dist: Distributed,
        autoencoder: str,
        *,
        init_from: str = "",
        check: Callable[[], None] = lambda: None,
    ):
        self.config, self.run, self.dist = config, run, dist
        self.init_from = Path(init_from) if init_from else None
        self.autoencoder_path = dist.on_all_ranks(lambda: first_stage_run(Path(autoencoder)))
        self.autoencoder: LoadedAutoencoder = dist.on_all_ranks(
            lambda: load_autoencoder(self.autoencoder_path, dist.device)
        )
        self.stored_stats: dict[str, Any] = dist.on_rank_0(self._stored_stats)  # of an earlier start
        _check_autoencoder(run, self.stored_stats.get("autoencoder"), autoencoder, self.autoencoder.fingerprint)
        own = self.autoencoder.config
        self.size = checks.image_size(config.data, tuple(own.data.size) if own else (0, 0))
        stage = self.autoencoder.network.settings
        dist.on_all_ranks(lambda: checks.check_diffusion(config, stage, self.size, dist.world_size))
        if config.distill.calls:
            self.distillation = dist.on_all_ranks(lambda: open_teacher(config, self.init_from, dist))
        open_early(config, run, dist)
        self.latents = LatentStore(self.autoencoder, config.data, dist, self.size)
        self._open_data(check)
        self.schedule = make_schedule(config.diffusion)
        self.specs = dist.on_rank_0(self._fit_conditions)
        with dist.folder_of_rank_0(run, TOKENIZER) as seen:
            tokenizer = run_tokenizer(config, seen)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(rng.key(config.train.seed, "init"))
            self.model = DiffusionModel(
                config.diffusion, config.condition, self.specs, tokenizer, self.latents.shape, config.kinds
            )
        self.networks: dict[str, torch.nn.Module] = {"model": self.model}
        self._prepare_conditions()
        if dist.is_rank_0:
            for note in checks.notes_of(config):
                console.say(note)
        self.latents.open_cache(self.rows)
        self.latents.fit_scale(self.rows, config.diffusion.latent_scale, self.stored_stats)
        self.held_out.encode(self.latents)
        if self.latents.cache and any(CONDITIONS[name].from_pixels for name in config.kinds):
            self.rows.keep_when_read(self.size, config.data.crop)
        elif self.latents.cache:
            self.validation.forget()  # latents stand for them from here on
        self.encode = self.as_model().autoencoder.encode_unchecked

    def _stored_stats(self) -> dict[str, Any]:
        path = self.run / "stats.json"
        if self.config.distill.calls and self.init_from and not path.exists():
            path = inherit.begin_as_student(self.init_from, self.run)
        return files.read_json(path) if path.exists() else {}

    def _open_data(self, check: Callable[[], None]) -> None:
        """Rows of training and validation, checked for what conditions need; the cache of latents is filled."""
        rows, validation, bad = open_data(
            self.config,
            self.dist,
            self.size,
            look=lambda rows: check_columns(rows, self.config.condition.kinds, self.config.data),
            fill_cache=lambda rows: self.latents.fill_cache(rows, check),
        )
        first, second = check_rows(self.config, rows, validation, self.dist)
        self.rows, self.validation, self.bad = first.rows, second.rows, [*bad, *first.bad, *second.bad]
        self._found = {name: (first.found[name], second.found[name]) for name in first.found}

    def _fit_conditions(self) -> dict[str, dict[str, Any]]:
        """What conditions learn from data: from an earlier start of this run, else from the training rows."""
        stored = self.stored_stats.get("conditions")
        if stored is not None:
            return stored
        stage = self.autoencoder.network
        begun = None if self.init_from is None else runs.locate(self.init_from)[0]
        data = FitData(self.rows, self.config, self.size, stage, self.run, begun, self._found)
        return fit_conditions(data)

    def _prepare_conditions(self) -> None:
        """Where batches take conditions from."""
        self.source = ConditionDataset(self.rows, self.config, self.size, training=True)
        timesteps = self.distillation.segments.starts if self.distillation else None
        self.held_out = DiffusionValidation(self.config, self.validation, self.size, self.rows, timesteps)
        for source in (self.source, self.held_out.dataset):
            source.align_categories(self.model.conditions)
        self.inputs = ConditionInputs(self.source, self.model.conditions)
        if self.dist.is_rank_0:
            self.inputs.report_unseen()
        self.held_out.prepare_inputs(self.model.conditions)

    def describe(self) -> str:
        """The first line of a training."""
        d, task, names = self.config.diffusion, self.config.task, list(self.config.condition.kinds)
        names += {
            "sr": [f"images {task.scale} times smaller ({task.degradation})"],
            "inpaint": ["images with holes"],
        }.get(task.name, [])
        conditioned = f"conditioned on {' + '.join(names)}" if names else "unconditional"
        count = sum(p.numel() for p in self.model.parameters())
        what = f"{self.distillation.describe()}: " if self.distillation else ""
        return (
            f"{what}diffusion in latents {'x'.join(map(str, self.latents.shape))} of {self.autoencoder_path.name}, "
            f"{conditioned}; {d.prediction}, {count / 1e6:.2f} M parameters"
        )

    def validation_note(self) -> str:
        """What a validation of this run leaves out because the run is short, how samples are measured, and that so few
        pictures may be repeated."""
        return "; ".join(filter(None, (self.held_out.note(), small_set_note(self.config, len(self.rows)))))

    def init_weights(self) -> dict[str, Tensor]:
        """Weights of the run that --init-from names, as far as they fit. Raises ModelError when most do not."""
        if self.init_from is None:
            return {}
        planes = self.latents.shape[0] * self.config.diffusion.patch**2
        return inherit.matching_weights(self.init_from, self.model.state_dict(), planes)

    def parents(self) -> list[dict[str, str]]:
        """The run of the autoencoder, and of a distilled model that of the teacher."""
        teacher = [self.distillation.parent()] if self.distillation else []
        return [{"path": str(self.autoencoder_path), "sha256": self.autoencoder.fingerprint}, *teacher]

    def activation_bytes(self) -> float:
        """Bytes that one image takes in a step: what is kept for the backward pass, or what the first stage takes to
        encode it, where that is more."""
        found = cost.diffusion_cost(self.config, self.specs, self.latents.shape, self.size)
        kept = cost.kept_bytes([found], self.dist.dtype, self.dist.device)
        network = self.autoencoder.network
        encodes = self.latents.cache is None or self.model.conditions.encodes
        if network.is_identity or not encodes:
            return kept
        return max(kept, float(peak_bytes(network.encoder, (1, 3, *self.size))))

    def learning_rate(self, phase: str) -> float | None:
        """No phase has a rate of its own."""
        return None

    def in_ema(self, name: str) -> bool:
        """With train.ema_scope = "unet" only the UNet is averaged, not the conditioners."""
        return self.config.train.ema_scope == "all" or name.startswith("unet.")

    def phases(self, step: int) -> tuple[str, ...]:
        """One network, every step."""
        return ("model",)

    def batch(self, step: int) -> dict[str, Tensor]:
        """This process's share of a step, on the CPU; every number in it depends on (seed, position) alone."""
        train, dist = self.config.train, self.dist
        mine = rank_slice(train.batch_at(step)[1], dist.rank, dist.world_size)
        ids, where = batch_indices(self.rows, self.config, step, mine)
        at, seed = where.tolist(), train.seed
        out = {
            "row": torch.from_numpy(ids.copy()),
            "noise": self.latents.noise(train, at, "noise"),
            "t": self.distillation.timesteps(at)
            if self.distillation
            else sample_timesteps(self.config.diffusion, rng.uniform(seed, at, "timestep"), self.schedule),
            **self.latents.batch(self.rows, self.config, ids, where),
        }
        if self.config.kinds:
            pixels = out["pixels"].numpy() if "pixels" in out else None
            inputs = self.inputs.batch(ids, where, pixels)
            dropped = {
                name: rng.uniform(seed, at, "drop", name) < self.config.condition.drop
                for name in self.config.condition.kinds
            }
            out |= {f"condition.{k}": v for k, v in self.model.conditions.drop(inputs, dropped).items()}
        return out

    def loss(self, phase: str, networks: dict, batch: dict[str, Tensor], step: int, norms: bool):
        """(mean loss of a micro-batch, statistics)."""
        device = self.dist.device
        z = self.latents.of_batch(batch)
        inputs = {k.removeprefix("condition."): v.to(device) for k, v in batch.items() if k.startswith("condition.")}
        inputs = self.model.conditions.complete(inputs)
        model = partial(networks["model"], encode=self.encode)
        noise, t = self.latents.noise_of(batch["noise"]), batch["t"].to(device)
        return self.step_loss(model, self.schedule, self.config.diffusion, z, noise, t, inputs).mean(), {}

    @cached_property
    def step_loss(self) -> Callable[..., Tensor]:
        """`diffusion_loss`; with train.compile one graph with the network in it, of each size of a micro-batch. Of
        several processes the network alone is compiled: what reduces gradients breaks a graph."""
        if self.distillation:
            return self.distillation.loss
        if not self.config.train.compile or self.dist.world_size > 1:
            return diffusion_loss
        self.schedule.tables(self.dist.device, torch.float32)
        return torch.compile(diffusion_loss, dynamic=False)

    def after_update(self, step: int) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def extra_state(self) -> dict[str, Tensor]:
        """Nothing beside weights and optimiser."""
        return {}

    def load_extra_state(self, tensors: dict[str, Tensor]) -> None:
        """Nothing."""

    def as_model(self, guiding: Path | None = None) -> LoadedDiffusion:
        """The model as users load it; guiding: the weights of its guiding model."""
        return LoadedDiffusion(self.model, self.latents.autoencoder_in_use, self.config, "").led_by(guiding)

    def evaluate(self, stopped: Callable[[], bool]) -> dict[str, float] | None:
        """Validation loss at fixed timesteps and noise, and metrics of samples (train.eval_samples)."""
        model = partial(self.model, encode=self.encode)
        of_samples = self.distillation.loss if self.distillation else diffusion_loss
        loss = partial(of_samples, model, self.schedule, self.config.diffusion)
        return self.held_out.evaluate(loss, self.as_model(), self.dist, stopped)

    def preview_request(self) -> dict[str, Any]:
        """What previews show, as JSON."""
        return self.held_out.preview_request(self.specs)

    def preview(self, path: Path) -> None:
        """A sheet of samples from the run's seed, on rank 0, whose machine has the guiding model where there is one."""
        self.held_out.preview(self.as_model(guiding_weights(self.run)), self.preview_request(), path)

    def run_statistics(self) -> dict[str, Any]:
        """stats.json: scale and shape of the latents, what conditions learned, hash of the autoencoder, preview."""
        return {
            **self.latents.statistics(self.config.diffusion.latent_scale),
            "conditions": self.specs,
            "autoencoder": self.autoencoder.fingerprint,
            "preview": self.preview_request(),
        }

    def initial_statistics(self) -> dict[str, Any]:
        """All of it: latents are measured, and conditions learned, before the first step."""
        return self.run_statistics()

    def save_inference_files(self, weights: dict[str, Tensor], metadata: dict[str, str], stats: dict[str, Any]) -> None:
        """Writes what use needs: weights, statistics, the autoencoder."""
        files.write_json(self.run / "stats.json", stats)
        own = self.run / "autoencoder"
        if self.autoencoder.fingerprint != "pixels" and not (own / "run.json").exists():
            inherit.copy_autoencoder(self.autoencoder, self.autoencoder_path, own)
        files.save_tensors(self.run / "model.safetensors", weights, metadata)


def _check_autoencoder(run: Path, wanted: str | None, path: str, found: str) -> None:
    """Raises ModelError where a run was started in the latents of another autoencoder than that of hash `found`."""
    if wanted and wanted != found:
        raise ModelError(
            f"{run}: was started in the latents of another autoencoder (hash {wanted[:12]}) than {path} "
            f"({found[:12]}); name that one, or begin anew with --fresh"
        )
