"""The calls of the Python interface take lists, tuples, arrays, tensors and pictures alike, and refuse by name what
cannot be meant."""

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import ldmcli
from ldmcli.core.errors import LdmError

SIZE = 16
BOX = [[0.1, 0.2, 0.5, 0.6]]
LAYOUT = {"objects": [{"bbox": BOX[0], "category": "star"}]}
MAP = np.arange(SIZE * SIZE, dtype=np.uint8).reshape(SIZE, SIZE) % 3


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calls")
    data = ("--data", "shapes", "--limit", 8, "--size", SIZE)
    tiny.train_ae(folder / "kl", data=data, steps=1)
    tiny.train_ae(folder / "vq", "--reg", "vq", "--codebook-size", 16, data=data, steps=1)
    for name, task in (("class", ()), ("text", ()), ("layout+map", ()), ("none", ("--task", "sr", "--scale", 2))):
        tiny.train_ldm(folder / name, folder / "kl", "--condition", name, *task, data=data, steps=1)
    return {path.name: ldmcli.load(path) for path in folder.iterdir() if (path / "run.json").exists()}


def forms(array: np.ndarray) -> dict:
    """The same numbers in every form."""
    whole = np.issubdtype(array.dtype, np.integer)
    dtypes = ("int16", "int32", "int64", "uint8") if whole else ("float16", "float32", "float64")
    found = {
        "list": array.tolist(),
        "tuple": tuple(array.tolist()),
        "list of arrays": list(array),
        "list of tensors": [torch.from_numpy(np.array(one)) for one in array],
        "big-endian": array.astype(array.dtype.newbyteorder(">")),
        "tensor": torch.from_numpy(array.copy()),
        "strided": np.stack([array, array], axis=-1)[..., 0],
    }
    found |= {f"array {name}": array.astype(name) for name in dtypes}
    found |= {f"tensor {name}": torch.from_numpy(array.astype(name)) for name in dtypes}
    return found | (
        {}
        if whole
        else {
            "bfloat16": torch.from_numpy(array).bfloat16(),
            "with a gradient": torch.from_numpy(array).requires_grad_(),
        }
    )


def halves(*shape: int, seed: int = 0) -> np.ndarray:
    """Float32 numbers that every float type holds exactly."""
    return np.random.default_rng(seed).integers(-7, 8, shape).astype(np.float32) / 8


Z, T, TOKENS = halves(2, 3, 4, 4), np.array([3, 40]), halves(2, 5, 16)
ZEROS = 0 * TOKENS
NUMBERS = {  # call -> (numbers, what is called with them)
    "decode": (Z, lambda m, x: m["kl"].decode(x)),
    "decode_unscaled": (Z, lambda m, x: m["kl"].decode_unscaled(x)),
    "quantize": (Z, lambda m, x: m["vq"].quantize(x)[1]),
    "predict z_t": (Z, lambda m, x: m["class"].predict(x, 3, TOKENS[:1])),
    "predict t": (T, lambda m, x: m["class"].predict(Z, x, TOKENS)),
    "predict context": (TOKENS, lambda m, x: m["class"].predict(Z, T, x)),
    "predict concat": (halves(2, 15, 4, 4), lambda m, x: m["none"].predict(Z, T, concat=x)),
    "predict classes": (np.array([1, 4]), lambda m, x: m["class"].predict(Z, T, classes=x)),
    "embed classes": (np.array([1, 4]), lambda m, x: m["class"].embed(classes=x).context),
    "embed tokens": (np.array([[1, 2, 3], [4, 0, 1]]), lambda m, x: m["text"].embed(tokens=x).context),
    "embed map": (MAP, lambda m, x: m["layout+map"].embed(map=x).concat),
    "sample_latents z_T": (Z, lambda m, x: m["class"].sample_latents(x, context=TOKENS[:1], guidance=1, steps=2)),
    "sample_latents context": (TOKENS, lambda m, x: m["class"].sample_latents(Z, context=x, uncond=ZEROS, steps=1)),
    "sample_latents uncond": (TOKENS, lambda m, x: m["class"].sample_latents(Z, context=ZEROS, uncond=x, steps=1)),
    "sample_latents concat": (halves(2, 15, 4, 4), lambda m, x: m["none"].sample_latents(Z, concat=x, steps=1)),
    "sample classes": (np.array([1, 4]), lambda m, x: drawn(m["class"].sample(classes=x, steps=1))),
    "sample map": (MAP, lambda m, x: drawn(m["layout+map"].sample(map=x, layout=LAYOUT, steps=1))),
    "frechet": (halves(3), lambda m, x: ldmcli.frechet(x, np.eye(3), np.zeros(3), np.eye(3))),
    "frechet sigma": (np.eye(3, dtype=np.float32), lambda m, x: ldmcli.frechet([1, 1, 1], 2 * np.eye(3), [0] * 3, x)),
    "features": (halves(9, 4), lambda m, x: measured(x, halves(9, 4, seed=1), ["fid", "pr"])),
    "logits": (halves(12, 4), lambda m, x: measured(halves(12, 4), None, ["is"], logits=x)),
}


