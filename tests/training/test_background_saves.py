"""Checkpoints that a thread writes: the loop goes on, and what the thread meets ends it as a write of its own would."""

import errno
import os
import signal
import threading
import time

import pytest
import tiny
import torch
from processes import ranks

from ldmcli.core import runs, tensor_stream
from ldmcli.training import background, checkpoints
from ldmcli.training.background import Background, HostCopy

GROUPS = {
    "model": {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.tensor(1.5), "none": torch.zeros(0)},
    "optimizer-model": {
        "step": torch.tensor([3]),
        "mean": torch.rand(4, 2, 3, 3).to(memory_format=torch.channels_last),
    },
}


@pytest.mark.parametrize("slab", [64, 128, 1 << 20])
def test_a_copy_keeps_what_was_there_in_the_same_memory(slab, monkeypatch):
    monkeypatch.setattr(background, "SLAB", slab)
    copy = HostCopy(pinned=False)
    source = {name: {k: t.clone() for k, t in group.items()} for name, group in GROUPS.items()}
    taken = copy.take(source)
    for group in source.values():
        for tensor in group.values():
            tensor.add_(1)
    places = {}
    for name, group in GROUPS.items():
        for key, tensor in group.items():
            assert torch.equal(taken[name][key], tensor) and taken[name][key].is_contiguous()
            places[name, key] = taken[name][key].data_ptr()
    held = copy.held
    copy.reserve(source)
    again = copy.take(source)
    assert copy.held == held and all(again[n][k].data_ptr() == place for (n, k), place in places.items())
    assert torch.equal(again["model"]["weight"], GROUPS["model"]["weight"] + 1)


def test_one_piece_of_work_at_a_time_and_its_error_once():
    writer, gate, done = Background(), threading.Event(), []
    writer.start(lambda: (gate.wait(10), done.append(1)))
    assert not done
    gate.set()
    writer.start(lambda: 1 / 0)  # waits for the first
    assert done == [1]
    with pytest.raises(ZeroDivisionError):
        writer.wait()
    assert not writer.failed
    writer.wait()


def test_work_that_is_given_up_ends_and_says_nothing():
    writer = Background()

    def work():
        while True:
            writer.check()
            time.sleep(0.001)

    writer.start(work)
    writer.give_up()
    assert not writer.failed
    writer.wait()


# --- in a training ---------------------------------------------------------------------------------------------------


def train(out, *more, steps: int = 6, code: int = 0):
    """Saves after steps 2 and 4 in the background."""
    line = ("--save-every", 2, "--log-every", 1, "--keep", 9, *more)
    return tiny.train_ae(out, *line, steps=steps, code=code)


@pytest.fixture
def held(monkeypatch):
    """Writes of the thread wait until the loop has logged this step; gives the list of steps that they are of."""

    def arrange(out, step: int) -> list[int]:
        write, seen = runs.write_checkpoint, []

        def waiting(run, at, *args, **kwargs):
            if threading.current_thread() is not threading.main_thread():
                seen.append(at)
                end = time.monotonic() + 60
                while not any(line.get("step", 0) >= step for line in runs.read_log(out)) and time.monotonic() < end:
                    time.sleep(0.002)
            return write(run, at, *args, **kwargs)

        monkeypatch.setattr(runs, "write_checkpoint", waiting)
        return seen

    return arrange


def test_steps_are_trained_while_a_checkpoint_is_written_and_do_not_change_it(tmp_path, held):
    """The write of step 2 ends after step 3: its checkpoint is that of a run that stopped for it."""
    out, whole = tmp_path / "run", tmp_path / "whole"
    train(whole, "--save-every", 1)
    seen = held(out, 3)
    train(out)
    assert seen == [2, 4]
    for step in ("step-00000002", "step-00000004", "step-00000006"):
        for path in (whole / "checkpoints" / step).glob("*.safetensors"):
            assert path.read_bytes() == (out / "checkpoints" / step / path.name).read_bytes(), (step, path.name)
    assert tiny.same(tiny.weights(out), tiny.weights(whole))
    assert tiny.state(out)["checkpoint"] == 6


def test_a_copy_that_memory_does_not_hold_is_not_made(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "available_bytes", lambda device: 1000)
    monkeypatch.setattr(HostCopy, "take", None)
    train(tmp_path / "run", steps=3)
    assert runs.checkpoint_steps(tmp_path / "run") == [2, 3]


def failing(error):
    """A replacement of a function that raises `error` in the thread only."""

    def make(function):
        def inner(*args, **kwargs):
            if threading.current_thread() is not threading.main_thread():
                raise error
            return function(*args, **kwargs)

        return inner

    return make


