"""Scenarios of docs/reliability.md that need a real process, two of them, or a look at what stands beside a number."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image, ImageCms
from processes import Command, ranks
from safetensors import safe_open

import ldmcli

ROOT = Path(__file__).resolve().parents[1]
PROMPT = ("--prompt", "a red circle", "--seed", 5, "--steps", 2)


@pytest.fixture(scope="module")
def text_model(ae, tmp_path_factory) -> Path:
    """Text to image; its average lags far behind its weights."""
    run = tmp_path_factory.mktemp("reliability") / "text"
    tiny.train_ldm(run, ae, *tiny.ADAM, "--condition", "text", "--lr", 1e-2, "--set", "train.ema_decay=0.999", steps=12)
    return run


def whole_pictures(folder: Path) -> dict[str, bytes]:
    """Bytes of the numbered pictures, each of which can be read to its end."""
    found = {path.name: path.read_bytes() for path in sorted(folder.glob("0*.png"))}
    for name in found:
        Image.open(folder / name).load()
    return found


# --- reliability 4 and 21: samples ---------------------------------------------------------------------------------


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)])
def test_samples_that_were_stopped_are_whole_and_the_same_command_completes_them(number, code, text_model, tmp_path):
    """Reliability 4: a real process ended half way leaves whole pictures; the rest comes out as it would have."""
    asked = ("sample", "--model", text_model, *PROMPT, "-n", 16, "--batch-size", 1)
    assert tiny.ldm(*asked, "--out", tmp_path / "whole").code == 0
    out = tmp_path / "out"
    command = Command(tmp_path / "log", *asked, "--out", out, before=slowly_drawn)
    assert command.until(lambda: len(list(out.glob("0*.png"))) >= 3), command.stderr
    assert command.kill(number) == code, command.stderr
    first = whole_pictures(out)
    assert 3 <= len(first) < 16 and not (out / "grid.png").exists()
    if number == signal.SIGTERM:
        assert f"{16 - len(first)} of 16 images missing" in command.stderr and not list(out.glob(".*"))
    ending = tiny.ldm(*asked, "--out", out, "--json")
    assert ending.code == 0 and ending.json["drawn"] == 16 - len(first)
    assert whole_pictures(out) == whole_pictures(tmp_path / "whole") and (out / "grid.png").exists()


def slowly_drawn() -> None:
    from ldmcli.sampling import commands

    draw = commands.draw_images
    commands.draw_images = lambda *args: (time.sleep(0.05), draw(*args))[1]


def test_two_processes_of_a_launcher_leave_the_samples_of_one(text_model, tmp_path):
    """Reliability 21: sample k does not depend on how many processes a job has."""
    asked = ("sample", "--model", text_model, *PROMPT, "-n", 5, "--batch-size", 2)
    assert tiny.ldm(*asked, "--out", tmp_path / "one").code == 0
    both = ranks(tmp_path, 2, *asked, "--out", tmp_path / "two")
    assert [command.wait() for command in both] == [0, 0], both[0].stderr + both[1].stderr
    assert whole_pictures(tmp_path / "one") == whole_pictures(tmp_path / "two")


# --- reliability 15: which weights --------------------------------------------------------------------------------


def test_raw_and_averaged_weights_are_measured_and_named(text_model):
    """Reliability 15: both kinds are float32, give other numbers, and the document says which was measured."""
    measured = {}
    for weights in ("ema", "raw"):
        ending = tiny.ldm(
            "eval-fid",
            "--model",
            text_model,
            "--features",
            "effnet-lite0",
            "-n",
            4,
            "--steps",
            2,
            "--weights",
            weights,
            "--json",
        )
        assert ending.code == 0, ending.stderr
        measured[weights] = ending.json
        assert ending.json["weights"] == weights
    values = [next(iter(found["metrics"].values())) for found in measured.values()]
    assert abs(values[0] - values[1]) > 1e-5 * abs(values[0])  # the same weights give the same digits
    plain = tiny.ldm("eval-fid", "--model", text_model, "--features", "effnet-lite0", "-n", 4, "--steps", 2)
    assert "averaged weights (EMA)" in plain.stdout and f"{values[0]:.4g}" in plain.stdout
    kept = tiny.checkpoint(text_model)
    floating = [t for name, t in kept.items() if name.startswith(("model.", "ema.")) and t.is_floating_point()]
    assert floating and all(t.dtype == torch.float32 for t in floating)


def test_raw_weights_that_are_gone_are_refused(text_model, tmp_path):
    """Reliability 15: never a quiet fall-back to the other kind."""
    copy = tmp_path / "run"
    shutil.copytree(text_model, copy)
    shutil.rmtree(copy / "checkpoints")
    ending = tiny.ldm("eval-fid", "--model", copy, "-n", 2, "--weights", "raw")
    assert ending.code == 4 and "no raw weights" in ending.line
    (copy / "model.safetensors").unlink()
    assert tiny.ldm("eval-fid", "--model", copy, "-n", 2).code == 4
    refused = tiny.ldm("eval-fid", "--images", tmp_path, "--data", "shapes", "--weights", "raw")
    assert refused.code == 2 and "--weights raw" in refused.line


# --- reliability 23 and 24: pictures ------------------------------------------------------------------------------


# prints the memory that a command took at its peak, in kB: before it (with torch), and after it
MEASURED = """
import re, sys
from ldmcli.cli import main
import torch
def peak(): print("peak", re.search("VmHWM:[^0-9]*([0-9]+)", open("/proc/self/status").read())[1])
peak()
code = main(sys.argv[1:])
peak()
sys.exit(code)
"""


@pytest.mark.parametrize("command, code", [("data", 0), ("train-ae", 3)])
def test_pictures_of_hundreds_of_megapixels_are_refused_without_their_memory(command, code, tmp_path):
    """Reliability 23: by their headers, whatever else is in the folder; the limit is a number in the line.

    torch alone takes more than they would, so a command is held to what it takes on top. `ldm data` counts what a
    training costs, for which it brings torch's shapes without content.
    """
    folder = tmp_path / "data"
    tiny.noisy_images(folder, 4)
    for side in (10_000, 15_000):
        Image.new("L", (side, side)).save(folder / f"{side}.png")
    line = ["data", folder] if command == "data" else ["train-ae", "--data", folder, "--size", 20, "--steps", 1]
    # by the program itself: what the system says of a child counts the memory of the process that forked it, too
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *map(str, line), "--out", tmp_path / "out"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == code, done.stderr
    said = " ".join((done.stdout + done.stderr).split())
    for side in (10_000, 15_000):
        assert f"{side}.png: {side}x{side} pixels, over the limit of 89,478,485" in said
    before, after = (int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("peak "))
    assert after - before < (300_000 if command == "data" else 150_000), (before, after)


def test_a_colour_profile_changes_no_pixel(tmp_path):
    """Reliability 24: profiles are ignored, as the manual says; pixels count as sRGB."""
    from ldmcli.data.decode import decode

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    image.save(tmp_path / "with.png", icc_profile=profile)
    image.save(tmp_path / "without.png")
    assert Image.open(tmp_path / "with.png").info["icc_profile"] == profile
    seen = [np.asarray(decode(tmp_path / name)) for name in ("with.png", "without.png")]
    assert np.array_equal(*seen) and np.array_equal(seen[0], np.asarray(image))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_several_frames_are_warned_about_once(kind, tmp_path):
    """Reliability 24: the first frame is taken, and one line says so; a still picture is silent."""
    folder = tmp_path / "data"
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    tiny.noisy_images(folder, 3)
    assert "warning" not in tiny.train_ae(tmp_path / "still", data=("--data", folder, "--size", 20), steps=1).stderr
    for name in ("a", "b"):
        frames[0].save(folder / f"{name}.{kind.lower()}", kind, save_all=True, append_images=frames[1:])
    ending = tiny.train_ae(tmp_path / "run", data=("--data", folder, "--size", 20), steps=1)
    warnings = [line for line in ending.stderr.splitlines() if line.startswith("ldm: warning: ")]
    assert len(warnings) == 1 and "holds several frames" in warnings[0] and f".{kind.lower()}:" in warnings[0]


# --- reliability 27: kill -9 while latents are cached -------------------------------------------------------------


def in_small_shards() -> None:
    """Shards of eight rows, slowly, so that a kill finds some written and some not."""
    from ldmcli.data import cache
    from ldmcli.training.latents import LatentStore

    cache.SHARD_ROWS = 8
    encode = LatentStore.encode_views
    LatentStore.encode_views = lambda self, pixels: (time.sleep(0.1), encode(self, pixels))[1]


@pytest.mark.parametrize("moment", ["shard", "write"])
def test_kill_minus_9_while_latents_are_cached_loses_a_shard_at_most(moment, ae, tmp_path):
    """Reliability 27: the same command goes on, encodes what is missing, and the cache is that of one go."""
    data = ("--data", "shapes", "--limit", 40, "--size", "20x20")

    def command(name: str) -> tuple:
        return (
            "train-ldm",
            "--autoencoder",
            ae,
            *data,
            *tiny.UNET,
            *tiny.QUIET_LOOP,
            "--steps",
            1,
            "--out",
            tmp_path / name / "run",
            "--set",
            f"data.cache_dir={tmp_path / name / 'cache'}",
        )

    def stored(name: str) -> dict[str, bytes]:
        root = tmp_path / name / "cache"
        return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}

    whole = Command(tmp_path / "whole.log", *command("whole"), before=in_small_shards)
    assert whole.wait() == 0, whole.stderr
    killed = Command(
        tmp_path / "killed.log",
        *command("killed"),
        before=in_small_shards if moment == "shard" else killed_before_a_list,
    )
    if moment == "shard":
        assert killed.until(lambda: any((tmp_path / "killed").rglob("*.json"))), killed.stderr
        assert killed.kill() == -signal.SIGKILL, killed.stderr
    else:
        assert killed.wait() == -signal.SIGKILL, killed.stderr
    left = stored("killed")
    lists = [name for name in left if name.endswith(".json")]
    assert 1 <= len(lists) < 5
    again = Command(tmp_path / "again.log", *command("killed"), before=in_small_shards)
    assert again.wait() == 0, again.stderr
    assert f"{40 - 8 * len(lists)}/{40 - 8 * len(lists)}" in again.stderr  # those missing, and no others
    assert stored("killed") == stored("whole")
    assert tiny.same(tiny.weights(tmp_path / "killed" / "run"), tiny.weights(tmp_path / "whole" / "run"))


def killed_before_a_list() -> None:
    """Ends the process between the array and the list of the third shard."""
    from ldmcli.core import files

    in_small_shards()
    write_text, written = files.write_text, []

    def write(path: Path, text: str) -> None:
        if "cache" in path.parts and path.suffix == ".json":
            written.append(path)
            if len(written) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
        write_text(path, text)

    files.write_text = write


# --- what a run says of where it was trained ----------------------------------------------------------------------


def test_going_on_with_another_number_of_threads_is_warned_about_in_one_line(tmp_path):
    """Sums depend on the number of threads, so bit-equality ends there; the run itself goes on."""
    out = tmp_path / "run"
    tiny.train_ae(out, steps=1)
    state = out / "checkpoints" / "step-00000001" / "state.json"
    assert json.loads(state.read_text())["threads"] == torch.get_num_threads()
    assert "warning" not in tiny.train_ae(out, steps=2).stderr
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        ending = tiny.train_ae(out, steps=3)
    finally:
        torch.set_num_threads(threads)
    warnings = [line for line in ending.stderr.splitlines() if line.startswith("ldm: warning: ")]
    assert len(warnings) == 1 and f"with {threads} threads, now {threads + 1}" in warnings[0]


def test_run_json_names_the_device_and_the_cores(ae):
    """A figure means something together with the machine; neither a host's name nor a path is kept."""
    machine = tiny.state(ae)["machine"]
    assert machine["device_type"] == "cpu" and machine["processes"] == 1
    assert len(machine["device"]) > 2 and machine["cpu_count"] == len(os.sched_getaffinity(0))
    assert os.uname().nodename not in machine.values()


