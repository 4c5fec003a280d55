"""Feature extractors: recorded values, the rule of each resize, independence of the batch, and honest names."""

import json

import numpy as np
import pytest
import torch
from golden_cases import relative, shared, squeezenet
from PIL import Image
from safetensors.torch import load_file, save_file

from ldmcli.core.errors import InputError, UsageError
from ldmcli.evaluation import extractors
from ldmcli.evaluation.extractors import FEATURES, NETWORKS, Extractor, default_features, open_extractor
from ldmcli.evaluation.features import extract
from ldmcli.networks import feature_nets as nets


@pytest.fixture(scope="module")
def lite0():
    return open_extractor("effnet-lite0", torch.device("cpu"))


@pytest.fixture(scope="module")
def photos():
    """Photographs of 224 x 224 px by name."""
    return {path.stem: np.array(Image.open(path)) for path in shared("photos").glob("*.png")}


def noise_images(n, size=24, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def test_effnet_gives_the_recorded_features_and_classes(lite0, photos):
    checks = json.loads(shared("photos", "efficientnet_lite0.json").read_text())
    assert checks.keys() == photos.keys() and len(checks) == 3
    found, logits = lite0.features_and_logits([photos[name] for name in checks])
    for feature, shares, expected in zip(found, torch.from_numpy(logits).softmax(1), checks.values(), strict=True):
        assert np.allclose(feature[:8], expected["pool_first8"], atol=2e-3)
        assert feature.mean() == pytest.approx(expected["pool_mean"], abs=2e-3)
        index, _, share = expected["top1"]
        assert int(shares.argmax()) == index and shares[index].item() == pytest.approx(share, abs=2e-3)


def test_a_weights_file_of_squeezenet_is_recognised_and_gives_what_torchvision_gives(tmp_path, photos):
    import torchvision

    path = squeezenet(tmp_path / "some.safetensors")
    theirs = torchvision.models.squeezenet1_1(weights=None).eval()
    theirs.load_state_dict(load_file(path))
    extractor = open_extractor(str(path), torch.device("cpu"))
    assert (extractor.name, extractor.dim, extractor.metric_key) == ("squeezenet", 512, "fd_squeezenet1_1")
    prepare = torchvision.models.SqueezeNet1_1_Weights.IMAGENET1K_V1.transforms(crop_size=224, resize_size=224)
    x = torch.stack([prepare(Image.fromarray(photo)) for photo in photos.values()])
    with torch.no_grad():
        pooled, logits = theirs.features(x).mean((2, 3)), theirs(x)
        turned = theirs(x.flip(1))
    found = [torch.from_numpy(values) for values in extractor.features_and_logits(list(photos.values()))]
    assert relative(found[0], pooled) < 1e-4 and relative(found[1], logits) < 1e-4 < relative(turned, logits)


def test_features_do_not_depend_on_the_batch(lite0):
    images = noise_images(10)
    together = lite0.features(images)
    assert together.dtype == np.float32 and together.shape == (10, 1280)
    first, rest, last = (lite0.features(part) for part in (images[:7], images[7:], images[9:]))
    assert np.array_equal(together[:7], first)  # a short block is filled up
    for found, expected in ((rest, together[7:]), (last, together[9:])):  # another place in a block, other lanes
        assert np.abs(found - expected).max() < 1e-5 * np.abs(together).max()


def test_a_tensor_an_array_and_a_list_of_other_sizes_are_taken(lite0):
    images = noise_images(2)
    expected = lite0.features(images)
    assert np.array_equal(lite0.features(torch.from_numpy(images)), expected)
    mixed = lite0.features([noise_images(1, 40)[0], images[1]])
    assert np.array_equal(mixed[1], expected[1])


@pytest.mark.parametrize("wrong", [np.zeros((1, 8, 8, 3), np.float32), np.zeros((1, 3, 8, 8), np.uint8)])
def test_anything_but_uint8_nhwc_is_refused(lite0, wrong):
    with pytest.raises(InputError, match="uint8"):
        lite0.features(wrong)


@pytest.mark.parametrize("shape", [(64, 64), (37, 301), (299, 299), (400, 310)])
def test_the_tensorflow_resize_is_that_of_torch_fidelity(shape):
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    x = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (2, 3, *shape))).float()
    expected = interpolate_bilinear_2d_like_tensorflow1x(x, size=(299, 299), align_corners=False)
    torch.testing.assert_close(nets.resize(x, 299, "bilinear (TensorFlow 1)"), expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("shape", [(64, 64), (37, 301), (500, 224)])
def test_the_bicubic_resize_is_that_of_torch(shape):
    x = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (2, 3, *shape))).float()
    expected = torch.nn.functional.interpolate(x, size=(224, 224), mode="bicubic", antialias=True).clamp(0, 255)
    torch.testing.assert_close(nets.resize(x, 224, "bicubic (antialiased)"), expected, rtol=0, atol=2e-3)


