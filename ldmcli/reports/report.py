"""report.html: a run, or the demo's two runs, in one file that opens offline."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldmcli import __version__
from ldmcli.conditions.text import Text
from ldmcli.core import console
from ldmcli.core.durations import duration_with_unit
from ldmcli.core.errors import LdmError
from ldmcli.core.outputs import write_page
from ldmcli.reports import copying, html, run_report
from ldmcli.reports.card import write_card
from ldmcli.reports.html import safe
from ldmcli.reports.run_view import RunView, read_run

CARDS = 16
_SCORES = ("colour", "shape", "position", "background", "count", "all")
_NAMES = {"all": "everything right", "count": "number of objects", "iou": "overlap with the shape"}


def write_report(run_dir: Path, summary: dict[str, Any] | None = None, out: Path | None = None) -> Path:
    """Writes report.html into `out` (None: the run's folder) from what lies in run_dir, and returns its path.

    summary: an evaluation that is shown with those that lie in the folder as eval*.json. Raises ResourceError or
    UsageError when it can't write, or would replace a page that was changed by hand.
    """
    run = read_run(run_dir)
    body = (
        run_report.header(run)
        + run_report.key_figures(run)
        + run_report.previews(run)
        + run_report.curves(run)
        + run_report.evaluations(run, summary)
        + copying.section(run)
        + run_report.nearest_training_pictures(run)
        + run_report.protocol(run)
        + run_report.settings(run)
    )
    return _write(out or run_dir, run.name, body)


def write_pages(run_dir: Path) -> None:
    """Model card and report. That one cannot be written, or was changed by hand and is kept, is a warning: it must not
    hide how the training ended."""
    for write in (write_card, write_report):
        try:
            path = write(run_dir)
            if write is write_report:
                console.say(f"report: {path}")
        except (LdmError, OSError) as error:
            console.warn(error)


def _write(folder: Path, title: str, body: str) -> Path:
    footer = f"<footer>Written by ldm {safe(__version__)}. This page is one file and loads nothing.</footer>"
    write_page(folder / "report.html", html.page(f"{title} · ldm", body + footer))
    return folder / "report.html"


def write_demo_report(out: Path, runs: list[Path], summary: dict[str, Any]) -> Path:
    """Writes out/report.html over the demo's runs (autoencoder, diffusion) and returns its path.

    summary: shares of samples as `shape_reading.score` gives them at the top level, under "reconstructions" and "real"
    the same of those; "ae_psnr" in dB, "fd", "fd_reconstructions", "fd_protocol", "seconds", "n", "data". What is
    absent is left out. out/samples.png is the contact sheet of the samples, out/prompts.txt their prompts.
    """
    opened = [read_run(path) for path in runs]
    body = (
        _demo_header(opened, summary)
        + html.tiles(_demo_figures(summary), "big")
        + _samples(out, opened)
        + _comparison(summary)
        + "".join(_part(run) for run in opened)
        + _rest(summary)
    )
    return _write(out, "Demo", body)


def _demo_header(runs: Sequence[RunView], summary: dict[str, Any]) -> str:
    run = next((run for run in runs if run.diffusion), None)
    words = run is not None and run.diffusion is not None and Text.name in run.diffusion.condition.kinds
    title = "Pictures from words" if words else "Pictures from noise"
    rows = (run.state.get("data") or {}).get("rows") if run else None
    size = run.stats.get("size") if run else None
    details = [f"{rows:,} images" if isinstance(rows, int) else "", f"{size[0]}×{size[1]} px" if size else ""]
    data = f"{run_report.last_name(summary.get('data')) or 'images'} ({', '.join(filter(None, details))})"
    machine: dict[str, Any] = next((run.state["machine"] for run in runs if run.state.get("machine")), {})
    gpu = machine.get("device_type") == "gpu"
    cores = f" on {machine['cpu_count']} CPU cores" if machine.get("cpu_count") and not gpu else ""
    time = f" in {duration_with_unit(summary['seconds'])}{cores}" if _given(summary, "seconds") else ""
    lead = (
        f"One command, “ldm demo”, trained an autoencoder and a latent diffusion model from nothing on "
        f"{data.removesuffix(' ()')} and measured them{time}. What they are measured on was held out from training."
    )
    reasons = "".join(f'<p class="reason">{safe(text)}</p>' for text in summary.get("warnings") or [])
    return f'<header><h1>{title}</h1><p class="lead">{safe(lead)}</p>{reasons}</header>'


def _demo_figures(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The figures that a visitor reads first."""
    n = f"of {summary['n']:,} samples" if isinstance(summary.get("n"), int) else "of the samples"
    read = [key for key in ("colour", "shape", "position") if _given(summary, key)]
    tiles = [(f"Right {key}", _share(summary[key]), n) for key in read]
    if _given(summary, "ae_psnr"):
        tiles.append(("Autoencoder PSNR", f"{summary['ae_psnr']:.1f} dB", "held-out images; higher is better"))
    if _given(summary, "fd"):
        tiles.append(("Fréchet distance", f"{summary['fd']:.1f}", "samples to real images; lower is better"))
    if _given(summary, "seconds"):
        tiles.append(("Time", duration_with_unit(summary["seconds"]), "the whole chain"))
    return tiles


def _given(values: dict[str, Any], key: str) -> bool:
    value = values.get(key)
    return isinstance(value, int | float) and value == value


def _share(value: float) -> str:
    """0.9921875 -> '99.2 %'; 1 -> '100 %'."""
    return f"{100 * value:.3g} %" if value < 1 else "100 %"


def _samples(out: Path, runs: Sequence[RunView]) -> str:
    """All samples, the first ones with their prompts."""
    sheet = html.read_picture(out / "samples.png")
    if sheet is None:
        return ""
    prompts = _prompts(out / "prompts.txt")
    run = next((run for run in runs if run.stats.get("size") and run.kind == "diffusion"), None)
    cells = html.cut(sheet, run.stats["size"]) if run else []
    if run is None or not cells:
        return html.section("Samples", html.picture(sheet, "samples"))
    if not prompts:
        return html.section("Samples", html.mosaic(cells))
    marks = run_report.mark_samples(run, cells, prompts)
    count = min(len(cells), len(prompts))
    first = html.cards(cells[:CARDS], prompts[:CARDS], marks[:CARDS])
    wrong = " Those that show anything else than asked are framed." if "wrong" in marks else ""
    every = html.section(
        "All samples",
        html.mosaic(cells[:count], prompts, marks),
        f"All {count}, none picked; the prompt shows on hover.{wrong}",
    )
    checked = " The mark is that of a program that reads colours, shapes and places from the pixels." if marks else ""
    return html.section("Asked and drawn", first, f"The first {min(CARDS, count)} of {count} prompts.{checked}") + every


def _prompts(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return []


def _comparison(summary: dict[str, Any]) -> str:
    """Samples beside what the autoencoder lets through and beside real images, read by the same program."""
    parts = [summary, summary.get("reconstructions") or {}, summary.get("real") or {}]
    rows = [
        [_NAMES.get(key, key), *(_share(part[key]) if _given(part, key) else "–" for part in parts)]
        for key in _SCORES
        if _given(summary, key)
    ]
    if _given(summary, "iou"):
        rows.append([_NAMES["iou"], *(f"{part['iou']:.2f}" if _given(part, "iou") else "–" for part in parts)])
    if _given(summary, "fd"):
        rebuilt = f"{summary['fd_reconstructions']:.1f}" if _given(summary, "fd_reconstructions") else "–"
        rows.append(["Fréchet distance to real images", f"{summary['fd']:.1f}", rebuilt, "0"])
    if not rows:
        return ""
    table = html.table(rows, ["", "samples", "reconstructions", "real images"], "compare")
    protocol = summary.get("fd_protocol")
    note = f'<p class="lead note">Fréchet distance: {safe(protocol)}.</p>' if protocol else ""
    lead = "The reconstructions are the ceiling: no sample can be better than what the autoencoder lets through."
    return html.section("Measured", table + note, lead)


def _part(run: RunView) -> str:
    """One of the runs: figures, pictures, curves, settings."""
    title = run_report.KINDS.get(run.kind, run.name)
    inside = run_report.key_figures(run) + run_report.previews(run) + run_report.curves(run)
    more = html.folded(
        "How it was run", html.definition_list(run_report.identity(run)) + run_report.setting_tables(run)
    )
    return f'<section class="part"><h2>{safe(title)}</h2>{inside}{more}</section>'


def _rest(summary: dict[str, Any]) -> str:
    figures = html.table(run_report.flat(summary), ("", ""))
    return html.section("Everything measured", html.folded("summary.json", figures))
