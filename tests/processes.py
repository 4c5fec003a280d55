"""Commands as processes of their own that can be killed, cheaply: forked from a server that has imported everything.

`run` is what each process does: the real command line, in a process group of its own, stderr into a file.
"""

import atexit
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["torch", "accelerate", "ldmcli.cli.train", "ldmcli.training.loop"])


_started: list = []


@atexit.register
def _kill_what_a_failed_test_left() -> None:
    for process in _started:  # a termination would be heard as a request to finish the step
        process.kill()


class Command:
    """One running command. `before` is called in its process first, to break something."""

    def __init__(
        self, log: Path, *args: object, env: dict[str, str] | None = None, before: Callable[[], None] | None = None
    ):
        self.log = log
        self._process = _SERVER.Process(
            target=run, args=([str(arg) for arg in args], str(log), env or {}, before), daemon=True
        )
        self._process.start()
        _started.append(self._process)
        self.pid = self._process.pid

    @property
    def stderr(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    @property
    def running(self) -> bool:
        return self._process.is_alive()

    def kill(self, number: int = signal.SIGKILL) -> int:
        """Sends a signal and waits for the end; the exit code (negative: the signal that ended it)."""
        if self.running:
            os.kill(self.pid, number)
        return self.wait()

    def wait(self, timeout: float = 240) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()
            raise AssertionError(f"the command did not end:\n{self.stderr}")
        return self._process.exitcode

    def until(self, reached: Callable[[], bool], timeout: float = 240) -> bool:
        """Waits until `reached()`; False where the command ended, or the time did, before."""
        end = time.monotonic() + timeout
        while not reached():
            if not self.running or time.monotonic() > end:
                return reached()
            time.sleep(0.005)
        return True


def run(args: list[str], log: str, env: dict[str, str], before: Callable[[], None] | None) -> None:
    from ldmcli.cli import main

    os.setsid()
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr
    os.environ.update(env)
    if before:
        before()
    code = main(args)
    sys.stderr.flush()
    os._exit(code)


def ranks(folder: Path, count: int, *args: object, before: Callable[[], None] | None = None) -> list[Command]:
    """The processes that a launcher would start on this machine, as Accelerate and torchrun describe them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "ACCELERATE_USE_CPU": "true",
    }
    return [
        Command(
            folder / f"rank-{rank}.log", *args, before=before, env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        )
        for rank in range(count)
    ]


def call(count: int, function: Callable[..., None], *args: object) -> None:
    """`function(rank, *args)` in `count` processes at once; raises what one of them raised."""
    import torch

    torch.multiprocessing.start_processes(function, args, nprocs=count, start_method="forkserver")
