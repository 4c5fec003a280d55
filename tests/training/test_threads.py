"""Threads on a CPU. Of a training: measured, kept in the checkpoint, never against what the user says; measured again
only where a run is bounded by minutes. Of commands that sample: fewer where other programs hold the cores."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file

from ldmcli.core import threads
from ldmcli.core.runs import RunFolder
from ldmcli.core.settings import TrainSettings
from ldmcli.core.world import World
from ldmcli.sampling import machine
from ldmcli.training import thread_choice
from ldmcli.training.distributed import Distributed
from ldmcli.training.progress import Progress

DATA = ("--data", "shapes", "--limit", 20, "--size", "20x20")


@pytest.fixture(autouse=True)
def threads_stay():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def nothing_said(monkeypatch):
    """The user has said nothing, and the machine has two cores."""
    for name in threads.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    torch.set_num_threads(2)


@pytest.mark.parametrize(
    ("takes", "most", "chosen"),
    [
        ({1: 1.0, 2: 0.55}, 2, 2),
        ({1: 1.0, 2: 0.95}, 2, 1),  # a twentieth does not pay for a core
        ({1: 1.0, 2: 9.0}, 2, 1),  # something else runs
        ({1: 1.0, 2: 0.6, 4: 0.4, 6: 0.39}, 6, 4),
        ({1: 1.0}, 1, 1),
    ],
)
def test_the_fewest_threads_are_taken_that_more_do_not_beat_by_a_tenth(takes, most, chosen):
    assert threads.fewest_fast(takes.__getitem__, most) == (chosen, takes)


class Clock:
    """A clock that only work moves."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    for module in (threads, thread_choice):
        monkeypatch.setattr(module, "time", made)
    return made


@pytest.mark.parametrize(
    ("takes", "best", "passes"),
    [
        ([0.004] * 60, 0.004, 50),  # single ones say little
        ([0.15, 0.12, 9.0], 0.12, 2),
        ([0.7, 0.6, 9.0], 0.6, 2),
        ([3.2, 9.0], 3.2, 1),  # minutes are not spent on choosing
    ],
)
def test_a_number_of_threads_is_measured_long_enough_and_no_longer(takes, best, passes, clock):
    left = list(takes)

    def work():
        clock.now += left.pop(0)

    assert threads.best_seconds(work) == pytest.approx(best) and len(takes) - len(left) == passes


@pytest.mark.parametrize(
    ("steps", "asked_after"),
    [
        ([0.4] * 300, None),
        ([0.4] * 80 + [0.7] * 80, None),  # slower, but not by half
        ([0.4] * 80 + [4.0], None),  # once is chance
        ([0.4] * 80 + [4.0, 0.4, 0.4] * 20, None),
        ([0.4] * 80 + [4.0] * 9, 83),  # three of the last five
        ([4.0] * 9 + [0.4] * 80 + [4.0] * 9, 92),  # the fastest so far counts, not the first
        ([0.4] * 9 + [4.0] * 9, 16),  # not within half a minute of the choice at the start
    ],
)
def test_threads_are_measured_again_when_the_speed_halves(steps, asked_after):
    watch, now = threads.SlowdownWatch(measured_at=0.0), 0.0
    for number, seconds in enumerate(steps, 1):
        now += seconds
        if watch.is_slow(seconds, now):
            assert number == asked_after
            return
    assert asked_after is None


@pytest.mark.parametrize(("changes", "waits"), [(False, [32, 60, 120]), (True, [32, 32, 32])])
def test_measuring_that_changes_nothing_becomes_rare(changes, waits):
    """As where a discriminator has begun, or the machine is slower for good."""
    watch, now, asked = threads.SlowdownWatch(fastest=0.4, measured_at=0.0), 0.0, []
    while len(asked) < len(waits):
        now += 4.0
        if watch.is_slow(4.0, now):
            asked.append(now - watch.measured_at)
            watch.measured(1.0, now, changes)
    assert asked == waits


def test_measuring_takes_a_twentieth_of_the_time_at_most():
    watch = threads.SlowdownWatch()
    watch.measured(9.0, 0.0, True)
    assert watch.wait == 180


