"""--plan tells sizes that are those of the networks, and opens neither data nor weights."""

import pytest
import torch
from torch import nn

from ldmcli.core import config, files
from ldmcli.core.errors import ModelError, UsageError
from ldmcli.networks.autoencoder import Autoencoder
from ldmcli.networks.discriminator import PatchDiscriminator
from ldmcli.networks.latent_diffusion import DiffusionModel
from ldmcli.reports import cost_estimate as planning
from ldmcli.reports.cost_estimate import plan, plan_text
from ldmcli.training import cost

NOWHERE = {"data.source": "/no/such/folder"}  # would fail if anything opened it
SMALL = {"diffusion.channels": 16, "diffusion.channel_mult": (1, 2), "diffusion.attention_resolutions": (2,)}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(planning, "probe_flops_per_s", lambda device, dtype: 1e9)


def resolved(kind, **values):
    values = {name.replace("__", "."): value for name, value in values.items()}
    return config.resolve(kind, [("test", {**NOWHERE, **values})])


def write_run(folder, settings):
    """What a plan reads of an autoencoder's run."""
    folder.mkdir(exist_ok=True)
    files.write_text(folder / "config.toml", config.to_toml(settings))
    files.write_json(folder / "run.json", {"kind": "autoencoder"})


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_parameters_of_the_autoencoder_are_those_of_the_network():
    given = resolved(
        "autoencoder", autoencoder__channels=16, autoencoder__f=8, loss__disc_weight=0.5, loss__disc_channels=8
    )
    found = plan("autoencoder", given)
    assert found["parameters"] == {
        "autoencoder": count(Autoencoder(given.config.autoencoder)),
        "discriminator": count(PatchDiscriminator(3, 8, 3)),
    }
    assert found["latent"] == [4, 8, 8] and found["image"] == [64, 64]


def test_parameters_of_the_diffusion_model_are_those_of_the_network():
    kinds = ("text", "class")
    given = resolved(
        "diffusion",
        condition__kinds=kinds,
        condition__text_length=12,
        condition__vocabulary_size=99,
        **{k.replace(".", "__"): v for k, v in SMALL.items()},
    )
    facts = {"text": {"length": 12, "vocabulary": 99}, "class": {"class_names": [str(k) for k in range(1000)]}}
    model = DiffusionModel(given.config.diffusion, given.config.condition, facts, None, (4, 16, 16))
    found = plan("diffusion", given)
    assert found["parameters"] == {"model": count(model)}
    assert any("12 tokens from 99 words" in note for note in found["notes"])


def test_latents_are_those_of_the_named_autoencoder(tmp_path):
    ae = resolved("autoencoder", data__size=(48, 96), autoencoder__f=8, autoencoder__embed_dim=7)
    write_run(tmp_path, ae.config)
    given = resolved("diffusion", **{k.replace(".", "__"): v for k, v in SMALL.items()})
    assert plan("diffusion", given, autoencoder=str(tmp_path))["latent"] == [7, 6, 12]
    assert plan("diffusion", given, autoencoder="none")["latent"] == [3, 64, 64]


def test_conditions_of_an_earlier_run_are_taken_over(tmp_path):
    write_run(tmp_path / "autoencoder", resolved("autoencoder").config)
    files.write_json(tmp_path / "stats.json", {"conditions": {"class": {"class_names": ["a", "b"]}}})
    given = resolved("diffusion", condition__kinds=("class",), **{k.replace(".", "__"): v for k, v in SMALL.items()})
    kept, assumed = plan("diffusion", given, init_from=str(tmp_path)), plan("diffusion", given)
    width = given.config.condition.context_dim
    assert assumed["parameters"]["model"] - kept["parameters"]["model"] == (1000 - 2) * width
    assert not any("assumed" in note for note in kept["notes"])


def test_an_autoencoder_that_is_not_there_is_named():
    with pytest.raises(ModelError, match="/no/such/ae: no such run folder"):
        plan("diffusion", resolved("diffusion"), autoencoder="/no/such/ae")


def test_a_size_that_the_unet_cannot_halve_is_refused():
    with pytest.raises(UsageError, match="multiples of 16"):
        plan("diffusion", resolved("diffusion", data__size=(72, 72)))


def test_a_frozen_text_encoder_is_not_opened():
    given = resolved("diffusion", condition__kinds=("text",), condition__text_encoder="nobody/has-this")
    assert any("nobody/has-this: not opened" in note for note in plan("diffusion", given)["notes"])


def test_flops_and_kept_bytes_of_a_layer_are_those_of_arithmetic():
    with torch.device("meta"):
        layer, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.zeros(1, 8)
    work = cost.measure_cost(layer, lambda: layer(x))
    assert work.forward_flops == 2 * (8 * 16 + 16 * 4)
    assert work.training_flops == work.forward_flops + 2 * (8 * 16 + 2 * 16 * 4)  # the input needs no gradient
    assert work.activation_bytes == 4 * (8 + 16)  # the input and the ReLU's output, each once


def test_flops_a_step_grow_with_the_batch_and_with_a_discriminator():
    one, four = (plan("autoencoder", resolved("autoencoder", train__batch_size=n))["flops"] for n in (1, 4))
    assert four["per_step"] == 4 * one["per_step"]
    assert 2.5 < one["per_step"] / one["forward_per_image"] < 3.0
    critic = plan("autoencoder", resolved("autoencoder", train__batch_size=1, loss__disc_weight=1.0))["flops"]
    with torch.device("meta"):
        net, x = PatchDiscriminator(3, 64, 3).eval(), torch.zeros(1, 3, 64, 64)
    work = cost.measure_cost(net, lambda: net(x))
    # one reconstruction without gradients; the critic once for the generator (no weight gradients), twice for itself
    more = one["forward_per_image"] + 2 * work.forward_flops + 2 * work.training_flops
    assert critic["per_step"] - one["per_step"] == more


