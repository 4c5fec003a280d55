"""Work is not lost: runs that are killed, damaged or stopped go on exactly, and nothing half-written is believed."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from processes import Command

from ldmcli.core import runs

ROOT = Path(__file__).resolve().parents[2]
# ten rows in batches of one, from the fifth step on of three, two at a time: epochs end inside a batch, and
# accumulation is in use
DATA = ("--data", "shapes", "--limit", 10, "--size", "16x16", "--flip")
LOOP = (
    "--batch-size",
    3,
    "--micro-batch",
    2,
    "--log-every",
    1,
    "--mixed-precision",
    "no",
    "--sample-every",
    0,
    "--eval-every",
    0,
    "--set",
    "train.warmup=3",
    "--set",
    "train.cooldown=0.4",
    "--set",
    "train.half_batch_steps=4",
    "-q",
)
GAN = (
    "--set",
    "loss.disc_weight=0.5",
    "--set",
    "loss.disc_start=9",
    "--set",
    "loss.disc_channels=8",
    "--set",
    "loss.disc_layers=1",
)
TRAINERS = ("train-ae", "train-ldm")
MAIN = {"train-ae": "autoencoder", "train-ldm": "model"}


@pytest.fixture(scope="module")
def arguments(ae, tmp_path_factory):
    """`arguments(trainer, out, …)`: a command line of either trainer. The autoencoder learns by Muon and has a
    discriminator from step 9 on, the diffusion model learns by AdamW, with dropped conditions."""
    cache = tmp_path_factory.mktemp("cache")

    def build(trainer: str, out: Path, *more, steps: int = 20) -> list[str]:
        own = (
            (*tiny.AE_NETWORK, *GAN)
            if trainer == "train-ae"
            else (
                *tiny.UNET,
                *tiny.ADAM,
                "--autoencoder",
                ae,
                "--condition",
                "class+text",
                "--set",
                f"data.cache_dir={cache}",
                "--set",
                "condition.drop=0.3",
            )
        )
        return [str(part) for part in (trainer, *DATA, *own, *LOOP, "--steps", steps, "--out", out, *more)]

    return build


@pytest.fixture(scope="module")
def reference(arguments, tmp_path_factory):
    """Run folders of both trainers that nothing disturbed: 20 steps, all checkpoints kept."""
    folder = tmp_path_factory.mktemp("whole")
    folders = {trainer: folder / trainer for trainer in TRAINERS}
    for trainer, folder in folders.items():
        ending = tiny.ldm(*arguments(trainer, folder, "--save-every", 1, "--keep", 20))
        assert ending.code == 0, ending.stderr
    return folders


def learned(folder: Path) -> list[dict]:
    """What the log says of each step but for time and memory."""
    timed = (
        "images_per_s",
        "seconds_per_step",
        "data_wait",
        "tflops_per_s",
        "mfu",
        "images_per_s_device",
        "peak_memory_bytes",
        "trained_seconds",
    )
    timed = (*timed, "eval_seconds")
    return [{k: v for k, v in line.items() if k not in timed} for line in tiny.log(folder)]


def assert_same_run(folder: Path, whole: Path) -> None:
    """Losses of every step, the rates, the weights for use, the average, optimisers: all equal bit for bit."""
    assert learned(folder) == learned(whole)
    assert tiny.same(tiny.weights(folder), tiny.weights(whole))
    assert tiny.same(tiny.checkpoint(folder), tiny.checkpoint(whole))
    assert tiny.state(folder)["state"] == "finished" and tiny.state(folder)["step"] == tiny.state(whole)["step"]


def cut_back(whole: Path, folder: Path, step: int) -> Path:
    """A copy of a run as a kill just after the checkpoint of `step` would have left it."""
    shutil.copytree(whole, folder)
    for path in (folder / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    state = tiny.state(folder) | {"state": "running", "step": step, "checkpoint": step}
    (folder / "run.json").write_text(json.dumps(state))
    return folder


def newest_step(folder: Path) -> int:
    newest = runs.newest_checkpoint(folder)
    return int(newest.name.removeprefix("step-")) if newest else 0


# --- reliability 1: killed -------------------------------------------------------------------------------------


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_run_killed_ten_times_at_random_moments_ends_as_if_it_had_not_been(trainer, tmp_path, arguments, reference):
    """Reliability 1: each restart goes on at most one save back, and there is always a whole checkpoint."""
    out, chance = tmp_path / "run", random.Random(trainer)
    line = arguments(trainer, out, "--save-every", 1, "--keep", 20)
    for attempt in range(10):
        step = newest_step(out)
        command = Command(tmp_path / f"{attempt}.log", *line)
        if attempt % 3 == 0:
            wait_while_it_begins(command, chance.random())
        else:
            wait_for_steps(command, out, step + chance.randrange(3), chance.random() / 20)
        assert command.kill() == -signal.SIGKILL, command.stderr
        # one step is trained while the checkpoint of the one before is written
        assert newest_step(out) >= max(step, whole_lines(out) - 2), f"attempt {attempt}: {command.stderr}"
    ending = tiny.ldm(*line)
    assert ending.code == 0, ending.stderr
    assert_same_run(out, reference[trainer])


def whole_lines(folder: Path) -> int:
    log = folder / "metrics.jsonl"
    return log.read_text().count("\n") if log.exists() else 0


def wait_while_it_begins(command: Command, seconds: float) -> None:
    command.until(lambda: seconds_of(command.pid) > seconds)


def wait_for_steps(command: Command, folder: Path, lines: int, seconds: float) -> None:
    command.until(lambda: whole_lines(folder) > lines)
    now = seconds_of(command.pid)
    command.until(lambda: seconds_of(command.pid) > now + seconds)


def seconds_of(pid: int) -> float:
    """Processor time that a process has used, so that a busy machine does not move the moment of a kill."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return float("inf")
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("point", ["after first", "before manifest", "before rename"])
def test_a_kill_inside_the_write_of_a_checkpoint_leaves_the_one_before(trainer, point, tmp_path, arguments, reference):
    """Reliability 1: the unfinished folder is named in one warning, removed, and the step before goes on."""
    out = cut_back(reference[trainer], tmp_path / "run", 17)
    marker = {
        "after first": f"{MAIN[trainer]}.safetensors",
        "before manifest": "state.json",
        "before rename": "manifest.json",
    }[point]
    line = arguments(trainer, out, "--save-every", 1, "--keep", 20)
    pause = point.replace("first", MAIN[trainer])
    command = Command(tmp_path / "log", *line, env={"LDM_DEBUG_PAUSE": f"{pause}=600"})
    unfinished = out / "checkpoints" / ".step-00000018.tmp"
    assert command.until((unfinished / marker).exists), command.stderr
    assert command.kill() == -signal.SIGKILL
    assert unfinished.exists() and newest_step(out) == 17
    ending = tiny.ldm(*line)
    assert ending.code == 0, ending.stderr
    warnings = [text for text in ending.stderr.splitlines() if text.startswith("ldm: warning: ")]
    assert warnings == ["ldm: warning: .step-00000018.tmp: an unfinished checkpoint, removed"]
    assert not list(out.rglob("*.tmp"))
    assert_same_run(out, reference[trainer])


