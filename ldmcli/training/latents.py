"""Latents of pictures in a frozen first stage (Sec. 3.1, 3.3), and the scale that normalises them (App. G)."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldmcli.core import console
from ldmcli.core.launch import local_processes
from ldmcli.core.settings import DataSettings, TrainSettings
from ldmcli.data import cache
from ldmcli.data.augment import cached_crops, cached_views, load_pixels
from ldmcli.data.cache import LatentCache, cache_key, cache_root, dealt
from ldmcli.data.decode import BadImage, to_size
from ldmcli.data.readers import memory_bytes
from ldmcli.data.rows import WORKERS, parallel_map
from ldmcli.data.sources import bad_maps
from ldmcli.formats.run_folder import read_scale
from ldmcli.maths import philox, rng
from ldmcli.maths.pixels import pixels_to_tensor
from ldmcli.networks.autoencoder import posterior_sample, posterior_second_moments
from ldmcli.networks.latent_scale import LatentScale
from ldmcli.sampling.first_stage import LoadedAutoencoder
from ldmcli.sampling.memory import peak_bytes
from ldmcli.training.cost import certainly_fits
from ldmcli.training.data import share_hashes
from ldmcli.training.distributed import Distributed

CACHED_SCALE_ROWS, SCALE_ROWS = 10_000, 512  # rows that the scale is measured on, with and without a cache
ENCODED = 64  # pictures that are encoded at a time, at most
LATE_SECONDS = 60.0  # after which a network's file system lists what other machines wrote


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
        self._unsealed: LatentCache | None = None  # filled, but whose rows are not known yet
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

    def fill_cache(self, rows: Any, check: Callable[[], None]) -> list[BadImage] | None:
        """Decodes and encodes what the cache lacks of `rows`, each process its part of what none of them found there;
        the errors of pictures that can't be decoded, in order. None where nothing is cached: latents are not to be, or
        some process has no folder for them. check: called between batches, may raise. Collective."""
        root = cache_root(self.data.cache_dir) if self.data.caches_latents else None
        if not all(self.dist.gather(root is not None)) or root is None:
            return None
        data, dist = self.data, self.dist
        share_hashes(rows, dist)
        shape = (self.shape[0] * (1 if self.deterministic else 2), *self.shape[1:])
        how = [f"{self.size}", data.resize, data.background, data.cache_dtype, f"flips {data.flip}", dist.precision]
        how += [f"{data.max_pixels} px at most", f"crops {data.cache_views} {data.crop_min} {data.crop_max}"]
        folder = root / "latents" / cache_key(self.autoencoder.fingerprint, *how)
        keys = [_key(rows, i) for i in range(len(rows))]
        views = (data.cache_views or 1) * (1 + data.flip)
        store = self._unsealed = LatentCache(folder, keys, shape, data.cache_dtype, views)
        dist.on_all_ranks(store.refresh)
        todo = dealt(dist.gather(store.missing()), dist.rank)
        bad: list[BadImage] = []
        with console.progress(len(todo), "encoding latents") if todo else nullcontext() as bar:
            encoded = self._encoded(rows, todo, bad, check, bar.advance if bar else lambda n: None)
            dist.on_all_ranks(lambda: store.build(len(todo), encoded))
        if not todo and dist.is_rank_0:  # which has the largest part
            console.say(f"latents: all {len(rows)} found in the cache")
        maps = bad_maps(rows, range(dist.rank, len(rows), dist.world_size), data.workers)
        found = _with_copies(rows, keys, sum(dist.gather(bad), []))
        for error in sum(dist.gather(maps), []):
            found.setdefault(error.index, error)
        return [found[i] for i in sorted(found)]

    def _encoded(
        self, rows: Any, todo: list[int], bad: list[BadImage], check: Callable[[], None], advance: Callable[[int], None]
    ) -> Iterator[tuple[list[int], np.ndarray]]:
        """Rows and moments of all their views, batch by batch; pictures are decoded while others are encoded. What
        can't be decoded is added to `bad`."""
        batch = self._batch_size()
        ids: list[int] = []
        pixels: list[np.ndarray] = []

        def encoded() -> tuple[list[int], np.ndarray]:
            check()
            found = list(ids), self.encode_views(np.stack(pixels))
            ids.clear()
            pixels.clear()
            advance(len(found[0]))
            return found

        look = partial(_views_or_error, rows, self.data, self.size)
        for i, seen in zip(todo, parallel_map(look, todo, self.data.workers or WORKERS, ahead=2 * batch)):
            if isinstance(seen, BadImage):
                bad.append(seen)
            if isinstance(seen, BadImage) or bad and not self.data.skip_bad:
                continue  # with bad ones, all of them are looked for, and nothing else
            ids.append(i)
            pixels.append(seen)
            if len(ids) == batch:
                yield encoded()
        if ids:
            yield encoded()

    def _batch_size(self) -> int:
        """Pictures that are encoded at a time: as many as a quarter of the memory holds, a shard or 64 at most."""
        network, most, room = self.autoencoder.network, min(ENCODED, cache.SHARD_ROWS), self._memory() / 4
        if network.is_identity or certainly_fits(most, self.size, room):
            return most
        return int(min(most, max(1, room // peak_bytes(network.encoder, (1, 3, *self.size)))))

    def _memory(self) -> float:
        """Bytes of the GPU, or of this process's part of the machine. Not the free ones: batches are to be alike."""
        if self.dist.device.type == "cuda":
            return torch.cuda.mem_get_info(self.dist.device)[1]
        return memory_bytes() / local_processes()

    def open_cache(self, rows: Any) -> None:
        """Takes latents of `rows`, which are some of those that the cache was filled with, from there; without a cache
        from the encoder. Collective."""
        if self._unsealed is None:
            return
        store, patience = self._unsealed, LATE_SECONDS if self.dist.world_size > 1 else 0
        store.keys = [rows.content_hash(i) for i in range(len(rows))]
        self.dist.on_all_ranks(lambda: store.seal(patience))
        self.cache = store

    def fit_scale(self, rows: Any, kind: str, stored: dict[str, Any]) -> None:
        """Takes the scale from `stored`, stats.json of an earlier start of this run, or measures it on `rows`. Raises
        ModelError for that of a model whose first stage is missing."""
        if stored:
            self.scale, self.scale_images = read_scale(stored, self.shape[0]), stored["latent_scale"].get("images")
            self.autoencoder_in_use.check_channels()
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
        """Moments of the middles of rows, float32 (B, 1 or 2, C, h, w): as they are and, with data.flip, mirrored."""
        return self._oriented(np.stack([rows.pixels(i, self.size, "center", (0.5, 0.5)) for i in ids]))

    def encode_views(self, pixels: np.ndarray) -> np.ndarray:
        """Moments of uint8 (B, v, H, W, 3), float32 (B, v or 2 v, C, h, w): each view, and with data.flip mirrored."""
        return np.concatenate([self._oriented(pixels[:, view]) for view in range(pixels.shape[1])], axis=1)

    @torch.no_grad()
    def _oriented(self, pixels: np.ndarray) -> np.ndarray:
        mirrored = [np.ascontiguousarray(pixels[:, :, ::-1])] if self.data.flip else []
        with self.dist.autocast():
            found = [
                self.moments(torch.from_numpy(one)).cpu().numpy() for one in [np.ascontiguousarray(pixels), *mirrored]
            ]
        return np.stack(found, axis=1)

    def batch(self, rows: Any, config: Any, ids: np.ndarray, where: np.ndarray) -> dict[str, Tensor]:
        """What latents of rows `ids` at the positions `where` of a training are sampled from, on the CPU: moments of
        the cache, else pixels, and noise of the posterior. Each number depends on (seed, position) alone."""
        seed, at = config.train.seed, where.tolist()
        out = {} if self.deterministic else {"posterior": self.noise(config.train, at, "posterior")}
        if not self.cache:
            return {**out, "pixels": load_pixels(rows, config, ids, where, self.size)}
        views = cached_views(config, where)
        if self.data.flip:
            views = 2 * views + (rng.uniform(seed, at, "flip") < 0.5).numpy()
        return {**out, "moments": torch.from_numpy(self.cache.moments(ids.tolist(), views.tolist()))}

    def of_batch(self, batch: dict[str, Tensor]) -> Tensor:
        """Normalised latents (B, c, h, w) of what `batch` gave, on the device."""
        device, noise = self.dist.device, batch.get("posterior")
        moments = batch["moments"].to(device) if "moments" in batch else self.moments(batch["pixels"])
        return self.sample(moments, None if noise is None else self.noise_of(noise))

    def noise(self, train: TrainSettings, at: list[int], purpose: str) -> Tensor:
        """Noise for the positions `at` of a training: (B, c, h, w), or with train.noise = "device" the keys (B,) that
        `noise_of` makes it of."""
        if train.noise == "device":
            return philox.keys(train.seed, at, purpose)
        return rng.normal(train.seed, at, self.shape, purpose)

    def noise_of(self, given: Tensor) -> Tensor:
        """Noise (B, c, h, w) on the device, of what `noise` gave."""
        given = given.to(self.dist.device)
        return given if given.is_floating_point() else philox.normal(given, self.shape)

    def sample(self, moments: Tensor, noise: Tensor | None) -> Tensor:
        """Normalised latents (B, c, h, w) sampled from moments with `noise` of that shape; without it their modes."""
        return self.scale.normalise(moments if self.deterministic else posterior_sample(moments, noise))

    def modes(self, rows: Any) -> Tensor:
        """Normalised latents (B, c, h, w) of rows, without noise, on the CPU. Each is encoded by a process that has its
        picture in memory, where one has. Collective."""
        count, world = len(rows), self.dist.world_size
        held = np.array(self.dist.gather([rows.holds(i) for i in range(count)]))
        owner = np.where(held.any(0), held.argmax(0), np.arange(count) % world)
        shares = [np.flatnonzero(owner == rank) for rank in range(world)]
        ids = shares[self.dist.rank].tolist()

        def own() -> list[np.ndarray]:
            return [self.encode_rows(rows, ids[i : i + 32])[:, 0] for i in range(0, len(ids), 32)]

        found = np.concatenate(sum(self.dist.gather(self.dist.on_all_ranks(own)), []))
        return self.sample(torch.from_numpy(found[np.argsort(np.concatenate(shares))]), None)


def _key(rows: Any, i: int) -> str:
    try:
        return rows.content_hash(i)
    except BadImage:  # it can't be read: no other is like it
        return f"unreadable {i}"


def _views_or_error(rows: Any, data: DataSettings, size: tuple[int, int], i: int) -> np.ndarray | BadImage:
    """uint8 (v, H, W, 3): a row's picture as the cache has it."""
    try:
        picture = rows.image(i)
    except BadImage as error:
        error.index = i
        return error
    crops = cached_crops(data, rows.content_hash(i))
    return np.stack([to_size(picture, size, "random", data.resize, u) for u in crops])


def _with_copies(rows: Any, keys: list[str], bad: list[BadImage]) -> dict[int, BadImage]:
    """Errors by row; also of rows whose bytes are those of a bad one, which was tried for all of them."""
    found, reasons = {error.index: error for error in bad}, {keys[error.index]: error.reason for error in bad}
    for i in [i for i, key in enumerate(keys) if key in reasons and i not in found]:
        found[i] = BadImage(rows.name(i), reasons[keys[i]])
        found[i].index = i
    return found
