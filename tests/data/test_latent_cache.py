"""Cached latents are those that the encoder would give now: reliability 27 through `ldm train-ldm`."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import ADAM, checkpoint, ldm, noisy_images, same, train_ae, train_ldm

from ldmcli.training.diffusion import DiffusionObjective
from ldmcli.training.latents import LatentStore


@pytest.fixture
def folder(tmp_path) -> Path:
    """12 pictures."""
    noisy_images(tmp_path / "data", 12)
    return tmp_path / "data"


@pytest.fixture
def encoded(monkeypatch):
    """Numbers of training rows that were encoded, one entry a call."""
    counts = []
    encode = LatentStore.encode_rows

    def counted(self, rows, ids):
        if rows.split == "train":
            counts.append(len(ids))
        return encode(self, rows, ids)

    monkeypatch.setattr(LatentStore, "encode_rows", counted)
    return counts


@pytest.fixture
def objectives(monkeypatch):
    """The objectives of the trainings of a test, to ask them for batches afterwards."""
    made = []
    start = DiffusionObjective.__init__

    def watched(self, *args, **kwargs):
        start(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(DiffusionObjective, "__init__", watched)
    return made


def train(tmp_path, name, ae, folder, *more, steps=1, code=0):
    return train_ldm(tmp_path / name, ae, *more, data=("--data", folder, "--size", 20), steps=steps, code=code)


def rows_of(run: Path) -> int:
    return json.loads((run / "run.json").read_text())["data"]["rows"]


def test_a_second_run_finds_all_latents_of_the_first(ae, folder, tmp_path, encoded):
    """Reliability 27: two runs share the cache; the second encodes nothing and learns the same."""
    train(tmp_path, "one", ae, folder)
    assert sum(encoded) == rows_of(tmp_path / "one")
    ending = train(tmp_path, "two", ae, folder)
    assert sum(encoded) == rows_of(tmp_path / "one") and "found in the cache" in ending.stderr
    assert same(checkpoint(tmp_path / "one"), checkpoint(tmp_path / "two"))


def test_pixels_that_change_behind_the_same_name_size_and_time_are_encoded_again(ae, folder, tmp_path, encoded):
    """Reliability 27: only the changed picture misses."""
    train(tmp_path, "one", ae, folder, "--set", "data.val_fraction=0.05")
    del encoded[:]
    for path in sorted(folder.iterdir()):
        stat, pixels = path.stat(), np.asarray(Image.open(path)).copy()
        pixels[0, 0] ^= 255
        Image.fromarray(pixels).save(path)
        padding = stat.st_size - path.stat().st_size
        path.write_bytes(path.read_bytes() + b"\0" * max(padding, 0))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert path.stat().st_mtime_ns == stat.st_mtime_ns
        break
    train(tmp_path, "two", ae, folder)
    # the held-out picture is chosen by content, so the change may also move one row between the sides
    assert 0 < sum(encoded) <= 2


def test_another_first_stage_size_resize_or_dtype_misses(ae, folder, tmp_path, encoded):
    """Reliability 27: the key holds the autoencoder's fingerprint and the preprocessing."""
    train_ae(tmp_path / "other", "--seed", 1)
    train(tmp_path, "one", ae, folder)
    whole = rows_of(tmp_path / "one")
    for name, stage, *more in (
        ("stage", tmp_path / "other"),
        ("size", ae, "--size", 16),
        ("resize", ae, "--set", "data.resize=box"),
        ("back", ae, "--set", "data.background=black"),
        ("dtype", ae, "--set", "data.cache_dtype=float16"),
        ("flip", ae, "--flip"),
    ):
        del encoded[:]
        train(tmp_path, name, stage, folder, *more)
        assert sum(encoded) == whole, name


def test_posterior_noise_is_drawn_anew_at_every_visit(ae, folder, tmp_path, objectives):
    """Reliability 27: mean and log-variance are stored, so an image never has one latent for ever."""
    train(tmp_path, "run", ae, folder, "--batch-size", 11, steps=1)
    (objective,) = objectives
    batches = [objective.batch(step) for step in range(2)]
    visits = [{int(i): k for k, i in enumerate(batch["row"])} for batch in batches]
    row = next(i for i in visits[0] if i in visits[1])
    latents = [
        objective.latents.sample(batch["moments"], batch["posterior"])[seen[row]]
        for batch, seen in zip(batches, visits)
    ]
    assert torch.equal(*[batch["moments"][seen[row]] for batch, seen in zip(batches, visits)])
    assert not torch.equal(*latents)


def test_flips_still_act_on_cached_latents(ae, folder, tmp_path, objectives):
    """Reliability 27: both mirror images are stored: an image comes as either, each is what the encoder makes of it."""
    train(tmp_path, "run", ae, folder, "--flip", "--batch-size", 11, steps=1)
    (objective,) = objectives
    seen: dict[int, set] = {}
    for step in range(12):
        batch = objective.batch(step)
        for row, moments in zip(batch["row"].tolist(), batch["moments"]):
            seen.setdefault(row, set()).add(moments.numpy().tobytes())
    assert len(seen) == rows_of(tmp_path / "run") and all(len(kinds) == 2 for kinds in seen.values())
    row = next(iter(seen))
    both = objective.latents.encode_rows(objective.rows, [row])[0]
    stored = [np.frombuffer(kind, np.float32).reshape(both[0].shape) for kind in seen[row]]
    assert all(min(np.abs(kind - one).max() for one in both) < 1e-5 for kind in stored)


