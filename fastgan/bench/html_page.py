"""Builds a single HTML file with embedded pictures, no network access, no scripts, and a light and a dark theme."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

_COLORS = 6  # s0 to s5, for lines and their keys

STYLE = """
:root { color-scheme: light dark; --ground: #fbfaf8; --ink: #22252b; --faint: #6d727c; --line: #dcdad4;
  --card: #fff; --bad: #a3341f; --good: #2c6e49;
  --s0: #2563a8; --s1: #c2571a; --s2: #2c7a4b; --s3: #8b3f8f; --s4: #8a7a12; --s5: #555b66; }
@media (prefers-color-scheme: dark) { :root { --ground: #16181c; --ink: #e6e4df; --faint: #989ca5; --line: #33363d;
  --card: #1e2126; --bad: #f0866f; --good: #7cc79a;
  --s0: #76aee8; --s1: #eb9a63; --s2: #7cc79a; --s3: #cf91d3; --s4: #d3c25a; --s5: #a3a9b4; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1060px; padding: 2.5rem 1.25rem 4rem; background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 2rem; margin: 0; letter-spacing: -.02em; } h2 { font-size: 1.15rem; margin: 2.6rem 0 .8rem; }
p { margin: .3rem 0; max-width: 70ch; } .faint, small { color: var(--faint); }
small { display: block; font-size: .8rem; line-height: 1.35; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: .7rem; margin: 1.4rem 0; }
.cards div { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .7rem .9rem; }
.cards b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.alarm { border-left: 4px solid var(--bad); background: var(--card); padding: .6rem 1rem; margin: .5rem 0; }
.calm { border-left: 4px solid var(--good); background: var(--card); padding: .6rem 1rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(320px, 1fr)); gap: .9rem; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .7rem .8rem; }
figcaption { font-size: .9rem; } svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--faint); font-size: 12px; } svg .grid { stroke: var(--line); }
polyline { fill: none; stroke-width: 1.6; stroke-linejoin: round; }
.key { margin-left: .6rem; font-size: .8rem; display: inline-block; }
img { max-width: 100%; border-radius: 6px; display: block; } img.pixels { image-rendering: pixelated; }
figure + figure { margin-top: .9rem; } .charts figure, .hero figure, .stages figure { margin-top: 0; }
figure:has(img.chart) { overflow-x: auto; } img.chart { min-width: 660px; }
.hero { display: grid; grid-template-columns: repeat(auto-fit, minmax(320px, 1fr)); gap: 1.2rem; align-items: start; }
.stages { display: grid; grid-template-columns: repeat(4, 1fr); gap: .7rem; }
@media (max-width: 600px) { .stages { grid-template-columns: repeat(2, 1fr); } }
table { border-collapse: collapse; width: 100%; font-size: .93rem; }
td, th { text-align: left; vertical-align: top; padding: .35rem .8rem .35rem 0; border-bottom: 1px solid var(--line); }
td.n { font-variant-numeric: tabular-nums; white-space: nowrap; } .wide :is(td, th) { white-space: nowrap; }
.wide { overflow-x: auto; } .wide + .wide { margin-top: 1.4rem; }
""" + "".join(
    f".s{i} {{ color: var(--s{i}); }} polyline.s{i} {{ stroke: currentColor; }} circle.s{i} {{ fill: currentColor; }}\n"
    for i in range(_COLORS)
)


def page(title: str, sections: Sequence[str]) -> str:
    """Return the file's text from sections of HTML. Empty sections are left out."""
    head = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}: fastgan</title><style>{STYLE}</style></head>\n<body>\n"
    )
    return head + "\n".join(filter(None, sections)) + "\n</body></html>\n"


def words(text: str) -> str:
    """Escape a text for HTML. Text between backticks is shown as code."""
    parts = escape(text).split("`")
    if len(parts) % 2 == 0:  # an odd number of backticks
        return escape(text)
    return "".join(f"<code>{part}</code>" if index % 2 else part for index, part in enumerate(parts))


def picture(path: Path, caption: str, kind: str = "chart") -> str:
    """Embed a PNG, or return "" if the file does not exist.

    ``kind`` is a class of the style: a chart scrolls on a narrow screen, so that its text can be read; pixels shrink.
    """
    if not path.exists():
        return ""
    data, text = base64.b64encode(path.read_bytes()).decode(), escape(caption)
    shown = words(caption)
    return (
        f'<figure><img class="{kind}" alt="{text}" src="data:image/png;base64,{data}"><small>{shown}</small></figure>'
    )


def properties(rows: Sequence[Sequence[str]]) -> str:
    """Format names and values as a table."""
    return f"<table>{''.join(f'<tr><th>{escape(key)}</th><td>{words(value)}</td></tr>' for key, value in rows)}</table>"


def grid(header: Sequence[str], rows: Sequence[Sequence[str]], labels: int = 1) -> str:
    """Format a table. Columns after the first ``labels`` are numbers. A table that is too wide scrolls."""
    body = [
        "".join(f"<td{'' if column < labels else ' class=n'}>{words(cell)}</td>" for column, cell in enumerate(row))
        for row in rows
    ]
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(f"<tr>{row}</tr>" for row in body)}</table></div>'
