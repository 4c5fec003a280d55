"""Presets build what was published, to the last tensor, and can be read without torch."""

import gzip
import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from golden_cases import ClassEmbedder, shared

from ldmcli.conditions.fit import assumed_specs
from ldmcli.core.config import resolve
from ldmcli.core.presets import FIRST_STAGES, MODELS, PRESETS, Preset
from ldmcli.core.settings import AutoencoderConfig, AutoencoderSettings, DiffusionConfig, DiffusionSettings
from ldmcli.networks.autoencoder import Autoencoder
from ldmcli.networks.text_encoder import SpatialRescaler, TextTransformer
from ldmcli.networks.unet import UNet
from ldmcli.training import cost

CONFIGS = {"autoencoder": AutoencoderConfig, "diffusion": DiffusionConfig}
PUBLISHED = [name for name, preset in FIRST_STAGES.items() if "parameters" in preset.extra]
SHAPES_NAME = {"txt2img-1p4B": "txt2img-1p4B-eval"}


def section(preset: Preset, name: str) -> dict:
    return {key.split(".")[1]: value for key, value in preset.values.items() if key.split(".")[0] == name}


def first_stage(name: str) -> Autoencoder:
    with torch.device("meta"):
        return Autoencoder(AutoencoderSettings(**section(PRESETS[name], "autoencoder")))


def unet(name: str) -> UNet:
    preset = PRESETS[name]
    with torch.device("meta"):
        return UNet(
            DiffusionSettings(**section(preset, "diffusion")),
            preset.extra["in_channels"],
            preset.extra["out_channels"],
            context_dim=preset.extra["context_dim"],
        )


def conditioner(facts: dict) -> torch.nn.Module:
    with torch.device("meta"):
        if facts["kind"] == "class":
            return ClassEmbedder(facts["classes"], facts["width"])
        if facts["kind"] == "map":
            return SpatialRescaler(facts["in_channels"], facts["out_channels"], facts["stages"])
        return TextTransformer(facts["vocabulary"], facts["width"], facts["layers"], facts["length"], logits_head=True)


def counts(module: torch.nn.Module) -> tuple[int, int]:
    state = module.state_dict()
    return sum(value.numel() for value in state.values()), len(state)


def shapes(group: str, name: str) -> dict[str, list[int]]:
    with gzip.open(shared("state_dict_shapes.json.gz")) as file:
        return json.load(file)[group][SHAPES_NAME.get(name, name)]


