"""Devices, processes and limits of the machine: what a GPU, an Apple GPU, a cluster or a small limit would end."""

import json
import os
import resource
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tiny
from processes import ranks

from ldmcli.core.errors import ResourceError
from ldmcli.data.cache import LatentCache

# --- a control group beside that of gradients ------------------------------------------------------------------

LOOP = ("--data", "shapes", "--limit", 10, "--size", "16x16", "--log-every", 1, "--sample-every", 0, "--eval-every", 0,
        "--mixed-precision", "no", "--set", "train.cooldown=0", "--batch-size", 4, "-q")  # fmt: skip
PHASE, TIMEOUT = 6.0, 3.0  # seconds


class Slow:
    """Makes one process slow in its process: at a phase of its own, at a batch, or between two backward passes."""

    def __init__(self, where: str, seconds: float = PHASE):
        self.where, self.seconds = where, seconds

    def __call__(self) -> None:
        from ldmcli.drivers.objective_ae import AutoencoderObjective
        from ldmcli.drivers.train import Training

        owner, name = {"phase": (Training, "_write_weights"), "batch": (AutoencoderObjective, "batch"),
                       "backward": (AutoencoderObjective, "loss")}[self.where]  # fmt: skip
        function, seconds, seen = getattr(owner, name), self.seconds, []

        def slow(this, *args):
            if this.context.rank == (0 if name == "_write_weights" else 1) and not seen:
                seen.append(time.sleep(seconds))
            return function(this, *args)

        setattr(owner, name, slow)


@pytest.mark.parametrize("where", ["phase", "batch"])
def test_a_phase_of_one_process_may_last_longer_than_gradients_wait(where, tmp_path):
    line = ("train-ae", *tiny.AE_NETWORK, *LOOP, "--steps", 2, "--out", tmp_path / "run",
            "--set", f"train.gradient_timeout={TIMEOUT}")  # fmt: skip
    both = ranks(tmp_path, 2, *line, before=Slow(where))
    assert [command.wait() for command in both] == [0, 0], both[0].stderr + both[1].stderr
    assert tiny.state(tmp_path / "run")["step"] == 2


def test_gradients_wait_as_long_as_they_were_told(tmp_path):
    line = ("train-ae", *tiny.AE_NETWORK, *LOOP, "--steps", 2, "--out", tmp_path / "run",
            "--set", f"train.gradient_timeout={TIMEOUT}")  # fmt: skip
    both = ranks(tmp_path, 2, *line, before=Slow("backward"))
    assert [command.wait() for command in both] == [6, 6], both[0].stderr + both[1].stderr
    assert "train.gradient_timeout" in both[0].stderr and "Traceback" not in both[0].stderr


# --- more shards than open files ---------------------------------------------------------------------------------


def shards_of(folder: Path, count: int, rows: int = 2) -> list[str]:
    """`count` shards of `rows` rows (1 channel, 1x2, as is and mirrored) as `LatentCache` writes them; their keys."""
    folder.mkdir()
    numbers = np.arange(count * rows * 4, dtype=np.float32).reshape(count, rows, 2, 1, 1, 2)
    for k, shard in enumerate(numbers):
        np.save(folder / f"{k:04d}.npy", shard)
        (folder / f"{k:04d}.json").write_text(json.dumps([f"row {k * rows + row}" for row in range(rows)]))
    return [f"row {k}" for k in range(count * rows)]


def no_encoding(indices):
    raise AssertionError(f"{len(indices)} rows are encoded again")


@pytest.fixture
def few_files():
    """A function that sets the soft limit of open files; it is as it was afterwards."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield lambda limit: resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_cache_may_have_more_shards_than_a_process_open_files(tmp_path, few_files):
    keys = shards_of(tmp_path / "latents", 1200)
    few_files(256)
    cache = LatentCache(tmp_path / "latents", keys, (1, 1, 2), "float32", 2)
    assert cache.build(no_encoding) == 0
    cache.seal()
    order = np.random.default_rng(0).permutation(len(keys)).tolist()
    with ThreadPoolExecutor(4) as pool:  # as batches are made
        found = np.concatenate(list(pool.map(cache.moments, [order[i::8] for i in range(8)])))
    wanted = np.concatenate([order[i::8] for i in range(8)])
    assert (found[:, 0, 0, 0] == wanted * 4).all()
    assert (cache.moments([7], [True]) == [[[[30, 31]]]]).all()
    assert len(os.listdir("/proc/self/fd")) < 200


def test_no_file_left_is_not_taken_for_damage(tmp_path, few_files):
    keys = shards_of(tmp_path / "latents", 3)
    cache = LatentCache(tmp_path / "latents", keys, (1, 1, 2), "float32", 2)
    taken = []
    few_files(64)
    try:
        with pytest.raises(OSError):
            while True:
                taken.append(open(os.devnull))
        with pytest.raises(ResourceError, match="ulimit -n"):
            cache.build(no_encoding)
    finally:
        for file in taken:
            file.close()
    assert cache.build(no_encoding) == 0


def test_rows_that_another_process_wrote_elsewhere_are_an_error_of_ldm(tmp_path):
    keys = shards_of(tmp_path / "latents", 2)
    cache = LatentCache(tmp_path / "latents", [*keys, "of another"], (1, 1, 2), "float32", 2)
    with pytest.raises(ResourceError, match=r"1 of 5 latents.*LDM_CACHE"):
        cache.seal()


@pytest.mark.parametrize("harm", ["gone", "cut"])
def test_a_shard_that_goes_while_it_is_in_use_is_named(harm, tmp_path):
    keys = shards_of(tmp_path / "latents", 2)
    cache = LatentCache(tmp_path / "latents", keys, (1, 1, 2), "float32", 2)
    cache.seal()
    shard = tmp_path / "latents" / "0001.npy"
    shard.unlink() if harm == "gone" else os.truncate(shard, shard.stat().st_size - 8)
    cache.moments([0, 1])
    with pytest.raises(ResourceError, match="0001.npy"):
        cache.moments([3], [True])


def test_a_cut_shard_is_encoded_again(tmp_path):
    keys = shards_of(tmp_path / "latents", 2)
    os.truncate(tmp_path / "latents" / "0001.npy", 100)
    cache = LatentCache(tmp_path / "latents", keys, (1, 1, 2), "float32", 2)
    assert cache.build(lambda ids: np.full((len(ids), 2, 1, 1, 2), 5, np.float32)) == 2
    cache.seal()
    assert cache.moments([0, 2])[:, 0, 0, 0].tolist() == [0, 5]
