"""Validation of a diffusion model in training: its loss on held-out rows at fixed timesteps and noise, and previews."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldmcli.conditions import CONDITIONS
from ldmcli.conditions.condition import Spec
from ldmcli.conditions.dataset import ConditionDataset
from ldmcli.conditions.outputs import picture, preview_values
from ldmcli.conditions.parse import arguments_of, request_values
from ldmcli.conditions.pictures import enlarged
from ldmcli.core import console
from ldmcli.core.errors import ModelError
from ldmcli.core.settings import DiffusionConfig
from ldmcli.data.batches import rank_slice
from ldmcli.data.rows import evenly_spaced
from ldmcli.diffusion.schedule import make_schedule, sample_timesteps
from ldmcli.maths import rng
from ldmcli.networks.conditioners import Conditions
from ldmcli.sampling.api import LoadedDiffusion
from ldmcli.sampling.contact_sheets import in_rows, save_grid
from ldmcli.sampling.draw import Draw, draw_images
from ldmcli.training.distributed import Distributed
from ldmcli.training.latents import LatentStore
from ldmcli.training.sample_quality import SampleQuality, open_features

VALIDATION_ROWS = 512
HELD_BYTES, MIN_HELD_ROWS = 1 << 28, 32  # for conditions as large as images

# z (B, c, h, w), noise (B, c, h, w), timesteps (B,), inputs of conditions → weighted errors (B,)
Losses = Callable[[Tensor, Tensor, Tensor, dict[str, Tensor]], Tensor]


class DiffusionValidation:
    """Validation rows as latents and inputs of conditions, both kept in memory, so that every validation is alike.

    training: the rows that are trained on, of which samples may be copies. timesteps: those at which the loss is
    measured, (B,) of shares (B,) in [0, 1) of all there are, by default those of training.
    """

    def __init__(
        self,
        config: DiffusionConfig,
        rows: Any,
        size: tuple[int, int],
        training: Any,
        timesteps: Callable[[Tensor], Tensor] | None = None,
    ):
        self.config, self.rows, self.size = config, rows, size
        schedule = make_schedule(config.diffusion)
        self.timesteps = timesteps or (lambda u: sample_timesteps(config.diffusion, u, schedule))
        image_sized = sum(CONDITIONS[name].image_sized for name in config.kinds)
        fitting = HELD_BYTES // max(1, image_sized * 4 * size[0] * size[1])
        self.usual_count = min(len(rows), VALIDATION_ROWS, max(fitting, MIN_HELD_ROWS))
        self.count = config.train.measured_images(self.usual_count)  # fewer in a short run
        self.held = rows.select(evenly_spaced(len(rows), self.count))
        self.dataset = ConditionDataset(self.held, config, size, training=False)
        self.inputs: dict[str, Tensor] = {}
        self.latents = torch.empty(0)
        self.quality: SampleQuality | None = None
        if config.train.eval_samples:
            self.quality = SampleQuality(config, rows, size, open_features(config.train), training)

    def note(self) -> str:
        """What a validation leaves out because the run is short, and how samples are measured; "" = nothing."""
        parts = [f"a short run: validation on {self.count} of {self.usual_count} images"]
        parts = parts if self.count < self.usual_count else []
        return "; ".join([*parts, self.quality.note()] if self.quality else parts)

    def prepare_inputs(self, conditions: Conditions) -> None:
        """Makes the inputs of the conditions."""
        ids = range(self.count)
        values = {name: self.dataset.values(name, ids, ids) for name in self.config.kinds}
        self.inputs = conditions.prepare(values) if values else {}

    def encode(self, store: LatentStore) -> None:
        """Makes the latents: modes of the posterior."""
        self.latents = store.modes(self.held)

    def evaluate(
        self, losses: Losses, model: LoadedDiffusion, dist: Distributed, stopped: Callable[[], bool]
    ) -> dict[str, float] | None:
        """The mean loss, "val_loss", and what is measured of samples; without that where they hold NaN or Inf: the loss
        decides whether a training goes on. None where `stopped()` became true meanwhile. Collective."""
        found = {"val_loss": self.mean_loss(losses, dist)}
        if self.quality is None:
            return found
        try:
            measured = self.quality.measure(model, dist, stopped)
        except ModelError as error:
            console.warn(f"samples are not measured: {error}")
            return found
        return None if measured is None else found | measured

    @torch.no_grad()
    def mean_loss(self, losses: Losses, dist: Distributed) -> float:
        """Mean over the rows at evenly spread quantiles of the timestep, each process its part. Collective."""
        count, total = len(self.latents), 0.0
        mine = rank_slice(count, dist.rank, dist.world_size)
        for start in range(mine.start, mine.stop, 64):
            ids = list(range(start, min(start + 64, mine.stop)))
            t = self.timesteps((torch.tensor(ids, dtype=torch.float64) + 0.5) / count)
            noise = rng.normal(self.config.train.seed, ids, tuple(self.latents.shape[1:]), "validation")
            inputs = {k: v[ids].to(dist.device) for k, v in self.inputs.items()}
            with dist.autocast():
                found = losses(self.latents[ids].to(dist.device), noise.to(dist.device), t.to(dist.device), inputs)
            total += float(found.sum())
        return sum(dist.gather(total)) / max(count, 1)

    def preview_request(self, specs: Mapping[str, Spec]) -> dict[str, Any]:
        """What a preview shows, as JSON: the run's prompts, else captions or classes of validation rows."""
        n, names = self.config.sample.n, self.config.kinds
        if not names:
            return {"n": n}
        ids = self._preview_rows() if self._spatial() else self._spread(len(self.rows))
        rows = ConditionDataset(self.rows, self.config, self.size, training=False)
        return {"n": 1, **arguments_of(preview_values(rows, ids, specs))}

    def preview(self, model: LoadedDiffusion, request: dict[str, Any], path: Path) -> None:
        """Writes a sheet of what `ldm sample` with the run's seed and prompts would give. Spatial conditions stand
        above the samples, the images that they come from below them."""
        seed, ids = self.config.train.seed, self._preview_rows()
        if not self._spatial():
            images = model.sample(seed=seed, **request)
            save_grid(path, in_rows([np.asarray(image) for image in images]))
            return
        values = {name: self.dataset.values(name, ids, ids) for name in self._spatial()} | request_values(request)
        parts = [range(k, min(k + 16, len(ids))) for k in range(0, len(ids), 16)]
        request_draw = Draw(ids=ids, seed=seed, values=values)
        samples = np.concatenate([draw_images(model, request_draw.of(part)) for part in parts])
        save_grid(path, self._sheet(model, ids, values, samples))

    def _sheet(
        self, model: LoadedDiffusion, ids: list[int], values: dict[str, list], samples: np.ndarray
    ) -> list[list[np.ndarray]]:
        """Rows of images, eight columns wide: conditions, samples, validation images."""
        factor, sheet = max(1, 128 // max(self.size)), []
        large = (self.size[0] * factor, self.size[1] * factor)
        for start in range(0, len(ids), 8):
            columns = range(start, min(start + 8, len(ids)))
            for name in self._spatial():
                sheet.append([picture(name, values[name][k], large, model.conditions) for k in columns])
            sheet.append([enlarged(samples[k], large) for k in columns])
            sheet.append([enlarged(self.held.pixels(ids[k], self.size), large) for k in columns])
        return sheet

    def _spatial(self) -> list[str]:
        """Conditions that are images themselves."""
        return [name for name in self.config.kinds if not CONDITIONS[name].static]

    def _preview_rows(self) -> list[int]:
        return self._spread(self.count)

    def _spread(self, count: int) -> list[int]:
        """sample.n of `count` rows, evenly spread."""
        return np.linspace(0, count - 1, self.config.sample.n).round().astype(int).tolist()
