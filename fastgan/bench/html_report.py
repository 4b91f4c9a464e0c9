"""Formats a result as a single HTML file."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path

from fastgan.bench import html_page, tables
from fastgan.bench.record import Results


def page(results: Results, pictures: Mapping[Path, str]) -> str:
    """Return the page's text. ``pictures`` maps the PNG files to embed to their captions."""
    title = f"Benchmark: {results['suite']}"
    exponents = tables.growth_rows(results)
    missing = tables.left_out(results)
    sections = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="faint">{html_page.words(tables.source(results))}</p>',
        *(html_page.picture(path, caption) for path, caption in pictures.items()),
        "<h2>Growth</h2>" + html_page.grid(*exponents, labels=2) if exponents else "",
        "<h2>Measured</h2>" + html_page.grid(*tables.measurements(results), labels=2),
        "<h2>Left out</h2>" + "".join(f"<p>{html_page.words(line)}</p>" for line in missing) if missing else "",
        "<h2>Provenance</h2>" + html_page.properties(tables.provenance_rows(results)),
    ]
    return html_page.page(title, sections)
