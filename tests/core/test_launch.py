"""Several processes: who is started, how they end, what is said. Real launches use a stand-in trainer."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ldmcli.core import launch
from ldmcli.core.errors import LdmError, ResourceError, UsageError
from ldmcli.core.signals import StopRequest

ROOT = Path(__file__).resolve().parents[2]

# takes the trainer's place in each process: notes what it was given, then does what BEHAVE says
STAND_IN = """
import os, sys, types

def train(kind, resolved, out, options):
    import time
    from pathlib import Path
    from ldmcli.core.errors import Interrupted, InputError
    from ldmcli.core.launch import world
    from ldmcli.core.signals import StopRequest

    rank, size, local = world()
    notes = Path(os.environ["NOTES"])
    (notes / f"rank-{rank}").write_text(f"{size} {local} {os.environ.get('OMP_NUM_THREADS')}")
    if os.environ["BEHAVE"] == "fail" and rank == 1:
        raise InputError("photos/cat.txt: not an image")
    if os.environ["BEHAVE"] == "kill" and rank == 1:
        os.kill(os.getpid(), 9)
    with StopRequest() as request:
        while os.environ["BEHAVE"] != "end" and not request.stop:
            (notes / f"ready-{rank}").touch()
            time.sleep(0.05)
            if request.save_requested:
                (notes / f"saved-{rank}").touch()
    if request.stop:
        raise Interrupted("stopped, saved at step 3", request.stop)

