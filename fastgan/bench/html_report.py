"""A result as one HTML file."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path

from fastgan.bench import html_page, report
from fastgan.bench.record import Results


def page(results: Results, pictures: Mapping[Path, str]) -> str:
    """The page's text. ``pictures``: PNG files, which go into it, and their captions."""
    title = f"Benchmark: {results['suite']}"
    exponents = report.growth_rows(results)
    missing = report.left_out(results)
    sections = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="faint">{escape(report.source(results))}</p>',
        *(html_page.picture(path, caption) for path, caption in pictures.items()),
        "<h2>Growth</h2>" + html_page.grid(*exponents, words=2) if exponents else "",
        "<h2>Measured</h2>" + html_page.grid(*report.measurements(results), words=2),
        "<h2>Left out</h2>" + "".join(f"<p>{escape(line)}</p>" for line in missing) if missing else "",
        "<h2>Provenance</h2>" + html_page.properties(report.provenance_rows(results)),
    ]
    return html_page.page(title, sections)