class Training:
    """What the choice asks of a training."""

    def __init__(self, compiled: bool = False, max_minutes: float = 0.0):
        settings = TrainSettings(mixed_precision="no", compile=compiled, max_minutes=max_minutes)
        optimizers = {"model": SimpleNamespace(zero_grad=lambda: None)}
        self.state: Any = SimpleNamespace(
            dist=Distributed(settings),
            settings=settings,
            progress=Progress(micro_batch=2),
            optimizers=optimizers,
            train_only=lambda phase: None,
        )
        self.networks = {"model": torch.nn.BatchNorm1d(3)}
        self.codes = torch.zeros(2, dtype=torch.uint8)

    def extra_state(self):
        return {"used_codes": self.codes}

    def load_extra_state(self, tensors):
        self.codes = tensors["used_codes"]

    def batch(self, step):
        return {"row": torch.arange(4)}

    def phases(self, step):
        return ("model",)


@pytest.mark.parametrize(
    ("more", "environment"),
    [({"resumed": True}, {}), ({"compiled": True}, {}), ({}, {"OMP_NUM_THREADS": "2"}), ({}, {"MKL_NUM_THREADS": "1"})],
)
def test_nothing_is_measured_where_the_number_is_given(more, environment, nothing_said, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    called = []
    training = Training(more.get("compiled", False), max_minutes=10)
    choice = chosen_by(training, lambda *of: called.append(of))
    choice.choose_at_start(more.get("resumed", False))
    for seconds in [0.4] * 99 + [4.0] * 99 if environment or more.get("compiled") else ():
        assert choice.after_step(seconds) == 0
    assert not called and torch.get_num_threads() == 2


class Folder(RunFolder):
    """A run's folder that keeps what is written in it."""

    def __init__(self):
        self.written, self.events = {}, []

    def state(self):
        return self.written

    def update(self, **changes):
        self.written |= changes

    def log(self, **line):
        self.events.append(line)


def chosen_by(training: Training, passes) -> thread_choice.ThreadChoice:
    return thread_choice.ThreadChoice(training, training.state, passes, Folder())


def test_where_memory_runs_out_the_threads_are_those_of_before(nothing_said):
    sizes = []

    def fails(phase, batch, step, norms):
        sizes.append(len(batch["row"]))
        raise torch.OutOfMemoryError("out of memory")

    chosen_by(Training(), fails).choose_at_start(False)
    assert torch.get_num_threads() == 2 and sizes == [2]  # a micro-batch, not all of the step


def test_what_passes_leave_behind_is_undone(nothing_said):
    """Running means and codes in use are part of a training."""
    training = Training()

    def passes(phase, batch, step, norms):
        training.networks["model"](torch.ones(2, 3))
        training.codes[0] = 1

    chosen_by(training, passes).choose_at_start(False)
    assert not training.networks["model"].running_mean.any() and not training.codes.any()


@pytest.mark.parametrize(
    ("minutes", "disturbed", "numbers"),
    [
        (10, (60, 999), [2, 1]),  # somebody's process takes a part of one core from the first minute on
        (10, (999, 999), [2]),
        (10, (0, 999), [1]),  # … from before the beginning
        (10, (590, 999), [2]),  # the last seconds are too few to gain anything
        (10, (0, 20), [1, 2]),  # … while the number was chosen
        (10, (60, 150), [2, 1, 2]),  # … for a while
        (0, (60, 999), [2]),  # a run of so many steps keeps its number, so that going on is exact
        (0, (0, 20), [1]),
    ],
)
def test_a_run_bounded_by_minutes_takes_other_threads_when_others_come_and_go(
    minutes, disturbed, numbers, nothing_said, clock, capsys
):
    """As measured on two cores with a niced process on one of them: 0.35 s a step with two threads when quiet and 3 to
    6 s when not, 0.41 s with one."""
    count, quiet = 0, 0.35

    def passes(*of):
        nonlocal count
        count += 1
        beside = disturbed[0] <= clock.now < disturbed[1]
        clock.now += 0.41 if torch.get_num_threads() == 1 else (3.2, 4.6, 5.9)[count % 3] if beside else quiet

    training = Training(max_minutes=minutes)
    choice = chosen_by(training, passes)
    choice.choose_at_start(False)
    progress = training.state.progress
    while progress.trained_seconds < 600:
        begun = clock.now
        passes()
        progress.step += 1
        progress.trained_seconds += clock.now - begun
        progress.trained_seconds += choice.after_step(clock.now - begun)
    found = choice.folder.written["threads"]
    assert [one["threads"] for one in found] == numbers and torch.get_num_threads() == numbers[-1]
    said = capsys.readouterr().err
    assert said.count("threads:") == len(numbers) == 1 + len(choice.folder.events)
    if numbers[-1] == 2 and len(numbers) > 1:
        assert "threads: 2 of 2, measured again (a pass takes with 1: 0.41 s, 2: 0.35 s; " in said
    if numbers[1:2] == [1]:
        assert "threads: 1 of 2, since a step takes 3.2 s instead of 0.35 s (a pass takes with 1: 0.41 s, 2: " in said
        assert found[1]["step"] == choice.folder.events[0]["step"] and found[1]["pass_seconds"]["1"] < 0.42
    if minutes:
        assert progress.step > 1200  # untouched, it would have taken some 280 steps


def test_a_run_that_is_resumed_may_take_all_threads_again(nothing_said, clock):
    """The checkpoint sets the number that it was written with after the choice was made ready."""
    choice = chosen_by(Training(max_minutes=10), lambda *of: None)
    torch.set_num_threads(1)  # as a checkpoint says
    choice.choose_at_start(True)
    assert torch.get_num_threads() == 1 and choice.most == 2


def test_a_training_measures_before_its_first_step_and_learns_the_same(tmp_path, nothing_said, monkeypatch):
    """Weights are those of a run that was told the number; the run that goes on takes it over."""
    monkeypatch.setattr(thread_choice.threads, "EARNED", 1e9)  # the fewest, whatever was measured
    measured, told = tmp_path / "measured", tmp_path / "told"
    ending = tiny.train_ae(measured, data=DATA)
    assert "threads: 1 of 2 (a pass takes with 1: " in ending.stderr and torch.get_num_threads() == 1
    [checkpoint] = (measured / "checkpoints").iterdir()
    assert json.loads((checkpoint / "state.json").read_text())["threads"] == 1
    [found] = json.loads((measured / "run.json").read_text())["threads"]
    assert (found["step"], found["threads"], set(found["pass_seconds"])) == (0, 1, {"1", "2"})
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert "threads:" not in tiny.train_ae(told, data=DATA).stderr
    first, second = (load_file(run / "model.safetensors") for run in (measured, told))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    monkeypatch.delenv("OMP_NUM_THREADS")
    torch.set_num_threads(2)
    ending = tiny.train_ae(measured, data=DATA, steps=4)
    assert "threads" not in ending.stderr and torch.get_num_threads() == 1


@pytest.mark.parametrize(
    ("takes", "chosen"),
    [
        ({1: 1.0, 2: 0.6, 4: 0.4}, 4),
        ({1: 1.0, 2: 0.98, 4: 2.9}, 4),  # an idle machine keeps its number, whatever a small probe says
        ({1: 1.0, 2: 0.8, 4: 9.0}, 2),
        ({1: 1.0, 2: 7.0, 4: 40.0}, 1),
    ],
)
def test_commands_that_sample_take_fewer_threads_only_where_those_wait(takes, chosen):
    assert threads.without_waiting(takes.__getitem__, 4) == chosen


def test_a_busy_machine_is_said_and_the_users_number_stays(nothing_said, monkeypatch, capsys):
    monkeypatch.setattr(machine, "_probe_seconds", lambda count: 4.0**count)
    try:
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        machine.leave_taken_cores(World())
        assert torch.get_num_threads() == 2
        monkeypatch.delenv("OMP_NUM_THREADS")
        machine.leave_taken_cores(World())
        assert torch.get_num_threads() == 1
        assert "threads: 1 of 2, since other programs compute here" in capsys.readouterr().err
    finally:
        torch.set_num_threads(2)