module = types.ModuleType("ldmcli.training.loop")
module.train, module.RunOptions = train, types.SimpleNamespace
sys.modules["ldmcli.training.loop"] = module
"""


@pytest.fixture
def two_processes(tmp_path):
    """Starts `ldm train-ae --gpus 2` around the stand-in; gives the process and the folder of notes."""
    started = []

    def start(behave: str):
        (tmp_path / "notes").mkdir()
        (tmp_path / "sitecustomize.py").write_text(STAND_IN)
        environment = os.environ | {
            "PYTHONPATH": f"{tmp_path}:{ROOT}",
            "NOTES": str(tmp_path / "notes"),
            "BEHAVE": behave,
            "CUDA_VISIBLE_DEVICES": "",
        }
        environment.pop("OMP_NUM_THREADS", None)
        process = subprocess.Popen(
            [sys.executable, "-m", "ldmcli", "train-ae", "--gpus", "2", "--out", "runs/x"],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process, tmp_path / "notes"

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()
            process.wait(60)


def wait_for(*paths: Path) -> None:
    for _ in range(1200):
        if all(path.exists() for path in paths):
            return
        time.sleep(0.05)
    raise AssertionError(f"never came: {paths}")


def test_gpus_2_starts_two_ranks_that_share_the_cores(two_processes):
    process, notes = two_processes("end")
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert (notes / "rank-0").read_text().split()[:2] == ["2", "0"]
    assert (notes / "rank-1").read_text().split()[:2] == ["2", "1"]
    cores = len(os.sched_getaffinity(0))
    assert (notes / "rank-1").read_text().split()[2] == str(max(1, cores // 2))
    assert stderr.count("train-ae → runs/x") == 1  # only process 0 speaks


def test_the_line_and_the_code_of_the_process_that_failed_are_those_of_the_command(two_processes):
    process, _ = two_processes("fail")
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 3
    assert [line for line in stderr.splitlines() if line.startswith("ldm: ")] == ["ldm: photos/cat.txt: not an image"]
    assert "Traceback" not in stderr and "ChildFailedError" not in stderr


def test_a_process_that_vanishes_ends_the_command_with_code_6(two_processes):
    process, _ = two_processes("kill")
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 6
    assert "process 1 of 2 was lost (SIGKILL)" in stderr and "Traceback" not in stderr


def test_usr1_saves_and_goes_on_and_term_ends_both_with_code_143(two_processes):
    process, notes = two_processes("wait")
    wait_for(notes / "ready-0", notes / "ready-1")
    process.send_signal(signal.SIGUSR1)
    wait_for(notes / "saved-0", notes / "saved-1")
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 143
    assert stderr.count("stopped, saved at step 3") == 1 and "Traceback" not in stderr


# --- without starting anything ---------------------------------------------------------------------------------


def in_rank(monkeypatch, rank: int, size: int) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(size))
    monkeypatch.setenv("LOCAL_RANK", str(rank))


def test_a_process_of_a_launcher_starts_no_others(monkeypatch):
    in_rank(monkeypatch, 1, 2)
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **more: pytest.fail("launched again"))
    assert launch.relaunch_if_needed(2, ["train-ae"]) is None


def test_gpus_that_contradict_the_launcher_are_refused(monkeypatch):
    in_rank(monkeypatch, 0, 4)
    with pytest.raises(UsageError, match="launcher with 4 processes"):
        launch.relaunch_if_needed(2, ["train-ae"])


def test_a_launched_process_that_is_alone_launches_no_further(monkeypatch, tmp_path):
    monkeypatch.setenv("LDM_EXIT_DIR", str(tmp_path))
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **more: pytest.fail("launched again"))
    with pytest.raises(LdmError, match="alone"):
        launch.relaunch_if_needed(2, ["train-ae"])


@pytest.mark.parametrize("gpus", [None, 1])
def test_one_process_needs_no_launcher(monkeypatch, gpus):
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **more: pytest.fail("launched"))
    assert launch.relaunch_if_needed(gpus, ["train-ae"]) is None


def test_more_gpus_than_there_are_is_refused(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **more: pytest.fail("launched"))
    with pytest.raises(UsageError, match="shows 1 GPU;"):
        launch.relaunch_if_needed(2, ["train-ae"])


def test_a_rank_outside_the_world_is_refused(monkeypatch):
    in_rank(monkeypatch, 2, 2)
    with pytest.raises(UsageError, match="RANK = 2"):
        launch.world()


def test_a_world_that_is_no_number_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(UsageError, match="whole numbers"):
        launch.world()


def test_without_a_launcher_the_world_is_one(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert launch.world() == (0, 1, 0)


def test_the_job_around_the_command_lends_no_rank_to_the_launcher(monkeypatch):
    in_rank(monkeypatch, 0, 1)
    environment = launch.child_environment(2, "somewhere")
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & set(environment)
    assert environment["LDM_EXIT_DIR"] == "somewhere"


def test_a_thread_count_that_was_set_stays(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert launch.child_environment(2, "somewhere")["OMP_NUM_THREADS"] == "7"


def test_processes_that_end_without_a_word_are_a_lost_resource(tmp_path):
    with pytest.raises(ResourceError, match="2 of 2 processes"):
        launch._outcome(1, tmp_path, 2, ["train-ae"])


@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("train-ldm", "--micro-batch"),
        ("sample", "--batch-size"),
        ("upscale", "--max-memory"),
        ("reconstruct", "--size"),
    ],
)
def test_a_lost_process_names_the_option_that_its_command_has(command, option, tmp_path):
    (tmp_path / "lost.json").write_text('{"rank": 1, "signal": 9}')
    with pytest.raises(ResourceError, match=f"SIGKILL.*lower {option} or"):
        launch._outcome(1, tmp_path, 2, [command])
    assert option in (ROOT / "docs" / "commands" / f"{command}.md").read_text()


def test_a_port_that_was_taken_meanwhile_is_replaced(monkeypatch, tmp_path):
    statuses = [launch._PORT_TAKEN, 0]

    def run(gpus, argv, folder):
        for rank in range(2):
            monkeypatch.setenv("RANK", str(rank))
            monkeypatch.setenv("LDM_EXIT_DIR", folder)
            launch.report_exit(0)
        monkeypatch.delenv("RANK")
        return statuses.pop(0)

    monkeypatch.setattr(launch, "_run", run)
    monkeypatch.setattr(launch, "_check_devices", lambda gpus: None)
    assert launch.relaunch_if_needed(2, ["train-ae"]) == 0
    assert statuses == []


@pytest.mark.parametrize(
    "words",
    [
        "Tried to launch distributed communication on port `5`, but another process is utilizing it. Please specify",
        "The server socket has failed to listen on any local network address. port: 5, useIPv6: false, code: -98, "
        "name: EADDRINUSE, message: address already in use",
    ],
)
def test_the_launcher_tells_a_taken_port_from_other_failures(monkeypatch, words):
    import accelerate.commands.launch

    def main():
        raise error

    monkeypatch.setattr(accelerate.commands.launch, "main", main)
    error = ConnectionError(words)
    assert launch._launcher() == launch._PORT_TAKEN
    error = ConnectionError("no route to host")
    with pytest.raises(ConnectionError):
        launch._launcher()


# --- signals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_signal_sets_a_flag_and_the_old_handler_returns(number):
    before = signal.getsignal(number)
    with StopRequest() as request:
        assert request.stop == 0
        os.kill(os.getpid(), number)
        assert request.stop == number
    assert signal.getsignal(number) is before


def test_a_save_signal_is_seen_once():
    with StopRequest() as request:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert (request.save_requested, request.save_requested, request.stop) == (True, False, 0)


def test_a_second_ctrl_c_ends_at_once_but_one_press_delivered_twice_does_not(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with StopRequest():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        now[0] += 1
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0)


def test_outside_the_main_thread_no_handler_is_installed():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work():
        with StopRequest() as request:
            seen.append((signal.getsignal(signal.SIGTERM), request.stop))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(before, 0)]
