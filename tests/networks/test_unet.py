"""The UNet against recorded outputs of the original, and the extensions against their claims."""

import json

import pytest
import torch
import torch.nn.functional as F
from golden_cases import ClassEmbedder, randomised, relative, shared
from recorded import recorded_unet

from ldmcli.core.errors import UsageError
from ldmcli.core.settings import DiffusionSettings
from ldmcli.networks.blocks import attention, group_norm, set_checkpointing, timestep_embedding
from ldmcli.networks.text_encoder import SpatialRescaler, TextTransformer
from ldmcli.networks.unet import UNet, head_count, level_widths

EXACT = 5e-6
TINY = {"channels": 16, "channel_mult": (1, 2), "head_channels": 8, "attention_resolutions": (2,), "groups": 8}


def tiny(seed: int = 0, **changes) -> UNet:
    torch.manual_seed(seed)
    more = {key: changes.pop(key) for key in ("context_dim", "vector_dim", "sample_size") if key in changes}
    settings = DiffusionSettings(**{"position": "none", **TINY, **changes})
    return randomised(UNet(settings, 4, 4, **more), seed).eval()


def noise(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_unconditional_unet_repeats_the_recorded_noise():
    model, _, io, _ = recorded_unet("unet_uncond")
    assert relative(model(io["x"], io["t"]), io["eps"]) < EXACT


@torch.no_grad()
def test_concat_unet_with_resampling_blocks_repeats_the_recorded_noise():
    model, _, io, _ = recorded_unet("unet_concat_inpaint")
    assert relative(model(torch.cat([io["x"], io["c_concat"]], dim=1), io["t"]), io["eps"]) < EXACT


@torch.no_grad()
def test_class_unet_and_embedder_repeat_the_recorded_noise():
    model, state, io, config = recorded_unet("unet_class_crossattn")
    embedder = ClassEmbedder(config["cond"]["n_classes"], config["cond"]["embed_dim"])
    embedder.load_state_dict(state, strict=True)
    context, null = embedder(io["labels"]), embedder(io["uncond_labels"])
    assert torch.equal(context, io["context"]) and torch.equal(null, io["uncond_context"])
    assert relative(model(io["x"], io["t"], context), io["eps"]) < EXACT
    assert relative(model(io["x"], io["t"], null), io["eps_uncond"]) < EXACT


@torch.no_grad()
def test_same_weights_with_another_head_count_repeat_the_other_recording():
    _, _, _, config = recorded_unet("unet_class_crossattn")
    model, _, io, _ = recorded_unet("unet_class_crossattn", num_heads=config["other_head_count"])
    assert relative(model(io["x"], io["t"], io["context"]), io["eps_other_head_count"]) < EXACT
    assert relative(model(io["x"], io["t"], io["context"]), io["eps"]) > EXACT


@torch.no_grad()
def test_text_unet_and_transformer_repeat_the_recorded_noise():
    model, state, io, config = recorded_unet("unet_text_bert")
    cond = config["cond"]
    text = TextTransformer(
        cond["vocab_size"],
        cond["n_embed"],
        cond["n_layer"],
        cond["max_seq_len"],
        cond["heads"],
        cond["dim_head"],
        logits_head=True,
    )
    text.load_state_dict(state, strict=True)
    context = text(io["tokens"])
    assert relative(context, io["context"]) < EXACT
    assert relative(text(io["uncond_tokens"]), io["uncond_context"]) < EXACT
    assert relative(text.logits(io["tokens"]), io["logits"]) < EXACT
    assert relative(model(io["x"], io["t"], context), io["eps"]) < EXACT


@torch.no_grad()
def test_semantic_unet_and_rescaler_repeat_the_recorded_noise():
    model, state, io, config = recorded_unet("unet_semantic_rescaler")
    cond = config["cond"]
    rescaler = SpatialRescaler(cond["in_channels"], cond["out_channels"], cond["n_stages"])
    rescaler.load_state_dict(state, strict=True)
    planes = F.one_hot(io["seg_indices"], cond["in_channels"]).permute(0, 3, 1, 2).float()
    assert relative(rescaler(planes), io["context"]) < EXACT
    assert relative(model(torch.cat([io["x"], rescaler(planes)], dim=1), io["t"]), io["eps"]) < EXACT


def test_time_embedding_repeats_the_recorded_one_for_even_and_odd_widths():
    cases = json.loads(shared("golden", "timestep_embedding.json").read_text())
    for dim in (8, 7):
        ours = timestep_embedding(torch.tensor(cases["t"]), dim)
        assert relative(ours, torch.tensor(cases[f"dim{dim}"])) < EXACT


def test_time_embedding_begins_with_cosines_and_takes_fractions():
    code = timestep_embedding(torch.tensor([0.0, 0.5]), 4)
    assert code[0].tolist() == [1.0, 1.0, 0.0, 0.0]
    assert code[1].tolist() == pytest.approx([0.8775826, 0.9999875, 0.4794255, 0.0049999792])


def test_an_untrained_unet_predicts_zero():
    model = UNet(DiffusionSettings(**TINY), 4, 4, context_dim=8)
    assert not model(noise(2, 4, 8, 8), torch.ones(2), noise(2, 3, 8)).any()


@pytest.mark.parametrize("position", ["none", "learned", "sinusoidal"])
@pytest.mark.parametrize("spatial_transformer", [False, True])
@pytest.mark.parametrize("variant", [{}, {"scale_shift": False, "resblock_updown": True, "patch": 2}])
def test_every_parameter_gets_a_finite_gradient(position, spatial_transformer, variant):
    model = tiny(
        position=position,
        spatial_transformer=spatial_transformer,
        context_dim=6,
        vector_dim=5,
        sample_size=(8, 8),
        **variant,
    )
    out = model(noise(2, 4, 8, 8), torch.tensor([3.0, 400.5]), noise(2, 3, 6), noise(2, 5))
    out.square().sum().backward()
    assert out.shape == (2, 4, 8, 8)
    bad = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()]
    assert bad == []


