"""An encoder of one's own is a file and nothing else: a toy one measures folders and a training, and is compared."""

import inspect
import json

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from ldmcli.evaluation import evaluate

# --- the code of docs/extending.md


class Colours:
    """Mean and deviation of each colour channel, in [0, 1]."""

    name, dim, size = "colours", 6, 32

    def __call__(self, images):
        values = images.flatten(2) / 255
        return torch.cat([values.mean(2), values.std(2)], 1)


# ---


@pytest.fixture
def encoder(tmp_path):
    """Where it is found, as --features names it."""
    (tmp_path / "colours.py").write_text("import torch\n\n" + inspect.getsource(Colours))
    return f"{tmp_path / 'colours.py'}:Colours"


@pytest.fixture
def folders(tmp_path):
    """Two folders of pictures, the second one lighter by 8 levels."""
    made = np.random.default_rng(0).integers(60, 180, (24, 16, 16, 3), dtype=np.uint8)
    for name, images in (("a", made), ("b", made + 8)):
        (tmp_path / name).mkdir()
        for k, image in enumerate(images):
            Image.fromarray(image).save(tmp_path / name / f"{k}.png")
    return tmp_path / "a", tmp_path / "b"


def test_it_measures_folders_beside_a_network(folders, encoder, tmp_path):
    words = ("eval-fid", "--pairs", *folders, "--metrics", "fid", "--json")
    ending = tiny.ldm(*words, "--features", f"{encoder},effnet-lite0")
    assert ending.code == 0, ending.stderr
    found = ending.json
    # a shift of all three means by 8 / 255, and nothing else
    assert found["metrics"]["fd_colours"] == pytest.approx(3 * (8 / 255) ** 2, rel=1e-4)
    assert found["labels"]["fd_colours"] == "FD (colours)" and "fd_effnet_lite0" in found["metrics"]
    first = found["extractors"][0]
    assert (first["name"], first["dim"]) == ("colours", 6) and first["layer"].startswith("colours.py:Colours (6, code ")
    (tmp_path / "before.json").write_text(json.dumps(found | {"metrics": {"fd_colours": 1.0}}))
    again = tiny.ldm(*words, "--features", encoder, "--compare", tmp_path / "before.json")
    assert again.json["compared"]["fd_colours"]["old"] == 1.0
    assert evaluate.evaluate(pairs=folders, metrics=("fid",), features=Colours())["metrics"]["fd_colours"] > 0


def test_a_training_is_measured_by_it(encoder, tmp_path):
    sets = ("train.eval_samples=10", f"train.eval_features={encoder}", "train.eval_steps=1", "train.evaluations=1")
    words = [word for one in sets for word in ("--set", one)]
    data = ("--data", "shapes", "--limit", 40, "--size", "16x16")
    tiny.train_ldm(tmp_path / "run", "none", *words, "--condition", "none", data=data, steps=1)
    log = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any("val/fd_colours" in line for line in log)
