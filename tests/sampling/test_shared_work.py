"""Several processes make what one makes, byte for byte: samples, edits, reconstructions; and all end together."""

import json
import os
import signal
import socket
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image
from processes import Command, call, ranks

from ldmcli.core import launch
from ldmcli.core.world import World
from ldmcli.sampling.image_folder import ImageFolder

FAST = ("--steps", 2, "--sampler", "ddim")


@pytest.fixture(scope="module")
def given(tiny_runs, tmp_path_factory) -> Path:
    """Pictures of two sizes, with masks, and a layout."""
    here = tmp_path_factory.mktemp("given")
    generator = np.random.default_rng(0)
    for folder in ("photos", "masks", "small"):
        (here / folder).mkdir()
    for k, size in enumerate(((24, 32), (28, 24), (24, 32), (24, 32))):
        pixels = generator.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(here / "photos" / f"{k}.png")
        Image.fromarray(pixels[:10, :10]).save(here / "small" / f"{k}.png")
        hole = np.zeros(size, np.uint8)
        hole[4 + k : 14, 6:15] = 255
        Image.fromarray(hole).save(here / "masks" / f"{k}.png")
    (here / "boxes.json").write_text(json.dumps({"objects": [{"bbox": [0.1, 0.2, 0.5, 0.5], "category": "star"}]}))
    return here


def commands(tiny_runs, given: Path) -> dict[str, tuple]:
    """Command lines without --out, by name."""
    text, layout, sr, inpaint = (tiny_runs[name] for name in ("text", "layout", "sr", "inpaint"))
    prompts = ("--prompt", "a red star", "--prompt", "two circles")
    first_stages = ("--autoencoder", tiny_runs["kl"], "--autoencoder", tiny_runs["text"])
    return {
        "sample": ("sample", "--model", text, *FAST, "--eta", 1, "-n", 4, *prompts, "--batch-size", 3),
        "layout": ("sample", "--model", layout, *FAST, "--layout", given / "boxes.json", "-n", 2, "--progress", "row"),
        "inpaint": ("inpaint", given / "photos", given / "masks", "--model", inpaint, *FAST, "-n", 2),
        "upscale": ("upscale", given / "small", "--scale", 2, "--model", sr, *FAST, "--tile", 16, "--seed", 3),
        "reconstruct": ("reconstruct", given / "photos", *first_stages, "--size", 20),
    }


def lines(tiny_runs, given: Path, out: Path) -> list[list[str]]:
    return [
        [str(word) for word in (*words, "--out", out / name, "--json")]
        for name, words in commands(tiny_runs, given).items()
    ]


