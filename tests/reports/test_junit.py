"""JUnit XML of evaluations: what is a case, a failure and an error, and which files are replaced."""

import re
import xml.etree.ElementTree as ET

import pytest
from documents import document, network
from measured import folder, npz, pictures, tiny_extractor
from tiny import ldm

from ldmcli.core.errors import UsageError
from ldmcli.evaluation import evaluate as module
from ldmcli.evaluation.limits import Limit, misses
from ldmcli.reports.junit import claim, write_report

METRICS = {"fd_effnet_lite0": 20.0, "kid_effnet_lite0_mean": 0.5, "kid_effnet_lite0_std": 0.1, "recall": None}


def valid(path):
    """The suite of a file that is as the schema of Ant's reports has it."""
    text = path.read_text(encoding="utf-8")
    assert text.startswith('<?xml version="1.0" encoding="UTF-8"?>\n')
    suite = ET.fromstring(text)
    assert suite.tag == "testsuite" and suite.attrib.keys() >= {"name", "hostname"}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", suite.get("timestamp"))
    tags = [child.tag for child in suite]
    assert tags == ["properties", *["testcase"] * (len(tags) - 3), "system-out", "system-err"]
    cases = suite.findall("testcase")
    counted = {"tests": len(cases)}
    counted |= {f"{tag}s": len(suite.findall(f"testcase/{tag}")) for tag in ("failure", "error")}
    assert {name: int(suite.get(name)) for name in counted} == counted
    assert int(suite.get("skipped")) == len(suite.findall("testcase/skipped"))
    for one in (suite, *cases):
        assert re.fullmatch(r"\d+\.\d{3}", one.get("time"))
    assert all(case.get("name") and case.get("classname") and len(case) <= 1 for case in cases)
    assert all(one.get("type") and one.get("message") for case in cases for one in case if one.tag != "skipped")
    assert all(set(one.attrib) == {"name", "value"} for one in suite.find("properties"))
    return suite


def cases_of(suite):
    """{name: what is in the case}, "" where it passed."""
    return {case.get("name"): case[0].tag if len(case) else "" for case in suite.findall("testcase")}


def properties_of(suite):
    return {one.get("name"): one.get("value") for one in suite.find("properties")}


@pytest.mark.parametrize(
    "limits, failed",
    [
        ([], {}),
        ([Limit("fid", 20, True)], {}),
        ([Limit("", 19, True)], {"fd_effnet_lite0": "fd_effnet_lite0 = 20 is above 19"}),
        (
            [Limit("kid", 0.6, False), Limit("kid", 0.4, True)],
            {"kid_effnet_lite0_mean": "= 0.5 is below 0.6; kid_effnet_lite0_mean = 0.5 is above 0.4"},
        ),
        ([Limit("recall", 0, False)], {"recall": "recall = none is below 0"}),
        ([Limit("kid_std", 0.01, True)], {"kid_effnet_lite0_std": "is above 0.01"}),
    ],
)
def test_every_metric_is_a_case_and_a_missed_limit_its_failure(tmp_path, limits, failed):
    found = document(METRICS)
    write_report(tmp_path / "report.xml", found, [misses(found, limits)])
    suite = valid(tmp_path / "report.xml")
    expected = {"fd_effnet_lite0": "", "kid_effnet_lite0_mean": "", "recall": "skipped"}
    assert cases_of(suite) == expected | dict.fromkeys(failed, "failure")
    for name, words in failed.items():
        assert words in suite.find(f"testcase[@name='{name}']/failure").get("message")


def test_what_got_worse_is_a_failure(tmp_path):
    change = {"old": 19.0, "new": 20.0, "change": 1.0, "real": True, "p": 0.01, "why": ""}
    found = document(METRICS, compared={"fd_effnet_lite0": change}, worse=["fd_effnet_lite0"])
    write_report(tmp_path / "report.xml", found, [misses(found, [])])
    [failure] = valid(tmp_path / "report.xml").findall("testcase/failure")
    assert failure.get("message") == "fd_effnet_lite0 = 20 is worse than 19 in --compare"


