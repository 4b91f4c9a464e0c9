"""Tells what was measured: a Markdown table, CSV, pictures, and all of it on one HTML page.

`python -m fastgan.bench.report RESULTS.json [DIR]` prints the table of a result and writes the other forms to a folder.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastgan.bench import growth
from fastgan.bench.case import BASELINE
from fastgan.bench.record import Results, load

Cells = list[str]
_COUNTS = {"flops": ("GFLOP", 1e9), "peak_bytes": ("peak MB", 1e6), "saved_bytes": ("saved MB", 1e6)}


def table(results: Results) -> str:
    """The measurements as Markdown, with the device, the commit and the command that made them."""
    header, rows = measurements(results)
    parts = [source(results), markdown(header, rows, words=2)]
    exponents = growth_rows(results)
    if exponents:
        parts.append(markdown(*exponents, words=2))
    missing = left_out(results)
    if missing:
        parts.append("\n".join(["Left out:", *(f"- {line}" for line in missing)]))
    return "\n\n".join(parts)


def measurements(results: Results) -> tuple[Cells, list[Cells]]:
    """The header and a row a variant; columns that no case fills are not there."""
    cases = results["cases"]
    measured = [result for case in cases for result in case["variants"].values()]
    graphs = any("graph" in result for result in measured)
    floors = any("floor_fraction" in result for result in measured)
    counts = {key: of for key, of in _COUNTS.items() if any(key in result for result in measured)}
    header = ["case", "variant", "ms (20 to 80 %)", f"times {BASELINE}'s speed (20 to 80 %)"]
    header += ["of the floor"] * floors + [title for title, _ in counts.values()]
    header += ["CUDA graph, cold L2: ms", f"times {BASELINE}'s", "of the floor"] if graphs else []
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
    """The exponents, fitted and theoretical; None where nothing was measured along a line."""
    header = ["cost", "variant", "of", "sizes", "fitted exponent ± standard error", "theory"]
    rows = [
        [line.name, line.variant, line.of, _sizes(line), str(line.fit or "too few"), f"{line.expected:g}"]
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
    threads = (
        f", {about['threads']} threads" if about["device_type"] == "cpu" else f", driver {about['driver'] or 'unknown'}"
    )
    commit = f"commit {about['commit'] or 'unknown'}{' with changes' if about['dirty'] else ''}"
    versions = f"torch {about['torch']}, fastgan {about['fastgan']}, {commit}, {date(about)}"
    floor = (
        f"The floor is the bytes over the copy bandwidth of the same run, {results['copy_bandwidth'] / 1e9:.1f} GB/s; "
        "what stays in a cache can beat it. "
    )
    floors = any(case["floor_seconds"] is not None for case in results["cases"])
    return f"{about['device']}{threads}; {versions}. {floor if floors else ''}`{about['command']}`"


def provenance_rows(results: Results) -> list[Cells]:
    """Everything that is known of where and how it was measured."""
    about = dict(results["provenance"])
    environment, build = about.pop("environment"), about.pop("build")
    about |= {"rounds": results["rounds"], "copy bandwidth, GB/s": round(results["copy_bandwidth"] / 1e9, 1)}
    about |= {"matrix products, GFLOP/s": round(results["matmul_rate"] / 1e9, 1)}
    rows = [[key.replace("_", " "), _plain(value)] for key, value in about.items()]
    rows += [[f"build: {key}", _plain(value)] for key, value in (build or {}).items()]
    return rows + [[f"environment: {key}", value] for key, value in environment.items()]


def date(about: dict[str, Any]) -> str:
    return str(about["date"])[:10]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """A table whose first ``words`` columns are text, the others numbers."""
    rule = ["---"] * words + ["---:"] * (len(header) - words)
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))


def write(results: Results, folder: Path, stem: str) -> list[Path]:
    """CSV, Markdown, pictures and one HTML page; the paths that were written, the page last.

    Raises:
        ModuleNotFoundError: matplotlib is not there; CSV is written nevertheless.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sheet, text, page = (folder / f"{stem}.{kind}" for kind in ("csv", "md", "html"))
    write_csv(results, sheet)
    from fastgan.bench import html_report, plots

    pictures = {folder / f"{stem}-{name}.png": figure for name, figure in plots.figures(results).items()}
    for path, figure in pictures.items():
        figure.picture.savefig(path, dpi=150)
    images = "\n\n".join(f"![{figure.caption}]({path.name})" for path, figure in pictures.items())
    provenance = markdown(["", ""], provenance_rows(results), words=2)
    title = f"# fastgan bench, suite {results['suite']}"
    text.write_text("\n\n".join([title, table(results), images, "## Provenance", provenance]) + "\n", encoding="utf-8")
    page.write_text(
        html_report.page(results, {path: figure.caption for path, figure in pictures.items()}), encoding="utf-8"
    )
    return [sheet, text, *pictures, page]


def write_csv(results: Results, path: Path) -> None:
    """A row a variant: names and sizes, quantiles in seconds, what was counted, and where it was measured."""
    sizes = list(dict.fromkeys(size for case in results["cases"] for size in case["sizes"]))
    about = results["provenance"]
    quantiles = ("low", "median", "high")
    header = ["suite", "case", *sizes, "op", "dtype", "backend", "variant"]
    header += [f"{of}_{quantile}" for of in ("seconds", "ratio") for quantile in quantiles]
    header += ["floor_fraction", "error", *_COUNTS, "graph_seconds", "graph_ratio", "device", "threads", "commit"]
    header += ["dirty", "torch", "date"]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for case in results["cases"]:
            named = [results["suite"], case["name"], *(case["sizes"].get(size, "") for size in sizes)]
            for variant, result in case["variants"].items():
                row = [*named, case["op"] or "", case["dtype"], case["backend"] or "", variant]
                row += [result.get(of, {}).get(quantile, "") for of in ("seconds", "ratio") for quantile in quantiles]
                row += [result.get(of, "") for of in ("floor_fraction", "error", *_COUNTS)]
                row += [result.get("graph", {}).get(of, {}).get("median", "") for of in ("seconds", "ratio")]
                row += [about[of] for of in ("device", "threads", "commit", "dirty", "torch", "date")]
                writer.writerow(row)


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(of)}" for key, of in value.items())
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


def main(arguments: list[str]) -> int:
    if not 1 <= len(arguments) <= 2:
        print(__doc__, file=sys.stderr)
        return 2
    path = Path(arguments[0])
    try:
        results = load(path)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(table(results))
    if len(arguments) == 2:
        print("\n".join(map(str, write(results, Path(arguments[1]), path.stem))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
