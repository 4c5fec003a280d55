"""Every recipe takes one step by the command line in its head: as printed, but for the data, which are a few pictures
of the right kind, other runs, which are tiny, and the size of the network."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image

from ldmcli.cli.manage import recipe_summary
from ldmcli.core import config

RECIPES = {path.stem: path for path in sorted((Path(__file__).resolve().parents[2] / "recipes").glob("*.toml"))}
# what stands for published sizes; everything else, crops, conditions, losses, schedules, is the recipe's own
SHRUNKEN = {
    "train.batch_size": 4,
    "train.steps": 1,
    "train.sample_every": 0,
    "train.eval_every": 0,
    "train.warmup": 0,
    "train.eval_images": 2,
    "train.mixed_precision": "no",
    "data.workers": 1,
}
NETWORK = {
    "autoencoder": {
        "autoencoder.channels": 8,
        "autoencoder.num_res_blocks": 1,
        "autoencoder.codebook_size": 16,
        "autoencoder.groups": 4,
        "loss.disc_channels": 4,
        "loss.disc_layers": 1,
    },
    "diffusion": {
        "diffusion.channels": 8,
        "diffusion.groups": 4,
        "diffusion.num_res_blocks": 1,
        "diffusion.transformer_depth": 1,
        "condition.text_layers": 1,
        "condition.context_dim": 16,
        "condition.text_heads": 1,
        "condition.text_head_channels": 8,
        "sample.n": 2,
    },
    "classifier": {"diffusion.channels": 8, "diffusion.groups": 4, "diffusion.num_res_blocks": 1},
}
FLAGS = ("--flip", "--no-cache")


@functools.cache
def head(name: str) -> dict:
    return recipe_summary(RECIPES[name])


def options(words: list[str]) -> dict[str, str]:
    """{"--data": "imagenet", …} of a printed command; a flag alone gives ""."""
    found, rest = {}, list(words)
    while rest:
        name = rest.pop(0)
        assert name.startswith("--"), f"{name}: a head's command has options alone"
        found[name] = "" if name in FLAGS else rest.pop(0)
    return found


def printed(name: str) -> tuple[str, dict[str, str]]:
    """(command, its options) of a recipe's head."""
    program, command, *words = head(name)["head"]["command"].split()
    assert program == "ldm"
    return command, options(words)


def settings_of(name: str):
    command, _ = printed(name)
    kind = next(kind for kind, one in config.COMMAND_OF.items() if one == f"ldm {command}")
    return kind, config.resolve(kind, config.recipe_layers(kind, name)).config


def side_of(name: str) -> int:
    """Pixels a side: the least that first stage and UNet divide, and that LPIPS, critic and scale can look at."""
    kind, found = settings_of(name)
    if kind == "autoencoder":
        return max(32, found.autoencoder.f)
    f = stage_of(name)[1]
    return max(16, f * found.diffusion.patch * 2 ** (len(found.diffusion.channel_mult) - 1))


