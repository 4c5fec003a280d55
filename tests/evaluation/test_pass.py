"""The pass over the pictures of an evaluation: each picture once, through all networks."""

import numpy as np
import pytest
from measured import Autoencoder, folder, npz, pictures, tiny_extractor

from ldmcli.core.errors import UsageError
from ldmcli.evaluation import evaluate as module
from ldmcli.evaluation import image_streams
from ldmcli.evaluation.evaluate import evaluate
from ldmcli.evaluation.request import EvaluationRequest

SETS = ["fid", "kid", "is", "pr"]


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """Two tiny networks by name."""
    where = tmp_path_factory.mktemp("networks")
    return {name: tiny_extractor(where / f"{name}.safetensors", k, name) for k, name in enumerate(("one", "two"))}


@pytest.fixture(autouse=True)
def cheap(networks, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "open_extractor", lambda name=None: networks[name or "one"])
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def images(tmp_path):
    return folder(tmp_path / "images", pictures(12, 1))


# --- several networks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["one,two", "one, two", ["one", "two"], ("one", "two", "one")])
def test_several_networks_measure_what_each_measures_alone_and_each_picture_is_read_once(
    given, images, tmp_path, monkeypatch
):
    other = npz(tmp_path / "other.npz", pictures(11, 2))
    alone = [evaluate(images=images, data=other, metrics=SETS, features=name) for name in ("one", "two")]
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache of both"))
    read, decoded = [], image_streams.decode
    monkeypatch.setattr(image_streams, "decode", lambda path: read.append(path) or decoded(path))
    both = evaluate(images=images, data=other, metrics=SETS, features=given)
    assert both["metrics"] == alone[0]["metrics"] | alone[1]["metrics"]
    assert list(both["metrics"])[:2] == ["fd_one8", "kid_one8_mean"], "network by network, as named"
    assert sorted(read[1:]) == sorted(images.iterdir()), "and before them the first one for its size"
    assert both["frechet"] == "fd_one8" and both["extractor"] == alone[0]["extractor"]
    assert both["extractors"] == [one["extractor"] for one in alone]


def test_pairs_are_measured_by_several_networks(images, tmp_path):
    pairs = (images, folder(tmp_path / "other", pictures(12, 3)))
    alone = [evaluate(pairs=pairs, metrics=["fid", "psnr"], features=name)["metrics"] for name in ("one", "two")]
    assert evaluate(pairs=pairs, metrics=["fid", "psnr"], features="one,two")["metrics"] == alone[0] | alone[1]


def test_of_a_reference_only_the_network_that_is_new_sees_the_pictures(images, tmp_path, networks, monkeypatch):
    other = npz(tmp_path / "other.npz", pictures(11, 2))
    evaluate(images=images, data=other, features="one")
    seen = {name: [] for name in networks}
    for name, network in networks.items():
        found = network.features_and_logits
        monkeypatch.setattr(
            network, "features_and_logits", lambda block, n=name, f=found: seen[n].append(len(block)) or f(block)
        )
    evaluate(images=images, data=other, features="one,two")
    assert sum(seen["two"]) == 12 + 11 and sum(seen["one"]) == 12


def test_warnings_say_which_network_they_are_about(tmp_path):
    few = folder(tmp_path / "few", pictures(4))
    found = evaluate(
        images=few, data=npz(tmp_path / "b.npz", pictures(9, 1)), metrics=["fid", "is"], features="one,two"
    )
    assert [text for text in found["warnings"] if text.startswith("4 generated images for 8 dimensions (two)")]
    assert "no IS: 4 images for 10 splits (one)" in found["warnings"]


def test_statistics_are_of_one_network(images, tmp_path):
    other, kept = npz(tmp_path / "other.npz", pictures(11, 2)), tmp_path / "kept.npz"
    with pytest.raises(UsageError, match="--save-statistics: a file holds the statistics of one network"):
        evaluate(images=images, data=other, features="one,two", save_statistics=kept)
    evaluate(images=images, data=other, features="one", save_statistics=kept)
    with pytest.raises(UsageError, match="kept.npz: holds statistics of one network"):
        evaluate(images=images, data=kept, features="one,two")
    # a sample set of guided-diffusion's kind has images, which serve every network
    np.savez(tmp_path / "both.npz", arr_0=pictures(11, 2), mu=np.zeros(8), sigma=np.eye(8))
    found = evaluate(images=images, data=tmp_path / "both.npz", features="one,two")
    assert found["metrics"] == evaluate(images=images, data=other, features="one,two")["metrics"]
    assert any("are not of all of one and two; its images are the reference" in text for text in found["warnings"])


def test_two_networks_of_one_name_are_refused(images, networks, tmp_path, monkeypatch):
    same = {**networks, "other": tiny_extractor(tmp_path / "other.safetensors", 5, "one")}
    monkeypatch.setattr(module, "open_extractor", lambda name=None: same[name])
    with pytest.raises(UsageError, match="two networks whose numbers are called …_one8"):
        evaluate(images=images, data=images, features="one,other")


def test_a_file_whose_name_has_a_comma_is_one_network(tmp_path):
    path = tmp_path / "a,b.safetensors"
    path.touch()
    assert EvaluationRequest(images="x", features=str(path)).networks == (str(path),)


def test_reconstructions_go_through_the_autoencoder_once(monkeypatch):
    decoded, seen = Autoencoder.decode, []
    monkeypatch.setattr(Autoencoder, "decode", lambda self, z: seen.append(len(z)) or decoded(self, z))
    found = evaluate(autoencoder=Autoencoder(), data="shapes", n=6, size=(20, 20), metrics=["fid"], features="one,two")
    assert sum(seen) == 6 and {"fd_one8", "fd_two8"} == found["metrics"].keys()
