"""The run folder among other commands, on full disks, in places that cannot be written, and with too little data."""

import errno
import fcntl
import os
import resource
import signal
import socket
from pathlib import Path

import pytest
import tiny
from processes import Command, ranks

from ldmcli.core import files, runs

LOOP = (
    "--batch-size",
    3,
    "--log-every",
    1,
    "--save-every",
    1,
    "--sample-every",
    0,
    "--eval-every",
    0,
    "--mixed-precision",
    "no",
)


def arguments(out: Path, *more, rows: int = 10, steps: int = 3) -> list[str]:
    line = (
        "train-ae",
        "--data",
        "shapes",
        "--limit",
        rows,
        "--size",
        "16x16",
        *tiny.AE_NETWORK,
        *LOOP,
        "--steps",
        steps,
        "--out",
        out,
        *more,
    )
    return [str(part) for part in line]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder but the lock."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


# --- reliability 9: one writer ---------------------------------------------------------------------------------


def test_a_second_command_in_a_running_runs_folder_is_refused_until_the_first_is_dead(tmp_path):
    """Reliability 9: code 2, process and host are named, nothing is touched; after `kill -9` the lock is stale."""
    out = tmp_path / "run"
    first = Command(tmp_path / "log", *arguments(out), env={"LDM_DEBUG_PAUSE": "before rename=600"})
    # the first save is under way, and the second waits for it
    assert first.until(lambda: len(runs.read_log(out)) == 2), first.stderr
    assert first.until((out / "checkpoints" / ".step-00000001.tmp" / "manifest.json").exists), first.stderr
    before = contents(out)
    for more in ((), ("--fresh",)):
        ending = tiny.ldm(*arguments(out, *more))
        assert ending.code == 2, ending.stderr
        assert f"process {first.pid} on {socket.gethostname()} is writing here" in ending.line
    assert contents(out) == before and first.running
    assert first.kill() == -signal.SIGKILL
    assert tiny.ldm(*arguments(out)).code == 0
    assert tiny.state(out)["state"] == "finished"


def test_of_two_starts_at_the_same_moment_one_trains(tmp_path):
    """Reliability 9: a new folder is claimed once."""
    out = tmp_path / "run"
    both = [
        Command(tmp_path / f"{k}.log", *arguments(out), env={"LDM_DEBUG_PAUSE": "before rename=600"}) for k in range(2)
    ]
    both[0].until(lambda: not all(command.running for command in both))
    lost, won = sorted(both, key=lambda command: command.running)
    assert lost.wait() == 2 and f"process {won.pid} on " in lost.stderr
    assert won.until((out / "checkpoints" / ".step-00000001.tmp").exists) and won.running
    won.kill()


@pytest.fixture
def without_locks(monkeypatch):
    """`without_locks(errno)`: a file system that answers every request for a lock so."""

    def refuse(number: int) -> None:
        def flock(handle, operation):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "flock", flock)

    return refuse


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_stands_for_the_lock_where_the_file_system_has_none(number, tmp_path, without_locks):
    """Reliability 9, on a cluster's disk: one warning, the run trains, and nothing is left."""
    without_locks(number)
    out = tmp_path / "run"
    for steps in (1, 2):
        ending = tiny.ldm(*arguments(out, steps=steps))
        assert ending.code == 0, ending.stderr
        assert ending.stderr.count("no locks on this file system") == 1
        assert not (out / ".lock-owner").exists()


@pytest.mark.parametrize(
    "owner, code",
    [
        (f"process {os.getppid()} on {socket.gethostname()}", 2),  # is alive
        ("process 7 on another-machine", 2),  # nobody here can tell
        ("", 2),  # about to be written
        (f"process {2**22 - 1} on {socket.gethostname()}", 0),  # was killed
    ],
)
def test_the_file_that_stands_for_a_lock_is_as_good_as_its_owner(owner, code, tmp_path, without_locks):
    """Reliability 9: the owner and what to do are named; a dead one of this machine holds nothing."""
    without_locks(errno.ENOSYS)
    out = tmp_path / "run"
    out.mkdir()
    (out / ".lock-owner").write_text(owner)
    ending = tiny.ldm(*arguments(out, steps=1))
    assert ending.code == code, ending.stderr
    if code:
        assert f"{owner or 'another process'} is writing here" in ending.line
        assert f"remove {out / '.lock-owner'}" in ending.line
        assert (out / ".lock-owner").read_text() == owner and not (out / "run.json").exists()


