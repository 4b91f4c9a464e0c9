"""Fits exponents of cost: straight lines through measurements on logarithmic axes, to compare with theory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fastgan.bench.case import OTHERS
from fastgan.bench.record import Results

Point = tuple[float, float]  # (size, cost)


@dataclass(frozen=True)
class Fit:
    """cost = factor * size ** exponent."""

    exponent: float
    error: float  # the exponent's standard error
    factor: float

    def __str__(self) -> str:
        return f"{self.exponent:.2f} ± {self.error:.2f}"


@dataclass(frozen=True)
class Line:
    """One variant's cost in one series: median seconds, or peak bytes."""

    name: str
    size: str
    variant: str
    of: str  # time or peak
    points: list[Point]
    expected: float

    @property
    def fit(self) -> Fit | None:
        return fit(self.points)


def fit(points: Sequence[Point]) -> Fit | None:
    """Fit log cost over log size by least squares. Fewer than three points have no standard error: return None."""
    if len(points) < 3:
        return None
    xs, ys = ([math.log(value) for value in column] for column in zip(*points, strict=True))
    x_mean, y_mean = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - x_mean) ** 2 for x in xs)
    exponent = sum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True)) / spread
    intercept = y_mean - exponent * x_mean
    residual = sum((y - intercept - exponent * x) ** 2 for x, y in zip(xs, ys, strict=True))
    return Fit(exponent, math.sqrt(residual / (len(xs) - 2) / spread), math.exp(intercept))


def lines(results: Results) -> list[Line]:
    """Return the lines in the order of the cases. Within a series, the time of every variant comes before the peak."""
    found: dict[tuple[str, str, str], Line] = {}
    names: dict[str, None] = {}
    for case in results["cases"]:
        growth = case["growth"]
        if growth is None:
            continue
        names[growth["line"]] = None
        for variant, result in case["variants"].items():
            for of, cost in (("time", result["seconds"]["median"]), ("peak", result.get("peak_bytes"))):
                expected = growth[of].get(variant, growth[of][OTHERS])
                key = growth["line"], of, variant
                line = found.setdefault(key, Line(growth["line"], growth["size"], variant, of, [], expected))
                if cost:
                    line.points.append((case["sizes"][growth["size"]], cost))
    return [
        line
        for name in names
        for of in ("time", "peak")
        for (own, measured, _), line in found.items()
        if (own, measured) == (name, of)
    ]
