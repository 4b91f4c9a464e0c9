from __future__ import annotations

import math
from itertools import pairwise

import numpy
import pytest
import torch

from fastgan.bench import growth, plots, report
from fastgan.bench.case import BASELINE, OTHERS, prepare
from fastgan.bench.cases import CASES, SUITES
from fastgan.bench.record import load


def result_of(name, seconds, peak):
    """A measured case of the growth suite."""
    case = CASES[name]
    band = {"low": seconds, "median": seconds, "high": seconds}
    variants = {variant: {"seconds": band, "peak_bytes": peak} for variant in (BASELINE, "fastgan")}
    empty = dict.fromkeys(("op", "bytes", "operations", "backend", "floor_seconds"))
    return {
        "name": name,
        "family": case.family,
        "sizes": dict(case.sizes),
        "growth": {of: dict(value) if of in ("time", "peak") else value for of, value in vars(case.growth).items()},
        "variants": variants,
        "left_out": {},
    } | empty


@pytest.fixture
def found(results):
    """Doubling N takes four times the seconds and twice the bytes. The last point is slower by half."""
    names = [f"growth/minibatch_discrimination/N={n}" for n in (64, 128, 256, 512)]
    seconds = [1e-3 * 4**i for i in range(4)]
    seconds[-1] *= 1.5
    cases = [result_of(name, s, 1e6 * 2**i) for i, (name, s) in enumerate(zip(names, seconds, strict=True))]
    return load(results) | {"cases": cases, "suite": "growth"}


def test_a_power_is_found_without_error():
    fitted = growth.fit([(x, 3 * x**1.5) for x in (1, 2, 5, 9)])
    assert (fitted.exponent, fitted.factor) == pytest.approx((1.5, 3.0))
    assert fitted.error == pytest.approx(0, abs=1e-7)
    assert growth.fit([(1, 1), (2, 4)]) is None


def test_the_fit_is_that_of_least_squares_with_its_standard_error():
    generator = numpy.random.default_rng(0)
    points = [(x, x**2 * math.exp(generator.normal(0, 0.1))) for x in (1, 2, 4, 8, 16, 32)]
    fitted = growth.fit(points)
    xs, ys = numpy.log(points).T
    (slope, intercept), covariance = numpy.polyfit(xs, ys, 1, cov=True)
    assert fitted.exponent == pytest.approx(slope)
    assert fitted.factor == pytest.approx(math.exp(intercept))
    assert fitted.error == pytest.approx(math.sqrt(covariance[0, 0]))


def test_lines_are_told_with_the_exponents_of_theory(found):
    header, rows = report.growth_rows(found)
    assert header[-2:] == ["fitted exponent ± standard error", "theory"]
    told = {(row[1], row[2]): row[4:] for row in rows}
    assert told["fastgan", "peak"] == ["1.00 ± 0.00", "1"]
    assert told[BASELINE, "peak"] == ["1.00 ± 0.00", "2"]  # it claims less than theory: seen at once
    fitted, theory = told["fastgan", "time"]
    assert theory == "2"
    assert 2.05 < float(fitted.split()[0]) < 2.2
    assert float(fitted.split()[-1]) > 0.02
    assert "minibatch_discrimination over N | fastgan | peak | 64, 128, 256, 512 |" in report.table(found)


def test_a_panel_a_line_and_measure(found):
    pytest.importorskip("matplotlib")
    figures = plots.figures(found)
    assert list(figures) == ["growth"]
    titles = [axes.get_title() for axes in figures["growth"].picture.axes]
    assert titles == ["minibatch_discrimination over N, time", "minibatch_discrimination over N, peak"]


def test_every_line_has_points_enough_and_sizes_that_double():
    lines = {}
    for name in SUITES["growth"]:
        case = CASES[name]
        assert case.growth.size in case.sizes
        assert OTHERS in case.growth.time
        assert OTHERS in case.growth.peak
        lines.setdefault(case.growth.line, []).append(case.sizes[case.growth.size])
    for sizes in lines.values():
        assert len(sizes) >= 4
        assert [b / a for a, b in pairwise(sizes)] == [2] * (len(sizes) - 1)
    ops = {CASES[name].op for name in SUITES["growth"]}
    assert {"spectral_norm", "minibatch_discrimination", "minibatch_stddev", "bias_act", "layer_norm", None} <= ops


@pytest.mark.parametrize("first", [name for name in SUITES["growth"] if name.endswith(("pixels=8", "pixels=4", "C=8"))])
def test_the_variants_of_the_smallest_cases_agree(first):
    variants, errors, _ = prepare(CASES[first], torch.device("cpu"))
    assert {BASELINE, "fastgan"} <= set(variants)
    assert 0 < errors["fastgan"] <= CASES[first].tolerance
