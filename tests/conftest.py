"""Shared by all tests: a command as a process, the recorded cases, small runs, and torch kept small."""

import os
import subprocess
import sys
from collections.abc import Iterator
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

from documents import as_printed, check_document, check_printed  # noqa: E402
from tiny import Ending  # noqa: E402, since NumPy reads OMP_NUM_THREADS as it is loaded
from tiny_runs import TinyRuns  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]


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
        check_printed(list(map(str, args)), done.returncode, done.stdout)
        return Ending(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture(scope="session", autouse=True)
def documents_of_python() -> Iterator[None]:
    """Holds every document that `evaluate` gives to the published schema."""
    from ldmcli.evaluation import evaluate as module

    measured = module._measured

    def checked(*arguments: object) -> dict:
        document = measured(*arguments)
        check_document(as_printed(document))
        return document

    module._measured = checked
    yield
    module._measured = measured


@pytest.fixture(scope="session")
def tiny_runs(tmp_path_factory) -> Iterator[TinyRuns]:
    """Small runs by name, to be read only; see tiny_runs.py."""
    base = tmp_path_factory.getbasetemp()
    # pytest-xdist gives each process a folder of its own below that of the session
    runs = TinyRuns((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "tiny-runs")
    yield runs
    assert not runs.changed(), f"a test wrote in the shared runs {runs.changed()}; it has to copy them first"


@pytest.fixture(scope="session")
def ae(tiny_runs) -> Path:
    """A tiny KL autoencoder: 20x20 px, latents 3x5x5; to be read only."""
    return tiny_runs["kl"]
