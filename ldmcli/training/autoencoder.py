"""The first-stage objective (Sec. 3.1, Eq. 25): one phase a step, two once the discriminator starts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldmcli.core import console, files
from ldmcli.core.settings import AutoencoderConfig
from ldmcli.data.augment import batch_indices, load_pixels
from ldmcli.data.batches import rank_slice
from ldmcli.data.rows import evenly_spaced
from ldmcli.evaluation.extractors import open_extractor
from ldmcli.evaluation.judges import Teacher, judges_among
from ldmcli.evaluation.metrics import reconstruction_metrics
from ldmcli.formats.run_folder import TEACHERS
from ldmcli.maths import rng
from ldmcli.maths.pixels import pixels_to_tensor, tensor_to_pixels
from ldmcli.networks.autoencoder import Autoencoder
from ldmcli.networks.discriminator import PatchDiscriminator
from ldmcli.networks.losses import Adversary, codebook_stats, disc_factor, discriminator_loss, generator_loss
from ldmcli.networks.perceptual import perceptual_net
from ldmcli.networks.vector_quantizer import restart_dead_codes
from ldmcli.sampling.contact_sheets import save_grid
from ldmcli.training import checks, cost
from ldmcli.training.data import open_data
from ldmcli.training.distributed import Distributed
from ldmcli.training.latents import measure_latent_scale

SCALE_IMAGES = 2048
FRECHET_IMAGES = 64  # with fewer the distance is not measured: it would say nothing


class AutoencoderObjective:
    """Reconstruction, regulariser, perceptual and adversarial terms; `Objective` says what each member is."""

    kind = "autoencoder"
    main_network = "autoencoder"
    monitored = "rec_loss"  # the adversarial terms may rise

    def __init__(self, config: AutoencoderConfig, run: Path, dist: Distributed):
        self.config, self.run, self.dist = config, run, dist
        self.size = checks.image_size(config.data)
        dist.on_all_ranks(lambda: checks.check_autoencoder(config, dist.world_size))
        self.perceptual = None
        if config.loss.perceptual_weight > 0 or config.loss.perceptual:  # a file with weight 0: measured only
            perceptual = dist.on_all_ranks(lambda: perceptual_net(config.loss.perceptual)).to(dist.device)
            dist.on_all_ranks(lambda: perceptual.check_size(self.size))
            self.perceptual = perceptual
        self.rows, self.validation, self.bad = open_data(config, dist, self.size)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(rng.key(config.train.seed, "init"))
            self.autoencoder = Autoencoder(config.autoencoder)
            self.networks: dict[str, torch.nn.Module] = {"autoencoder": self.autoencoder}
            if config.loss.disc_weight > 0:
                loss = config.loss
                self.networks["discriminator"] = PatchDiscriminator(3, loss.disc_channels, loss.disc_layers)
        self.latent_shape = self.autoencoder.latent_shape(*self.size)
        codes = config.autoencoder.codebook_size if self.autoencoder.is_vq else 0
        self.used_codes = torch.zeros(codes, dtype=torch.bool, device=dist.device)
        self._last_vectors: Tensor | None = None

    def describe(self) -> str:
        """The first line of a training."""
        s = self.config.autoencoder
        count = sum(p.numel() for p in self.autoencoder.parameters())
        reg = f"VQ, {s.codebook_size} codes" if s.reg == "vq" else "KL"
        return (
            f"{s.family} autoencoder, f = {s.f}, {reg}, {count / 1e6:.2f} M parameters, "
            f"{self.size[0]}x{self.size[1]} px, latents {'x'.join(map(str, self.latent_shape))}"
        )

    def validation_note(self) -> str:
        """What a validation of this run leaves out because the run is short; "" = nothing."""
        train = self.config.train
        usual = min(train.eval_images, len(self.validation))
        count = train.measured_images(usual)
        if count == usual:
            return ""
        without = ", without the Fréchet distance" if train.eval_frechet and count < FRECHET_IMAGES <= usual else ""
        return f"a short run: validation on {count} of {usual} images{without}"

    def parents(self) -> list[dict[str, str]]:
        """None: an autoencoder builds on no run."""
        return []

    def activation_bytes(self) -> float:
        """Bytes that one image takes in a step: what is kept for the backward passes."""
        found = cost.autoencoder_costs(self.config, self.size).values()
        return cost.kept_bytes(found, self.dist.dtype, self.dist.device)

    def learning_rate(self, phase: str) -> float | None:
        """A rate of its own for a phase, None for train.lr."""
        return (self.config.loss.disc_lr or None) if phase == "discriminator" else None

    def in_ema(self, name: str) -> bool:
        """All parameters are averaged."""
        return True

    def init_weights(self) -> dict[str, Tensor]:
        """None: an autoencoder begins with weights of its own."""
        return {}

    def initial_statistics(self) -> None:
        """None: latent statistics are those of the trained encoder."""

    def phases(self, step: int) -> tuple[str, ...]:
        """Networks that step `step` updates, in order."""
        if "discriminator" in self.networks and disc_factor(step, self.config.loss) > 0:
            return ("autoencoder", "discriminator")
        return ("autoencoder",)

    def batch(self, step: int) -> dict[str, Tensor]:
        """This process's share of the rows of a step, on the CPU."""
        train, dist = self.config.train, self.dist
        mine = rank_slice(train.batch_at(step)[1], dist.rank, dist.world_size)
        ids, where = batch_indices(self.rows, self.config, step, mine)
        out = {
            "pixels": load_pixels(self.rows, self.config, ids, where, self.size),
            "row": torch.from_numpy(ids.copy()),
        }
        for phase in self.phases(step) if not self.autoencoder.is_vq else ():
            out[f"noise.{phase}"] = rng.normal(train.seed, where.tolist(), self.latent_shape, "posterior", phase)
        return out

    def loss(self, phase: str, networks: dict, batch: dict[str, Tensor], step: int, norms: bool):
        """(mean loss of a micro-batch, statistics). `networks` are the wrapped ones."""
        x = pixels_to_tensor(batch["pixels"], self.dist.device)
        noise = batch.get(f"noise.{phase}")
        if noise is not None:
            noise = noise.to(x.device)
        if phase == "discriminator":
            with torch.no_grad():
                fake = networks["autoencoder"](x, noise).reconstruction
            real, made = networks["discriminator"](x), networks["discriminator"](fake.detach())
            loss = discriminator_loss(real, made, self.config.loss.gan)
            return loss, {
                "disc_loss": loss.detach(),
                "logits_real": real.mean().detach(),
                "logits_fake": made.mean().detach(),
            }
        found = networks["autoencoder"](x, noise)
        regulariser = found.codebook_loss if self.autoencoder.is_vq else self.autoencoder.kl(found.moments)
        adversary = None
        if len(self.phases(step)) > 1:
            adversary = Adversary(logits_fake=self.networks["discriminator"](found.reconstruction))
        total, stats = generator_loss(
            self.config.autoencoder.reg,
            x,
            found.reconstruction,
            regulariser,
            self.config.loss,
            last_layer=self.autoencoder.last_layer,
            perceptual=self.perceptual,
            adversary=adversary,
            norms=norms,
        )
        if found.indices is not None and self.autoencoder.training:
            self.used_codes.index_fill_(0, found.indices.flatten(), True)
            self._last_vectors = found.moments.detach()
        if found.indices is not None and norms:
            stats |= codebook_stats(found.indices, self.config.autoencoder.codebook_size)
        return total, stats

    def after_update(self, step: int) -> dict[str, Tensor]:
        """Codes unused for `revive_codes` steps are set to random vectors of the encoder from this batch."""
        every = self.config.autoencoder.revive_codes
        if not every or (step + 1) % every or self._last_vectors is None:
            return {}
        used, vectors = self.used_codes.float(), self._last_vectors
        vectors = vectors.permute(0, 2, 3, 1).reshape(-1, self.config.autoencoder.embed_dim).float().contiguous()
        if self.dist.world_size > 1:
            torch.distributed.all_reduce(used, op=torch.distributed.ReduceOp.MAX)
            torch.distributed.broadcast(vectors, src=0)
        dead = (used == 0) & vectors.isfinite().all()  # a step that was refused may have given NaN
        weight, random = (
            self.autoencoder.quantize.embedding.weight,
            rng.generator(self.config.train.seed, "revive", step),
        )
        with torch.no_grad():
            weight.copy_(restart_dead_codes(weight, dead, vectors, random))
        self.used_codes.zero_()
        return {"revived": dead.sum()}

    def extra_state(self) -> dict[str, Tensor]:
        """State beside weights and optimisers."""
        return {"used_codes": self.used_codes.to(torch.uint8)} if len(self.used_codes) else {}

    def load_extra_state(self, tensors: dict[str, Tensor]) -> None:
        """Inverse of `extra_state`."""
        if len(self.used_codes):
            self.used_codes = tensors["used_codes"].bool().to(self.dist.device)

    def _validation_pixels(self, count: int) -> list[np.ndarray]:
        ids = evenly_spaced(len(self.validation), min(count, len(self.validation)))
        return [self.validation.pixels(i, self.size, "center", (0.5, 0.5)) for i in ids]

    @torch.no_grad()
    def evaluate(self, stopped: Callable[[], bool]) -> dict[str, float]:
        """PSNR (dB), SSIM, perceptual and Frechet distance on `train.measured_images` validation rows."""
        train = self.config.train
        pixels = self._validation_pixels(train.measured_images(train.eval_images))
        rebuilt: list[np.ndarray] = []
        mine = rank_slice(len(pixels), self.dist.rank, self.dist.world_size)
        for start in range(mine.start, mine.stop, 16):
            x = pixels_to_tensor(
                torch.from_numpy(np.stack(pixels[start : min(start + 16, mine.stop)])), self.dist.device
            )
            with self.dist.autocast():
                rebuilt.append(tensor_to_pixels(self.autoencoder(x).reconstruction, finite=False))
        parts = self.dist.gather(np.concatenate(rebuilt) if rebuilt else np.zeros((0, *pixels[0].shape), np.uint8))
        made = np.concatenate(parts)

        def measure() -> dict[str, float]:
            extractor = (
                open_extractor(train.eval_features or None)
                if train.eval_frechet and len(pixels) >= FRECHET_IMAGES
                else None
            )
            for judge in judges_among(self._teachers(), [extractor] if extractor else [], None):
                console.warn_once(judge.key, judge.warning())
            return reconstruction_metrics(np.stack(pixels), made, self.perceptual, extractor)

        return self.dist.on_rank_0(measure)

    @torch.no_grad()
    def preview(self, path: Path) -> None:
        """Images above their reconstructions, from fixed validation rows."""
        pixels = np.stack(self._validation_pixels(16))
        x = pixels_to_tensor(torch.from_numpy(pixels), self.dist.device)
        rebuilt = tensor_to_pixels(self.autoencoder(x).reconstruction, finite=False)
        half = -(-len(pixels) // 2)
        rows = []
        for part in (slice(0, half), slice(half, len(pixels))):
            rows += [list(pixels[part]), list(rebuilt[part])]
        save_grid(path, rows)

    @torch.no_grad()
    def run_statistics(self) -> dict[str, Any]:
        """stats.json: mean and spread of the latents over up to 2,048 training images, for whoever uses the run."""
        planned = self.config.train.batch_at(self.config.train.steps)[0]
        count = min(SCALE_IMAGES, len(self.rows), max(256, planned))

        def encode(ids: list[int]) -> Tensor:
            pixels = np.stack([self.rows.pixels(i, self.size, "center", (0.5, 0.5)) for i in ids])
            with self.dist.autocast():
                return self.autoencoder.moments(pixels_to_tensor(torch.from_numpy(pixels), self.dist.device))

        deterministic = self.autoencoder.is_vq
        scale = measure_latent_scale(
            encode, len(self.rows), count, deterministic=deterministic, kind="per_channel", batch=32
        )
        return {
            "latent_scale": {"kind": "per_channel", "mean": list(scale.mean), "std": list(scale.std), "images": count},
            "latent_shape": list(self.latent_shape),
            "size": list(self.size),
        }

    def _teachers(self) -> list[Teacher]:
        """Networks in the loss."""
        if self.perceptual is None or not self.config.loss.perceptual_weight:
            return []
        return [Teacher(**self.perceptual.identity, where="loss.perceptual")]

    def save_inference_files(self, weights: dict[str, Tensor], metadata: dict[str, str], stats: dict[str, Any]) -> None:
        """Writes what use needs: weights and statistics.

        The weights carry the scale of their latents: a kill between the two files must not pair it with others.
        """
        files.write_json(self.run / "stats.json", stats)
        teachers = json.dumps([vars(one) for one in self._teachers()])
        metadata = metadata | {"latent_scale": json.dumps(stats["latent_scale"]), TEACHERS: teachers}
        files.save_tensors(self.run / "model.safetensors", weights, metadata)
