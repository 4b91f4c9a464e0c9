"""Writes the tables of README.md and docs/ from the records in benchmarks/results: python benchmarks/tables.py

A page requests a table with a line ``<!-- measured FOLDER/RECORD.json PREFIX -->``, for the cases whose names begin
with PREFIX, or ``<!-- measured FOLDER/RECORD.json -->``, for all cases or an experiment with its own script. A row that
begins with a label and ``<!-- case FOLDER/RECORD NAME -->`` is one case, from RECORD.json and RECORD-given-back.json.
With ``kept`` instead of ``case``, it is from RECORD.json only.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
_TABLE = re.compile(r"(<!-- measured (?P<record>\S+)(?: (?P<prefix>\S+))? -->\n).*?(<!-- end -->)", re.DOTALL)
_CASE = re.compile(r"^(\| [^|]*<!-- (?P<kind>case|kept) (?P<record>\S+) (?P<name>\S+) --> \|).*$", re.MULTILINE)


def with_tables(page: str) -> str:
    """Return the text of a page with its tables generated again."""
    page = _TABLE.sub(lambda found: found[1] + _table(found["record"], found["prefix"]) + found[4], page)
    return _CASE.sub(lambda found: found[1] + _cells(**found.groupdict()), page)


def _table(record: str, prefix: str | None) -> str:
    measured = json.loads((RESULTS / record).read_text())
    if "table" in measured:
        origin = measured["environment"]
        where = f"{origin['device']}, torch {origin['torch']}, commit {origin['commit']}: `{measured['command']}`"
        return "\n".join([*measured["table"], "", where, ""])
    cases = [case for case in measured["cases"] if case["name"].startswith(prefix or "")]
    if not cases:
        raise ValueError(f"{record} has no case whose name begins with {prefix}")
    origin = measured["provenance"]
    return "\n".join(
        [
            *(_compiled if measured.get("compile") else _TABLES.get(measured["suite"], _speed))(cases),
            "",
            f"{origin['device']}, {threads(origin)},"
            f" torch {origin['torch']}, commit {origin['commit']}: `{origin['command']}`",
            "",
        ]
    )


def threads(origin: dict[str, Any]) -> str:
    """Return the number of threads of a run."""
    return f"{origin['threads']} thread{'' if origin['threads'] == 1 else 's'}"


def _cells(kind: str, record: str, name: str) -> str:
    cells: list[str] = []
    if kind == "kept":
        cells = _times(_case(f"{record}.json", name)[1])
        return "".join(f" {cell} |" for cell in cells)
    for file in (f"{record}.json", f"{record}-given-back.json"):
        suite, case = _case(file, name)
        cells += _times(case)
    torch, fastgan = (case["variants"][variant] for variant in ("torch", "fastgan"))
    for counted, unit in (("flops", 1e9), ("peak_bytes", 1e6)):
        if suite == "steps":
            cells.append(" -> ".join(_digits(variant[counted] / unit) for variant in (torch, fastgan)))
    return "".join(f" {cell} |" for cell in cells)


def _case(file: str, name: str) -> tuple[str, dict[str, Any]]:
    measured = json.loads((RESULTS / file).read_text())
    (case,) = [case for case in measured["cases"] if case["name"] == name]
    return measured["suite"], case


def _memory(cases: list[dict[str, Any]]) -> list[str]:
    names = list(dict.fromkeys(name for case in cases for name in case["variants"]))
    lines = [f"| case | {' | '.join(f'{name}: ms, MB' for name in names)} |", "|---" + "|---:" * len(names) + "|"]
    for case in cases:
        found = (case["variants"].get(name) for name in names)
        cells = (
            "-"
            if variant is None
            else f"{_digits(1e3 * variant['seconds']['median'])}, {_digits(variant['peak_bytes'] / 1e6)}"
            for variant in found
        )
        lines.append(f"| {case['name'].removeprefix('memory/')} | {' | '.join(cells)} |")
    return lines


def _speed(cases: list[dict[str, Any]]) -> list[str]:
    return ["| case | PyTorch, ms | fastgan, ms | speed-up |", "|---|---:|---:|---:|", *map(_row, cases)]


def _compiled(cases: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| case | PyTorch: eager, ms | compiled, ms | fastgan: eager, ms | compiled, ms | speed-up, both compiled |"
        " convolutions in the graphs |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for case in cases:
        variants = case["variants"]
        best, ours = fastest(case, "torch.compile"), fastest(case, "fastgan, compiled")
        times = (variants["torch"], best, variants["fastgan"], ours)
        cells = [_digits(1e3 * variant["seconds"]["median"]) for variant in times]
        cells.append(_digits(best["seconds"]["median"] / ours["seconds"]["median"]))
        cells.append(" -> ".join(str(variant.get("convolutions", "?")) for variant in (best, ours)))
        lines.append(f"| {case['name']} | {' | '.join(cells)} |")
    return lines


def fastest(case: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the fastest of the variants whose names begin with this one."""
    variants = [variant for of, variant in case["variants"].items() if of.startswith(name)]
    return min(variants, key=lambda variant: float(variant["seconds"]["median"]))


def _forms(cases: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| discriminator | forwards: PyTorch | fastgan | path | PyTorch, ms | fastgan, ms | speed-up |",
        "|---|---:|---:|---|---:|---:|---:|",
    ]
    for case in cases:
        about = case["about"]
        forwards = [f"{case['variants'][name]['flops'] / about['forward_flops']:.2f}" for name in ("torch", "fastgan")]
        path = about["path"].partition(":")[0].partition(",")[0]
        if "same gradient" in about["path"]:
            path += ", if a sample's logits share a gradient"
        cells = [case["name"].partition("/")[2], *forwards, path, *_times(case)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


_TABLES = {"memory": _memory, "forms": _forms}


def _row(case: dict[str, Any]) -> str:
    return f"| {case['name']} | {' | '.join(_times(case))} |"


def _times(case: dict[str, Any]) -> list[str]:
    """Return PyTorch's time, fastgan's time and the ratio."""
    variants = case["variants"]
    others = [name for name in variants if name not in ("torch", "reference", "fastgan")]
    ratios = {name: _digits(variant["ratio"]["median"]) for name, variant in variants.items()}
    beside = ", ".join(f"{name}: {ratios[name]}" for name in others)
    speed_up = ratios["fastgan"] + (f" ({beside})" if beside else "")
    torch, fastgan = (_digits(1e3 * variants[name]["seconds"]["median"]) for name in ("torch", "fastgan"))
    return [torch, fastgan, speed_up]


def _digits(value: float) -> str:
    if 0 < value < 0.005:
        return "0"
    return f"{value:.{2 if value < 2 else 1 if value < 20 else 0}f}"


if __name__ == "__main__":
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        path.write_text(with_tables(path.read_text()))
