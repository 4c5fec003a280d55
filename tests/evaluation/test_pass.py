"""The pass over the pictures of an evaluation: each picture once, through all networks, by all processes, and on from
where it was killed."""

import json
import os
import shutil
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny as commands
from measured import Autoencoder, folder, npz, pictures, tiny_extractor
from PIL import Image
from processes import Command, ranks

from ldmcli.core import launch
from ldmcli.core.errors import UsageError
from ldmcli.evaluation import evaluate as module
from ldmcli.evaluation import image_streams, passes
from ldmcli.evaluation.evaluate import evaluate
from ldmcli.evaluation.request import EvaluationRequest

SETS = ["fid", "kid", "is", "pr"]


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """Two tiny networks by name."""
    where = tmp_path_factory.mktemp("networks")
    return {name: tiny_extractor(where / f"{name}.safetensors", k, name) for k, name in enumerate(("one", "two"))}


@pytest.fixture(autouse=True)
def cheap(networks, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "open_extractor", lambda name=None: networks[name or "one"])
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def images(tmp_path):
    return folder(tmp_path / "images", pictures(12, 1))


# --- several networks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["one,two", "one, two", ["one", "two"], ("one", "two", "one")])
def test_several_networks_measure_what_each_measures_alone_and_each_picture_is_read_once(
    given, images, tmp_path, monkeypatch
):
    other = npz(tmp_path / "other.npz", pictures(11, 2))
    alone = [evaluate(images=images, data=other, metrics=SETS, features=name) for name in ("one", "two")]
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache of both"))
    read, decoded = [], image_streams.decode
    monkeypatch.setattr(image_streams, "decode", lambda path: read.append(path) or decoded(path))
    both = evaluate(images=images, data=other, metrics=SETS, features=given)
    assert both["metrics"] == alone[0]["metrics"] | alone[1]["metrics"]
    assert list(both["metrics"]) == [*alone[0]["metrics"], *alone[1]["metrics"]], "network by network, as named"
    assert sorted(read[1:]) == sorted(images.iterdir()), "and before them the first one for its size"
    assert both["frechet"] == "fd_one8" and both["extractor"] == alone[0]["extractor"]
    assert both["extractors"] == [one["extractor"] for one in alone]


def test_pairs_are_measured_by_several_networks(images, tmp_path):
    pairs = (images, folder(tmp_path / "other", pictures(12, 3)))
    alone = [evaluate(pairs=pairs, metrics=["fid", "psnr"], features=name)["metrics"] for name in ("one", "two")]
    assert evaluate(pairs=pairs, metrics=["fid", "psnr"], features="one,two")["metrics"] == alone[0] | alone[1]


def test_of_a_reference_only_the_network_that_is_new_sees_the_pictures(images, tmp_path, networks, monkeypatch):
    other = npz(tmp_path / "other.npz", pictures(11, 2))
    evaluate(images=images, data=other, features="one")
    seen = {name: [] for name in networks}
    for name, network in networks.items():
        found = network.features_and_logits
        monkeypatch.setattr(
            network, "features_and_logits", lambda block, n=name, f=found: seen[n].append(len(block)) or f(block)
        )
    evaluate(images=images, data=other, features="one,two")
    assert sum(seen["two"]) == 12 + 11 and sum(seen["one"]) == 12


def test_warnings_say_which_network_they_are_about(tmp_path):
    few = folder(tmp_path / "few", pictures(4))
    found = evaluate(
        images=few, data=npz(tmp_path / "b.npz", pictures(9, 1)), metrics=["fid", "is"], features="one,two"
    )
    assert [text for text in found["warnings"] if text.startswith("4 generated images for 8 dimensions (two)")]
    assert "no IS: 4 images for 10 splits (one)" in found["warnings"]


