"""Evaluations as tables: what stands beside a number, in 80 columns."""

import re

import pytest
from documents import check_document, document, estimate, floor, network

from ldmcli.reports.evaluation_table import describe_all

LITE0, LITE2 = network("effnet-lite0", "5"), network("effnet-lite2", "a")
NAMES = {"effnet_lite0": "EfficientNet-lite0", "effnet_lite2": "EfficientNet-lite2", "inception2048": "Inception"}


def of_sets(suffix, of, extrapolated=True):
    """Numbers, labels and estimates by one network."""
    title, fd = NAMES[suffix], "fid_inception2048" if suffix == "inception2048" else f"fd_{suffix}"
    metrics = {fd: 132.44, f"kid_{suffix}_mean": 0.012, f"kid_{suffix}_std": 0.002, f"recall_{suffix}": None}
    named = "FID" if fd.startswith("fid") else f"FD ({title})"
    labels = dict(
        zip(metrics, [named, f"KID ({title})", f"KID ({title}), deviation over subsets", f"recall ({title})"])
    )
    line = {"value": 61.2, "interval": [50.2, 72.1], "points": [[500, 500, 140.0]], "r2": 0.99, "of": "both"}
    estimates = {
        fd: estimate(128.1, 136.9, of, floor=floor(61.2, 1.33, 130.2), extrapolated=line),
        f"kid_{suffix}_mean": estimate(0.0101, 0.0144, of, floor=floor(1e-5, 0.0003, 0.0124)),
    }
    if extrapolated:
        metrics[f"{fd}_extrapolated"], labels[f"{fd}_extrapolated"] = 61.2, f"{named}, at infinite n"
        metrics = {fd: metrics.pop(fd), f"{fd}_extrapolated": metrics.pop(f"{fd}_extrapolated"), **metrics}
    return metrics, labels, estimates


def result(*suffixes, **more):
    """A result by these networks."""
    opened = [{"effnet_lite2": LITE2}.get(suffix, LITE0) for suffix in suffixes]
    parts = [of_sets(suffix, of) for suffix, of in zip(suffixes, opened)]
    metrics, labels, estimates = ({k: v for part in each for k, v in part.items()} for each in zip(*parts))
    return document(metrics, labels=labels, estimates=estimates, extractor=opened[0], extractors=opened, **more)


def shown(found, width=80):
    """The lines of a table, none of them too wide."""
    check_document(found)
    lines = describe_all(found, width).split("\n")
    assert max(map(len, lines)) <= width, "\n".join(lines)
    return lines


def row(lines, start):
    """The cells of the line that begins so."""
    [found] = [line for line in lines if re.match(rf"{re.escape(start)}(  |$)", line)]
    return re.split(r" {2,}", found.strip())


def test_a_number_stands_beside_its_interval_and_its_floor():
    lines = shown(result("effnet_lite0"))
    assert re.split(r" {2,}", lines[0]) == ["metric", "value", "95 % interval", "floor"]
    assert row(lines, "FD (EfficientNet-lite0)")[1:] == ["132.4", "128.1 … 136.9", "61.2 ± 1.3"]
    assert row(lines, "  at infinite n")[1:] == ["61.2", "50 … 72"]
    assert row(lines, "  deviation over subsets")[1:] == ["0.002"]
    assert row(lines, "recall (EfficientNet-lite0)")[1:] == ["none"]


def test_below_stand_counts_network_and_what_the_floor_is():
    text = " ".join(" ".join(shown(result("effnet_lite0"))).split())
    assert "n = 1,000 measured, 2,000 reference features: effnet-lite0@555555555555, pooled head" in text
    assert "two halves of the real pictures, 500 and 500; at these sizes the measured images have FD 130.2" in text
    uneven = result("effnet_lite0")
    uneven["estimates"]["fd_effnet_lite0"]["floor"] = floor(60.0, 1, None, (300, 100))
    assert "floor: two parts of the real pictures, 300 and 100" in shown(uneven)


@pytest.mark.parametrize(
    "ends, words",
    [
        ((11.8312, 16.5333), "11.8 … 16.5"),
        ((-0.005359, 0.002868), "-0.0054 … 0.0029"),
        ((-0.00001, 0.9), "0.00 … 0.90"),
        ((12345.6, 23456.7), "12,346 … 23,457"),
        ((0.0, 0.0), "0 … 0"),
    ],
)
def test_an_interval_has_the_digits_that_chance_leaves(ends, words):
    found = document({"psnr": 14.18}, estimates={"psnr": estimate(*ends)})
    assert row(shown(found), "psnr")[2] == words


