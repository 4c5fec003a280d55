"""Folders of diffusers: recorded outputs repeated, what cannot be expressed refused, ways out and back without loss."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers_models import (
    CUSTOM,
    SHIFTED,
    SINGLE,
    UNEVEN,
    custom_model,
    model_of,
    small_model,
    small_stage,
    stage_of,
    text_model,
    trajectory,
)
from golden_cases import decided, relative, shared
from safetensors.torch import load_file, save_file

from ldmcli.core.errors import LdmError, ModelError
from ldmcli.core.settings import DiffusionSettings, SampleSettings
from ldmcli.diffusion.schedule import make_schedule, sampling_levels
from ldmcli.formats import diffusers, diffusers_custom, schedulers
from ldmcli.formats import diffusers_unet as unets
from ldmcli.formats import diffusers_vae as vaes
from ldmcli.formats.bundle import AutoencoderBundle, DiffusionBundle
from ldmcli.formats.diffusers_files import read_config
from ldmcli.networks.autoencoder import kl_divergence, split_moments
from ldmcli.networks.conditioners import Conditioning
from ldmcli.networks.latent_scale import LatentScale

CLOSE = 1e-5  # of the largest value, as the cases' README has it


def case(*parts: str) -> Path:
    return shared("diffusers", *parts)


def io(name: str) -> dict[str, torch.Tensor]:
    return load_file(case(name, "io.safetensors"))


# ---------------------------------------------------------------- recorded cases


def test_kl_autoencoder_repeats_the_recording():
    bundle, want = diffusers.read(case("autoencoder_kl")), io("autoencoder_kl")
    network = stage_of(bundle)
    moments = network.moments(want["x"])
    mean, logvar = split_moments(moments)
    assert relative(moments, want["moments"]) < CLOSE
    assert relative(mean, want["mean"]) < CLOSE and relative(logvar, want["logvar"]) < CLOSE
    assert relative(kl_divergence(moments), want["kl"]) < CLOSE
    assert relative(network.decode(want["z"]), want["decoded"]) < CLOSE
    assert relative(network.decode(mean), want["reconstruction_of_mode"]) < CLOSE
    assert bundle.scale.std == (1 / 0.22,) * 4 and bundle.scale.mean == (0.0,) * 4


def test_vq_model_repeats_the_recording():
    want, network = io("vqmodel"), stage_of(diffusers.read(case("vqmodel")))
    assert relative(network.moments(want["x"]), want["encoded"]) < CLOSE
    assert decided(want["h"], network.quantize.embedding.weight).all()
    found = network.quantize(want["h"])
    assert torch.equal(found.indices, want["indices"])
    assert relative(found.z, want["quantized"]) < CLOSE
    assert relative(network.decode(want["h"]), want["decoded"]) < CLOSE
    assert relative(network.decode(want["h"], quantize=False), want["decoded_without_quantisation"]) < CLOSE


@pytest.mark.parametrize("name", ["unet2d", "unet2d_film", "unet2d_condition"])
def test_networks_repeat_the_recording(name):
    want = io(name)
    told = Conditioning(context=want.get("context"))
    assert relative(model_of(diffusers.read(case(name))).predict(want["x"], want["t"], told), want["eps"]) < CLOSE


@pytest.mark.parametrize("name", ["ddim", "pndm", "dpm", "euler"])
def test_schedulers_repeat_the_recorded_trajectories(name):
    want, bundle = io("unet2d"), diffusers.read(case("unet2d"))
    path = case("schedulers", name, "scheduler_config.json")
    process, sample, notes = schedulers.read_scheduler(
        path, read_config(path), bundle.config.diffusion, bundle.config.sample
    )
    assert notes == []
    bundle.config = replace(bundle.config, diffusion=process, sample=replace(sample, steps=10))
    states, levels = trajectory(model_of(bundle), bundle, want["latents"])
    recorded, times = want[f"trajectory_{name}_10"], want[f"timesteps_{name}_10"].tolist()
    if name == "pndm":  # two evaluations for the first step: its state in between is the original's own
        recorded, times = torch.cat([recorded[:1], recorded[2:]]), [times[0], *times[2:]]
    if name == "euler":  # its states are z/α
        recorded = recorded * torch.tensor(levels.alphas, dtype=torch.float32)[:, None, None, None, None]
    assert list(levels.t) == times
    for state, there in zip(states, recorded, strict=True):
        assert relative(state, there) < CLOSE


def test_guided_network_repeats_the_recording():
    want, bundle = io("unet2d_condition"), diffusers.read(case("unet2d_condition"))
    process, sample, _ = schedulers.read_scheduler(
        Path("x"),
        read_config(case("schedulers", "ddim", "scheduler_config.json")),
        bundle.config.diffusion,
        bundle.config.sample,
    )
    bundle.config = replace(bundle.config, diffusion=process, sample=replace(sample, steps=10))
    model, told = model_of(bundle), Conditioning(context=want["context"])
    states, levels = trajectory(model, bundle, want["latents"], told)
    assert list(levels.t) == want["timesteps"].tolist() and relative(states, want["trajectory_ddim_10"]) < CLOSE
    states, _ = trajectory(
        model, bundle, want["latents"], told, Conditioning(context=want["uncond_context"]), float(want["guidance"])
    )
    assert relative(states, want["trajectory_ddim_10_guided"]) < CLOSE


@pytest.mark.parametrize("name", ["ldm_uncond", "ldm_superres", "ldm_text2img"])
def test_pipelines_repeat_the_recording(name):
    want, bundle = io(name), diffusers.read(case(name))
    model, told, null, scale = model_of(bundle), Conditioning(), None, 1.0
    if name == "ldm_superres":
        pixels = (want["low"] + 1) * 127.5
        told = Conditioning(concat=want["low"])
        assert pixels.shape[-1] * bundle.specs["lowres"]["scale"] == want["decoded"].shape[-1]
    if name == "ldm_text2img":
        prompts = json.loads(case(name, "prompts.json").read_text())
        inputs, none = model.conditions.prepare({"text": prompts}), model.conditions.null(len(prompts))
        assert torch.equal(inputs["text.ids"], want["input_ids"])
        assert torch.equal(none["text.ids"], want["uncond_input_ids"])
        told, null, scale = model.embed(inputs), model.embed(none), float(want["guidance"])
        assert relative(told.context, want["context"]) < CLOSE
        assert relative(null.context, want["uncond_context"]) < CLOSE
    states, _ = trajectory(model, bundle, want["latents"], told, null, scale, steps=10)
    recorded = next(want[key] for key in want if key.startswith("trajectory"))
    assert relative(states, recorded) < CLOSE
    stage, z = stage_of(bundle.autoencoder), bundle.scale.restore(recorded[-1])
    assert not stage.is_vq or decided(z, stage.quantize.embedding.weight).all()
    pixels = stage.decode(z)
    assert relative(pixels, want["decoded"]) < CLOSE
    image = (pixels / 2 + 0.5).clamp(0, 1)
    there = want["image01"] if want["image01"].shape[1] == 3 else want["image01"].permute(0, 3, 1, 2)
    assert relative(image, there) < CLOSE


@pytest.mark.parametrize(
    "name",
    [
        "autoencoder_kl",
        "vqmodel",
        "unet2d",
        "unet2d_film",
        "unet2d_condition",
        "ldm_uncond",
        "ldm_superres",
        "ldm_text2img",
    ],
)
def test_recorded_folders_go_out_and_back_bit_by_bit(name, tmp_path):
    first = diffusers.read(case(name))
    diffusers.write(first, tmp_path / "out")
    again = diffusers.read(tmp_path / "out")
    assert_same(first, again)
    if name in ("autoencoder_kl", "vqmodel", "unet2d_condition"):
        before, after = (load_file(p / "diffusion_pytorch_model.safetensors") for p in (case(name), tmp_path / "out"))
        assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def assert_same(first, again):
    assert again.tensors.keys() == first.tensors.keys()
    assert all(torch.equal(again.tensors[name], first.tensors[name]) for name in first.tensors)
    if isinstance(first, DiffusionBundle):
        names = ("prediction", "schedule", "beta_start", "beta_end", "timesteps", "scale_shift", "resblock_updown")
        assert all(getattr(again.config.diffusion, n) == getattr(first.config.diffusion, n) for n in names)
        assert again.latent_shape == first.latent_shape and again.scale == first.scale
        assert again.config.kinds == first.config.kinds
        if first.autoencoder:
            assert_same(first.autoencoder, again.autoencoder)


# ---------------------------------------------------------------- models of ours


@pytest.mark.parametrize("reg", ["kl", "vq"])
@pytest.mark.parametrize("scale", [UNEVEN, SHIFTED, SINGLE])
def test_statistics_folded_into_the_first_stage_leave_images_as_they_are(reg, scale, tmp_path):
    model = small_model(stage=small_stage(reg=reg), scale=scale)
    lines = diffusers.write(model, tmp_path / "out")
    again = diffusers.read(tmp_path / "out")
    assert_same(model, again)
    if reg == "vq" and scale is UNEVEN:
        assert "codebook" in lines[0]  # factors a channel move the border between entries: no stock class
        return
    assert lines[0] == "a LDMPipeline"
    (tmp_path / "out" / "vqvae" / "unfolded.safetensors").unlink(missing_ok=True)
    folded = diffusers.read(tmp_path / "out")
    z, x = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 16, 16).clamp(-1, 1)
    before, after = stage_of(model.autoencoder), stage_of(folded.autoencoder)
    assert reg == "kl" or decided(model.scale.restore(z), before.quantize.embedding.weight, 1e-5 * z.max().item()).all()
    assert relative(after.decode(folded.scale.restore(z)), before.decode(model.scale.restore(z))) < 1e-5

    def encoded(network, scale):
        moments = network.moments(x)
        return scale.normalise(split_moments(moments)[0] if reg == "kl" else moments)

    assert relative(encoded(after, folded.scale), encoded(before, model.scale)) < 1e-5
    if scale is UNEVEN:
        spread = 0.5 * split_moments(before.moments(x))[1] - torch.tensor(scale.std).log()[:, None, None]
        assert torch.allclose(0.5 * split_moments(after.moments(x))[1], spread, atol=1e-4)


def test_weights_changed_after_the_export_are_not_undone(tmp_path):
    diffusers.write(small_model(scale=UNEVEN), tmp_path / "out")
    path = tmp_path / "out" / "vqvae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["quant_conv.bias"] += 1
    save_file(tensors, path)
    again = diffusers.read(tmp_path / "out")
    assert torch.equal(again.autoencoder.tensors["quant_conv.bias"], tensors["quant_conv.bias"])
    assert again.scale == LatentScale.identity(3)


@pytest.mark.parametrize("name", CUSTOM)
def test_models_without_a_stock_pipeline_bring_their_own_and_come_back(name, tmp_path):
    bundle = custom_model(name)
    lines = diffusers.write(bundle, tmp_path / "out")
    assert "of its own" in lines[0]
    index = read_config(tmp_path / "out" / "model_index.json")
    assert ("unet" in index) == (name not in ("flow", "heads")) and ("vqvae" in index) == (name != "fast")
    again = diffusers.read(tmp_path / "out")
    assert_same(bundle, again)
    assert again.config.sample == bundle.config.sample and again.specs == bundle.specs
    text = (tmp_path / "out" / "pipeline.py").read_text() + diffusers_custom.component_code()[1]
    assert "import ldmcli" not in text and "from ldmcli" not in text


def test_the_code_beside_a_model_makes_its_modules_without_this_package():
    """All that the component's file does before diffusers comes in."""
    texts = diffusers_custom.sources()
    assert list(texts)[-1] == "ldmcli.formats.exported_model" and "ldmcli.networks.unet" in texts
    assert not any(
        name.startswith(("ldmcli.data", "ldmcli.conditions", "ldmcli.sampling", "ldmcli.cli")) for name in texts
    )
    module, code = diffusers_custom.component_code()
    bars = [line for line in code.splitlines() if line.startswith("|")]
    assert sum(len(text.splitlines()) for text in texts.values()) == len(bars)
    compile(code, module, "exec")


