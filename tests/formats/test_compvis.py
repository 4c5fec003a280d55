"""Published checkpoints: what configurations and shapes say, which names they have, and the way back."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compvis_checkpoints import MODULES, target
from golden_cases import decided, shared
from safetensors.torch import load_file, save_file
from tiny import ldm, same, state, weights

import ldmcli
from ldmcli.core.errors import ModelError
from ldmcli.core.presets import MODELS
from ldmcli.core.settings import FILLS, DiffusionSettings
from ldmcli.formats import compvis, compvis_config, compvis_shapes, compvis_yaml
from ldmcli.formats.bundle import Reading
from ldmcli.formats.compvis_write import KEPT, folded
from ldmcli.networks.autoencoder import Autoencoder, split_moments
from ldmcli.networks.latent_diffusion import DiffusionModel
from ldmcli.networks.latent_scale import LatentScale

# config.yaml of the published models, in short: unet, first stage, conditioner, betas, and the heads of the last level
VQ4 = ("vq", 3, 3, 8192, [1, 2, 4], [], "vanilla")
STAGES = {
    "kl-f4": ("kl", 3, 3, 0, [1, 2, 4], [], "vanilla"),
    "kl-f8": ("kl", 4, 4, 0, [1, 2, 4, 4], [], "vanilla"),
    "kl-f16": ("kl", 16, 16, 0, [1, 1, 2, 2, 4], [16], "vanilla"),
    "kl-f32": ("kl", 64, 64, 0, [1, 1, 2, 2, 4, 4], [16, 8], "vanilla"),
    "vq-f4": VQ4,
    "vq-f4-noattn": ("vq", 3, 3, 8192, [1, 2, 4], [], "none"),
    "vq-f8": ("vq", 4, 4, 16384, [1, 2, 2, 4], [32], "vanilla"),
    "vq-f8-n256": ("vq", 4, 4, 256, [1, 2, 2, 4], [32], "vanilla"),
    "vq-f16": ("vq", 8, 8, 16384, [1, 1, 2, 2, 4], [16], "vanilla"),
}


def stage_document(name: str) -> dict:
    reg, z, embed, codes, mult, attention, kind = STAGES[name]
    network = dict(
        double_z=reg == "kl",
        z_channels=z,
        resolution=256,
        in_channels=3,
        out_ch=3,
        ch=128,
        ch_mult=mult,
        num_res_blocks=2,
        attn_resolutions=attention,
        dropout=0.0,
        attn_type=kind,
    )
    if reg == "kl":
        return target("ldm.models.autoencoder.AutoencoderKL", embed_dim=embed, ddconfig=network)
    return target("ldm.models.autoencoder.VQModelInterface", embed_dim=embed, n_embed=codes, ddconfig=network)


UNCONDITIONAL = dict(
    image_size=64,
    in_channels=3,
    out_channels=3,
    model_channels=224,
    attention_resolutions=[8, 4, 2],
    channel_mult=[1, 2, 3, 4],
    num_head_channels=32,
)
TOKENS = dict(use_spatial_transformer=True, transformer_depth=1)
BERT = dict(n_layer=32)
# name → unet, first stage, conditioner, process, heads of each level that attends
PUBLISHED = {
    "celeba256": (UNCONDITIONAL, "vq-f4", "__is_unconditional__", {}, (14, 21, 28)),
    "ffhq256": (UNCONDITIONAL, "vq-f4", "__is_unconditional__", {}, (14, 21, 28)),
    "lsun_beds256": (UNCONDITIONAL, "vq-f4", "__is_unconditional__", {}, (14, 21, 28)),
    "lsun_churches256": (
        dict(
            image_size=32,
            in_channels=4,
            out_channels=4,
            model_channels=192,
            attention_resolutions=[1, 2, 4, 8],
            channel_mult=[1, 2, 2, 4, 4],
            num_heads=8,
            use_scale_shift_norm=True,
            resblock_updown=True,
        ),
        "kl-f8",
        "__is_unconditional__",
        dict(linear_end=0.0155, scale_by_std=True, loss_type="l1"),
        (8, 8, 8, 8),
    ),
    "cin256": (
        dict(
            image_size=32,
            in_channels=4,
            out_channels=4,
            model_channels=256,
            attention_resolutions=[4, 2, 1],
            channel_mult=[1, 2, 4],
            num_head_channels=32,
            context_dim=512,
            **TOKENS,
        ),
        "vq-f8",
        target(MODULES + "ClassEmbedder", embed_dim=512, key="class_label"),
        {},
        (1, 1, 1),
    ),
    "cin256-v2": (
        dict(
            image_size=64,
            in_channels=3,
            out_channels=3,
            model_channels=192,
            attention_resolutions=[8, 4, 2],
            channel_mult=[1, 2, 3, 5],
            num_heads=1,
            context_dim=512,
            **TOKENS,
        ),
        "vq-f4",
        target(MODULES + "ClassEmbedder", embed_dim=512, n_classes=1001, key="class_label"),
        {},
        (1, 1, 1),
    ),
    "text2img256": (
        dict(
            image_size=64,
            in_channels=3,
            out_channels=3,
            model_channels=192,
            attention_resolutions=[8, 4, 2],
            channel_mult=[1, 2, 3, 5],
            num_head_channels=32,
            context_dim=640,
            **TOKENS,
        ),
        "vq-f4",
        target(MODULES + "BERTEmbedder", n_embed=640, **BERT),
        {},
        (1, 1, 1),
    ),
    "txt2img-1p4B-eval": (
        dict(
            image_size=32,
            in_channels=4,
            out_channels=4,
            model_channels=320,
            attention_resolutions=[4, 2, 1],
            channel_mult=[1, 2, 4, 4],
            num_heads=8,
            context_dim=1280,
            legacy=False,
            use_checkpoint=True,
            **TOKENS,
        ),
        "kl-f8",
        target(MODULES + "BERTEmbedder", n_embed=1280, **BERT),
        dict(linear_start=0.00085, linear_end=0.012, scale_factor=0.18215),
        (8, 8, 8),
    ),
    "layout2img-openimages256": (
        dict(
            image_size=64,
            in_channels=3,
            out_channels=3,
            model_channels=128,
            attention_resolutions=[8, 4, 2],
            channel_mult=[1, 2, 3, 4],
            num_head_channels=32,
            context_dim=512,
            **TOKENS | {"transformer_depth": 3},
        ),
        "vq-f4",
        target(MODULES + "BERTEmbedder", n_embed=512, n_layer=16, vocab_size=8192, max_seq_len=92, use_tokenizer=False),
        dict(linear_end=0.0205, loss_type="l1"),
        (1, 1, 1),
    ),
    "semantic_synthesis256": (
        dict(
            image_size=64,
            in_channels=6,
            out_channels=3,
            model_channels=128,
            attention_resolutions=[32, 16, 8],
            channel_mult=[1, 4, 8],
            num_heads=8,
        ),
        "vq-f4",
        target(MODULES + "SpatialRescaler", n_stages=2, in_channels=182, out_channels=3),
        dict(linear_end=0.0205, loss_type="l1"),
        (8,),
    ),
    "semantic_synthesis512": (
        dict(
            image_size=128,
            in_channels=6,
            out_channels=3,
            model_channels=128,
            attention_resolutions=[32, 16, 8],
            channel_mult=[1, 4, 8],
            num_heads=8,
        ),
        "vq-f4",
        target(MODULES + "SpatialRescaler", n_stages=2, in_channels=182, out_channels=3),
        dict(linear_end=0.0205, loss_type="l1"),
        (8,),
    ),
    "bsr_sr": (
        dict(
            image_size=64,
            in_channels=6,
            out_channels=3,
            model_channels=160,
            attention_resolutions=[16, 8],
            channel_mult=[1, 2, 2, 4],
            num_head_channels=32,
        ),
        "vq-f4",
        target("torch.nn.Identity"),
        dict(linear_end=0.0155),
        (20,),
    ),
    "inpainting_big": (
        dict(
            image_size=64,
            in_channels=7,
            out_channels=3,
            model_channels=256,
            attention_resolutions=[8, 4, 2],
            channel_mult=[1, 2, 3, 4],
            num_heads=8,
            resblock_updown=True,
        ),
        "vq-f4-noattn",
        "__is_first_stage__",
        dict(linear_end=0.0205, loss_type="l1"),
        (8, 8, 8),
    ),
}


def document(name: str, **changes) -> dict:
    unet, stage, conditioner, process, _ = PUBLISHED[name]
    unet = dict(num_res_blocks=2, **unet) | changes
    key = "crossattn" if unet.get("use_spatial_transformer") else None
    return {
        "model": target(
            "ldm.models.diffusion.ddpm.LatentDiffusion",
            linear_start=0.0015,
            linear_end=0.0195,
            timesteps=1000,
            image_size=unet["image_size"],
            channels=unet["out_channels"],
            first_stage_key="image",
            cond_stage_key="x",
            unet_config=target("ldm.modules.diffusionmodules.openaimodel.UNetModel", **unet),
            first_stage_config=stage_document(stage),
            cond_stage_config=conditioner,
            conditioning_key=key or (None if conditioner == "__is_unconditional__" else "concat"),
        )
        | {}
    }


def whole(name: str, **changes) -> dict:
    """The document with what the process changes."""
    made = document(name, **changes)
    made["model"]["params"] |= PUBLISHED[name][3]
    return made


def plan(name: str, heads: str = "", **changes) -> compvis_config.Plan:
    return compvis_config.plan(compvis_yaml.Section(Path("x.yaml"), "", whole(name, **changes)), heads)


def shapes(group: str, name: str) -> dict[str, tuple[int, ...]]:
    found = json.loads(gzip.decompress(shared("state_dict_shapes.json.gz").read_bytes()))
    return {key: tuple(shape) for key, shape in found[group][name].items()}


def zeros(given: dict[str, tuple[int, ...]], prefix: str) -> dict[str, torch.Tensor]:
    """Tensors of those shapes that take no memory."""
    return {prefix + name: torch.zeros(()).expand(shape) for name, shape in given.items()}


def full_state(name: str, averages: bool = True) -> dict[str, torch.Tensor]:
    """All that a published checkpoint holds."""
    unet = shapes("unet", name)
    stage = shapes("first_stage", PUBLISHED[name][1])
    made = zeros(unet, "model.diffusion_model.") | zeros(stage, "first_stage_model.")
    if isinstance(PUBLISHED[name][2], dict) and "Identity" not in PUBLISHED[name][2]["target"]:
        made |= zeros(shapes("cond_stage", name), "cond_stage_model.")
    if name == "inpainting_big":
        made |= zeros(stage, "cond_stage_model.")
    if averages:
        made |= {
            f"model_ema.diffusion_model{key.replace('.', '')}": torch.ones(()).expand(shape)
            for key, shape in unet.items()
        }
        made |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
    stray = ("lvlb_weights", "first_stage_model.loss.discriminator.main.0.weight")
    return made | {key: torch.zeros(1) for key in stray}


@pytest.mark.parametrize("name", PUBLISHED)
def test_released_models_have_these_names_and_shapes(name):
    made = plan(name)
    task, facts = compvis_config.task_of(made)
    kinds = tuple(facts)
    with torch.device("meta"):
        model = DiffusionModel(made.diffusion, compvis_config.condition_of(made), facts, None, made.latent_shape, kinds)
        first = Autoencoder(made.first_stage.settings)
    unet = {key: tuple(tensor.shape) for key, tensor in model.unet.state_dict().items()}
    assert unet == shapes("unet", name)
    assert {key: tuple(t.shape) for key, t in first.state_dict().items()} == shapes("first_stage", PUBLISHED[name][1])
    preset = MODELS[name.removesuffix("-eval").replace("512", "256")].extra
    assert (sum(t.numel() for t in model.unet.parameters()), len(unet)) == (preset["parameters"], preset["tensors"])
    told = {
        key.split(".", 3 if "class" in key else 4)[-1]: tuple(t.shape)
        for key, t in model.conditions.state_dict().items()
    }
    trained = isinstance(PUBLISHED[name][2], dict) and "Identity" not in PUBLISHED[name][2]["target"]
    wanted = shapes("cond_stage", name) if trained else {}
    assert len(told) == len(wanted) and sorted(told.values()) == sorted(wanted.values())
    count = (preset["conditioner"] or {}).get("parameters", 0)
    assert sum(torch.Size(shape).numel() for shape in told.values()) == count


@pytest.mark.parametrize("name", PUBLISHED)
def test_heads_of_released_models(name):
    from ldmcli.networks.unet import head_count, level_widths

    settings = plan(name).diffusion
    levels = [k for k in range(len(settings.channel_mult)) if 2**k in settings.attention_resolutions]
    levels = levels or [len(settings.channel_mult) - 1]
    assert tuple(head_count(level_widths(settings)[k], settings, k) for k in levels) == PUBLISHED[name][4]


def test_heads_can_be_chosen_and_are_told():
    assert "1 head, as cin256 was trained" in plan("cin256").notes[0]
    assert plan("cin256", "config").diffusion.num_heads == 0
    assert plan("cin256", "4").diffusion.num_heads == 4
    assert plan("cin256", legacy=False).diffusion.num_heads == 0 and not plan("cin256", legacy=False).notes
    smaller = plan("cin256", model_channels=64)
    assert smaller.diffusion.num_heads == 0 and "--heads legacy" in smaller.notes[0]
    assert plan("cin256", "legacy", model_channels=64).diffusion.num_heads == 1
    assert not plan("celeba256").notes and not plan("cin256-v2").notes
    with pytest.raises(ModelError, match="--heads many"):
        plan("cin256", "many")


@pytest.mark.parametrize("name", STAGES)
def test_first_stages_with_and_without_configuration(name):
    state_dict = zeros(shapes("first_stage", name), "")
    by_yaml = compvis_config.first_stage(compvis_yaml.Section(Path("x.yaml"), "", stage_document(name)))
    by_shape = compvis_shapes.first_stage(Path("x.ckpt"), state_dict, "")
    assert by_yaml == by_shape
    with torch.device("meta"):
        network = Autoencoder(by_yaml.settings)
    assert {k: tuple(t.shape) for k, t in network.state_dict().items()} == shapes("first_stage", name)


@pytest.mark.parametrize("name", PUBLISHED)
def test_released_checkpoints_are_recognised_without_a_configuration(name):
    found, wanted = compvis_shapes.plan(Path("x.ckpt"), full_state(name, averages=False), ""), plan(name)
    settings = {
        name: getattr(found.diffusion, name)
        for name in (
            "channels",
            "channel_mult",
            "scale_shift",
            "resblock_updown",
            "spatial_transformer",
            "transformer_depth",
            "beta_start",
            "beta_end",
            "num_heads",
        )
    }
    assert settings == {name: getattr(wanted.diffusion, name) for name in settings}
    assert (found.first_stage, found.in_channels, found.context_dim) == (
        wanted.first_stage,
        wanted.in_channels,
        wanted.context_dim,
    )
    assert found.conditioner.kind == wanted.conditioner.kind
    assert found.notes[0].startswith("recognised by its shapes")


@pytest.mark.parametrize("name", ("celeba256", "cin256", "inpainting_big"))
def test_a_whole_released_checkpoint_is_read(name, monkeypatch):
    state_dict = full_state(name)
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self)  # zeros that take no memory stay such
    made = plan(name)
    bundle = compvis._diffusion(Path("x.ckpt"), state_dict, made, Reading())
    assert float(bundle.tensors["unet.out.2.bias"][0]) == 1 and any("model_ema" in note for note in bundle.notes)
    raw = compvis._diffusion(Path("x.ckpt"), state_dict, made, Reading(weights="raw"))
    assert float(raw.tensors["unet.out.2.bias"][0]) == 0
    for key, message in (
        ("model.diffusion_model.extra", "1 unknown entries: model.diffusion_model.extra"),
        ("model_ema.more", "unknown"),
    ):
        with pytest.raises(ModelError, match=message):
            compvis._diffusion(Path("x.ckpt"), state_dict | {key: torch.zeros(1)}, made, Reading())
    for key in (
        "model.diffusion_model.out.2.bias",
        "model_ema.diffusion_modelout2bias",
        "first_stage_model.decoder.conv_out.bias",
    ):
        less = {name: tensor for name, tensor in state_dict.items() if name != key}
        which = "raw" if key.startswith("model.") else "ema"
        with pytest.raises(ModelError, match=r"1 weights are missing: .*bias"):
            compvis._diffusion(Path("x.ckpt"), less, made, Reading(weights=which))


def test_a_vae_of_stable_diffusion(tmp_path):
    """Only its first stage is taken, at the scale that its own network uses."""
    from ldmcli.core.settings import AutoencoderSettings

    network = Autoencoder(AutoencoderSettings(family="paper", f=2, channels=32, channel_mult=(1, 1), num_res_blocks=1))
    held = {f"first_stage_model.{name}": tensor for name, tensor in network.state_dict().items()}
    held |= {
        "model.diffusion_model.out.2.bias": torch.zeros(4),
        "betas": torch.zeros(1000),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.zeros(1, 77),
    }
    save_file(held, tmp_path / "sd.safetensors")
    ending = ldm("convert", tmp_path / "sd.safetensors", tmp_path / "vae")
    assert ending.code == 0 and "first stage only" in ending.stderr
    ae = ldmcli.load(tmp_path / "vae")
    assert ae.scale.std == (1 / 0.18215,) * 4 and same(weights(tmp_path / "vae"), network.state_dict())


def test_betas_of_another_schedule_are_refused(tmp_path):
    source = shared("golden", "unet_uncond")
    held = load_file(source / "model.safetensors") | {"betas": torch.linspace(1e-4, 0.02, 1000)}
    save_file(held, tmp_path / "x.safetensors")
    ending = ldm("convert", tmp_path / "x.safetensors", tmp_path / "out", "--config", source / "config.yaml")
    assert ending.code == 4 and "noise schedule" in ending.line


# ---------------------------------------------------------------- the way back

GOLDEN = (
    "kl_f4_attn",
    "vq_f4_noattn",
    "unet_uncond",
    "unet_class_crossattn",
    "unet_text_bert",
    "unet_concat_inpaint",
    "unet_semantic_rescaler",
    "full_checkpoint",
)


@pytest.mark.parametrize("suffix", (".ckpt", ".safetensors"))
@pytest.mark.parametrize("case", GOLDEN)
def test_round_trip(tmp_path, case, suffix):
    source = shared("golden", case, "model.ckpt" if case == "full_checkpoint" else "model.safetensors")
    assert ldm("convert", source, tmp_path / "a").code == 0
    ending = ldm("convert", tmp_path / "a", tmp_path / f"x{suffix}", "--to", "compvis")
    assert ending.code == 0, ending.stderr
    ending = ldm("convert", tmp_path / f"x{suffix}", tmp_path / "b")
    assert ending.code == 0, ending.stderr
    for part in ("", "autoencoder"):
        a, b = tmp_path / "a" / part, tmp_path / "b" / part
        if (a / "model.safetensors").exists():
            assert same(weights(a), weights(b))
            for name in ("config.toml", "stats.json"):
                assert (a / name).read_text() == (b / name).read_text()


@pytest.mark.parametrize("reg", ("kl", "vq"))
def test_folding_a_scale_changes_nothing_but_the_place(reg):
    from ldmcli.core.settings import AutoencoderSettings

    torch.manual_seed(0)
    settings = AutoencoderSettings(
        family="paper", f=2, reg=reg, channels=32, channel_mult=(1, 1), num_res_blocks=1, codebook_size=64
    )
    plain, moved = Autoencoder(settings), Autoencoder(settings)
    std = (0.5, 2.0, 3.0, 0.1) if reg == "kl" else (0.5,) * 4
    scale = LatentScale((0.1, -0.3, 0.0, 2.0), std)
    moved.load_state_dict(plain.state_dict() | folded(settings, plain.state_dict(), scale))
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        a, b = plain.moments(x), moved.moments(x)
        if reg == "kl":
            (a, a_log), (b, b_log) = split_moments(a), split_moments(b)
            assert torch.allclose(a_log - 2 * torch.tensor(std).log()[:, None, None], b_log, atol=1e-5)
        else:
            assert decided(a, plain.quantize.embedding.weight, 1e-5 * a.abs().max().item()).all()
            assert torch.equal(plain.quantize(a).indices, moved.quantize(b).indices)
        assert torch.allclose(scale.normalise(a), b, atol=1e-4)
        assert torch.allclose(plain.decode(a), moved.decode(b), atol=1e-4)


def test_a_scale_a_channel_goes_there_and_back(tmp_path):
    from ldmcli.formats import run_folder

    assert ldm("convert", shared("golden", "kl_f4_attn", "model.safetensors"), tmp_path / "ae").code == 0
    assert ldm("convert", shared("golden", "unet_uncond", "model.safetensors"), tmp_path / "ldm").code == 0
    bundle, stage = run_folder.read(tmp_path / "ldm"), run_folder.read(tmp_path / "ae")
    scale = LatentScale((0.1, -0.2, 0.3), (0.7, 1.1, 2.3))
    settings: DiffusionSettings = replace(bundle.config.diffusion, latent_scale="per_channel")
    run_folder.write(
        replace(bundle, autoencoder=stage, scale=scale, config=replace(bundle.config, diffusion=settings)),
        tmp_path / "a",
    )
    assert ldm("convert", tmp_path / "a", tmp_path / "x.safetensors", "--to", "compvis").code == 0
    held = load_file(tmp_path / "x.safetensors")
    assert len([name for name in held if name.startswith(KEPT)]) == 4
    assert ldm("convert", tmp_path / "x.safetensors", tmp_path / "b").code == 0
    assert same(weights(tmp_path / "a" / "autoencoder"), weights(tmp_path / "b" / "autoencoder"))
    assert run_folder.read(tmp_path / "b").scale == scale
    # without our own entries it is what the original would see: latents that need no scale
    theirs = {name: tensor for name, tensor in held.items() if not name.startswith(KEPT)}
    save_file(theirs, tmp_path / "y.safetensors")
    (tmp_path / "y.yaml").write_text((tmp_path / "x.yaml").read_text().partition("\nldm:")[0])
    ours, other = ldmcli.load(tmp_path / "a").autoencoder, ldmcli.load(tmp_path / "y.safetensors").autoencoder
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert other.scale == LatentScale.identity(3)
    assert torch.allclose(ours.encode(x), other.encode(x), atol=1e-4)
    assert torch.allclose(ours.decode(ours.encode(x)), other.decode(other.encode(x)), atol=1e-4)


@pytest.mark.parametrize("fill", FILLS)
def test_what_is_seen_in_holes_goes_there_and_back(tmp_path, fill):
    from ldmcli.formats import run_folder

    assert ldm("convert", shared("golden", "unet_concat_inpaint", "model.safetensors"), tmp_path / "ldm").code == 0
    bundle = run_folder.read(tmp_path / "ldm")
    config = replace(bundle.config, task=replace(bundle.config.task, fill=fill))
    run_folder.write(
        replace(bundle, config=config, specs={"masked": bundle.specs["masked"] | {"fill": fill}}), tmp_path / "a"
    )
    assert ldm("convert", tmp_path / "a", tmp_path / "x.safetensors", "--to", "compvis").code == 0
    assert ldm("convert", tmp_path / "x.safetensors", tmp_path / "b").code == 0
    back = run_folder.read(tmp_path / "b")
    assert back.config.task.fill == back.specs["masked"]["fill"] == fill


def test_runs_that_the_original_cannot_hold_are_refused(tmp_path):
    from tiny import train_ae

    train_ae(tmp_path / "ae")
    ending = ldm("convert", tmp_path / "ae", tmp_path / "x.ckpt", "--to", "compvis")
    assert ending.code == 4 and f"{tmp_path / 'ae'}: not a model" in ending.line and "family 'fast'" in ending.line
    assert not (tmp_path / "x.ckpt").exists()


def test_planes_that_the_original_does_not_know_are_refused_by_name(tmp_path):
    from ldmcli.core.settings import ConditionSettings, TaskSettings
    from ldmcli.formats import run_folder
    from ldmcli.formats.compvis_write import why_not

    assert ldm("convert", shared("golden", "unet_uncond", "model.safetensors"), tmp_path / "ldm").code == 0
    bundle = run_folder.read(tmp_path / "ldm")
    paper = ConditionSettings(kinds=("layout",), text_pooled=False)
    told = {
        "lowres": (replace(bundle.config, task=TaskSettings(name="sr")), {"scale": 4, "f": 4, "latent": 3}),
        "layout": (replace(bundle.config, condition=paper), {"categories": ["a"], "planes": 16}),
    }
    for kind, (config, facts) in told.items():
        word = {"lowres": "task.enlarged", "layout": "condition.layout_planes"}[kind]
        assert word in why_not(replace(bundle, config=config, specs={kind: facts}))
        plain = {name: value for name, value in facts.items() if name not in ("latent", "planes")}
        assert word not in why_not(replace(bundle, config=config, specs={kind: plain}))


def test_notes_are_kept_in_the_run(tmp_path):
    assert ldm("convert", shared("golden", "full_checkpoint", "model.ckpt"), tmp_path / "x").code == 0
    assert state(tmp_path / "x")["notes"] and state(tmp_path / "x")["source"]["format"] == "compvis"