def test_fresh_removes_what_trackers_wrote_and_leaves_other_files(tmp_path):
    """Curves of the run before must not go on in the new one's."""
    out = tmp_path / "run"
    tiny.train_ae(out, steps=1)
    for name in ("tensorboard/events.out.tfevents.1.host", "wandb/offline-run/run.wandb", "mine/notes.txt"):
        (out / name).parent.mkdir(parents=True)
        (out / name).touch()
    tiny.train_ae(out, "--fresh", steps=1)
    assert not (out / "tensorboard").exists() and not (out / "wandb").exists() and (out / "mine/notes.txt").exists()


def test_a_kill_between_statistics_and_weights_pairs_no_strangers(ae, tmp_path, monkeypatch):
    """stats.json of a step and weights of another: the weights' own scale is used, whichever file is older."""
    from ldmcli.core import files

    out = tmp_path / "run"
    tiny.train_ae(out, "--lr", 1e-2, steps=2)
    before, save = ldmcli.load(out).scale, files.save_tensors

    def killed(path, *args, **kwargs):
        if path == out / "model.safetensors":
            raise KeyboardInterrupt
        return save(path, *args, **kwargs)

    monkeypatch.setattr(files, "save_tensors", killed)
    tiny.train_ae(out, "--lr", 1e-2, steps=4, code=130)
    monkeypatch.setattr(files, "save_tensors", save)
    newer = json.loads((out / "stats.json").read_text())["latent_scale"]
    assert tuple(newer["std"]) != before.std
    assert ldmcli.load(out).scale == before  # those of the weights that are there
    tiny.train_ae(out, "--lr", 1e-2, steps=4)
    assert ldmcli.load(out).scale.std == tuple(json.loads((out / "stats.json").read_text())["latent_scale"]["std"])
    with safe_open(out / "model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["latent_scale"])["std"] == list(ldmcli.load(out).scale.std)


@pytest.mark.parametrize("gpus, a_pass", [(1, 8), (2, 4), (3, 3)])
def test_a_plan_for_several_processes_counts_each_ones_share(gpus, a_pass):
    """`--plan --gpus N`: the batch of one process, the memory that each takes, the cores that they share."""
    line = ("train-ae", "--plan", "--json", "--batch-size", 8)
    found, one = (tiny.ldm(*line, "--gpus", n).json for n in (gpus, 1))
    assert found["batch"] == {"global": 8, "per_pass": a_pass, "processes": gpus}
    memory = found["memory"]
    assert memory["activations"] == a_pass * memory["per_image"] and memory["weights"] == one["memory"]["weights"]
    if not torch.cuda.is_available():
        assert memory["available"] == pytest.approx(one["memory"]["available"] / gpus, rel=0.2)
    assert tiny.ldm("train-ae", "--plan", "--batch-size", 2, "--gpus", 3).code == 2
