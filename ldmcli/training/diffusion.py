"""What the training of a diffusion model asks of the loop (Sec. 3.2, 3.3): cached latents, conditions, one phase."""

import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldmcli.conditions import CONDITIONS
from ldmcli.conditions.condition import FitData
from ldmcli.conditions.dataset import ConditionDataset, ConditionInputs
from ldmcli.conditions.fit import check_rows, fit_conditions, open_early
from ldmcli.conditions.pictures import enlarged, shown_condition
from ldmcli.core import console, files, runs
from ldmcli.core.errors import ModelError
from ldmcli.core.settings import DiffusionConfig
from ldmcli.data.augment import batch_indices, load_pixels
from ldmcli.data.batches import rank_slice
from ldmcli.data.cache import LatentCache, cache_key, cache_root
from ldmcli.diffusion.schedule import levels_at, loss_weight, make_schedule, sample_timesteps, target
from ldmcli.formats.bundle import AutoencoderBundle
from ldmcli.formats.run_folder import read_scale
from ldmcli.formats.run_folder import write as write_run
from ldmcli.maths import rng
from ldmcli.maths.pixels import pixels_to_tensor, tensor_to_pixels
from ldmcli.networks.autoencoder import posterior_sample, posterior_second_moments
from ldmcli.networks.conditioners import load_tokenizer
from ldmcli.networks.latent_diffusion import DiffusionModel, LatentScale
from ldmcli.sampling.contact_sheets import in_rows, save_grid
from ldmcli.sampling.first_stage import LoadedAutoencoder
from ldmcli.sampling.load import load_autoencoder
from ldmcli.sampling.memory import peak_bytes
from ldmcli.sampling.model import LoadedDiffusion
from ldmcli.training import checks, cost
from ldmcli.training.data import open_data
from ldmcli.training.distributed import Distributed

VALIDATION_ROWS = 512
SCALE_ROWS = 10_000
FIRST_LAYER = "unet.input_blocks.0.0.weight"  # reads z_t, then planes


