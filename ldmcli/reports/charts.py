"""Line charts as inline SVG: no script, no font, no colour of their own (the page's style sheet has those)."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from ldmcli.core.console import clean

WIDTH, HEIGHT = 420, 230
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 24, 34
POINTS = 240  # a longer series is averaged down to this many
HOVER_POINTS = 60
COLOURS = 6  # classes c0 … c5
LOG_FROM = 20  # a positive quantity whose range spans this factor gets a logarithmic axis

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Series:
    """A named line. `points` are (x, value), x a step unless the chart says otherwise; band: (x, lowest, highest)
    of several runs, drawn behind the line."""

    name: str
    points: Points
    band: Sequence[tuple[float, float, float]] = ()


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    unit: str = "",
    from_zero: bool = False,
    note: str = "",
    x_label: str = "step",
    marks: bool = False,
) -> str:
    """A <figure> with the lines over x; '' where no two x are known. Ranges decide whether axes are logarithmic, but
    not where values begin at zero, nor over steps. marks: each point has a dot."""
    curves = [Series(one.name, finite(one.points), one.band) for one in series]
    curves = [one for one in curves if one.points][:COLOURS]
    places = {place for one in curves for place, _ in one.points}
    if len(places) < 2:
        return ""
    everything = [value for one in curves for _, value in one.points] + [0.0] * from_zero
    everything += [bound for one in curves for _, *bounds in one.band for bound in bounds]
    log = wants_log(everything)
    steps = x_label == "step"
    x_log = not (steps or from_zero) and wants_log(list(places))
    x = _Axis(min(places), max(places), x_log, LEFT, WIDTH - RIGHT, whole=not x_log, integers=steps)
    y = _Axis(min(everything), max(everything), log, HEIGHT - BOTTOM, TOP)
    lines = "".join(_band(one, index, x, y) for index, one in enumerate(curves))
    lines += "".join(_line(one, index, x, y, x_label, marks) for index, one in enumerate(curves))
    label = ", ".join(part for part in (unit, "logarithmic" if log else "") if part)
    return (
        f'<figure class="chart"><figcaption><b>{_safe(title)}</b>{_legend(curves)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{_safe(title)}">'
        f'{_grid(x, y, x_label)}<text class="unit" x="2" y="12">{_safe(label)}</text>{lines}</svg>'
        f"{f'<p>{_safe(note)}</p>' if note else ''}</figure>"
    )


def finite(points: Iterable[tuple[float, Any]]) -> list[tuple[float, float]]:
    """Points whose value is a finite number; metrics.jsonl holds NaN and Inf as text."""
    return [(s, float(v)) for s, v in points if isinstance(v, int | float) and math.isfinite(v)]


def wants_log(values: Sequence[float]) -> bool:
    """Whether positive values span a range that a linear axis would flatten."""
    return min(values) > 0 and max(values) / min(values) >= LOG_FROM


def thinned(points: Points, most: int = POINTS) -> list[tuple[float, float]]:
    """At most `most` points: means of equal stretches, the last of each at its own step."""
    if len(points) <= most:
        return list(points)
    bounds = [round(k * len(points) / most) for k in range(most + 1)]
    parts = [points[a:b] for a, b in zip(bounds, bounds[1:])]
    return [(part[-1][0], sum(value for _, value in part) / len(part)) for part in parts]


def smoothed(points: Points, reach: int, log: bool = False) -> list[tuple[float, float]]:
    """Each value replaced by the mean (geometric where the axis is logarithmic) of up to `reach` neighbours a side;
    fewer near the ends, equally many on both sides."""
    values = [math.log(v) if log else v for _, v in points]
    out = []
    for i, (step, _) in enumerate(points):
        side = min(reach, i, len(points) - 1 - i)
        part = values[i - side : i + side + 1]
        mean = sum(part) / len(part)
        out.append((step, math.exp(mean) if log else mean))
    return out


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers that cover low … high, about `wanted` of them, spaced by 1, 2, 2.5 or 5 times a power of ten."""
    span = (high - low) or abs(high) or 1.0
    power = 10 ** math.floor(math.log10(span / wanted))
    pace = next((f * power for f in (1, 2, 2.5, 5) if f * power * wanted >= span * 0.999), 10 * power)
    first, last = math.floor(low / pace + 1e-6), math.ceil(high / pace - 1e-6)
    return [k * pace for k in range(first, max(last, first + 1) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers on a logarithmic axis that cover low … high: decades, with 2 and 5 between where few fit."""
    high = max(high, 1.01 * low)
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    pace = max(1, math.ceil((last - first) / 6))
    factors = (1, 2, 5) if last - first <= 2 else (1,)
    marks = [f * 10.0**k for k in range(first, last + pace, pace) for f in factors]
    below = max(m for m in marks if m <= low * 1.001)
    above = min(m for m in marks if m >= high * 0.999)
    return [m for m in marks if below <= m <= above]


def short(value: float) -> str:
    """A number for an axis: 12k, 0.05, 1e-6."""
    size = abs(value)
    if size >= 1000:
        factor, letter = next((f, n) for f, n in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if size >= f)
        return f"{value / factor:.4g}{letter}"
    if size < 1e-12:
        return "0"
    return f"{value:.4g}" if size >= 1e-3 else f"{value:.0e}".replace("e-0", "e-")


def figure(value: float) -> str:
    """A number for reading: 4 significant digits, thousands separated."""
    if isinstance(value, int) or abs(value) >= 10_000:
        return f"{value:,.0f}"
    return f"{value:.4g}" if value == 0 or abs(value) >= 1e-4 else f"{value:.2e}"


class _Axis:
    """From a value to a place in the picture; the range ends on ticks."""

    def __init__(
        self, low: float, high: float, log: bool, begin: float, end: float, whole: bool = False, integers: bool = True
    ):
        self.log, self.begin, self.end = log, begin, end
        if whole:  # the data fill the width, ticks lie inside
            self.ticks = [t for t in ticks(low, high, 6) if low <= t <= high and (t == int(t) or not integers)]
            self.low, self.high = low, high
            return
        self.ticks = log_ticks(low, high) if log else ticks(low, high)
        self.low, self.high = self.ticks[0], self.ticks[-1]

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        share = (value - low) / (high - low)
        return round(self.begin + min(max(share, 0.0), 1.0) * (self.end - self.begin), 1)


def _grid(x: _Axis, y: _Axis, x_label: str) -> str:
    across = "".join(
        f'<line class="g" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(t)}" y2="{y(t)}"/>'
        f'<text x="{LEFT - 6}" y="{y(t) + 4}" text-anchor="end">{short(t)}</text>'
        for t in y.ticks
    )
    bottom = HEIGHT - BOTTOM
    down = "".join(
        f'<line class="g" x1="{x(t)}" x2="{x(t)}" y1="{bottom}" y2="{bottom + 4}"/>'
        f'<text x="{x(t)}" y="{bottom + 16}" text-anchor="middle">{short(t)}</text>'
        for t in x.ticks
    )
    name = _safe(x_label)
    return f'{across}{down}<text class="unit" x="{WIDTH - RIGHT}" y="{HEIGHT - 2}" text-anchor="end">{name}</text>'


def _path(points: Points, x: _Axis, y: _Axis) -> str:
    return "M" + "L".join(f"{x(step)},{y(value)}" for step, value in points)


def _band(series: Series, index: int, x: _Axis, y: _Axis) -> str:
    """The area between the lowest and the highest of several runs."""
    if len(series.band) < 2:
        return ""
    around = [(place, high) for place, _, high in series.band] + [(place, low) for place, low, _ in series.band[::-1]]
    return f'<path class="b c{index}" d="{_path(around, x, y)}Z"/>'


def _line(series: Series, index: int, x: _Axis, y: _Axis, x_label: str, marks: bool) -> str:
    """The line (with its mean where it is noisy), and spots with x and value, invisible unless they are marks."""
    points, colour = thinned(series.points), f"c{index}"
    noisy = len(points) > HOVER_POINTS
    shown = smoothed(points, max(len(points) // 40, 1), y.log) if noisy else points
    faint = f'<path class="l raw {colour}" d="{_path(points, x, y)}"/>' if noisy else ""
    seen, radius = ("e", 3) if marks else ("h", 5)
    spots = "".join(
        f'<circle class="{seen} {colour}" cx="{x(s)}" cy="{y(v)}" r="{radius}"><title>'
        f"{_safe(series.name)}, {_place(s, x_label)}: {figure(v)}</title></circle>"
        for s, v in thinned(shown, HOVER_POINTS)
    )
    last = shown[-1]
    end = f'<circle class="e {colour}" cx="{x(last[0])}" cy="{y(last[1])}" r="2.5"/>'
    return f'{faint}<path class="l {colour}" d="{_path(shown, x, y)}"/>{end}{spots}'


def _place(value: float, x_label: str) -> str:
    return f"step {value:,.0f}" if x_label == "step" else f"{figure(value)} {_safe(x_label)}"


def _legend(series: Sequence[Series]) -> str:
    """Names with their latest value; a single line needs no name."""
    if len(series) == 1:
        return f' <span class="now">{figure(series[0].points[-1][1])}</span>'
    return "".join(
        f' <span class="key c{index}">{_safe(one.name)} <span class="now">{figure(one.points[-1][1])}</span></span>'
        for index, one in enumerate(series)
    )


def _safe(text: object) -> str:
    return escape(clean(text), quote=True)
