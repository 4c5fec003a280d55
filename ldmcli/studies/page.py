"""study.html: tables, curves and sheets of a study, in one file that opens offline."""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from ldmcli import __version__
from ldmcli.core.durations import duration_with_unit
from ldmcli.core.outputs import write_page
from ldmcli.evaluation.metrics import report_title
from ldmcli.reports import html
from ldmcli.reports.charts import Series, figure, line_chart

PAGE = "study.html"
Found = dict[str, Any]


def write_study_page(out: Path, found: Found) -> Path:
    """Writes out/study.html of study.json's content and returns its path."""
    body = (
        _header(found)
        + html.section("First stages", _first_stages(out, found), _FIRST_STAGES)
        + html.section("Models", _models(found), _MODELS)
        + html.section("Quality while training", _training_curves(found), _TRAINING)
        + html.section("Quality over sampling speed", _sampling(found), _SAMPLING)
        + html.section("Rate and distortion", _rate_distortion(found), _RATE)
        + html.section("Samples", _samples(out, found), "The first samples of one seed, none picked.")
        + html.section("How it was measured", _protocol(found))
    )
    footer = f"<footer>Written by ldm {html.safe(__version__)}. This page is one file and loads nothing.</footer>"
    write_page(out / PAGE, html.page("Study · ldm", body + footer))
    return out / PAGE


_FIRST_STAGES = (
    "Reconstructions of held-out images (Tab. 8). A first stage bounds what its diffusion model can reach; f = 1 has "
    "none, its latents are the pixels."
)
_MODELS = (
    "Diffusion models of equal numbers of parameters and equal training (Sec. 4.1), at the most sampling steps. "
    "Several seeds: mean, and lowest to highest."
)
_TRAINING = "Samples from fixed seeds against held-out images, over steps and over seconds of training (Fig. 5, 17)."
_SAMPLING = (
    "Each point is a number of sampling steps; the fewest are the fastest (Fig. 6). Lower and further right is better."
)
_RATE = (
    "A diffusion model read as a progressive coder (Fig. 2): error of the pixels decoded from what has been sent, over "
    "bits a pixel and channel. The steep part is semantic compression, the flat tail are details that nobody sees."
)


def _header(found: Found) -> str:
    variants = _variants(found)
    bound = f"{found['minutes']:g} minutes each" if found.get("minutes") else f"{found.get('steps') or 0:,} steps each"
    seeds = max((len(group) for group in variants.values()), default=0)
    data = (found.get("data") or {}).get("source", "")
    facts = f"{html.safe(data)} · {len(variants)} models · {bound} · {seeds} seed{'s' if seeds != 1 else ''}"
    return f"<header><h1>Study</h1><p>{facts}</p></header>" + _failures(found)


def _failures(found: Found) -> str:
    return "".join(
        f'<p class="note">{html.safe(name)} is left out: {html.safe(text)}</p>'
        for name, text in (found.get("failed") or {}).items()
    )


def _variants(found: Found) -> dict[str, list[Found]]:
    """Models by what they are compared as: the seeds of one are together."""
    groups: dict[str, list[Found]] = {}
    for model in found["models"]:
        groups.setdefault(model["variant"], []).append(model)
    return groups


# --- tables --------------------------------------------------------------------------------------------------------


def _first_stages(out: Path, found: Found) -> str:
    stages = found["first_stages"]
    if not stages:
        return ""
    keys = [key for key in stages[0]["metrics"] if not _is_deviation(key)]
    headers = ["first stage", *(f"{_reconstruction_title(key)} {_arrow(key)}" for key in keys)]
    with_codes = any("codes_used" in stage for stage in stages)
    rows = []
    for stage in stages:
        cells = [_with_deviation(stage["metrics"], key) for key in keys]
        codes = [f"{100 * stage['codes_used']:.0f} %, perplexity {stage['perplexity']:.0f}"] if with_codes else []
        rows.append([stage["variant"], *cells, *codes, _length(stage)])
    headers += [*(["codes in use"] if with_codes else []), "training"]
    return html.table(rows, headers) + _reconstructions(out, stages)