def test_statistics_are_of_one_network(images, tmp_path):
    other, kept = npz(tmp_path / "other.npz", pictures(11, 2)), tmp_path / "kept.npz"
    with pytest.raises(UsageError, match="--save-statistics: a file holds the statistics of one network"):
        evaluate(images=images, data=other, features="one,two", save_statistics=kept)
    evaluate(images=images, data=other, features="one", save_statistics=kept)
    with pytest.raises(UsageError, match="kept.npz: holds statistics of one network"):
        evaluate(images=images, data=kept, features="one,two")
    # a sample set of guided-diffusion's kind has images, which serve every network
    np.savez(tmp_path / "both.npz", arr_0=pictures(11, 2), mu=np.zeros(8), sigma=np.eye(8))
    found = evaluate(images=images, data=tmp_path / "both.npz", features="one,two")
    assert found["metrics"] == evaluate(images=images, data=other, features="one,two")["metrics"]
    assert any("are not of all of one and two; its images are the reference" in text for text in found["warnings"])


def test_two_networks_of_one_name_are_refused(images, networks, tmp_path, monkeypatch):
    same = {**networks, "other": tiny_extractor(tmp_path / "other.safetensors", 5, "one")}
    monkeypatch.setattr(module, "open_extractor", lambda name=None: same[name])
    with pytest.raises(UsageError, match="two networks whose numbers are called …_one8"):
        evaluate(images=images, data=images, features="one,other")


def test_a_file_whose_name_has_a_comma_is_one_network(tmp_path):
    path = tmp_path / "a,b.safetensors"
    path.touch()
    assert EvaluationRequest(images="x", features=str(path)).networks == (str(path),)


def test_reconstructions_go_through_the_autoencoder_once(monkeypatch):
    decoded, seen = Autoencoder.decode, []
    monkeypatch.setattr(Autoencoder, "decode", lambda self, z: seen.append(len(z)) or decoded(self, z))
    found = evaluate(autoencoder=Autoencoder(), data="shapes", n=6, size=(20, 20), metrics=["fid"], features="one,two")
    assert sum(seen) == 6 and {"fd_one8", "fd_two8"} == found["metrics"].keys()


# --- the order of files, and the batch ---------------------------------------------------------------------------


def test_numbers_do_not_depend_on_how_a_png_file_was_written(images, tmp_path):
    ways = ({"compress_level": 0}, {"optimize": True}, {"compress_level": 9, "dpi": (72, 72)})
    other = npz(tmp_path / "other.npz", pictures(20, 2))
    found = [evaluate(images=images, data=other, metrics=[*SETS, "mind", "dc"])["metrics"]]
    for k, way in enumerate(ways):
        saved = tmp_path / f"saved {k}"
        saved.mkdir()
        for path in images.iterdir():
            Image.open(path).save(saved / path.name, **way)
            assert (saved / path.name).read_bytes() != path.read_bytes()
        found.append(evaluate(images=saved, data=other, metrics=[*SETS, "mind", "dc"])["metrics"])
    assert all(one == found[0] for one in found)


def test_numbers_do_not_depend_on_names_and_order_of_files(images, tmp_path):
    shuffled = tmp_path / "shuffled"
    shuffled.mkdir()
    for k, path in enumerate(sorted(images.iterdir())):
        shutil.copy(path, shuffled / f"{(7 * k + 3) % 12:03d}.png")
    other = npz(tmp_path / "other.npz", pictures(20, 2))
    turned = npz(tmp_path / "turned.npz", pictures(20, 2)[::-1])
    metrics = [*SETS, "mind", "dc"]
    found = [
        evaluate(images=made, data=real, metrics=metrics)["metrics"]
        for made, real in ((images, other), (shuffled, other), (images, turned))
    ]
    assert found[0] == found[1] == found[2] and len(found[0]) >= 8