def test_only_a_lock_that_is_held_means_another_process(tmp_path, without_locks):
    without_locks(errno.EWOULDBLOCK)
    ending = tiny.ldm(*arguments(tmp_path / "run"))
    assert ending.code == 2 and "another process is writing here; wait for it" in ending.line


def test_a_finished_run_is_left_as_it_is_and_other_settings_are_refused(tmp_path):
    """Reliability 9 (and 7): the same command says so and changes nothing; another one shows old and new."""
    out = tmp_path / "run"
    assert tiny.ldm(*arguments(out)).code == 0
    before = contents(out)
    same = tiny.ldm(*arguments(out))
    assert same.code == 0 and "finished at step 3; nothing to do" in same.stderr
    other = tiny.ldm(*arguments(out, "--set", "autoencoder.channels=16", "--seed", 1))
    assert other.code == 4
    assert "autoencoder.channels: 8 -> 16" in other.line and "train.seed: 0 -> 1" in other.line
    assert contents(out) == before
    more = tiny.ldm(*arguments(out, "--lr", "0.005", steps=4))
    assert more.code == 0 and "train.lr: 0.01 -> 0.005" in more.stderr and "going on from step 3" in more.stderr
    fresh = tiny.ldm(*arguments(out, "--fresh", "--seed", 1))
    assert fresh.code == 0 and [line["step"] for line in tiny.log(out) if "lr_factor" in line] == [1, 2, 3]


