"""Run the core tests with other versions of torch, each in an environment of its own.

python -m tools.versions 2.6.0 2.11.0+triton3.6.0        # make versions

Environments are kept in build/versions/. The results replace their rows in docs/versions.md. fastgan's native module
does not link against torch, so every environment loads the one that is built here.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "versions.md"
BEGIN, END = "<!-- begin table -->", "<!-- end table -->"
TESTS = (
    "tests/nn",
    "tests/convert",
    "tests/integrations",
    *(
        f"tests/ops/test_{name}.py"
        for name in (
            "avg_pool",
            "batch_norm",
            "batch_norm_in_a_step",
            "bias_act",
            "conv",
            "conv_in_graphs",
            "finite_difference_penalty",
            "gradient_penalty",
            "lacking",
            "logits_and_penalty",
            "minibatch_discrimination",
            "minibatch_stddev",
            "norm",
            "one_pass_idioms",
            "one_pass_outputs",
            "one_pass_rare_calls",
            "one_pass_refused",
            "one_pass_spectra",
            "one_pass_writes",
            "penalty_conventions",
            "penalty_fuzz",
            "penalty_kinds",
            "penalty_options",
            "penalty_outputs",
            "piecewise",
            "attention_in_models",
            "attention_on_cpu",
            "attention_shapes",
            "known_calls",
            "scaled_dot_product_attention",
            "second_derivatives",
            "spectral_norm",
            "third_order",
            "zeros",
        )
    ),
)
COMPILATION = "tests/aot/test_triton_compiles.py"  # ahead of time, for sm_90
PACKAGES = ("pytest", "pytest-xdist", "hypothesis", "tyro", "pybind11", "setuptools")


def environment(version: str) -> Path:
    """Return the interpreter of an environment with this torch, which is made if it is not there."""
    folder = ROOT / "build" / "versions" / version
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        torch, _, triton = version.partition("+triton")
        numpy = (
            "numpy<2.4" if _numbers(torch) < [2, 12] else "numpy"
        )  # older Triton's interpreter uses a function that numpy 2.4 removed
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        wanted = [f"torch=={torch}", *([f"triton=={triton}"] if triton else []), numpy, *PACKAGES]
        subprocess.run([python, "-m", "pip", "--disable-pip-version-check", "install", "-q", *wanted], check=True)
        (folder / "complete").touch()
    return python


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)[:3]]


def run(version: str, commit: str) -> dict[str, str]:
    python = environment(version)
    told = "import json, sys, torch, triton; print(json.dumps([torch.__version__, triton.__version__, sys.version]))"
    torch, triton, interpreter = json.loads(
        subprocess.run([python, "-c", told], check=True, stdout=subprocess.PIPE).stdout
    )
    log = ROOT / "build" / "versions" / f"{version}.log"
    tests = (*TESTS, COMPILATION) if _numbers(triton) >= [3, 6] else TESTS
    command = [python, "-m", "pytest", "-q", "-n", "auto", "--dist", "loadfile", "-p", "no:cacheprovider", *tests]
    with log.open("w") as file:
        settings = {"PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "passive"}
        subprocess.run(command, cwd=ROOT, env=os.environ | settings, stdout=file, stderr=subprocess.STDOUT)
    last = log.read_text().rstrip().rpartition("\n")[2]
    counts = {outcome: count for count, outcome in re.findall(r"(\d+) (passed|failed|errors?|skipped)", last)}
    if not counts:
        sys.exit(f"torch {version}: the tests did not run to their end; see {log}")
    if "failed" in counts or "error" in counts or "errors" in counts:
        print(f"torch {version}: {last} (see {log})")
    failed = sum(int(counts.get(outcome, 0)) for outcome in ("failed", "error", "errors"))
    return {
        "torch": torch,
        "Triton": triton,
        "Python": interpreter.split()[0],
        "passed": counts.get("passed", "0"),
        "failed": str(failed),
        "skipped": counts.get("skipped", "0"),
        "commit": commit,
        "date": f"{datetime.date.today()}",
    }


def write(rows: list[dict[str, str]]) -> None:
    page = PAGE.read_text()
    before, rest = page.split(BEGIN)
    table, after = rest.split(END)
    old = [line.strip("| ").split(" | ") for line in table.strip().splitlines()[2:]]
    by_torch = {cells[0]: cells for cells in old} | {row["torch"]: list(row.values()) for row in rows}
    ordered = sorted(by_torch.values(), key=lambda cells: _numbers(cells[0]))
    lines = [list(rows[0]), ["---"] * len(rows[0]), *ordered]
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    PAGE.write_text(f"{before}{BEGIN}\n\n{table}\n\n{END}{after}")


if __name__ == "__main__":
    describe = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    results = []
    for version in sys.argv[1:]:
        results.append(run(version, commit))
        write(results)
        print(" ".join(f"{name} {value}" for name, value in results[-1].items()), flush=True)
    sys.exit(any(row["failed"] != "0" for row in results))
