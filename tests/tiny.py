"""Runs small enough for a test: the real command line in this process, with networks of a few thousand weights."""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
from documents import check_printed
from PIL import Image

QUIET_LOOP = ("--batch-size", 4, "--mixed-precision", "no", "--sample-every", 0, "--eval-every", 0)
SHAPES = ("--data", "shapes", "--limit", 20, "--size", "20x20")
AE_NETWORK = (
    "--set",
    "autoencoder.channels=8",
    "--set",
    "autoencoder.num_res_blocks=1",
    "--set",
    "autoencoder.embed_dim=3",
    "--set",
    "autoencoder.z_channels=3",
)
UNET = (
    "--set",
    "diffusion.channels=16",
    "--set",
    "diffusion.channel_mult=1",
    "--set",
    "diffusion.groups=4",
    "--set",
    "diffusion.attention_resolutions=1",
    "--set",
    "diffusion.head_channels=8",
    "--set",
    "condition.context_dim=16",
    "--set",
    "condition.text_heads=2",
    "--set",
    "condition.text_head_channels=8",
    "--set",
    "condition.text_length=16",
)
ADAM = ("--set", "train.optimizer=adamw")


class Ending:
    """How a command ended. `json` is the document on stdout."""

    def __init__(self, code: int, stdout: str, stderr: str):
        self.code, self.stdout, self.stderr = code, stdout, stderr

    @property
    def json(self):
        return json.loads(self.stdout)

    @property
    def line(self) -> str:
        """The last line on stderr: what a failed command says."""
        return self.stderr.strip().splitlines()[-1]


def ldm(*args) -> Ending:
    """Runs one command in this process; usable from fixtures of any scope."""
    from ldmcli.cli import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(arg) for arg in args])
    check_printed(list(map(str, args)), int(code), out.getvalue())
    return Ending(int(code), out.getvalue(), err.getvalue())


def train_ae(out: Path, *more, data=SHAPES, steps: int = 3, code: int = 0) -> Ending:
    """`ldm train-ae` with a tiny network; `more` wins over what is set here."""
    ending = ldm("train-ae", *data, *AE_NETWORK, *QUIET_LOOP, "--steps", steps, "--out", out, *more)
    assert ending.code == code, ending.stderr
    return ending


def train_ldm(out: Path, autoencoder, *more, data=SHAPES, steps: int = 3, code: int = 0) -> Ending:
    """`ldm train-ldm` with a tiny network and a latent cache beside the run."""
    cache = ("--set", f"data.cache_dir={out.parent / 'cache'}")
    ending = ldm(
        "train-ldm",
        "--autoencoder",
        autoencoder,
        *data,
        *UNET,
        *QUIET_LOOP,
        *cache,
        "--steps",
        steps,
        "--out",
        out,
        *more,
    )
    assert ending.code == code, ending.stderr
    return ending


def checkpoint(run: Path) -> dict:
    """Tensors of the newest checkpoint, "file.name" -> tensor."""
    from safetensors.torch import load_file

    newest = max((run / "checkpoints").iterdir())
    return {
        f"{file.stem}.{name}": tensor
        for file in sorted(newest.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def weights(run: Path) -> dict:
    """Tensors of model.safetensors."""
    from safetensors.torch import load_file

    return load_file(run / "model.safetensors")


def same(a: dict, b: dict) -> bool:
    """Whether two sets of tensors are equal bit for bit."""
    return a.keys() == b.keys() and all(bool((a[name] == b[name]).all()) for name in a)


def log(run: Path) -> list[dict]:
    """The objects of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def state(run: Path) -> dict:
    """run.json."""
    return json.loads((run / "run.json").read_text())


def pictures(folder: Path) -> list[np.ndarray]:
    """The numbered images of a folder of samples, in order."""
    return [np.asarray(Image.open(path)) for path in sorted(folder.glob("0*.png"))]


def noisy_images(folder: Path, count: int, size: int = 20) -> list[Path]:
    """`count` distinct PNGs below `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for k in range(count):
        pixels = np.random.default_rng(k).integers(0, 256, (size, size, 3), dtype=np.uint8)
        paths.append(folder / f"{k:02d}.png")
        Image.fromarray(pixels).save(paths[-1])
    return paths
