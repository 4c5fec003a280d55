"""Several processes through Accelerate's launcher, and back to one exit code and one line.

`relaunch_if_needed` starts `python -m ldmcli.core.launch`, which runs Accelerate's launcher in itself: the launcher's
own exit status is 1 for every failure, but the exception it raises knows which process ended first and how. Processes
leave their code and line in the folder named by LDM_EXIT_DIR, so that the first command prints exactly one.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ldmcli.core import console
from ldmcli.core.errors import ExitCode, LdmError, ResourceError, UsageError

_LOST = {signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL}
_PORT_TAKEN, _PORT_TRIES = 75, 3  # another program may take the free port between the look and the launch
# what takes memory in the commands that are no trainings
_SMALLER = dict.fromkeys(("sample", "eval-fid", "bench"), "--batch-size")
_SMALLER |= dict.fromkeys(("upscale", "inpaint"), "--max-memory") | {"reconstruct": "--size"}
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def world() -> tuple[int, int, int]:
    """(rank, processes, rank on this machine) as the launcher's environment says; (0, 1, 0) without one."""
    try:
        rank, size = int(os.environ.get("RANK") or 0), int(os.environ.get("WORLD_SIZE") or 1)
        local = int(os.environ.get("LOCAL_RANK") or rank)
    except ValueError:
        raise UsageError("RANK, WORLD_SIZE and LOCAL_RANK must be whole numbers; a launcher sets them") from None
    if not 0 <= rank < size:
        raise UsageError(f"RANK = {rank} with WORLD_SIZE = {size}: a rank lies between 0 and WORLD_SIZE - 1")
    return rank, size, local


def local_processes() -> int:
    """Processes of this launch on this machine; all of them where the launcher does not say."""
    try:
        return max(1, int(os.environ.get("LOCAL_WORLD_SIZE") or world()[1]))
    except ValueError:
        raise UsageError("LOCAL_WORLD_SIZE must be a whole number; a launcher sets it") from None


def relaunch_if_needed(gpus: int | None, argv: list[str]) -> int | None:
    """None where this process is the one to work, else the exit code of the `gpus` processes that did.

    argv: the command line without the program, as in ["train-ae", "--gpus", "2"].
    """
    size = world()[1]
    if gpus is None:
        return None
    if gpus < 1:
        raise UsageError(f"--gpus {gpus}: must be at least 1")
    if size > 1:
        if size != gpus:
            raise UsageError(f"--gpus {gpus}: this was started by a launcher with {size} processes; leave --gpus out")
        return None
    if gpus == 1:
        return None
    if os.environ.get("LDM_EXIT_DIR"):
        raise LdmError(f"the launcher was asked for {gpus} processes and started one that is alone")
    _check_devices(gpus)
    with tempfile.TemporaryDirectory(prefix="ldm-launch-") as folder:
        for _ in range(_PORT_TRIES):
            status = _run(gpus, argv, folder)
            if status != _PORT_TAKEN:
                break
        return _outcome(status, Path(folder), gpus, argv)


def _check_devices(gpus: int) -> None:
    import torch

    if torch.cuda.is_available() and torch.cuda.device_count() < gpus:
        count = torch.cuda.device_count()
        raise UsageError(
            f"--gpus {gpus}: this machine shows {count} GPU{'s' if count > 1 else ''}; "
            f"say --gpus {count}, or look at CUDA_VISIBLE_DEVICES"
        )


def launch_arguments(gpus: int, argv: list[str]) -> list[str]:
    """What Accelerate's launcher is given. `--multi_gpu` starts gloo processes where there is no GPU; without it the
    launcher starts one process and says nothing."""
    return [
        "--multi_gpu",
        "--num_machines",
        "1",
        "--num_processes",
        str(gpus),
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--main_process_port",
        str(_free_port()),
        "-m",
        "ldmcli",
        *argv,
    ]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def child_environment(gpus: int, folder: str) -> dict[str, str]:
    """The environment of the launcher: no ranks of a job around it, and each process its share of the cores."""
    environment = {name: value for name, value in os.environ.items() if name not in _RANK_VARIABLES}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // gpus)))
    return environment | {"LDM_EXIT_DIR": folder}


def _run(gpus: int, argv: list[str], folder: str) -> int:
    # a session of its own: Ctrl-C in the terminal reaches this process only, which passes it on once
    launcher = subprocess.Popen(
        [sys.executable, "-m", "ldmcli.core.launch", *launch_arguments(gpus, argv)],
        env=child_environment(gpus, folder),
        start_new_session=True,
    )

    def pass_on(number, frame):
        workers = worker_pids(launcher.pid)
        for pid in workers:
            _send(pid, signal.SIGTERM if number == signal.SIGHUP else number)
        if not workers and number != signal.SIGUSR1:
            _send(launcher.pid, signal.SIGTERM)

    passed = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    previous = {number: signal.signal(number, pass_on) for number in passed}
    try:
        return launcher.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def worker_pids(launcher: int) -> list[int]:
    """The processes that a launcher started itself and that run `ldmcli`."""
    import psutil

    found = []
    try:
        for child in psutil.Process(launcher).children():
            try:
                if "ldmcli" in child.cmdline():
                    found.append(child.pid)
            except psutil.Error:
                continue
    except psutil.Error:
        pass
    return found


def report_exit(code: int, message: str = "") -> bool:
    """Leave this process's ending for the command that launched it; False where nobody waits for it."""
    folder = os.environ.get("LDM_EXIT_DIR")
    if not folder or not os.environ.get("RANK") or not Path(folder).is_dir():
        return False
    record = {"code": int(code), "message": message, "time": time.time()}
    _write(Path(folder, f"rank-{os.environ['RANK']}.json"), record)
    return True


def _write(path: Path, record: dict) -> None:
    # whole or not there: the launcher may end this process at any moment
    path.with_suffix(".part").write_text(json.dumps(record), encoding="utf-8")
    path.with_suffix(".part").rename(path)


def _outcome(status: int, folder: Path, gpus: int, argv: list[str]) -> int:
    records = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")}
    lost = records.pop("lost", None)
    if lost:
        name = signal.Signals(lost["signal"]).name
        smaller = _SMALLER.get(argv[0] if argv else "", "--micro-batch")
        raise ResourceError(
            f"process {lost['rank']} of {gpus} was lost ({name}); if memory ran out, "
            f"lower {smaller} or start fewer processes"
        )
    failures = sorted((record for record in records.values() if record["code"]), key=lambda record: record["time"])
    if failures:
        first = failures[0]
        if first["message"]:
            console.fail(first["message"])
        return first["code"]
    if status < 0:
        return 128 - status
    if status and len(records) < gpus:
        raise ResourceError(f"{gpus - len(records)} of {gpus} processes ended without a word (exit status {status})")
    return ExitCode.OK if len(records) == gpus else status


def _launcher() -> int:
    """Accelerate's launcher, quiet about failures that `ldm` words itself."""
    import logging

    from accelerate.commands.launch import main
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        main()
    except ChildFailedError as error:
        for rank, failure in error.failures.items():
            if -failure.exitcode in _LOST:
                record = {"rank": rank, "signal": -failure.exitcode}
                _write(Path(os.environ["LDM_EXIT_DIR"], "lost.json"), record)
        return 1
    except (OSError, RuntimeError) as error:
        if any(words in str(error) for words in ("EADDRINUSE", "ddress already in use", "is utilizing it")):
            return _PORT_TAKEN
        raise
    return 0


if __name__ == "__main__":
    sys.exit(_launcher())
