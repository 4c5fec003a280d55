"""The workflow in examples/: it is one, and its lines of `ldm` do what it is for, with small networks."""

import json
import re
import shlex
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import tiny
import typed_lines
import yaml
from documents import check_document

WORKFLOW = Path(__file__).resolve().parents[1] / "examples" / "github-actions.yml"


def steps():
    """The steps of the only job."""
    [job] = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))["jobs"].values()
    return job["steps"]


def measuring():
    """The one line of `ldm`, by words."""
    lines = [line for step in steps() for line in step.get("run", "").replace("\\\n", " ").splitlines()]
    [words] = [shlex.split(line) for line in lines if line.startswith("ldm ")]
    return words


def without(words, *options):
    """The words without options that have a value."""
    return [word for k, word in enumerate(words) if word not in options and words[max(k - 1, 0)] not in options]


def test_the_workflow_is_one():
    found = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))
    assert found[True].keys() == {"pull_request", "workflow_dispatch"}  # YAML 1.1 reads "on" so
    assert all(("run" in step) != ("uses" in step) for step in steps())
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step["uses"]) for step in steps() if "uses" in step)
    [job] = found["jobs"].values()
    [kept] = [step["with"] for step in steps() if "cache@" in step.get("uses", "")]
    assert job["env"]["LDM_CACHE"].endswith(kept["path"])


def test_what_a_build_leaves_is_kept_also_where_it_fails():
    words = measuring()
    [upload] = [step for step in steps() if "upload-artifact" in step.get("uses", "")]
    assert upload["if"] == "always()"
    assert set(upload["with"]["path"].split()) == {words[-1], words[words.index("--junit") + 1]}


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A folder as the workflow finds it: pictures, a run, a baseline of the same run."""
    with typed_lines.small_networks(tmp_path_factory.mktemp("build")) as folder:
        tiny.noisy_images(Path("my-photos"), 12)
        tiny.train_ae(Path("runs/my-ae"), data=("--data", "my-photos", "--size", "20x20"))
        tiny.train_ldm(Path("runs/my-model"), "runs/my-ae", data=("--data", "my-photos", "--size", "20x20"))
        ending = run(without(measuring(), "--junit", "--fail-above", "--compare"), "baseline.json")
        assert ending.code == 0, ending.stderr
        yield folder


def run(words, target):
    """A line of the workflow, of a few images, and what it sends to a file."""
    words = words[1 : words.index(">")]
    words[words.index("-n") + 1] = "8"
    ending = tiny.ldm(*words, "--steps", 2)
    Path(target).write_text(ending.stdout)
    return ending


@pytest.mark.parametrize("limit, code, failures", [("1e9", 0, "0"), ("1", 8, "1")])
def test_a_build_fails_where_a_limit_is_missed(repository, limit, code, failures):
    words = measuring()
    place = words.index("--fail-above") + 1
    words[place] = re.sub("=.*", f"={limit}", words[place])
    ending = run(words, words[-1])
    assert ending.code == code, ending.stderr
    found = json.loads(Path(words[-1]).read_text())
    check_document(found)
    assert found["compared"] and found["worse"] == []
    assert ET.parse("evaluation.xml").getroot().get("failures") == failures