def _is_deviation(key: str) -> bool:
    return key.endswith(("_std", "_equal_images"))


def _reconstruction_title(key: str) -> str:
    """R-FID and R-IS are what the paper calls both of reconstructions."""
    title = _title(key)
    return f"R-{title}" if key.split("_")[0] in ("fid", "fd", "is", "kid") else title


def _title(key: str) -> str:
    found = report_title(key)
    return found[0] if found else key.replace("_", " ")


def _arrow(key: str) -> str:
    found = report_title(key)
    return "" if found is None else {"lower": "↓", "higher": "↑"}[found[1].better]


def _with_deviation(metrics: Found, key: str) -> str:
    stem = key.removesuffix("_mean")
    deviation = metrics.get(f"{stem}_std")
    return figure(metrics[key]) + (f" ± {figure(deviation)}" if deviation else "")


def _length(run: Found) -> str:
    seconds = run.get("trained_seconds")
    return f"{run.get('steps') or 0:,} steps" + (f", {duration_with_unit(seconds)}" if seconds else "")


def _models(found: Found) -> str:
    rows, keys = [], _distance_keys(found)
    for variant, group in _variants(found).items():
        first, most = group[0], [model["sampling"][-1] for model in group]
        rows.append(
            [
                variant,
                "×".join(map(str, first["latent"])),
                f"{first['parameters'] / 1e6:.2f} M",
                _over_seeds([model.get("steps") for model in group]),
                _over_seeds([model.get("training_images_per_s") for model in group]),
                _over_seeds([one["images_per_s"] for one in most]),
                *(_over_seeds([one["metrics"].get(key) for one in most]) for key in keys),
            ]
        )
    headers = ["model", "latent", "parameters", "steps", "images/s, training", "images/s, sampling"]
    return html.table(rows, [*headers, *(f"{_title(key)} {_arrow(key)}" for key in keys)])