def test_without_the_cache_the_same_is_learned(ae, folder, tmp_path):
    """Reliability 27: losses with and without cache agree, flips and posterior noise on."""
    more = (*ADAM, "--flip", "--log-every", 1)
    train(tmp_path, "with", ae, folder, *more, steps=3)
    train(tmp_path, "without", ae, folder, *more, "--no-cache", steps=3)
    losses = [
        [
            json.loads(line)["loss_model"]
            for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
            if "loss_model" in line
        ]
        for name in ("with", "without")
    ]
    assert len(losses[0]) == 3 and losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("asked", [(), ("--cache",), ("--set", "data.cache=true")])
def test_random_crops_turn_the_cache_off_and_say_so(asked, ae, folder, tmp_path, objectives):
    """Reliability 27: a cache would freeze the crops. They win, also over a cache that was asked for by name."""
    ending = train(tmp_path, "run", ae, folder, "--crop", "random", *asked)
    assert ending.stderr.count("latents are not cached: random crops") == 1
    assert objectives[0].latents.cache is None and not list((tmp_path / "cache").rglob("*.npy"))


def test_without_a_cache_asked_for_nothing_is_said_of_it(ae, folder, tmp_path):
    ending = train(tmp_path, "run", ae, folder, "--crop", "random", "--no-cache")
    assert "cached" not in ending.stderr


def test_a_run_of_cached_latents_goes_on_and_one_of_random_crops_as_well(ae, folder, tmp_path):
    for more in ((), ("--crop", "random")):
        name = f"run{len(more)}"
        train(tmp_path, name, ae, folder, *more, steps=1)
        assert json.loads((tmp_path / name / "run.json").read_text())["step"] == 1
        train(tmp_path, name, ae, folder, *more, steps=2)
        assert json.loads((tmp_path / name / "run.json").read_text())["step"] == 2


def test_an_array_without_its_list_and_a_cut_one_are_never_read(ae, folder, tmp_path, encoded):
    """Reliability 27: what a kill leaves behind (an array without its list, damage) is missing and made again."""
    train(tmp_path, "one", ae, folder)
    (array,), (listing,) = (list((tmp_path / "cache").rglob(f"*.{kind}")) for kind in ("npy", "json"))
    whole, names = array.read_bytes(), listing.read_text()
    for spoil in (
        lambda: listing.unlink(),
        lambda: array.write_bytes(whole[: len(whole) // 2]),
        lambda: listing.write_text(names[:-5]),
    ):
        del encoded[:]
        spoil()
        train(tmp_path, f"after-{len(list(tmp_path.iterdir()))}", ae, folder)
        assert sum(encoded) == rows_of(tmp_path / "one")
        assert array.read_bytes() == whole and listing.read_text() == names


def test_a_stop_while_encoding_keeps_whole_entries_and_the_next_start_makes_the_rest(
    ae, folder, tmp_path, monkeypatch, encoded
):
    """Reliability 27: a signal between two batches of the encoder ends with its code; no half entry is read."""
    import signal

    encode = LatentStore.encode_rows

    def stopped(self, rows, ids):
        os.kill(os.getpid(), signal.SIGTERM)
        return encode(self, rows, ids)

    from ldmcli.data.cache import LatentCache

    build = LatentCache.build
    with monkeypatch.context() as patch:
        patch.setattr(LatentStore, "encode_rows", stopped)
        patch.setattr(LatentCache, "build", lambda self, encode, **more: build(self, encode, **{**more, "batch": 4}))
        ending = train(tmp_path, "run", ae, folder, code=143)
    assert "the same command goes on" in ending.line
    (listing,) = (tmp_path / "cache").rglob("*.json")
    kept = len(json.loads(listing.read_text()))
    assert kept == len(np.load(listing.with_suffix(".npy"))) == 4 and not list((tmp_path / "cache").rglob("*.tmp"))
    del encoded[:]
    train(tmp_path, "run", ae, folder)
    assert sum(encoded) == rows_of(tmp_path / "run") - kept


def test_latents_in_half_precision_are_near_those_in_full(ae, folder, tmp_path, objectives):
    """data.cache_dtype=float16 halves the cache and rounds, nothing more."""
    train(tmp_path, "full", ae, folder)
    train(tmp_path, "half", ae, folder, "--set", "data.cache_dtype=float16")
    a, b = (each.latents.cache.moments(range(len(each.rows))) for each in objectives)
    assert np.abs(a - b).max() < 2e-3 * max(1, np.abs(a).max())


def test_a_cache_that_cannot_be_written_is_one_line(ae, folder, tmp_path):
    """A file stands where the cache should be."""
    (tmp_path / "file").write_text("")
    ending = train(tmp_path, "run", ae, folder, "--set", f"data.cache_dir={tmp_path / 'file'}", code=2)
    assert ending.line.startswith("ldm: ") and "file" in ending.line


def test_equal_pictures_share_an_entry(ae, folder, tmp_path, encoded):
    """Keyed by content: a copy under another name costs nothing."""
    for path in list(folder.iterdir()):
        (folder / f"copy-{path.name}").write_bytes(path.read_bytes())
    train(tmp_path, "run", ae, folder)
    assert sum(encoded) == rows_of(tmp_path / "run") / 2
    assert ldm("runs", "--json").code == 0


def test_processes_that_look_at_different_moments_leave_no_row_out(tmp_path):
    """The second process looks only when the first has written its share, as happens where one is late."""
    from ldmcli.data.cache import LatentCache

    keys = [f"{k:02d}" for k in range(9)]
    late, early = (LatentCache(tmp_path, keys, (1, 2, 2), "float32", 1) for _ in range(2))
    encode = lambda ids: np.stack([np.full((1, 1, 2, 2), i, np.float32) for i in ids])  # noqa: E731
    early.build(encode, rank=0, world=2)
    late.build(encode, rank=1, world=2)
    late.seal()
    assert late.moments(range(9))[:, 0, 0, 0].tolist() == list(range(9))