def measured(*features, **more) -> list[float]:
    return list(ldmcli.metrics_from_features(*features, **more).values())


def drawn(images: list) -> np.ndarray:
    return np.stack([np.asarray(one) for one in images])


@pytest.mark.parametrize("call", NUMBERS)
def test_numbers_come_in_any_form(call, models):
    array, function = NUMBERS[call]
    expected = np.asarray(function(models, array))
    assert np.isfinite(expected).all() and expected.size
    for name, form in forms(array).items():
        if "map" in call and name.startswith("list of"):
            continue  # several maps
        assert np.array_equal(np.asarray(function(models, form)), expected), name
    if array.ndim > 1 and call not in ("frechet sigma", "features", "logits") and "map" not in call:
        assert np.asarray(function(models, array[:1])).shape[0] in (1, 2)  # one row
        assert np.array_equal(np.asarray(function(models, array[0])), np.asarray(function(models, array[:1])))


BYTES = np.random.default_rng(1).integers(0, 256, (2, SIZE, SIZE, 3), dtype=np.uint8)
PICTURES = {
    "uint8": BYTES,
    "int64": BYTES.astype(np.int64),
    "tensor": torch.from_numpy(BYTES),
    "nested lists": BYTES.tolist(),
    "channels first": torch.from_numpy(BYTES).permute(0, 3, 1, 2),
    "list": list(BYTES),
    "PIL": [*map(Image.fromarray, BYTES)],
    "tuple of both": (BYTES[0], Image.fromarray(BYTES[1])),
    "floats": torch.from_numpy(BYTES).permute(0, 3, 1, 2) / 127.5 - 1,
    "float arrays": list((BYTES / 127.5 - 1).transpose(0, 3, 1, 2)),
}
OF_PICTURES = {
    "encode": lambda m, x: m["kl"].encode(x),
    "moments": lambda m, x: torch.cat(m["kl"].moments(x)),
    "vq moments": lambda m, x: m["vq"].moments(x),
    "upscale": lambda m, x: drawn(m["none"].upscale(x, steps=1)),
}


@pytest.mark.parametrize("call", OF_PICTURES)
def test_pictures_come_in_any_form(call, models):
    expected = np.asarray(OF_PICTURES[call](models, BYTES))
    for name, form in PICTURES.items():
        assert np.abs(np.asarray(OF_PICTURES[call](models, form), float) - expected).max() < 1e-4, name
    one = np.asarray(OF_PICTURES[call](models, BYTES[0]), float)
    assert np.abs(one[0] - expected[0]).max() < 1e-4 and len(one) == len(expected) // 2