def _over_seeds(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    spread = f" ({figure(min(known))} to {figure(max(known))})" if len(known) > 1 else ""
    return figure(mean(known)) + spread


def _distance_keys(found: Found) -> list[str]:
    """Keys of the measured metrics, the Fréchet distance first."""
    metrics = found["models"][0]["sampling"][-1]["metrics"] if found["models"] else {}
    return [key for key, value in metrics.items() if value is not None and not _is_deviation(key)]


# --- curves --------------------------------------------------------------------------------------------------------


def _training_curves(found: Found) -> str:
    charts = []
    for key in _distance_keys(found):
        by_step = _curves(found, key, lambda point: point[0])
        by_second = _curves(found, key, lambda point: point[1])
        charts.append(line_chart(f"{_title(key)} over steps", by_step, marks=True))
        charts.append(line_chart(f"{_title(key)} over seconds", by_second, x_label="seconds", marks=True))
    charts.append(
        line_chart("Validation loss over seconds", _curves(found, "val_loss", lambda p: p[1]), x_label="seconds")
    )
    return _charts(charts)


def _curves(found: Found, key: str, place: Callable[[Sequence[float]], float]) -> list[Series]:
    """A line a variant: of one seed as it is, of several the mean where all have begun, with their range as a band."""
    lines = []
    for variant, group in _variants(found).items():
        runs = [[(place(point), point[2]) for point in model["curves"].get(key, ())] for model in group]
        runs = [points for points in runs if points]
        if len(runs) == 1:
            lines.append(Series(variant, runs[0]))
        elif runs:
            lines.append(_mean_line(variant, runs))
    return lines


def _mean_line(name: str, runs: Sequence[Sequence[tuple[float, float]]]) -> Series:
    """Mean and range of several curves at the places of the first that all cover."""
    low, high = max(run[0][0] for run in runs), min(run[-1][0] for run in runs)
    places = [place for place, _ in runs[0] if low <= place <= high] or [low, high]
    curves = [([x for x, _ in run], [y for _, y in run]) for run in runs]
    values = [(place, [float(np.interp(place, x, y)) for x, y in curves]) for place in places]
    points = [(place, mean(found)) for place, found in values]
    return Series(name, points, [(place, min(found), max(found)) for place, found in values])


def _sampling(found: Found) -> str:
    charts = []
    for key in _distance_keys(found):
        lines = []
        for variant, group in _variants(found).items():
            by_steps: dict[int, list[Found]] = {}
            for one in (one for model in group for one in model["sampling"]):
                by_steps.setdefault(one["steps"], []).append(one)
            runs = [each for each in by_steps.values() if all(one["metrics"].get(key) is not None for one in each)]
            points = [
                (mean(one["images_per_s"] for one in each), [one["metrics"][key] for one in each]) for each in runs
            ]
            points.sort()
            band = [(place, min(v), max(v)) for place, v in points] if len(group) > 1 else []
            lines.append(Series(variant, [(place, mean(v)) for place, v in points], band))
        charts.append(line_chart(f"{_title(key)} over images a second", lines, x_label="images/s", marks=True))
    rows = [
        [
            model["name"],
            one["steps"],
            figure(one["images_per_s"]),
            *(_number(one["metrics"].get(key)) for key in _distance_keys(found)),
        ]
        for model in found["models"]
        for one in model["sampling"]
    ]
    headers = ["model", "sampling steps", "images/s", *map(_title, _distance_keys(found))]
    return _charts(charts) + html.folded("All numbers", html.table(rows, headers))


def _number(value: float | None) -> str:
    return "–" if value is None else figure(value)


def _rate_distortion(found: Found) -> str:
    firsts = [(variant, group[0]["rate_distortion"]) for variant, group in _variants(found).items()]
    over_rate = [Series(name, [(level["rate"], level["rmse"]) for level in levels]) for name, levels in firsts]
    over_t = [Series(name, [(level["timestep"], level["rmse"]) for level in levels[::-1]]) for name, levels in firsts]
    rows = [[name, figure(levels[-1]["rate"]), figure(levels[-1]["rmse"])] for name, levels in firsts if levels]
    return _charts(
        [
            line_chart(
                "Distortion over rate",
                over_rate,
                unit="RMSE of pixels, 0 to 255",
                x_label="bits a dimension",
                from_zero=True,
            ),
            line_chart(
                "Distortion over the timestep", over_t, unit="RMSE of pixels, 0 to 255", x_label="t", from_zero=True
            ),
        ]
    ) + html.table(rows, ["model", "bits a dimension (ELBO) ↓", "RMSE that is left ↓"])


def _charts(charts: Sequence[str]) -> str:
    shown = "".join(charts)
    return f'<div class="charts">{shown}</div>' if shown else ""


# --- sheets --------------------------------------------------------------------------------------------------------


def _reconstructions(out: Path, stages: Sequence[Found]) -> str:
    """One sheet: originals, then what each first stage makes of them."""
    folder = out / "measured"
    named = [(stage["variant"], folder / stage["name"] / "reconstructions.png") for stage in stages]
    originals = folder / stages[0]["name"] / "originals.png"
    return "".join(_sheet(path, name) for name, path in [("originals", originals), *named])


def _samples(out: Path, found: Found) -> str:
    sheets = []
    for variant, group in _variants(found).items():
        steps = group[0]["sampling"][-1]["steps"]
        path = out / "measured" / group[0]["name"] / f"samples-{steps}.png"
        sheets.append(_sheet(path, f"{variant}, {steps} steps"))
    return "".join(sheets)


def _sheet(path: Path, caption: str) -> str:
    image = html.read_picture(path)
    return "" if image is None else html.picture(image, caption, caption)


def _protocol(found: Found) -> str:
    extractor = found["extractor"]
    return html.definition_list(
        [
            ("samples", f"{found['n']:,} of each model, from equal seeds, against all held-out images"),
            ("sampler", f"{found['sampler']}, averaged weights (EMA)"),
            ("features", f"{extractor['name']}, {extractor['layer']}, weights {extractor['weights_sha256'][:12]}"),
            ("images a second", "network and decoder on this machine, without the time of measuring"),
            (
                "machine",
                (found.get("machine") or {}).get("device", "")
                if isinstance(found.get("machine"), dict)
                else found.get("machine"),
            ),
            ("the same again", "the command that wrote this page goes on where it was, and measures what is missing"),
        ]
    )
