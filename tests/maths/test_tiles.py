"""Tiles: positions that cover, weights without a seam, and the original's tiles as recorded."""

import tempfile
from math import ceil

import numpy as np
import pytest
import torch
from golden_cases import decided, golden, randomised, relative
from recorded import recorded_unet
from torch import Tensor

from ldmcli.core.errors import ResourceError
from ldmcli.core.settings import AutoencoderSettings
from ldmcli.maths.tiles import TilePlan, blend, coverage, even_positions, overlapping_tiles, pad_reflect, ramp_weights
from ldmcli.networks import chunked_autoencoder
from ldmcli.networks.autoencoder import Autoencoder
from ldmcli.networks.chunked_autoencoder import Pieces
from ldmcli.networks.latent_scale import LatentScale
from ldmcli.sampling import memory as memory_module
from ldmcli.sampling.first_stage import LoadedAutoencoder

EXACT, QUANTISED = 5e-6, 2e-5


# --- the original's tiles, which the recorded cases were made with


def stride_positions(length: int, tile: int, stride: int) -> list[int]:
    """Where tiles begin so that all of `length` is covered, rising: every `stride`, the last one moved back to the end.

    A length of at most one tile has one, at 0. The original leaves what does not fit uncovered (and divides by 0).
    """
    if length <= tile:
        return [0]
    count = ceil((length - tile) / stride) + 1
    return [min(k * stride, length - tile) for k in range(count)]


def edge_weights(height: int, width: int, low: float = 0.01, high: float = 0.5) -> Tensor:
    """The original's weight of a tile's positions, (height, width): distance from the nearest of the four edges as a
    share of the tile's side, held between `low` and `high`."""
    y, x = (torch.linspace(0, 1, side) for side in (height, width))
    return torch.minimum(torch.minimum(y, 1 - y)[:, None], torch.minimum(x, 1 - x)[None]).clamp(low, high)


