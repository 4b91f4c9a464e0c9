"""Reports a result as a Markdown table, CSV, pictures, and one HTML page with all of them.

`python -m fastgan.bench.report RESULTS.json [DIR]` prints the table of a result and writes the other formats
to a folder.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from pathlib import Path

from fastgan.bench.record import Results, load
from fastgan.bench.tables import COUNTS, growth_rows, left_out, measurements, provenance_rows, source


def table(results: Results) -> str:
    """Format the measurements as Markdown, with the device, the commit and the command that produced them."""
    header, rows = measurements(results)
    parts = [source(results), markdown(header, rows, words=2)]
    exponents = growth_rows(results)
    if exponents:
        parts.append(markdown(*exponents, words=2))
    missing = left_out(results)
    if missing:
        parts.append("\n".join(["Left out:", *(f"- {line}" for line in missing)]))
    return "\n\n".join(parts)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """Format a table. The first ``words`` columns are text, the others are numbers."""
    rule = ["---"] * words + ["---:"] * (len(header) - words)
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))


def write(results: Results, folder: Path, stem: str) -> list[Path]:
    """Write CSV, Markdown, pictures and one HTML page. Return their paths, the page last.

    Raises:
        ModuleNotFoundError: matplotlib is missing; the CSV file is written anyway.
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
    """Write one row per variant: names, sizes, quantiles in seconds, counts, and the machine."""
    sizes = list(dict.fromkeys(size for case in results["cases"] for size in case["sizes"]))
    about = results["provenance"]
    quantiles = ("low", "median", "high")
    header = ["suite", "case", *sizes, "op", "dtype", "backend", "variant"]
    header += [f"{of}_{quantile}" for of in ("seconds", "ratio") for quantile in quantiles]
    header += ["floor_fraction", "error", *COUNTS, "graph_seconds", "graph_ratio", "device", "threads", "commit"]
    header += ["dirty", "torch", "date"]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for case in results["cases"]:
            named = [results["suite"], case["name"], *(case["sizes"].get(size, "") for size in sizes)]
            for variant, result in case["variants"].items():
                row = [*named, case["op"] or "", case["dtype"], case["backend"] or "", variant]
                row += [result.get(of, {}).get(quantile, "") for of in ("seconds", "ratio") for quantile in quantiles]
                row += [result.get(of, "") for of in ("floor_fraction", "error", *COUNTS)]
                row += [result.get("graph", {}).get(of, {}).get("median", "") for of in ("seconds", "ratio")]
                row += [about[of] for of in ("device", "threads", "commit", "dirty", "torch", "date")]
                writer.writerow(row)


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
