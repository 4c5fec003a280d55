"""One result of an evaluation beside another: which numbers compare, what changed, and metrics by short names.

Keys carry the extractor and the plain method that a number is of (`kid_effnet_lite0_mean`, `psnr_bicubic`);
`read_key` finds the metric of the table that one belongs to.
"""

import json
from pathlib import Path
from typing import Any

from ldmcli.core.errors import InputError, UsageError
from ldmcli.evaluation.baselines import PLAIN_METHODS, UNGUIDED
from ldmcli.evaluation.metrics import METRICS, Metric
from ldmcli.evaluation.reference_statistics import SAME

NOISE = 1e-9  # relative change that is rounding


def read_key(key: str) -> tuple[Metric | None, bool]:
    """(the metric that a key of a result belongs to, whether its number only says how much a value is worth).

    The metric is None of a key that is not in the table.
    """
    method = next((method for method in (*PLAIN_METHODS, UNGUIDED) if key.endswith(f"_{method}")), "")
    own = key.removesuffix(f"_{method}") if method else key
    found = [
        (value == own, len(value), metric, value not in metric.values(name))
        for name, metric in METRICS.items()
        for value in metric.labels(name)
        if value == own or _is_extended(own, value)
    ]
    if not found:
        return None, method in PLAIN_METHODS
    _, _, metric, beside = max(found, key=lambda entry: entry[:2])
    return metric, beside or method in PLAIN_METHODS


def _is_extended(key: str, value: str) -> bool:
    """Whether a key is a value's name with a network in it: kid_effnet_lite0_mean of kid_mean."""
    first, _, rest = value.partition("_")
    return key.startswith(f"{first}_") and (not rest or key.endswith(f"_{rest}"))


def read_result(given: str | Path | dict | None) -> dict[str, Any] | None:
    """An earlier result, from its file or as it is. Raises InputError for any other file."""
    if given is None or isinstance(given, dict):
        return given
    try:
        found = json.loads(Path(given).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"--compare {given}: not a readable result of `ldm eval-fid --json` ({error})") from error
    if not isinstance(found, dict) or not isinstance(found.get("metrics"), dict):
        raise InputError(f"--compare {given}: not a result of `ldm eval-fid --json`")
    return found


def with_comparison(result: dict[str, Any], earlier: dict[str, Any]) -> dict[str, Any]:
    """The result with `compared` and `worse` beside its metrics."""
    found = compare(result, earlier)
    warnings = result["warnings"] + [f"compared with an earlier result of another {text}" for text in found["warnings"]]
    return result | {"compared": found["metrics"], "worse": found["worse"], "warnings": warnings}


def lookup(result: dict[str, Any], name: str = "") -> tuple[str, float | None]:
    """(key, value) of a metric by its key or without its extractor: "fid" (also "" and "fd"), "kid" or "kid_mean".

    Raises UsageError for a metric that the result does not have.
    """
    values = result["metrics"]
    if name in ("", *METRICS["fid"].values("fid")) and result.get("frechet"):
        return result["frechet"], values[result["frechet"]]
    first, _, last = name.partition("_")
    found = [key for key in values if key == name]
    found += [key for key in values if key.split("_")[0] == first and key.endswith(f"_{last}" if last else "")]
    if not found:
        raise UsageError(f"{name or 'fid'}: not measured; this result has {', '.join(values)}")
    return found[0], values[found[0]]


def higher_is_better(key: str) -> bool:
    """The direction of a metric; of one that is not in the table, lower is better."""
    metric, _ = read_key(key)
    return metric is not None and metric.better == "higher"


def compare(result: dict[str, Any], old: dict[str, Any]) -> dict[str, Any]:
    """Changes since an earlier result: {"metrics": {key: {old, new, change}}, "worse": [keys], "warnings": […]}.

    Raises InputError where the numbers mean different things: another extractor, layer or resize rule.
    """
    for key in SAME:
        now, before = ((document.get("extractor") or {}).get(key) for document in (result, old))
        if now and before and now != before:
            raise InputError(f"--compare: the earlier result has another extractor ({key} {before!r}, now {now!r})")
    shared = [key for key in result["metrics"] if key in old["metrics"] and not read_key(key)[1]]
    if not shared:
        raise InputError(f"--compare: the earlier result has none of these metrics ({', '.join(result['metrics'])})")
    changes, worse = {}, []
    for key in shared:
        new, before = result["metrics"][key], old["metrics"][key]
        known = isinstance(new, (int, float)) and isinstance(before, (int, float))
        changes[key] = {"old": before, "new": new, "change": new - before if known else None}
        if known and (before - new if higher_is_better(key) else new - before) > NOISE * max(abs(before), 1):
            worse.append(key)
    warnings = [
        f"{key}{_in_words(old.get(key), result.get(key))}"
        for key in ("n_generated", "n_reference", "reference", "sampling")
        if old.get(key) != result.get(key)
    ]
    return {"metrics": changes, "worse": worse, "warnings": warnings}


def _in_words(old: Any, new: Any) -> str:
    return "" if isinstance(old, dict) or isinstance(new, dict) else f" ({old} then, {new} now)"
