"""A condition of one's own is one entry of CONDITIONS: training, previews, sampling and evaluation take it by name."""

import json

import numpy as np
import pytest
import tiny
import torch
import typed_lines
from PIL import Image
from torch import nn

import ldmcli
from ldmcli.conditions import CONDITIONS, Condition
from ldmcli.networks.conditioning import Conditioner, Conditioning


# --- the code of docs/extending.md
class ToneConditioner(Conditioner):
    """Numbers -> one token each. The null is a number that is not there."""

    gives_tokens = True

    def __init__(self, settings, spec, tokenizer=None):
        super().__init__()
        self.embedding = nn.Linear(2, settings.context_dim)

    def prepare(self, values):
        """Numbers -> {"tone": (n, 2)}: the number, and that it is there."""
        return {"tone": torch.tensor([[value, 1.0] for value in values])}

    def null(self, n, given=None):
        """No number, n times."""
        return {"tone": torch.zeros(n, 2)}

    def example(self, size):
        """A number."""
        return self.null(1)

    def forward(self, inputs):
        return Conditioning(context=self.embedding(inputs["tone"])[:, None])


class Tone(Condition):
    """How light a picture is, by a column of the data."""

    name, column, conditioner = "tone", "tone", ToneConditioner
    static = True  # crops and flips leave it as it is

    def from_row(self, dataset, view):
        return float(dataset.rows.cell(view.row, self.column))

    def parse(self, values, conditioner, size=None):
        return [float(value) for value in values]


# --- to here
@pytest.fixture(scope="module", autouse=True)
def tone():
    """The condition, known in this file alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CONDITIONS, "tone", Tone())
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Grey pictures, with how light they are beside them."""
    folder, lines = tmp_path_factory.mktemp("tones"), ["file_name,tone"]
    for k in range(12):
        Image.fromarray(np.full((20, 20, 3), 20 * k, np.uint8)).save(folder / f"{k:02d}.png")
        lines.append(f"{k:02d}.png,{k / 12:.3f}")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory, data):
    """A model that is told the tone of a picture."""
    folder = tmp_path_factory.mktemp("toy")
    with typed_lines.small_networks(folder):
        rows = ("--data", data, "--size", "20x20", "--val-fraction", 0.3)
        tiny.train_ae(folder / "ae", data=rows)
        told = ("--condition", "tone", "--set", "sample.n=2", "--sample-every", 3)
        tiny.train_ldm(folder / "tone", folder / "ae", *told, data=rows)
        yield folder / "tone"


def test_a_condition_that_is_added_trains_previews_and_is_reported(model, data):
    weights = tiny.weights(model)
    assert {name for name in weights if "tone" in name} == {
        f"conditions.entries.tone.embedding.{part}" for part in ("weight", "bias")
    }
    assert list((model / "samples").glob("*.png"))
    preview = json.loads((model / "stats.json").read_text())["preview"]
    assert preview["n"] == 1 and len(preview["values"]["tone"]) == 2
    assert "tone-conditional" in (model / "README.md").read_text()
    plan = tiny.ldm("train-ldm", "--data", data, "--autoencoder", model.parent / "ae", "--condition", "tone", "--plan")
    assert plan.code == 0, plan.stderr


def test_a_condition_that_is_added_is_given_by_name(model, tmp_path):
    asked = ("--model", model, "--steps", 2, "--given", "tone=0.1", "--given", "tone=0.9")
    ending = tiny.ldm("sample", *asked, "--guidance", "tone=3", "--out", tmp_path / "out", "--json")
    assert ending.code == 0, ending.stderr
    dark, light = tiny.pictures(tmp_path / "out")
    assert (dark != light).any()
    assert json.loads(Image.open(tmp_path / "out" / "000001.png").text["ldm"])["tone"] == 0.9
    loaded = ldmcli.load(model)
    again = loaded.sample(values={"tone": [0.1, 0.9]}, steps=2, guidance={"tone": 3.0})
    assert all((np.asarray(a) == b).all() for a, b in zip(again, (dark, light)))
    assert loaded.embed(values={"tone": 0.5}).shape == (1, 1, 16)


def test_what_is_wrong_with_a_given_value_is_one_line(model, tmp_path):
    for given, says in (
        ((), "--given: this model is conditioned on tone; give one with --given tone=VALUE"),
        (("--given", "tune=1"), "tune: no such condition"),
        (("--given", "text=x"), "use --prompt"),
        (("--given", "tone"), "write tone=VALUE"),
    ):
        ending = tiny.ldm("sample", "--model", model, *given, "--out", tmp_path / "none")
        assert ending.code == 2 and says in ending.line


def test_a_condition_that_is_added_inpaints_and_is_measured(model, data, tmp_path):
    (photo,) = tiny.noisy_images(tmp_path, 1)
    asked = ("--model", model, "--steps", 2)
    edit = ("inpaint", photo, "--box", "4,4,8,8", *asked, "--given", "tone=0.5", "--out", tmp_path / "out")
    ending = tiny.ldm(*edit)
    assert ending.code == 0, ending.stderr
    ending = tiny.ldm("eval-fid", *asked, "--data", data, "-n", 2, "--features", "effnet-lite0", "--json")
    assert ending.code == 0, ending.stderr


def test_data_without_its_column_are_refused(model, tmp_path):
    ending = tiny.train_ldm(tmp_path / "run", model.parent / "ae", "--condition", "tone", code=3)
    assert "needs a tone column" in ending.line and "add it to the data" in ending.line
