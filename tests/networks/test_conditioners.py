"""Conditions made of planes and tokens: what the recorded cases say, and what composing and dropping leave alone."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_cases import golden, relative

from ldmcli.core.errors import InputError, ModelError, UsageError
from ldmcli.core.settings import ConditionSettings, DiffusionSettings
from ldmcli.maths.patchmatch import patchmatch_fill
from ldmcli.maths.smooth_inpainting import push_pull_fill, thin_plate_fill
from ldmcli.networks.conditioners import CONDITIONERS, ClassConditioner, Conditions, load_tokenizer, train_vocabulary
from ldmcli.networks.latent_diffusion import DiffusionModel
from ldmcli.networks.layout import LayoutConditioner
from ldmcli.networks.spatial_conditioners import (
    LowResConditioner,
    MaskedConditioner,
    SemanticMapConditioner,
    masked_planes,
)

SMALL = ConditionSettings(context_dim=16, text_heads=2, text_head_channels=8)
FACTS = {
    "class": {"class_names": ["cat", "dog"]},
    "layout": {"categories": ["cat", "dog"], "length": 8, "vocabulary": 8192},
    "map": {"classes": 3, "names": ["sky", "sea", "sand"], "out_channels": 3, "stages": 2},
    "lowres": {"scale": 4, "f": 4},
    "masked": {"channels": 4},
}


def picture(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def values(n: int = 2) -> dict[str, list]:
    """Two rows of every condition, at 16 x 16 pixels."""
    half = np.arange(16) < 8
    return {
        "class": [0, "dog"][:n],
        "layout": [{"bbox": [[0, 0, 0.5, 0.5]], "category": ["dog"]}, {"bbox": np.zeros((0, 4)), "category": []}][:n],
        "map": [picture(k, 16, 16) % 3 for k in range(n)],
        "lowres": [picture(k, 4, 4, 3) for k in range(n)],
        "masked": [(picture(k, 16, 16, 3), np.broadcast_to(half, (16, 16))) for k in range(n)],
    }


def conditions(*kinds: str) -> Conditions:
    torch.manual_seed(0)
    return Conditions(kinds, SMALL, FACTS)


def encode(x: torch.Tensor) -> torch.Tensor:
    """A stand-in for the first stage's encoder."""
    return F.avg_pool2d(x, 4)[:, [0, 1, 2, 0]]


# --- recorded cases ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_masked_planes_are_those_of_the_recorded_inpainting():
    _, _, io = golden("unet_concat_inpaint")
    hole = io["mask_pixels"][:, 0] > 0
    assert torch.equal(masked_planes(io["masked_latent"], hole), io["c_concat"])
    entry = MaskedConditioner(SMALL, {"channels": io["masked_latent"].shape[1]})
    pixels = np.zeros((*hole.shape, 3), np.uint8)
    assert torch.equal(
        entry(entry.prepare(list(zip(pixels, hole.numpy()))), lambda x: io["masked_latent"]).concat, io["c_concat"]
    )
    assert entry.channels == io["c_concat"].shape[1]


@torch.no_grad()
def test_maps_are_rescaled_as_in_the_recorded_semantic_model():
    config, state, io = golden("unet_semantic_rescaler")
    weight = next(value for key, value in state.items() if key.endswith("channel_mapper.weight"))
    factor = io["seg_indices"].shape[-1] // io["context"].shape[-1]
    facts = {"classes": weight.shape[1], "out_channels": weight.shape[0], "stages": factor.bit_length() - 1}
    entry = SemanticMapConditioner(SMALL, facts)
    entry.load_state_dict({"encoder.channel_mapper.weight": weight})
    maps = io["seg_indices"].numpy().astype(np.uint8)
    assert relative(entry(entry.prepare(list(maps.reshape(-1, *maps.shape[-2:])))).concat, io["context"]) < 5e-6