@pytest.mark.parametrize("subject, run", [("model", "plain"), ("autoencoder", "kl")])
def test_numbers_do_not_depend_on_the_batch(tiny_runs, subject, run):
    how = ("--data", "shapes", "-n", 9, "--size", 20, *(("--steps", 1) if subject == "model" else ()))
    words = ("eval-fid", f"--{subject}", tiny_runs[run], *how, "--metrics", "fid,kid", "--json")
    one, many = (commands.ldm(*words, "--batch-size", size).json["metrics"] for size in (1, 64))
    assert many == pytest.approx(one, rel=1e-6)


# --- processes ---------------------------------------------------------------------------------------------------


def in_small_blocks(weights: str, cache: str) -> None:
    """What a process of its own measures by: the tiny network, blocks of five."""
    network = tiny_extractor(Path(weights), 0, "one")
    module.open_extractor = lambda name=None: network
    passes.BLOCK = 5
    os.environ["LDM_CACHE"] = cache


def document(log: str) -> dict:
    """The JSON document among the lines of a log."""
    return json.loads(log[log.index("\n{\n" if log[0] != "{" else "{") : log.rindex("}") + 1])


@pytest.fixture
def started(tmp_path):
    """`started(2, *words)`: (exit codes, logs) of a command on so many processes."""
    before = partial(in_small_blocks, tmp_path / "weights.safetensors", str(tmp_path / "cache of processes"))

    def start(count, *words):
        processes = ranks(tmp_path, count, *words, before=before)
        return [one.wait() for one in processes], [one.stderr for one in processes]

    return start


SUBJECTS = {
    "images": ("--images", "images", "--data", "other.npz", "--metrics", "fid,kid,is,pr", "-n", 11),
    "pairs": ("--pairs", "images", "changed", "--metrics", "fid,psnr"),
    "autoencoder": ("--autoencoder", "kl", "--data", "shapes", "--size", 20, "-n", 11, "--batch-size", 5),
    "model": ("--model", "text", "--data", "shapes", "-n", 11, "--steps", 1, "--batch-size", 5, "--metrics", "fid,kid"),
    "novelty": ("--images", "images", "--data", "set", "--metrics", "novelty,fid"),
    "task": ("--model", "sr", "--data", "shapes", "-n", 11, "--steps", 1, "--batch-size", 5, "--metrics", "fid,psnr"),
}


@pytest.mark.parametrize("subject, count", [*((subject, 2) for subject in SUBJECTS), ("model", 3), ("task", 3)])
def test_several_processes_find_what_one_does(subject, count, started, images, tiny_runs, tmp_path, monkeypatch):
    npz(tmp_path / "other.npz", pictures(13, 2))
    folder(tmp_path / "changed", pictures(12, 3))
    places = {name: tiny_runs[name] for name in ("kl", "text", "sr") if name in SUBJECTS[subject]}
    places |= {name: tmp_path / name for name in ("images", "changed", "other.npz", "set")}
    if subject == "novelty":
        folder(tmp_path / "set" / "train", pictures(40, 4))
        folder(tmp_path / "set" / "validation", pictures(30, 5))
    words = ("eval-fid", *(places.get(word, word) for word in SUBJECTS[subject]), "--json")
    monkeypatch.setattr(passes, "BLOCK", 5)
    one = commands.ldm(*words)
    assert one.code == 0, one.stderr
    codes, logs = started(count, *words)
    assert codes == [0] * count, logs
    two = document(logs[0])
    assert two["throughput"]["processes"] == count and one.json["throughput"]["processes"] == 1
    assert list(two["metrics"]) == list(one.json["metrics"]) and two["warnings"] == one.json["warnings"]
    numbers = {key: value for key, value in one.json["metrics"].items() if value is not None}
    assert {key: two["metrics"][key] for key in numbers} == pytest.approx(numbers, rel=1e-9, abs=1e-12)
    assert two["n_generated"] == one.json["n_generated"] and not any(logs[1:]), "only one process speaks"


