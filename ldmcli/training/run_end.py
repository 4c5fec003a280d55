"""How a training ends before its last step: by a signal, a time limit, or an error; and what run.json says of it."""

import signal
from enum import IntEnum
from typing import NoReturn

import torch

from ldmcli.core import console, runs
from ldmcli.core.errors import Interrupted, LdmError
from ldmcli.core.settings import TrainSettings
from ldmcli.core.world import GONE
from ldmcli.training.distributed import Distributed


class StopReason(IntEnum):
    """Why a training stops early. Where processes have different reasons the largest one counts."""

    NONE = 0
    TIME_LIMIT = 1  # train.max_hours
    SIGINT = signal.SIGINT
    SIGTERM = signal.SIGTERM


def stop_early(reason: StopReason, folder: runs.RunFolder, dist: Distributed, step: int) -> NoReturn:
    """Ends the command after its state was saved at `step`: Interrupted for a signal, SystemExit(0) for the limit."""
    if reason is StopReason.TIME_LIMIT:
        dist.on_rank_0(lambda: folder.update(state="interrupted", reason="time limit", exit_code=0))
        console.say(f"{folder.path}: saved at step {step}, --max-hours reached; the same command goes on")
        raise SystemExit(0)
    raise Interrupted(f"{folder.path}: saved at step {step}; the same command goes on", int(reason))


def out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python, torch or an allocator says that memory ran out."""
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(w in str(error).lower() for w in words)


def out_of_resources(error: BaseException, dist: Distributed, settings: TrainSettings) -> str:
    """The message for an error that means that memory ran out or that another process is gone; else ""."""
    if out_of_memory(error):
        return "memory ran out; lower --micro-batch (the global batch stays), or --size, or the model's channels"
    said = str(error).lower()
    if dist.world_size == 1 or not isinstance(error, RuntimeError):
        return ""
    if "timed out" in said:
        return (
            f"another process did not come to the backward pass within {settings.gradient_timeout:g} s "
            "(train.gradient_timeout); find what held it up, or raise that"
        )
    if any(words in said for words in GONE):
        return "another process of this training ended; what it said tells why, and the same command goes on"
    return ""


def record_failure(run: runs.RunFolder, error: BaseException, dist: Distributed) -> None:
    """Writes to run.json how a training ended, unless it was refused before run.json was its own."""
    if not (dist.is_rank_0 and run.begun):
        return
    code = int(getattr(error, "code", 1))
    state = "interrupted" if isinstance(error, Interrupted) else "diverged" if code == 5 else "failed"
    try:
        run.update(state=state, reason=console.clean(str(error)), exit_code=code)
    except LdmError:
        pass  # the disk is full: the first error is the one to report