def files(out: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def free_ports(count: int) -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def one_rank(rank: int, count: int, ports: list[int], lines: list[list[str]], out: str) -> None:
    """Commands, one after the other, as one of the processes that a launcher started."""
    from ldmcli.cli import main

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1")
    with open(os.path.join(out, f"rank-{rank}.log"), "w") as log:
        os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
        for port, line in zip(ports, lines):
            os.environ["MASTER_PORT"] = str(port)
            if int(main(line)):
                os._exit(1)  # the others are not to wait for a next command


@pytest.fixture(scope="module")
def made_by_one(tiny_runs, given, tmp_path_factory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("one")
    for line in lines(tiny_runs, given, out):
        ending = tiny.ldm(*line)
        assert ending.code == 0, ending.stderr
    return files(out)


@pytest.mark.parametrize("count", [2, 3])
def test_pictures_of_several_processes_are_those_of_one(count, tiny_runs, given, made_by_one, tmp_path):
    out, logs = tmp_path / "out", tmp_path / "logs"
    logs.mkdir()
    words = lines(tiny_runs, given, out)
    call(count, one_rank, count, free_ports(len(words)), words, str(logs))
    found = files(out)
    assert found.keys() == made_by_one.keys()
    assert [name for name in found if found[name] != made_by_one[name]] == []
    assert all((logs / f"rank-{rank}.log").read_text() == "" for rank in range(1, count)), "only one process speaks"


def test_the_launcher_s_processes_share_the_work(tiny_runs, given, made_by_one, ldm_process, tmp_path):
    words = commands(tiny_runs, given)["sample"]
    ending = ldm_process(*words, "--out", tmp_path / "sample", "--gpus", 2, env={"CUDA_VISIBLE_DEVICES": ""})
    assert ending.code == 0 and ending.stdout.count("\n") == 1, ending.stderr
    assert {f"sample/{name}": data for name, data in files(tmp_path / "sample").items()} == {
        name: data for name, data in made_by_one.items() if name.startswith("sample/")
    }


@pytest.mark.parametrize("name", ["sample", "inpaint", "upscale", "reconstruct"])
def test_gpus_starts_processes_and_ends_as_they_do(name, tiny_runs, given, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(launch, "relaunch_if_needed", lambda gpus, words: asked.append((gpus, words)) or 4)
    words = [*map(str, commands(tiny_runs, given)[name]), "--out", str(tmp_path / "out"), "--gpus", "2"]
    assert tiny.ldm(*words).code == 4 and asked == [(2, words)] and not (tmp_path / "out").exists()


# --- how they end ------------------------------------------------------------------------------------------------


def broken_rank(rank: str) -> None:
    """In the process of that rank the second picture is spoilt."""
    from ldmcli.core.errors import ModelError
    from ldmcli.sampling import commands

    draw, seen = commands.draw_images, []

    def spoilt(model, drawn):
        seen.append(1)
        if os.environ["RANK"] == rank and len(seen) == 2:
            raise ModelError("the model gives NaN")
        return draw(model, drawn)

    commands.draw_images = spoilt


def slow_pictures(seconds: float) -> None:
    """Each batch takes its time, so that a signal comes while there is work."""
    from ldmcli.sampling import commands

    draw = commands.draw_images
    commands.draw_images = lambda model, drawn: time.sleep(seconds) or draw(model, drawn)


def started(folder: Path, model: Path, out: Path, before, n: int = 6) -> list[Command]:
    prompts = ("--prompt", "a red star", "-n", n, "--batch-size", 1)
    return ranks(folder, 2, "sample", "--model", model, *FAST, *prompts, "--out", out, before=before)


def test_what_is_wrong_in_one_process_ends_all_with_one_line(tiny_runs, tmp_path):
    both = started(tmp_path, tiny_runs["text"], tmp_path / "out", partial(broken_rank, "1"))
    assert [one.wait() for one in both] == [4, 4], both[0].stderr + both[1].stderr
    said = [line for one in both for line in one.stderr.splitlines() if line.startswith("ldm: ")]
    assert said == ["ldm: the model gives NaN"]
    record = json.loads((tmp_path / "out" / "request.json").read_text())
    assert sorted(record["files"]) == ["000000.png", "000001.png", "000002.png"], "of both processes, without the lost"


def test_a_signal_to_one_process_stops_all_and_the_same_command_goes_on(tiny_runs, tmp_path):
    model, out = tiny_runs["text"], tmp_path / "out"
    both = started(tmp_path, model, out, partial(slow_pictures, 0.3))
    assert both[1].until(lambda: (out / "000001.png").exists())
    os.kill(both[1].pid, signal.SIGTERM)
    assert [one.wait() for one in both] == [143, 143], both[0].stderr + both[1].stderr
    left = [k for k in range(6) if not (out / f"{k:06d}.png").exists()]
    assert 0 < len(left) < 6 and f"{len(left)} of 6 images missing" in both[0].stderr
    record = json.loads((out / "request.json").read_text())
    assert len(record["files"]) == 6 - len(left)
    words = ("sample", "--model", model, *FAST, "--prompt", "a red star", "-n", 6)
    assert tiny.ldm(*words, "--out", out).code == 0
    assert tiny.ldm(*words, "--out", tmp_path / "whole").code == 0
    assert files(out) == files(tmp_path / "whole")


def patient(seconds: float) -> None:
    """A phase of rank 1 that lasts longer than process groups wait where nobody says how long."""
    from torch.distributed import distributed_c10d

    distributed_c10d.default_pg_timeout = timedelta(seconds=seconds / 2)
    if os.environ["RANK"] == "1":
        slow_pictures(seconds)


def test_a_long_phase_of_one_process_ends_nobody(tiny_runs, tmp_path):
    both = started(tmp_path, tiny_runs["text"], tmp_path / "out", partial(patient, 2.0), n=2)
    assert [one.wait() for one in both] == [0, 0], both[0].stderr + both[1].stderr


def test_a_process_that_vanishes_ends_the_others(tiny_runs, tmp_path):
    out = tmp_path / "out"
    both = started(tmp_path, tiny_runs["text"], out, partial(slow_pictures, 0.3))
    assert both[0].until(lambda: (out / "000000.png").exists())
    both[1].kill()
    assert both[0].wait() == 6 and "another process of this command ended" in both[0].stderr


@pytest.mark.parametrize(
    "todo, most, count, batch", [(8, 16, 1, 8), (8, 16, 2, 4), (8, 3, 2, 3), (1, 16, 3, 1), (0, 16, 2, 1)]
)
def test_batches_leave_no_process_without_work(todo, most, count, batch):
    folder = object.__new__(ImageFolder)
    folder.todo, folder.world = list(range(todo)), World(0, count)
    assert folder.largest_batch(most) == batch and sum(folder.in_batches(most), []) == folder.todo
