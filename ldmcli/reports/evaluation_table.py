"""The document of an evaluation as tables for people: every number with its interval and its floor, in 80 columns."""

import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ldmcli.core.errors import LdmError
from ldmcli.evaluation.compare import higher_is_better, lookup, read_key
from ldmcli.evaluation.metrics import OF_SETS
from ldmcli.evaluation.result import SCHEMA
from ldmcli.reports.charts import figure

INTERVAL, FLOOR = LAST = "95 % interval", "floor"
LEAST_P = 0.001  # that is shown
WEIGHTS = {"ema": "averaged weights (EMA)", "raw": "weights of the last step (raw)"}


def describe_all(document: Mapping[str, Any], width: int = 80) -> str:
    """The document of an evaluation for people: one result, or a table with a row for each of several."""
    return describe_each(document["results"], width) if "results" in document else describe(document, width)


def describe(result: Mapping[str, Any], width: int = 80) -> str:
    """One result: a number a row, what changed since an earlier result, then what the numbers stand on."""
    parts = [numbers_table(result, width)]
    if result.get("by_masked_share"):
        parts.append(shares_table(result))
    if result.get("compared"):
        parts.append(changes_table(result, width))
    return "\n".join([*parts, *_foot(result, width)])


# --- one result ------------------------------------------------------------------------------------------------


@dataclass
class Number:
    """A row of the table. beside: texts by the titles of their columns; below: it belongs to the number above it."""

    label: str
    value: str
    beside: dict[str, str] = field(default_factory=dict)
    below: bool = False
    network: str = ""  # heading under which it stands, where there are several networks

    def rows(self, columns: Sequence[str]) -> list[list[str]]:
        """Its row with these columns; what has no column there follows in rows of its own."""
        indent = "  " if self.below else ""
        first = [indent + self.label, self.value, *(self.beside.get(title, "") for title in columns)]
        rest = [[f"{indent}  {title}", text] for title, text in self.beside.items() if title not in columns]
        return [first, *rest]


def numbers_table(result: Mapping[str, Any], width: int = 80) -> str:
    """The numbers with as many columns beside them as the width has room for."""
    found = numbers(result)
    titles = _titles(found)
    headings = list(dict.fromkeys(one.network for one in found))
    for count in range(len(titles), -1, -1):
        columns = titles[:count]
        rows: list[list[str]] = []
        for heading in headings:
            rows += [[heading]] if heading else []
            rows += [row for one in found if one.network == heading for row in one.rows(columns)]
        table = _aligned(["metric", "value", *columns], rows, right=(1,))
        if _widest(table) <= width:
            break
    return table


def _titles(found: Sequence[Number]) -> list[str]:
    """Titles of the columns beside the values, interval and floor last."""
    titles = dict.fromkeys(title for one in found for title in one.beside)
    return [*(title for title in titles if title not in LAST), *(title for title in LAST if title in titles)]


