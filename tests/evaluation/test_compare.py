"""Whether a difference of two results is real, and why two numbers do not compare."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
from measured import npz, pictures

from ldmcli.core.errors import InputError
from ldmcli.evaluation import metrics
from ldmcli.evaluation.compare import by_holm, compare
from ldmcli.evaluation.evaluate import evaluate
from ldmcli.evaluation.features import FeatureSet
from ldmcli.evaluation.metrics import METRICS, FeatureSets

NET = {"name": "net", "weights_sha256": "a" * 64, "layer": "pool", "resize": "bicubic", "dim": 6}
EXTRACTOR = SimpleNamespace(display="FD (net)", title="net", suffix="net", dim=6, protocol=NET)
SETS = ("fid", "kid", "mind")


def document(generated, reference):
    """What an evaluation says of these features, as far as comparing needs it."""
    sets = FeatureSets(
        *(FeatureSet(x, x, [str(i) for i in range(len(x))], set()) for x in (generated, reference)), EXTRACTOR
    )
    values, estimates = {}, {}
    for name in SETS:
        found = METRICS[name].compute(sets).values
        for value, error in METRICS[name].errors(sets, found).items():
            values[value] = found[value]
            estimates[value] = {
                "error_generated": error.generated,
                "error_reference": error.reference,
                "network": "net@aa",
            }
    return {
        "metrics": values,
        "estimates": estimates,
        "extractor": NET,
        "n_generated": len(generated),
        "n_reference": len(reference),
        "reference": {"source": "photos", "fingerprint": "f"},
    }


@pytest.fixture
def few_directions(monkeypatch):
    monkeypatch.setitem(metrics.MIND, "directions", 40)


def test_two_halves_of_one_set_are_rarely_called_different_and_other_images_always(few_directions):
    """By three metrics together: at most 5 of 100 pairs of halves; of images with a third more contrast all."""
    random = np.random.default_rng(0)
    wrong = found = 0
    for _ in range(100):
        a, b, reference = random.normal(size=(3, 80, 6)) / np.sqrt(np.arange(1, 7))
        old = document(a, reference)
        same, other = compare(document(b, reference), old), compare(document(1.4 * b + 0.2, reference), old)
        wrong += any(change["real"] for change in same["metrics"].values())
        found += bool(other["worse"])
        assert set(same["worse"]) <= {key for key, change in same["metrics"].items() if change["real"]}
    assert wrong <= 5 and found >= 95


def test_errors_of_a_reference_count_only_where_it_is_another_one(few_directions):
    a, b, reference = np.random.default_rng(1).normal(size=(3, 80, 6))
    new, old = document(a + 0.2, reference), document(b, reference)
    shared = compare(new, old)["metrics"]["fd"]
    new["reference"] = {"source": "photos", "fingerprint": "g"}
    apart = compare(new, old)["metrics"]["fd"]
    assert apart["p"] > shared["p"] and "both references" in apart["why"] and "both references" not in shared["why"]


def test_a_result_and_itself_are_the_same():
    a, reference = np.random.default_rng(1).normal(size=(2, 40, 6))
    found = compare(document(a, reference), document(a, reference))
    assert found["worse"] == [] and {(one["real"], one["p"]) for one in found["metrics"].values()} == {(False, 1.0)}


RESULT = {
    "metrics": {"fd_net": 5.0, "kid_net_mean": 0.2, "psnr": 30.0},
    "estimates": {
        "fd_net": {
            "error_generated": 0.1,
            "error_reference": 0.1,
            "network": "net@" + "a" * 12,
            "extrapolated": {"value": 3.0},
        },
        "kid_net_mean": {"error_generated": 0.01, "error_reference": 0.01, "network": "net@" + "a" * 12},
        "psnr": {"error_generated": 0.1, "error_reference": None, "network": None},
    },
    "extractor": NET,
    "extractors": [NET, NET | {"name": "second", "weights_sha256": "c" * 64}],
    "n_generated": 1000,
    "n_reference": 2000,
    "reference": {"source": "photos", "split": "validation", "fingerprint": "f"},
}


def changed(**values):
    result = copy.deepcopy(RESULT)
    for path, value in values.items():
        *places, last = path.split("__")
        part = result
        for place in places:
            part = part[int(place) if place.isdigit() else place]
        part[last] = value
    return result


@pytest.mark.parametrize(
    "old, key, words",
    [
        ({"n_generated": 500, "metrics__fd_net": 7.0}, "fd_net", "n_generated was 500, now 1000"),
        ({"n_generated": 500, "metrics__fd_net": 7.0}, "fd_net", "the bias was about 4, now 2"),
        ({"n_reference": 99}, "fd_net", "n_reference was 99, now 2000"),
        ({"reference__source": "others"}, "psnr", "another reference (source others then, photos now)"),
        ({"reference__split": "train"}, "kid_net_mean", "another reference (split train then"),
        ({"extractors__0__weights_sha256": "b" * 64}, "fd_net", "another extractor (weights_sha256"),
        ({"extractors__0__layer": "last"}, "kid_net_mean", "another extractor (layer 'last', now 'pool')"),
        ({"extractors__0__resize": "none"}, "kid_net_mean", "another extractor (resize"),
        ({"estimates__fd_net__network": "net@" + "b" * 12}, "fd_net", "another network"),
        ({"metrics__fd_net": None}, "fd_net", "no value"),
    ],
)
def test_why_two_numbers_do_not_compare_is_said_one_by_one(old, key, words):
    if any(path.startswith("reference") for path in old):
        old = old | {"reference__fingerprint": "g"}
    change = compare(copy.deepcopy(RESULT), changed(**old))["metrics"][key]
    assert words in change["why"]
    assert (change["change"], change["real"], change["p"]) == (None, None, None)


def test_kid_and_means_over_images_compare_at_any_number_of_images():
    found = compare(copy.deepcopy(RESULT), changed(n_generated=500, metrics__psnr=31.0, metrics__kid_net_mean=0.2))
    assert found["metrics"]["psnr"]["real"] and found["worse"] == ["psnr"]
    assert found["metrics"]["kid_net_mean"]["real"] is False


def test_other_sampling_is_named_beside_the_verdict():
    result, old = (changed(sampling={"steps": steps, "seed": 0}) for steps in (50, 20))
    change = compare(result, old)["metrics"]["psnr"]
    assert change["why"].endswith("sampled with steps 20 then, 50 now") and change["real"] is False


def test_other_weights_of_the_only_network_are_refused():
    one = changed(extractors=[NET])
    with pytest.raises(InputError, match="another extractor"):
        compare(one, changed(extractors=[NET | {"weights_sha256": "b" * 64}]))


def test_chance_is_unknown_of_a_document_without_errors_and_worse_is_worse_as_it_was():
    old = {"metrics": {"fd_net": 4.9, "psnr": 30.0}}
    found = compare(copy.deepcopy(RESULT), old)
    assert found["worse"] == ["fd_net"]
    change = found["metrics"]["fd_net"]
    assert (change["real"], change["p"]) == (None, None) and "chance is unknown" in change["why"]
    assert change["change"] == pytest.approx(0.1)


def test_several_numbers_need_more_by_holm():
    changes = {
        name: {"p": p, "why": "", "real": None} for name, p in (("a", 0.012), ("b", 0.03), ("c", 0.02), ("d", None))
    }
    found = by_holm(changes)
    assert [found[name]["p"] for name in "abcd"] == [
        pytest.approx(0.036),
        pytest.approx(0.04),
        pytest.approx(0.04),
        None,
    ]
    assert [found[name]["real"] for name in "abcd"] == [True, True, True, None] and "Holm over 3" in found["a"]["why"]


def test_pairs_with_the_same_originals_are_compared_image_by_image(tmp_path):
    real = pictures(30, 1)
    noise = np.random.default_rng(0).integers(-20, 21, real.shape) * np.linspace(0.1, 2, 30)[:, None, None, None]

    def measured(strength, originals=real):
        made = np.clip(originals + strength * noise, 0, 255).astype(np.uint8)
        pairs = npz(tmp_path / "a.npz", made), npz(tmp_path / "b.npz", originals)
        return evaluate(pairs=pairs, metrics=["psnr", "ssim"])

    old, new = measured(1.0), measured(1.05)
    assert len(old["of_each"]["psnr"]) == 30 and old["originals"] == new["originals"]
    found = compare(new, old)
    assert found["metrics"]["psnr"]["real"] and "image by image" in found["metrics"]["psnr"]["why"]
    assert "psnr" in found["worse"]
    apart = compare(new | {"originals": "0"}, old)["metrics"]["psnr"]
    assert apart["real"] is False and apart["p"] > 0.5