@pytest.mark.parametrize("logits", [False, True])
def test_text_models_of_77_tokens_are_stock_and_others_are_not(logits, tmp_path):
    bundle = text_model(tmp_path)
    if logits:  # the head that the published models carry along, unused
        vocabulary, width = bundle.tensors["conditions.entries.text.encoder.transformer.token_emb.weight"].shape
        bundle.specs["text"]["logits"] = True
        bundle.tensors["conditions.entries.text.encoder.transformer.to_logits.weight"] = torch.randn(vocabulary, width)
        bundle.tensors["conditions.entries.text.encoder.transformer.to_logits.bias"] = torch.randn(vocabulary)
    assert diffusers.write(bundle, tmp_path / "out")[0] == "a LDMTextToImagePipeline"
    index = read_config(tmp_path / "out" / "model_index.json")
    assert index["bert"] == ["latent_diffusion", "LDMBertModel"] and index["tokenizer"][1] == "BertTokenizer"
    again = diffusers.read(tmp_path / "out")
    assert_same(bundle, again)
    words = ["a red circle", ""]
    assert torch.equal(
        model_of(again).conditions.prepare({"text": words})["text.ids"],
        model_of(bundle).conditions.prepare({"text": words})["text.ids"],
    )
    shutil.rmtree(tmp_path / "vocabulary")
    assert "77" in diffusers.write(text_model(tmp_path, 16), tmp_path / "short")[0]
    assert_same(text_model(tmp_path / "again", 16), diffusers.read(tmp_path / "short"))


