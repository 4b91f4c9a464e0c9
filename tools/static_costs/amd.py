"""Counts of the ISA of AMD's gfx942 (MI300): ``python -m tools.static_costs.amd [--only TEXT] [--write]``.

There is no model of its speed: only the hot loop's instructions, barriers and widths of memory accesses, registers and
spills. The hot loop is the longest one without another inside, or the whole kernel where there is none.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastgan.ops.minibatch_discrimination import triton_kernels as discrimination
from tools.static_costs.launches import record_all

RECORD = Path(__file__).parents[2] / "benchmarks/results/static/gfx942.json"
_SLOW = ("attention.",)  # to compile: minutes


def hot_loop(assembly: str) -> list[str]:
    """Return the operations of the hot loop."""
    body: list[str] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for line in assembly.partition(".cfi_startproc")[2].partition("s_endpgm")[0].splitlines():
        text = line.partition(";")[0].strip()
        if label := re.match(r"(\.LBB\w+):", text):
            labels[label[1]] = len(body)
        elif text and not text.startswith("."):
            operation, _, operands = text.partition(" ")
            target = operands.strip()
            if operation.startswith(("s_cbranch", "s_branch")) and target in labels:
                loops.append((labels[target], len(body) + 1))
            body.append(operation)
    inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    begin, end = max(inner, key=lambda loop: loop[1] - loop[0], default=(0, len(body)))
    return body[begin:end]


def counts(name: str, case: str, number: int, assembly: str) -> dict[str, Any]:
    loop = hot_loop(assembly)
    kinds = Counter(operation.split("_")[0] for operation in loop)
    widths = Counter(operation for operation in loop if operation.startswith(("global_", "buffer_")))
    said = {key: re.search(rf"\.{key}:\s+(\d+)", assembly) for key in ("vgpr_count", "vgpr_spill_count", "sgpr_count")}
    return {
        "kernel": name,
        "case": case,
        "launch": number,
        "hot_loop": len(loop),
        "vector": kinds["v"],
        "scalar": kinds["s"],
        "lds": kinds["ds"],
        "barriers": sum(operation.startswith("s_barrier") for operation in loop),
        "accesses": dict(sorted(widths.items())),
        **{key: int(found[1]) if found else None for key, found in said.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="compile only launches whose 'kernel case' contains this text")
    parser.add_argument("--write", action="store_true", help=f"renew {RECORD.name}")
    options = parser.parse_args()
    target = GPUTarget("hip", "gfx942", 64)
    torch.version.hip = "of no version"  # launches are those of a torch that is built for AMD
    discrimination._LAUNCH["num_warps"] = 2  # of 64 threads
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        for launch in record_all(target):
            if options.only in f"{launch.name} {launch.case}" and not launch.name.startswith(_SLOW):
                source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
                binary = triton.compile(source, target, launch.options.__dict__)
                rows.append(counts(launch.name, launch.case, launch.number, binary.asm["amdgcn"]))
                print(rows[-1], flush=True)
    if options.write:
        record = {"device": "gfx942 (compiled, not run)", "triton": triton.__version__, "rows": rows}
        RECORD.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