def test_what_is_wrong_in_the_block_of_one_process_ends_both_with_one_line(started, images, tmp_path):
    npz(tmp_path / "other.npz", pictures(13, 2))
    (images / "000007.png").write_bytes(b"no picture")  # of the second process
    codes, logs = started(2, "eval-fid", "--images", images, "--data", tmp_path / "other.npz", "--json")
    assert codes == [3, 3] and logs[0].count("\n") == 1 and "000007.png" in logs[0], logs


def test_a_limit_is_missed_on_the_process_that_reports(started, images, tmp_path):
    words = ("--data", npz(tmp_path / "other.npz", pictures(13, 2)), "--fail-above", 0)
    codes, logs = started(2, "eval-fid", "--images", images, *words)
    assert codes == [8, 0] and "is above 0" in logs[0] and logs[1] == ""


@pytest.mark.parametrize("code", [0, 8])
def test_gpus_starts_processes_and_ends_as_they_do(code, monkeypatch):
    asked = []
    monkeypatch.setattr(launch, "relaunch_if_needed", lambda gpus, words: asked.append((gpus, words)) or code)
    words = ["eval-fid", "--pairs", "a", "b", "--gpus", "2"]
    assert commands.ldm(*words).code == code and asked == [(2, words)]


# --- killed, and on ----------------------------------------------------------------------------------------------


def killed_after(blocks: int, weights: str, cache: str) -> None:
    """As `in_small_blocks`, in a process that is killed when so many blocks are done and the next one is begun."""
    in_small_blocks(weights, cache)
    parts, seen = passes.Pass.parts, []

    def some(self, wanted):
        for part in parts(self, wanted):
            if len(seen) == blocks:
                os.kill(os.getpid(), signal.SIGKILL)
            seen.append(1)
            yield part

    passes.Pass.parts = some


def kept(cache):
    """Files of passes that are not complete."""
    return sorted((cache / "features" / "passes").rglob("*.npz"))


@pytest.mark.parametrize("subject, blocks, known", [("images", 2, 10), ("model", 1, 5), ("autoencoder", 1, 5)])
def test_a_killed_evaluation_goes_on_where_it_was(subject, blocks, known, images, tiny_runs, tmp_path):
    other, cache, weights = (
        npz(tmp_path / "other.npz", pictures(13, 2)),
        tmp_path / "c",
        str(tmp_path / "weights.safetensors"),
    )
    places = {"images": images, "other.npz": other, "text": None, "kl": None}
    places |= {name: tiny_runs[name] for name in ("kl", "text") if name in SUBJECTS[subject]}
    words = ("eval-fid", *(places.get(word, word) for word in SUBJECTS[subject]), "--json")

    def start(name, before):
        one = Command(tmp_path / f"{name}.log", *words, before=before)
        return one.wait(), one.stderr

    code, whole = start("whole", partial(in_small_blocks, weights, str(tmp_path / "another cache")))
    assert code == 0, whole
    code, _ = start("killed", partial(killed_after, blocks, weights, str(cache)))
    assert code == -signal.SIGKILL and len(kept(cache)) == blocks
    code, log = start("on", partial(in_small_blocks, weights, str(cache)))
    assert code == 0 and f": {known} of 11 images are known from an earlier start" in log, log
    assert document(log)["metrics"] == document(whole)["metrics"]
    assert document(log)["throughput"]["known_images"] == known
    assert not kept(cache), "the result is complete"


def test_a_reference_that_was_killed_goes_on_too_and_its_whole_features_stay(images, tmp_path, monkeypatch):
    """Three blocks of the images and two of the reference, then an end like a kill's."""
    monkeypatch.setattr(passes, "BLOCK", 5)
    other, parts, seen = npz(tmp_path / "other.npz", pictures(13, 2)), passes.Pass.parts, []

    def some(self, wanted):
        for part in parts(self, wanted):
            if len(seen) == 5:
                raise KeyboardInterrupt
            seen.append(1)
            yield part

    expected = evaluate(images=images, data=other, metrics=SETS)["metrics"]
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "killed"))
    monkeypatch.setattr(passes.Pass, "parts", some)
    with pytest.raises(KeyboardInterrupt):
        evaluate(images=images, data=other, metrics=SETS)
    monkeypatch.setattr(passes.Pass, "parts", parts)
    found = evaluate(images=images, data=other, metrics=SETS)
    assert found["metrics"] == expected and found["throughput"]["known_images"] == 12 + 10
    again = evaluate(images=images, data=other, metrics=SETS)
    assert again["metrics"] == expected and again["throughput"]["known_images"] == 13
    assert not kept(tmp_path / "killed") and len(list((tmp_path / "killed" / "features").glob("*.npz"))) == 1