def test_kill_minus_9_of_the_whole_process_group_of_a_command_loses_one_save_at_most(tmp_path, arguments, reference):
    """Reliability 1, through `python -m ldmcli` as a shell starts it."""
    out = tmp_path / "run"
    line = arguments("train-ae", out, "--save-every", 1, "--keep", 20)
    with open(tmp_path / "log", "w") as log:
        command = subprocess.Popen(
            [sys.executable, "-m", "ldmcli", *line],
            stderr=log,
            start_new_session=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        while whole_lines(out) < 3 and command.poll() is None:
            time.sleep(0.01)
        os.killpg(command.pid, signal.SIGKILL)
        assert command.wait() == -signal.SIGKILL
    assert newest_step(out) >= whole_lines(out) - 2 >= 1
    assert tiny.ldm(*line).code == 0
    assert_same_run(out, reference["train-ae"])


def test_a_run_killed_before_its_first_checkpoint_begins_anew_with_a_clean_log(tmp_path, arguments, reference):
    """Reliability 1: what an attempt without a checkpoint logged is not counted twice."""
    out = tmp_path / "run"
    command = Command(tmp_path / "log", *arguments("train-ae", out))
    command.until(lambda: whole_lines(out) >= 2)
    assert command.kill() == -signal.SIGKILL and newest_step(out) == 0
    with open(out / "metrics.jsonl", "a") as log:
        log.write('{"step": 3, "loss_')  # cut in the middle of a line
    assert tiny.ldm(*arguments("train-ae", out)).code == 0
    assert learned(out) == learned(reference["train-ae"])


@pytest.mark.parametrize("left", [[], [".lock", ".config.toml.77.tmp"], [".lock", ".run.json.77.tmp", "tokenizer"]])
def test_what_a_kill_before_the_first_file_leaves_is_not_taken_for_somebody_elses(left, tmp_path, arguments):
    """Reliability 1: a start that was killed in its first moments can be repeated in the same folder."""
    out = tmp_path / "run"
    out.mkdir()
    for name in left:
        (out / name).mkdir() if name == "tokenizer" else (out / name).touch()
    assert tiny.ldm(*arguments("train-ldm", out, steps=1)).code == 0
    assert not list(out.rglob("*.tmp")) and tiny.state(out)["state"] == "finished"


def test_run_json_is_the_first_file_of_a_run(tmp_path, arguments, monkeypatch):
    """Reliability 1: killed anywhere after the first file, the folder is known as a run."""
    from ldmcli.core import files

    out, written, whole = tmp_path / "run", [], files.write_bytes
    monkeypatch.setattr(files, "write_bytes", lambda path, data: (written.append(path), whole(path, data))[1])
    assert tiny.ldm(*arguments("train-ae", out, steps=1)).code == 0
    assert written[0] == out / "run.json"


def test_fresh_that_is_killed_half_way_leaves_a_run_that_begins_anew(tmp_path, arguments, reference, monkeypatch):
    """Reliability 1 and 9: `run.json` goes last and no longer promises a finished run."""
    out = cut_back(reference["train-ae"], tmp_path / "run", 20)
    unlink = Path.unlink

    def killed(path, *args, **kwargs):
        if path.name == "metrics.jsonl":
            raise KeyboardInterrupt
        unlink(path, *args, **kwargs)

    line = arguments("train-ae", out, "--save-every", 1, "--keep", 20)
    monkeypatch.setattr(Path, "unlink", killed)
    assert tiny.ldm(*line, "--fresh").code == 130
    monkeypatch.setattr(Path, "unlink", unlink)
    assert tiny.ldm(*line).code == 0
    assert_same_run(out, reference["train-ae"])


# --- reliability 3: damaged ------------------------------------------------------------------------------------


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(bytes(content))


def cut_the_tail(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


@pytest.mark.parametrize("damage", [flip_a_byte, cut_the_tail])
@pytest.mark.parametrize(
    "name", ["model.safetensors", "ema.safetensors", "optimizer-model.safetensors", "state.json", "manifest.json"]
)
def test_a_damaged_checkpoint_is_found_by_its_hashes_and_the_one_before_goes_on(
    name, damage, tmp_path, arguments, reference
):
    """Reliability 3: a flipped byte or a cut tail in any file of the newest checkpoint."""
    out = cut_back(reference["train-ldm"], tmp_path / "run", 19)
    broken = out / "checkpoints" / "step-00000019"
    damage(broken / name)
    if (damage, name) == (flip_a_byte, "manifest.json"):  # a digit of a hash: still JSON
        assert runs.problems(broken)
    ending = tiny.ldm(*arguments("train-ldm", out, "--save-every", 1, "--keep", 20))
    assert ending.code == 0, ending.stderr
    assert f"ldm: warning: {broken}: " in ending.stderr and "the checkpoint before it is used" in ending.stderr
    assert_same_run(out, reference["train-ldm"])


def test_a_run_whose_every_checkpoint_is_damaged_is_refused_not_begun_anew(tmp_path, arguments, reference):
    """Reliability 3: lost work is said, with code 4, and nothing is written over it."""
    out = cut_back(reference["train-ae"], tmp_path / "run", 2)
    for folder in (out / "checkpoints").iterdir():
        flip_a_byte(folder / "ema.safetensors")
    before = (out / "model.safetensors").read_bytes()
    ending = tiny.ldm(*arguments("train-ae", out))
    assert ending.code == 4 and "step 2 was saved, but no checkpoint in it is whole" in ending.line
    assert (out / "model.safetensors").read_bytes() == before
    assert tiny.ldm(*arguments("train-ae", out, "--fresh", steps=1)).code == 0


@pytest.mark.parametrize("damage", [flip_a_byte, cut_the_tail])
def test_no_command_uses_damaged_weights(damage, tmp_path, arguments, reference):
    """Reliability 3: sample, eval-fid and training on them end with code 4."""
    out = cut_back(reference["train-ldm"], tmp_path / "run", 1)
    damage(out / "model.safetensors")
    for line in (
        ("sample", "--model", out, "--prompt", "a circle", "--out", tmp_path / "a"),
        ("eval-fid", "--model", out, *DATA[:-1], "-n", 2),
        arguments("train-ldm", tmp_path / "b", "--init-from", out, steps=1),
    ):
        ending = tiny.ldm(*line)
        assert ending.code == 4 and "damaged" in ending.line, (line[0], ending.stderr)


def test_a_run_tells_what_it_began_with(tmp_path, arguments, reference):
    """The weights of another run bring that run's steps and seconds with them, and those of all runs before it."""
    parts = []
    for name, source in (("a", reference["train-ldm"]), ("b", tmp_path / "a"), ("c", tmp_path / "b@1")):
        assert tiny.ldm(*arguments("train-ldm", tmp_path / name, "--init-from", source, steps=1)).code == 0
        parts.append(tiny.state(tmp_path / name)["begun_from"])
    first, first_of_all = tiny.state(reference["train-ldm"]), tiny.state(tmp_path / "a")
    assert "begun_from" not in first
    assert parts[0] == {"name": "train-ldm", "steps": first["step"], "seconds": first["trained_seconds"]}
    assert [part["name"] for part in parts[1:]] == ["a", "b"]
    assert [part["steps"] for part in parts[1:]] == [first["step"] + 1, first["step"] + 2]
    assert parts[1]["seconds"] == pytest.approx(first["trained_seconds"] + first_of_all["trained_seconds"])
    assert f"It began with the weights of a ({first['step'] + 1} steps" in (tmp_path / "b" / "README.md").read_text()


# --- reliability 5: stopped and gone on ------------------------------------------------------------------------


@pytest.fixture
def signal_at(monkeypatch):
    """`signal_at(7, SIGTERM)`: the signal arrives in step 7, between its update and the loop's look at the flags."""
    log = runs.RunFolder.log

    def arrange(step: int, *numbers: int) -> None:
        def logging(self, **values):
            log(self, **values)
            if values.get("step") == step and "lr_factor" in values:
                for number in numbers:
                    os.kill(os.getpid(), number)

        monkeypatch.setattr(runs.RunFolder, "log", logging)

    return arrange


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_run_stopped_at_7_and_13_equals_one_that_was_not(trainer, workers, tmp_path, arguments, reference, signal_at):
    """Reliability 5: mid-epoch, with accumulation, flips, dropped conditions, warm-up, decay, the average, and
    the discriminator's start between the stops; the total of steps is the target."""
    out = tmp_path / "run"
    line = arguments(trainer, out, "--workers", workers)
    for step in (7, 13):
        signal_at(step, signal.SIGTERM)
        ending = tiny.ldm(*line)
        assert ending.code == 143 and f"saved at step {step}" in ending.line
        assert tiny.state(out)["state"] == "interrupted" and newest_step(out) == step
    signal_at(0)
    assert tiny.ldm(*line).code == 0
    assert [entry["step"] for entry in learned(out) if "lr_factor" in entry] == list(range(1, 21))
    assert_same_run(out, reference[trainer])


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    """Parquet files, read as they come: ten captioned rows to train on, three to validate."""
    from datasets import Dataset, Features, Image, Value

    folder = tmp_path_factory.mktemp("stream") / "parquet"
    paths = tiny.noisy_images(folder.parent / "noisy", 13, 16)
    for split, part in (("train", paths[:10]), ("validation", paths[10:])):
        rows = {
            "image": [{"bytes": path.read_bytes(), "path": path.name} for path in part],
            "text": [f"picture {path.stem}" for path in part],
        }
        features = Features({"image": Image(), "text": Value("string")})
        Dataset.from_dict(rows, features).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_streamed_run_stopped_at_7_and_13_equals_one_that_was_not(
    trainer, tmp_path, arguments, stream, signal_at, monkeypatch
):
    """Reliability 5 with a streamed set: what stands at a position follows from the seed and the data alone."""
    from ldmcli.data import streaming

    monkeypatch.setattr(streaming, "HEAD_ROWS", 24)  # 60 positions are asked for
    own = ("--data", stream, "--limit", 0, "--streaming", *(("--condition", "text") if trainer == "train-ldm" else ()))
    lines = [arguments(trainer, tmp_path / name, *own) for name in ("whole", "stopped")]
    ending = tiny.ldm(*lines[0])
    assert ending.code == 0, ending.stderr
    for step in (7, 13):
        signal_at(step, signal.SIGTERM)
        ending = tiny.ldm(*lines[1])
        assert ending.code == 143 and f"saved at step {step}" in ending.line, ending.stderr
    signal_at(0)
    assert tiny.ldm(*lines[1]).code == 0
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


def test_equal_captions_give_an_equal_vocabulary(tmp_path):
    """Reliability 5: a start that is repeated from nothing learns the numbers of words anew."""
    from ldmcli.networks.conditioners import train_vocabulary

    captions = [
        f"a {size} {shape}, {place}"
        for size in ("large", "little", "tiny")
        for shape in ("circle", "square", "triangle")
        for place in ("leftwards", "rightwards", "upwards")
    ]
    found = set()
    for attempt in range(4):
        train_vocabulary(captions, 60, tmp_path / str(attempt))
        found.add((tmp_path / str(attempt) / "vocab.txt").read_text())
    assert len(found) == 1


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_codebook_and_its_revival_go_on_exactly(optimizer, tmp_path, arguments, signal_at):
    """Reliability 5 for VQ: which codes were used since the last revival is part of a checkpoint."""
    own = (
        "--reg",
        "vq",
        "--set",
        "autoencoder.codebook_size=32",
        "--set",
        "autoencoder.revive_codes=4",
        "--set",
        f"train.optimizer={optimizer}",
        "--set",
        "loss.disc_weight=0",
    )
    lines = [arguments("train-ae", tmp_path / name, *own, steps=10) for name in ("whole", "stopped")]
    assert tiny.ldm(*lines[0]).code == 0
    signal_at(6, signal.SIGINT)
    assert tiny.ldm(*lines[1]).code == 130
    signal_at(0)
    assert tiny.ldm(*lines[1]).code == 0
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


# --- reliability 4: signals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_in_the_last_step_is_saved_before_it_is_said_to_be(
    number, code, tmp_path, arguments, reference, signal_at
):
    """Reliability 4: the line that says "saved" is true in every step, the last included."""
    out = cut_back(reference["train-ae"], tmp_path / "run", 18)
    line = arguments("train-ae", out, "--keep", 20)
    signal_at(20, number)
    ending = tiny.ldm(*line)
    assert ending.code == code and "saved at step 20" in ending.line and newest_step(out) == 20
    signal_at(0)
    assert tiny.ldm(*line).code == 0
    assert_same_run(out, reference["train-ae"])


def test_usr1_saves_and_goes_on(tmp_path, arguments, signal_at):
    """Reliability 4: SIGUSR1 asks for a checkpoint and nothing else."""
    out = tmp_path / "run"
    signal_at(2, signal.SIGUSR1)
    ending = tiny.ldm(*arguments("train-ae", out, steps=4))
    assert ending.code == 0 and tiny.state(out)["state"] == "finished"
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]