@pytest.fixture(scope="module")
def random_inception(tmp_path_factory):
    """A weights file in Inception's names, with BatchNorm statistics that make folding visible."""
    torch.manual_seed(0)
    net = nets.InceptionV3()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.05, 0.2)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.1)
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.save(net.state_dict(), path)
    return path


def test_inception_is_the_network_of_torch_fidelity(random_inception):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    theirs = FeatureExtractorInceptionV3("test", ["2048", "logits_unbiased"], str(random_inception))
    images = noise_images(2, 64)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(images).permute(0, 3, 1, 2))
    found = open_extractor(str(random_inception), torch.device("cpu")).features_and_logits(images)
    for a, b in zip(found, expected, strict=True):
        scale = float(b.abs().max())
        assert scale > 1e-3 and np.abs(a[0] - a[1]).max() > 1e-4 * scale
        assert np.abs(a - b.numpy()).max() < 2e-4 * scale


def test_only_the_known_inception_makes_a_number_called_fid(random_inception):
    own = open_extractor(str(random_inception), torch.device("cpu"))
    assert not own.known and own.metric_key == "fd_inception_custom" and "weights of your own" in own.display
    known = Extractor.__new__(Extractor)
    for name, network in NETWORKS.items():
        known.name, known.network, known.sha256 = name, network, (network.known or ("",))[0] + "0" * 40
        assert (known.display == "FID") == (name == "inception")
        assert known.metric_key.startswith("fid_") == (name == "inception")
    assert {"inception", "effnet-lite0", "effnet-lite2", "vgg16"} == set(FEATURES)


def test_a_number_states_layer_hash_and_resize_of_its_extractor(lite0):
    protocol = lite0.protocol
    assert protocol["weights_known"] and protocol["weights_sha256"].startswith("579344248a93")
    assert protocol["dim"] == 1280 and "bicubic" in protocol["resize"] and "224" in protocol["resize"]


def test_missing_inception_weights_are_named_with_hash_and_place(tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("LDM_OFFLINE", "1")
    assert default_features() == "effnet-lite0"
    with pytest.raises(InputError) as caught:
        open_extractor("inception")
    assert all(part in str(caught.value) for part in ("6726825d", str(tmp_path), "https://", "LDM_WEIGHTS"))
    assert "\n" not in str(caught.value)


def test_inception_is_the_default_where_its_weights_are(tmp_path, monkeypatch, random_inception):
    monkeypatch.setenv("LDM_WEIGHTS", str(tmp_path))
    (tmp_path / extractors.INCEPTION_URL.rsplit("/", 1)[-1]).write_bytes(random_inception.read_bytes())
    assert default_features() == "inception"
    assert open_extractor(None, torch.device("cpu")).name == "inception"


def test_unknown_names_and_files_are_refused(tmp_path):
    with pytest.raises(UsageError, match="effnet-lite0"):
        open_extractor("resnet")
    save_file({"w": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="no network that is known"):
        open_extractor(str(tmp_path / "other.safetensors"))
    save_file({"_conv_stem.weight": torch.zeros(2)}, tmp_path / "damaged.safetensors")
    with pytest.raises(InputError, match="damaged.safetensors: not the weights of EfficientNetLite0"):
        open_extractor(str(tmp_path / "damaged.safetensors"))


def test_opening_an_extractor_leaves_the_random_stream_alone():
    extractors._cached.cache_clear()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    open_extractor("effnet-lite0")
    assert torch.equal(torch.rand(3), expected)


def test_a_set_keeps_a_hash_and_a_size_of_each_image(lite0):
    images = [*noise_images(3), noise_images(1, 30)[0], noise_images(1)[0]]
    found = extract(images, lite0)
    assert len(found) == 5 and len(set(found.hashes)) == 4 and found.sizes == {(24, 24), (30, 30)}
    assert found.features.shape == (5, 1280)