@pytest.fixture
def interrupted(images, tmp_path, monkeypatch):
    """An evaluation of `images` of which two blocks are kept."""
    monkeypatch.setattr(passes, "BLOCK", 5)
    parts = passes.Pass.parts

    def two(self, wanted):
        for k, part in enumerate(parts(self, wanted)):
            if k == 2:
                raise KeyboardInterrupt
            yield part

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(passes.Pass, "parts", two)
        evaluate(images=images, data=npz(tmp_path / "other.npz", pictures(13, 2)))


def known_images(**arguments) -> int:
    return evaluate(**arguments)["throughput"]["known_images"]


def test_what_is_known_is_known_by_its_content(interrupted, images, tmp_path, networks):
    files = sorted(images.iterdir())
    shutil.copy(files[0], files[3])  # another picture in the first block
    assert known_images(images=images, data=tmp_path / "other.npz") == 5


@pytest.mark.parametrize("change", [{"features": "two"}, {"n": 11}, {"metrics": ["fid", "is"]}, {}])
def test_of_another_pass_nothing_is_known(change, interrupted, images, tmp_path):
    assert known_images(images=images, data=tmp_path / "other.npz", **change) == (0 if change else 10)


def test_a_damaged_part_is_made_again(interrupted, images, tmp_path):
    kept(tmp_path / "cache")[0].write_bytes(b"damaged")
    assert known_images(images=images, data=tmp_path / "other.npz") == 5


def test_parts_that_nobody_asked_for_in_two_weeks_go(interrupted, images, tmp_path):
    left = kept(tmp_path / "cache")
    os.utime(left[0].parent, (1, 1))
    evaluate(pairs=(images, images), metrics=["psnr"])
    assert not kept(tmp_path / "cache")


def test_without_a_cache_a_pass_is_as_whole(images, tmp_path, monkeypatch, capfd):
    other = npz(tmp_path / "other.npz", pictures(13, 2))
    expected = evaluate(images=images, data=other)["metrics"]
    (tmp_path / "a file").touch()
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "a file" / "cache"))
    assert evaluate(images=images, data=other)["metrics"] == expected
    assert "nothing is cached" in capfd.readouterr().err


# --- memory, and throughput --------------------------------------------------------------------------------------


def test_features_of_a_large_set_lie_in_a_file_and_give_the_same_numbers(images, tmp_path, monkeypatch):
    other = npz(tmp_path / "other.npz", pictures(13, 2))
    expected = evaluate(images=images, data=other, metrics=SETS)["metrics"]
    monkeypatch.setattr(passes, "IN_MEMORY", 0)
    assert isinstance(passes.allocated((3, 2), np.dtype("float32")), np.memmap)
    assert evaluate(images=images, data=other, metrics=SETS)["metrics"] == expected


def test_a_result_says_how_fast_each_stage_was(images, tmp_path, capfd):
    found = evaluate(images=images, data=npz(tmp_path / "other.npz", pictures(13, 2)))["throughput"]
    assert {name: one["images"] for name, one in found["stages"].items()} == {
        "reading": 25,
        "features": 25,
        "metrics": 0,
    }
    assert all(one["images_per_s"] > 0 for name, one in found["stages"].items() if name != "metrics")
    assert "images/s" in capfd.readouterr().err
