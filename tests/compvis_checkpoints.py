"""Checkpoints as the original implementation writes them, with its configuration beside them: random and tiny."""

from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file

from ldmcli.formats import compvis_config, compvis_yaml
from ldmcli.networks.autoencoder import Autoencoder
from ldmcli.networks.latent_diffusion import DiffusionModel

MODULES = "ldm.modules.encoders.modules."


def target(name: str, **params) -> dict:
    """A node of a configuration: the class and its arguments."""
    return {"target": name, "params": params}


STAGE = target(
    "ldm.models.autoencoder.AutoencoderKL",
    embed_dim=3,
    ddconfig=dict(
        double_z=True,
        z_channels=3,
        resolution=32,
        in_channels=3,
        out_ch=3,
        ch=32,
        ch_mult=[1, 1, 1],
        num_res_blocks=1,
        attn_resolutions=[],
        dropout=0.0,
    ),
)
VQ = target(
    "ldm.models.autoencoder.VQModelInterface",
    embed_dim=3,
    n_embed=16,
    ddconfig=STAGE["params"]["ddconfig"] | {"double_z": False},
)
# the channels that the UNet takes, the width of its context, the conditioner
KINDS = {
    "unconditional": (3, None, "__is_unconditional__"),
    "class": (3, 16, target(MODULES + "ClassEmbedder", embed_dim=16, n_classes=5)),
    "text": (3, 16, target(MODULES + "BERTEmbedder", n_embed=16, n_layer=1, vocab_size=40, max_seq_len=8)),
    "layout": (
        3,
        16,
        target(MODULES + "BERTEmbedder", n_embed=16, n_layer=1, vocab_size=8192, max_seq_len=92, use_tokenizer=False),
    ),
    "map": (6, None, target(MODULES + "SpatialRescaler", n_stages=2, in_channels=4, out_channels=3)),
    "sr": (6, None, target("torch.nn.Identity")),
    "inpaint": (7, None, "__is_first_stage__"),
}


def document(kind: str, stage: dict = STAGE) -> dict:
    """The configuration of a model of that kind."""
    channels, width, conditioner = KINDS[kind]
    unet = dict(
        image_size=8,
        in_channels=channels,
        out_channels=3,
        model_channels=32,
        attention_resolutions=[2],
        num_res_blocks=1,
        channel_mult=[1, 1],
        num_heads=1,
    )
    if width:
        unet |= dict(use_spatial_transformer=True, context_dim=width, transformer_depth=1)
    return {
        "model": target(
            "ldm.models.diffusion.ddpm.LatentDiffusion",
            linear_start=0.0015,
            linear_end=0.0195,
            image_size=8,
            channels=3,
            unet_config=target("ldm.modules.diffusionmodules.openaimodel.UNetModel", **unet),
            first_stage_config=stage,
            cond_stage_config=conditioner,
        )
    }


def random_checkpoint(folder: Path, kind: str, suffix: str = ".ckpt", stage: dict = STAGE) -> Path:
    """A checkpoint of a random tiny model of that kind with its YAML beside it."""
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    path, made = folder / f"model{suffix}", document(kind, stage)
    plan = compvis_config.plan(compvis_yaml.Section(path, "", made))
    _, facts = compvis_config.task_of(plan)
    model = DiffusionModel(plan.diffusion, compvis_config.condition_of(plan), facts, None, plan.latent_shape, facts)
    first = Autoencoder(plan.first_stage.settings).state_dict()
    held = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("unet."):
            held["model.diffusion_model." + name[5:]] = tensor
        else:
            own = name.split(".", 3)[-1] if kind == "class" else name.split(".", 4)[-1]
            held["cond_stage_model." + own] = tensor
    held |= {f"first_stage_model.{name}": tensor for name, tensor in first.items()}
    if kind == "inpaint":
        held |= {f"cond_stage_model.{name}": tensor.clone() for name, tensor in first.items()}
    torch.save({"state_dict": held, "epoch": 1}, path) if suffix == ".ckpt" else save_file(held, path)
    path.with_suffix(".yaml").write_text(yaml.safe_dump(made))
    return path
