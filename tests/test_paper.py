"""docs/paper.md keeps its word: every command of its tables runs, with small networks on a few pictures.

What stands for published runs and data sets is listed here; the commands are as printed, with fewer samples and steps.
"""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import tiny
import typed_lines
from PIL import Image

from ldmcli.studies import measure

PAGE = Path(__file__).resolve().parents[1] / "docs" / "paper.md"
DATA = ("celebahq", "imagenet", "coco", "places", "landscapes", "my-photos")
# name of a run → what `ldm train-ldm` is given for the small one in its place
MODELS = {
    "celeba256": (),
    "lsun_beds256": (),
    "txt2img-1p4B": ("--condition", "text"),
    "cin256": ("--condition", "class"),
    "cin256-v2": ("--condition", "class"),
    "layout2img-coco": ("--condition", "layout"),
    "layout2img-openimages256": ("--condition", "layout"),
    "semantic_synthesis256": ("--condition", "map"),
    "sr4-imagenet": ("--task", "sr"),
    "bsr_sr": ("--task", "sr"),
    "inpainting_big": ("--task", "inpaint"),
    "inpaint-vq-attn": ("--task", "inpaint"),
}
STAGES = {"kl-f4": ("--f", 4, "--reg", "kl"), "vq-f4": ("--f", 4, "--reg", "vq"), "vq-f8": ("--f", 8, "--reg", "vq")}
SMALL = ("--data", "imagenet", "--size", 32, "--steps", 1)
# command → options that are added, and those whose values are replaced
SHORTER = {
    "sample": {"--steps": "2", "-n": "2"},
    "upscale": {"--steps": "2"},
    "inpaint": {"--steps": "2"},
    "eval-fid": {"--steps": "1", "-n": "4", "--features": "effnet-lite0"},
    "neighbours": {"-n": "2", "-k": "3", "--features": "effnet-lite0"},
    "study": {
        "--data": "imagenet",
        "--f": "1,4",
        "--parameters": "200k",
        "--size": "32",
        "--steps": "1",
        "--sampling-steps": "1,2",
        "-n": "10",
        "--eval-samples": "0",
    },
    "train-ldm": {"--size": "64"},
    "bench": {
        "--size": "32",
        "--steps": "1",
        "--batch-size": "1",
        "--seconds": "0.01",
        "--set": "diffusion.channels=32",
        "--work": "train",
    },
}
# what cannot be had here: rows, and a download
LACKING = {
    "tab2-": "--reference-count 12",
    "tab7-": "--metrics fid --split validation -n 2",
    "tab8-": "-n 10",
    "tab9-": "--reference-count 12",
}
SIZES = {"512x1024": "64x128", "512": "64"}


