"""Line charts as inline SVG: no script, no font, no network. Colours come from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 640, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 12, 40
_SERIES_COLOURS = 8


@dataclass(frozen=True)
class Series:
    """One line of a chart."""

    name: str
    """What it is, for the legend."""
    points: Sequence[tuple[float, float]]
    """(x, y), x rising."""
    markers: bool = False
    """Show a dot with a tooltip at each point."""
    colour: int | None = None
    """Number of the colour; by default each series of a chart has its own."""
    dash: str = ""
    """Class of a line to compare with: dashed, dotted or dash-dot; empty for a solid one."""


@dataclass(frozen=True)
class Mark:
    """An upright line: something that happened at one place of the x axis."""

    x: float
    """Where."""
    text: str
    """What, for its tooltip."""
    warning: bool = False
    """Whether something was wrong."""


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    log_y: bool = False,
    marks: Sequence[Mark] = (),
    x_range: tuple[float, float] | None = None,
    whole_y: bool = False,
) -> str:
    """An SVG chart with a legend below it. Points that are not finite are left out, and break the line.

    `x_range` gives several charts the same axis, `whole_y` labels whole numbers only. Returns an empty text where no
    series has a finite point.
    """
    finite = [(x, y) for s in series for x, y in s.points if math.isfinite(y) and (y > 0 or not log_y)]
    if not finite:
        return ""
    scale = math.log10 if log_y else float
    x_low, x_high = x_range or (min(x for x, _ in finite), max(x for x, _ in finite))
    x_span = (x_low, x_high) if x_high > x_low else (x_low - 1, x_low + 1)
    x_ticks = [tick for tick in ticks(*x_span) if x_span[0] <= tick <= x_span[1]]
    y_ticks = ticks(min(scale(y) for _, y in finite), max(scale(y) for _, y in finite), least_step=float(whole_y))
    y_span = (y_ticks[0], y_ticks[-1])
    x_step, y_step = _step(x_ticks), _step(y_ticks)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_span[0]) / (x_span[1] - x_span[0])
        up = (scale(y) - y_span[0]) / (y_span[1] - y_span[0])
        return _LEFT + across * (_WIDTH - _LEFT - _RIGHT), _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM)

    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">',
        f"<title>{escape(title)}</title><desc>{escape(described(series, marks))}</desc>",
    ]
    for tick in y_ticks:
        value = 10**tick if log_y else tick
        _, y = place(x_span[0], value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        label = _number(value, None if log_y else y_step)
        parts.append(f'<text class="tick" x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    bottom = 10 ** y_span[0] if log_y else y_span[0]
    for tick in x_ticks:
        x, y = place(tick, bottom)
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{y + 16:.1f}" text-anchor="middle">{_number(tick, x_step)}</text>'
        )
    parts.append(
        f'<text class="tick" x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 6}" text-anchor="middle">'
        f"{escape(x_label)}</text>"
    )
    for mark in marks:
        if x_span[0] <= mark.x <= x_span[1]:
            x, _ = place(mark.x, bottom)
            parts.append(
                f'<line class="mark{" warned" if mark.warning else ""}" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" '
                f'y2="{_HEIGHT - _BOTTOM}"><title>{escape(mark.text)}</title></line>'
            )
    for number, one in enumerate(series):
        colour = _colour(number, one)
        for run in _finite_runs(one.points, log_y=log_y):
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in run))
            parts.append(f'<polyline class="line {colour} {one.dash}" points="{path}"/>')
            if one.markers:
                parts += [
                    f'<circle class="dot {colour}" cx="{x:.1f}" cy="{y:.1f}" r="3.5">'
                    f"<title>{escape(one.name)}: {_number(value)} at {_number(at)}</title></circle>"
                    for (at, value), (x, y) in ((point, place(*point)) for point in run)
                ]
    parts.append("</svg>")
    entries = [_entry(f"line {_colour(n, one)} {one.dash}", one.name) for n, one in enumerate(series)]
    if marks:
        entries.append(_entry("mark warned", "restart or change of size", upright=True))
    return f'{"".join(parts)}<ul class="legend">{"".join(entries)}</ul>'


def described(series: Sequence[Series], marks: Sequence[Mark] = ()) -> str:
    """A chart in words: where each line starts and ends, and between which values it runs."""
    sentences = []
    for one in series:
        known = [(x, y) for x, y in one.points if math.isfinite(y)]
        if known:
            values = [y for _, y in known]
            (_, first), (at, last) = known[0], known[-1]
            sentences.append(
                f"{one.name}: from {_number(first)} to {_number(last)} at {_number(at)}"
                f", between {_number(min(values))} and {_number(max(values))}."
                if first != last or min(values) != max(values)
                else f"{one.name}: {_number(first)}."
            )
    if marks:
        sentences.append(f"{len(marks)} restarts or changes of size are marked.")
    return " ".join(sentences)


def ticks(low: float, high: float, *, about: int = 5, least_step: float = 0.0) -> list[float]:
    """Round numbers that cover low..high, at least two, `least_step` or more apart."""
    if high - low <= 1e-12 * max(1.0, abs(low)):
        half = abs(low) * 0.1 or 1.0
        low, high = low - half, high + half
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = max(least_step, next(m * power for m in (1, 2, 5, 10) if m * power >= raw))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [n * step for n in range(first, last + 1)]


def _entry(classes: str, name: str, *, upright: bool = False) -> str:
    """One line of the legend, with a piece of the line as it is in the chart."""
    ends = 'x1="14" x2="14" y1="0" y2="12"' if upright else 'x1="0" x2="28" y1="6" y2="6"'
    line = f'<line class="{classes}" {ends}/>'
    return f'<li><svg class="key" viewBox="0 0 28 12" aria-hidden="true">{line}</svg>{escape(name)}</li>'


def _colour(number: int, series: Series) -> str:
    return f"series-{(number if series.colour is None else series.colour) % _SERIES_COLOURS}"


def _finite_runs(points: Sequence[tuple[float, float]], *, log_y: bool) -> list[list[tuple[float, float]]]:
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if math.isfinite(y) and (y > 0 or not log_y):
            runs[-1].append((x, y))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _step(marks: Sequence[float]) -> float | None:
    return marks[1] - marks[0] if len(marks) > 1 else None


def _number(value: float, step: float | None = None) -> str:
    """A short number; with a step, as many decimals as it takes to tell neighbours apart."""
    for limit, unit, suffix in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= limit:
            return f"{value / unit:g}{suffix}"
    if step is None or abs(value) >= 1000:
        return f"{value:.4g}"
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{value:.{decimals}f}" if decimals <= 6 else f"{value:.3g}"