def own_shapes(module: torch.nn.Module) -> dict[str, list[int]]:
    return {key: list(value.shape) for key, value in module.state_dict().items()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_first_stage_has_the_published_counts(name):
    extra = PRESETS[name].extra
    assert counts(first_stage(name)) == (extra["parameters"], extra["tensors"])


@pytest.mark.parametrize("name", PUBLISHED)
def test_first_stage_has_the_published_keys_and_shapes(name):
    assert own_shapes(first_stage(name)) == shapes("first_stage", name)


@pytest.mark.parametrize("name", MODELS)
def test_unet_has_the_published_counts(name):
    extra = PRESETS[name].extra
    assert counts(unet(name)) == (extra["parameters"], extra["tensors"])


@pytest.mark.parametrize("name", MODELS)
def test_unet_has_the_published_keys_and_shapes(name):
    assert own_shapes(unet(name)) == shapes("unet", name)


@pytest.mark.parametrize("name", [name for name in MODELS if MODELS[name].extra["conditioner"]])
def test_conditioner_has_the_published_counts(name):
    facts = PRESETS[name].extra["conditioner"]
    assert counts(conditioner(facts)) == (facts["parameters"], facts["tensors"])


@pytest.mark.parametrize("name", [name for name in MODELS if MODELS[name].extra["conditioner"]])
def test_conditioner_has_the_published_keys_and_shapes(name):
    assert own_shapes(conditioner(PRESETS[name].extra["conditioner"])) == shapes("cond_stage", name)


@pytest.mark.parametrize("name", MODELS)
def test_latent_and_factor_of_a_model_fit_its_first_stage(name):
    extra = PRESETS[name].extra
    stage = section(PRESETS[extra["first_stage"]], "autoencoder")
    height, width = PRESETS[name].values["data.size"]
    assert extra["latent"] == (stage["embed_dim"], height // stage["f"], width // stage["f"])


@pytest.mark.parametrize("name", MODELS)
def test_a_conditioner_speaks_the_width_that_the_unet_reads(name):
    facts, values = PRESETS[name].extra["conditioner"], PRESETS[name].values
    if facts is None:
        assert "condition.kinds" not in values
    else:
        assert values["condition.kinds"] == (facts["kind"],)
        assert facts.get("width") == PRESETS[name].extra["context_dim"] == values.get("condition.context_dim")


@pytest.mark.parametrize("name", PRESETS)
def test_every_value_is_a_setting_of_its_kind_and_of_the_default_type(name):
    preset = PRESETS[name]
    defaults = CONFIGS[preset.kind]()
    for part in {key.split(".")[0] for key in preset.values}:
        default, values = getattr(defaults, part), section(preset, part)
        made = replace(default, **values)
        for key, value in values.items():
            assert type(value) is type(getattr(default, key)), key
            assert getattr(made, key) == value
    assert 0 < len(preset.summary) < 110 and "\n" not in preset.summary


@pytest.mark.parametrize("name", FIRST_STAGES)
def test_learning_rate_of_a_first_stage_is_the_base_rate_times_the_batch(name):
    values = PRESETS[name].values
    assert values["train.lr"] == pytest.approx(4.5e-6 * values["train.batch_size"])


PINNED = {
    "autoencoder": (
        "autoencoder.family",
        "autoencoder.legacy_beta",
        "loss.style",
        "loss.l1",
        "loss.l2",
        "loss.edge",
        "loss.perceptual_weight",
        "loss.kl_weight",
        "loss.codebook_weight",
        "loss.gan",
        "loss.disc_weight",
        "loss.disc_start",
        "loss.adaptive_weight",
    ),
    "diffusion": (
        "diffusion.prediction",
        "diffusion.schedule",
        "diffusion.beta_start",
        "diffusion.beta_end",
        "diffusion.t_sampling",
        "diffusion.loss",
        "diffusion.loss_weight",
        "diffusion.latent_scale",
        "diffusion.position",
        "diffusion.scale_shift",
        "condition.text_pooled",
        "condition.class_vector",
        "train.ema_scope",
        "sample.sampler",
        "sample.steps",
        "sample.eta",
        "sample.spacing",
    ),
}
PINNED_TRAINING = ("optimizer", "lr", "betas", "weight_decay", "warmup", "cooldown", "clip", "ema")


@pytest.mark.parametrize("name", [*FIRST_STAGES, *MODELS, "paper", "paper-ae"])
def test_the_papers_way_leaves_nothing_of_the_objective_to_our_defaults(name):
    preset = PRESETS[name]
    wanted = {*PINNED[preset.kind], *(f"train.{key}" for key in PINNED_TRAINING)}
    assert wanted - set(preset.values) == set()
    if preset.kind == "autoencoder":
        assert preset.values["loss.l2"] == preset.values["loss.edge"] == 0.0
    assert preset.values["train.optimizer"] == "adamw" and preset.values["train.cooldown"] == 0.0


def test_models_whose_head_width_was_ignored_in_training_have_one_head():
    heads = {name: PRESETS[name].values["diffusion.num_heads"] for name in MODELS}
    one = {name for name, count in heads.items() if count == 1}
    assert one == {"cin256", "cin256-v2", "text2img256", "layout2img-openimages256"}
    assert heads["txt2img-1p4B"] == heads["lsun_churches256"] == heads["inpainting_big"] == 8


def test_every_first_stage_of_the_papers_table_8_is_there():
    got = {
        (v["f"], v["codebook_size"] if v["reg"] == "vq" else "kl", v["embed_dim"], v["mid_attention"])
        for v in (section(preset, "autoencoder") for preset in FIRST_STAGES.values())
    }
    assert got == {
        (32, 16384, 16, True),
        (16, 16384, 8, True),
        (8, 16384, 4, True),
        (8, 256, 4, True),
        (4, 8192, 3, True),
        (4, 8192, 3, False),
        (4, 256, 3, True),
        (2, 2048, 2, True),
        (2, 64, 2, True),
        (32, "kl", 64, True),
        (32, "kl", 16, True),
        (16, "kl", 16, True),
        (16, "kl", 8, True),
        (8, "kl", 4, True),
        (4, "kl", 3, True),
        (2, "kl", 2, True),
    }


def test_reading_presets_loads_neither_torch_nor_numpy():
    code = "import sys, ldmcli.core.presets; sys.exit(any(name in sys.modules for name in ('torch', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


OWN_SIZES = {  # (parameters with a text transformer, those of the UNet alone), of the latents of 64 and 256 px
    "small": (8_944_388, 7_458_180),
    "base": (73_598_992, 67_145_488),
    "large": (394_980_464, 311_857_520),
}


@pytest.mark.parametrize("name", OWN_SIZES)
def test_sizes_of_our_own_recipe_are_counted(name):
    """And what is small is what `ldm train-ldm` takes without a preset."""
    preset, texts = PRESETS[name], {"condition.kinds": ("text",)}
    config = resolve("diffusion", [(name, dict(preset.values)), ("test", texts)]).config
    first = dict(PRESETS[preset.extra.get("first_stage", "small-ae")].values)
    stage_config = resolve("autoencoder", [("test", first)]).config
    stage = cost.meta_autoencoder(stage_config.autoencoder)
    latent = stage.latent_shape(*(stage_config.data.size if any(stage_config.data.size) else (64, 64)))
    model = cost.meta_diffusion_model(config, assumed_specs(config, stage, {}), latent)
    total, conditions = counts(model)[0], counts(model.conditions)[0]
    assert (total, total - conditions) == OWN_SIZES[name]
    named = int(re.search(r"UNet of (\d+) million", preset.summary)[1])
    assert round((total - conditions) / 1e6) == named
    assert name != "small" or config.diffusion == DiffusionSettings()


def test_the_first_stage_of_the_larger_sizes_is_counted():
    assert counts(first_stage("base-ae"))[0] == 14_902_608
