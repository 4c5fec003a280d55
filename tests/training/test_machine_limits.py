"""Several processes and the limits of a machine: waiting, open files, memory; and models that only these end."""

import json
import os
import resource
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from golden_cases import shared as golden
from processes import ranks

from ldmcli.core.errors import ResourceError
from ldmcli.data.cache import LatentCache
from ldmcli.networks.conditioners import train_vocabulary
from ldmcli.networks.layout import LayoutConditioner

# --- a control group beside that of gradients ------------------------------------------------------------------

LOOP = (
    "--data",
    "shapes",
    "--limit",
    10,
    "--size",
    "16x16",
    "--log-every",
    1,
    "--sample-every",
    0,
    "--eval-every",
    0,
    "--mixed-precision",
    "no",
    "--set",
    "train.cooldown=0",
    "--batch-size",
    4,
    "-q",
)
PHASE, TIMEOUT = 6.0, 3.0  # seconds


class Slow:
    """Makes one process slow in its process: at a phase of its own, at a batch, or between two backward passes."""

    def __init__(self, where: str, seconds: float = PHASE):
        self.where, self.seconds = where, seconds

    def __call__(self) -> None:
        from ldmcli.training.autoencoder import AutoencoderObjective
        from ldmcli.training.checkpoints import Checkpointer

        owner, name = {
            "phase": (Checkpointer, "_write_inference_files"),
            "batch": (AutoencoderObjective, "batch"),
            "backward": (AutoencoderObjective, "loss"),
        }[self.where]
        function, seconds, seen = getattr(owner, name), self.seconds, []

        def slow(this, *args):
            if this.dist.rank == (0 if owner is Checkpointer else 1) and not seen:
                seen.append(time.sleep(seconds))
            return function(this, *args)

        setattr(owner, name, slow)


@pytest.mark.parametrize("where", ["phase", "batch"])
def test_a_phase_of_one_process_may_last_longer_than_gradients_wait(where, tmp_path):
    line = (
        "train-ae",
        *tiny.AE_NETWORK,
        *LOOP,
        "--steps",
        2,
        "--out",
        tmp_path / "run",
        "--set",
        f"train.gradient_timeout={TIMEOUT}",
    )
    both = ranks(tmp_path, 2, *line, before=Slow(where))
    assert [command.wait() for command in both] == [0, 0], both[0].stderr + both[1].stderr
    assert tiny.state(tmp_path / "run")["step"] == 2


def test_gradients_wait_as_long_as_they_were_told(tmp_path):
    line = (
        "train-ae",
        *tiny.AE_NETWORK,
        *LOOP,
        "--steps",
        2,
        "--out",
        tmp_path / "run",
        "--set",
        f"train.gradient_timeout={TIMEOUT}",
    )
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