def test_class_tables_are_added_to_the_time_embedding(tmp_path):
    folder = case("unet2d")
    shutil.copytree(folder, tmp_path / "net")
    change(tmp_path / "net" / "config.json", num_class_embeds=5)
    path = tmp_path / "net" / "diffusion_pytorch_model.safetensors"
    table = torch.randn(5, 64)
    save_file({**load_file(path), "class_embedding.weight": table}, path)
    bundle, want = diffusers.read(tmp_path / "net"), io("unet2d")
    model = model_of(bundle)
    told = model.embed(model.conditions.prepare({"class": [3, 0]}))
    assert torch.equal(told.vector, table[[3, 0]])
    assert relative(model.predict(want["x"], want["t"], Conditioning()), want["eps"]) < CLOSE
    assert relative(model.predict(want["x"], want["t"], told), want["eps"]) > 1e-3
    diffusers.write(bundle, tmp_path / "out")
    assert torch.equal(load_file(tmp_path / "out" / path.name)["class_embedding.weight"], table)
    assert_same(bundle, diffusers.read(tmp_path / "out"))


# ---------------------------------------------------------------- reading what others wrote


def change(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.fixture
def net(tmp_path):
    shutil.copytree(case("unet2d"), tmp_path / "net")
    return tmp_path / "net"


def weights(folder: Path) -> tuple[Path, dict]:
    path = folder / "diffusion_pytorch_model.safetensors"
    return path, load_file(path)


def test_shards_variants_and_old_names_of_attention(net):
    want = diffusers.read(net)
    path, tensors = weights(net)
    names = sorted(tensors)
    table = {name: f"part-{k % 2}.safetensors" for k, name in enumerate(names)}
    for part in set(table.values()):
        save_file({name: tensors[name] for name in names if table[name] == part}, net / part)
    path.unlink()
    index = net / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": table}))
    assert_same(want, diffusers.read(net))
    index.unlink()
    save_file(
        {name: tensor.half() for name, tensor in tensors.items()}, net / "diffusion_pytorch_model.fp16.safetensors"
    )
    half = diffusers.read(net)
    assert all(tensor.dtype == torch.float32 for tensor in half.tensors.values())
    (net / "diffusion_pytorch_model.fp16.safetensors").unlink()
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, tensor in tensors.items():
        for new, before in old.items():
            name = name.replace(f".{new}.", f".{before}.")
        renamed[name] = tensor
    assert renamed.keys() != tensors.keys()
    save_file(renamed, path)
    assert_same(want, diffusers.read(net))


def test_pickled_weights_of_old_folders_are_read_without_running_them(net):
    want = diffusers.read(net)
    path, tensors = weights(net)
    path.unlink()
    torch.save(tensors, net / "diffusion_pytorch_model.bin")
    assert_same(want, diffusers.read(net))


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", "..\\x"])
def test_an_index_that_leads_elsewhere_is_refused(net, name):
    path, tensors = weights(net)
    path.rename(net.parent / "secret.safetensors")
    (net / "diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(tensors, name)})
    )
    with pytest.raises(ModelError, match="weight_map leads to"):
        diffusers.read(net)


def test_keys_that_a_configuration_leaves_out_take_the_defaults_of_the_class(tmp_path):
    for name, defaults in (
        ("unet2d", unets.DEFAULTS["UNet2DModel"]),
        ("vqmodel", vaes.DEFAULTS["VQModel"]),
        ("unet2d_condition", unets.DEFAULTS["UNet2DConditionModel"]),
        ("autoencoder_kl", vaes.DEFAULTS["AutoencoderKL"]),
    ):
        shutil.copytree(case(name), tmp_path / name)
        path, want = tmp_path / name / "config.json", diffusers.read(case(name))
        values = read_config(path)
        short = {k: v for k, v in values.items() if k not in defaults or defaults[k] != v}
        assert len(short) < len(values) - 3
        path.write_text(json.dumps(short))
        again = diffusers.read(tmp_path / name)
        assert_same(want, again)
        assert again.config == want.config


def test_a_vq_model_without_a_factor_has_that_of_its_class(tmp_path):
    shutil.copytree(case("vqmodel"), tmp_path / "vq")
    values = read_config(tmp_path / "vq" / "config.json")
    del values["scaling_factor"]
    (tmp_path / "vq" / "config.json").write_text(json.dumps(values))
    assert diffusers.read(tmp_path / "vq").scale.std == (1 / 0.18215,) * 3


def test_missing_unknown_and_misshapen_weights_are_listed(net):
    path, tensors = weights(net)
    del tensors["conv_in.weight"]
    tensors["surprise"] = torch.zeros(1)
    tensors["conv_out.bias"] = torch.zeros(7)
    save_file(tensors, path)
    with pytest.raises(ModelError, match=r"missing: conv_in.weight .*unknown: surprise .*another shape: conv_out.bias"):
        diffusers.read(net)


REFUSED = [
    ("norm_eps", 1e-6),
    ("flip_sin_to_cos", False),
    ("freq_shift", 1),
    ("attn_norm_num_groups", 4),
    ("act_fn", "gelu"),
    ("time_embedding_type", "fourier"),
    ("downsample_padding", 0),
    ("class_embed_type", "identity"),
    ("mid_block_type", None),
    ("center_input_sample", True),
    ("attention_head_dim", 7),
    ("norm_num_groups", 5),
    ("down_block_types", ["DownBlock2D", "SkipDownBlock2D", "AttnDownBlock2D"]),
    ("block_out_channels", [16, 24]),
    ("up_block_types", ["UpBlock2D"] * 3),
    ("sample_size", "big"),
    ("layers_per_block", [1, 2, 1]),
    ("downsample_type", "resnet"),
    ("num_class_embeds", 3),
    ("out_channels", 0),
    ("block_out_channels", None),
]


@pytest.mark.parametrize("key, value", REFUSED)
def test_what_these_networks_cannot_express_is_refused_by_name(net, key, value):
    change(net / "config.json", **{key: value})
    with pytest.raises(ModelError, match=key):
        diffusers.read(net)


def test_scale_shift_without_groups_for_the_middle_is_refused(tmp_path):
    shutil.copytree(case("unet2d_film"), tmp_path / "net")
    change(tmp_path / "net" / "config.json", attn_norm_num_groups=None)
    with pytest.raises(ModelError, match="attn_norm_num_groups"):
        diffusers.read(tmp_path / "net")


@pytest.mark.parametrize(
    "key, value",
    [
        ("only_cross_attention", True),
        ("num_attention_heads", 4),
        ("attention_head_dim", [2, 5]),
        ("cross_attention_dim", [1, 2]),
        ("addition_embed_type", "text_time"),
        ("dual_cross_attention", True),
        ("transformer_layers_per_block", [1, 2]),
        ("mid_block_type", "UNetMidBlock2D"),
    ],
)
def test_cross_attention_beyond_ours_is_refused_by_name(tmp_path, key, value):
    shutil.copytree(case("unet2d_condition"), tmp_path / "net")
    change(tmp_path / "net" / "config.json", **{key: value})
    with pytest.raises(ModelError, match=key):
        diffusers.read(tmp_path / "net")


def test_head_numbers_of_each_level_are_taken_as_numbers(tmp_path):
    shutil.copytree(case("unet2d_condition"), tmp_path / "net")
    change(tmp_path / "net" / "config.json", attention_head_dim=[4, 2])
    bundle, want = diffusers.read(tmp_path / "net"), io("unet2d_condition")
    assert bundle.config.diffusion.level_heads == (4, 2)
    told = Conditioning(context=want["context"])
    assert relative(model_of(bundle).predict(want["x"], want["t"], told), want["eps"]) > 1e-4
    diffusers.write(bundle, tmp_path / "out")
    assert read_config(tmp_path / "out" / "config.json")["attention_head_dim"] == [4, 2]


def test_linear_projections_are_the_same_as_convolutions(tmp_path):
    shutil.copytree(case("unet2d_condition"), tmp_path / "net")
    change(tmp_path / "net" / "config.json", use_linear_projection=True)
    path, tensors = weights(tmp_path / "net")
    flat = {
        k: v[:, :, 0, 0].clone() if "proj_in.weight" in k or "proj_out.weight" in k else v for k, v in tensors.items()
    }
    save_file(flat, path)
    assert_same(diffusers.read(case("unet2d_condition")), diffusers.read(tmp_path / "net"))


def sixteen_channels(folder: Path, **more) -> dict:
    """A first stage as those of newer models: no convolutions around z, a shift and a factor."""
    diffusers.write(small_stage(z_channels=16, embed_dim=16), folder)
    path, tensors = weights(folder)
    kept = {k: v for k, v in tensors.items() if "quant_conv" not in k}
    save_file(kept, path)
    change(folder / "config.json", use_quant_conv=False, use_post_quant_conv=False, **more)
    return kept


def test_first_stages_of_sixteen_channels_with_shift_and_factor(tmp_path):
    kept = sixteen_channels(tmp_path / "vae", shift_factor=0.1159, scaling_factor=0.3611)
    bundle = diffusers.read(tmp_path / "vae")
    z = torch.randn(1, 16, 4, 4)
    assert torch.allclose(bundle.scale.normalise(z), (z - 0.1159) * 0.3611, atol=1e-6)
    assert torch.allclose(bundle.scale.restore(z), z / 0.3611 + 0.1159, atol=1e-6)
    network = stage_of(bundle)
    assert torch.equal(network.decode(z), network.decoder(z))
    diffusers.write(replace(bundle, scale=LatentScale.identity(16)), tmp_path / "out")
    _, again = weights(tmp_path / "out")
    assert again.keys() == kept.keys()


def test_statistics_of_a_channel_each_are_kept(tmp_path):
    sixteen_channels(tmp_path / "vae", latents_mean=[0.5] * 16, latents_std=[2.0] * 16, scaling_factor=1.0)
    assert diffusers.read(tmp_path / "vae").scale == LatentScale((0.5,) * 16, (2.0,) * 16)


def test_a_pipeline_of_another_model_gives_its_first_stage_and_says_so(tmp_path):
    shutil.copytree(case("autoencoder_kl"), tmp_path / "sd" / "vae")
    (tmp_path / "sd" / "model_index.json").write_text(
        json.dumps(
            {
                "_class_name": "StableDiffusionPipeline",
                "vae": ["diffusers", "AutoencoderKL"],
                "unet": ["diffusers", "UNet2DConditionModel"],
            }
        )
    )
    bundle = diffusers.read(tmp_path / "sd")
    assert isinstance(bundle, AutoencoderBundle) and "only the first stage" in bundle.notes[0]


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"config.json": {"_class_name": "FluxTransformer2DModel"}},
        {"config.json": []},
        {"config.json": {}},
        {"model_index.json": {"_class_name": "CogVideoXPipeline"}},
        {"model_index.json": {"_class_name": "LDMPipeline"}},
        {"model_index.json": {"_class_name": ["pipeline", "LatentDiffusionPipeline"]}},
        {"config.json": {"_class_name": "AutoencoderKL"}},
        {"config.json": {"_class_name": "UNet2DModel"}},
    ],
)
def test_folders_of_something_else_end_with_one_line(tmp_path, files):
    for name, values in files.items():
        (tmp_path / name).write_text(json.dumps(values))
    with pytest.raises(ModelError):
        diffusers.read(tmp_path)


