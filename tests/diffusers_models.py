"""Tiny models to be written as folders of diffusers, and the networks that such folders say."""

from dataclasses import replace
from pathlib import Path

import torch
from golden_cases import randomised

from ldmcli.core.settings import (
    AutoencoderConfig,
    AutoencoderSettings,
    ConditionSettings,
    DiffusionConfig,
    DiffusionSettings,
    SampleSettings,
    TaskSettings,
)
from ldmcli.diffusion.samplers import SAMPLERS
from ldmcli.diffusion.schedule import make_schedule, sampling_levels, to_x0_eps
from ldmcli.formats.bundle import AutoencoderBundle, DiffusionBundle
from ldmcli.networks.autoencoder import Autoencoder
from ldmcli.networks.conditioners import Conditioning, load_tokenizer, train_vocabulary
from ldmcli.networks.latent_diffusion import DiffusionModel
from ldmcli.networks.latent_scale import LatentScale


def stage_of(bundle: AutoencoderBundle) -> Autoencoder:
    network = Autoencoder(bundle.config.autoencoder)
    network.load_state_dict(bundle.tensors)
    return network.eval().requires_grad_(False)


def model_of(bundle: DiffusionBundle) -> DiffusionModel:
    tokenizer = load_tokenizer(bundle.tokenizer) if bundle.tokenizer else None
    model = DiffusionModel(
        bundle.config.diffusion,
        bundle.config.condition,
        bundle.specs,
        tokenizer,
        bundle.latent_shape,
        bundle.config.kinds,
    )
    model.load_state_dict(bundle.tensors)
    return model.eval().requires_grad_(False)


def trajectory(model: DiffusionModel, bundle: DiffusionBundle, z, told=None, null=None, scale=1.0, **sample):
    """States of a sampler, the start included, in z coordinates."""
    schedule = make_schedule(bundle.config.diffusion)
    chosen = replace(bundle.config.sample, **sample)
    levels = sampling_levels(schedule, chosen.steps, chosen.spacing)
    states, told = [z], told or Conditioning()

    def denoise(z, t, alpha, sigma):
        times = torch.full((len(z),), t)
        out = model.predict(z, times, told)
        if null is not None:
            without = model.predict(z, times, null)
            out = without + scale * (out - without)
        return to_x0_eps(schedule.prediction, out, z, alpha, sigma)

    SAMPLERS[chosen.sampler].function(denoise, z, levels, eta=0.0, callback=lambda i, z, x0: states.append(z))
    return torch.stack(states), levels


def small_stage(**settings) -> AutoencoderBundle:
    values = {
        "family": "paper",
        "f": 2,
        "channels": 8,
        "channel_mult": (1, 2),
        "num_res_blocks": 1,
        "z_channels": 3,
        "embed_dim": 3,
        "groups": 4,
        "resolution": 16,
        "codebook_size": 32,
        **settings,
    }
    config = AutoencoderConfig(autoencoder=AutoencoderSettings(**values))
    torch.manual_seed(0)
    network = randomised(Autoencoder(config.autoencoder), 1, 0.2)
    return AutoencoderBundle(config, network.state_dict(), None)


def small_model(
    kinds=(),
    stage=None,
    scale=None,
    facts=None,
    diffusion=None,
    condition=None,
    task=None,
    side=8,
    tokenizer=None,
    sample=None,
) -> DiffusionBundle:
    """A random model of a few thousand weights."""
    stage = small_stage() if stage is None else stage
    process = {
        "channels": 16,
        "channel_mult": (1, 1.5),
        "num_res_blocks": 1,
        "attention_resolutions": (2,),
        "head_channels": 8,
        "groups": 8,
        "position": "none",
        "prediction": "eps",
        "t_sampling": "uniform",
        "scale_shift": False,
        "spatial_transformer": "text" in kinds or "class" in kinds,
        **(diffusion or {}),
    }
    told = {
        "context_dim": 16,
        "text_pooled": False,
        "class_vector": False,
        "text_heads": 2,
        "text_head_channels": 8,
        **(condition or {}),
    }
    config = DiffusionConfig(
        diffusion=DiffusionSettings(**process),
        condition=ConditionSettings(kinds=kinds, **told),
        task=TaskSettings(**(task or {})),
        sample=SampleSettings(
            **{"sampler": "ddim", "steps": 4, "guidance": 1.0, "spacing": "original", **(sample or {})}
        ),
    )
    torch.manual_seed(0)
    channels = stage.config.autoencoder.embed_dim
    model = DiffusionModel(
        config.diffusion,
        config.condition,
        facts or {},
        tokenizer and load_tokenizer(tokenizer),
        (channels, side, side),
        config.kinds,
    )
    randomised(model, 2, 0.1)
    return DiffusionBundle(
        config,
        model.state_dict(),
        stage,
        scale or LatentScale.identity(channels),
        (channels, side, side),
        facts or {},
        tokenizer,
    )


def vocabulary(folder: Path) -> Path:
    train_vocabulary(["a red circle", "a blue square on white"], 100, folder)
    return folder


def text_model(tmp_path, length=77, **more) -> DiffusionBundle:
    folder = vocabulary(tmp_path / "vocabulary")
    facts = {"text": {"length": length, "vocabulary": len(load_tokenizer(folder))}}
    return small_model(("text",), facts=facts, tokenizer=folder, **more)


UNEVEN = LatentScale((0.3, -0.2, 1.0), (0.5, 2.0, 1.5))
SHIFTED = LatentScale((0.3, -0.2, 1.0), (0.5, 0.5, 0.5))
SINGLE = LatentScale((0.0,) * 3, (1 / 0.18215,) * 3)

CUSTOM = {
    "flow": dict(diffusion={"prediction": "flow", "position": "learned", "patch": 2}),
    "fast": dict(stage=dict(family="fast", f=4)),
    "heads": dict(diffusion={"num_heads": 2, "attention_resolutions": (1, 2)}),
    "class": dict(kinds=("class",), facts={"class": {"class_names": ["a", "b"]}}),
    "map": dict(kinds=("map",), facts={"map": {"classes": 4, "out_channels": 3, "stages": 1}}),
    "inpaint": dict(task={"name": "inpaint"}, facts={"masked": {"channels": 3}}),
    "patches": dict(task={"name": "inpaint", "fill": "patches"}, facts={"masked": {"channels": 3, "fill": "patches"}}),
    "sqrt": dict(diffusion={"schedule": "sqrt"}),
}


def custom_model(name: str) -> DiffusionBundle:
    values = dict(CUSTOM[name])
    stage = small_stage(**values.pop("stage", {}))
    return small_model(values.pop("kinds", ()), stage=stage, **values)
