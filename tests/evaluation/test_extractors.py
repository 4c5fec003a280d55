"""Which networks measure: EfficientNet-lite2, folders of transformers, and encoders of one's own."""

import json
import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from golden_cases import relative, shared
from PIL import Image
from safetensors.torch import load_file, save_file

from ldmcli.core.errors import InputError, UsageError
from ldmcli.core.files import sha256_file, tensors_hash
from ldmcli.evaluation.evaluate import evaluate
from ldmcli.evaluation.extractors import FEATURES, check_features, open_extractor
from ldmcli.evaluation.own_encoders import find_encoder
from ldmcli.networks.feature_nets import IMAGENET_MEAN, IMAGENET_STD
from ldmcli.networks.vision_folders import CLIP_MEAN, CLIP_STD

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def photos():
    """Photographs of 224 x 224 px by name."""
    return {path.stem: np.array(Image.open(path)) for path in shared("photos").glob("*.png")}


# --- EfficientNet-lite2 --------------------------------------------------------------------------------------------


def lite2_by_hand(state, x):
    """Pooled features and logits from the weights alone: x (B, 3, 260, 260) in [0, 255]. BatchNorm as it is written."""

    def norm(h, name):
        mean, var, weight, bias = (
            state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(h, mean, var, weight, bias, eps=1e-3)

    def same(h, name, stride):
        kernel = state[f"{name}.weight"]
        side, size = kernel.shape[-1], h.shape[-1]
        total = max((math.ceil(size / stride) - 1) * stride + side - size, 0)
        padded = F.pad(h, (total // 2, total - total // 2) * 2)
        return F.conv2d(padded, kernel, stride=stride, groups=h.shape[1] if kernel.shape[1] == 1 else 1)

    h = F.relu6(norm(same((x - 127) / 128, "_conv_stem", 2), "_bn0"))
    strides = [
        s if i == 0 else 1 for repeats, s in zip((1, 3, 3, 4, 4, 5, 1), (1, 2, 2, 2, 1, 2, 1)) for i in range(repeats)
    ]
    for i, stride in enumerate(strides):
        name, inner = f"_blocks.{i}", h
        if f"{name}._expand_conv.weight" in state:
            inner = F.relu6(norm(F.conv2d(inner, state[f"{name}._expand_conv.weight"]), f"{name}._bn0"))
        inner = F.relu6(norm(same(inner, f"{name}._depthwise_conv", stride), f"{name}._bn1"))
        inner = norm(F.conv2d(inner, state[f"{name}._project_conv.weight"]), f"{name}._bn2")
        h = h + inner if stride == 1 and inner.shape == h.shape else inner
    pooled = F.relu6(norm(F.conv2d(h, state["_conv_head.weight"]), "_bn1")).mean((2, 3))
    return pooled, F.linear(pooled, state["_fc.weight"], state["_fc.bias"])


def test_lite2_is_what_its_weights_say_and_sees_what_lite0_sees(photos):
    lite2 = open_extractor("effnet-lite2", CPU)
    assert (lite2.dim, lite2.metric_key, lite2.title) == (1280, "fd_effnet_lite2", "EfficientNet-lite2")
    assert lite2.known and "260x260" in lite2.protocol["resize"]
    found = [torch.from_numpy(values) for values in lite2.features_and_logits(list(photos.values()))]
    x = torch.stack([torch.tensor(photo) for photo in photos.values()]).permute(0, 3, 1, 2).float()
    x = F.interpolate(x, size=(260, 260), mode="bicubic", antialias=True).clamp(0, 255)
    state = torch.load(FEATURES["effnet-lite2"](), weights_only=True)
    for ours, theirs in zip(found, lite2_by_hand(state, x), strict=True):
        assert relative(ours, theirs) < 1e-4
    expected = json.loads(shared("photos", "efficientnet_lite0.json").read_text())
    seen = dict(zip(photos, found[1].softmax(1).argmax(1).tolist()))
    assert {name: seen[name] for name in ("bee", "coffee")} == {n: expected[n]["top1"][0] for n in ("bee", "coffee")}
    assert 281 <= seen["chelsea"] <= 285  # a cat: tabby, tiger, Persian, Siamese, Egyptian


@pytest.mark.parametrize("name", ["effnet-lite0", "effnet-lite2"])
def test_a_file_of_either_lite_is_told_from_the_other(name):
    path = FEATURES[name]()
    extractor = open_extractor(str(path), CPU)
    assert (extractor.name, extractor.known) == (name, True)
    assert extractor.network_name == f"{name}@{extractor.sha256[:12]}"


# --- folders of transformers ---------------------------------------------------------------------------------------

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
PREPARED = {
    "do_center_crop": True,
    "crop_size": {"height": 28, "width": 28},
    "size": {"shortest_edge": 32},
    "resample": 2,
    "image_mean": [0.4, 0.5, 0.6],
    "image_std": [0.2, 0.3, 0.4],
    "rescale_factor": 1 / 255,
}


def tiny_dinov2(folder):
    torch.manual_seed(0)
    transformers.Dinov2Model(transformers.Dinov2Config(**TINY)).save_pretrained(folder)
    return folder, lambda net, x: net(x).last_hidden_state[:, 0], transformers.Dinov2Model


def tiny_clip(folder):
    torch.manual_seed(1)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    parts = {"text_config": small | {"vocab_size": 8}, "vision_config": TINY | {"intermediate_size": 16}}
    transformers.CLIPModel(transformers.CLIPConfig(**parts, projection_dim=12)).save_pretrained(folder)

    def projected(net, x):
        return net.visual_projection(net.vision_model(pixel_values=x).pooler_output)

    return folder, projected, transformers.CLIPModel


def tiny_clip_vision(folder, kind="CLIPVisionModel"):
    torch.manual_seed(2)
    config = transformers.CLIPVisionConfig(**TINY, intermediate_size=16, projection_dim=12)
    getattr(transformers, kind)(config).save_pretrained(folder)
    return folder, lambda net, x: net(pixel_values=x)[0 if "Projection" in kind else 1], getattr(transformers, kind)


def tiny_clip_projected(folder):
    return tiny_clip_vision(folder, "CLIPVisionModelWithProjection")


def pictures(n=3, size=(40, 50), seed=0):
    return list(np.random.default_rng(seed).integers(0, 256, (n, *size, 3), dtype=np.uint8))


@pytest.mark.parametrize("prepared", [None, PREPARED])
@pytest.mark.parametrize(
    "make, name, dim",
    [
        (tiny_dinov2, "dinov2-16x2p14", 16),
        (tiny_clip, "clip-16x2p14", 12),
        (tiny_clip_vision, "clip-16x2p14", 16),
        (tiny_clip_projected, "clip-16x2p14", 12),
    ],
)
def test_a_folder_gives_what_transformers_gives(tmp_path, make, name, dim, prepared):
    folder, features, kind = make(tmp_path / "net")
    size, rule, (mean, std) = (28, "bicubic", (CLIP_MEAN, CLIP_STD))
    if kind is transformers.Dinov2Model:
        size, (mean, std) = 224, (IMAGENET_MEAN, IMAGENET_STD)
    if prepared:
        (folder / "preprocessor_config.json").write_text(json.dumps(prepared))
        rule, mean, std = "bilinear", prepared["image_mean"], prepared["image_std"]
    extractor = open_extractor(str(folder), CPU)
    assert (extractor.name, extractor.dim) == (name, dim)
    assert extractor.metric_key == f"fd_{name.replace('-', '_')}"
    assert extractor.sha256 == sha256_file(folder / "model.safetensors") and not extractor.known
    assert ("middle 28x28" in extractor.protocol["resize"]) == (prepared is not None)
    x = torch.from_numpy(np.stack(pictures())).permute(0, 3, 1, 2).float()
    x = F.interpolate(x, size=(32, 40) if prepared else (size, size), mode=rule, antialias=True).clamp(0, 255)
    x = x[..., 2:30, 6:34] if prepared else x
    x = (x / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    with torch.no_grad():
        expected = features(kind.from_pretrained(folder).eval(), x)
    found = torch.from_numpy(extractor.features(pictures()))
    assert found.shape == (3, dim) and relative(found, expected) < 1e-4


def test_what_prepares_the_pictures_is_part_of_the_network(tmp_path):
    folder, _, _ = tiny_dinov2(tmp_path / "net")
    first = open_extractor(folder, CPU)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPARED | {"image_mean": [0.5, 0.5, 0.5]}))
    second = open_extractor(folder, CPU)
    assert first.sha256 == second.sha256 and first.protocol["resize"] != second.protocol["resize"]
    assert first.identity != second.identity and open_extractor("effnet-lite0", CPU).identity.startswith("579344248a93")


def without_a_tensor(folder):
    state = load_file(folder / "model.safetensors")
    del state["layernorm.weight"]
    save_file(state, folder / "model.safetensors")


def with_nan(folder):
    state = load_file(folder / "model.safetensors")
    save_file(state | {"layernorm.weight": torch.full((16,), math.nan)}, folder / "model.safetensors")


def pickled_only(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def prepares(**changed):
    return lambda folder: (folder / "preprocessor_config.json").write_text(json.dumps(PREPARED | changed))


def configures(**changed):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changed))

    return change


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "damaged"),
        (lambda folder: (folder / "config.json").write_text("[]"), "not a JSON object"),
        (configures(model_type="bert"), "model_type 'bert'; networks that measure are dinov2, clip"),
        (configures(hidden_size="many"), "hidden_size = 'many'"),
        (configures(num_channels=1), "takes 1 channels"),
        (configures(hidden_size=32), "not the weights of its config.json"),
        (pickled_only, "a pickled file is not read"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"no"), "model.safetensors"),
        (without_a_tensor, "layernorm.weight is missing"),
        (with_nan, "NaN or Inf in"),
        (prepares(resample=0), "resample 0"),
        (prepares(do_resize=False), "do_resize is false"),
        (prepares(size={"height": 28, "width": 30}, do_center_crop=False), "size = "),
        (prepares(crop_size=40), "a shorter side of 32 px needs a crop_size"),
        (prepares(image_std=[0, 1, 1]), "must be above 0"),
        (prepares(image_mean=0.5), "three numbers"),
    ],
)
def test_a_folder_that_holds_no_network_is_refused_in_one_line(tmp_path, spoil, said):
    folder, _, _ = tiny_dinov2(tmp_path / "net")
    spoil(folder)
    with pytest.raises(InputError) as caught:
        open_extractor(str(folder), CPU)
    assert said in str(caught.value) and str(folder) in str(caught.value) and "\n" not in str(caught.value)