# ---------------------------------------------------------------- schedulers

DDIM = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.0015,
    "beta_end": 0.0195,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
EULER = {**DDIM, "_class_name": "EulerDiscreteScheduler", "timestep_spacing": "linspace", "steps_offset": 0}
DPM = {**DDIM, "_class_name": "DPMSolverMultistepScheduler", "timestep_spacing": "leading", "steps_offset": 0}
SPACED = [
    (DDIM, "ddim", "leading+1/first", [801, 601, 401, 201, 1]),
    ({**DDIM, "set_alpha_to_one": True, "steps_offset": 0}, "ddim", "leading/clean", [800, 600, 400, 200, 0]),
    ({**DDIM, "timestep_spacing": "trailing"}, "ddim", "trailing/first", [999, 799, 599, 399, 199]),
    ({**DDIM, "_class_name": "PNDMScheduler", "skip_prk_steps": True}, "plms", "leading+1/first", None),
    ({**DDIM, "_class_name": "PNDMScheduler"}, "ddim", "leading+1/first", None),
    ({**DDIM, "clip_sample": True}, "ddim", "leading+1/first", None),
    ({**DDIM, "_class_name": "LMSDiscreteScheduler"}, "ddim", "leading+1/first", None),
    (EULER, "euler", "linspace_real/clean", [999, 749.25, 499.5, 249.75, 0]),
    ({**EULER, "final_sigmas_type": "sigma_min"}, "euler", "linspace_real/sigma_min", None),
    (DPM, "dpm++", "leading_open/clean", [830, 664, 498, 332, 166]),
    ({**DPM, "steps_offset": 1}, "dpm++", "leading_open+1/clean", [831, 665, 499, 333, 167]),
    ({**DPM, "timestep_spacing": "linspace"}, "dpm++", "linspace_open/clean", [999, 799, 599, 400, 200]),
]


