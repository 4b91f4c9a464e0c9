"""Tells what was measured: a Markdown table, and a picture of the speed-ups.

`python -m fastgan.bench.report RESULTS.json [PICTURE.png]` prints the table of a run and draws its picture.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from fastgan.bench.case import BASELINE

COLOURS = {"torch.compile": "tab:gray", "fastgan": "tab:blue"}  # what is drawn


def table(results: dict[str, Any]) -> str:
    """The measurements as Markdown, with the device, the commit and the command that made them."""
    about = results["provenance"]
    graphs = any("graph" in result for case in results["cases"] for result in case["variants"].values())
    columns = ["case", "variant", "ms (20 to 80 %)", f"times {BASELINE}'s speed (20 to 80 %)", "of the floor"]
    counted = any("flops" in result for case in results["cases"] for result in case["variants"].values())
    columns += ["GFLOP", "peak MB", "saved MB"] if counted else []
    columns += ["CUDA graph, cold L2: ms", f"times {BASELINE}'s", "of the floor"] if graphs else []
    lines = [_source(about, results), "", _row(columns), _row(["---"] * 2 + ["---:"] * (len(columns) - 2))]
    for case in results["cases"]:
        for name, result in case["variants"].items():
            label = f"fastgan ({case['backend']})" if name == "fastgan" and case["backend"] else name
            cells = [case["name"], label, _spread(result["seconds"], 1e3)]
            cells += [_spread(result["ratio"]), _percent(result)]
            if counted:
                cells += [
                    _scaled(result, "flops", 1e9),
                    *(_scaled(result, f"{of}_bytes", 1e6) for of in ("peak", "saved")),
                ]
            graph = result.get("graph", {})
            if graphs and "seconds" in graph:
                cells += [_spread(graph["seconds"], 1e3), _spread(graph["ratio"]) if "ratio" in graph else ""]
                cells += [_percent(graph)]
            elif graphs:
                cells += [graph.get("reason", ""), "", ""]
            lines.append(_row(cells))
    left_out = [
        f"- {case['name']}, {name}: {reason}" for case in results["cases"] for name, reason in case["left_out"].items()
    ]
    return "\n".join([*lines, *(["", "Left out:", *left_out] if left_out else [])])


def _source(about: dict[str, Any], results: dict[str, Any]) -> str:
    threads = (
        f", {about['threads']} threads" if about["device_type"] == "cpu" else f", driver {about['driver'] or 'unknown'}"
    )
    commit = f"commit {about['commit'] or 'unknown'}{' with changes' if about['dirty'] else ''}"
    versions = f"torch {about['torch']}, fastgan {about['fastgan']}, {commit}, {_date(about)}"
    return (
        f"{about['device']}{threads}; {versions}. "
        f"The floor is the bytes over the copy bandwidth of the same run, {results['copy_bandwidth'] / 1e9:.1f} GB/s; "
        f"what stays in a cache can beat it. `{about['command']}`"
    )


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _spread(quantiles: dict[str, float], factor: float = 1.0) -> str:
    low, median, high = (_number(quantiles[key] * factor) for key in ("low", "median", "high"))
    return f"{median} ({low} to {high})"


def _percent(result: dict[str, Any]) -> str:
    return f"{result['floor_fraction']:.1%}" if "floor_fraction" in result else ""


def _scaled(result: dict[str, Any], key: str, unit: float) -> str:
    return _number(result[key] / unit) if key in result else ""


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def plot(results_json: Path | str, png: Path | str) -> None:
    """Draw each variant's speed relative to the baseline's, with its spread, from a file of results."""
    from matplotlib.figure import Figure

    results = json.loads(Path(results_json).read_text())
    bars = [
        (case["name"], name, result["ratio"])
        for case in results["cases"]
        for name, result in case["variants"].items()
        if name in COLOURS
    ]
    figure = Figure(figsize=(8, 1.4 + 0.4 * len(bars)), layout="constrained")
    axes = figure.subplots()
    for position, (_, name, ratio) in enumerate(bars):
        spread = [[ratio["median"] - ratio["low"]], [ratio["high"] - ratio["median"]]]
        axes.barh(position, ratio["median"], xerr=spread, color=COLOURS[name])
        text = f"{ratio['median']:.1f}x"
        axes.annotate(text, (max(ratio["high"], 1), position), (5, 0), textcoords="offset points", va="center")
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(bars)), [f"{case}, {name}" for case, name, _ in bars])
    axes.invert_yaxis()
    axes.margins(x=0.12)
    about = results["provenance"]
    axes.set(xlabel="times the speed of PyTorch's, in the same run", title=f"{about['device']}, {_date(about)}")
    figure.savefig(png, dpi=150)


def _date(about: dict[str, Any]) -> str:
    return str(about["date"])[:10]


def main(arguments: list[str]) -> int:
    if not 1 <= len(arguments) <= 2:
        print(__doc__, file=sys.stderr)
        return 2
    print(table(json.loads(Path(arguments[0]).read_text())))
    if len(arguments) == 2:
        plot(*arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