def test_a_signal_during_the_last_evaluation_loses_nothing(tmp_path, arguments, reference, monkeypatch):
    """Reliability 4: the last step is saved before it is evaluated, and going on repeats the evaluation only."""
    from ldmcli.training.diffusion import DiffusionObjective

    out, evaluate = cut_back(reference["train-ldm"], tmp_path / "run", 19), DiffusionObjective.evaluate

    def interrupted(self, stopped):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(self, stopped)

    line = arguments("train-ldm", out, "--keep", 20)
    monkeypatch.setattr(DiffusionObjective, "evaluate", interrupted)
    ending = tiny.ldm(*line)
    assert ending.code == 143 and "saved at step 20" in ending.line and newest_step(out) == 20
    monkeypatch.setattr(DiffusionObjective, "evaluate", evaluate)
    assert tiny.ldm(*line).code == 0
    assert_same_run(out, reference["train-ldm"])


def test_a_signal_while_latents_are_cached_keeps_what_is_encoded(tmp_path, arguments, reference, monkeypatch):
    """Reliability 4: encoding ends between two batches with code 143, and the next start encodes the rest."""
    from ldmcli.training.latents import LatentStore

    encode, asked = LatentStore.encode_views, []

    def interrupted(self, pixels):
        asked.append(len(pixels))
        os.kill(os.getpid(), signal.SIGTERM)
        return encode(self, pixels)

    line = arguments("train-ldm", tmp_path / "run", "--set", f"data.cache_dir={tmp_path / 'own'}", "--limit", 80)
    monkeypatch.setattr(LatentStore, "encode_views", interrupted)
    ending = tiny.ldm(*line)
    assert ending.code == 143 and asked == [64] and not list((tmp_path / "own").rglob("*.tmp"))

    def counted(self, pixels):
        asked.append(len(pixels))
        return encode(self, pixels)

    monkeypatch.setattr(LatentStore, "encode_views", counted)
    assert tiny.ldm(*line, "--steps", 1).code == 0
    assert asked[1] == 16


