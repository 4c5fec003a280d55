"""Threads of a training on a CPU: measured once, kept in the checkpoint, never against what the user says."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file

from ldmcli.core import threads
from ldmcli.core.settings import TrainSettings
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


class Training:
    """What the choice asks of a training."""

    def __init__(self, compiled: bool = False):
        settings = TrainSettings(mixed_precision="no", compile=compiled)
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
    training = Training(more.get("compiled", False))
    resumed = more.get("resumed", False)
    thread_choice.choose_threads(training, training.state, lambda *of: called.append(of), resumed=resumed)
    assert not called and torch.get_num_threads() == 2


def test_where_memory_runs_out_the_threads_are_those_of_before(nothing_said):
    sizes = []

    def fails(phase, batch, step, norms):
        sizes.append(len(batch["row"]))
        raise torch.OutOfMemoryError("out of memory")

    training = Training()
    thread_choice.choose_threads(training, training.state, fails, resumed=False)
    assert torch.get_num_threads() == 2 and sizes == [2]  # a micro-batch, not all of the step


def test_what_passes_leave_behind_is_undone(nothing_said):
    """Running means and codes in use are part of a training."""
    training = Training()

    def passes(phase, batch, step, norms):
        training.networks["model"](torch.ones(2, 3))
        training.codes[0] = 1

    thread_choice.choose_threads(training, training.state, passes, resumed=False)
    assert not training.networks["model"].running_mean.any() and not training.codes.any()


def test_a_training_measures_before_its_first_step_and_learns_the_same(tmp_path, nothing_said, monkeypatch):
    """Weights are those of a run that was told the number; the run that goes on takes it over."""
    monkeypatch.setattr(thread_choice.threads, "EARNED", 1e9)  # the fewest, whatever was measured
    measured, told = tmp_path / "measured", tmp_path / "told"
    ending = tiny.train_ae(measured, data=DATA)
    assert "threads: 1 of 2 (a pass takes with 1: " in ending.stderr and torch.get_num_threads() == 1
    [checkpoint] = (measured / "checkpoints").iterdir()
    assert json.loads((checkpoint / "state.json").read_text())["threads"] == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert "threads:" not in tiny.train_ae(told, data=DATA).stderr
    first, second = (load_file(run / "model.safetensors") for run in (measured, told))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    monkeypatch.delenv("OMP_NUM_THREADS")
    torch.set_num_threads(2)
    ending = tiny.train_ae(measured, data=DATA, steps=4)
    assert "threads" not in ending.stderr and torch.get_num_threads() == 1