@torch.no_grad()
@pytest.mark.parametrize("position", ["learned", "sinusoidal"])
def test_only_a_position_code_tells_places_apart_on_a_constant_map(position):
    x, t = torch.ones(1, 4, 40, 40), torch.zeros(1)
    differences = {}
    for kind in ("none", position):
        model = tiny(position=kind, sample_size=(16, 16), channel_mult=(1,), attention_resolutions=(1,))
        out = model(x, t)[0, :, 18:22, 18:22]  # out of reach of the borders, which padding already tells apart
        differences[kind] = (out - out[:, :1, :1]).abs().max().item()
    assert differences["none"] < 1e-5 < 1e-3 < differences[position]


@torch.no_grad()
@pytest.mark.parametrize("position", ["learned", "sinusoidal"])
def test_sizes_other_than_the_trained_one_work_and_keep_the_position(position):
    model = tiny(position=position, sample_size=(8, 8))
    small = model.positions["d2_c32"]((4, 4))
    large = model.positions["d2_c32"]((8, 6))
    assert small.shape == (1, 32, 4, 4) and large.shape == (1, 32, 8, 6)
    pooled = F.adaptive_avg_pool2d(model.positions["d2_c32"]((8, 8)), 4)
    assert F.cosine_similarity(pooled.flatten(), small.flatten(), dim=0) > 0.8
    assert model(noise(1, 4, 16, 12), torch.zeros(1)).shape == (1, 4, 16, 12)


@torch.no_grad()
def test_learned_positions_of_a_level_are_shared_and_start_at_std_0_3():
    model = UNet(DiffusionSettings(), 4, 4, context_dim=8, sample_size=(16, 16))
    assert sorted(model.positions) == ["d2_c96", "d4_c160", "input"]
    assert model.positions["d4_c160"].map.shape == (160, 4, 4)
    assert model.positions["d2_c96"].map.std().item() == pytest.approx(0.3, rel=0.05)