def test_the_rest_of_what_is_given_comes_in_any_form(models, tmp_path):
    text, both = models["text"], models["layout+map"]
    words = text.embed(["a star", "a circle"]).context
    for form in (("a star", "a circle"), np.array(["a star", "a circle"])):
        assert torch.equal(text.embed(form).context, words)
    assert torch.equal(text.embed(np.str_("a star")).context, words[:1])
    names = models["class"].class_names
    by_name = models["class"].embed(classes=names[2])
    for form in (
        2,
        [2],
        np.int32(2),
        torch.tensor(2),
        torch.tensor([2]),
        [torch.tensor(2)],
        (names[2],),
        np.array([names[2]]),
    ):
        assert torch.equal(models["class"].embed(classes=form).context, by_name.context)
    told = both.embed(layout=LAYOUT).context
    for form in (
        [LAYOUT],
        {"bbox": BOX, "category": ["star"]},
        {"bbox": np.array(BOX), "category": np.array(["star"])},
        {"bbox": torch.tensor(BOX, dtype=torch.float64), "category": [3]},
        {"bbox": BOX, "category": torch.tensor([3])},
        {"objects": [{"bbox": np.array(BOX[0]), "category": np.int64(3)}]},
    ):
        assert torch.equal(both.embed(layout=form).context, told)
    image = Image.fromarray(MAP)
    image.save(tmp_path / "map.png")
    for form in (image, tmp_path / "map.png", str(tmp_path / "map.png"), [MAP]):
        assert torch.equal(both.embed(map=form).concat, both.embed(map=MAP).concat)
    assert both.embed(layout=LAYOUT, map=[MAP, MAP]).concat.shape[0] == 2
    for a in (
        BYTES[0],
        BYTES[0].tolist(),
        torch.from_numpy(BYTES[0]),
        Image.fromarray(BYTES[0]),
        BYTES[0].astype(np.int32),
    ):
        assert ldmcli.image_metrics(a, BYTES[1]) == ldmcli.image_metrics(BYTES[0], BYTES[1])
    mask = np.zeros((SIZE, SIZE), bool)
    mask[4:9, 5:9] = True
    filled = drawn(models["class"].inpaint(BYTES[0], mask, classes=2, steps=1, resample=1))
    for form in (torch.from_numpy(mask), [mask], mask.astype(np.uint8) * 255, Image.fromarray(mask)):
        assert np.array_equal(filled, drawn(models["class"].inpaint(BYTES[0], form, classes=2, steps=1, resample=1)))