def original_plan(
    size: tuple[int, int],
    tile: tuple[int, int],
    stride: tuple[int, int],
    *,
    up: int = 1,
    down: int = 1,
    clip: tuple[float, float] = (0.01, 0.5),
    tie: tuple[float, float] | None = None,
) -> TilePlan:
    """Tiles and weights of the original's `split_input_params`, at every size (see `stride_positions`).

    tie: clips of the "tie breaker", which weights a tile by its place in the grid of tiles as its positions are
    weighted in it; it needs two tiles an axis, and has no effect along an axis of one.
    """
    tile = (min(tile[0], size[0]), min(tile[1], size[1]))
    tops, lefts = (stride_positions(*lengths) for lengths in zip(size, tile, stride))
    weight = edge_weights(tile[0] * up // down, tile[1] * up // down, *clip)
    of_tile = torch.ones(len(tops), len(lefts))
    if tie is not None and len(tops) > 1 and len(lefts) > 1:
        of_tile = edge_weights(len(tops), len(lefts), *tie)
    corners = [(top, left) for top in tops for left in lefts]
    return TilePlan(size, tile, corners, [weight * share for share in of_tile.flatten()], up, down)


@pytest.mark.parametrize(
    ("length", "tile", "stride", "expected"),
    [
        (16, 8, 4, [0, 4, 8]),
        (12, 8, 4, [0, 4]),
        (8, 8, 4, [0]),
        (5, 8, 4, [0]),
        (13, 8, 4, [0, 4, 5]),
        (9, 8, 8, [0, 1]),
    ],
)
def test_tiles_begin_every_stride_and_the_last_ends_with_the_length(length, tile, stride, expected):
    assert stride_positions(length, tile, stride) == expected


@pytest.mark.parametrize("unit", [1, 4])
@pytest.mark.parametrize("length", range(8, 100, 4))
def test_even_tiles_cover_everything_overlap_enough_and_stand_on_the_grid(length, unit):
    starts = even_positions(length, 16, 4, unit)
    assert starts[0] == 0 and (len(starts) == 1 or starts[-1] == length - 16)
    assert all(start % unit == 0 for start in starts)
    assert all(b - a <= 12 for a, b in zip(starts, starts[1:]))


def test_neighbouring_ramps_sum_to_one_and_end_in_zero():
    left, right = ramp_weights(20, 0, 8), ramp_weights(20, 8, 0)
    assert torch.allclose(left[12:] + right[:8], torch.ones(8), atol=1e-6)
    assert left[-3:].tolist() == [0, 0, 0] and (left[:15] == 1).all() and right[:3].tolist() == [0, 0, 0]


@pytest.mark.parametrize("tile", [8, 12, 16, 24])
@pytest.mark.parametrize("size", [(8, 8), (17, 9), (33, 61), (40, 16), (100, 25), (31, 200)])
def test_every_position_is_covered_and_a_constant_stays_one(size, tile):
    for plan in (
        overlapping_tiles(size, tile, tile // 3),
        original_plan(size, (tile, tile), (tile // 2, tile // 2)),
        original_plan(size, (tile, tile), (5, 3), tie=(0.01, 0.5)),
    ):
        assert (coverage(plan) > 0).all()
        result = blend(lambda k, plan=plan: torch.ones(1, 2, *plan.weights[k].shape), plan)
        assert result.shape == (1, 2, *size) and torch.allclose(result, torch.ones(()), atol=1e-5)


def test_cut_and_blended_is_what_it_was():
    x = torch.randn(2, 3, 37, 50, generator=torch.Generator().manual_seed(0))
    plan = overlapping_tiles((37, 50), 16, 5)
    assert torch.allclose(blend(lambda k: plan.cut(x, plan.corners[k]), plan), x, atol=1e-5)


def test_edge_weight_is_the_clipped_distance():
    assert edge_weights(5, 3).tolist() == [
        pytest.approx(row)
        for row in ([0.01, 0.01, 0.01], [0.01, 0.25, 0.01], [0.01, 0.5, 0.01], [0.01, 0.25, 0.01], [0.01, 0.01, 0.01])
    ]


@pytest.mark.parametrize(("shape", "unit"), [((1, 1, 3), 8), ((3, 17), 8), ((16, 8, 3), 8), ((5, 7, 3), 1)])
def test_padding_mirrors_to_the_next_multiple_and_keeps_the_picture(shape, unit):
    image = np.arange(np.prod(shape)).reshape(shape)
    out = pad_reflect(image, unit)
    assert all(side % unit == 0 and side - old < unit for side, old in zip(out.shape[:2], shape[:2]))
    assert (out[: shape[0], : shape[1]] == image).all()
    if shape[1] == 7 and unit == 8:
        assert (out[0, 7] == image[0, 5]).all()


# --- the original's -----------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("tie", [0, 1])
def test_patchwise_noise_is_the_recorded_one(tie):
    model, _, io, config = recorded_unet("unet_uncond")
    split, x = config["split"], io["split.x"]
    plan = original_plan(
        tuple(x.shape[2:]),
        tuple(split["ks"]),
        tuple(split["stride"]),
        clip=(split["clip_min_weight"], split["clip_max_weight"]),
        tie=(split["clip_min_tie_weight"], split["clip_max_tie_weight"]) if tie else None,
    )
    recorded = io[f"split.tie{tie}.weighting"][0, 0].permute(2, 0, 1)
    assert torch.allclose(torch.stack(plan.weights), recorded, atol=1e-6)
    assert relative(coverage(plan), io[f"split.tie{tie}.normalization"][0, 0]) < EXACT
    eps = blend(lambda k: model(plan.cut(x, plan.corners[k]), io["t"][:1]), plan)
    assert relative(eps, io[f"split.tie{tie}.eps"]) < EXACT


def recorded_network(case: str) -> tuple[Autoencoder, dict, dict]:
    config, state, io = golden(case)
    c, vq = config["ddconfig"], case.startswith("vq")
    network = Autoencoder(
        AutoencoderSettings(
            family="paper",
            f=4,
            reg="vq" if vq else "kl",
            embed_dim=config["embed_dim"],
            z_channels=c["z_channels"],
            channels=c["ch"],
            channel_mult=tuple(c["ch_mult"]),
            num_res_blocks=c["num_res_blocks"],
            mid_attention=not vq,
            resolution=c["resolution"],
            attn_resolutions=tuple(c["attn_resolutions"]),
            **({"codebook_size": config["n_embed"]} if vq else {}),
        )
    ).eval()
    network.load_state_dict(state)
    return network, config, io


@torch.no_grad()
def test_tiled_decoding_and_encoding_are_the_recorded_ones():
    network, config, io = recorded_network("vq_f4_noattn")
    split = config["split"]
    tile, stride = tuple(split["ks"]), tuple(split["stride"])
    z, x = io["split.decode_in"], io["split.encode_in"]
    assert decided(z, network.quantize.embedding.weight).all()
    plan = original_plan(tuple(z.shape[2:]), tile, stride, up=split["vqf"])
    decoded = blend(lambda k: network.decode(plan.cut(z, plan.corners[k])), plan)
    assert relative(decoded, io["split.decode_out"]) < QUANTISED
    plan = original_plan(tuple(x.shape[2:]), tile, stride, down=split["vqf"])
    encoded = blend(lambda k: network.moments(plan.cut(x, plan.corners[k])), plan)
    assert relative(encoded, io["split.encode_out"]) < EXACT


# --- networks in tiles --------------------------------------------------------------------------------------------


def autoencoder(family: str, **more) -> LoadedAutoencoder:
    torch.manual_seed(0)
    mult = (1, 1, 1) if family == "paper" else (1,)
    settings = AutoencoderSettings(
        family=family, f=4, channels=32, channel_mult=mult, num_res_blocks=1, embed_dim=3, z_channels=3, **more
    )
    network = randomised(Autoencoder(settings), std=0.02).eval().requires_grad_(False)
    return LoadedAutoencoder(network, LatentScale((0.1, 0.0, -0.2), (2.0, 1.0, 0.5)), "")


def smooth_picture(height: int, width: int) -> torch.Tensor:
    coarse = torch.randn(1, 3, 5, 6, generator=torch.Generator().manual_seed(3))
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(-1, 1)


def test_a_convolutional_autoencoder_in_tiles_is_the_untiled_one():
    ae, x = autoencoder("fast"), smooth_picture(160, 200)
    z = ae.encode(x)
    assert (memory_module.encode(ae, x, 24) - z).abs().max() < 1e-4
    assert (memory_module.decode(ae, z, 24) - ae.decode(z)).abs().mean() < 1e-4


# pieces of several sizes, odd ones among them; the last bounds are met by files and by the smallest pieces alone
@pytest.mark.parametrize(("side", "memory"), [(24, 2**30), (9, 2**20), (1000, 2**16)])
@pytest.mark.parametrize("case", ["kl_f4_attn", "vq_f4_noattn"])
@torch.no_grad()
def test_networks_of_the_paper_in_pieces_are_the_recorded_and_the_untiled_ones(case, side, memory):
    network, _, io = recorded_network(case)
    pieces = Pieces(side, memory)
    assert relative(pieces.moments(network, io["x"]), io["moments" if "moments" in io else "h"]) < EXACT
    assert (
        relative(pieces.decode(network, io["mean" if "mean" in io else "h"]), io["rec_mode" if "mean" in io else "rec"])
        < QUANTISED
    )
    x = smooth_picture(68, 100)
    moments = network.moments(x)
    found = pieces.moments(network, x)
    z = moments if network.is_vq else moments.chunk(2, 1)[0]
    assert relative(found, moments) < EXACT
    if network.is_vq:
        assert decided(moments, network.quantize.embedding.weight, EXACT * moments.abs().max().item()).all()
    assert (pieces.decode(network, z) - network.decode(z)).abs().max() * 127.5 < 0.01  # of 255
    if network.is_vq:
        assert torch.equal(network.quantize(found).indices, network.quantize(moments).indices)


def test_maps_in_files_leave_none_behind_and_a_full_disk_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    network, pieces, z = autoencoder("paper").network, Pieces(16, 2**16), torch.randn(1, 3, 9, 8)
    assert (pieces.decode(network, z) - network.decode(z)).abs().max() < 1e-4
    assert not list(tmp_path.iterdir())

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(chunked_autoencoder, "RESERVE", full)
    with pytest.raises(ResourceError, match="No space left on device.*TMPDIR"):
        pieces.decode(network, z)


@torch.no_grad()
def test_attention_over_too_much_looks_at_some_of_it_and_says_so(monkeypatch, capsys):
    network, z = autoencoder("paper").network, torch.randn(1, 3, 10, 16)
    monkeypatch.setattr(chunked_autoencoder, "ATTENDED", 100)
    out = Pieces(16, 2**30).decode(network, z)
    assert "one of 2 rows" in capsys.readouterr().err
    assert out.shape == (1, 3, 40, 64) and torch.isfinite(out).all()


@pytest.mark.parametrize("size", [(36, 100), (44, 68), (16, 204)])
def test_tiles_of_any_multiple_of_f_give_numbers_of_the_right_shape(size):
    ae, x = autoencoder("paper", mid_attention=False), smooth_picture(*size)
    z = memory_module.encode(ae, x, 8)
    assert z.shape == (1, 3, size[0] // 4, size[1] // 4) and torch.isfinite(z).all()
    out = memory_module.decode(ae, z, 8)
    assert out.shape == x.shape and torch.isfinite(out).all()


@pytest.mark.parametrize(("halves", "more"), [(1, {}), (2, {"mid_attention": False})])
def test_activations_grow_with_the_size_and_the_number(halves, more):
    network = autoencoder("paper", **more).network
    small, large = (memory_module.peak_bytes(network, (halves, 3, side, side)) for side in (32, 64))
    assert 3.5 * small < large < 20 * small
    assert small >= halves * 32 * 32 * 32 * 4  # one map of the first level at least
    assert {p.device.type for p in network.parameters()} == {"cpu"}


def test_the_smallest_tile_over_the_bound_is_refused():
    from types import SimpleNamespace

    unet, _, _, _ = recorded_unet("unet_uncond")
    network = SimpleNamespace(unet=unet, latent_shape=(3, 8, 8))
    conditions = SimpleNamespace(concat_channels=0, context_dim=None, vector_dim=None)
    model = SimpleNamespace(network=network, conditions=conditions, autoencoder=autoencoder("fast"))
    assert memory_module.largest_tile(model, (64, 64), 1.0) == 0
    tile = memory_module.largest_tile(model, (4096, 3000), 0.05)
    assert 8 <= tile < 1024 and tile % unet.size_factor == 0
    assert memory_module.peak_activation_bytes(model, tile, tile, 2) <= 0.05 * 2**30
    with pytest.raises(ResourceError, match="--max-memory"):
        memory_module.largest_tile(model, (64, 64), 1e-6)
