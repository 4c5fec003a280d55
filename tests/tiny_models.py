"""Small first stages and diffusion models of every condition and task, and fake CUDA tensors, for tests of devices."""

import contextlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ldmcli.conditions import CONDITIONS
from ldmcli.core.settings import (
    AutoencoderConfig,
    AutoencoderSettings,
    ConditionSettings,
    DiffusionConfig,
    DiffusionSettings,
    SampleSettings,
    TaskSettings,
)
from ldmcli.diffusion.schedule import make_schedule, sample_timesteps
from ldmcli.maths import rng
from ldmcli.networks.autoencoder import Autoencoder
from ldmcli.networks.conditioners import CONDITIONERS, train_vocabulary
from ldmcli.networks.latent_diffusion import DiffusionModel
from ldmcli.networks.latent_scale import LatentScale
from ldmcli.sampling.api import LoadedDiffusion
from ldmcli.sampling.first_stage import LoadedAutoencoder, pixel_autoencoder
from ldmcli.training.diffusion import DiffusionObjective
from ldmcli.training.latents import LatentStore

ASKED = [name for name, one in CONDITIONS.items() if one.user_given]

CPU = torch.device("cpu")
SIDE, F = 16, 4
STAGES = {
    "kl": AutoencoderSettings(f=F, channels=8, num_res_blocks=1, embed_dim=3, z_channels=3),
    "vq": AutoencoderSettings(f=F, channels=8, num_res_blocks=1, embed_dim=3, z_channels=3, reg="vq", codebook_size=16),
    "paper": AutoencoderSettings(
        f=F,
        family="paper",
        channels=8,
        channel_mult=(1, 1, 2),
        num_res_blocks=1,
        groups=4,
        attn_resolutions=(64,),
        reg="vq",
        codebook_size=16,
        embed_dim=3,
        z_channels=3,
    ),
    "none": None,
}
UNET = DiffusionSettings(
    channels=16,
    channel_mult=(1,),
    num_res_blocks=1,
    attention_resolutions=(1,),
    head_channels=8,
    groups=4,
    timesteps=50,
)
TOLD = {"context_dim": 16, "text_heads": 2, "text_head_channels": 8}
TASKS = {
    "generate": TaskSettings(),
    "sr": TaskSettings(name="sr", scale=2),
    **{f"inpaint, {fill}": TaskSettings(name="inpaint", fill=fill) for fill in ("black", "smooth", "patches")},
}
COMBINED = ("", *ASKED, "class+text", "class+text+layout+map")
LAYOUT = {"bbox": np.array([[0.1, 0.2, 0.5, 0.4]]), "category": ["star"]}
PIXELS = np.random.default_rng(0).integers(0, 256, (2, SIDE, SIDE, 3), dtype=np.uint8)
HOLES = np.zeros((2, SIDE, SIDE), bool)
HOLES[:, 5:11, 4:12] = True
VALUES = {
    "class": [0, 1],
    "text": ["a red star", "two"],
    "layout": [LAYOUT, {"bbox": np.zeros((0, 4)), "category": []}],
    "map": [np.full((SIDE, SIDE), k, np.uint8) for k in range(2)],
    "lowres": [pixels[::2, ::2] for pixels in PIXELS],
    "masked": list(zip(PIXELS, HOLES)),
    "tokens": [torch.ones(5, 16), torch.zeros(5, 16)],
}


def first_stage(name: str) -> LoadedAutoencoder:
    settings = STAGES[name]
    if settings is None:
        return pixel_autoencoder()
    torch.manual_seed(0)
    network = Autoencoder(settings).eval().requires_grad_(False)
    scale = LatentScale((0.1,) * network.latent_channels, (1.5,) * network.latent_channels)
    return LoadedAutoencoder(network, scale, "x", AutoencoderConfig(autoencoder=settings))


