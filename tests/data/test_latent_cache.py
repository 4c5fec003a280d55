"""Cached latents are those that the encoder would give now: reliability 27 through `ldm train-ldm`."""

import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import ADAM, checkpoint, ldm, noisy_images, same, train_ae, train_ldm

from ldmcli.core.errors import ResourceError
from ldmcli.data import cache as cache_module
from ldmcli.data import rows, sources
from ldmcli.data.augment import cached_crops, cached_views, crop_and_flip, load_pixels
from ldmcli.data.cache import LatentCache, dealt
from ldmcli.training import latents
from ldmcli.training.diffusion import DiffusionObjective
from ldmcli.training.latents import LatentStore


@pytest.fixture
def folder(tmp_path) -> Path:
    """12 pictures."""
    noisy_images(tmp_path / "data", 12)
    return tmp_path / "data"


@pytest.fixture
def encoded(monkeypatch):
    """Numbers of rows that were encoded for the cache, one entry a call."""
    counts = []
    encode = LatentStore.encode_views

    def counted(self, pixels):
        counts.append(len(pixels))
        return encode(self, pixels)

    monkeypatch.setattr(LatentStore, "encode_views", counted)
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


def test_pictures_whose_latents_are_cached_are_not_decoded_again(ae, folder, tmp_path, monkeypatch):
    """The first start decodes each once; the second those of validation."""
    names, decode = [], rows.decode
    monkeypatch.setattr(rows, "decode", lambda content, **more: names.append(more["name"]) or decode(content, **more))
    few = ("--set", "data.val_fraction=0.3")
    monkeypatch.setattr(sources, "FEW", 0)  # sides of few pictures are looked at for one that can be read
    train(tmp_path, "one", ae, folder, *few)
    assert len(names) == len(set(names)) == 12
    del names[:]
    train(tmp_path, "two", ae, folder, *few)
    assert len(names) == len(set(names)) == 12 - rows_of(tmp_path / "two")


@pytest.mark.parametrize("skip", [True, False])
def test_bad_pictures_are_found_while_others_are_encoded(skip, ae, folder, tmp_path, encoded):
    """A copy of one as well, though it is tried once; and at every start alike."""
    for path in sorted(folder.iterdir())[:2]:
        path.write_bytes(path.read_bytes()[:100])
    first = sorted(folder.iterdir())[0]
    (folder / "copy.png").write_bytes(first.read_bytes())
    for name in ("one", "two"):
        more = ("--skip-bad", "--set", "data.val_fraction=0.01")
        ending = train(tmp_path, name, ae, folder, *more[0 if skip else 1 :], code=0 if skip else 3)
        if not skip:
            assert "pictures cannot be read" in ending.line and "copy.png" in ending.line
            return
        left_out = json.loads((tmp_path / name / "run.json").read_text())["data"]["left_out"]
        assert sorted(line.split(":")[0] for line in left_out) == ["00.png", "01.png", "copy.png"]
    assert sum(encoded) == rows_of(tmp_path / "one")


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


def crops(count: int, *more) -> tuple:
    return ("--crop", "random", "--set", f"data.cache_views={count}", *more)


@pytest.mark.parametrize("zoom", [(), ("--set", "data.crop_min=0.5")])
def test_random_crops_are_cached_in_several_views(zoom, ae, tmp_path, encoded, objectives):
    """Each is what the encoder makes of the crop; runs of other seeds share them, and see each in turn."""
    for path in noisy_images(tmp_path / "data", 8, 40):
        Image.open(path).crop((0, 0, 40, 24)).save(path)  # crops have room to lie in
    for name in ("one", "two"):
        seed = ("--seed", 1) if name == "two" else ()
        train(tmp_path, name, ae, tmp_path / "data", *crops(3, "--flip", *zoom), *seed)
    assert encoded == [rows_of(tmp_path / "one")]
    objective = objectives[0]
    data, store = objective.config.data, objective.latents
    seen: dict[int, set] = {}
    for step in range(30):
        batch = objective.batch(step)
        for row, moments in zip(batch["row"].tolist(), batch["moments"]):
            seen.setdefault(row, set()).add(moments.numpy().tobytes())
    assert {len(kinds) for kinds in seen.values()} <= {5, 6} and len(seen) == len(objective.rows)
    row = next(row for row, kinds in seen.items() if len(kinds) == 6)
    places = cached_crops(data, objective.rows.content_hash(row))
    cut = np.stack([objective.rows.pixels(row, (20, 20), "random", u) for u in places])[None]
    made = store.encode_views(cut)[0]
    assert len({view.tobytes() for view in cut[0]}) == 3
    for kind in seen[row]:
        stored = np.frombuffer(kind, np.float32).reshape(made[0].shape)
        assert min(np.abs(stored - one).max() for one in made) < 1e-5