def cells(document: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(heads, rows) of one result for a page, whose width is not limited; ([], []) of any other document."""
    if document.get("schema") != SCHEMA or "metrics" not in document:
        return [], []
    try:
        found = numbers({**document, "extractors": []})  # labels keep their networks
    except (AttributeError, KeyError, TypeError, ValueError, LdmError):  # changed by hand
        return [], []
    titles = _titles(found)
    return ["metric", "value", *titles], [row for one in found for row in one.rows(titles)]


def numbers(result: Mapping[str, Any]) -> list[Number]:
    """The rows of a result. What says how much a number is worth stands below it."""
    labels = result.get("labels", {})
    printed, several = _published(result), len(networks_of(result)) > 1
    found: list[Number] = []
    above, parent = "", ""  # the label and the key of the newest number that stands for itself
    for key, value in result["metrics"].items():
        label, estimate = labels.get(key, key), _estimate_of(result, key)
        below = bool(above) and label.startswith(f"{above}, ")
        shown = label.removeprefix(f"{above}, ") if below else label
        above, parent = (above, parent) if below else (label, key)
        heading = _network_of(result, parent) if several else ""
        beside = {INTERVAL: _interval(estimate.get("interval")), FLOOR: _floor(estimate.get("floor"))}
        beside |= {printed[0]: printed[1].get(key, "")}
        shown = _without_network(shown, key) if heading else shown
        found.append(Number(shown, _number(value), {k: v for k, v in beside.items() if v}, below, heading))
    return found


def _estimate_of(result: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """What is known of a number's worth; of a value at infinite n the number that was extrapolated knows it."""
    estimates = result.get("estimates") or {}
    known = (estimates.get(key.removesuffix("_extrapolated")) or {}).get("extrapolated") or {}
    extrapolated = {"interval": known.get("interval")} if key.endswith("_extrapolated") else {}
    return {**extrapolated, **(estimates.get(key) or {})}


def _interval(bounds: Sequence[float] | None) -> str:
    return "" if bounds is None else " … ".join(_to_digits_of(bound, bounds[1] - bounds[0]) for bound in bounds)


def _floor(floor: Mapping[str, Any] | None) -> str:
    return "" if floor is None else " ± ".join(_to_digits_of(floor[name], floor["std"]) for name in ("value", "std"))


def _to_digits_of(value: float, spread: float) -> str:
    """A number with the decimals of which chance leaves two: 14.1832 by 4.7 is 14.2."""
    if not spread > 0:
        return _number(value)
    return f"{value:z,.{max(0, 1 - math.floor(math.log10(spread)))}f}"


def _published(result: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
    """The title of a column of published numbers, and the numbers by keys; ("", {}) where the protocol has no name."""
    stated = result.get("protocol") or {}
    if not stated.get("name"):
        return "", {}
    found = {}
    for name, value in stated["published"].items():
        metric, _, split = name.partition("_")  # fid_train: against another split
        found[lookup(dict(result), metric)[0] + (f"_{split}" if split else "")] = published(value)
    return f"published ({stated['table']})", found


def published(value: Any) -> str:
    """A number as it was printed, with its deviation where it had one."""
    return " ± ".join(f"{one:g}" for one in value) if isinstance(value, (list, tuple)) else f"{value:g}"


def networks_of(result: Mapping[str, Any]) -> list[str]:
    """name@hash of every network whose features were measured: name@first 12 digits of its weights' SHA-256."""
    opened = result.get("extractors") or [one for one in [result.get("extractor")] if one]
    return [f"{one['name']}@{one['weights_sha256'][:12]}" for one in opened]


def _without_network(label: str, key: str) -> str:
    """The label of a number of sets without the network in brackets: "KID (EfficientNet-lite0)" -> "KID"."""
    return re.sub(r" \([^()]*\)", "", label, count=1) if _of_sets(key) else label


def shares_table(result: Mapping[str, Any]) -> str:
    """The numbers by the share of the picture that masks cover."""
    labels, printed = result.get("labels", {}), {}
    if (result.get("protocol") or {}).get("name"):
        printed = result["protocol"].get("published_by_masked_share", {})
    names = [key for key in result["metrics"] if "_std" not in key]
    rows = []
    for share, one in result["by_masked_share"].items():
        there = ", ".join(f"{key} {published(value)}" for key, value in printed.get(share, {}).items())
        rows.append([share, str(one["n"]), *(_with_deviation(one["metrics"], key) for key in names), there])
    heads = ["share masked", "n", *(labels.get(key, key) for key in names), "published" if printed else ""]
    return _aligned(heads, rows)


def _foot(result: Mapping[str, Any], width: int) -> list[str]:
    """What the numbers stand on: counts, weights, network, and the sizes of the floor."""
    text = _counts(result)
    if held := result.get("held_out"):
        text += f" ({held['rows']:,} held out of {held['of']:,} rows)"
    if "weights" in result:
        text += f"; {WEIGHTS[result['weights']]}"
    if "step" in result:
        text += f"; checkpoint of step {result['step']:,}"
    return [line for text in [text, *_features(result), *_floors(result)] for line in _wrapped(text, width)]


def _features(result: Mapping[str, Any]) -> list[str]:
    """The network of the features, where it is one; several stand above their numbers."""
    networks, opened = networks_of(result), result.get("extractor")
    return [f"features: {networks[0]}, {opened['layer']}, {opened['resize']}"] if opened and len(networks) == 1 else []


def _network_of(result: Mapping[str, Any], key: str) -> str:
    """name@hash of the network of features that a number is of; "" where it needs none."""
    networks = networks_of(result)
    known = ((result.get("estimates") or {}).get(key) or {}).get("network")
    if known in networks or not _of_sets(key):
        return known if known in networks else ""
    named = [one for one in networks if re.sub(r"\W", "_", one.partition("@")[0]) in key]
    return networks[0] if len(networks) == 1 else max(named, key=len, default="")


def _of_sets(key: str) -> bool:
    metric, _ = read_key(key)
    return metric is not None and metric.needs in OF_SETS


def _counts(result: Mapping[str, Any]) -> str:
    return f"n = {result.get('n_generated') or 0:,} measured, {result.get('n_reference') or 0:,} reference"


def _floors(result: Mapping[str, Any]) -> list[str]:
    """The floors in words: of how many real pictures each is, and what the measured images have at these sizes."""
    several = len(networks_of(result)) > 1
    by_size: dict[tuple[int, int], dict[str, list[str]]] = {}
    for key, estimate in (result.get("estimates") or {}).items():
        if floor := estimate.get("floor"):
            sizes = by_size.setdefault((floor["n_generated"], floor["n_reference"]), {})
            label = _without_network(result["labels"].get(key, key), key)
            here = [] if floor.get("here") is None else [f"{label} {_number(floor['here'])}"]
            sizes.setdefault(_network_of(result, key) if several else "", []).extend(here)
    lines = []
    for (first, second), by_network in by_size.items():
        parts = [", ".join(texts) + (f" ({name})" if name else "") for name, texts in by_network.items() if texts]
        text = (
            f"floor: {'two halves' if first == second else 'two parts'} of the real pictures, {first:,} and {second:,}"
        )
        lines.append(text + (f"; at these sizes the measured images have {'; '.join(parts)}" if parts else ""))
    return lines


# --- what changed ----------------------------------------------------------------------------------------------


def changes_table(result: Mapping[str, Any], width: int = 80) -> str:
    """Each number beside its earlier value, whether the change is more than chance, and why that is so."""
    changes, several = result["compared"], len(networks_of(result)) > 1
    rows: list[list[str]] = []
    reasons: dict[str, list[str]] = {}
    for network in dict.fromkeys(_network_of(result, key) for key in changes):
        rows += [[network]] if network and several else []
        for key, change in changes.items():
            if _network_of(result, key) == network:
                label = _without_network(result.get("labels", {}).get(key, key), key)
                old, new = (_number(change[name]) for name in ("old", "new"))
                rows.append([label, old, new, _signed(change), verdict(key, change)])
                reasons.setdefault(change.get("why") or "", []).append(label)
    lines = [_aligned(["compared", "earlier", "now", "change", "verdict"], rows, right=(1, 2, 3))]
    for why, names in reasons.items():
        text = why if len(reasons) == 1 else f"{', '.join(dict.fromkeys(names))}: {why}"
        lines += _wrapped(text, width) if why else []
    return "\n".join(["", *lines, ""])


def verdict(key: str, change: Mapping[str, Any]) -> str:
    """Whether a change is real, in words."""
    if change["change"] is None:
        return "can't be compared"
    if "real" not in change or (change["real"] is None and change["change"]):
        return "chance unknown"
    p = change.get("p")
    chance = "" if p is None else f" (p < {LEAST_P})" if p < LEAST_P else f" (p {p:.2g})"
    if not change["real"]:
        return f"chance{chance}" if change["change"] else "the same"
    better = (change["change"] > 0) == higher_is_better(key)
    return f"real, {'better' if better else 'worse'}{chance}"


def _signed(change: Mapping[str, Any]) -> str:
    value = change["change"]
    return "" if value is None else ("+" if value > 0 else "") + _number(value)


# --- several results -------------------------------------------------------------------------------------------


def describe_each(results: Sequence[Mapping[str, Any]], width: int = 80) -> str:
    """A row a run and a column a metric, as many side by side as there is room for; intervals below the numbers."""
    networks = networks_of(results[0])
    waiting = [key for key in dict.fromkeys(key for one in results for key in one["metrics"]) if "_std" not in key]
    tables = []
    while waiting:
        network = _network_of(results[0], waiting[0])
        names = [key for key in waiting if _network_of(results[0], key) == network]
        fitting = (k for k in range(len(names), 1, -1) if _widest(_runs_table(results, names[:k])) <= width)
        names = names[: next(fitting, 1)]
        tables.append("\n".join([*([network] if network and len(networks) > 1 else []), _runs_table(results, names)]))
        waiting = [key for key in waiting if key not in names]
    foot = [_counts(results[0]), *_features(results[0]), *_floors(results[0])]
    return "\n".join(["\n\n".join(tables), *(line for text in foot for line in _wrapped(text, width))])


def _runs_table(results: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    labels = {key: label for one in results for key, label in one["labels"].items()}
    rows = []
    for one in results:
        rows.append([one["name"], *(_with_deviation(one["metrics"], key) for key in names)])
        rows += _row_of(one, names, "interval", INTERVAL, _interval)
    rows += _row_of(results[0], names, "floor", "floor", _floor)
    heads = [_without_network(labels[key], key) for key in names]
    return _aligned(["run", *(head.replace(", ", ",\n") for head in heads)], rows)


def _row_of(result: Mapping[str, Any], names: Sequence[str], part: str, title: str, text: Any) -> list[list[str]]:
    """A row with a part of each number's estimate, where any has it."""
    cells = [text(_estimate_of(result, key).get(part)) for key in names]
    return [[f"  {title}", *cells]] if any(cells) else []


def _with_deviation(values: Mapping[str, float | None], key: str) -> str:
    """A number with its deviation, where it has one: kid_NET_std of kid_NET_mean, psnr_std_bicubic of psnr_bicubic."""
    first, _, rest = key.partition("_")
    names = (f"{key}_std", f"{key.removesuffix('_mean')}_std", f"{first}_std_{rest}")
    value, deviation = values.get(key), next((values[name] for name in names if name in values), None)
    return _number(value) + (f" ± {deviation:.3g}" if value is not None and deviation is not None else "")


# --- layout ----------------------------------------------------------------------------------------------------


def _number(value: float | None) -> str:
    return "none" if value is None else figure(value)


def _aligned(heads: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Columns two blanks apart, those of `right` to the right. A row of one cell is a heading."""
    titles = [head.split("\n") for head in heads]
    above = [[lines[i] if i < len(lines) else "" for lines in titles] for i in range(max(map(len, titles)))]
    cells = [[" ".join(str(cell).split("\n")) for cell in row] for row in rows]
    widths = [max((len(row[i]) for row in [*above, *cells] if 1 < len(row) > i), default=0) for i in range(len(heads))]

    def line(row: Sequence[str]) -> str:
        if len(row) == 1:
            return row[0]
        padded = (
            cell.rjust(width) if i in right else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths))
        )
        return "  ".join(padded).rstrip()

    return "\n".join([*map(line, above), line(["-" * width for width in widths]), *map(line, cells)])


def _widest(text: str) -> int:
    return max(map(len, text.split("\n")))


def _wrapped(text: str, width: int) -> list[str]:
    """Lines of a sentence; all but the first are set in."""
    return textwrap.wrap(text, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