class DiffusionObjective:
    """Denoising in the latents of a frozen autoencoder."""

    kind = "diffusion"
    main_network = "model"
    monitored = "loss_model"

    def __init__(
        self,
        config: DiffusionConfig,
        run: Path,
        dist: Distributed,
        autoencoder: str,
        *,
        init_from: str = "",
        check=lambda: None,
    ):
        self.config, self.run, self.dist, self._check = config, run, dist, check
        self.init_from = Path(init_from) if init_from else None
        self.autoencoder_path = Path(autoencoder)
        self.autoencoder: LoadedAutoencoder = dist.on_all_ranks(
            lambda: load_autoencoder(self.autoencoder_path, dist.device)
        )
        self._check_autoencoder()
        own = self.autoencoder.config
        self.size = checks.image_size(config.data, tuple(own.data.size) if own else (0, 0))
        stage = self.autoencoder.network.settings
        dist.on_all_ranks(lambda: checks.check_diffusion(config, stage, self.size, dist.world_size))
        open_early(config, run, dist)
        self.latent_shape = self.autoencoder.network.latent_shape(*self.size)
        self.is_vq = self.autoencoder.network.is_vq or self.autoencoder.network.is_identity
        self._open_data()
        self.schedule = make_schedule(config.diffusion)
        self.facts = dist.on_rank_0(self._fit_conditions)
        tokenizer = load_tokenizer(run / "tokenizer") if "text" in config.condition.kinds else None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(rng.key(config.train.seed, "init"))
            self.model = DiffusionModel(
                config.diffusion, config.condition, self.facts, tokenizer, self.latent_shape, config.kinds
            )
        self.networks: dict[str, torch.nn.Module] = {"model": self.model}
        self._prepare_conditions()
        if dist.is_rank_0:
            for note in checks.notes_of(config):
                console.say(note)
        root = cache_root(config.data.cache_dir) if config.caches_latents else None
        root = root if all(dist.gather(root is not None)) else None  # all processes build it, or none
        self.cache = None if root is None else self._build_cache(self.rows, "latents", root)
        self.scale = self._scale()
        self._held = self._validation_latents()
        if self.cache and not any(CONDITIONS[name].from_pixels for name in config.kinds):
            for rows in (self.rows, self.validation):
                rows.forget()  # latents stand for them from here on
        self.as_model()  # lends the first stage to the conditions

    def _check_autoencoder(self) -> None:
        wanted, found = self._stored_stats().get("autoencoder"), self.autoencoder.fingerprint
        if wanted and wanted != found:
            raise ModelError(
                f"{self.run}: was started in the latents of another autoencoder (hash {wanted[:12]}) than "
                f"{self.autoencoder_path} ({found[:12]}); name that one, or begin anew with --fresh"
            )

    def _stored_stats(self) -> dict[str, Any]:
        path = self.run / "stats.json"
        return files.read_json(path) if path.exists() else {}

    def _open_data(self) -> None:
        """Rows of training and validation, with what conditions ask of them checked."""
        rows, validation, bad = open_data(self.config, self.dist, self.size)
        first, second = check_rows(self.config, rows, validation, self.dist)
        self.rows, self.validation, self.bad = first.rows, second.rows, [*bad, *first.bad, *second.bad]
        self._found = {name: (first.found[name], second.found[name]) for name in first.found}

    def _fit_conditions(self) -> dict[str, dict[str, Any]]:
        """What conditions learn from data: from an earlier start of this run, else from the training rows."""
        stored = self._stored_stats().get("conditions")
        if stored is not None:
            return stored
        stage = self.autoencoder.network
        data = FitData(self.rows, self.config, self.size, stage, self.run, self.init_from, self._found)
        return fit_conditions(data)

    def _prepare_conditions(self) -> None:
        """Where batches take conditions from."""
        self.source = ConditionDataset(self.rows, self.config, self.size, training=True)
        held = self.validation if self.config.data.streaming else self.validation.select(range(self._held_rows()))
        self.validation_source = ConditionDataset(held, self.config, self.size, training=False)
        for source in (self.source, self.validation_source):
            source.align_categories(self.model.conditions)
        self.inputs = ConditionInputs(self.source, self.model.conditions)
        if self.dist.is_rank_0:
            self.inputs.tell_of_rows()
        ids = range(self._held_rows())
        values = {name: self.validation_source.values(name, ids, ids) for name in self.config.kinds}
        self.validation_tables = self.model.conditions.prepare(values) if values else {}

    def _held_rows(self) -> int:
        """Validation rows that the loss is measured on: as many as keep their planes in a quarter of a gigabyte."""
        return self.config.train.measured_images(self._most_held())

    def _most_held(self) -> int:
        planes = sum(CONDITIONS[name].image_sized for name in self.config.kinds)
        room = (1 << 28) // max(1, planes * 4 * self.size[0] * self.size[1])
        return min(len(self.validation), VALIDATION_ROWS, max(room, 32))

    # ------------------------------------------------------------- latents

    def _build_cache(self, rows, label: str, root: Path) -> LatentCache:
        data = self.config.data
        shape = (self.latent_shape[0] * (1 if self.is_vq else 2), *self.latent_shape[1:])
        how = (f"{self.size}", data.resize, data.background, data.cache_dtype, f"flips {data.flip}")
        folder = root / "latents" / cache_key(self.autoencoder.fingerprint, *how)
        keys = [rows.content_hash(i) for i in range(len(rows))]
        cache = LatentCache(folder, keys, shape, data.cache_dtype, 1 + data.flip)
        cache.refresh()
        dist = self.dist
        todo = len(cache.missing(dist.rank, dist.world_size))
        # every process enters, also one that finds its share done: another may not
        with console.progress(todo, f"encoding {label}") if todo else nullcontext() as bar:
            dist.on_all_ranks(
                lambda: cache.build(
                    lambda ids: self._encode_rows(rows, ids),
                    rank=dist.rank,
                    world=dist.world_size,
                    advance=bar.advance if bar else lambda n: None,
                    check=self._check,
                )
            )
        if not todo and dist.is_rank_0:
            console.say(f"{label}: all {len(rows)} found in the cache")
        dist.on_all_ranks(cache.seal)
        return cache

    @torch.no_grad()
    def _encode_rows(self, rows, ids: list[int]) -> np.ndarray:
        pixels = np.stack([rows.pixels(i, self.size, "center", (0.5, 0.5)) for i in ids])
        both = []
        views = (pixels, np.ascontiguousarray(pixels[:, :, ::-1])) if self.config.data.flip else (pixels,)
        for view in views:
            with self.dist.autocast():
                moments = self.autoencoder.network.moments(pixels_to_tensor(torch.from_numpy(view), self.dist.device))
            both.append(moments.float().cpu().numpy())
        return np.stack(both, axis=1)

    def _scale(self) -> LatentScale:
        """The scale of an earlier start of this run, else measured on up to 10,000 training rows."""
        stored = self._stored_stats()
        if stored:
            self.scale_images = stored["latent_scale"].get("images")
            return read_scale(stored, self.latent_shape[0])
        self.scale_images = min(len(self.rows), SCALE_ROWS if self.cache else 512)
        return self.dist.on_rank_0(self._measure_scale)

    def _measure_scale(self) -> LatentScale:
        count = self.scale_images
        picked = np.linspace(0, len(self.rows) - 1, count).round().astype(int)
        total = square = torch.zeros(self.latent_shape[0], dtype=torch.float64)
        for start in range(0, count, 64):
            ids = picked[start : start + 64].tolist()
            found = self.cache.moments(ids) if self.cache else self._encode_rows(self.rows, ids)[:, 0]
            mean, extra = posterior_second_moments(torch.from_numpy(found).double(), self.is_vq)
            total, square = total + mean, square + extra
        n = count * self.latent_shape[1] * self.latent_shape[2]
        return LatentScale.measured(total / n, square / n - (total / n) ** 2, self.config.diffusion.latent_scale)

    def _validation_latents(self) -> Tensor:
        """Latents (modes) of up to 512 validation rows, for a validation loss at fixed noise."""
        ids = list(range(self._held_rows()))
        found = self.dist.on_rank_0(
            lambda: np.concatenate(
                [self._encode_rows(self.validation, ids[i : i + 32])[:, 0] for i in range(0, len(ids), 32)]
            )
        )
        return self._latents(torch.from_numpy(found), None)

    def _latents(self, moments: Tensor, noise: Tensor | None) -> Tensor:
        return self.scale.normalise(moments if self.is_vq else posterior_sample(moments, noise))

    # ------------------------------------------------------------- training

    def describe(self) -> str:
        """The first line of a training."""
        d, task, names = self.config.diffusion, self.config.task, list(self.config.condition.kinds)
        names += {
            "sr": [f"images {task.scale} times smaller ({task.degradation})"],
            "inpaint": ["images with holes"],
        }.get(task.name, [])
        kinds = " + ".join(names) or "nothing"
        count = sum(p.numel() for p in self.model.parameters())
        return (
            f"diffusion in latents {'x'.join(map(str, self.latent_shape))} of {self.autoencoder_path.name}, told "
            f"{kinds}; {d.prediction}, {count / 1e6:.2f} M parameters"
        )

    def validation_note(self) -> str:
        """What a validation of this run leaves out because the run is short; "" = nothing."""
        count, usual = self._held_rows(), self._most_held()
        return "" if count == usual else f"a short run: validation on {count} of {usual} images"

    def parents(self) -> list[dict[str, str]]:
        """The run of the autoencoder."""
        return [{"path": str(self.autoencoder_path), "sha256": self.autoencoder.fingerprint}]

    def activation_bytes(self) -> float:
        """Bytes that one image takes in a step, in float32: what is kept for the backward pass, or what the first stage
        takes to encode it, where that is more."""
        kept = cost.diffusion_work(self.config, self.facts, self.latent_shape, self.size).kept
        network = self.autoencoder.network
        encodes = self.cache is None or self.model.conditions.encodes
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
        mine = rank_slice(train.batch_size, dist.rank, dist.world_size)
        ids, where = batch_indices(self.rows, self.config, step, mine)
        at, seed = where.tolist(), train.seed
        out = {
            "row": torch.from_numpy(ids.copy()),
            "noise": rng.normal(seed, at, self.latent_shape, "noise"),
            "u": rng.uniform(seed, at, "timestep"),
        }
        if not self.is_vq:
            out["posterior"] = rng.normal(seed, at, self.latent_shape, "posterior")
        if self.cache:
            flips = (rng.uniform(seed, at, "flip") < 0.5).tolist() if self.config.data.flip else None
            out["moments"] = torch.from_numpy(self.cache.moments(ids.tolist(), flips))
        else:
            out["pixels"] = load_pixels(self.rows, self.config, ids, where, self.size)
        if self.config.kinds:
            pixels = out["pixels"].numpy() if "pixels" in out else None
            inputs = self.inputs.batch(ids, where, pixels)
            dropped = {
                kind: rng.uniform(seed, at, "drop", kind) < self.config.condition.drop
                for kind in self.config.condition.kinds
            }
            out |= {f"condition.{k}": v for k, v in self.model.conditions.drop(inputs, dropped).items()}
        return out

    def loss(self, phase: str, networks: dict, batch: dict[str, Tensor], step: int, norms: bool):
        """(mean loss of a micro-batch, statistics)."""
        device = self.dist.device
        if "moments" in batch:
            moments = batch["moments"].to(device)
        else:
            with torch.no_grad():
                moments = self.autoencoder.network.moments(pixels_to_tensor(batch["pixels"], device)).float()
        noise = batch.get("posterior")
        z = self._latents(moments, noise.to(device) if noise is not None else None)
        inputs = {k.removeprefix("condition."): v.to(device) for k, v in batch.items() if k.startswith("condition.")}
        losses = self._losses(networks["model"], z, batch["noise"].to(device), batch["u"], inputs)
        return losses.mean(), {}

    def _losses(self, model, z: Tensor, noise: Tensor, u: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        """Weighted error of each sample, (B,)."""
        d = self.config.diffusion
        t = sample_timesteps(d, u, self.schedule).to(z.device)
        alpha, sigma = levels_at(self.schedule, t.float())
        z_t = alpha[:, None, None, None] * z + sigma[:, None, None, None] * noise
        output = model(z_t, t.float(), inputs).float()
        error = output - target(d.prediction, z, noise, alpha, sigma)
        each = (error.abs() if d.loss == "l1" else error.square()).mean(dim=(1, 2, 3))
        return each * loss_weight(d.loss_weight, d.prediction, alpha, sigma, d.snr_gamma)

    def after_update(self, step: int) -> dict[str, float]:
        """Nothing."""
        return {}

    def extra_state(self) -> dict[str, Tensor]:
        """Nothing beside weights and optimiser."""
        return {}

    def load_extra_state(self, tensors: dict[str, Tensor]) -> None:
        """Nothing."""

    # ------------------------------------------------------------- looking

    def as_model(self) -> LoadedDiffusion:
        """The model as users load it; lends its first stage to the conditions."""
        first = self.autoencoder
        autoencoder = LoadedAutoencoder(first.network, self.scale, first.fingerprint, first.config, first.place)
        return LoadedDiffusion(self.model, autoencoder, self.config, "")

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Validation loss at fixed timesteps (evenly spread quantiles) and fixed noise."""
        count, dist = len(self._held), self.dist
        mine = rank_slice(count, dist.rank, dist.world_size)
        sums, seed = 0.0, self.config.train.seed
        for start in range(mine.start, mine.stop, 64):
            ids = list(range(start, min(start + 64, mine.stop)))
            u = (torch.tensor(ids, dtype=torch.float64) + 0.5) / count
            noise = rng.normal(seed, ids, self.latent_shape, "validation").to(dist.device)
            inputs = {k: v[ids].to(dist.device) for k, v in self.validation_tables.items()}
            with dist.autocast():
                losses = self._losses(self.model, self._held[ids].to(dist.device), noise, u, inputs)
            sums += float(losses.sum())
        return {"val_loss": sum(dist.gather(sums)) / max(count, 1)}

    def _shown_rows(self) -> list[int]:
        """Validation rows that previews show: spread over those that the loss is measured on."""
        return np.linspace(0, self._held_rows() - 1, self.config.sample.n).round().astype(int).tolist()

    def preview_request(self) -> dict[str, Any]:
        """What the preview grid shows, as JSON: the run's prompts, else captions or classes of validation rows."""
        n, kinds = self.config.sample.n, self.config.kinds
        if not kinds:
            return {"n": n}
        spread = np.linspace(0, len(self.validation) - 1, n).round().astype(int).tolist()
        spread = spread if not self._pictured() else self._shown_rows()
        request: dict[str, Any] = {"n": 1}
        if "text" in kinds:
            request["prompt"] = list(self.config.sample.prompts) or [self.validation.caption(i) for i in spread]
        if "class" in kinds:
            names = self.facts["class"]["class_names"]
            request["classes"] = (
                [k % len(names) for k in range(max(n, 1))]
                if kinds == ("class",)
                else [self.validation.label(i) for i in spread]
            )
        return request

    def _pictured(self) -> list[str]:
        """Conditions that can be shown as pictures."""
        return [name for name in self.config.kinds if not CONDITIONS[name].static]

    def preview(self, path: Path) -> None:
        """The picture that `ldm sample` with the run's seed and prompts would give; conditions that are pictures
        stand above the samples, and the true pictures below them."""
        request, loaded, seed = self.preview_request(), self.as_model(), self.config.train.seed
        if not self._pictured():
            images = loaded.sample(request.pop("prompt", None), seed=seed, **request)
            save_grid(path, in_rows([np.asarray(image) for image in images]))
            return
        ids = self._shown_rows()
        values = {kind: self.validation_source.values(kind, ids, ids) for kind in self.config.kinds}
        if "text" in values:
            values["text"] = request["prompt"]
        z = torch.cat(
            [loaded.latents_for(range(k, min(k + 16, len(ids))), values, seed=seed) for k in range(0, len(ids), 16)]
        )
        drawn = tensor_to_pixels(torch.cat([loaded.autoencoder.decode(part) for part in z.split(16)]))
        factor, rows = max(1, 128 // max(self.size)), []
        large = (self.size[0] * factor, self.size[1] * factor)
        for start in range(0, len(ids), 8):
            some = range(start, min(start + 8, len(ids)))
            for kind in self._pictured():
                names = getattr(self.model.conditions.entries[kind], "names", [])
                rows.append([shown_condition(kind, values[kind][k], self.size, names, factor) for k in some])
            rows.append([enlarged(drawn[k], large) for k in some])
            rows.append([enlarged(self.validation.pixels(ids[k], self.size), large) for k in some])
        save_grid(path, rows)

    def run_statistics(self) -> dict[str, Any]:
        """stats.json."""
        request = self.preview_request()
        return {
            "latent_scale": {
                "kind": self.config.diffusion.latent_scale,
                "mean": list(self.scale.mean),
                "std": list(self.scale.std),
                "images": self.scale_images,
            },
            "latent_shape": list(self.latent_shape),
            "size": list(self.size),
            "conditions": self.facts,
            "autoencoder": self.autoencoder.fingerprint,
            "preview": request,
        }

    def initial_statistics(self) -> dict[str, Any]:
        """All of it: latents are measured, and conditions learned, before the first step."""
        return self.run_statistics()

    def save_inference_files(self, weights: dict[str, Tensor], metadata: dict[str, str], stats: dict[str, Any]) -> None:
        """Writes what use needs: weights, statistics, the autoencoder."""
        files.write_json(self.run / "stats.json", stats)
        own = self.run / "autoencoder"
        if self.autoencoder.fingerprint != "pixels" and not (own / "run.json").exists():
            self._keep_autoencoder(own)
        files.save_tensors(self.run / "model.safetensors", weights, metadata)

    def _keep_autoencoder(self, own: Path) -> None:
        """A copy of the autoencoder's run, or a run made of what others wrote."""
        if not runs.is_run(self.autoencoder_path):
            first = self.autoencoder
            write_run(AutoencoderBundle(first.config, first.network.state_dict(), first.scale), own)
            return
        own.mkdir(exist_ok=True)
        for name in ("config.toml", "stats.json", "model.safetensors", "run.json"):
            if (self.autoencoder_path / name).exists():
                with files.atomic_path(own / name) as temporary:
                    shutil.copyfile(self.autoencoder_path / name, temporary)

    def init_weights(self) -> dict[str, Tensor]:
        """Weights of another run to start from (--init-from): tensors that fit in name and shape. Planes that the other
        model did not read begin with weights of zero, so that at first they change nothing.

        Raises ModelError when fewer than half of this model's tensors are found there.
        """
        path = self.init_from
        if path is None:
            return {}
        tensors, _ = files.load_tensors(path / "model.safetensors")
        own = self.model.state_dict()
        first = tensors.get(FIRST_LAYER)
        wanted, plain = own[FIRST_LAYER].shape, self.latent_shape[0] * self.config.diffusion.patch**2
        if first is not None and first.shape[:2] == (wanted[0], plain) and plain < wanted[1]:
            tensors[FIRST_LAYER] = torch.zeros(wanted)
            tensors[FIRST_LAYER][:, : first.shape[1]] = first
        fitting = {k: v for k, v in tensors.items() if k in own and own[k].shape == v.shape}
        if len(fitting) < len(own) / 2:
            raise ModelError(
                f"{path}: only {len(fitting)} of {len(own)} tensors fit this model; --init-from needs a "
                "run of the same network"
            )
        return fitting