@pytest.mark.parametrize(
    ("kinds", "planes"),
    [(("map",), 3), (("lowres",), 3), (("masked",), 5), (("layout",), 0), (("map", "masked", "class"), 8), ((), 0)],
)
def test_the_unet_reads_the_latent_and_the_planes_and_writes_the_latent(kinds, planes):
    """6 → 3 of the published semantic and super-resolution models, 7 → 3 of the inpainting one, for 4 channels here."""
    settings = DiffusionSettings(channels=16, channel_mult=(1,), groups=4, head_channels=8, position="none")
    with torch.device("meta"):
        model = DiffusionModel(settings, SMALL, FACTS, None, (4, 4, 4), kinds)
    assert model.unet.input_blocks[0][0].in_channels == 4 + planes == 4 + model.conditions.concat_channels
    assert model.unet.out[2].out_channels == 4
    assert (model.conditions.context_dim is None) == (not {"layout", "class"} & set(kinds))


# --- planes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scale", "f", "channels"), [(4, 4, 3), (2, 4, 12), (2, 8, 48), (8, 4, 3), (4, 1, 3)])
def test_low_images_stand_at_the_latents_size(scale, f, channels):
    entry = LowResConditioner(SMALL, {"scale": scale, "f": f})
    low = [picture(k, 32 // scale, 64 // scale, 3) for k in range(2)]
    planes = entry(entry.prepare(low)).concat
    assert entry.channels == channels and planes.shape == (2, channels, 32 // f, 64 // f)
    assert planes.min() >= -1 and planes.max() <= 1


def test_a_low_image_of_the_latents_size_is_told_as_it_is():
    low = picture(0, 8, 8, 3)
    entry = LowResConditioner(SMALL, {"scale": 4, "f": 4})
    found = entry(entry.prepare([low])).concat[0].permute(1, 2, 0).numpy()
    assert np.abs(found - (low / 127.5 - 1)).max() < 1e-6


def test_folding_keeps_every_pixel_of_a_larger_low_image():
    low = picture(0, 16, 16, 3)
    entry = LowResConditioner(SMALL, {"scale": 2, "f": 4})
    unfolded = F.pixel_shuffle(entry(entry.prepare([low])).concat, 2)[0].permute(1, 2, 0).numpy()
    assert np.abs(unfolded - (low / 127.5 - 1)).max() < 1e-6


def test_the_first_stage_sees_black_holes_and_the_known_rest():
    seen = {}
    entry = MaskedConditioner(SMALL, {"channels": 3})
    image, hole = np.full((4, 4, 3), 255, np.uint8), np.zeros((4, 4), bool)
    hole[0] = True
    planes = entry(entry.prepare([(image, hole)]), lambda x: seen.setdefault("x", x)).concat
    assert (seen["x"][:, :, 0] == -1).all() and (seen["x"][:, :, 1:] == 1).all()
    assert planes[0, 3].tolist() == [[1.0] * 4] + [[-1.0] * 4] * 3


def test_holes_need_a_first_stage():
    entry = MaskedConditioner(SMALL, {"channels": 3})
    with pytest.raises(ModelError, match="encoder is missing"):
        entry(entry.prepare(values()["masked"]))


def test_a_pixel_without_a_class_adds_nothing():
    facts = SemanticMapConditioner.learn([0, 1, 2, 255], [], 4)
    assert facts["classes"] == 3 and facts["stages"] == 2 and facts["void"]
    entry = SemanticMapConditioner(SMALL, facts)
    assert not entry(entry.prepare([np.full((8, 8), 255, np.uint8)])).concat.any()


def test_names_decide_how_many_classes_there_are_where_the_data_show_fewer():
    assert SemanticMapConditioner.learn([0, 1], ["a", "b", "c"], 8)["classes"] == 3
    assert SemanticMapConditioner.learn([0, 4], ["a", "b"], 8)["names"] == ["a", "b", "2", "3", "4"]


def test_an_index_that_the_model_does_not_know_is_named():
    entry = SemanticMapConditioner(SMALL, FACTS["map"])
    with pytest.raises(InputError, match=r"index 7; this model knows 0 … 2"):
        entry.prepare([np.full((8, 8), 7, np.uint8)])


# --- layouts ----------------------------------------------------------------------------------------------------------


def test_places_are_as_many_as_objects_were_seen_and_at_most_thirty():
    def length(most: int) -> int:
        return LayoutConditioner.learn(SMALL, most, ["a"])["length"]

    assert [length(most) for most in (0, 1, 7, 30, 40)] == [5, 5, 23, 92, 92]


def test_near_points_begin_with_near_codes_and_categories_apart():
    torch.manual_seed(0)
    entry = LayoutConditioner(ConditionSettings(context_dim=64), FACTS["layout"])
    weight = F.normalize(entry.encoder.transformer.token_emb.weight.detach(), dim=1)
    here, beside, far = 40 * 90 + 40, 40 * 90 + 41, 80 * 90 + 5
    assert weight[here] @ weight[beside] > 0.8 and weight[here] @ weight[far] < 0.5
    assert abs(float(weight[0] @ weight[1])) < 0.5
    plain = LayoutConditioner(ConditionSettings(context_dim=64, smooth_places=False), FACTS["layout"])
    weight = F.normalize(plain.encoder.transformer.token_emb.weight.detach(), dim=1)
    assert abs(float(weight[here] @ weight[beside])) < 0.5


GRID_OF_FIVE = {"categories": ["cat", "dog"], "length": 8, "vocabulary": 26, "planes": 3}  # points at quarters


def drawn_boxes(size, *objects, facts=GRID_OF_FIVE) -> torch.Tensor:
    """Planes [coverage, coverage · u, coverage · v] (3, *size); those of dogs count ten times."""
    entry = LayoutConditioner(SMALL, facts)
    with torch.no_grad():
        entry.boxes.codes.weight.copy_(torch.eye(3).reshape(1, 9) * torch.tensor([[1.0], [10.0]]))
    bbox, category = zip(*objects) if objects else (np.zeros((0, 4)), [])
    return entry(entry.prepare([{"bbox": np.array(bbox), "category": category}]), size).concat[0].detach()


def test_boxes_are_drawn_where_they_lie():
    coverage, u, v = drawn_boxes((4, 4), ([0.25, 0, 0.5, 0.25], "cat"), ([0, 0.25, 0.25, 0.75], "dog"))
    assert coverage.tolist() == [[0, 1, 1, 0], [10, 0, 0, 0], [10, 0, 0, 0], [10, 0, 0, 0]]
    assert u.tolist() == [[0, -0.5, 0.5, 0], [0] * 4, [0] * 4, [0] * 4]
    assert torch.allclose(v[:, 0], torch.tensor([0, -20 / 3, 0, 20 / 3])) and not v[:, 1:].any()


def test_cells_are_covered_in_part_and_boxes_add_up():
    coverage = drawn_boxes((2, 2), ([0.25, 0, 0.5, 0.25], "cat"), ([0, 0, 1, 1], "dog"))[0]
    assert coverage.tolist() == [[10.25, 10.25], [10, 10]]


def test_no_objects_and_unknown_categories_draw_nothing():
    assert not drawn_boxes((3, 5)).any()
    entry = LayoutConditioner(SMALL, GRID_OF_FIVE)
    ids = entry.prepare([{"bbox": [[0, 0, 1, 1]], "category": ["dog"]}])["ids"]
    ids[0, 0] = 7
    assert not entry({"ids": ids}, (4, 4)).concat.any()


def test_boxes_are_drawn_in_the_frame_of_the_crop():
    entry = LayoutConditioner(SMALL, GRID_OF_FIVE)
    whole, half = (
        torch.from_numpy(entry.layout.tokens([[0.5, 0, 0.25, 1]], [0], crop=crop))[None]
        for crop in ((0, 0, 1, 1), (0.5, 0, 0.5, 1))
    )
    wide, cut = (entry({"ids": ids}, (4, 4)).concat[0, 0] != 0 for ids in (whole, half))
    assert wide.tolist() == [[False, False, True, False]] * 4 and cut.tolist() == [[True, True, False, False]] * 4


def test_without_planes_a_layout_is_tokens_alone():
    entry = LayoutConditioner(SMALL, FACTS["layout"])
    assert entry.channels == 0 and entry(entry.prepare(values()["layout"]), (4, 4)).concat is None
    assert LayoutConditioner.learn(ConditionSettings(layout_planes=5), 1, ["a"])["planes"] == 5


def entries(names: list[str]) -> list:
    return [
        LayoutConditioner(SMALL, {**FACTS["layout"], "categories": names}),
        ClassConditioner(SMALL, {"class_names": names}),
    ]


@pytest.mark.parametrize(
    ("names", "means"),
    [
        (
            ["7", "1", "5"],
            {1: 1, np.int64(2): 2, "1": 1, "7": 0, "#0": 0, "#2": 2, "0": None, "2": None, 3: None, -1: None},
        ),
        (["cat", "dog"], {"dog": 1, "1": 1, "#1": 1, 0: 0, "2": None, "#2": None, "Dog": None, "-1": None, "": None}),
        (["cat", "9"], {"9": 1, "0": None, "1": None, "#1": 1, "#9": None, "²": None}),  # a number among them
        (["#1", " a"], {"#1": 0, " a": 1, "#0": 0, "1": 1}),
    ],
)
def test_a_number_is_an_index_and_a_text_a_name_first(names, means):
    for entry in entries(names):
        for value, index in means.items():
            if index is not None:
                assert entry.index(value) == index, (names, value)
            else:
                with pytest.raises((InputError, UsageError), match="no such c.*(there are|did you mean)"):
                    entry.index(value)


def test_of_many_names_a_few_are_listed():
    for entry in entries([f"n{k}" for k in range(1000)]):
        with pytest.raises((InputError, UsageError), match=r"among 1000; there are n0, .*n7 … \(1000 in all\)"):
            entry.index("zebra")


def test_an_unknown_category_names_near_ones():
    with pytest.raises(InputError, match="'dogg': no such category among 2; did you mean dog?"):
        LayoutConditioner(SMALL, FACTS["layout"]).index("dogg")


# --- together ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FACTS)
def test_dropping_one_kind_leaves_the_others(kind):
    made = conditions(*FACTS)
    inputs = made.prepare(values())
    found = (
        made.drop(inputs, {kind: torch.tensor([True, False])})
        if CONDITIONERS[kind].droppable
        else made.drop(inputs, {})
    )
    null = made.null(2, inputs)
    for name, tensor in found.items():
        changed = name.startswith(f"{kind}.") and CONDITIONERS[kind].droppable
        assert torch.equal(tensor[0], null[name][0] if changed else inputs[name][0])
        assert torch.equal(tensor[1], inputs[name][1]) and tensor.shape == inputs[name].shape


def test_planes_of_a_task_have_no_null_and_stay():
    made = conditions("map", "lowres", "masked")
    inputs = made.prepare(values())
    null = made.null(2, inputs)
    assert made.droppable == ["map"] and not torch.equal(null["map.index"], inputs["map.index"])
    assert all(torch.equal(null[name], inputs[name]) for name in inputs if not name.startswith("map."))
    with pytest.raises(ModelError, match="has no null"):
        made.null(2)


def test_the_null_of_a_map_is_no_class_at_the_maps_size():
    made = conditions("map")
    assert not made(made.null(2, made.prepare(values())), (4, 4)).concat.any()
    assert made.null(3)["map.index"].tolist() == [[[-1]]] * 3


def test_tokens_join_planes_stack_and_vectors_add():
    made = conditions(*FACTS)
    together = made(made.prepare(values()), (4, 4), encode)
    assert together.context.shape == (2, 1 + 8, 16) and together.vector.shape == (2, 16)
    assert together.concat.shape == (2, 3 + 3 + 5, 4, 4) == (2, made.concat_channels, 4, 4)
    parts = [
        conditions(kind)(conditions(kind).prepare({kind: values()[kind]}), (4, 4), encode).concat for kind in FACTS
    ]
    assert torch.equal(together.concat[:, 3:6], parts[list(FACTS).index("lowres")])


def test_every_condition_is_covered_here():
    assert CONDITIONERS.keys() - FACTS.keys() <= {"text", "tokens"}


@pytest.mark.parametrize("seen", ["ten o’clock – now", "ten o'clock - now"])
def test_typed_and_typographic_signs_are_the_same_words(tmp_path, seen):
    """Captions have ’ and –, keyboards ' and -; a vocabulary of before signs were typed knows the first kind alone."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "ten", "o", "clock", "now", *set(seen) & set("’–'-")]
    (tmp_path / "own").mkdir()
    (tmp_path / "own/vocab.txt").write_text("\n".join(vocabulary))
    (tmp_path / "own/tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "do_lower_case": true}')
    train_vocabulary([seen], 60, tmp_path / "learned")
    for folder in ("own", "learned"):
        tokenizer = load_tokenizer(tmp_path / folder)
        condition = CONDITIONERS["text"](SMALL, {"length": 16, "vocabulary": len(tokenizer)}, tokenizer)
        ids = condition.prepare(["Ten o’clock – now", "ten o'clock - now"])["ids"]
        assert torch.equal(ids[0], ids[1]) and tokenizer.unk_token_id not in ids


@pytest.mark.parametrize("fill", [push_pull_fill, thin_plate_fill])
@pytest.mark.parametrize("shape", [(16, 16), (13, 22), (1, 9), (64, 3)])
def test_what_lies_around_is_spread_over_holes(shape, fill):
    x = torch.rand(2, 3, *shape, generator=torch.Generator().manual_seed(0))
    hole = torch.zeros(2, *shape, dtype=torch.bool)
    hole[0, :, shape[1] // 3 :] = True
    filled = fill(x.masked_fill(hole[:, None], -9.0), hole)
    assert torch.equal(filled[~hole[:, None].expand_as(x)], x[~hole[:, None].expand_as(x)])
    assert filled.min() >= x.min() - 1e-6 and filled.max() <= x.max() + 1e-6  # nothing of what stood in the hole
    ramp = torch.linspace(-1, 1, shape[1]).expand(1, 1, *shape).clone()
    gap = torch.zeros(1, *shape, dtype=torch.bool)
    gap[..., shape[1] // 2] = True
    assert (fill(ramp, gap) - ramp).abs().max() <= 2.5 * 2 / (shape[1] - 1)
    assert torch.equal(fill(x, torch.ones_like(hole)), torch.zeros_like(x))


def test_slopes_go_on_over_the_rim():
    y, x = torch.meshgrid(torch.linspace(-1, 1, 48), torch.linspace(-1, 1, 48), indexing="ij")
    slope = torch.stack([0.4 * x - 0.5 * y, x, 0.3 * x * y])[None]
    hole = torch.zeros(1, 48, 48, dtype=torch.bool)
    hole[0, 12:34, 10:36] = True
    made = [fill(slope.masked_fill(hole[:, None], 9.0), hole) for fill in (thin_plate_fill, push_pull_fill)]
    plate, spread = ((filled - slope)[:, :, hole[0]].square().mean().sqrt() for filled in made)
    assert plate < 0.015 and spread > 2 * plate


@pytest.mark.parametrize("size", [(48, 60), (96, 131), (200, 150)])
def test_patches_continue_a_texture(size):
    """Wavy stripes, which no smooth filling continues; sides that halve to odd ones, and one to three levels."""
    y, x = torch.meshgrid(*(torch.arange(float(side)) for side in size), indexing="ij")
    stripes = torch.stack([torch.sin(x / 2 + torch.sin(y / 9)), torch.cos(x / 3), torch.sin(x / 2)])
    hole = torch.zeros(size, dtype=torch.bool)
    hole[size[0] // 3 : size[0] // 2, size[1] // 3 : size[1] // 2] = True
    hole[-4:, :9] = True
    given = stripes.masked_fill(hole, 7.0)
    filled = patchmatch_fill(given, hole)
    assert filled.shape == stripes.shape and torch.equal(filled[:, ~hole], stripes[:, ~hole])
    smooth = thin_plate_fill(given[None], hole[None])[0]
    error, plain = ((made - stripes)[:, hole].square().mean() for made in (filled, smooth))
    assert error < 0.5 * plain
    assert filled.abs().max() <= 1 + 1e-5 and torch.equal(
        filled, patchmatch_fill(stripes, hole)
    )  # the hole is never looked at


def test_patches_where_none_is_known():
    image = torch.rand(3, 40, 40, generator=torch.Generator().manual_seed(0))
    hole = torch.zeros(40, 40, dtype=torch.bool)
    hole[::4] = True
    hole[:, ::4] = True  # 3x3 pixels are known between the bars, a patch has 5x5
    assert torch.equal(patchmatch_fill(image, hole), thin_plate_fill(image[None], hole[None])[0])
    assert torch.equal(patchmatch_fill(image, torch.zeros_like(hole)), image)
    assert torch.equal(patchmatch_fill(image, torch.ones_like(hole)), torch.zeros_like(image))
    small = image[:, :3, :4]
    assert torch.equal(patchmatch_fill(small, hole[:3, :4]), thin_plate_fill(small[None], hole[None, :3, :4])[0])


def test_fillings_are_what_the_first_stage_sees():
    stripes = np.where(np.arange(64) % 4 < 2, 110, 146).astype(np.uint8)
    image, hole = np.tile(stripes[None, :, None], (64, 1, 3)), np.zeros((64, 64), bool)
    hole[24:40, 24:40] = True
    seen = {}
    for fill in ("black", "smooth", "patches"):
        condition = MaskedConditioner(SMALL, {"channels": 4, "fill": fill})
        condition(condition.prepare([(image, hole)]), lambda x, fill=fill: F.avg_pool2d(seen.setdefault(fill, x), 4))
    inside = torch.from_numpy(hole)
    assert (seen["black"][0, :, inside] == -1).all()
    for fill in ("smooth", "patches"):
        assert (seen[fill][0, :, inside].abs() < 0.25).all()
        assert torch.equal(seen["black"][0, :, ~inside], seen[fill][0, :, ~inside])
    whole = torch.from_numpy(image).permute(2, 0, 1) / 127.5 - 1
    error = {fill: (found[0] - whole)[:, inside].abs().mean() for fill, found in seen.items()}
    assert error["patches"] < 0.3 * error["smooth"]


def test_the_latent_of_the_enlarged_image_stands_beside_the_small_one():
    seen = []
    entry = LowResConditioner(SMALL, {"scale": 4, "f": 4, "latent": 4})
    flat = np.full((4, 6, 3), (255, 0, 51), np.uint8)
    planes = entry(entry.prepare([flat]), lambda x: encode(seen.append(x) or x)).concat
    colours = torch.tensor([1.0, -1.0, -0.6])
    assert planes.shape == (1, entry.channels, 4, 6) == (1, 7, 4, 6)
    assert seen[0].shape == (1, 3, 16, 24) and torch.allclose(seen[0][0, :, 3, 3], colours, atol=1e-6)
    assert torch.allclose(planes[0, :, 1, 1], torch.cat([colours, colours, colours[:1]]), atol=1e-6)
    entry(entry.prepare([picture(3, 4, 6, 3)]), lambda x: encode(seen.append(x) or x))
    assert seen[1].abs().max() <= 1  # bicubic interpolation overshoots
    with pytest.raises(ModelError, match="encoder is missing"):
        entry(entry.prepare([flat]))


# --- vocabularies of others -------------------------------------------------------------------------------------------


def bert_words(path):
    """A vocabulary in BERT's form, of few words."""
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "circle", "##s"]) + "\n")
    return path


