"""The published schema: it is one, it takes a whole document, and it refuses what is none.

Documents of all other tests are held to it, too (documents.py).
"""

import copy

import pytest
from documents import check_document, check_printed, document, estimate, floor, network, validator

NET = network("effnet-lite0", "5")
LINE = {"value": 2.0, "interval": [1.0, 3.0], "points": [[50, 50, 4.0]], "r2": 0.9, "of": "both"}
FULL = document(
    {"fd_effnet_lite0": 4.0, "psnr": None},
    extractor=NET,
    extractors=[NET],
    estimates={"fd_effnet_lite0": estimate(3.0, 5.0, NET, floor=floor(1.0, 0.1, 3.5), extrapolated=LINE)},
    reference={"source": "photos", "split": "validation", "rows": 5, "fingerprint": "ab", "resize": "box"},
    sampling={"sampler": "ddim", "steps": 5, "guidance": {"text": 3.0}, "guidance_interval": [0, 1], "seed": 0},
    compared={"psnr": {"old": None, "new": None, "change": None, "real": None, "p": None, "why": "no value"}},
    worse=[],
    kid={"subsets": 100},
)


def test_the_schema_is_one_and_says_what_everything_is():
    schema = validator().schema
    validator().check_schema(schema)
    parts = schema["$defs"]
    for name, one in parts["result"]["properties"].items():
        assert "description" in one or "description" in parts[one["$ref"].rpartition("/")[2]], name


def test_one_result_and_several_are_documents():
    check_document(FULL)
    check_document({"schema": FULL["schema"], "results": [FULL | {"name": "a"}, FULL | {"name": "b"}], "warnings": []})


@pytest.mark.parametrize(
    "place, value",
    [
        (("schema",), "ldm-evaluation-0"),
        (("metrics", "psnr"), "inf"),
        (("metrics",), {}),
        (("labels", "psnr"), None),
        (("n_generated",), -1),
        (("estimates", "fd_effnet_lite0", "interval"), [1.0]),
        (("estimates", "fd_effnet_lite0", "interval"), [1.0, 2.0, 3.0]),
        (("estimates", "fd_effnet_lite0", "network"), "effnet-lite0"),
        (("estimates", "fd_effnet_lite0", "error_generated"), -0.1),
        (("estimates", "fd_effnet_lite0", "confidence"), 0.95),
        (("estimates", "fd_effnet_lite0", "floor", "std"), None),
        (("estimates", "fd_effnet_lite0", "extrapolated", "of"), "reference"),
        (("extractor", "weights_sha256"), "55"),
        (("compared", "psnr", "real"), "yes"),
        (("compared", "psnr", "p"), 1.5),
        (("warnings",), [None]),
        (("n_genrated",), 5),
        (("seconds",), None),
    ],
)
def test_what_is_no_document_is_refused(place, value):
    wrong = copy.deepcopy(FULL)
    inner = wrong
    for name in place[:-1]:
        inner = inner[name]
    inner[place[-1]] = value
    with pytest.raises(AssertionError, match="schema.json says otherwise"):
        check_document(wrong)


@pytest.mark.parametrize("missing", ["schema", "metrics", "labels", "extractor", "versions", "generated"])
def test_what_a_document_must_say_is_missed(missing):
    with pytest.raises(AssertionError, match=missing):
        check_document({name: value for name, value in FULL.items() if name != missing})


def test_json_that_is_not_strict_is_refused():
    with pytest.raises(AssertionError, match="NaN in JSON"):
        check_printed(["eval-fid", "--json"], 0, '{"metrics": {"psnr": NaN}}')