@pytest.mark.parametrize("values, sampler, spacing, times", SPACED)
def test_schedulers_become_sampler_timesteps_and_ending(values, sampler, spacing, times):
    process, sample, _ = schedulers.read_scheduler(Path("s"), values, DiffusionSettings(), SampleSettings())
    assert (sample.sampler, sample.spacing) == (sampler, spacing)
    levels = sampling_levels(make_schedule(process), 5, sample.spacing)
    assert times is None or list(levels.t) == times
    ending = {"clean": (1, 0), "first": (levels.alphas[-1], levels.sigmas[-1])}.get(spacing.rpartition("/")[2])
    assert ending is None or (levels.alphas[-1], levels.sigmas[-1]) == ending


@pytest.mark.parametrize(
    "key, value",
    [
        ("beta_schedule", "sigmoid"),
        ("trained_betas", [0.1]),
        ("beta_end", 2),
        ("rescale_betas_zero_snr", True),
        ("prediction_type", "flow_prediction"),
        ("num_train_timesteps", 0),
        ("timestep_spacing", "odd"),
    ],
)
def test_processes_that_are_not_ours_are_refused(key, value):
    with pytest.raises(LdmError, match=key if "flow" not in str(value) else "flow"):
        schedulers.read_scheduler(Path("s"), {**DDIM, key: value}, DiffusionSettings(), SampleSettings())