NAN = np.where(Z > 0.8, np.nan, Z)
REFUSED = {
    "latents of four channels": (lambda m: m["kl"].decode(halves(1, 4, 2, 2)), r"float32 \(1, 4, 2, 2\).*\(B, 3, h, w"),
    "latents of two axes": (lambda m: m["kl"].decode(halves(4, 4)), "must have 4 axes"),
    "latents of NaN": (lambda m: m["kl"].decode(NAN), "NaN or infinite"),
    "latents of truth": (lambda m: m["kl"].decode(Z > 0), "must hold numbers"),
    "latents of text": (lambda m: m["kl"].decode([["a"]]), "no array of numbers"),
    "ragged latents": (lambda m: m["kl"].decode([[1.0], [1.0, 2.0]]), "equally long"),
    "latents that are none": (lambda m: m["kl"].decode(None), "z: NoneType"),
    "latents that are an object": (lambda m: m["kl"].decode(object()), "z: object"),
    "a quantiser where there is none": (lambda m: m["kl"].quantize(Z), "no codebook"),
    "no pictures": (lambda m: m["kl"].encode([]), "an empty list"),
    "pictures of two sizes": (lambda m: m["kl"].encode([BYTES[0], BYTES[0][:8]]), "of several sizes"),
    "pictures of four channels": (lambda m: m["kl"].encode(BYTES[..., [0, 1, 2, 0]]), r"uint8 \(2, 16, 16, 4\)"),
    "floats with channels last": (lambda m: m["kl"].encode(BYTES / 255.0), r"floats \(N, 3, H, W\) in \[-1, 1\]"),
    "floats up to 255": (lambda m: m["kl"].encode(BYTES.transpose(0, 3, 1, 2).astype(float)), "floats up to 255"),
    "pictures of 16 bits": (lambda m: m["kl"].encode(BYTES.astype(np.int32) * 257), "pixels are 0 … 255"),
    "pictures of truth": (lambda m: m["kl"].encode(BYTES > 9), "bool"),
    "pictures of NaN": (lambda m: m["kl"].encode(np.full((1, 3, 16, 16), np.nan)), "NaN"),
    "pictures of text": (lambda m: m["kl"].encode("a"), "images: "),
    "a size that f does not divide": (lambda m: m["kl"].encode(BYTES[:, :15]), "15"),
    "timesteps of another batch": (lambda m: m["class"].predict(Z, [1, 2, 3], TOKENS), "t: 3 rows for a batch of 2"),
    "timesteps of text": (lambda m: m["class"].predict(Z, "a", TOKENS), "t: "),
    "tokens of another width": (lambda m: m["class"].predict(Z, 1, halves(2, 5, 7)), "tokens of 7 numbers.* reads 16"),
    "tokens of another batch": (lambda m: m["class"].predict(Z, 1, halves(3, 5, 16)), "context: 3 rows"),
    "planes that are not read": (lambda m: m["class"].predict(Z, 1, TOKENS, halves(2, 1, 4, 4)), "1 planes.* reads 0"),
    "planes that lack": (lambda m: m["none"].predict(Z, 1), "0 planes.* reads 15"),
    "planes of another size": (lambda m: m["none"].predict(Z, 1, concat=halves(2, 15, 2, 4)), "4x2 for latents of 4x4"),
    "an unknown class": (lambda m: m["class"].predict(Z, 1, classes=[99, 0]), "no such class"),
    "half a class": (lambda m: m["class"].embed(classes=[1.5]), "1.5 is neither"),
    "a class of truth": (lambda m: m["class"].sample(classes=[True]), "True is neither"),
    "classes for a text model": (lambda m: m["text"].embed(classes=[1]), "without class"),
    "a prompt of numbers": (lambda m: m["text"].embed([4]), "4 is no text"),
    "nothing to embed": (lambda m: m["text"].embed(), "nothing is given; this model takes --prompt"),
    "tokens of halves": (lambda m: m["text"].embed(tokens=[[0.5]]), "whole numbers"),
    "too many tokens": (lambda m: m["text"].embed(tokens=np.zeros((1, 400), int)), "at most"),
    "tokens beyond the vocabulary": (lambda m: m["text"].embed(tokens=[[1, 10**6]]), "this model knows 0 …"),
    "layouts for two, maps for three": (lambda m: m["layout+map"].embed(layout=[LAYOUT] * 2, map=[MAP] * 3), "2 rows"),
    "boxes without categories": (lambda m: m["layout+map"].embed(layout={"bbox": BOX, "category": []}), "equally long"),
    "a category of nothing": (lambda m: m["layout+map"].embed(layout={"bbox": BOX, "category": [None]}), "is a name"),
    "a map of floats": (lambda m: m["layout+map"].embed(map=MAP / 2.0), "a map is an array"),
    "a map of three axes": (lambda m: m["layout+map"].embed(map=[np.zeros((4, 4, 3), int)]), "a map is an array"),
    "noise of another shape": (lambda m: m["class"].sample_latents(halves(1, 3, 4, 4, 2)), "must have 4 axes"),
    "an unknown setting": (lambda m: m["class"].sample_latents(Z, stepz=3), "stepz"),
    "no images": (lambda m: m["class"].sample(n=0), "n: 0"),
    "a mask of floats": (lambda m: m["class"].inpaint(BYTES[0], np.zeros((16, 16))), "a mask is bool"),
    "a mask of another size": (lambda m: m["class"].inpaint(BYTES[0], np.ones((9, 16), bool)), "of one size"),
    "no mask": (lambda m: m["class"].inpaint(BYTES[0], None), "mask: "),
    "a picture that is none": (lambda m: m["none"].upscale(3.5), "image: float is no picture"),
    "a file that is none": (lambda m: m["none"].upscale("gone.png"), "gone.png"),
    "upscaling by a model that does not": (lambda m: m["class"].upscale(BYTES[0]), "draws images from nothing"),
    "inpainting by a model that does not": (lambda m: m["none"].inpaint(BYTES[0], MAP > 1), "makes images larger"),
    "means of another size": (lambda m: ldmcli.frechet([1, 2], np.eye(3), [1, 2, 3], np.eye(3)), "shapes"),
    "features of one axis": (lambda m: ldmcli.metrics_from_features([1.0, 2.0], [1.0, 2.0]), r"\(N, D\)"),
    "features of text": (lambda m: ldmcli.metrics_from_features([["a"]], [["b"]]), "no array of numbers"),
    "images of floats": (lambda m: ldmcli.image_metrics(BYTES[0] / 255, BYTES[1]), "need uint8"),
    "images of two sizes": (lambda m: ldmcli.image_metrics(BYTES[0], BYTES[1][:8]), "same size"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_meant_is_refused_by_name(what, models):
    call, message = REFUSED[what]
    with pytest.raises(LdmError, match=message) as error:
        call(models)
    assert "\n" not in str(error.value)
