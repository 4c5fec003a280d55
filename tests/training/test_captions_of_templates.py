"""Trainings whose captions are drawn from templates: exact, alike on any number of processes, and said in the run."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from ldmcli.conditions import CONDITIONS
from ldmcli.conditions.dataset import ConditionDataset, ConditionInputs
from ldmcli.conditions.fit import check_settings
from ldmcli.core.errors import UsageError
from ldmcli.core.settings import ConditionSettings, DataSettings, DiffusionConfig
from ldmcli.data.sources import open_rows
from ldmcli.networks.conditioners import load_tokenizer

TEMPLATES = ("{caption}", "a {colours} {name}", "{keywords:2}, {style} style")
OF = ("--condition", "text", *tiny.ADAM, "--set", "train.cooldown=0", "--set", f"data.captions={json.dumps(TEMPLATES)}")


@pytest.fixture(scope="module")
def things(tmp_path_factory):
    """16 pictures of one colour each with captions, names, keywords and now and then a style."""
    folder, lines = tmp_path_factory.mktemp("things"), []
    for k in range(16):
        pixels = np.full((20, 20, 3), 255, np.uint8)
        pixels[3:17, 3:17] = [(221, 46, 68), (85, 172, 238), (120, 177, 89)][k % 3]
        pixels[10, 10] = k
        Image.fromarray(pixels).save(folder / f"{k}.png")
        words = [f"first{k}", f"second{k}", "common"]
        one = {"caption": f"an old thing {k}", "name": f"thing{k}", "keywords": words, "style": "flat" * (k % 2)}
        lines.append(json.dumps({"file_name": f"{k}.png", **one}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def trained(things, tiny_runs, tmp_path_factory):
    """A run of six steps."""
    run = tmp_path_factory.mktemp("mixed") / "run"
    data = ("--data", things, "--size", "20x20")
    tiny.train_ldm(run, tiny_runs["kl"], *OF, "--set", "data.workers=2", data=data, steps=6)
    return SimpleNamespace(run=run, data=data, ae=tiny_runs["kl"])


def test_a_run_that_goes_on_has_the_weights_of_one_that_was_not_stopped(trained, tmp_path):
    for steps in (3, 6):
        tiny.train_ldm(tmp_path / "run", trained.ae, *OF, data=trained.data, steps=steps)
    assert tiny.same(tiny.checkpoint(tmp_path / "run"), tiny.checkpoint(trained.run))
    other = [*OF[:-1], 'data.captions=["{caption}"]']
    ending = tiny.train_ldm(tmp_path / "run", trained.ae, *other, data=trained.data, steps=9, code=4)
    assert "data.captions" in ending.line and "--fresh" in ending.line


def test_vocabulary_run_and_card_know_the_templates(trained):
    tokenizer = load_tokenizer(trained.run / "tokenizer")
    known = tokenizer.get_vocab()
    assert {"red", "blue", "green", "brown", "common", "first0", "flat", "style"} <= known.keys()
    assert tiny.state(trained.run)["data"]["captions"] == list(TEMPLATES)
    card = (trained.run / "README.md").read_text()
    assert "“a {colours} {name}”" in card and "data.captions = [" in card


def test_latents_are_cached_without_captions(trained, tmp_path):
    """A run with other captions finds the latents of the first."""
    cache = ("--set", f"data.cache_dir={trained.run.parent / 'cache'}")
    ending = tiny.train_ldm(tmp_path / "run", trained.ae, "--condition", "text", *cache, data=trained.data, steps=1)
    assert "found in the cache" in ending.stderr


def test_the_loss_of_validation_is_by_the_first_template(things):
    data = DataSettings(source=str(things), size=(20, 20), captions=("{name}", *TEMPLATES))
    rows = open_rows(data)
    for captions, expected in ((data.captions, "thing"), (TEMPLATES, "an old thing "), ((), "an old thing ")):
        config = DiffusionConfig(data=replace(data, captions=captions))
        source = ConditionDataset(rows, config, (20, 20), training=False)
        assert all(text.startswith(expected) for text in source.values("text", range(8), range(8)))
        assert source.values("text", range(8), range(8)) == source.foreign_values("text", range(8))


@pytest.mark.parametrize("templates", [TEMPLATES, ()])
def test_a_batch_is_the_same_in_parts_and_drawn_anew_each_epoch(templates, things):
    """What a process has of a batch depends on (seed, position) alone."""
    data = DataSettings(source=str(things), size=(20, 20), captions=templates)
    rows, config = open_rows(data), DiffusionConfig(data=data, condition=ConditionSettings(kinds=("text",)))

    def inputs(ids, positions, seed=0):
        source = ConditionDataset(
            rows, replace(config, train=replace(config.train, seed=seed)), (20, 20), training=True
        )
        one = SimpleNamespace(prepare=lambda texts: {"ids": torch.tensor([[hash(text)] for text in texts])})
        told = SimpleNamespace(
            kinds=("text",),
            conditioners={"text": one},
            prepare_one=lambda name, texts: {f"{name}.ids": one.prepare(texts)["ids"]},
        )
        return ConditionInputs(source, told).batch(np.array(ids), np.array(positions), None)["text.ids"]

    ids, where = [0, 3, 5, 7, 9, 1, 2, 4], list(range(40, 48))
    whole = inputs(ids, where)
    parts = [inputs(ids[:3], where[:3]), inputs(ids[3:], where[3:])]
    assert torch.equal(whole, torch.cat(parts))
    again = [inputs(ids, [at + 8 for at in where]), inputs(ids, where, seed=1)]
    assert all(torch.equal(whole, one) != bool(templates) for one in again)


def test_evaluation_on_other_data_takes_its_captions_where_a_column_is_not_there(things, tmp_path):
    config = DiffusionConfig(data=DataSettings(captions=("{name}",), size=(20, 20)))
    other = tmp_path / "other"
    other.mkdir()
    (other / "0.png").write_bytes((things / "0.png").read_bytes())
    (other / "metadata.csv").write_text("file_name,caption\n0.png,mine\n")
    rows = open_rows(replace(config.data, source=str(other)))
    assert CONDITIONS["text"].available(rows, config.data)
    assert ConditionDataset(rows, config, (20, 20), training=False).foreign_values("text", [0]) == ["mine"]


def test_data_without_captions_can_be_told_by_other_columns(tmp_path, tiny_runs):
    """Classes as sub-folders, as "a photograph of a cat"."""
    for k, path in enumerate(tiny.noisy_images(tmp_path / "noisy", 8, 20)):
        folder = tmp_path / "classes" / ("cat", "owl")[k % 2]
        folder.mkdir(parents=True, exist_ok=True)
        path.rename(folder / path.name)
    told = ("--condition", "text", "--set", 'data.captions=["a photograph of a {label}", "{label}"]')
    data = ("--data", tmp_path / "classes", "--size", "20x20")
    tiny.train_ldm(tmp_path / "run", tiny_runs["kl"], *told, data=data, steps=1)
    stats = json.loads((tmp_path / "run" / "stats.json").read_text())
    assert set(stats["preview"]["prompt"]) <= {"a photograph of a cat", "a photograph of an owl"}


@pytest.mark.parametrize(
    "templates, code, words",
    [
        (["{nme}"], 3, ["data.captions names nme", "there are caption, ", "did you mean name?"]),
        (["{name"], 2, ["data.captions: '{name'", "(from --set)"]),
        (["{name:some}"], 2, ["name:N", "(from --set)"]),
    ],
)
def test_a_wrong_template_is_one_line_before_anything_is_trained(templates, code, words, trained, tmp_path):
    told = ("--condition", "text", "--set", f"data.captions={json.dumps(templates)}")
    ending = tiny.train_ldm(tmp_path / "run", trained.ae, *told, data=trained.data, code=code)
    assert all(word in ending.line for word in words) and "Traceback" not in ending.stderr


def test_templates_without_text_are_refused():
    with pytest.raises(UsageError, match=r"data\.captions: only --condition text"):
        check_settings(DiffusionConfig(data=DataSettings(captions=("{name}",))))


def test_captions_that_do_not_fit_are_told(trained, tmp_path):
    short = ("--set", "condition.text_length=5")
    ending = tiny.train_ldm(tmp_path / "run", trained.ae, *OF, *short, data=trained.data, steps=1)
    assert "captions have more than the 5 tokens" in ending.stderr


def test_data_shows_what_templates_give(things, tmp_path):
    told = ("--set", f"data.captions={json.dumps(TEMPLATES)}", "--out", tmp_path / "out")
    ending = tiny.ldm("data", things, *told, "--json")
    assert ending.code == 0, ending.stderr
    mixed = ending.json["mixed_captions"]
    assert len(mixed) == 6 and all(one["first"].startswith("an old thing") for one in mixed)
    texts = {text for one in mixed for text in one["drawn"]}
    assert any(text.startswith(("a red", "a blue", "a green")) for text in texts)
    shown = tiny.ldm("data", things, *told[:2], "--out", tmp_path / "again").stdout
    assert "mixed       " in shown and mixed[0]["file"] in shown
    wrong = tiny.ldm("data", things, "--set", 'data.captions=["{nme}"]', "--out", tmp_path / "third").stdout
    assert "names nme" in " ".join(wrong.split())
    recipe = tiny.ldm("data", things, "--recipe", "emoji64-text-mixed", "--out", tmp_path / "fourth", "--json")
    assert recipe.json["mixed_captions"]
    assert tiny.ldm("data", things, "--recipe", "kl-f8", "--out", tmp_path / "fifth", "--json").code == 0