# --- encoders of one's own -----------------------------------------------------------------------------------------

GOOD = """
import torch

class Means:
    name, dim, size = "means", 3, None

    def __call__(self, images):
        return images.float().mean((1, 2))

class Linear(torch.nn.Module):
    name, dim, size, rule = "Linear-8", 5, 8, "bilinear (antialiased)"

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(192, 5)

    def forward(self, images):
        return self.layer(images.flatten(1) / 255)

def make():
    return Linear()

at_hand = Means()
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A file with good encoders, which can be imported, too."""
    (tmp_path / "of_mine.py").write_text(GOOD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "of_mine", raising=False)
    return tmp_path / "of_mine.py"


@pytest.mark.parametrize("given", ["of_mine.py:Means", "of_mine.py:at_hand", "of_mine:Means", "of_mine:at_hand"])
def test_an_encoder_is_found_in_a_file_and_in_a_module(own, given):
    extractor = open_extractor(given, CPU)
    assert (extractor.name, extractor.dim, extractor.metric_key) == ("means", 3, "fd_means")
    assert extractor.title == "means" and extractor.protocol["resize"] == "none"
    assert extractor.sha256 == sha256_file(own)
    images = [*pictures(2), *pictures(9, (5, 6)), *pictures(1, seed=1)]
    expected = np.stack([image.astype(np.float64).mean((0, 1)) for image in images])
    features, logits = extractor.features_and_logits(images)
    assert np.allclose(features, expected, rtol=1e-5) and logits.shape == (12, 0)