@pytest.mark.parametrize("task", [("--task", "sr"), ("--task", "inpaint"), ("--condition", "map+layout")])
def test_conditions_see_the_crop_that_the_latent_is_of(task, ae, tmp_path, objectives):
    """With cached views and with --no-cache training sees the same pictures, maps and boxes: where the crop lies is
    asked of the same function."""
    data = ("shapes", "--limit", 6) if "map+layout" in task else (tmp_path / "data",)
    for path in noisy_images(tmp_path / "data", 6, 40):
        Image.open(path).crop((0, 0, 40, 24)).save(path)
    train_ldm(tmp_path / "run", ae, *task, *crops(2), data=("--data", *data, "--size", 20), steps=1)
    (objective,) = objectives
    where = np.arange(12)
    ids = np.array([int(i) for i in objective.batch(0)["row"]] * 3)
    u, _ = crop_and_flip(objective.rows, objective.config, ids, where)
    assert len({tuple(place) for place in u.tolist()}) > 4
    store, objective.latents.cache = objective.latents.cache, None
    views = cached_views(objective.config, where)
    pixels = load_pixels(objective.rows, objective.config, ids, where, (20, 20)).numpy()
    made = objective.latents.encode_views(pixels[:, None])[:, 0]
    assert np.abs(made - store.moments(ids.tolist(), views.tolist())).max() < 1e-5
    name = objective.config.kinds[0]
    (told,) = [objective.source.values(name, ids[:1], where[:1])]
    again = objective.source.values(name, ids[:1], where[:1], pixels[:1])
    for a, b in zip(parts(told[0]), parts(again[0])):
        assert np.array_equal(a, b)


def parts(value):
    return value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else (value,)


def test_views_are_of_random_crops_alone(ae, folder, tmp_path):
    ending = train(tmp_path, "run", ae, folder, "--set", "data.cache_views=2", code=2)
    assert "data.crop = random" in ending.line


@pytest.mark.parametrize("without", ["data.cache=false", "data.streaming=true"])
def test_views_are_of_a_cache(without, ae, folder, tmp_path):
    ending = train(tmp_path, "run", ae, folder, *crops(2), "--set", without, code=2)
    assert "data.cache_views: nothing is cached" in ending.line


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

    encode = LatentStore.encode_views

    def stopped(self, pixels):
        os.kill(os.getpid(), signal.SIGTERM)
        return encode(self, pixels)

    with monkeypatch.context() as patch:
        patch.setattr(LatentStore, "encode_views", stopped)
        patch.setattr(latents, "ENCODED", 4)
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


def encoded_as_numbers(rows, shape=(1, 1, 2, 2)):
    """A cache's `encoded`: moments that say which row they are of."""
    return [([int(i)], np.full((1, *shape), i, np.float32)) for i in rows]


def test_processes_share_what_is_missing_and_leave_no_row_out(tmp_path):
    """What an earlier start left behind is not dealt out: each process gets an equal part of the rest."""
    keys = [f"{k:02d}" for k in range(9)]
    LatentCache(tmp_path, keys, (1, 2, 2), "float32", 1).build(9, encoded_as_numbers([0, 2, 4, 6]))
    both = [LatentCache(tmp_path, [*keys, "01"], (1, 2, 2), "float32", 1) for _ in range(2)]
    both[0].refresh()
    masks = [cache.missing() for cache in both]  # the second looked too early and found nothing
    assert [np.flatnonzero(mask).tolist() for mask in masks] == [[1, 3, 5, 7, 8], list(range(9))]
    assert [dealt(masks, rank) for rank in range(2)] == [[1, 5, 8], [3, 7]]
    for rank, cache in enumerate(both):
        cache.build(5, encoded_as_numbers(dealt(masks, rank)))
    both[0].seal()
    assert both[0].moments(range(10))[:, 0, 0, 0].tolist() == [*range(9), 1]


@pytest.mark.parametrize("patience", [0, 30])
def test_what_a_network_lists_late_is_waited_for(patience, tmp_path, monkeypatch):
    """Another machine's shard shows up while `seal` waits; without patience it is missing."""
    cache = LatentCache(tmp_path, ["a", "b"], (1, 2, 2), "float32", 1)
    waits = []

    def write_at_the_third(seconds):
        waits.append(seconds)
        if len(waits) == 3:
            LatentCache(tmp_path, ["a", "b"], (1, 2, 2), "float32", 1).build(2, encoded_as_numbers([0, 1]))

    monkeypatch.setattr(cache_module.time, "sleep", write_at_the_third)
    if not patience:
        with pytest.raises(ResourceError, match="2 of 2 latents"):
            cache.seal(patience)
        return
    cache.seal(patience)
    assert len(waits) == 3 and waits == sorted(set(waits)) and cache.moments([1])[0, 0, 0, 0] == 1


def test_latents_of_another_precision_are_others(ae, folder, tmp_path, encoded):
    """Those that a GPU made in bfloat16 are not taken for those of float32."""
    for name, precision in (("full", "no"), ("half", "bf16"), ("again", "bf16")):
        train(tmp_path, name, ae, folder, "--mixed-precision", precision)
    assert encoded == [rows_of(tmp_path / "full")] * 2


def test_pictures_are_decoded_while_others_are_encoded(ae, folder, tmp_path, monkeypatch):
    """The first batch waits until the pictures behind it were decoded: in the same thread they never would be."""
    monkeypatch.setattr(latents, "ENCODED", 4)
    decoded, behind = [], threading.Event()
    decode, encode = rows.decode, LatentStore.encode_views

    def noted(content, **more):
        decoded.append(more["name"])
        if len(decoded) > 8:
            behind.set()
        return decode(content, **more)

    def waiting(self, pixels):
        assert behind.wait(60)
        return encode(self, pixels)

    monkeypatch.setattr(rows, "decode", noted)
    monkeypatch.setattr(LatentStore, "encode_views", waiting)
    train(tmp_path, "run", ae, folder)


def test_few_pictures_are_encoded_at_a_time_where_memory_is_little(ae, folder, tmp_path, monkeypatch, encoded):
    train(tmp_path, "much", ae, folder)
    monkeypatch.setattr(latents, "memory_bytes", lambda: 200_000)
    train(tmp_path, "little", ae, folder, "--set", "data.background=black")
    assert encoded[0] == sum(encoded[1:]) and max(encoded[1:]) < encoded[0]