def test_several_networks_are_headings():
    lines = shown(result("effnet_lite0", "effnet_lite2"))
    places = [lines.index(name) for name in ("effnet-lite0@555555555555", "effnet-lite2@aaaaaaaaaaaa")]
    assert [lines[place + 1].split()[0] for place in places] == ["FD", "FD"]
    assert not any("EfficientNet" in line for line in lines)
    text = " ".join(line.strip() for line in lines)
    assert "have FD 130.2, KID 0.0124 (effnet-lite0@555555555555); FD 130.2, KID" in text


def test_what_has_no_room_beside_a_number_stands_below_it():
    wide = result("effnet_lite0")
    wide["labels"]["fd_effnet_lite0"] = "Fréchet distance" + 9 * " abc"
    wide["labels"]["fd_effnet_lite0_extrapolated"] = wide["labels"]["fd_effnet_lite0"] + ", at infinite n"
    lines = shown(wide)
    assert "floor" not in lines[0] and "61.2 ± 1.3" in next(line for line in lines if line.startswith("  floor"))


def test_without_estimates_there_are_two_columns():
    lines = shown(result("effnet_lite0") | {"estimates": {}})
    assert lines[0].split() == ["metric", "value"] and not any("floor" in line for line in lines)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"new": 132.4, "change": -7.6, "real": True, "p": 0.0031, "why": ""}, "-7.6  real, better (p 0.0031)"),
        ({"new": 150.0, "change": 10.0, "real": True, "p": 0.01, "why": ""}, "+10  real, worse (p 0.01)"),
        ({"new": 150.0, "change": 10.0, "real": True, "p": 1e-9, "why": ""}, "+10  real, worse (p < 0.001)"),
        ({"new": 140.1, "change": 0.1, "real": False, "p": 0.8, "why": ""}, "+0.1  chance (p 0.8)"),
        ({"new": 140.0, "change": 0.0, "real": False, "p": None, "why": ""}, "0  the same"),
        ({"new": 141.0, "change": 1.0}, "+1  chance unknown"),
        ({"new": None, "change": None, "real": None, "p": None, "why": "n differs"}, "can't be compared"),
    ],
)
def test_a_change_is_called_real_or_chance(change, words):
    lines = shown(result("effnet_lite0", compared={"fd_effnet_lite0": {"old": 140.0} | change}, worse=[]))
    [line] = [line for line in lines if line.startswith("FD") and "140" in line]
    assert line.endswith(words)
    assert not change.get("why") or change["why"] in lines


def test_reasons_are_said_once_with_the_numbers_that_they_are_of():
    one = {"old": 1.0, "new": 2.0, "change": 1.0, "real": None, "p": None, "why": "another network: a then, b now"}
    changes = {"fd_effnet_lite0": one, "kid_effnet_lite0_mean": one, "recall_effnet_lite0": one | {"why": "few"}}
    text = " ".join(line.strip() for line in shown(result("effnet_lite0", compared=changes, worse=[])))
    assert text.count("another network: a then, b now") == 1
    assert "FD, KID: another network" in text and "recall: few" in text


@pytest.mark.parametrize("suffixes", [("effnet_lite0",), ("effnet_lite0", "effnet_lite2")])
def test_several_runs_are_rows_with_their_intervals(suffixes):
    names = ["runs/a", "runs/another-with-a-longer-name"]
    results = [result(*suffixes, name=name) for name in names]
    lines = shown({"schema": results[0]["schema"], "results": results, "warnings": []})
    for name in names:
        place = next(k for k, line in enumerate(lines) if line.startswith(f"{name}  "))
        assert "132.4" in lines[place] and lines[place + 1].split("  ")[1] == "95 % interval"
        assert "128.1 … 136.9" in lines[place + 1]
    assert any(line.startswith("  floor") and "61.2 ± 1.3" in line for line in lines)
    assert any("0.012 ± 0.002" in line for line in lines)
    assert ("effnet-lite2@aaaaaaaaaaaa" in lines) == (len(suffixes) > 1)


def test_a_number_that_is_not_finite_or_large_is_readable():
    lines = shown(document({"psnr": None, "ssim": 123456.0, "lpips_vgg": -1e-5}))
    assert [line.split()[1] for line in lines[2:5]] == ["none", "123,456", "-1.00e-05"]
    assert "inf" in describe_all(document({"psnr": float("inf")}))


def test_changes_by_several_networks_stand_below_their_names():
    one = {"old": 123456.0, "new": 0.00012345, "change": -123455.99, "real": True, "p": 1e-9, "why": "independent"}
    keys = ("fd_effnet_lite0", "kid_effnet_lite0_mean", "fd_effnet_lite2")
    lines = shown(result("effnet_lite0", "effnet_lite2", compared=dict.fromkeys(keys, one), worse=[]))
    lines = lines[next(k for k, line in enumerate(lines) if line.startswith("compared")) :]
    named = [line.split("  ")[0] for line in lines[2:7]]
    assert named == ["effnet-lite0@555555555555", "FD", "KID", "effnet-lite2@aaaaaaaaaaaa", "FD"]
    assert "independent" in lines
