"""Latents of pictures in a frozen first stage (Sec. 3.1, 3.3), and the scale that normalises them (App. G)."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldmcli.core import console
from ldmcli.core.settings import DataSettings
from ldmcli.data.augment import load_pixels
from ldmcli.data.cache import LatentCache, cache_key, cache_root
from ldmcli.formats.run_folder import read_scale
from ldmcli.maths import rng
from ldmcli.maths.pixels import pixels_to_tensor
from ldmcli.networks.autoencoder import posterior_sample, posterior_second_moments
from ldmcli.networks.latent_scale import LatentScale
from ldmcli.sampling.first_stage import LoadedAutoencoder
from ldmcli.training.distributed import Distributed

CACHED_SCALE_ROWS, SCALE_ROWS = 10_000, 512  # rows that the scale is measured on, with and without a cache


def measure_latent_scale(
    encode: Callable[[list[int]], Tensor], rows: int, count: int, *, deterministic: bool, kind: str, batch: int
) -> LatentScale:
    """Mean and standard deviation of latents over `count` of `rows` rows, evenly spread, `batch` at a time.

    encode: row numbers → posterior moments (B, 2c, h, w), or latents (B, c, h, w) where `deterministic`. kind:
    per_channel | global | none.
    """
    picked = np.linspace(0, rows - 1, count).round().astype(int)
    total = square = torch.zeros((), dtype=torch.float64)
    pixels = 0
    for start in range(0, count, batch):
        # float64 on the host: not every device has it
        moments = encode(picked[start : start + batch].tolist()).cpu().double()
        first, second = posterior_second_moments(moments, deterministic)
        total, square = total + first, square + second
        pixels += moments[0, 0].numel() * len(moments)
    return LatentScale.measured(total / pixels, square / pixels - (total / pixels) ** 2, kind)


class LatentStore:
    """Moments from a cache or from the encoder, and normalised latents sampled from them.

    Moments are (B, 2c, h, w): mean and log variance of the posterior. Of stages without one (`deterministic`: VQ, and
    pixels) they are the latents themselves, (B, c, h, w).
    """

    def __init__(self, autoencoder: LoadedAutoencoder, data: DataSettings, dist: Distributed, size: tuple[int, int]):
        network = autoencoder.network
        self.autoencoder, self.data, self.dist, self.size = autoencoder, data, dist, size
        self.shape: tuple[int, int, int] = network.latent_shape(*size)
        self.deterministic: bool = network.is_vq or network.is_identity
        self.cache: LatentCache | None = None
        self.scale = LatentScale.identity(self.shape[0])
        self.scale_images: int | None = None  # that the scale was measured on; None = not known

    @property
    def autoencoder_in_use(self) -> LoadedAutoencoder:
        """The first stage with the latents' scale."""
        first = self.autoencoder
        found = LoadedAutoencoder(first.network, self.scale, first.fingerprint, first.config, first.place)
        found.trained_against = first.trained_against
        return found

    def statistics(self, kind: str) -> dict[str, Any]:
        """What stats.json says of them. kind: diffusion.latent_scale."""
        mean, std = list(self.scale.mean), list(self.scale.std)
        return {
            "latent_scale": {"kind": kind, "mean": mean, "std": std, "images": self.scale_images},
            "latent_shape": list(self.shape),
            "size": list(self.size),
        }

    def open_cache(self, rows: Any, check: Callable[[], None]) -> None:
        """Encodes what the cache lacks of `rows`, each process its part. check: called between batches, may raise.

        Without a folder for the cache on some process nothing is cached on any.
        """
        root = cache_root(self.data.cache_dir)
        everywhere = all(self.dist.gather(root is not None))
        if root is not None and everywhere:
            self.cache = self._build_cache(rows, root, check)

    def _build_cache(self, rows: Any, root: Path, check: Callable[[], None]) -> LatentCache:
        data, dist = self.data, self.dist
        shape = (self.shape[0] * (1 if self.deterministic else 2), *self.shape[1:])
        how = (f"{self.size}", data.resize, data.background, data.cache_dtype, f"flips {data.flip}")
        folder = root / "latents" / cache_key(self.autoencoder.fingerprint, *how)
        keys = [rows.content_hash(i) for i in range(len(rows))]
        cache = LatentCache(folder, keys, shape, data.cache_dtype, 1 + data.flip)
        cache.refresh()
        todo = len(cache.missing(dist.rank, dist.world_size))
        # every process enters, also one that finds its share done: another may not
        with console.progress(todo, "encoding latents") if todo else nullcontext() as bar:
            dist.on_all_ranks(
                lambda: cache.build(
                    lambda ids: self.encode_rows(rows, ids),
                    rank=dist.rank,
                    world=dist.world_size,
                    advance=bar.advance if bar else lambda n: None,
                    check=check,
                )
            )
        if not todo and dist.is_rank_0:
            console.say(f"latents: all {len(rows)} found in the cache")
        dist.on_all_ranks(cache.seal)
        return cache

    def fit_scale(self, rows: Any, kind: str, stored: dict[str, Any]) -> None:
        """Takes the scale from `stored`, stats.json of an earlier start of this run, or measures it on `rows`."""
        if stored:
            self.scale, self.scale_images = read_scale(stored, self.shape[0]), stored["latent_scale"].get("images")
            return
        count = self.scale_images = min(len(rows), CACHED_SCALE_ROWS if self.cache else SCALE_ROWS)

        def encode(ids: list[int]) -> Tensor:
            return torch.from_numpy(self.cache.moments(ids) if self.cache else self.encode_rows(rows, ids)[:, 0])

        self.scale = self.dist.on_rank_0(
            lambda: measure_latent_scale(
                encode, len(rows), count, deterministic=self.deterministic, kind=kind, batch=64
            )
        )

    @torch.no_grad()
    def moments(self, pixels: Tensor) -> Tensor:
        """Moments of pixels uint8 (B, H, W, 3), float32, on the device, in the caller's autocast."""
        return self.autoencoder.network.moments(pixels_to_tensor(pixels, self.dist.device)).float()

    def encode_rows(self, rows: Any, ids: list[int]) -> np.ndarray:
        """Moments of rows, float32 (B, 1 or 2, C, h, w): as they are and, with data.flip, mirrored."""
        pixels = np.stack([rows.pixels(i, self.size, "center", (0.5, 0.5)) for i in ids])
        orientations = (pixels, np.ascontiguousarray(pixels[:, :, ::-1])) if self.data.flip else (pixels,)
        with self.dist.autocast():
            return np.stack(
                [self.moments(torch.from_numpy(oriented)).cpu().numpy() for oriented in orientations], axis=1
            )

    def batch(self, rows: Any, config: Any, ids: np.ndarray, where: np.ndarray) -> dict[str, Tensor]:
        """What latents of rows `ids` at the positions `where` of a training are sampled from, on the CPU: moments of
        the cache, else pixels, and noise of the posterior. Each number depends on (seed, position) alone."""
        seed, at = config.train.seed, where.tolist()
        out = {} if self.deterministic else {"posterior": rng.normal(seed, at, self.shape, "posterior")}
        if not self.cache:
            return {**out, "pixels": load_pixels(rows, config, ids, where, self.size)}
        flips = (rng.uniform(seed, at, "flip") < 0.5).tolist() if self.data.flip else None
        return {**out, "moments": torch.from_numpy(self.cache.moments(ids.tolist(), flips))}

    def of_batch(self, batch: dict[str, Tensor]) -> Tensor:
        """Normalised latents (B, c, h, w) of what `batch` gave, on the device."""
        device, noise = self.dist.device, batch.get("posterior")
        moments = batch["moments"].to(device) if "moments" in batch else self.moments(batch["pixels"])
        return self.sample(moments, None if noise is None else noise.to(device))

    def sample(self, moments: Tensor, noise: Tensor | None) -> Tensor:
        """Normalised latents (B, c, h, w) sampled from moments with `noise` of that shape; without it their modes."""
        return self.scale.normalise(moments if self.deterministic else posterior_sample(moments, noise))

    def modes(self, rows: Any, count: int) -> Tensor:
        """Normalised latents (count, c, h, w) of the first rows, without noise, on the CPU. Encoded on rank 0."""
        ids = list(range(count))
        found = self.dist.on_rank_0(
            lambda: np.concatenate([self.encode_rows(rows, ids[i : i + 32])[:, 0] for i in range(0, count, 32)])
        )
        return self.sample(torch.from_numpy(found), None)
