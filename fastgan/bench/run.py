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
from fastgan.bench.cases import CASES, SUITES
from fastgan.bench.heap import GIVEN_BACK, KEPT, keep_freed_memory
from fastgan.bench.provenance import ROOT, commit_of, slug
from fastgan.bench.record import Results

ROUNDS = {"ops": 20, "steps": 7, "memory": 1, "growth": 3, "model": 7}
INTERRUPTED = 130

EPILOG = """\
suites:
  ops      each operation alone, up to the derivative that training needs
  steps    whole discriminator and generator steps, and their penalties, by resolution and batch size
  memory   peak and saved bytes of those steps and of minibatch discrimination; times one call of each
  growth   time and memory as one size doubles, with fitted and theoretical exponents

examples:
  fastgan bench --case 'spectral_norm/small/*' --device cpu
  fastgan bench --suite steps --report                    # also writes CSV, Markdown, pictures and one HTML page
  fastgan bench --suite ops --compare old.json            # exit status 1 if something became slower beyond noise
  fastgan bench --resume benchmarks/results/DEVICE/ops-COMMIT.json
  fastgan bench --model my_module:build --input 3,64,64 --batch 16
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status, which is 1 if ``--compare`` finds a regression or a case failed.

    Raises:
        ValueError: an unknown suite, case or device; a file that does not match; a model that cannot be benchmarked.
        ArithmeticError: a variant's result differs from its baseline's.
    """
    options = _parser().parse_args(arguments)
    _refuse_contradictions(options)
    if options.report is not None:
        import_module("matplotlib")  # if it is missing, fail now and not after the measurements
    if options.threads:
        torch.set_num_threads(options.threads)
    results, cases, device, path = (_resumed if options.resume else _begun)(options)
    old = None
    if options.compare:
        old = record.load(options.compare)
        only = [name for name in record.names(old) if fnmatch(name, results["pattern"])]
        comparison.refuse_others(old, options.compare, results, only)
    try:
        measure.go_on(results, cases, device, path, minutes=options.minutes, keep_going=options.keep_going)
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
        folder = path.parent if options.report is _BESIDE else options.report
        print("\n".join(map(str, report.write(results, folder, path.stem))))
    failed = bool(results.get("failed")) or any(case.get("failed") for case in results["cases"])
    if old is None:
        return int(failed)
    found = comparison.changes(old, results)
    print(f"\nAgainst {options.compare}:\n\n{comparison.table(found)}")
    return int(failed or comparison.regressed(found))


_BESIDE = Path()  # --report without a folder writes next to the JSON


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastgan bench",
        description="Time fastgan's operations and whole training steps against PyTorch's, in turns in one process.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    rounds = ", ".join(f"{count} for {suite}" for suite, count in ROUNDS.items())
    add = parser.add_argument
    add("--suite", help=f"group of cases: {', '.join(SUITES)} (default: ops)")
    add("--case", metavar="PATTERN", help="cases whose names match a shell pattern (default: all)")
    add("--device", default="auto", help="cpu, cuda, or auto: cuda if available (default: %(default)s)")
    add(
        "--output",
        type=Path,
        metavar="DIR|FILE.json",
        help="where to write the measurements (default: benchmarks/results in a checkout, otherwise ./fastgan-bench)",
    )
    add("--rounds", type=_positive, help=f"samples per variant (default: {rounds})")
    add("--threads", type=_positive, help="CPU threads (default: PyTorch's choice)")
    add(
        "--give-memory-back",
        action="store_true",
        help="let glibc return freed memory to the system; timings then depend on earlier work (default: keep it)",
    )
    add("--compile", action="store_true", help="also time torch.compile of the baseline; it takes minutes")
    add("--minutes", type=_minutes, metavar="M", help="start no case after this time; --resume runs the others")
    add("--keep-going", action="store_true", help="skip failures; the exit status is then 1, or 75 to resume")
    add(
        "--report",
        type=Path,
        nargs="?",
        const=_BESIDE,
        metavar="DIR",
        help="also write CSV, Markdown, pictures and an HTML page, to DIR or next to the JSON (needs matplotlib)",
    )
    add("--compare", type=Path, metavar="OLD.json", help="report changes since OLD; exit with 1 on a regression")
    add("--resume", type=Path, metavar="FILE.json", help="continue an interrupted run, on the same commit and machine")
    add("--model", metavar="MODULE:FUNCTION", help="benchmark the discriminator that the function returns")
    add("--input", type=_shape, metavar="SIZES", help="shape of one sample for --model, such as 3,64,64")
    add("--batch", type=_positive, help=f"batch size for --model (default: {user_model.BATCH})")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _minutes(text: str) -> float:
    value = float(text)
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"must not be negative, got {text}")
    return value


def _shape(text: str) -> tuple[int, ...]:
    sizes = text.split(",")
    if not all(size.strip().isdecimal() and int(size) > 0 for size in sizes):
        raise argparse.ArgumentTypeError(f"must be positive sizes, such as 3,64,64, got {text!r}")
    return tuple(map(int, sizes))


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
        raise ValueError("--input and --batch describe the model of --model MODULE:FUNCTION, which is missing")
    if options.suite == measure.UNTIMED and options.rounds:
        raise ValueError(f"--suite {measure.UNTIMED} times only one call: leave out --rounds")


def _begun(options: argparse.Namespace) -> tuple[Results, Mapping[str, Case], torch.device, Path]:
    device = choose_device(options.device)
    if not options.give_memory_back:
        keep_freed_memory()
    suite = "model" if options.model else options.suite or "ops"
    if options.model:
        model, real = user_model.load(options.model, options.input, options.batch, device)
        chosen = user_model.cases(model, real)
        print(user_model.explain(model, real), end="\n\n", flush=True)
    else:
        chosen = choose_cases(suite, options.case or "*", device)
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


def choose_cases(suite: str, pattern: str, device: torch.device) -> list[Case]:
    if suite not in SUITES:
        raise ValueError(f"suite must be one of {', '.join(SUITES)}, got {suite!r}")
    here = [name for name in SUITES[suite] if device.type in CASES[name].device_types]
    chosen = [CASES[name] for name in here if fnmatch(name, pattern)]
    if not chosen:
        raise ValueError(f"no {suite} case for {device.type} matches {pattern!r}: choose from {', '.join(here)}")
    return chosen


def output_path(output: Path | None, device: torch.device, suite: str) -> Path:
    if output is not None and output.suffix == ".json":
        return output
    commit = commit_of(ROOT)[0]
    if output is None:
        output = ROOT / "benchmarks" / "results" if commit else Path("fastgan-bench")
    return output / slug(device) / f"{suite}-{commit or 'unknown'}.json"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(f"fastgan bench: {error}")
