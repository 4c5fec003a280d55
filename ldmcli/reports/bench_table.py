"""The table that `ldm bench` prints: a block a model, a row a measurement, 80 columns wide."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from ldmcli.core import console

GIB = 2**30


def bench_text(document: dict[str, Any]) -> str:
    """The document of `ldm bench --json` for a terminal."""
    machine, rates = document["machine"], document["product_flops_per_s"]
    threads = f", {document['threads']} thread(s)" if document["threads"] else ""
    products = ", ".join(f"{name} {rate / 1e12:.3g} TFLOP/s" for name, rate in rates.items())
    lines = [f"{machine['device']}{threads}, torch {document['versions']['torch']}", f"matrix product: {products}"]
    for heading, group in groupby(document["rows"], _heading):
        rows = list(group)
        lines += ["", heading, _table(rows)]
        waits = [row["host_waits"] for row in rows if row.get("host_waits") is not None]
        lines += [f"the host waited for the GPU {max(waits)} times in a training step"] if waits else []
    return "\n".join(lines)


def _heading(row: dict[str, Any]) -> str:
    height, width = row["size"]
    parts = [row["model"], row["variant"], f"{width}x{height} px", f"latents {'x'.join(map(str, row['latent']))}"]
    parts += [row["precision"], f"{row['processes']} processes" if row["processes"] > 1 else ""]
    return ", ".join(part for part in [*parts, "compiled" if row["compile"] else ""] if part)


def _table(rows: Sequence[dict[str, Any]]) -> str:
    """Columns that no row fills are left out."""
    columns = {
        "work": lambda row: row["work"],
        "batch": lambda row: row["batch"],
        "img/s": lambda row: _short(row["images_per_s"]),
        "±%": lambda row: round(100 * row["spread"]),
        "steps/s": lambda row: _short(row["steps_per_s"]),
        "TFLOP/s": lambda row: _short(row["tflops_per_s"]),
        "MFU%": lambda row: round(100 * row["mfu"]),
        "wait%": lambda row: None if row.get("wait") is None else round(100 * row["wait"]),
        "GiB": lambda row: _short(row["peak_memory_bytes"] / GIB),
        "h/epoch": lambda row: _short(row.get("hours_per_epoch")),
        "ratio": lambda row: _short(row.get("ratio")),
    }
    cells = {name: [value(row) for row in rows] for name, value in columns.items()}
    shown = [name for name, values in cells.items() if any(value is not None for value in values)]
    return console.table([[cells[name][k] for name in shown] for k in range(len(rows))], shown)


def _short(value: float | None) -> float | int | None:
    """Three digits."""
    if value is None:
        return None
    rounded = float(f"{value:.3g}")
    return int(rounded) if rounded >= 100 else rounded