def rows() -> list[tuple[str, list[str]]]:
    """(name, commands) of the rows of the tables."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if re.match(r"\| (Tab|Fig)\.", line)]
    cells = [line.split(" | ") for line in lines]
    return [(cell[0].removeprefix("| "), re.findall(r"`(ldm [^`]*)`", cell[1])) for cell in cells]


COMMANDS = [(name, command) for name, commands in rows() for command in commands]


def shortened(command: str) -> list[str]:
    """The words of a command, with fewer samples, steps and pixels."""
    _, name, *words = shlex.split(command)
    words = [SIZES.get(word, word.removesuffix(",lpips")) for word in words]  # its weights are a download
    if "--plan" in words:
        return [name, *words]
    for option, value in SHORTER.get(name, {}).items():
        if option in words:
            words[words.index(option) + 1] = value
        elif option not in ("--steps", "-n") or "--model" in words or name in ("study", "bench"):
            words += [option, value]
    return [name, *words, *(word for part, more in LACKING.items() if part in command for word in more.split())]


@pytest.fixture(scope="module")
def at_home(tmp_path_factory):
    """A folder with the runs, data sets and files that the page names."""
    with pytest.MonkeyPatch.context() as patch, typed_lines.small_networks(tmp_path_factory.mktemp("paper")) as folder:
        patch.setattr(measure, "RATE_IMAGES", 2)
        _pictures(folder / "imagenet")
        for name in DATA:
            if name != "imagenet":
                (folder / name).symlink_to("imagenet")
        (folder / "photos").symlink_to("imagenet/train")
        for name, options in STAGES.items():
            _train("train-ae", name, options)
        made: dict[tuple, str] = {}
        for name, options in MODELS.items():
            if options in made:
                (folder / "runs" / name).symlink_to(made[options])
                continue
            made[options] = name
            _train("train-ldm", name, ("--autoencoder", "runs/kl-f4", *options))
        _train("train-classifier", "cin256-g", ("--autoencoder", "runs/kl-f4"))
        _files(folder)
        yield folder


def _train(command: str, name: str, options: tuple) -> None:
    ending = tiny.ldm(command, *SMALL, *options, "--out", f"runs/{name}")
    assert ending.code == 0, ending.stderr


def _pictures(folder: Path) -> None:
    """Split folders of 16 and 12 pictures with captions, classes, boxes and maps."""
    for split, count in (("train", 16), ("validation", 12)):
        lines = []
        paths = tiny.noisy_images(folder / split, count, 256)
        for k, path in enumerate(paths):
            Image.fromarray((np.add.outer(np.arange(256), np.arange(256)) // (160 + k) % 2).astype(np.uint8)).save(
                folder / split / f"map{k}.png"
            )
            boxes = {"bbox": [[16, 16, 160, 160], [80, 40, 160, 200]], "category": ["cat", "dog"]}
            lines.append(
                {
                    "file_name": path.name,
                    "text": f"picture {k}",
                    "label": ("cat", "dog")[k % 2],
                    "map_file_name": f"map{k}.png",
                    "objects": boxes,
                }
            )
        (folder / split / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _files(folder: Path) -> None:
    """Single pictures, a mask, boxes, prompts, and folders of two methods and of the truth."""
    for name, seed, side in (("photo", 0, 64), ("small", 1, 16)):
        pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    mask = np.zeros((64, 64), np.uint8)
    mask[20:40, 20:40] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    Image.fromarray((np.arange(64 * 128) // 128 // 32).astype(np.uint8).reshape(64, 128)).save(folder / "map.png")
    objects = [{"bbox": [0.1, 0.1, 0.5, 0.5], "category": "cat"}]
    (folder / "boxes.json").write_text(json.dumps({"objects": objects}))
    (folder / "prompts.txt").write_text("picture 1\npicture 2\n")
    for name in ("a", "b", "true"):
        tiny.noisy_images(folder / "outputs" / name, 4)


_ended: dict[tuple[str, ...], tiny.Ending] = {}  # some rows differ in what is left out here


@pytest.mark.parametrize(("row", "command"), COMMANDS, ids=[f"{name}: {command}" for name, command in COMMANDS])
def test_a_command_of_the_page_runs(row, command, at_home):
    if "--score" in command:
        pytest.skip("needs answers of people; tests/studies/test_ab.py scores some")
    words = tuple(shortened(command))
    if words[0] == "train-ldm" and "--plan" not in words:
        words += ("--out", "new/" + words[words.index("--recipe") + 1])
    if words not in _ended:
        _ended[words] = tiny.ldm(*words)
    ending = _ended[words]
    assert ending.code == 0, f"{row}: {command}\n{' '.join(words)}\n{ending.stderr}"


def test_every_table_and_figure_has_a_row_with_a_result():
    text = PAGE.read_text(encoding="utf-8")
    named = " ".join(name for name, _ in rows())
    numbers = {kind: set(_numbers(named, kind)) for kind in ("Tab", "Fig")}
    assert numbers == {"Tab": set(range(1, 19)), "Fig": {*range(1, 11), *range(12, 35)}}
    for line in text.splitlines():
        if re.match(r"\| (Tab|Fig)\.", line):
            assert line.count(" | ") == 3 and line.rstrip(" |").rsplit(" | ", 1)[1].strip(), line


def _numbers(text: str, kind: str) -> list[int]:
    """7, 12, 13, 14 of "Fig. 7" and "Fig. 12 to 14"."""
    found: list[int] = []
    for first, joint, last in re.findall(rf"{kind}\. (\d+)(?:(,| to) (\d+))?", text):
        found += range(int(first), int(last) + 1) if joint == " to" else [int(one) for one in (first, last) if one]
    return found