def test_memory_is_the_sum_of_its_parts_and_follows_the_micro_batch():
    whole = plan("autoencoder", resolved("autoencoder", train__batch_size=8))["memory"]
    micro = plan("autoencoder", resolved("autoencoder", train__batch_size=8, train__micro_batch=2))["memory"]
    names = ("weights", "gradients", "optimizer", "ema", "activations", "runtime")
    assert whole["total"] == sum(whole[name] for name in names)
    assert whole["activations"] == 4 * micro["activations"] and whole["weights"] == micro["weights"]


def test_optimiser_state_is_counted_as_the_optimiser_keeps_it():
    from ldmcli.training.optimizer import PhaseOptimizer

    for values in (
        {"train__optimizer": "adamw"},
        {"train__optimizer": "muon", "train__muon_every": 1},
        {"train__optimizer": "muon", "train__muon_every": 2},
    ):
        given = resolved("autoencoder", autoencoder__channels=8, **values)
        module = Autoencoder(given.config.autoencoder)
        optimizer = PhaseOptimizer(module.named_parameters(), given.config.train)
        for p in module.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step(1.0)
        kept = sum(t.numel() * 4 for name, t in optimizer.state_dict().items() if t.ndim)
        assert plan("autoencoder", given)["memory"]["optimizer"] == kept, values


def test_what_does_not_fit_names_the_micro_batch_that_would(monkeypatch):
    given = resolved("autoencoder", train__batch_size=4096, train__micro_batch=4096)
    one = plan("autoencoder", given)["memory"]
    room = one["total"] - one["activations"] + 40 * one["per_image"]
    monkeypatch.setattr(cost, "available_bytes", lambda device: int(room))
    found = plan("autoencoder", given)
    assert not found["memory"]["fits"] and any("--micro-batch 32 would" in note for note in found["notes"])
    monkeypatch.setattr(cost, "available_bytes", lambda device: 1000)
    assert any("not even --micro-batch 1" in note for note in plan("autoencoder", given)["notes"])


def test_left_to_itself_the_micro_batch_is_what_fits_made_even(monkeypatch):
    given = resolved("autoencoder", train__batch_size=90)
    whole = plan("autoencoder", given)
    assert whole["batch"]["per_pass"] == 90 and not any("--micro-batch" in note for note in whole["notes"])
    memory = whole["memory"]
    fixed = memory["total"] - memory["activations"]
    room = int(fixed + 40.5 * memory["per_image"] / cost.MEMORY_SHARE)
    monkeypatch.setattr(cost, "available_bytes", lambda device: room)
    found = plan("autoencoder", given)
    assert found["batch"]["per_pass"] == 30 and found["memory"]["fits"]  # 40 would fit: 40 + 40 + 10 is as many passes
    assert any("30 of 90 images go through at a time" in note for note in found["notes"])


@pytest.mark.parametrize(
    "share, per_image, room, expected",
    [
        (8, 10, 80, 8),
        (8, 10, 79, 4),
        (8, 10, 45, 4),
        (8, 10, 39, 3),
        (7, 10, 60, 4),
        (8, 10, 9, 1),
        (8, 10, -5, 1),
        (8, 0, 0, 8),
    ],
)
def test_micro_batches(share, per_image, room, expected):
    assert cost.largest_micro_batch(share, per_image, room) == expected


def test_time_is_work_over_rate_and_bounded_by_the_minutes_given(monkeypatch):
    found = plan("autoencoder", resolved("autoencoder", train__steps=50))
    assert found["time"]["seconds"] == pytest.approx(50 * found["flops"]["per_step"] / 1e9)
    bounded = plan("autoencoder", resolved("autoencoder", train__steps=10_000, train__max_minutes=2.0))
    assert bounded["time"]["seconds"] == 120
    monkeypatch.setattr(planning, "probe_flops_per_s", lambda device, dtype: 0.0)
    assert plan("autoencoder", resolved("autoencoder"))["time"] == "unknown"


def test_every_setting_is_listed_with_its_origin():
    rows = plan("autoencoder", config.resolve("autoencoder", [("--lr", {"train.lr": 0.5})]))["settings"]
    assert [name for name, *_ in rows] == list(config.paths("autoencoder"))
    assert ["train.lr", "0.5", "--lr"] in rows


def test_text_fits_eighty_columns_and_says_what_matters():
    text = plan_text(plan("diffusion", resolved("diffusion", sample__prompts=("a" * 200,)), rows=1000))
    assert max(map(len, text.splitlines())) <= 80
    for word in ("train.lr", "parameters", "FLOP a step", "memory", "epochs      320", "time"):
        assert word in text, word


def test_presets_of_the_paper_can_be_planned():
    for name in ("kl-f8", "cin256-v2"):
        kind = config.presets()[name].kind
        found = plan(kind, config.resolve(kind, [config.preset_layer(kind, name), ("test", NOWHERE)]))
        assert found["parameters"] and found["flops"]["per_step"] > 1e12


def test_a_recipe_without_a_named_autoencoder_is_planned_with_the_one_it_was_published_with(tmp_path, monkeypatch):
    import tiny

    monkeypatch.chdir(tmp_path)  # away from the runs of whoever runs the tests, which would be taken
    ending = tiny.ldm("train-ldm", "--recipe", "ldm8-imagenet", "--data", "/no/such/folder", "--plan", "--json")
    assert ending.code == 0, ending.stderr
    assert ending.json["latent"] == [4, 32, 32]
    assert any("vq-f8, with which" in note for note in ending.json["notes"])
