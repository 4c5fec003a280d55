"""LPIPS from local backbones: recorded distances, determinism, gradients, and what happens without weights."""

import io
import json
from pathlib import Path

import pytest
import torch
from golden_cases import shared
from recorded import recorded_trunk, trunk_state
from safetensors.torch import load_file, save_file

from ldmcli.core.errors import InputError
from ldmcli.networks.perceptual import BACKBONES, PerceptualNet, detect, perceptual_net, read_heads


@pytest.mark.parametrize("kind, pairs", [("squeeze", range(12)), ("alex", range(12)), ("vgg", (0, 3, 6, 8))])
def test_distances_are_those_of_lpips(kind, pairs):
    images = json.loads(shared("metrics", "golden.json").read_text())["images"]
    arrays = load_file(shared("metrics", "pairs.safetensors"))
    net = PerceptualNet(kind, recorded_trunk(kind, images["trunk_seed"]), read_heads(kind))
    for pair in pairs:
        a, b = (arrays[f"{pair:02d}.{side}"].permute(2, 0, 1)[None] / 127.5 - 1 for side in "ab")
        expected = images["rows"][pair]["lpips"][kind]
        assert net(a, b).item() == pytest.approx(expected, rel=1e-4, abs=1e-7)


def test_a_local_file_of_backbone_weights_gives_the_recorded_distances(tmp_path):
    images = json.loads(shared("metrics", "golden.json").read_text())["images"]
    arrays = load_file(shared("metrics", "pairs.safetensors"))
    trunk = recorded_trunk("squeeze", images["trunk_seed"])
    save_file({f"features.{name}": value for name, value in trunk.items()}, tmp_path / "backbone.safetensors")
    net = perceptual_net(str(tmp_path / "backbone.safetensors"))
    for row in images["rows"][:3]:
        a, b = (arrays[f"{row['pair']}.{side}"].permute(2, 0, 1)[None] / 127.5 - 1 for side in "ab")
        assert net(a, b).item() == pytest.approx(row["lpips"]["squeeze"], rel=1e-4, abs=1e-7)


@pytest.fixture(scope="module")
def squeeze():
    return PerceptualNet("squeeze", trunk_state("squeeze"), read_heads("squeeze"))


def test_a_parent_in_training_mode_adds_no_noise(squeeze):
    parent = torch.nn.ModuleDict({"perceptual": squeeze}).train()
    x, y = torch.rand(2, 2, 3, 32, 32).unbind(0)
    first, second = parent["perceptual"](x, y), parent["perceptual"](x, y)
    assert not squeeze.training and torch.equal(first, second) and float(first.min()) > 0


def test_gradients_reach_the_image_but_no_weight(squeeze):
    x, y = torch.rand(2, 3, 32, 32) * 2 - 1, (torch.rand(2, 3, 32, 32) * 2 - 1).requires_grad_()
    squeeze(x, y).mean().backward()
    assert float(y.grad.abs().max()) > 0
    assert all(not parameter.requires_grad and parameter.grad is None for parameter in squeeze.parameters())


def test_features_that_are_zero_give_a_finite_gradient():
    state = trunk_state("squeeze").items()
    dead = {name: -value.abs() if name.endswith("bias") else 0 * value for name, value in state}
    net = PerceptualNet("squeeze", dead, read_heads("squeeze"))
    y = torch.ones(1, 3, 32, 32, requires_grad=True)
    net(torch.zeros(1, 3, 32, 32), y).sum().backward()
    assert torch.isfinite(y.grad).all()


def test_a_distance_does_not_depend_on_the_batch_and_is_zero_for_equal_images(squeeze):
    x, y = torch.rand(2, 5, 3, 40, 32).unbind(0)
    together = squeeze(x, y)
    assert together.shape == (5, 1, 1, 1)
    torch.testing.assert_close(together[3:4], squeeze(x[3:4], y[3:4]), rtol=1e-5, atol=1e-7)
    assert float(squeeze(x, x).abs().max()) == 0


def test_a_grey_image_counts_as_three_equal_channels(squeeze):
    x, y = torch.rand(2, 1, 1, 32, 32).unbind(0)
    assert torch.equal(squeeze(x, y), squeeze(x.expand(-1, 3, -1, -1), y.expand(-1, 3, -1, -1)))


def test_bytes_and_too_small_images_are_refused(squeeze):
    with pytest.raises(InputError, match=r"\[-1, 1\]"):
        squeeze(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), torch.zeros(1, 3, 32, 32))
    with pytest.raises(InputError, match="at least 17 px"):
        squeeze(torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 16))


@pytest.mark.parametrize("kind", BACKBONES)
def test_a_weights_file_is_recognised_by_its_shapes(kind):
    state = {f"features.{name}": value for name, value in trunk_state(kind).items()}
    assert detect(state, Path("x")) == kind


def test_a_file_of_another_network_is_refused_by_name(tmp_path):
    save_file({"conv.weight": torch.zeros(4, 3, 3, 3)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="other.safetensors.*squeezenet1_1"):
        perceptual_net(str(tmp_path / "other.safetensors"))
    with pytest.raises(InputError, match="no such weights file"):
        perceptual_net(str(tmp_path / "absent.safetensors"))
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00")
    with pytest.raises(InputError, match="cut.safetensors: not a readable"):
        perceptual_net(str(tmp_path / "cut.safetensors"))


def test_offline_without_weights_says_which_file_goes_where(tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError) as caught:
        perceptual_net("")
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in ("vgg16-397923af.pth", "397923af", str(tmp_path), "https://"))


def test_a_server_that_does_not_answer_ends_as_a_missing_file(tmp_path, monkeypatch):
    for name in ("LDM_OFFLINE", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LDM_WEIGHTS", str(tmp_path))

    def refuse(url, timeout):
        assert timeout <= 5
        raise TimeoutError("timed out")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    with pytest.raises(InputError, match="download failed.*timed out"):
        perceptual_net("")
    assert not list(tmp_path.iterdir())


def test_a_download_with_another_hash_is_not_kept(tmp_path, monkeypatch):
    for name in ("LDM_OFFLINE", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LDM_WEIGHTS", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", lambda url, timeout: io.BytesIO(b"a login page"))
    with pytest.raises(InputError, match="not 397923af"):
        perceptual_net("")
    assert not list(tmp_path.iterdir())


def test_weights_in_the_folder_are_taken_without_a_network(tmp_path, monkeypatch):
    state = {f"features.{name}": value for name, value in trunk_state("squeeze").items()}
    torch.save(state, tmp_path / "squeezenet1_1-b8a52dc0.pth")
    monkeypatch.setenv("LDM_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert perceptual_net("squeeze").kind == "squeeze"


class Payload:
    def __reduce__(self):
        return exec, ("raise SystemExit('ran code')",)


def test_a_weights_file_is_never_run_as_code(tmp_path):
    torch.save({"features.0.weight": Payload()}, tmp_path / "evil.pth")
    with pytest.raises(InputError, match="not a readable weights file"):
        perceptual_net(str(tmp_path / "evil.pth"))
