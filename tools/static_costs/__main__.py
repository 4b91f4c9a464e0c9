"""Print the table of static costs, or renew its record."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tools import static_costs
from tools.static_costs import cuda
from tools.static_costs.launches import record_all
from tools.static_costs.model import cost

RECORD = Path(__file__).parents[2] / "benchmarks/results/static/h200.json"
COLUMNS = (
    "fraction:5 bound:7 floor_us:8 dram_us:7 issue_us:8 latency_us:10 instructions_per_element:24 hot_loop:8 calls:5 "
    "barriers:8 spills:6 registers:9 warps:5 programs:8 resident:8 notes:5 kernel:38 case:16 widths:0"
)


def table(only: list[str], capability: int) -> list[dict[str, Any]]:
    """Compile each launch whose "kernel case" contains one of ``only``, and return its costs."""
    target = GPUTarget("cuda", capability, 32)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        cubin = Path(folder, "kernel.cubin")
        for launch in record_all(target):
            if any(text in f"{launch.name} {launch.case}" for text in only):
                source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
                binary = triton.compile(source, target, launch.options.__dict__)
                cubin.write_bytes(binary.asm["cubin"])
                rows.append(cost(launch, binary.metadata, cubin))
        rows += cuda.table(only, capability, Path(folder))
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    columns = [column.split(":") for column in COLUMNS.split()]
    print(*(name.rjust(int(width)) if name != "kernel" else name.ljust(int(width)) for name, width in columns))
    for row in sorted(rows, key=lambda row: (row["fraction"] is None, row["fraction"] or 0)):
        print(*(str("" if row[name] is None else row[name]).rjust(int(width)) for name, width in columns))


def main() -> None:
    description = static_costs.__doc__
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", help="compile only launches whose 'kernel case' contains this text")
    parser.add_argument("--capability", type=int, default=90, help="80, 90 or 100; predictions are an H200's")
    parser.add_argument("--json", help="write the rows to this file")
    parser.add_argument("--write", action="store_true", help="renew the record; with --only, only these rows of it")
    options = parser.parse_args()
    rows = table(options.only or [""], options.capability)
    show(rows)
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1) + "\n")
    if options.write:
        write(rows, whole=not options.only)


def write(rows: list[dict[str, Any]], whole: bool) -> None:
    kept = {}
    if not whole and RECORD.exists():
        kept = {key_of(row): row for row in json.loads(RECORD.read_text())["rows"]}
    kept |= {key_of(row): row for row in rows}
    record = {
        "device": "H200 (predicted from machine code for sm_90; not measured)",
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "triton": triton.__version__,
        "rows": [kept[key] for key in sorted(kept)],
    }
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    RECORD.write_text(json.dumps(record, indent=1) + "\n")


def key_of(row: dict[str, Any]) -> tuple[str, str, int]:
    return row["kernel"], row["case"], row["launch"]


if __name__ == "__main__":
    main()