@pytest.mark.parametrize(
    "sampler, spacing",
    [
        ("ddim", "leading+1/first"),
        ("ddim", "trailing/clean"),
        ("plms", "leading+1/first"),
        ("dpm++", "linspace_open/clean"),
        ("dpm++", "leading_open+1/first"),
        ("dpm++", "trailing/clean"),
    ],
)
@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_schedulers_go_out_and_back(sampler, spacing, prediction):
    process = DiffusionSettings(prediction=prediction, schedule="cosine", t_sampling="uniform")
    sample = SampleSettings(sampler=sampler, spacing=spacing)
    written = schedulers.write_scheduler(process, sample)
    again = schedulers.read_scheduler(Path("s"), written, process, sample)
    assert again[:2] == (process, sample) and (again[2] == []) == (spacing != "leading_open+1/first")


# ---------------------------------------------------------------- hostile and damaged

NASTY = [
    ("unet2d", "layers_per_block", 2**20),
    ("unet2d", "_class_name", ["UNet2DModel"]),
    ("unet2d", "block_out_channels", [2**23] * 16),
    ("unet2d", "down_block_types", [[]] * 3),
    ("autoencoder_kl", "latents_mean", 3),
    ("autoencoder_kl", "scaling_factor", float("nan")),
    ("autoencoder_kl", "norm_num_groups", 0),
    ("vqmodel", "vq_embed_dim", {}),
    ("unet2d_condition", "transformer_layers_per_block", 10**9),
]


