"""The rows of a result's tables, for every format of the report."""

from __future__ import annotations

from typing import Any

from fastgan.bench import growth
from fastgan.bench.case import BASELINE
from fastgan.bench.record import Results
from fastgan.words import number_of

Cells = list[str]
COUNTS = {"flops": ("GFLOP", 1e9), "peak_bytes": ("peak MB", 1e6), "saved_bytes": ("saved MB", 1e6)}


def measurements(results: Results) -> tuple[Cells, list[Cells]]:
    """Return the header and one row per variant. Columns that no case fills are left out."""
    cases = results["cases"]
    measured = [result for case in cases for result in case["variants"].values()]
    graphs = any("graph" in result for result in measured)
    floors = any("floor_fraction" in result for result in measured)
    counts = {key: of for key, of in COUNTS.items() if any(key in result for result in measured)}
    header = ["case", "variant", "ms (20 to 80 %)", f"speed relative to {BASELINE} (20 to 80 %)"]
    header += ["of the floor"] * floors + [title for title, _ in counts.values()]
    header += ["CUDA graph, cold L2: ms", f"relative to {BASELINE}", "of the floor"] if graphs else []
    rows = []
    for case in cases:
        for name, result in case["variants"].items():
            label = f"fastgan ({case['backend']})" if name == "fastgan" and case["backend"] else name
            cells = [case["name"], label, _spread(result["seconds"], 1e3), _ratio(result)]
            cells += [_percent(result)] * floors
            cells += [_number(result[key] / unit) if key in result else "" for key, (_, unit) in counts.items()]
            graph = result.get("graph", {})
            if graphs and "seconds" in graph:
                cells += [_spread(graph["seconds"], 1e3), _ratio(graph), _percent(graph)]
            elif graphs:
                cells += [graph.get("reason", ""), "", ""]
            rows.append(cells)
    return header, rows


def growth_rows(results: Results) -> tuple[Cells, list[Cells]] | None:
    """Return the fitted and theoretical exponents, or None if the result has no series of growing sizes."""
    header = ["cost", "variant", "of", "sizes", "fitted exponent ± standard error", "theory"]
    rows = [
        [line.name, line.variant, line.of, _sizes(line), str(line.fit or "too few points"), f"{line.expected:g}"]
        for line in growth.lines(results)
        if line.points
    ]
    return (header, rows) if rows else None


def _sizes(line: growth.Line) -> str:
    return ", ".join(f"{x:g}" for x, _ in line.points)


def left_out(results: Results) -> list[str]:
    reasons = [
        f"{case['name']}, {name}: {reason}" for case in results["cases"] for name, reason in case["left_out"].items()
    ]
    reasons += [f"{name}: {reason}" for name, reason in results.get("failed", {}).items()]
    return reasons + [f"{name}: not run" for name in results["not_yet_run"]]


def source(results: Results) -> str:
    about = results["provenance"]
    threads = number_of(about["threads"], "thread")
    how = threads if about["device_type"] == "cpu" else f"driver {about['driver'] or 'unknown'}"
    commit = f"commit {about['commit'] or 'unknown'}{' with changes' if about['dirty'] else ''}"
    versions = f"torch {about['torch']}, fastgan {about['fastgan']}, {commit}, {date(about)}"
    floor = (
        f"The floor is the bytes divided by this run's copy bandwidth, {results['copy_bandwidth'] / 1e9:.1f} GB/s. "
        "Data that stays in a cache can beat it. "
    )
    floors = any(case["floor_seconds"] is not None for case in results["cases"])
    return f"{about['device']}, {how}; {versions}. {floor if floors else ''}`{about['command']}`"


def provenance_rows(results: Results) -> list[Cells]:
    """Return everything that the result records about where and how it was measured."""
    about = dict(results["provenance"])
    environment, build = about.pop("environment"), about.pop("build")
    about |= {"rounds": results["rounds"], "copy bandwidth, GB/s": round(results["copy_bandwidth"] / 1e9, 1)}
    about |= {"matrix products, GFLOP/s": round(results["matmul_rate"] / 1e9, 1)}
    rows = [[key.replace("_", " "), _plain(value)] for key, value in about.items()]
    rows += [[f"build: {key}", _plain(value)] for key, value in (build or {}).items()]
    return rows + [[f"environment: {key}", value] for key, value in environment.items()]


def date(about: dict[str, Any]) -> str:
    return str(about["date"])[:10]


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(of)}" for key, of in value.items() if of not in ("", None))
    return ", ".join(map(_plain, value)) if isinstance(value, list | tuple) else str(value)


def _spread(quantiles: dict[str, float], factor: float = 1.0) -> str:
    low, median, high = (_number(quantiles[key] * factor) for key in ("low", "median", "high"))
    return f"{median} ({low} to {high})"


def _ratio(result: dict[str, Any]) -> str:
    return _spread(result["ratio"]) if "ratio" in result else ""


def _percent(result: dict[str, Any]) -> str:
    return f"{result['floor_fraction']:.1%}" if "floor_fraction" in result else ""


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
