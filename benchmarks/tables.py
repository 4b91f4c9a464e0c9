"""Writes the tables of docs/ from the records in benchmarks/results: python benchmarks/tables.py

A page asks for one with a line ``<!-- measured FOLDER/RECORD.json PREFIX -->``: the cases whose names begin so; or, of
an experiment with a script of its own, ``<!-- measured FOLDER/RECORD.json -->``.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
_TABLE = re.compile(r"(<!-- measured (?P<record>\S+)(?: (?P<prefix>\S+))? -->\n).*?(<!-- end -->)", re.DOTALL)


def with_tables(page: str) -> str:
    """The text of a page, its tables made anew."""
    return _TABLE.sub(lambda found: found[1] + _table(found["record"], found["prefix"]) + found[4], page)


def _table(record: str, prefix: str | None) -> str:
    measured = json.loads((RESULTS / record).read_text())
    if prefix is None:
        origin = measured["environment"]
        where = f"{origin['device']}, torch {origin['torch']}, commit {origin['commit']}: `{measured['command']}`"
        return "\n".join([*measured["table"], "", where, ""])
    rows = [_row(case) for case in measured["cases"] if case["name"].startswith(prefix)]
    if not rows:
        raise ValueError(f"{record} has no case that begins with {prefix}")
    origin = measured["provenance"]
    return "\n".join(
        [
            "| case | PyTorch, ms | fastgan, ms | speed-up |",
            "|---|---:|---:|---:|",
            *rows,
            "",
            f"{origin['cpu'] if origin['device_type'] == 'cpu' else origin['device']}, {origin['threads']} threads,"
            f" torch {origin['torch']}, commit {origin['commit']}: `{origin['command']}`",
            "",
        ]
    )


def _row(case: dict[str, Any]) -> str:
    variants = case["variants"]
    others = [name for name in variants if name not in ("torch", "reference", "fastgan")]
    ratios = {name: _digits(variant["ratio"]["median"]) for name, variant in variants.items()}
    beside = ", ".join(f"{name}: {ratios[name]}" for name in others)
    speed_up = ratios["fastgan"] + (f" ({beside})" if beside else "")
    torch, fastgan = (_digits(1e3 * variants[name]["seconds"]["median"]) for name in ("torch", "fastgan"))
    return f"| {case['name']} | {torch} | {fastgan} | {speed_up} |"


def _digits(value: float) -> str:
    return f"{value:.{2 if value < 2 else 1 if value < 20 else 0}f}"


if __name__ == "__main__":
    for path in (ROOT / "docs").glob("*.md"):
        path.write_text(with_tables(path.read_text()))
