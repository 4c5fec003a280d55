"""Every condition with every task and every first stage: trained one step, used by its command and from Python,
measured, also while it trains. Networks of a few thousand weights, pictures of 16 px."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import save_file

import ldmcli
from ldmcli.core.settings import DataSettings
from ldmcli.data.sources import open_rows
from ldmcli.evaluation import evaluate, extractors
from ldmcli.training import sample_quality

SIZE, ROWS = 16, 6
CONDITIONS = ("none", "class", "text", "layout", "map", "text+map", "class+layout")
TASKS = {
    "generate": (),
    "sr": ("--task", "sr", "--scale", 2),
    "inpaint": ("--task", "inpaint", "--set", "task.fill=black"),
}
STAGES = {"kl": ("--f", 4), "vq": ("--f", 4, "--reg", "vq", "--codebook-size", 16), "pixels": None}
FAST = ("--set", "sample.n=2", "--no-cache", "--set", "diffusion.timesteps=50", "--set", "train.guide_at=0.5")
MEASURED = ("--set", "train.eval_samples=10", "--set", "train.eval_steps=1")  # as DRAW draws
DRAW = {"steps": 1, "guidance": 2.0, "autoguidance": 1.5}
LAYOUT = {"objects": [{"bbox": [0.1, 0.2, 0.5, 0.6], "category": "star"}]}


class Eight(torch.nn.Module):
    """Eight features of a picture."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 5, 3)

    def forward(self, x):
        pooled = torch.relu(self.conv(x / 127.5 - 1)).mean((2, 3))
        return pooled, pooled


def write_rows(folder: Path) -> tuple:
    """A folder of a few shapes with classes, captions, boxes and maps; the options that name it."""
    rows, found = open_rows(DataSettings(size=(SIZE, SIZE)), split="train"), []
    folder.mkdir()
    for k in range(ROWS):
        Image.fromarray(rows.pixels(k, (SIZE, SIZE))).save(folder / f"{k}.png")
        Image.fromarray(rows.map_pixels(k, (SIZE, SIZE))).save(folder / f"m{k}.png")
        boxes, name = SIZE * rows.boxes(k, (SIZE, SIZE))["bbox"], ("star", "circle")[k % 2]
        objects = {"bbox": boxes.round(2).tolist(), "category": [name] * len(boxes)}
        found.append(
            {
                "file_name": f"{k}.png",
                "map_file_name": f"m{k}.png",
                "text": rows.caption(k),
                "label": name,
                "objects": objects,
            }
        )
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, found)))
    return "--data", folder, "--size", SIZE, "--val-fraction", 0.34


@pytest.fixture(scope="module")
def materials(tmp_path_factory):
    """Rows, first stages, a picture and what can be said of it."""
    folder = tmp_path_factory.mktemp("combinations")
    data = write_rows(folder / "data")
    for name, options in STAGES.items():
        if options is not None:
            tiny.train_ae(folder / name, *options, data=data, steps=1)
    (folder / "layout.json").write_text(json.dumps(LAYOUT))
    index, hole = np.zeros((SIZE, SIZE), np.uint8), np.zeros((SIZE, SIZE), bool)
    index[4:12, 3:9], hole[5:11, 4:12] = 2, True
    Image.fromarray(index).save(folder / "map.png")
    Image.fromarray(hole).save(folder / "mask.png")
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "picture.png")
    save_file(Eight().state_dict(), folder / "eight.safetensors")
    return folder, data


@pytest.fixture(autouse=True)
def cheap_features(materials, monkeypatch):
    """Features that cost nothing: whether a model can be measured is the question here, not how good it is."""
    path = materials[0] / "eight.safetensors"
    network = extractors.Network(
        Eight, "pool (8)", 8, 16, "bicubic (antialiased)", "FD (eight)", "eight8", ("000000",), "x"
    )
    for module in (evaluate, sample_quality):
        monkeypatch.setattr(
            module, "open_extractor", lambda name=None: extractors.Extractor("eight", network, path, "0" * 64)
        )
    monkeypatch.setenv("LDM_CACHE", str(materials[0] / "cache"))


def asked(folder: Path, condition: str) -> tuple[list, dict]:
    """What to draw, as options and as arguments from Python."""
    every = {
        "class": ("--class", "classes", "star"),
        "text": ("--prompt", "prompt", "a red star"),
        "layout": ("--layout", "layout", folder / "layout.json"),
        "map": ("--map", "map", folder / "map.png"),
    }
    chosen = [every[kind] for kind in condition.split("+") if kind in every]
    return [word for option, _, value in chosen for word in (option, value)], {name: value for _, name, value in chosen}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("condition", CONDITIONS)
def test_what_can_be_trained_can_be_used_and_measured(stage, task, condition, materials, tmp_path):
    folder, data = materials
    run, picture = tmp_path / "run", folder / "picture.png"
    tiny.train_ldm(
        run,
        "none" if stage == "pixels" else folder / stage,
        *tiny.ADAM,
        "--condition",
        condition,
        *TASKS[task],
        *FAST,
        *MEASURED,
        data=data,
        steps=1,
    )

    command = {
        "generate": ("sample",),
        "sr": ("upscale", picture, "--scale", 2),
        "inpaint": ("inpaint", picture, folder / "mask.png"),
    }[task]
    options, arguments = asked(folder, condition)
    settings = [word for name, value in DRAW.items() for word in (f"--{name}", value)]
    ending = tiny.ldm(*command, "--model", run, *options, "-n", 1, *settings, "--json", "--out", tmp_path / "out")
    assert ending.code == 0, ending.stderr
    drawn = np.asarray(Image.open(ending.json["images"][0]))
    side = SIZE * (2 if task == "sr" else 1)
    assert drawn.shape == (side, side, 3) and drawn.std() > 0

    model = ldmcli.load(run)
    use = {
        "generate": model.sample,
        "sr": lambda **how: model.upscale(picture, **how),
        "inpaint": lambda **how: model.inpaint(picture, folder / "mask.png", **how),
    }[task]
    assert (np.asarray(use(**arguments, **DRAW)[0]) == drawn).all()

    metrics, count = ("fid,kid,mind,is", 10) if task == "generate" else ("fid,kid,mind,psnr,ssim", 2)
    as_trained = ("--autoguidance", 1)  # an evaluation within a training has none
    ending = tiny.ldm("eval-fid", "--model", run, "--metrics", metrics, "-n", count, *settings, *as_trained, "--json")
    assert ending.code == 0, ending.stderr
    found = ending.json["metrics"]
    assert all(value is None or np.isfinite(value) for value in found.values())
    logged = {key.removeprefix("val/"): value for key, value in tiny.log(run)[-1].items() if key.startswith("val/")}
    ends = ending.json["estimates"]["fd_eight8"]["interval"]
    found |= dict(zip(("fd_eight8_low", "fd_eight8_high"), ends)) if ends else {}
    assert {key: logged[key] for key in logged if key != "val_loss"} == {
        key: found[key] for key in logged if key in found
    }
    assert {"val_loss", "fd_eight8", "kid_eight8_mean", "psnr" if count == 2 else "is_eight8_mean"} <= logged.keys()