@torch.no_grad()
def test_context_and_vector_change_the_prediction_and_rows_stay_apart():
    model = tiny(context_dim=6, vector_dim=5)
    x, t, context, vector = noise(1, 4, 8, 8).expand(2, -1, -1, -1), torch.full((2,), 9.0), noise(2, 3, 6), noise(2, 5)
    out = model(x, t, context, vector)
    assert (out[0] - out[1]).abs().max() > 1e-4
    assert torch.allclose(model(x[:1], t[:1], context[:1], vector[:1]), out[:1], atol=1e-5)
    assert (model(x, t, context, vector.flip(0)) - out).abs().max() > 1e-4
    assert (model(x, t, context.flip(0), vector) - out).abs().max() > 1e-4


@torch.no_grad()
def test_patches_are_folded_before_the_first_convolution_and_unfolded_after_the_last():
    model = tiny(patch=2)
    assert model.input_blocks[0][0].weight.shape[1] == 16 and model.size_factor == 4
    assert model(noise(1, 4, 8, 12), torch.zeros(1)).shape == (1, 4, 8, 12)


def test_a_latent_of_unfit_size_is_refused_with_the_nearest_size():
    with pytest.raises(UsageError, match="9x8.*multiples of 2.*nearest is 10x8"):
        tiny()(noise(1, 4, 9, 8), torch.zeros(1))


def test_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        model = tiny(context_dim=6, position="learned", sample_size=(8, 8))
        set_checkpointing(model, checkpointing)
        model(noise(1, 4, 8, 8), torch.zeros(1), noise(1, 3, 6)).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.equal(*gradients)


def test_middle_attention_can_be_left_out():
    model = tiny(middle_attention=False, attention_resolutions=())
    assert len(model.middle_block) == 2
    assert not any("attn" in name or "qkv" in name for name in model.state_dict())


def test_fractional_multipliers_round_widths_to_multiples_of_8():
    assert level_widths(DiffusionSettings()) == [48, 96, 160]
    assert level_widths(DiffusionSettings(channels=20, channel_mult=(1, 1.5, 3))) == [20, 32, 60]


def test_head_counts_follow_either_rule_and_refuse_what_does_not_divide():
    assert head_count(96, DiffusionSettings(head_channels=32)) == 3
    assert head_count(48, DiffusionSettings(head_channels=20)) == 2
    assert head_count(96, DiffusionSettings(num_heads=8)) == 8
    with pytest.raises(UsageError, match="num_heads = 5 does not divide"):
        head_count(96, DiffusionSettings(num_heads=5))


def test_group_count_falls_to_the_largest_divisor():
    assert [group_norm(width, 1e-5).num_groups for width in (64, 48, 20, 17)] == [32, 24, 20, 17]
    assert group_norm(34, 1e-5, groups=8).num_groups == 2


def test_attention_in_bf16_with_gradients_agrees_with_the_fused_kernel_in_fp32():
    q, k, v = (noise(2, 3, length, 8, seed=i) for i, length in enumerate((10, 7, 7)))
    expected = F.scaled_dot_product_attention(q, k, v)
    half = attention(q.bfloat16().requires_grad_(), k.bfloat16(), v.bfloat16())
    assert half.dtype == torch.bfloat16 and relative(half.float(), expected) < 0.02
    assert relative(attention(q, k, v), expected) < EXACT


def test_bf16_autocast_stays_close_to_fp32():
    model = tiny(context_dim=6, position="learned", sample_size=(8, 8))
    args = noise(2, 4, 8, 8), torch.tensor([1.0, 900.0]), noise(2, 3, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(*args)
    assert out.dtype == torch.bfloat16 and relative(out.float(), model(*args)) < 0.05


@torch.no_grad()
def test_own_small_model_repeats_the_figure_it_once_gave():
    model = tiny(context_dim=6)
    for parameter in model.parameters():
        parameter.copy_(torch.cos(torch.arange(parameter.numel()) * 1.7).view_as(parameter) * 0.2)
    x = torch.linspace(-1, 1, 256).view(1, 4, 8, 8)
    out = model(x, torch.tensor([37.0]), torch.linspace(0, 1, 18).view(1, 3, 6))
    assert out.double().abs().mean().item() == pytest.approx(OWN_FIGURE, rel=1e-5)


OWN_FIGURE = 0.12824841
