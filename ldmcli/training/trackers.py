"""Experiment trackers through Accelerate. They listen only: one that fails is dropped with a warning."""

import os
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ldmcli.core import console
from ldmcli.core.config import did_you_mean, suggestions
from ldmcli.core.errors import InputError, UsageError

PROJECT = "ldm"  # the project that runs appear under at wandb and trackio


def _tensorboard(run: Path):
    from accelerate.tracking import TensorBoardTracker

    return TensorBoardTracker("tensorboard", logging_dir=run)


def _wandb(run: Path):
    from accelerate.tracking import WandBTracker

    mode = {"mode": "offline"} if os.environ.get("HF_HUB_OFFLINE") == "1" else {}
    return WandBTracker(PROJECT, name=run.resolve().name, dir=str(run), **mode)


def _trackio(run: Path):
    from accelerate.tracking import TrackioTracker

    return TrackioTracker(PROJECT, name=run.resolve().name)


TRACKERS: dict[str, Callable[[Path], Any]] = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}


class Trackers:
    """The open trackers of a run, under their names."""

    def __init__(self, trackers: dict[str, Any]):
        self._open = trackers

    def log(self, values: dict[str, float], step: int) -> None:
        """Numbers of a step."""
        self._each("log", values, step=step)

    def close(self) -> None:
        """Sends what is left and ends."""
        self._each("finish")
        self._open = {}

    def _each(self, call: str, *arguments, **options) -> None:
        for name, tracker in list(self._open.items()):
            try:
                with redirect_stdout(sys.stderr):  # stdout carries the command's result, and trackers chat
                    getattr(tracker, call)(*arguments, **options)
            except Exception as error:  # whatever a service does, training goes on
                del self._open[name]
                console.warn_once(f"tracker {name}", f"--track {name}: stopped ({_reason(error)}); training goes on")


def _reason(error: BaseException) -> str:
    return console.redact(" ".join(str(error).split())[:200]) or type(error).__name__


def open_trackers(names: tuple[str, ...], run: Path, config: dict[str, Any]) -> Trackers:
    """Starts trackers and gives them the configuration. TensorBoard and wandb write below `run`; wandb stays offline
    where HF_HUB_OFFLINE is 1.

    Raises UsageError for an unknown name, InputError where a package is missing or a tracker cannot start.
    """
    check_trackers(names)
    return Trackers({name: _started(name, run, config) for name in dict.fromkeys(names)})


def check_trackers(names: tuple[str, ...]) -> None:
    """Raises UsageError for an unknown name, InputError where its package is missing."""
    for name in names:
        if name not in TRACKERS:
            hint = did_you_mean(suggestions(name, TRACKERS))
            raise UsageError(f"--track {name}: no such tracker{hint}; there are {', '.join(TRACKERS)}")
        if find_spec(name) is None:
            raise InputError(f"--track {name}: the package {name} is missing: pip install 'ldm-toolkit[trackers]'")


def _started(name: str, run: Path, config: dict[str, Any]):
    from accelerate import PartialState

    PartialState()  # Accelerate's trackers ask it which process they are in
    try:
        with redirect_stdout(sys.stderr):
            tracker = TRACKERS[name](run)
            if hasattr(tracker, "start"):  # older Accelerate starts a tracker when it is made
                tracker.start()
            tracker.store_init_configuration({key: _plain(value) for key, value in config.items()})
    except Exception as error:  # services and their logins fail in ways of their own
        offline = " or add --offline" if name == "wandb" else ""
        raise InputError(f"--track {name}: cannot start ({_reason(error)}); train without it{offline}") from error
    return tracker


def _plain(value: Any) -> bool | int | float | str:
    """What every tracker takes as a setting; logins and secrets stay here."""
    if isinstance(value, bool | int | float):
        return value
    return console.redact(", ".join(map(str, value)) if isinstance(value, tuple) else str(value))
