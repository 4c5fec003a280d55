"""The model that comes with the package: where it lies, what it is called, what is said where it is missing."""

from pathlib import Path

from ldmcli.core.errors import ModelError

NAME = "ldm-emoji"  # as --model takes it
FOLDER = Path(__file__).resolve().parents[1] / "box" / NAME  # a run folder; docs/measure/make_box.py fills it
WHAT = "text to emoji of 64 px; it comes with ldm"


def is_there() -> bool:
    """Whether this installation carries the model."""
    return (FOLDER / "run.json").is_file()


def is_meant(path: Path) -> bool:
    """Whether a name of a model, as it is given, means the one that comes with the package."""
    return path == Path(NAME)


def folder() -> Path:
    """The model's run folder. Raises ModelError where this installation has none."""
    if not is_there():
        raise ModelError(
            f"{NAME}: this installation of ldm comes without its model; install a release that has it, or name a run "
            "of your own (`ldm train-ldm` trains one)"
        )
    return FOLDER
