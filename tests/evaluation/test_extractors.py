"""Which networks measure: EfficientNet-lite2, folders of transformers, and encoders of one's own."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_cases import relative, shared
from PIL import Image

from ldmcli.evaluation.extractors import FEATURES, open_extractor

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