@pytest.fixture
def few_files():
    """A function that sets the soft limit of open files; it is as it was afterwards."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield lambda limit: resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_cache_may_have_more_shards_than_a_process_open_files(tmp_path, few_files):
    keys = shards_of(tmp_path / "latents", 1200)
    before = len(os.listdir("/proc/self/fd"))  # those of other tests, too, which may be hundreds
    limit = 2 * before + 200
    few_files(limit)
    cache = LatentCache(tmp_path / "latents", keys, (1, 1, 2), "float32", 2)
    cache.refresh()
    assert not cache.missing().any()
    cache.seal()
    order = np.random.default_rng(0).permutation(len(keys)).tolist()
    with ThreadPoolExecutor(4) as pool:  # as batches are made
        found = np.concatenate(list(pool.map(cache.moments, [order[i::8] for i in range(8)])))
    wanted = np.concatenate([order[i::8] for i in range(8)])
    assert (found[:, 0, 0, 0] == wanted * 4).all()
    assert (cache.moments([7], [True]) == [[[[30, 31]]]]).all()
    assert len(os.listdir("/proc/self/fd")) - before <= limit // 4 + 8


def test_no_file_left_is_not_taken_for_damage(tmp_path, few_files):
    keys = shards_of(tmp_path / "latents", 3)
    cache = LatentCache(tmp_path / "latents", keys, (1, 1, 2), "float32", 2)
    taken = []
    few_files(len(os.listdir("/dev/fd")) + 16)
    try:
        with pytest.raises(OSError):
            while True:
                taken.append(open(os.devnull))
        with pytest.raises(ResourceError, match="ulimit -n"):
            cache.refresh()
    finally:
        for file in taken:
            file.close()
    cache.refresh()
    assert not cache.missing().any()


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
    cache.refresh()
    assert np.flatnonzero(cache.missing()).tolist() == [2, 3]
    cache.build(2, [([2, 3], np.full((2, 2, 1, 1, 2), 5, np.float32))])
    cache.seal()
    assert cache.moments([0, 2])[:, 0, 0, 0].tolist() == [0, 5]


# --- a head that no forward pass uses ----------------------------------------------------------------------------


def heads_in_layouts() -> None:
    """Layout models as they come from a published checkpoint: with the head of their transformer."""
    learn = LayoutConditioner.learn
    LayoutConditioner.learn = staticmethod(lambda *given: {**learn(*given), "logits": True})


HEAD = "conditions.entries.{}.encoder.transformer.to_logits.weight"
ON_TWO = (
    "--data",
    "shapes",
    "--limit",
    20,
    "--size",
    "16x16",
    "--batch-size",
    4,
    "--steps",
    3,
    "--sample-every",
    0,
    "--eval-every",
    0,
    "--mixed-precision",
    "no",
    "--log-every",
    1,
    "-q",
)


def test_a_converted_text_model_is_fine_tuned_on_two_processes(tmp_path):
    tiny.train_ae(
        tmp_path / "ae",
        "--set",
        "autoencoder.embed_dim=4",
        "--set",
        "autoencoder.z_channels=4",
        "--set",
        "autoencoder.f=2",
        data=("--data", "shapes", "--limit", 20, "--size", "16x16"),
        steps=1,
    )
    train_vocabulary(["a red square", "two green circles"], 64, tmp_path / "words")
    source = golden("golden", "unet_text_bert", "model.safetensors")
    assert tiny.ldm("convert", source, tmp_path / "model", "--tokenizer", tmp_path / "words").code == 0
    model = ("--init-from", tmp_path / "model", "--recipe", tmp_path / "model" / "config.toml")
    both = ranks(
        tmp_path,
        2,
        "train-ldm",
        *model,
        "--autoencoder",
        tmp_path / "ae",
        *ON_TWO,
        "--set",
        f"data.cache_dir={tmp_path / 'cache'}",
        "--out",
        tmp_path / "run",
    )
    assert [command.wait() for command in both] == [0, 0], both[0].stderr + both[1].stderr
    before, after = tiny.weights(tmp_path / "model"), tiny.weights(tmp_path / "run")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert HEAD.format("text") in before and {n for n in before if "to_logits" not in n} == changed


def test_a_layout_model_with_a_head_is_trained_on_two_processes(tmp_path):
    tiny.train_ae(tmp_path / "ae", data=("--data", "shapes", "--limit", 20, "--size", "16x16"), steps=1)
    both = ranks(
        tmp_path,
        2,
        "train-ldm",
        "--autoencoder",
        tmp_path / "ae",
        *tiny.UNET,
        "--condition",
        "layout",
        *ON_TWO,
        "--set",
        f"data.cache_dir={tmp_path / 'cache'}",
        "--out",
        tmp_path / "run",
        before=heads_in_layouts,
    )
    assert [command.wait() for command in both] == [0, 0], both[0].stderr + both[1].stderr
    assert HEAD.format("layout") in tiny.weights(tmp_path / "run")


# --- memory of a machine that several processes share --------------------------------------------------------------

MEMORY = 8 << 20  # of which an eighth is for pictures


class Little:
    """A machine with `MEMORY` bytes; each process notes what it decoded and keeps when training begins and ends."""

    def __init__(self, folder: Path):
        self.folder = str(folder)

    def __call__(self) -> None:
        from ldmcli.data import rows
        from ldmcli.training.loop import Trainer

        decoded, hashed = [], []
        decode, sha256, start, finish = rows.decode, rows.hashlib.sha256, Trainer._start, Trainer._finish

        def counted(content, *, name, **limits):
            decoded.append(name)
            return decode(content, name=name, **limits)

        class Counting:
            @staticmethod
            def sha256(content=b""):
                hashed.append(len(content))
                return sha256(content)

        def note(this, when: str) -> None:
            kept = {id(part._kept): part._kept for part in (this.objective.rows, this.objective.validation)}
            size = sum(picture.nbytes for group in kept.values() for picture in group.values())
            maps = sum(found.nbytes for found in getattr(getattr(this.objective, "source", None), "_maps", {}).values())
            found = {"kept": size + maps, "decoded": len(decoded), "hashed": sum(n > 1000 for n in hashed)}
            Path(self.folder, f"{when}-{this.dist.rank}.json").write_text(json.dumps(found))

        def begins(this):
            note(this, "begin")
            start(this)

        def ends(this):
            note(this, "end")
            return finish(this)

        rows.decode, rows.memory_bytes, rows.hashlib = counted, lambda: MEMORY, Counting
        Trainer._start, Trainer._finish = begins, ends

    def told(self, when: str) -> list[dict]:
        return [json.loads(path.read_text()) for path in sorted(Path(self.folder).glob(f"{when}-*.json"))]


@pytest.mark.parametrize("trainer", ["train-ae", "train-ldm"])
def test_four_processes_share_the_memory_of_their_machine_and_the_work_on_its_files(trainer, tmp_path):
    """128 pictures of 12 KB where 1 MB may be kept: each is hashed and decoded once, by one of the processes; for the
    cache of latents it is encoded then."""
    tiny.noisy_images(tmp_path / "data", 128, 64)
    little, data = Little(tmp_path), ("--data", tmp_path / "data", "--size", "64x64")
    if trainer == "train-ae":
        line = ("train-ae", *tiny.AE_NETWORK)
    else:
        cache = ("--set", f"data.cache_dir={tmp_path / 'cache'}")
        line = ("train-ldm", "--autoencoder", "none", *tiny.UNET, "--set", "diffusion.patch=4", *cache)
    line += (*data, "--steps", 2, *tiny.QUIET_LOOP, "--batch-size", 8, "--set", "data.val_fraction=0.2")
    four = ranks(tmp_path, 4, *line, "--out", tmp_path / "run", before=little)
    assert [command.wait() for command in four] == [0] * 4, four[0].stderr + four[1].stderr
    begin, end = little.told("begin"), little.told("end")
    assert len(begin) == 4
    for when in (begin, end):
        assert sum(one["kept"] for one in when) <= MEMORY // 8
        assert all(one["kept"] <= MEMORY // 32 for one in when)
        assert trainer != "train-ae" or sum(one["kept"] for one in when) > MEMORY // 16
    assert sum(one["hashed"] for one in begin) == 128
    data = tiny.state(tmp_path / "run")["data"]
    assert data["rows"] + data["validation_rows"] == 128
    assert sum(one["decoded"] for one in begin) == 128


def test_bad_files_that_other_processes_found_are_left_out_by_all(tmp_path):
    for k, path in enumerate(tiny.noisy_images(tmp_path / "data", 24, 20)):
        if k in (3, 4):
            path.write_bytes(path.read_bytes()[:500])
    both = ranks(
        tmp_path,
        2,
        "train-ae",
        *tiny.AE_NETWORK,
        "--data",
        tmp_path / "data",
        "--size",
        "20x20",
        "--steps",
        2,
        *tiny.QUIET_LOOP,
        "--out",
        tmp_path / "run",
        "--skip-bad",
    )
    assert [command.wait() for command in both] == [0, 0], both[0].stderr + both[1].stderr
    data = tiny.state(tmp_path / "run")["data"]
    assert data["rows"] + data["validation_rows"] == 22 and len(data["left_out"]) == 2


@pytest.mark.parametrize("cached", [True, False])
def test_no_pictures_are_kept_where_latents_stand_for_them(cached, tmp_path, monkeypatch):
    from ldmcli.training.loop import Trainer

    kept, start = [], Trainer._start

    def note(this):
        kept.append(len(this.objective.rows._kept))
        start(this)

    monkeypatch.setattr(Trainer, "_start", note)
    tiny.noisy_images(tmp_path / "data", 12, 20)
    tiny.train_ldm(
        tmp_path / "run",
        "none",
        "--condition",
        "none",
        *([] if cached else ["--no-cache"]),
        steps=1,
        data=("--data", tmp_path / "data", "--size", "20x20"),
    )
    assert kept == [0] if cached else kept[0] > 8
