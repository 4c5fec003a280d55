"""What `ldm demo` says at its end: figures beside those of reconstructions and real images, times, where to look."""

from pathlib import Path
from typing import Any

from ldmcli.core import console
from ldmcli.core.durations import duration_with_unit

ROWS = {
    "all": "everything right",
    "colour": "colour right",
    "shape": "shape right",
    "position": "place right",
    "background": "background right",
    "count": "number right",
}


def summary_text(summary: dict[str, Any], out: Path) -> str:
    """summary.json's content for people, in 80 columns but for long paths. Its warnings were said before."""
    columns = [summary, summary.get("reconstructions") or {}, summary.get("real") or {}]
    rows = [[name, *(_share(part.get(key)) for part in columns)] for key, name in ROWS.items() if key in summary]
    if "iou" in summary:
        rows.append(["overlap with the outline", *(_figure(part.get("iou"), 2) for part in columns)])
    if "fd" in summary:
        name = summary.get("fd_protocol", "FD").partition(":")[0]
        distances = [_figure(summary["fd"], 1), _figure(summary.get("fd_reconstructions"), 1), "0"]
        rows.append([name, *distances])
    heads = [f"{summary.get('n', '')} samples".strip(), "reconstructions", "real images"]
    widths = [max(len(line[k]) for line in [["", *heads], *rows]) for k in range(4)]
    table = [
        (" " * widths[0] + "  " + "  ".join(head.rjust(size) for head, size in zip(heads, widths[1:]))),
        *(row[0].ljust(widths[0]) + "  " + "  ".join(c.rjust(w) for c, w in zip(row[1:], widths[1:])) for row in rows),
        "",
    ]
    lines = (table if rows else []) + [f"{name:<16}{text}" for name, text in _facts(summary, out).items()]
    return console.clean("\n".join(lines))


def _facts(summary: dict[str, Any], out: Path) -> dict[str, str]:
    steps, seconds = summary.get("steps") or {}, summary.get("trained_seconds") or {}

    def course(name: str) -> str:
        return f"{steps[name]:,} steps in {duration_with_unit(seconds[name])}" if name in steps else ""

    psnr = f"{summary['ae_psnr']:.1f} dB on held-out images" if "ae_psnr" in summary else ""
    warnings = len(summary.get("warnings") or [])
    facts = {
        "autoencoder": ", ".join(filter(None, (psnr, course("autoencoder")))),
        "diffusion model": course("diffusion model"),
        "time": f"{duration_with_unit(summary['seconds'])} of {summary['minutes']:g} minutes"
        if "seconds" in summary
        else "",
        "pictures": str(out / "samples.png"),
        "report": str(out / "report.html"),
        "more of them": f"ldm sample --model {out / 'diffusion'}",
        "not good enough": f"as the {warnings} warnings above say" if warnings > 1 else "as the warning above says",
    }
    return {name: text for name, text in facts.items() if text and (warnings or name != "not good enough")}


def _share(value: Any) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _figure(value: Any, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
