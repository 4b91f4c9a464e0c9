"""fastgan bench: times the cases on this machine, prints a table and writes what was measured as JSON."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from fastgan import backends
from fastgan.bench import report, timing
from fastgan.bench.case import BASELINE, Case, Run, prepare
from fastgan.bench.cases import CASES, SUITES
from fastgan.bench.flops import count_flops
from fastgan.bench.memory import peak_bytes, saved_bytes
from fastgan.bench.provenance import ROOT, commit_of, provenance, slug

SCHEMA = 1
SAMPLE_SECONDS = {"cpu": 0.05, "cuda": 0.02}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the result is the exit status.

    Raises:
        ValueError: an unknown suite, case or device.
        ArithmeticError: a variant computes something else than its baseline.
    """
    options = _parser().parse_args(arguments)
    device = choose_device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    chosen = choose_cases(options.suite, options.case, device)
    path = output_path(options.output, device)
    results = run(chosen, device, options.rounds, command=_command(options), optional=options.compile, path=path)
    print(report.table(results))
    print(f"\n{path}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastgan bench",
        description="Time fastgan's operations against PyTorch's, in turns, in one process.",
        epilog="example: fastgan bench --case 'spectral_norm/small/*' --device cpu",
    )
    add = parser.add_argument
    add("--suite", default="ops", help=f"group of cases: {', '.join(SUITES)} (default: %(default)s)")
    add("--case", default="*", metavar="PATTERN", help="cases whose name matches, as in a shell (default: all)")
    add("--device", default="auto", help="cpu, cuda, or auto: cuda where there is one (default: %(default)s)")
    add(
        "--output",
        type=Path,
        metavar="DIR|FILE.json",
        help="where the measurements go (default: benchmarks/results in a checkout, else ./fastgan-bench)",
    )
    add("--rounds", type=_positive, default=20, help="samples of each variant (default: %(default)s)")
    add("--threads", type=_positive, help="CPU threads (default: PyTorch's choice)")
    add("--compile", action="store_true", help="time torch.compile of the baseline too; it takes minutes")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _command(options: argparse.Namespace) -> str:
    """The command line that measures the same again; where its result went is left out."""
    words = ["fastgan bench", f"--suite {options.suite}", f"--device {options.device}", f"--rounds {options.rounds}"]
    words += [f"--case '{options.case}'"] if options.case != "*" else []
    words += [f"--threads {options.threads}"] if options.threads else []
    words += ["--compile"] if options.compile else []
    return " ".join(words)


def choose_device(name: str) -> torch.device:
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda was asked for, but PyTorch sees no CUDA device")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def choose_cases(suite: str, pattern: str, device: torch.device) -> list[Case]:
    if suite not in SUITES:
        raise ValueError(f"suite must be one of {', '.join(SUITES)}, got {suite!r}")
    here = [name for name in SUITES[suite] if device.type in CASES[name].device_types]
    chosen = [CASES[name] for name in here if fnmatch(name, pattern)]
    if not chosen:
        raise ValueError(f"no case of {suite} for {device.type} matches {pattern!r}: choose from {', '.join(here)}")
    return chosen


def output_path(output: Path | None, device: torch.device) -> Path:
    if output is not None and output.suffix == ".json":
        return output
    commit = commit_of(ROOT)[0]
    if output is None:
        output = ROOT / "benchmarks" / "results" if commit else Path("fastgan-bench")
    return output / slug(device) / f"{commit or 'unknown'}.json"


def run(
    chosen: Sequence[Case],
    device: torch.device,
    rounds: int,
    *,
    command: str,
    optional: bool = False,
    path: Path | None = None,
) -> dict[str, Any]:
    """Measure the cases. What there is is written to ``path`` after each, so that a run cut short is not lost."""
    timer = timing.cuda_events if device.type == "cuda" else timing.wall_clock
    results: dict[str, Any] = {
        "schema": SCHEMA,
        "provenance": provenance(device, command),
        "rounds": rounds,
        "copy_bandwidth": timing.copy_bandwidth(device, timer),
        "cases": [],
    }
    load = results["provenance"]["load_average"][0]
    if load > (os.cpu_count() or 1) / 2:
        print(f"fastgan bench: this machine is busy (load {load}): expect noise", file=sys.stderr)
    for i, case in enumerate(chosen):
        print(f"{i + 1}/{len(chosen)} {case.name}", file=sys.stderr, flush=True)
        results["cases"].append(measure(case, device, rounds, results["copy_bandwidth"], timer, optional))
        results["not_yet_run"] = [later.name for later in chosen[i + 1 :]]
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(results, indent=2) + "\n")
    return results


def measure(
    case: Case, device: torch.device, rounds: int, bandwidth: float, timer: timing.Timer, optional: bool
) -> dict[str, Any]:
    """Check that the variants agree, then time them; on CUDA also as graphs, where they can be captured."""
    variants, errors, left_out = prepare(case, device, optional=optional)
    seconds = SAMPLE_SECONDS[device.type]
    measured = timing.compare(timing.in_turns(variants, timer, rounds, seconds), BASELINE)
    floor = case.bytes / bandwidth if case.bytes is not None else None
    for name, result in measured.items():
        result["error"] = errors[name]
        if floor is not None:
            result["floor_fraction"] = floor / result["seconds"]["median"]
        if case.counted:
            result |= _counts(name, variants[name], device)
    if device.type == "cuda":
        for name, result in _graphs(variants, device, rounds, seconds / 10).items():
            if "seconds" in result and floor is not None:
                result["floor_fraction"] = floor / result["seconds"]["median"]
            measured[name]["graph"] = result
    return {
        "name": case.name,
        "op": case.op,
        "dtype": str(case.dtype).removeprefix("torch."),
        "backend": backends.select(case.op, device, case.dtype) if case.op else None,
        "bytes": case.bytes,
        "operations": case.operations,
        "floor_seconds": floor,
        "tolerance": case.tolerance,
        "variants": measured,
        "left_out": left_out,
    }


def _counts(name: str, run_variant: Run, device: torch.device) -> dict[str, int]:
    """What one call computes, holds and saves. Compiled graphs save by themselves, and on a CPU allocate unseen."""
    compiled = name == "torch.compile"
    counts = {} if compiled else {"flops": count_flops(run_variant), "saved_bytes": saved_bytes(run_variant)}
    return counts if compiled and device.type == "cpu" else counts | {"peak_bytes": peak_bytes(run_variant, device)}


def _graphs(variants: dict[str, Run], device: torch.device, rounds: int, seconds: float) -> dict[str, dict[str, Any]]:
    """The device's own time: replays of CUDA graphs, from memory rather than from L2."""
    tried = {name: _capture(run_variant) for name, run_variant in variants.items()}
    replays = {name: replay for name, replay in tried.items() if not isinstance(replay, str)}
    samples = timing.in_turns(replays, timing.ColdCache(device), rounds, seconds) if replays else {}
    failed = {name: {"reason": reason} for name, reason in tried.items() if isinstance(reason, str)}
    return failed | timing.compare(samples, BASELINE)


def _capture(run_variant: Run) -> timing.Call | str:
    """A graph's replay, or why there is none."""
    try:
        return timing.captured(run_variant)
    except RuntimeError as error:
        return str(error).partition("\n")[0]


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(f"fastgan bench: {error}")