def test_a_second_ctrl_c_ends_at_once_and_spoils_nothing(tmp_path, arguments, reference, monkeypatch):
    """Reliability 4: SIGINT twice inside a step."""
    from ldmcli.core import signals
    from ldmcli.training.autoencoder import AutoencoderObjective

    out, loss = cut_back(reference["train-ae"], tmp_path / "run", 17), AutoencoderObjective.loss
    monkeypatch.setattr(signals, "SAME_PRESS_SECONDS", -1)

    def pressed(self, *args):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return loss(self, *args)

    line = arguments("train-ae", out, "--save-every", 1, "--keep", 20)
    monkeypatch.setattr(AutoencoderObjective, "loss", pressed)
    assert tiny.ldm(*line).code == 130
    assert tiny.state(out)["state"] == "interrupted" and newest_step(out) == 17
    monkeypatch.setattr(AutoencoderObjective, "loss", loss)
    assert tiny.ldm(*line).code == 0
    assert_same_run(out, reference["train-ae"])


# --- reliability 6: which checkpoint is the newest -------------------------------------------------------------


def test_the_step_inside_a_checkpoint_decides_not_names_sizes_or_times(tmp_path, arguments, reference):
    """Reliability 6: with stray entries, shuffled times, and a copy under the name of a later step."""
    out = cut_back(reference["train-ae"], tmp_path / "run", 18)
    folder = out / "checkpoints"
    shutil.copytree(folder / "step-00000009", folder / "step-00000019")  # says 9 inside
    for stray in ("checkpoint-old", "step-00000020.bak", "checkpoint-1000"):
        shutil.copytree(folder / "step-00000010", folder / stray)
    for age, path in enumerate(sorted(folder.iterdir())):
        os.utime(path, (age * 1000, age * 1000))
    ending = tiny.ldm(*(part for part in arguments("train-ae", out, "--save-every", 1, "--keep", 20) if part != "-q"))
    assert ending.code == 0 and "going on from step 18" in ending.stderr
    for stray in ("checkpoint-old", "step-00000020.bak", "checkpoint-1000"):
        assert f"ldm: warning: {folder / stray}: not a checkpoint of this run, left alone" in ending.stderr
        assert (folder / stray).is_dir()
    assert json.loads((folder / "step-00000019" / "manifest.json").read_text())["step"] == 19
    assert learned(out) == learned(reference["train-ae"])
    assert tiny.same(tiny.weights(out), tiny.weights(reference["train-ae"]))


@pytest.mark.parametrize("option", ["--autoencoder", "--init-from"])
def test_a_path_with_a_slip_is_refused_and_starts_nothing(option, tmp_path, arguments):
    """Reliability 6: code 4 at once, and no run folder of a training that was not meant."""
    ending = tiny.ldm(*arguments("train-ldm", tmp_path / "run", option, tmp_path / "no-such-run", steps=1))
    assert ending.code == 4 and "no-such-run" in ending.line
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_run_without_its_checkpoints_is_refused_not_begun_anew(tmp_path, arguments, reference):
    """Reliability 6: only a folder that never saved starts afresh."""
    out = cut_back(reference["train-ae"], tmp_path / "run", 5)
    shutil.rmtree(out / "checkpoints")
    ending = tiny.ldm(*arguments("train-ae", out))
    assert ending.code == 4 and "--fresh" in ending.line
