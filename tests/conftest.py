"""Shared by all tests: run a command in process or as a process, find the recorded cases, keep torch small."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
# One thread, since bit-equal results across processes need equal counts; LDM_TEST_THREADS=2 for another number, which
# holds for the processes that tests start, too. (PyTorch's own ATEN_CPU_CAPABILITY=default or avx2 chooses kernels.)
os.environ["OMP_NUM_THREADS"] = os.environ.get("LDM_TEST_THREADS", "1")
for _name in [name for name in os.environ if name.startswith("LDM_")]:
    del os.environ[_name]  # a developer's settings must not reach the tests
os.environ["LDM_TRAIN_EVAL_FRECHET"] = "false"  # seconds a run for a number that tests of it ask for themselves
os.environ["LDM_TRAIN_MIXED_PRECISION"] = "no"  # "auto" goes by the time that a product takes: no test may

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Ending:
    """How a command ended."""

    code: int
    stdout: str
    stderr: str


@pytest.fixture
def ldm(capsys):
    """`ldm("runs", "--json")` runs a command in this process."""
    from ldmcli.cli import main

    def run(*args: object) -> Ending:
        capsys.readouterr()
        try:
            code = main([str(arg) for arg in args])
        except SystemExit as end:  # shell completion only
            code = end.code
        captured = capsys.readouterr()
        return Ending(int(code or 0), captured.out, captured.err)

    return run


@pytest.fixture
def ldm_process(tmp_path):
    """`ldm_process("runs", env={…}, cwd=…)` runs a command as a process of its own, by default in an empty folder."""

    def run(*args: object, env: dict[str, str] | None = None, cwd: Path | None = None, timeout: float = 300) -> Ending:
        environment = os.environ | {"PYTHONPATH": str(ROOT)} | (env or {})
        done = subprocess.run(
            [sys.executable, "-m", "ldmcli", *map(str, args)],
            cwd=cwd or tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        return Ending(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture(scope="session")
def shared() -> Path:
    """The recorded cases and pictures that the tests bring along."""
    return ROOT / "tests" / "fixtures"
