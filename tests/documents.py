"""Every document of an evaluation that a test makes is held to the published schema."""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

from ldmcli.core import console

SCHEMA = Path(__file__).resolve().parents[1] / "docs" / "evaluation.schema.json"


@cache
def validator() -> Draft202012Validator:
    return Draft202012Validator(json.loads(SCHEMA.read_text(encoding="utf-8")))


def check_document(document: dict[str, Any]) -> None:
    """Fails where the schema does not describe a document."""
    wrong = sorted(validator().iter_errors(document), key=lambda error: list(map(str, error.absolute_path)))
    said = [f"{'.'.join(map(str, error.absolute_path)) or 'the document'}: {error.message[:300]}" for error in wrong]
    assert not said, f"docs/{SCHEMA.name} says otherwise: {'; '.join(said[:5])}"


def check_printed(words: Sequence[str], code: int, stdout: str) -> None:
    """Fails where a command printed a document that the schema does not describe, or more than strict JSON."""
    measured = words[:1] == ["eval-fid"] and "--json" in words and code in (0, 8)
    if measured and "list" not in words:
        check_document(json.loads(stdout, parse_constant=refuse))


def refuse(word: str) -> None:
    raise AssertionError(f"{word} in JSON")


def as_printed(document: dict[str, Any]) -> dict[str, Any]:
    """What `--json` prints of a document that Python got."""
    return json.loads(json.dumps(console._plain(document), default=str), parse_constant=refuse)


def document(metrics: dict[str, float | None], **more: Any) -> dict[str, Any]:
    """A document with these numbers, as small as one may be; `more` is in it, too."""
    return {
        "schema": "ldm-evaluation-1",
        "metrics": metrics,
        "labels": {key: key for key in metrics},
        "frechet": next((key for key in metrics if key.startswith(("fid_", "fd_"))), None),
        "n_generated": 1000,
        "n_reference": 2000,
        "reliable": False,
        "extractor": None,
        "generated": {"source": "made"},
        "versions": {"ldm": "1", "torch": "2", "numpy": "2"},
        "seconds": 1.5,
        "warnings": [],
        **more,
    }


def network(name: str, digit: str) -> dict[str, Any]:
    """The protocol of a network of features."""
    known = {"layer": "pooled head (8)", "dim": 8, "weights_known": True, "resize": "box to 16x16", "input": "uint8"}
    return {"name": name, "weights_sha256": digit * 64, **known}


def estimate(low: float, high: float, of: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """What a number is worth, by the network `of`."""
    name = of and f"{of['name']}@{of['weights_sha256'][:12]}"
    errors = {"method": "exact (t)", "error_generated": 0.1, "error_reference": 0.1}
    return {"interval": [low, high], **errors, "floor": None, "network": name, **more}


def floor(value: float, std: float, here: float | None, sizes: tuple[int, int] = (500, 500)) -> dict[str, Any]:
    """The floor of real pictures."""
    a, b = sizes
    return {"value": value, "std": std, "n_generated": a, "n_reference": b, "splits": 5, "here": here}
