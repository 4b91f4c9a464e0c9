"""fastgan bench: times the cases on this machine, prints a table and writes the measurements as JSON."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from importlib import import_module
from pathlib import Path

import torch

from fastgan.bench import comparison, measure, record, report, user_model
from fastgan.bench.case import Case
from fastgan.bench.cases import CASES, COMPILED_ON_A_CPU, SUITES
from fastgan.bench.command import BESIDE, ROUNDS, parser
from fastgan.bench.heap import GIVEN_BACK, KEPT, keep_freed_memory
from fastgan.bench.provenance import ROOT, commit_of, slug
from fastgan.bench.record import Results

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status, which is 1 if ``--compare`` finds a regression or a case failed.

    Raises:
        ValueError: an unknown suite, case or device; a file that does not match; a model that cannot be benchmarked.
        ArithmeticError: a variant's result differs from its baseline's.
    """
    options = parser().parse_args(arguments)
    _refuse_contradictions(options)
    if options.report is not None:
        import_module("matplotlib")  # if it is missing, fail now and not after the measurements
    if options.threads:
        torch.set_num_threads(options.threads)
    results, cases, device, path = (_resumed if options.resume else _new_results)(options)
    old = None
    if options.compare:
        old = record.load(options.compare)
        only = [name for name in record.names(old) if fnmatch(name, results["pattern"])]
        comparison.refuse_others(old, options.compare, results, only)
    try:
        measure.run_cases(results, cases, device, path, minutes=options.minutes, keep_going=options.keep_going)
    except measure.DeviceLost as error:
        print(f"fastgan bench: {error}; continue with --resume", file=sys.stderr)
        return measure.STOPPED
    except KeyboardInterrupt:
        print(f"\nstopped; continue with: {shlex.join(['fastgan', 'bench', '--resume', str(path)])}", file=sys.stderr)
        return INTERRUPTED
    except ArithmeticError as error:
        if not options.model:
            raise
        drawn = "" if isinstance(error, FloatingPointError) else "; a model that uses random numbers cannot be compared"
        raise ValueError(f"{error}{drawn}") from None
    print(report.table(results))
    print(f"\n{path}")
    if options.report is not None:
        folder = path.parent if options.report is BESIDE else options.report
        print("\n".join(map(str, report.write(results, folder, path.stem))))
    failed = bool(results.get("failed")) or any(case.get("failed") for case in results["cases"])
    if old is None:
        return int(failed)
    found = comparison.changes(old, results)
    print(f"\nAgainst {options.compare}:\n\n{comparison.table(found)}")
    return int(failed or comparison.regressed(found))


def _refuse_contradictions(options: argparse.Namespace) -> None:
    given = [
        name
        for name in ("suite", "case", "rounds", "give_memory_back", "compile", "model", "output")
        if getattr(options, name)
    ]
    if options.resume and given:
        raise ValueError(f"--resume uses the settings of the file: leave out --{', --'.join(given).replace('_', '-')}")
    if options.model and (options.suite or options.case):
        raise ValueError("--model defines its own cases: leave out --suite and --case")
    if not options.model and (options.input or options.batch):
        raise ValueError("--input and --batch describe the model of --model MODULE:NAME, which is missing")
    if options.suite == measure.UNTIMED and options.rounds:
        raise ValueError(f"--suite {measure.UNTIMED} times only one call: leave out --rounds")


def _new_results(options: argparse.Namespace) -> tuple[Results, Mapping[str, Case], torch.device, Path]:
    device = choose_device(options.device)
    if not options.give_memory_back:
        keep_freed_memory()
    suite = "model" if options.model else options.suite or "ops"
    if options.model:
        model, real = user_model.load(options.model, options.input, options.batch, device)
        chosen = user_model.cases(model, real)
        print(user_model.explain(model, real), end="\n\n", flush=True)
    else:
        chosen = choose_cases(suite, options.case, device, compiled=options.compile)
    path = output_path(options.output, device, suite)
    rounds = options.rounds or ROUNDS[suite]
    names = [case.name for case in chosen]
    results = measure.begin(suite, names, device, rounds, command=_command(options), optional=options.compile)
    results["provenance"]["freed_memory"] = GIVEN_BACK if options.give_memory_back else KEPT
    results["pattern"] = options.case or "*"
    return results, {case.name: case for case in chosen}, device, path


def _resumed(options: argparse.Namespace) -> tuple[Results, Mapping[str, Case], torch.device, Path]:
    path: Path = options.resume
    results = record.load(path)
    if results["suite"] not in SUITES:
        raise ValueError(f"{path} has suite {results['suite']}, which cannot be resumed: measure it again")
    results.setdefault("pattern", "*")  # older files lack it
    about = results["provenance"]
    device = choose_device(about["device_type"] if options.device == "auto" else options.device)
    if about.get("freed_memory", GIVEN_BACK) == KEPT:
        keep_freed_memory()
    if not options.threads:
        torch.set_num_threads(about["threads"])
    record.refuse_other_conditions(results, path, device, ROOT)
    return results, CASES, device, path


def _command(options: argparse.Namespace) -> str:
    """Return the command line that repeats this measurement, without the output path."""
    words = ["fastgan bench"]
    words += [f"--model {options.model}"] if options.model else [f"--suite {options.suite or 'ops'}"]
    words += [f"--device {options.device}"]
    words += [f"--rounds {options.rounds}"] if options.rounds else []
    words += [f"--case '{options.case}'"] if options.case else []
    words += [f"--input {','.join(map(str, options.input))}"] if options.input else []
    words += [f"--batch {options.batch}"] if options.batch else []
    words += [f"--threads {options.threads}"] if options.threads else []
    words += ["--give-memory-back"] if options.give_memory_back else []
    words += ["--compile"] if options.compile else []
    return " ".join(words)


def choose_device(name: str) -> torch.device:
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but PyTorch finds no CUDA device: use auto or cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def choose_cases(suite: str, pattern: str | None, device: torch.device, *, compiled: bool = False) -> list[Case]:
    """Return the cases that match the pattern, by default all. Compiled on a CPU, the default is a few whole steps."""
    if suite not in SUITES:
        raise ValueError(f"suite must be one of {', '.join(SUITES)}, got {suite!r}")
    here = [name for name in SUITES[suite] if device.type in CASES[name].device_types]
    few = compiled and pattern is None and suite == "steps" and device.type == "cpu"
    chosen = [CASES[name] for name in here if (name in COMPILED_ON_A_CPU if few else fnmatch(name, pattern or "*"))]
    if not chosen:
        raise ValueError(f"no {suite} case for {device.type} matches {pattern!r}: choose from {', '.join(here)}")
    return chosen


def output_path(output: Path | None, device: torch.device, suite: str) -> Path:
    if output is not None and output.suffix == ".json":
        return output
    commit = commit_of(ROOT)[0]
    if output is None:
        inside = commit and Path.cwd().is_relative_to(ROOT)
        output = ROOT / "benchmarks" / "results" if inside else Path("fastgan-bench")
    return output / slug(device) / f"{suite}-{commit or 'unknown'}.json"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(f"fastgan bench: {error}")