def test_the_protocol_stands_in_properties_and_the_table_in_the_output(tmp_path):
    how = {"sampler": "ddim", "steps": 50, "guidance": 1.0, "seed": 7}
    source = {"source": "photos", "split": "validation", "fingerprint": "abc"}
    net = network("effnet-lite0", "5")
    found = document(METRICS, sampling=how, reference=source, extractor=net, warnings=["few <images>\x00 & so"])
    write_report(tmp_path / "report.xml", found, [{}])
    suite = valid(tmp_path / "report.xml")
    stated = properties_of(suite)
    assert stated["networks"] == "effnet-lite0@555555555555" and stated["schema"] == "ldm-evaluation-1"
    assert (stated["n_generated"], stated["n_reference"], stated["seed"], stated["steps"]) == (
        "1000",
        "2000",
        "7",
        "50",
    )
    assert stated["reference_fingerprint"] == "abc"
    assert "warning: few <images> & so" in suite.findtext("system-out")
    assert "95 %" in suite.findtext("system-out") or "metric" in suite.findtext("system-out")


def test_cases_of_several_runs_carry_their_names(tmp_path):
    results = [document(METRICS, name=name) for name in ("runs/a", "runs/b")]
    found = {"schema": "ldm-evaluation-1", "results": results, "warnings": ["no --data"]}
    write_report(tmp_path / "report.xml", found, [{}, {"recall": ["recall = none is below 0"]}])
    suite = valid(tmp_path / "report.xml")
    assert [case.get("classname") for case in suite.findall("testcase")] == ["runs/a"] * 3 + ["runs/b"] * 3
    assert suite.find("testcase/failure/..").get("classname") == "runs/b"
    assert properties_of(suite)["runs/b: n_generated"] == "1000"


def test_only_an_own_report_is_replaced(tmp_path):
    path = tmp_path / "report.xml"
    claim(path)
    write_report(path, document(METRICS), [{}])
    claim(path)
    assert not path.exists(), "a command that is killed leaves no report of an earlier one"
    write_report(path, document(METRICS), [{}])
    path.write_text(path.read_text().replace("20", "10"))
    for there in (path, tmp_path):
        with pytest.raises(UsageError, match="--junit"):
            claim(there)
    page = tmp_path / "report.html"
    page.write_text("<footer>Written by ldm 1</footer>")
    with pytest.raises(UsageError, match="not written by ldm"):
        claim(page)


# --- the command -----------------------------------------------------------------------------------------------


@pytest.fixture
def sets(tmp_path, monkeypatch):
    """The words of a measurement of two small sets by a tiny network."""
    tiny = tiny_extractor(tmp_path / "tiny.safetensors")
    monkeypatch.setattr(module, "open_extractor", lambda name=None: tiny)
    generated, other = folder(tmp_path / "a", pictures(12)), npz(tmp_path / "b.npz", pictures(12, 1))
    return "eval-fid", "--images", generated, "--data", other, "--metrics", "fid", "--junit", tmp_path / "out" / "r.xml"


def test_a_report_is_written_whether_limits_are_kept_or_missed(sets):
    assert ldm(*sets, "--fail-above", "fid=1e9").code == 0
    assert cases_of(valid(sets[-1])) == {"fd_tiny8": ""}
    ended = ldm(*sets, "--fail-above", "fid=1e-9", "--json")
    assert ended.code == 8 and ended.json["metrics"]["fd_tiny8"] > 0
    assert cases_of(valid(sets[-1])) == {"fd_tiny8": "failure"}
    assert valid(sets[-1]).find("testcase/failure").get("message") in ended.line


@pytest.mark.parametrize(
    "words, code, kind",
    [
        (("--images", "none"), 3, "InputError"),
        (("-n", 13), 3, "InputError"),
        (("--fail-above", "kid=3"), 2, "UsageError"),
    ],
)
def test_an_evaluation_without_a_result_is_an_error(sets, words, code, kind):
    ended = ldm(*sets, *words)
    assert ended.code == code, ended.stderr
    suite = valid(sets[-1])
    assert cases_of(suite) == {"evaluation": "error"}
    error = suite.find("testcase/error")
    assert error.get("type") == kind and f"ldm: {error.get('message')}" == ended.line


def test_a_refused_model_is_an_error(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{")
    ended = ldm("eval-fid", "--model", tmp_path / "run", "--data", "shapes", "--junit", tmp_path / "r.xml")
    assert ended.code == 4 and cases_of(valid(tmp_path / "r.xml")) == {"evaluation": "error"}


def test_a_foreign_file_is_kept_and_nothing_is_measured(sets, tmp_path, monkeypatch):
    foreign = tmp_path / "theirs.xml"
    foreign.write_text("<testsuite/>")
    monkeypatch.setattr(module, "evaluate", None)
    ended = ldm(*sets[:-1], foreign)
    assert ended.code == 2 and str(foreign) in ended.line and foreign.read_text() == "<testsuite/>"
