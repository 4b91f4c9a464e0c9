"""Plots of results."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastgan.bench import growth
from fastgan.bench.case import BASELINE
from fastgan.bench.record import Results

COLORS = {
    BASELINE: "tab:gray",
    "fastgan": "tab:blue",
    "torch.compile": "tab:orange",
    "cdist": "tab:green",
    "triton": "tab:purple",
    "cuda": "tab:red",
}
NUMBER = "{x:,.10g}"  # ticks of logarithmic axes: 1,000 instead of 10^3
_COLUMNS = 4  # small panels per row


@dataclass(frozen=True)
class Plot:
    picture: Figure
    caption: str


def figures(results: Results) -> dict[str, Plot]:
    """Return the plots by name. Plots without data are left out."""
    drawn: dict[str, Callable[[Results], Plot | None]] = {
        "speed-up": speed_up,
        "resolution": by_resolution,
        "batch": by_batch,
        "roofline": roofline,
        "memory": memory,
        "growth": growing,
    }
    plots = {name: draw(results) for name, draw in drawn.items()}
    return {name: plot for name, plot in plots.items() if plot is not None}


def speed_up(results: Results) -> Plot | None:
    """Draw one bar per case: fastgan's speed-up, and torch.compile's if timed. Whiskers are from 20 to 80 %."""
    bars = [
        (case["name"], name, result["ratio"])
        for case in _timed(results)
        for name, result in case["variants"].items()
        if name in ("fastgan", "torch.compile") and "ratio" in result
    ]
    if not bars:
        return None
    figure, axes = _bars(len(bars))
    for position, (_, name, ratio) in enumerate(bars):
        axes.barh(position, ratio["median"], xerr=_whiskers(ratio), color=COLORS[name])
        text = f"{ratio['median']:.2f}" if ratio["median"] < 2 else f"{ratio['median']:.1f}"
        axes.annotate(text, (max(ratio["high"], 1), position), (5, 0), textcoords="offset points", va="center")
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(bars)), [case if name == "fastgan" else f"{case}, {name}" for case, name, _ in bars])
    if max(ratio["high"] for *_, ratio in bars) > 4:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
    axes.margins(x=0.12)
    axes.set(xlabel=f"speed relative to {BASELINE} in the same run", title=_where(results))
    return Plot(figure, "Speed of each case relative to PyTorch. Whiskers are from 20 to 80 % of the rounds.")


def by_resolution(results: Results) -> Plot | None:
    families = _families(results, "pixels", lambda result: result.get("ratio"))
    if not families:
        return None
    figure, axes = _panel()
    for family, points in families.items():
        _line(axes, points, f"{family}, fastgan")
    axes.axhline(1, color="black", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="pixels per side", ylabel=f"speed relative to {BASELINE}", title=_where(results))
    axes.legend(fontsize=8)
    return Plot(figure, "Speed-up by resolution.")


def by_batch(results: Results) -> Plot | None:
    variants = (BASELINE, "cdist", "torch.compile", "fastgan")
    lines = {name: _families(results, "batch", lambda result: result["seconds"], name) for name in variants}
    families = list(dict.fromkeys(family for found in lines.values() for family in found))
    if not families:
        return None
    figure, panels = _grid(len(families))
    for axes, family in zip(panels, families, strict=False):
        for name, found in lines.items():
            if family in found:
                _line(axes, found[family], name, color=COLORS[name], scale=1e3)
        _logarithmic(axes, family, "batch size", "ms")
    return Plot(figure, "Time by batch size.")


def roofline(results: Results) -> Plot | None:
    """Plot the measured rates under a roof given by copy bandwidth and large matrix products of the same run."""
    cases = [case for case in results["cases"] if case["bytes"] and case["operations"]]
    if not cases:
        return None
    figure, axes = _panel()
    bandwidth, rate = results["copy_bandwidth"], results["matmul_rate"]
    intensities = [case["operations"] / case["bytes"] for case in cases]
    ridge = rate / bandwidth
    low, high = min([*intensities, ridge]) / 2, max([*intensities, ridge]) * 2
    axes.plot([low, ridge, high], [low * bandwidth / 1e9, rate / 1e9, rate / 1e9], color="black", linewidth=1)
    ops = list(dict.fromkeys(case["op"] for case in cases))
    for name, marker in ((BASELINE, "x"), ("fastgan", "o")):
        for number, op in enumerate(ops):
            points = [
                (intensity, case["operations"] / case["variants"][name]["seconds"]["median"] / 1e9)
                for case, intensity in zip(cases, intensities, strict=True)
                if case["op"] == op and name in case["variants"]
            ]
            label = op if marker == "o" else None
            if points:
                axes.plot(*zip(*points, strict=True), marker, color=f"C{number}", markersize=5, label=label)
    axes.plot([], [], "x", color="black", label=BASELINE)
    axes.plot([], [], "o", color="black", label="fastgan")
    axes.set(xscale="log", yscale="log", title=_where(results))
    axes.xaxis.set_major_formatter(NUMBER)
    axes.yaxis.set_major_formatter(NUMBER)
    axes.set(xlabel="operations per byte that must be moved", ylabel="G operations per second")
    axes.legend(fontsize=8)
    return Plot(
        figure,
        f"Roofline. Left of the ridge: the bandwidth of a large copy ({bandwidth / 1e9:.1f} GB/s). Right of it: the "
        f"rate of large matrix products ({rate / 1e9:.0f} GFLOP/s). Both are from the same run. "
        "Data in a cache can exceed the roof.",
    )


def memory(results: Results) -> Plot | None:
    """Draw bars of peak memory, one per variant of each case."""
    cases = [case for case in _timed(results) if any("peak_bytes" in result for result in case["variants"].values())]
    if not cases:
        return None
    names = [name for name in COLORS if any("peak_bytes" in case["variants"].get(name, {}) for case in cases)]
    figure, axes = _bars(len(cases) * len(names) // 2 + 1)
    height = 0.8 / len(names)
    for number, name in enumerate(names):
        points = [
            (position + number * height, case["variants"][name]["peak_bytes"] / 1e6)
            for position, case in enumerate(cases)
            if "peak_bytes" in case["variants"].get(name, {})
        ]
        positions, megabytes = zip(*points, strict=True)
        axes.barh(positions, megabytes, height, color=COLORS[name], label=name)
    axes.set_yticks([position + 0.4 - height / 2 for position in range(len(cases))], [case["name"] for case in cases])
    axes.set(
        xscale="log", xlabel="peak MB, minus the memory before the call, on a logarithmic scale", title=_where(results)
    )
    axes.xaxis.set_major_formatter(NUMBER)
    axes.legend()
    return Plot(
        figure,
        "Peak memory of one call, on a logarithmic scale: a bar of half the length is not half the memory. "
        "Each allocation that PyTorch sees counts once.",
    )


def growing(results: Results) -> Plot | None:
    """Draw one panel per series and measure, with the measurements and the line fitted to them."""
    lines = [line for line in growth.lines(results) if line.points]
    panels = list(dict.fromkeys((line.name, line.of) for line in lines))
    if not panels:
        return None
    figure, grid = _grid(len(panels))
    for axes, (name, of) in zip(grid, panels, strict=False):
        scale = 1e3 if of == "time" else 1e-6
        for line in lines:
            if (line.name, line.of) != (name, of):
                continue
            xs, ys = zip(*line.points, strict=True)
            color, found = COLORS.get(line.variant, "tab:olive"), line.fit
            label = line.variant if found is None else f"{line.variant}: {found} (theory {line.expected:g})"
            axes.plot(xs, [y * scale for y in ys], "o", color=color, markersize=4, label=label)
            if found is not None:
                ends = min(xs), max(xs)
                axes.plot(ends, [found.factor * x**found.exponent * scale for x in ends], color=color, linewidth=1)
        _logarithmic(axes, f"{name}, {of}", name.rpartition(" ")[2], "ms" if of == "time" else "MB")
    return Plot(figure, "Cost as one size grows, with fitted and theoretical exponents.")


def _timed(results: Results) -> list[dict[str, Any]]:
    return [case for case in results["cases"] if case["growth"] is None]


Points = list[tuple[int, dict[str, float]]]  # (size, quantiles)


def _families(
    results: Results, size: str, of: Callable[[dict[str, Any]], dict[str, float] | None], variant: str = "fastgan"
) -> dict[str, Points]:
    """Group cases that differ only in ``size``. Each family has at least two sizes."""
    found: dict[str, Points] = {}
    for case in _timed(results):
        quantiles = of(case["variants"][variant]) if variant in case["variants"] else None
        if size not in case["sizes"] or quantiles is None:
            continue
        others = [f"{key} {value}" for key, value in case["sizes"].items() if key not in (size, "batch")]
        found.setdefault(", ".join([case["family"], *others]), []).append((case["sizes"][size], quantiles))
    return {family: sorted(points, key=_size) for family, points in found.items() if len({x for x, _ in points}) > 1}


def _size(point: tuple[int, Any]) -> int:
    return point[0]


def _line(axes: Axes, points: Points, label: str, *, color: str | None = None, scale: float = 1.0) -> None:
    heights = [quantiles["median"] * scale for _, quantiles in points]
    whiskers = [_whiskers(quantiles, scale) for _, quantiles in points]
    spread = [[pair[side][0] for pair in whiskers] for side in (0, 1)]
    axes.errorbar(
        [x for x, _ in points], heights, spread, marker="o", markersize=4, capsize=2, label=label, color=color
    )


def _whiskers(quantiles: dict[str, float], scale: float = 1.0) -> list[list[float]]:
    low, median, high = (quantiles[key] * scale for key in ("low", "median", "high"))
    return [[median - low], [high - median]]


def _logarithmic(axes: Axes, title: str, xlabel: str, ylabel: str) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(yscale="log", xlabel=xlabel, ylabel=ylabel)
    axes.yaxis.set_major_formatter(NUMBER)
    axes.set_title(title, fontsize=7)
    axes.legend(fontsize=7)


def _panel() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8, 5), layout="constrained")
    return figure, figure.subplots()


def _bars(count: int) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(9, 1.4 + 0.3 * count), layout="constrained")
    axes = figure.subplots()
    axes.invert_yaxis()
    return figure, axes


def _grid(count: int) -> tuple[Figure, Iterable[Axes]]:
    columns = min(_COLUMNS, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(4 * columns, 3.2 * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel in panels[count:]:
        panel.set_visible(False)
    return figure, panels[:count]


def _where(results: Results) -> str:
    about = results["provenance"]
    return f"{about['device']}, {str(about['date'])[:10]}"
