"""One result of an evaluation beside another: which numbers compare, what changed, and metrics by short names.

Keys carry the extractor and the plain method that a number is of (`kid_effnet_lite0_mean`, `psnr_bicubic`);
`read_key` finds the metric of the table that one belongs to.
"""

import json
import math
from pathlib import Path
from typing import Any

from scipy import special

from ldmcli.core.errors import InputError, UsageError
from ldmcli.evaluation.baselines import PLAIN_METHODS, UNGUIDED
from ldmcli.evaluation.metrics import LOGITS, METRICS, OF_PAIRS, OF_SETS, Metric
from ldmcli.evaluation.passes import SAME
from ldmcli.maths.uncertainty import mean_error
from ldmcli.sampling.machine import FULL

NOISE = 1e-9  # relative change that is rounding
SIGNIFICANT = 0.05


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
    """Changes since an earlier result: {"metrics": {key: {old, new, change, real, p, why}}, "worse": [keys],
    "warnings": […]}. worse: what got worse beyond chance, or, where nobody knows chance, at all.

    real: whether the change is more than chance (see `by_holm`); None where that is not known, and where the numbers do
    not compare, whose change is None, too. why says it in words. Raises InputError where no numbers compare: none are
    shared, or all are of another extractor, layer or resize rule.
    """
    others = other_networks(result, old)
    shared = [key for key in result["metrics"] if key in old["metrics"] and not read_key(key)[1]]
    if not shared:
        raise InputError(f"--compare: the earlier result has none of these metrics ({', '.join(result['metrics'])})")
    if others and len(networks(result)) == 1:
        raise InputError(f"--compare: the earlier result has {next(iter(others.values()))}")
    changes = by_holm({key: _change(key, result, old, others) for key in shared})
    if sampled := _sampled_otherwise(result, old):
        changes = {key: one | {"why": f"{one['why']}; {sampled}"} for key, one in changes.items()}
    worse = [key for key, change in changes.items() if _is_worse(key, change)]
    warnings = [
        f"{key}{_in_words(old.get(key), result.get(key))}"
        for key in ("n_generated", "n_reference", "reference", "sampling")
        if old.get(key) != result.get(key)
    ]
    then, now = (document.get("precision", FULL) for document in (old, result))
    warnings += [f"precision{_in_words(then, now)}"] if then != now else []
    return {"metrics": changes, "worse": worse, "warnings": warnings}