def test_a_folder_that_holds_other_files_is_not_made_a_run(tmp_path):
    """Reliability 9: somebody's photographs are no run folder, with or without --fresh."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"cat")
    for more in ((), ("--fresh",)):
        ending = tiny.ldm(*arguments(tmp_path / "photos", *more))
        assert ending.code == 2 and "holds files but is no run folder" in ending.line
    assert contents(tmp_path / "photos") == {"cat.png": b"cat"}


# --- reliability 2: a full disk --------------------------------------------------------------------------------


@pytest.fixture
def two_steps(tmp_path):
    """A run of three steps that ended after the second."""
    out = tmp_path / "run"
    assert tiny.ldm(*arguments(out, "--keep", 1, steps=2)).code == 0
    return out


def small_files_only() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000))


def test_a_save_that_does_not_fit_leaves_the_one_before(tmp_path, two_steps):
    """Reliability 2, with a file-size limit (`ulimit -f`) and one checkpoint to keep."""
    command = Command(tmp_path / "log", *arguments(two_steps, "--keep", 1), before=small_files_only)
    assert command.wait() == 6, command.stderr
    line = command.stderr.strip().splitlines()[-1]
    assert line.startswith(f"ldm: {two_steps}/checkpoints/") and "is full" in line
    assert " to write, " in line and " free; " in line
    state = tiny.state(two_steps)
    assert (state["state"], state["exit_code"], state["step"]) == ("failed", 6, 2)
    assert [path.name for path in (two_steps / "checkpoints").iterdir()] == ["step-00000002"]
    assert not runs.problems(two_steps / "checkpoints" / "step-00000002")
    assert not list(two_steps.rglob("*.tmp"))
    assert tiny.ldm(*arguments(two_steps, "--keep", 1)).code == 0


def test_free_space_is_asked_for_before_step_1(tmp_path, monkeypatch):
    """Reliability 2: too small a disk is refused with both numbers before any work is done."""
    monkeypatch.setattr(files, "free_bytes", lambda path: 50_000)
    ending = tiny.ldm(*arguments(tmp_path / "run"))
    assert ending.code == 6 and "are needed and 48.8 KiB are free" in ending.line
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_free_space_is_asked_for_before_each_save(tmp_path, two_steps, monkeypatch):
    """Reliability 2: the disk filled up since the start; what was saved stands, and nothing is left over."""
    free = files.free_bytes
    monkeypatch.setattr(files, "free_bytes", lambda path: 1000 if path.name == "checkpoints" else free(path))
    ending = tiny.ldm(*arguments(two_steps, "--keep", 1))
    assert ending.code == 6 and "1000 B are free" in ending.line
    assert [path.name for path in (two_steps / "checkpoints").iterdir()] == ["step-00000002"]


@pytest.mark.parametrize("name", ["metrics.jsonl", "model.safetensors", "00000002.png", "stats.json"])
def test_whatever_file_the_disk_has_no_room_for_the_command_ends_with_code_6(name, tmp_path, monkeypatch):
    """Reliability 2: log, weights, preview and statistics end a training as a checkpoint does."""
    import builtins
    import errno

    opened, moved = builtins.open, os.replace

    def full(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(
        builtins,
        "open",
        lambda path, mode="r", *args, **kwargs: (
            full(path) if "a" in mode and str(path).endswith(name) else opened(path, mode, *args, **kwargs)
        ),
    )
    monkeypatch.setattr(os, "replace", lambda a, b: full(b) if str(b).endswith(name) else moved(a, b))
    out = tmp_path / "run"
    ending = tiny.ldm(*arguments(out, "--sample-every", 2))
    assert ending.code == 6 and "full" in ending.line, ending.stderr
    assert tiny.state(out)["state"] == "failed" and not list(out.rglob("*.tmp"))
    monkeypatch.undo()
    assert tiny.ldm(*arguments(out, "--sample-every", 2)).code == 0


# --- a place that cannot be written ----------------------------------------------------------------------------


def without_privileges() -> None:
    """Permission bits hold for root, too, once its capabilities are gone."""
    import ctypes

    if os.geteuid() == 0:
        header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        assert ctypes.CDLL(None).capset(header, none) == 0


@pytest.mark.parametrize("below", ["", "new/run"])
def test_a_folder_without_permission_is_refused_by_name(below, tmp_path):
    """Contract, endings: what --out says is wrong is code 2, one line, before any work."""
    place = tmp_path / "place"
    place.mkdir(mode=0o555)
    command = Command(tmp_path / "log", *arguments(place / below), before=without_privileges)
    assert command.wait() == 2, command.stderr
    line = command.stderr.strip().splitlines()[-1]
    assert line.startswith("ldm: ") and str(place) in line and "--out" in line
    assert not list(place.iterdir())


def test_a_read_only_disk_is_refused_by_name(tmp_path, monkeypatch):
    """Contract, endings: EROFS, which no permission bit announces."""
    import errno

    def read_only(path, *args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, "mkdir", read_only)
    ending = tiny.ldm(*arguments(tmp_path / "run"))
    assert ending.code == 2 and "cannot be written" in ending.line and "Read-only" in ending.line


# --- reliability 28: little data -------------------------------------------------------------------------------


@pytest.mark.parametrize("rows, batch", [(3, 4), (1, 4), (10, 3)])
def test_too_few_rows_for_a_batch_or_steps_for_an_epoch_train_all_the_same(rows, batch, tmp_path):
    """Reliability 28: the next epoch fills the batch, and two steps are two steps."""
    out = tmp_path / "run"
    assert tiny.ldm(*arguments(out, "--batch-size", batch, rows=rows, steps=2)).code == 0
    assert [line["images"] for line in tiny.log(out) if "lr_factor" in line] == [batch, 2 * batch]
    assert tiny.state(out)["step"] == 2 and runs.newest_checkpoint(out).name == "step-00000002"


def test_one_row_on_four_processes_trains(tmp_path):
    """Reliability 28: nobody is left without a sample, nobody waits for ever."""
    out = tmp_path / "run"
    four = ranks(tmp_path, 4, *arguments(out, "--batch-size", 4, rows=1, steps=2))
    assert [command.wait() for command in four] == [0, 0, 0, 0], four[0].stderr
    assert tiny.state(out)["step"] == 2


@pytest.mark.parametrize(
    "batch, said",
    [
        (("--batch-size", 3), "train.batch_size = 3: fewer"),
        (("--batch-size", 6, "--set", "train.half_batch_steps=1"), "half of train.batch_size = 3: fewer"),
    ],
)
def test_fewer_samples_than_processes_are_refused(batch, said, tmp_path):
    """Reliability 28: all processes end before step 1, with the numbers."""
    four = ranks(tmp_path, 4, *arguments(tmp_path / "run", *batch))
    assert [command.wait() for command in four] == [2, 2, 2, 2]
    assert f"{said} samples than processes (4)" in four[0].stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("trainer", ["train-ae", "train-ldm"])
def test_no_rows_end_before_step_1_with_code_3(trainer, tmp_path):
    """Reliability 28: never success after no step."""
    (tmp_path / "none").mkdir()
    own = ("--autoencoder", "none", *tiny.UNET) if trainer == "train-ldm" else tiny.AE_NETWORK
    ending = tiny.ldm(trainer, "--data", tmp_path / "none", "--size", 16, *own, *LOOP, "--out", tmp_path / "run")
    assert ending.code == 3 and str(tmp_path / "none") in ending.line
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_no_steps_are_refused(tmp_path):
    """Reliability 28: --steps 0 is a slip, not a success."""
    ending = tiny.ldm(*arguments(tmp_path / "run", steps=0))
    assert ending.code == 2 and "steps" in ending.line


REFUSED = {
    "no rows": (3, ("train-ae", "--data", "{empty}", "--size", 16, *tiny.AE_NETWORK)),
    "no autoencoder": (4, ("train-ldm", *tiny.SHAPES, "--autoencoder", "{missing}")),
    "no captions": (3, ("train-ldm", "--data", "{plain}", "--autoencoder", "none", "--condition", "text", *tiny.UNET)),
    "no model": (4, ("train-classifier", *tiny.SHAPES, "--model", "{missing}")),
    "no teacher": (4, ("distill", "{missing}", "--calls", 4)),
    "a size that does not divide": (2, ("train-ldm", *tiny.SHAPES, "--size", "18x18", "--autoencoder", "none")),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("there", [False, True], ids=["new folder", "folder that was there"])
def test_what_is_refused_before_step_1_leaves_no_folder(case, there, tmp_path):
    (tmp_path / "empty").mkdir()
    tiny.noisy_images(tmp_path / "plain", 3)
    places = {name: str(tmp_path / name) for name in ("empty", "missing", "plain")}
    code, line = REFUSED[case]
    out = tmp_path / "run"
    if there:
        out.mkdir()
    ending = tiny.ldm(*(str(part).format(**places) for part in line), *LOOP, "--steps", 1, "--out", out)
    assert ending.code == code, ending.stderr
    assert out.is_dir() == there and (not there or not contents(out))


def test_a_folder_goes_only_if_nothing_was_written_in_it(tmp_path):
    for name in ("", "notes.txt"):
        run = runs.RunFolder(tmp_path / "run")
        run.acquire()
        if name:
            (run.path / name).write_text("mine")
        run.release()
        assert run.path.exists() == bool(name)
    other = runs.RunFolder(tmp_path / "run")
    other.acquire()  # what is left can be locked again
    other.release()
    assert (tmp_path / "run" / "notes.txt").exists()


def test_a_folder_that_vanished_meanwhile_is_let_go(tmp_path):
    run = runs.RunFolder(tmp_path / "run")
    run.acquire()
    (tmp_path / "run").rename(tmp_path / "moved")
    run.release()
    assert not (tmp_path / "run").exists()


def made_run(path: Path, kind: str, at: int, trained: bool = True) -> None:
    path.mkdir(parents=True)
    (path / "model.safetensors").touch()
    files.write_json(path / "run.json", {"kind": kind, "state": "finished"})
    if trained:
        (path / "metrics.jsonl").touch()
    os.utime(path / "run.json", (at, at))


def test_the_autoencoder_inside_a_run_is_no_run_of_its_own(tmp_path):
    """Else the newest autoencoder would be that of the newest model, though another one was trained meanwhile."""
    made_run(tmp_path / "model", "diffusion", 4)
    made_run(tmp_path / "model" / "autoencoder", "autoencoder", 5, trained=False)
    copy = runs.newest_run("autoencoder", tmp_path)
    assert copy == tmp_path / "model" / "autoencoder"  # better than none
    made_run(tmp_path / "demo" / "autoencoder", "autoencoder", 2)
    made_run(tmp_path / "demo" / "diffusion", "diffusion", 3)
    listed = [Path(row["path"]).relative_to(tmp_path).as_posix() for row in runs.list_runs(tmp_path)]
    assert listed == ["demo/autoencoder", "demo/diffusion", "model"]
    assert runs.newest_run("autoencoder", tmp_path) == tmp_path / "demo" / "autoencoder"
