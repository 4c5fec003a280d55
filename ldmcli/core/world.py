"""A process among the others that a launcher started: rank, device, and the collective calls that any work needs.

Objects and decisions go through a process group on the CPU with a timeout of a day: no phase of one process, however
long, ends the others; one that dies closes its connections, which does.
"""

import os
import pickle
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cached_property
from typing import Any, TypeVar

from ldmcli.core import launch
from ldmcli.core.errors import LdmError, ResourceError, UsageError

CONTROL_TIMEOUT = timedelta(hours=24)  # while one process writes, evaluates, encodes or reads, the others wait
GONE = ("connection closed", "connection reset", "broken pipe")  # what gloo says when another process has ended
T = TypeVar("T")


def default_device() -> Any:
    """The torch.device of this process: its own GPU, as the launcher numbers them, else MPS, else the CPU.

    A process that sees one GPU alone has that one, whatever its rank: Slurm's --gpus-per-task shows each its own.
    `World.check_gpus` tells that from several processes on one GPU. Raises UsageError where a launcher has started more
    processes on this machine than it has GPUs.
    """
    import torch

    if not torch.cuda.is_available():
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    rank, _, local = launch.world()
    count = torch.cuda.device_count()
    if count == 1:
        local = 0
    if local >= count:
        raise UsageError(f"process {rank}: no GPU {local} on this machine; start as many processes as there are GPUs")
    return torch.device("cuda", local)


def _gpu_name(device: Any) -> tuple[str, ...]:
    """What tells a process's GPU from those of others: machine, number in the hardware, and, as parts of one GPU share
    that, what the process is shown. () where it has none of NVIDIA's."""
    if device.type != "cuda":
        return ()
    import torch

    return (
        socket.gethostname(),
        str(torch.cuda.get_device_properties(device).uuid),
        os.environ.get("CUDA_VISIBLE_DEVICES", ""),
    )


class World:
    """This process and the others. Without arguments: a process that is alone."""

    def __init__(self, rank: int = 0, world_size: int = 1, control: Any = None):
        self.rank, self.world_size = rank, world_size
        self.control = control  # the process group of objects and decisions; None of a process that is alone

    @cached_property
    def device(self) -> Any:
        """The torch.device that this process computes on."""
        return default_device()

    @property
    def is_rank_0(self) -> bool:
        """Whether this process writes and reports."""
        return self.rank == 0

    def check_gpus(self) -> None:
        """Raises UsageError where two processes compute on one GPU. Collective."""
        if self.world_size == 1:
            return
        found = self.gather(_gpu_name(self.device))
        for rank, name in enumerate(found):
            if name and name in found[:rank]:
                raise self.agreed(
                    UsageError(
                        f"process {rank} has the GPU of process {found.index(name)}; start as many processes as there "
                        "are GPUs, or let the scheduler give each its own (Slurm: --gpus-per-task 1)"
                    )
                )

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Those of equally known items that this process takes: every one in `world_size`."""
        return items[self.rank :: self.world_size]

    def agreed(self, error: LdmError) -> LdmError:
        """An error that all processes raise: rank 0 says it, the others end with its code."""
        error.said_by_rank_0 = not self.is_rank_0
        return error

    def on_rank_0(self, function: Callable[[], Any]) -> Any:
        """Runs `function` on rank 0; all processes get its result (pickled), or raise its LdmError. Collective."""
        result: list[Any] = [None, None]
        if self.is_rank_0:
            try:
                result[0] = function()
            except LdmError as error:
                result[1] = error
        if self.world_size > 1:
            import torch

            torch.distributed.broadcast_object_list(result, src=0, group=self.control)
        if result[1] is not None:
            raise self.agreed(result[1])
        return result[0]

    def on_all_ranks(self, function: Callable[[], Any]) -> Any:
        """Runs `function` on every process; where one raises an LdmError, all do, and none is left waiting. Collective.

        All have returned from `function` when this returns. `function` itself must not be collective.
        """
        result, error = None, None
        try:
            result = function()
        except LdmError as caught:
            error = caught
        if self.all_reduce_max([float(error is not None)])[0]:
            errors = self.gather(error)  # from those that have one, too: nobody leaves while another waits
            raise self.agreed(next(one for one in errors if one is not None))
        return result

    def gather(self, value: Any) -> list[Any]:
        """One picklable object of each process, in order of rank. Collective."""
        if self.world_size == 1:
            return [value]
        import torch

        out: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(out, pickle.loads(pickle.dumps(value)), group=self.control)
        return out

    def all_reduce_max(self, values: list[float]) -> list[float]:
        """Element-wise maximum over processes of a few numbers. Collective."""
        if self.world_size == 1:
            return values
        import torch

        tensor = torch.tensor(values, dtype=torch.float64)
        torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MAX, group=self.control)
        return tensor.tolist()


@contextmanager
def joined() -> Iterator[World]:
    """The world that the launcher's variables describe, for work without gradients; each process has its GPU.

    Raises ResourceError where another process ends within it, UsageError where there are more processes than GPUs.
    """
    rank, size, _ = launch.world()
    if size == 1:
        yield World()
        return
    import torch

    device = default_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("gloo", timeout=CONTROL_TIMEOUT)
    try:
        world = World(rank, size, torch.distributed.group.WORLD)
        world.check_gpus()
        yield world
    except RuntimeError as error:
        if any(words in str(error).lower() for words in GONE):
            raise ResourceError("another process of this command ended; what it said tells why") from error
        raise
    finally:
        torch.distributed.destroy_process_group()
