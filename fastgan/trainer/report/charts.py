"""Line charts as inline SVG that takes its colors from the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

Series = Sequence[tuple[float, float]]  # (step, value)

WIDTH, HEIGHT = 360, 210
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 18, 40


def line_chart(title: str, series: dict[str, Series], *, unit: str, log: bool = False, note: str = "") -> str:
    """Draw named lines over steps. `unit` is the title of the vertical axis.

    Lines break at values that are not finite, or not positive on a log scale.
    """
    shown = {name: [(x, y) for x, y in points if _fits(y, log)] for name, points in series.items()}
    shown = {name: points for name, points in shown.items() if points}
    if not shown:
        return ""
    xs = [x for points in shown.values() for x, _ in points]
    ys = [_scale(y, log) for points in shown.values() for _, y in points]
    x_low, x_high = min(xs), max(xs)
    ticks = _ticks(min(ys), max(ys), log)
    y_low, y_high = min([*ys, *ticks]), max([*ys, *ticks])

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / ((x_high - x_low) or 1)
        up = (y - y_low) / ((y_high - y_low) or 1)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    body = []
    for tick in ticks:
        _, y = place(x_low, tick)
        label = plain(10**tick if log else tick)
        body.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        body.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    for x in _ticks(x_low, x_high, log=False) if x_high > x_low else [x_low]:
        across, _ = place(x, y_low)
        body.append(
            f'<line class="grid" x1="{across:.1f}" x2="{across:.1f}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - 36}"/>'
        )
        body.append(f'<text x="{across:.1f}" y="{HEIGHT - 23}" text-anchor="middle">{counted(x)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    body.append(f'<text class="axis" x="{middle:.0f}" y="{HEIGHT - 5}" text-anchor="middle">generator step</text>')
    if unit:
        above = f"{unit}, logarithmic" if log else unit
        body.append(f'<text class="axis" x="4" y="10">{escape(above)}</text>')
    legend = []
    for index, (name, points) in enumerate(shown.items()):
        corners = [place(x, _scale(y, log)) for x, y in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
        body.append(f'<polyline class="s{index % 6}" points="{path}"/>')
        if len(corners) == 1:
            body.append(f'<circle class="s{index % 6}" cx="{corners[0][0]:.1f}" cy="{corners[0][1]:.1f}" r="3"/>')
        legend.append(f'<span class="key s{index % 6}">{escape(name)}</span>')
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(body)}</svg>'
    caption = f"<figcaption><b>{escape(title)}</b> {''.join(legend)}<small>{escape(note)}</small></figcaption>"
    return f"<figure>{caption}{svg}</figure>"


def counted(number: float) -> str:
    """Write a count with a few digits: 950, 1.5k, 180k, 2M."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:g}"


def plain(number: float) -> str:
    """Write a value without an exponent, unless it has more than four zeros."""
    if number and not 1e-4 <= abs(number) < 1e6:
        return f"{number:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{number:,.10g}"


def _fits(value: float, log: bool) -> bool:
    return math.isfinite(value) and (value > 0 or not log)


def _scale(value: float, log: bool) -> float:
    return math.log10(value) if log else value


def _ticks(low: float, high: float, log: bool) -> list[float]:
    """Return about four round numbers in [low, high]. On a log scale these are logarithms of powers of ten."""
    if log:
        first, last = math.floor(low), math.ceil(high)
        return [float(power) for power in range(first, last + 1, max(1, (last - first) // 4))]
    if low == high:  # one value in the middle
        low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
    span = high - low
    step: float = 10 ** math.floor(math.log10(span / 4))
    step = next(step * factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 5)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [round(index * step, 10) for index in range(first, last + 1)]