def networks(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The protocols of the networks that a result's numbers are by, by their names."""
    return {one.get("name", ""): one for one in result.get("extractors") or [result.get("extractor") or {}]}


def other_networks(result: dict[str, Any], old: dict[str, Any]) -> dict[str, str]:
    """{name@hash of a network of the result: in what that of the earlier result differs}."""
    before = networks(old)
    pairs = [(now, before[name]) for name, now in networks(result).items() if name in before]
    first = [document.get("extractor") or {} for document in (result, old)]
    if len(networks(result)) == len(before) == 1 or first[0].get("name") == first[1].get("name"):
        pairs.append((first[0], first[1]))
    found = {}
    for now, then in pairs:
        differ = [key for key in SAME if now.get(key) and then.get(key) and now[key] != then[key]]
        if differ:
            named = f"{now.get('name')}@{str(now.get('weights_sha256'))[:12]}"
            found[named] = f"another extractor ({differ[0]} {then[differ[0]]!r}, now {now[differ[0]]!r})"
    return found


def _sampled_otherwise(result: dict[str, Any], old: dict[str, Any]) -> str:
    """In what the samples of the results differ: "sampled with steps 20 then, 50 now"; "" where that is not known."""
    now, then = (_sampling_of(document) for document in (result, old))
    names = [name for name in now if name in then and now[name] != then[name] and not isinstance(now[name], dict)]
    return f"sampled with {', '.join(f'{one} {then[one]} then, {now[one]} now' for one in names)}" if names else ""


def _sampling_of(document: dict[str, Any]) -> dict[str, Any]:
    """How samples were made; documents of versions that knew one number format do not name it."""
    return {**(document.get("sampling") or {}), "precision": document.get("precision", FULL)}


def _is_worse(key: str, change: dict[str, Any]) -> bool:
    difference = change["change"]
    if difference is None or change["real"] is False:
        return False
    lost = -difference if higher_is_better(key) else difference
    return lost > NOISE * max(abs(change["old"]), 1)


def _in_words(old: Any, new: Any) -> str:
    return "" if isinstance(old, dict) or isinstance(new, dict) else f" ({old} then, {new} now)"


# --- chance ----------------------------------------------------------------------------------------------------


def _change(key: str, result: dict[str, Any], old: dict[str, Any], others: dict[str, str]) -> dict[str, Any]:
    """A number of both results, and, where both have errors, how likely so large a change is by chance."""
    new, before = result["metrics"][key], old["metrics"][key]
    found: dict[str, Any] = {"old": before, "new": new, "change": None, "real": None, "p": None, "why": ""}
    if not all(isinstance(one, (int, float)) and math.isfinite(one) for one in (new, before)):
        return found | {"why": "one of them has no value"}
    estimates = [(document.get("estimates") or {}).get(key) or {} for document in (result, old)]
    if all(estimates) and (reason := _not_comparable(key, result, old, others, estimates)):
        return found | {"why": f"they do not compare: {reason}"}
    found["change"] = new - before
    if (paired := _of_pairs(key, result, old)) is not None:
        return found | paired
    if any(one.get("error_generated") is None for one in estimates):
        return found | {"why": "chance is unknown: not both have an error"}
    same = same_reference(result, old)
    errors = [one["error_generated"] for one in estimates]
    errors += [] if same else [one.get("error_reference") or 0.0 for one in estimates]
    freedom = max(1, min(result.get("n_generated") or 2, old.get("n_generated") or 2) - 1)
    against = "" if same else ", and the errors of both references"
    return found | {"p": _chance(new - before, math.hypot(*errors), freedom), "why": f"independent images{against}"}


def _chance(change: float, error: float, freedom: int) -> float:
    """Of a change so large, either way, by chance alone."""
    if abs(change) <= NOISE * error or change == 0:
        return 1.0
    return float(2 * special.stdtr(freedom, -abs(change) / error)) if error > 0 else 0.0


def _of_pairs(key: str, result: dict[str, Any], old: dict[str, Any]) -> dict[str, Any] | None:
    """Chance of values image by image of the same originals; None where they are not at hand."""
    sides = [(document.get("of_each") or {}).get(key) or [] for document in (result, old)]
    originals = result.get("originals")
    if not originals or originals != old.get("originals") or len(sides[0]) != len(sides[1]):
        return None
    if any((a is None) != (b is None) for a, b in zip(*sides)):  # equal images on one side only: other means
        return None
    differences = [a - b for a, b in zip(*sides) if a is not None]
    error = mean_error(differences)
    if error is None:
        return None
    mean = math.fsum(differences) / len(differences)
    rounded = abs(mean) <= 1e-6  # of_each has six digits
    p = 1.0 if rounded else _chance(mean, error.total, len(differences) - 1)
    return {"p": p, "why": "image by image, of the same originals"}


def same_reference(result: dict[str, Any], old: dict[str, Any]) -> bool:
    """Whether both are measured against the same images."""
    contents = [document.get("reference_content") for document in (result, old)]
    if all(contents):
        return contents[0] == contents[1]
    sides = [document.get("reference") or {} for document in (result, old)]
    prints = [one.get("fingerprint") for one in sides]
    alike = prints[0] == prints[1] if all(prints) else sides[0] == sides[1]
    keys = ("split", "rows", "size", "resize")
    shape = all(sides[0].get(key) == sides[1].get(key) for key in keys)
    return alike and shape and result.get("n_reference") == old.get("n_reference")


def _not_comparable(
    key: str, result: dict[str, Any], old: dict[str, Any], others: dict[str, str], estimates: list[Any]
) -> str:
    """Why two numbers with errors do not compare; "" where they do."""
    metric = read_key(key)[0]
    named = [one.get("network") for one in estimates]
    if named[0] in others:
        return others[named[0]]
    if all(named) and named[0] != named[1]:
        return f"another network ({named[1]} then, {named[0]} now)"
    if metric is None or metric.needs not in (*OF_SETS, *OF_PAIRS):
        return ""
    sides = [document.get("reference") or {} for document in (old, result)]
    for what in ("source", "split"):
        if metric.needs != LOGITS and not same_reference(result, old) and sides[0].get(what) != sides[1].get(what):
            return f"another reference ({what} {sides[0].get(what)} then, {sides[1].get(what)} now)"
    if metric.at_any_n or metric.needs in OF_PAIRS:
        return ""
    counts = ("n_generated", "n_reference") if metric.needs != LOGITS else ("n_generated",)
    for count in counts:
        if old.get(count) != result.get(count):
            words = f"{count} was {old.get(count)}, now {result.get(count)}, and the value depends on it"
            return words + _biases(key, estimates, old, result)
    return ""


def _biases(key: str, estimates: list[Any], old: dict[str, Any], result: dict[str, Any]) -> str:
    """How much of two Fréchet distances their extrapolations say is bias."""
    beyond = [(one.get("extrapolated") or {}).get("value") for one in estimates]
    if None in beyond:
        return ""
    then, now = old["metrics"][key] - beyond[1], result["metrics"][key] - beyond[0]
    return f" (the bias was about {then:.3g}, now {now:.3g})"


def by_holm(changes: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The changes with `real`: p below 5 % after Holm's correction (1979) for all numbers that are tested together, by
    which p is multiplied, too."""
    known = sorted((key for key, change in changes.items() if change["p"] is not None), key=lambda k: changes[k]["p"])
    out, highest = dict(changes), 0.0
    for place, key in enumerate(known):
        change = changes[key]
        highest = min(1.0, max(highest, change["p"] * (len(known) - place)))
        why = change["why"] + (f"; p by Holm over {len(known)} numbers" if len(known) > 1 else "")
        out[key] = change | {"p": highest, "real": highest < SIGNIFICANT, "why": why}
    return out