def test_a_full_disk_that_the_thread_meets_ends_the_run_at_the_next_step(tmp_path, monkeypatch):
    """Reliability 2: the message and code of a write that the loop waits for; nothing is left over."""
    out = tmp_path / "run"
    train(out, steps=1)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(tensor_stream, "write_plain", failing(full)(tensor_stream.write_plain))
    ending = train(out, steps=1000, code=6)
    assert ending.line.startswith(f"ldm: {out}/checkpoints/.step-00000002.tmp/") and "is full: " in ending.line
    state = tiny.state(out)
    assert (state["state"], state["exit_code"], state["checkpoint"]) == ("failed", 6, 1)
    assert runs.checkpoint_steps(out) == [1] and not list(out.rglob("*.tmp")) and len(tiny.log(out)) < 100


def fill_the_disk() -> None:
    tensor_stream.write_plain = failing(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))(tensor_stream.write_plain)


def test_an_error_of_the_thread_ends_all_processes(tmp_path):
    line = ("train-ae", *tiny.SHAPES, *tiny.AE_NETWORK, *tiny.QUIET_LOOP, "--steps", 1000, "--save-every", 2)
    both = ranks(tmp_path, 2, *line, "--batch-size", 4, "--out", tmp_path / "run", before=fill_the_disk)
    assert [command.wait() for command in both] == [6, 6], both[0].stderr
    assert "is full: " in both[0].stderr.splitlines()[-1]
    assert tiny.state(tmp_path / "run")["state"] == "failed"


def test_nan_in_the_copy_ends_the_run_with_code_5(tmp_path, monkeypatch):
    """Weights that are not finite are never saved."""
    out, take = tmp_path / "run", HostCopy.take

    def spoilt(self, groups):
        copied = take(self, groups)
        next(iter(copied["optimizer-autoencoder"].values())).fill_(float("nan"))
        return copied

    monkeypatch.setattr(HostCopy, "take", spoilt)
    ending = train(out, steps=1000, code=5)
    assert "weights or optimiser state hold NaN or Inf; not saved" in ending.line
    assert runs.checkpoint_steps(out) == [] and tiny.state(out)["state"] == "diverged"


@pytest.mark.parametrize("number, code, steps", [(signal.SIGTERM, 143, [2, 3]), (signal.SIGUSR1, 0, [2, 3, 4, 6])])
def test_a_signal_waits_for_the_write_under_way_and_saves_its_own_step(
    number, code, steps, tmp_path, held, monkeypatch
):
    """Reliability 4: after step 3, while that of step 2 is written."""
    out, log = tmp_path / "run", runs.RunFolder.log

    def logging(self, **values):
        log(self, **values)
        if values.get("step") == 3 and "lr_factor" in values:
            os.kill(os.getpid(), number)

    held(out, 3)
    monkeypatch.setattr(runs.RunFolder, "log", logging)
    train(out, code=code)
    assert runs.checkpoint_steps(out) == steps
    assert all(not runs.problems(path) for path in (out / "checkpoints").iterdir())


def test_an_error_in_a_step_lets_the_write_under_way_be_completed(tmp_path, held, monkeypatch):
    from ldmcli.core.errors import DivergedError
    from ldmcli.training.loop import Trainer

    out, step = tmp_path / "run", Trainer._train_step

    def diverging(self):
        if self.progress.step == 3:
            raise DivergedError("bad")
        step(self)

    held(out, 3)
    monkeypatch.setattr(Trainer, "_train_step", diverging)
    assert train(out, code=5).line == "ldm: bad"
    assert runs.checkpoint_steps(out) == [2] and tiny.state(out)["checkpoint"] == 2


def test_a_second_ctrl_c_gives_the_write_under_way_up(tmp_path, held, monkeypatch):
    """Reliability 4: nothing half-written stays, and no thread goes on writing in the folder."""
    from ldmcli.training.loop import Trainer

    out, step, pause = tmp_path / "run", Trainer._train_step, runs._pause

    def ended(self):
        if self.progress.step == 3:
            raise KeyboardInterrupt
        step(self)

    monkeypatch.setattr(Trainer, "_train_step", ended)
    monkeypatch.setattr(runs, "_pause", lambda point: time.sleep(0.5) if point == "after autoencoder" else pause(point))
    train(out, code=130)
    assert runs.checkpoint_steps(out) == [] and not list(out.rglob("*.tmp"))
    assert not [thread for thread in threading.enumerate() if thread.name == "checkpoint"]