def stage_of(name: str) -> tuple[str, int]:
    """(name of the recipe whose run a recipe builds on, its f); ("none", 1) on pixels."""
    run = printed(name)[1].get("--autoencoder") or ""
    if not run and (begun := printed(name)[1].get("--init-from")):
        return stage_of(next(other for other in RECIPES if printed(other)[1]["--out"] == begun))
    if run == "none":
        return "none", 1
    writer = next(other for other in RECIPES if printed(other)[1]["--out"] == run)
    return writer, settings_of(writer)[1].autoencoder.f


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """Six pictures of 80 x 64 px, not square, with captions, classes by name, three boxes each and a class map."""
    folder, lines = tmp_path_factory.mktemp("pictures"), []
    for k in range(6):
        draw = np.random.default_rng(k)
        Image.fromarray(draw.integers(0, 256, (64, 80, 3), dtype=np.uint8)).save(folder / f"{k}.png")
        Image.fromarray((np.add.outer(np.arange(64), np.arange(80)) // 48 % 2).astype(np.uint8)).save(
            folder / f"map{k}.png"
        )
        boxes = [[4, 4, 40, 40], [20, 10, 50, 50], [30, 30, 40, 30]]
        lines.append(
            {
                "file_name": f"{k}.png",
                "text": f"picture {k}",
                "name": f"thing {k}",
                "keywords": ["one", "two", f"word {k}"],
                "label": k % 2,
                "map_file_name": f"map{k}.png",
                "objects": {"bbox": boxes, "category": ["cat", "dog", "cat"]},
            }
        )
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory) -> Path:
    """A WordPiece vocabulary as BERT's is stored, of 30,522 lines."""
    path = tmp_path_factory.mktemp("words") / "vocab.txt"
    special = ["[PAD]", *(f"[unused{k}]" for k in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = ["picture", *map(str, range(10)), *(f"{start}{chr(97 + k)}" for k in range(26) for start in ("", "##"))]
    more = [f"word{k}" for k in range(30522 - len(special) - len(words))]
    path.write_text("\n".join([*special, *words, *more]) + "\n")
    return path


@pytest.fixture(scope="session")
def stage(tmp_path_factory, pictures):
    """`stage(name)`: the run that a recipe of a first stage writes, tiny: its family, regulariser, f and channels."""
    folder = tmp_path_factory.mktemp("stages")

    @functools.cache
    def trained(family: str, reg: str, f: int, channels: int, mult: tuple) -> Path:
        out = folder / f"{family}-{reg}-{f}-{channels}"
        own = {
            "autoencoder.family": family,
            "autoencoder.reg": reg,
            "autoencoder.f": f,
            "autoencoder.z_channels": channels,
            "autoencoder.embed_dim": channels,
            "autoencoder.channel_mult": list(mult),
            **NETWORK["autoencoder"],
        }
        ending = tiny.ldm(
            "train-ae", "--data", pictures, "--size", max(f, 8), "--out", out, *tiny.ADAM, *sets({**SHRUNKEN, **own})
        )
        assert ending.code == 0, ending.stderr
        return out

    def stage(name: str) -> Path:
        own = settings_of(name)[1].autoencoder
        mult = own.channel_mult if own.family == "paper" else (1,)
        return trained(own.family, own.reg, own.f, own.embed_dim, tuple(mult))

    return stage


def sets(values: dict) -> list[str]:
    return [word for path, value in values.items() for word in ("--set", f"{path}={value}")]


@pytest.fixture(scope="session")
def judge(tmp_path_factory) -> Path:
    """Weights of a backbone of LPIPS, drawn at random."""
    import torch
    from safetensors.torch import save_file

    from ldmcli.networks.perceptual import perceptual_shapes

    path = tmp_path_factory.mktemp("judge") / "squeezenet.safetensors"
    shapes, draw = perceptual_shapes("squeeze").trunk.state_dict(), torch.Generator().manual_seed(0)
    weights = {f"features.{key}": 0.05 * torch.randn(value.shape, generator=draw) for key, value in shapes.items()}
    save_file(weights, path)
    return path


@pytest.fixture
def line(pictures, stage, vocabulary, judge, tmp_path):
    """`line(name)`: the printed command of a recipe as words, its data, runs and sizes replaced."""

    def build(name: str, out: Path | None = None, side: int = 0) -> list:
        command, given = printed(name)
        kind, found = settings_of(name)
        given = dict(given) | {"--data": str(pictures), "--out": str(out or tmp_path / name)}
        given.pop("--gpus", None)  # of the machine, not of the training
        side = side or side_of(name)
        small = {**SHRUNKEN, **NETWORK[kind], "data.size": side, "data.cache_dir": tmp_path / "cache"}
        if kind == "autoencoder":
            small["autoencoder.resolution"] = side
            if found.loss.perceptual_weight:
                small["loss.perceptual"] = judge
            small["loss.disc_start"] = min(found.loss.disc_start, 0)  # both networks in the one step
            return ["ldm", command, *spelled(given), *sets(small)]
        if found.diffusion.num_heads:
            small["diffusion.num_heads"] = min(found.diffusion.num_heads, 2)
        if kind == "diffusion" and "text" in found.condition.kinds and found.condition.vocabulary:
            small |= {"condition.vocabulary": vocabulary}
        if "--init-from" in given:
            writer = next(other for other in RECIPES if printed(other)[1]["--out"] == given["--init-from"])
            earlier = tmp_path / writer
            if not earlier.exists():
                same = {key: value for key, value in given.items() if key == "--autoencoder"}
                assert tiny.ldm(*build(writer, earlier)[1:]).code == 0, same
            given["--init-from"] = str(earlier)
        if given.get("--autoencoder", "none") != "none":
            given["--autoencoder"] = str(stage(stage_of(name)[0]))
        return ["ldm", command, *spelled(given), *sets(small)]

    return build


def spelled(given: dict[str, str]) -> list[str]:
    return [word for key, value in given.items() for word in ((key, value) if value else (key,))]


@pytest.mark.parametrize("name", RECIPES)
def test_the_printed_command_takes_a_step(name, line, tmp_path):
    words = line(name)
    ending = tiny.ldm(*words[1:])
    assert ending.code == 0, ending.stderr
    state = tiny.state(tmp_path / name)
    assert state["state"] == "finished" and state["step"] == 1
    losses = [value for row in tiny.log(tmp_path / name) for key, value in row.items() if key.startswith("loss_")]
    assert losses and np.isfinite(losses).all()
    _, found = settings_of(name)
    told = "latents are not cached" in ending.stderr
    assert told == (printed(name)[0] == "train-ldm" and found.data.cache and found.data.crop == "random")


@pytest.mark.parametrize("name", [name for name in RECIPES if printed(name)[0] == "train-ldm"][::5])
def test_the_printed_command_can_be_planned(name, line, monkeypatch):
    from ldmcli.reports import cost_estimate as planning

    monkeypatch.setattr(planning, "probe_flops_per_s", lambda device, dtype: 1e9)
    ending = tiny.ldm(*line(name)[1:], "--plan", "--json")
    assert ending.code == 0 and ending.json["parameters"]["model"] > 0