@pytest.mark.parametrize("form", ["file", "folder", "folder with its class"])
def test_a_vocabulary_of_words_alone_is_read_as_berts(form, tmp_path):
    from ldmcli.networks.conditioners import load_tokenizer

    file = bert_words(tmp_path / "vocab.txt")
    if form == "folder with its class":
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "do_lower_case": true}')
    found = load_tokenizer(file if form == "file" else tmp_path)
    assert len(found) == 9 and found("A red Circles")["input_ids"] == [2, 5, 6, 7, 8, 3]


def test_a_text_model_trains_with_a_vocabulary_by_file_and_takes_it_along(tmp_path):
    import tiny

    file = bert_words(tmp_path / "words.txt")
    tiny.train_ldm(tmp_path / "run", "none", "--condition", "text", "--set", f"condition.vocabulary={file}", steps=1)
    file.unlink()
    ending = tiny.ldm(
        "sample",
        "--model",
        tmp_path / "run",
        "--prompt",
        "a red circle",
        "-n",
        1,
        "--steps",
        1,
        "--out",
        tmp_path / "out",
    )
    assert ending.code == 0, ending.stderr


def test_without_a_network_the_published_text_models_say_what_to_give_before_data_is_read(tmp_path):
    import tiny

    ending = tiny.ldm(
        "train-ldm",
        "--recipe",
        "txt2img-1p4B",
        "--data",
        "/no/such/data",
        "--autoencoder",
        "none",
        "--set",
        "diffusion.channels=8",
        "--set",
        "condition.context_dim=16",
        "--size",
        16,
        "--set",
        "diffusion.groups=4",
        "--out",
        tmp_path / "run",
    )
    assert ending.code == 3 and ending.stderr.count("ldm: ") == 1
    assert "bert-base-uncased" in ending.line and "--set condition.vocabulary=FILE" in ending.line
