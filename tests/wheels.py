"""A wheel of this checkout, built from a copy of the sources."""

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def copy_of_sources(folder: Path) -> Path:
    """Building writes beside the sources, so that it gets a copy, made in `folder`."""
    target = folder / "sources"
    for name in ("ldmcli", "recipes"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    (target / "docs").mkdir()
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    shared = [name for names in setup["data-files"].values() for name in names]
    for name in ("pyproject.toml", "README.md", *shared):
        shutil.copy(ROOT / name, target / name)
    (target / "built").mkdir()
    return target


def build_wheel(sources: Path) -> Path:
    """The wheel of `copy_of_sources`."""
    build = [sys.executable, "-c", "from setuptools import build_meta; build_meta.build_wheel('built')"]
    subprocess.run(build, cwd=sources, check=True, capture_output=True)
    [wheel] = (sources / "built").glob("*.whl")
    return wheel