@pytest.mark.parametrize("name, key, value", NASTY)
def test_values_that_no_class_writes_end_with_one_line(name, key, value, tmp_path):
    shutil.copytree(case(name), tmp_path / "net")
    change(tmp_path / "net" / "config.json", **{key: value})
    if key == "latents_mean":
        change(tmp_path / "net" / "config.json", latents_std=3)
    with pytest.raises(ModelError) as found:
        diffusers.read(tmp_path / "net")
    assert "\n" not in str(found.value)


def test_nested_json_and_damaged_weights_end_with_one_line(net):
    path, _ = weights(net)
    whole, config = path.read_bytes(), (net / "config.json").read_text()
    (net / "config.json").write_text("[" * 200_000)
    with pytest.raises(ModelError, match="damaged"):
        diffusers.read(net)
    (net / "config.json").write_text(config)
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])
    first, second = [name for name in header if name != "__metadata__"][:2]
    lying = []
    for change_header in ({"data_offsets": [0, 10**15]}, {"data_offsets": header[second]["data_offsets"]}):
        text = json.dumps({**header, first: {**header[first], **change_header}}).encode()
        lying.append(len(text).to_bytes(8, "little") + text + whole[8 + size :])
    for damaged in (whole[:-100], whole[:50], b"", (2**60).to_bytes(8, "little") + whole[8:], *lying):
        path.write_bytes(damaged)
        with pytest.raises(ModelError, match="safetensors"):
            diffusers.read(net)
