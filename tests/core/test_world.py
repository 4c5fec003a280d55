"""A process among others: its device, its share, and how long it waits. What processes do together is tried where they
do it (tests/sampling/test_shared_work.py, tests/evaluation/test_pass.py, tests/training/test_two_processes.py)."""

import socket
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch

from ldmcli.core import world as module
from ldmcli.core.errors import InputError, UsageError
from ldmcli.core.world import World, default_device, joined


@pytest.fixture
def gpus(monkeypatch):
    """A machine with two GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


def as_rank(monkeypatch, rank: int, size: int, local: int) -> None:
    for name, value in (("RANK", rank), ("WORLD_SIZE", size), ("LOCAL_RANK", local)):
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize("rank, local", [(0, 0), (1, 1), (2, 0), (3, 1)])
def test_each_process_has_the_gpu_of_its_rank_on_its_machine(rank, local, gpus, monkeypatch):
    as_rank(monkeypatch, rank, 4, local)
    assert default_device() == World(rank, 4).device == torch.device("cuda", local)


def test_more_processes_than_gpus_are_refused(gpus, monkeypatch):
    as_rank(monkeypatch, 2, 3, 2)
    with pytest.raises(UsageError, match="no GPU 2"):
        default_device()


def test_a_process_that_sees_one_gpu_has_that_one_whatever_its_rank(monkeypatch):
    """Slurm's --gpus-per-task shows each task its own GPU, as number 0."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    as_rank(monkeypatch, 3, 4, 3)
    assert default_device() == torch.device("cuda", 0)


HERE, OTHER = ("node", "GPU-1", "0"), ("node", "GPU-2", "0")


@pytest.mark.parametrize(
    "names, said",
    [
        ([HERE, OTHER], ""),
        ([HERE, OTHER, HERE], "process 2 has the GPU of process 0"),
        ([HERE, ("other node", "GPU-1", "0")], ""),
        ([("node", "GPU-1", "MIG-a"), ("node", "GPU-1", "MIG-b")], ""),
        ([(), ()], ""),
    ],
    ids=["two", "one for two", "machines", "parts", "none"],
)
def test_two_processes_on_one_gpu_are_refused_on_all(names, said, monkeypatch):
    worlds = [World(rank, len(names)) for rank in range(len(names))]
    for one in worlds:
        monkeypatch.setattr(one, "gather", lambda value: names)
        if not said:
            one.check_gpus()
            continue
        with pytest.raises(UsageError, match=said) as found:
            one.check_gpus()
        assert found.value.said_by_rank_0 == (one.rank > 0)


def test_a_gpu_is_told_from_others_by_machine_hardware_and_what_is_shown(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="GPU-1"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert module._gpu_name(torch.device("cuda", 0)) == (socket.gethostname(), "GPU-1", "3")
    assert module._gpu_name(torch.device("cpu")) == ()


def test_without_a_gpu_it_is_the_cpu():
    assert World().device.type in ("cpu", "mps")


@pytest.mark.parametrize("size", [1, 2, 3])
def test_shares_are_disjoint_and_complete(size):
    shares = [World(rank, size).share(range(7)) for rank in range(size)]
    assert sorted(k for share in shares for k in share) == list(range(7))


def test_an_error_of_all_is_said_by_rank_0_alone():
    errors = [World(rank, 2).agreed(InputError("x")) for rank in (0, 1)]
    assert [one.said_by_rank_0 for one in errors] == [False, True]


def test_processes_wait_for_each_other_for_hours(monkeypatch):
    as_rank(monkeypatch, 0, 2, 0)
    seen = {}
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **how: seen.update(how))
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    monkeypatch.setattr(World, "check_gpus", lambda self: None)
    with joined() as world:
        assert (world.rank, world.world_size) == (0, 2)
    assert seen["timeout"] == module.CONTROL_TIMEOUT >= timedelta(hours=12)
