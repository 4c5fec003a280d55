"""Which rows a step takes, and how each is cropped and flipped: functions of (seed, position) alone."""

import numpy as np
import torch
from torch import Tensor

from ldmcli.data.batches import epoch_positions
from ldmcli.maths import rng


def batch_indices(rows, config, step: int, mine: slice) -> tuple[np.ndarray, np.ndarray]:
    """(row ids, global positions) of one process's share of a step. A stream's rows are its positions."""
    start, count = config.train.batch_at(step)
    ids, where = epoch_positions(start, count, len(rows), config.train.seed)
    return (where if config.data.streaming else ids)[mine], where[mine]


def crop_and_flip(rows, config, ids, where: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How rows `ids` are seen at positions `where`: (n, 2) or (n, 3) for the crop (shares down and across, and zoom
    where crops are of several sizes), and mirrored (n,)."""
    seed, data, at = config.train.seed, config.data, where.tolist()
    u, mirrored = np.full((len(at), 2), 0.5), np.zeros(len(at), bool)
    if data.crop == "random" and data.caches_latents:
        views = cached_views(config, where)
        u = np.array([cached_crops(data, rows.content_hash(int(i)))[view] for i, view in zip(ids, views)])
    elif data.crop == "random":
        u = _random_crops(data, seed, at)
    if data.flip:
        mirrored = (rng.uniform(seed, at, "flip") < 0.5).numpy()
    return u, mirrored


def _random_crops(data, seed: int, at: list[int], *path: str) -> np.ndarray:
    u = np.stack([rng.uniform(seed, at, axis, *path).numpy() for axis in ("crop-y", "crop-x")], axis=1)
    if data.crop_min < 1:
        share = data.crop_min + (data.crop_max - data.crop_min) * rng.uniform(seed, at, "crop-size", *path).numpy()
        u = np.column_stack([u, 1 / share])
    return u


def cached_crops(data, content: str) -> np.ndarray:
    """(v, 2) or (v, 3): where the cache of latents cuts a picture. Random crops depend on its hash `content` alone, so
    that all runs share them."""
    if data.crop == "center":
        return np.full((1, 2), 0.5)
    return _random_crops(data, 0, list(range(data.cache_views)), "cached", content)


def cached_views(config, where: np.ndarray) -> np.ndarray:
    """Which of the cached crops rows are seen in at positions `where`, int64 (n,)."""
    count = config.data.cache_views if config.data.crop == "random" else 1
    if count == 1:
        return np.zeros(len(where), np.int64)
    return (rng.uniform(config.train.seed, where.tolist(), "view").numpy() * count).astype(np.int64)


def load_pixels(rows, config, ids: np.ndarray, where: np.ndarray, size: tuple[int, int]) -> Tensor:
    """uint8 (n, H, W, 3) of rows `ids`; crop and flip depend on the global positions `where`."""
    u, mirrored = crop_and_flip(rows, config, ids, where)
    out = np.stack([rows.pixels(int(i), size, config.data.crop, tuple(place)) for i, place in zip(ids, u)])
    out[mirrored] = out[mirrored][:, :, ::-1]
    return torch.from_numpy(out)
