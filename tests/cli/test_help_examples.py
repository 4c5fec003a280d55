"""The example on each help page: run as it is typed, in an empty folder.

Networks and data are made small by settings from the environment; the lines stay as they stand. A line may use what
another line writes (its `--out`). What else it names is laid down by NEEDS; what it must leave is asked by PROMISES.
A new command needs an entry in neither where its line only reads runs and writes below `--out`.
"""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
import typed_lines
from PIL import Image

from ldmcli.cli import COMMANDS
from ldmcli.cli.commands import EXAMPLES, example_line


@pytest.fixture(scope="module")
def empty_folder(tmp_path_factory):
    """An empty folder to type in, with small settings."""
    with typed_lines.small_networks(tmp_path_factory.mktemp("examples")) as folder:
        yield folder


# --- what a line needs --------------------------------------------------------------------------------------------


def small_run(out: str, *options: object) -> None:
    """A tiny diffusion run at `out`, in latents of the example's autoencoder."""
    ending_of("train-ae")
    ending = tiny.ldm(
        "train-ldm", "--autoencoder", option(EXAMPLES["train-ae"], "--out"), "--steps", 2, "--out", out, *options
    )
    assert ending.code == 0, ending.stderr


# command → lays down what its line names and no other line writes
NEEDS: dict[str, Callable[[], None]] = {"upscale": lambda: small_run("runs/shapes-x4", "--task", "sr", "--scale", 4)}


# --- what a line promises -----------------------------------------------------------------------------------------


def run_folder(ending: tiny.Ending, out: Path) -> None:
    state = tiny.state(out)
    assert state["state"] == "finished" and state["step"] == 20
    assert (out / "model.safetensors").is_file() and "<html" in (out / "report.html").read_text()[:200]


def four_pictures(ending: tiny.Ending, out: Path) -> None:
    assert len(tiny.pictures(out)) == 4 and (out / "grid.png").is_file()
    assert json.loads(Image.open(out / "000000.png").text["ldm"])["prompt"] == "a red circle on a navy background"


def repainted(ending: tiny.Ending, out: Path) -> None:
    """Two answers that differ inside the box 8,8,12,10 and nowhere else."""
    before = np.asarray(Image.open("outputs/circles/000000.png"))
    answers = tiny.pictures(out)
    hole = np.zeros(before.shape[:2], bool)
    hole[8:18, 8:20] = True
    assert len(answers) == 2 and all(np.array_equal(answer[~hole], before[~hole]) for answer in answers)
    assert all((answer[hole] != before[hole]).any() for answer in answers)


def four_times_as_large(ending: tiny.Ending, out: Path) -> None:
    assert [picture.shape for picture in tiny.pictures(out)] == [(128, 128, 3)]


def pairs(ending: tiny.Ending, out: Path) -> None:
    assert len(tiny.pictures(out)) >= 4 and "PSNR / dB" in ending.stdout


def distance(ending: tiny.Ending, out: Path | None) -> None:
    assert "FD (EfficientNet-lite0)" in ending.stdout and "n = 64 measured" in ending.stdout


def contact_sheet(ending: tiny.Ending, out: Path) -> None:
    assert (out / "contact.png").is_file() and re.search(r"rows\s+200 train", ending.stdout)


def demo_summary(ending: tiny.Ending, out: Path) -> None:
    found = json.loads((out / "summary.json").read_text())
    assert {"seconds", "ae_psnr", "colour", "shape", "position", "fd"} <= found.keys()
    assert (out / "report.html").is_file() and (out / "samples.png").is_file()


def blind_page(ending: tiny.Ending, out: Path) -> None:
    assert "outputs/circles" not in out.read_text() and ending.stdout.strip() == str(out)


def says(*words: str) -> Callable[[tiny.Ending, Path | None], None]:
    def check(ending: tiny.Ending, out: Path | None) -> None:
        for word in words:
            assert word in ending.stdout, word

    return check


# command → looks at how its line ended and at the folder named by --out
PROMISES: dict[str, Callable[[tiny.Ending, Path], None]] = {
    "train-ae": run_folder,
    "train-ldm": run_folder,
    "distill": run_folder,
    "sample": four_pictures,
    "reconstruct": pairs,
    "inpaint": repainted,
    "upscale": four_times_as_large,
    "eval-fid": distance,
    "ab": blind_page,
    "data": contact_sheet,
    "demo": demo_summary,
    "report": says("report.html"),
    "runs": says("shapes-ae", "finished"),
    "recipes": says("train-ae"),
    "presets": says("kl-f8", "cin256-v2"),
    "doctor": says("torch"),
}


# --- the lines ----------------------------------------------------------------------------------------------------

_ended: dict[str, tiny.Ending] = {}


def option(words: list[str], name: str) -> str | None:
    return words[words.index(name) + 1] if name in words else None


def ending_of(command: str) -> tiny.Ending:
    """How the example of a command ends, after those whose results it names; each is run once."""
    if command not in _ended:
        words = shlex.split(example_line(command))[1:]
        for other, line in EXAMPLES.items():
            out = option(line, "--out")
            if other != command and out and any(f"{word}/".startswith(f"{out}/") for word in words):
                ending_of(other)
        NEEDS.get(command, lambda: None)()
        if command == "runs":
            ending_of("train-ae")
        _ended[command] = tiny.ldm(*words)
    return _ended[command]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_example_of_a_help_page_works_as_it_is_typed(command, empty_folder):
    ending = ending_of(command)
    assert ending.code == 0, ending.stderr
    out = option(EXAMPLES[command], "--out")
    if out:
        assert any(path.is_file() for path in (Path(out), *Path(out).rglob("*")))
    if command in PROMISES:
        PROMISES[command](ending, Path(out or "."))