def tiny_model(
    stage: str, words=None, kinds=(), task: str = "generate", text_encoder: str = "joint", **diffusion
) -> LoadedDiffusion:
    config = DiffusionConfig(
        diffusion=replace(UNET, **diffusion),
        task=TASKS[task],
        condition=ConditionSettings(kinds=tuple(kinds), text_encoder=text_encoder, **TOLD),
        sample=SampleSettings(steps=2, guidance=2.0, sampler="ddim"),
    )
    ae = first_stage(stage)
    latent = ae.network.latent_shape(SIDE, SIDE)
    facts = {
        "class": {"class_names": ["a", "b"]},
        "text": {"length": 8, "vocabulary": 64, "logits": True},
        "layout": {"categories": ["star"], "length": 8, "vocabulary": 8192, "planes": 4, "logits": True},
        "map": {"classes": 3, "out_channels": 3, "stages": ae.network.f.bit_length() - 1},
        "lowres": {"scale": 2, "f": ae.network.f, "latent": latent[0]},
        "masked": {"channels": latent[0], "fill": config.task.fill},
        "tokens": {},
    }
    assert facts.keys() == VALUES.keys() == CONDITIONERS.keys()
    torch.manual_seed(1)
    model = DiffusionModel(config.diffusion, config.condition, facts, words, latent, config.kinds or kinds)
    for parameter in model.parameters():  # what begins at 0 would hide what comes before it
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return LoadedDiffusion(model, ae, config, "")


def moved(model: LoadedDiffusion, device: torch.device) -> None:
    """Brings a model to a device, as `load` does."""
    model.network.to(device), model.autoencoder.network.to(device)
    model.autoencoder.place = device


def objective_of(model: LoadedDiffusion, device: torch.device) -> DiffusionObjective:
    """What trains the model on a device."""
    objective = object.__new__(DiffusionObjective)
    objective.config, objective.dist = model.config, SimpleNamespace(device=device)
    objective.latents = LatentStore(model.autoencoder, model.config.data, objective.dist, PIXELS.shape[1:3])
    objective.latents.scale = model.autoencoder.scale
    objective.encode, objective.model = model.autoencoder.encode_unchecked, model.network
    objective.schedule = make_schedule(model.config.diffusion)
    return objective


def batch_of(model: LoadedDiffusion) -> dict[str, torch.Tensor]:
    """A micro-batch of two rows on the CPU, as `DiffusionObjective.batch` makes it; the second drops its conditions."""
    settings, shape = model.config.diffusion, model.network.latent_shape
    batch = {
        "row": torch.arange(2),
        "noise": rng.normal(0, [0, 1], shape, "noise"),
        "pixels": torch.from_numpy(PIXELS),
        "t": sample_timesteps(settings, rng.uniform(0, [0, 1], "timestep"), make_schedule(settings)),
    }
    if not (model.autoencoder.network.is_vq or model.autoencoder.network.is_identity):
        batch["posterior"] = rng.normal(0, [0, 1], shape, "posterior")
    conditions = model.network.conditions
    inputs = conditions.prepare({kind: VALUES[kind] for kind in conditions.kinds}) if conditions.kinds else {}
    dropped = {kind: torch.tensor([False, True]) for kind in conditions.droppable}
    return batch | {f"condition.{name}": value for name, value in conditions.drop(inputs, dropped).items()}


def frozen_encoder(kind: str, folder: Path) -> str:
    """A folder with an encoder of text of a few thousand weights, as `transformers` keeps them, and a tokeniser."""
    import transformers

    transformers.logging.set_verbosity_error()
    train_vocabulary(["a red star", "two green circles"], 64, folder)
    size = {"vocab_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    if kind == "t5":
        settings = transformers.T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        encoder = transformers.T5Model(settings)
    else:
        size |= {"hidden_size": 16, "intermediate_size": 32, "max_position_embeddings": 16}
        ends = {"bos_token_id": 2, "eos_token_id": 3}
        encoder = {
            "clip": lambda: transformers.CLIPTextModel(transformers.CLIPTextConfig(**size, **ends)),
            "bert": lambda: transformers.BertModel(transformers.BertConfig(**size)),
        }[kind]()
    encoder.save_pretrained(folder)
    return str(folder)


@contextlib.contextmanager
def bf16_of_cuda():
    """Fake CUDA tensors, with bfloat16 where CUDA's autocast has it (without a GPU `torch.autocast` is off)."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        torch.set_autocast_enabled("cuda", True), torch.set_autocast_dtype("cuda", torch.bfloat16)
        try:
            yield torch.device("cuda")
        finally:
            torch.set_autocast_enabled("cuda", False), torch.clear_autocast_cache()
