"""An evaluation as JUnit XML, which continuous integration reads: a test case a metric, a failure a missed limit.

Attributes and their order are those of the schema of Ant's reports, the strictest of the usual ones.
"""

import platform
import re
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ldmcli import __version__
from ldmcli.core import outputs
from ldmcli.core.errors import LdmError, UsageError
from ldmcli.evaluation.compare import read_key
from ldmcli.evaluation.result import SCHEMA
from ldmcli.reports.evaluation_table import describe_all, networks_of

_DECLARATION = '<?xml version="1.0" encoding="UTF-8"?>\n'
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
SUITE = "ldm eval-fid"


def claim(path: Path) -> None:
    """Removes an earlier report, so that none is left of a command that is killed. Raises UsageError where a file is
    there that `ldm` did not write as one, or changed since, and where no file can be written."""
    if path.is_dir():
        raise UsageError(f"--junit {path}: is a folder; name a file")
    if not path.exists() and not path.is_symlink():
        return
    if not outputs.page_is_ours(path) or not path.read_text("utf-8", "replace").startswith(_DECLARATION):
        raise UsageError(f"--junit {path}: not written by ldm, or changed since, so it is kept; name another file")
    path.unlink()


def write_report(path: Path, document: Mapping[str, Any], missed: Sequence[Mapping[str, Sequence[str]]]) -> None:
    """Writes the report of an evaluation. missed: {key: why it fails} of each result of the document."""
    results = document.get("results", [document])
    cases = [_case(one, key, wrong) for one, wrong in zip(results, missed) for key in _own_keys(one, wrong)]
    said = [*document.get("warnings", ()), *(text for one in results for text in one.get("warnings", ()))]
    out = "\n".join([describe_all(document), *(f"warning: {text}" for text in dict.fromkeys(said))])
    properties = {name: value for one in results for name, value in _properties(one).items()}
    seconds = sum(one["seconds"] for one in results)
    outputs.write_page(path, _suite(cases, properties, seconds, out))


@contextmanager
def errors_reported(path: Path) -> Iterator[None]:
    """Writes the report of an evaluation that ends without a result; the error goes on."""
    started = time.monotonic()
    try:
        yield
    except LdmError as error:
        seconds = time.monotonic() - started
        case = ET.Element("testcase", classname=SUITE, name="evaluation", time=f"{seconds:.3f}")
        ET.SubElement(case, "error", type=type(error).__name__, message=_text(error)).text = _text(error)
        outputs.write_page(path, _suite([case], {"ldm": __version__, "schema": SCHEMA}, seconds, ""))
        raise


def _own_keys(result: Mapping[str, Any], missed: Mapping[str, Any]) -> list[str]:
    """The numbers that are a test case: all but those that only say what another is worth."""
    return [key for key in result["metrics"] if key in missed or not read_key(key)[1]]


def _case(result: Mapping[str, Any], key: str, missed: Mapping[str, Sequence[str]]) -> ET.Element:
    case = ET.Element("testcase", classname=_text(result.get("name") or SUITE), name=_text(key), time="0.000")
    if key in missed:
        message = _text("; ".join(missed[key]))
        ET.SubElement(case, "failure", type="threshold", message=message).text = message
    elif result["metrics"][key] is None:
        ET.SubElement(case, "skipped")
    return case


def _properties(result: Mapping[str, Any]) -> dict[str, Any]:
    """The protocol in short, with the name of the run before each where there are several."""
    reference, sampling = result.get("reference") or {}, result.get("sampling") or {}
    found = {
        "ldm": result["versions"]["ldm"],
        "schema": SCHEMA,
        "networks": ", ".join(networks_of(result)),
        "n_generated": result["n_generated"],
        "n_reference": result["n_reference"],
        "reference": reference.get("source"),
        "reference_split": reference.get("split"),
        "reference_fingerprint": reference.get("fingerprint"),
        "generated": result["generated"].get("source"),
        "generated_fingerprint": result["generated"].get("fingerprint"),
        **{name: sampling.get(name) for name in ("sampler", "steps", "guidance", "seed")},
    }
    before = f"{result['name']}: " if result.get("name") else ""
    return {f"{before}{name}": value for name, value in found.items() if value not in (None, "")}


def _suite(cases: Sequence[ET.Element], properties: Mapping[str, Any], seconds: float, out: str) -> str:
    count = {name: str(sum(case.find(name) is not None for case in cases)) for name in ("failure", "error", "skipped")}
    suite = ET.Element(
        "testsuite",
        name=SUITE,
        timestamp=time.strftime("%Y-%m-%dT%H:%M:%S"),
        hostname=_text(platform.node() or "localhost"),
        tests=str(len(cases)),
        failures=count["failure"],
        errors=count["error"],
        skipped=count["skipped"],
        time=f"{seconds:.3f}",
    )
    listed = ET.SubElement(suite, "properties")
    for name, value in properties.items():
        ET.SubElement(listed, "property", name=_text(name), value=_text(value))
    suite.extend(cases)
    ET.SubElement(suite, "system-out").text = _text(out)
    ET.SubElement(suite, "system-err")
    ET.indent(suite)
    return f"{_DECLARATION}{ET.tostring(suite, encoding='unicode')}\n"


def _text(value: object) -> str:
    """Text without characters that XML has no way to say."""
    return _NOT_XML.sub("", str(value))