def test_a_module_of_torch_is_known_by_its_weights_and_its_code(own):
    extractor = open_extractor(f"{own}:make", CPU)
    linear = sys.modules["ldm_encoder_of_mine"].Linear()
    assert extractor.metric_key == "fd_linear_8" and extractor.sha256 == tensors_hash(linear.state_dict())
    x = torch.from_numpy(np.stack(pictures())).permute(0, 3, 1, 2).float()
    x = F.interpolate(x, size=(8, 8), mode="bilinear", antialias=True)
    with torch.no_grad():
        assert relative(torch.from_numpy(extractor.features(pictures())), linear(x)) < 1e-4
    own.write_text(GOOD.replace("/ 255", "/ 256"))
    again = open_extractor(f"{own}:make", CPU)
    assert again.sha256 == extractor.sha256 and again.protocol["layer"] != extractor.protocol["layer"]


def test_an_encoder_at_hand_measures_in_a_document_that_names_it(own, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for k, image in enumerate(pictures(6, (16, 16), seed=ord(folder))):
            Image.fromarray(image).save(tmp_path / folder / f"{k}.png")
    encoder = find_encoder(f"{own}:make").encoder
    found = evaluate(pairs=(tmp_path / "a", tmp_path / "b"), features=encoder, metrics=("fid", "kid", "is"))
    assert found["metrics"]["fd_linear_8"] > 0 and found["metrics"]["kid_linear_8_mean"] is not None
    assert found["metrics"]["is_linear_8_mean"] is None and "Linear-8 has no classes" in str(found["warnings"])
    assert found["extractor"]["weights_sha256"] == tensors_hash(encoder.state_dict())
    named = evaluate(pairs=(tmp_path / "a", tmp_path / "b"), features=f"{own}:make", metrics=("fid",))
    assert named["metrics"]["fd_linear_8"] == pytest.approx(found["metrics"]["fd_linear_8"], rel=1e-9)


ENCODER = """
import numpy as np, torch

class E:
    name, dim, size = {name!r}, {dim!r}, {size!r}
{more}
    def __call__(self, images):
        return {gives}
"""


def encoder(name="mine", dim=2, size=8, gives="torch.zeros(len(images), 2)", more=""):
    return ENCODER.format(name=name, dim=dim, size=size, gives=gives, more=more)


@pytest.mark.parametrize(
    "code, said",
    [
        ("import no_such_module", "No module named 'no_such_module' (bad.py, line 1"),
        ("class E:", "IndentationError: expected an indented block"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("x = 1", "has no E"),
        ("E = 5", "an encoder has a name, and this int has none"),
        ("class E:\n    def __init__(self, a): pass", "TypeError"),
        ("def E():\n    return {}['key']", "KeyError: 'key' (bad.py, line 2, in E)"),
        ("class E:\n    name, dim, size = 'mine', 2, 8", "cannot be called"),
        (encoder(name="my encoder"), "name = 'my encoder'"),
        (encoder(name="m" * 41), "at most 40"),
        (encoder(name="effnet-lite0"), "as a network that is known here"),
        (encoder(name="Inception"), "as a network that is known here"),
        (encoder(dim=0), "dim = 0"),
        (encoder(dim=2.0), "dim = 2.0"),
        (encoder(size=True), "size = True"),
        (encoder(more="    rule = 'nearest'"), "rule = 'nearest'; choose one of"),
        (encoder(more="    weights = 'no-such.pt'"), "weights = 'no-such.pt'"),
        (encoder(gives="torch.zeros(2, len(images))"), "gives features of (2, 8), not (8, 2)"),
        (encoder(gives="torch.zeros(len(images), 3)"), "gives features of (8, 3), not (8, 2)"),
        (encoder(gives="[[0, 0]] * len(images)"), "gives a list"),
        (encoder(gives="torch.zeros(len(images), 2).long()"), "gives torch.int64"),
        (encoder(gives="np.full((len(images), 2), np.nan)"), "gives NaN or Inf"),
        (encoder(gives="np.full((len(images), 2), 1e300)"), "gives NaN or Inf"),
        (encoder(gives="images.no_such"), "AttributeError: 'Tensor' object has no attribute 'no_such' (bad.py, line 8"),
    ],
)
def test_an_encoder_that_is_none_is_refused_in_one_line(tmp_path, code, said):
    (tmp_path / "bad.py").write_text(code)
    with pytest.raises(InputError) as caught:
        open_extractor(f"{tmp_path / 'bad.py'}:E", CPU).features(pictures())
    assert said in str(caught.value) and "bad.py" in str(caught.value) and "\n" not in str(caught.value)


def test_an_encoder_that_is_blind_is_said_to_be(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for k, image in enumerate(pictures(3, (8, 8), seed=ord(folder))):
            Image.fromarray(image).save(tmp_path / folder / f"{k}.png")
    (tmp_path / "blind.py").write_text(encoder())
    given = {"pairs": (tmp_path / "a", tmp_path / "b"), "metrics": ("fid",)}
    found = evaluate(**given, features=f"{tmp_path / 'blind.py'}:E")
    assert found["metrics"]["fd_mine"] == 0 and "mine sees no difference" in str(found["warnings"])
    for nothing in (",", [], ()):
        with pytest.raises(UsageError, match="names no network"):
            evaluate(**given, features=nothing)
    with pytest.raises(UsageError, match="train.eval_features a,b: one network measures here"):
        check_features("a,b", "train.eval_features")


def test_code_that_is_not_there_is_named(tmp_path):
    for given, said in ((f"{tmp_path}/none.py:E", "none.py: no such file"), ("no_such_package.x:E", "no_such_package")):
        with pytest.raises(InputError, match=said):
            open_extractor(given, CPU)
    with pytest.raises(InputError, match="says which encoder it is"):
        namespace = {"__name__": "nowhere"}
        exec(encoder(), namespace)
        open_extractor(namespace["E"](), CPU)
