"""The flags of `fastgan bench`. This module does not import PyTorch, so that `--help` is fast."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

BATCH = 16  # of --model
ROUNDS = {"ops": 20, "steps": 7, "memory": 1, "growth": 3, "forms": 7, "sizes": 6, "host": 30, "model": 7}
SUITES = tuple(suite for suite in ROUNDS if suite != "model")
BESIDE = Path()  # --report without a folder writes next to the JSON

EPILOG = """\
suites:
  ops      each operation alone, up to the derivative that training needs
  steps    whole discriminator and generator steps, and their penalties, by resolution and batch size
  memory   peak and saved bytes of those steps and of minibatch discrimination; times one call of each
  growth   time and memory as one size doubles, with fitted and theoretical exponents
  forms    loss + R1 of discriminators in the forms of well-known families: work in forwards, path, speed-up
  sizes    penalties and whole steps from tiny to large discriminators; fastgan should not be slower at any size
  host     penalties and whole steps of small layers: host time, in microseconds per layer and part

examples:
  fastgan bench --case 'spectral_norm/small/*' --device cpu
  fastgan bench --suite steps --report                    # also writes CSV, Markdown, pictures and one HTML page
  fastgan bench --suite ops --compare old.json            # exit status 1 if something became slower beyond noise
  fastgan bench --resume benchmarks/results/DEVICE/ops-COMMIT.json
  fastgan bench --model my_module:build --input 3,64,64 --batch 16
"""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog.partition(' ')[0]}: {message}; {self.prog} --help lists the flags\n")


def parser() -> argparse.ArgumentParser:
    made = Parser(
        prog="fastgan bench",
        description="Time fastgan's operations and whole training steps against PyTorch's, alternately in one process.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    rounds = ", ".join(f"{count} for {suite}" for suite, count in ROUNDS.items())
    add = made.add_argument
    add("--suite", help=f"group of cases: {', '.join(SUITES)} (default: ops)")
    add("--case", metavar="PATTERN", help="cases whose names match a shell pattern (default: all)")
    add("--device", default="auto", help="cpu, cuda, or auto: cuda if available (default: %(default)s)")
    add(
        "--output",
        type=Path,
        metavar="DIR|FILE.json",
        help="where to write the measurements (default: benchmarks/results in a checkout, elsewhere ./fastgan-bench)",
    )
    add(
        "--rounds",
        type=_positive,
        help=f"samples per variant; for sizes and forms, samples of each of 4 to 16 builds (default: {rounds})",
    )
    add("--threads", type=_positive, help="CPU threads (default: PyTorch's choice)")
    add(
        "--give-memory-back",
        action="store_true",
        help="let glibc return freed memory to the system; timings then depend on earlier work (default: keep it)",
    )
    add(
        "--compile",
        action="store_true",
        help="also time compiled forms of PyTorch and of fastgan. Compiling takes long on a CPU, so "
        "there --suite steps is a few whole steps, unless --case selects others",
    )
    add("--minutes", type=_minutes, metavar="M", help="start no case after this time; --resume runs the others")
    add("--keep-going", action="store_true", help="skip failures; the exit status is then 1, or 75 to resume")
    add(
        "--report",
        type=Path,
        nargs="?",
        const=BESIDE,
        metavar="DIR",
        help="also write CSV, Markdown, pictures and an HTML page, to DIR or next to the JSON (needs matplotlib)",
    )
    add("--compare", type=Path, metavar="OLD.json", help="report changes since OLD; exit with 1 on a regression")
    add("--resume", type=Path, metavar="FILE.json", help="continue an interrupted run, on the same commit and machine")
    add(
        "--model",
        metavar="MODULE:NAME",
        help="benchmark a discriminator: a module, a class, or a function that returns one",
    )
    add("--input", type=_shape, metavar="SIZES", help="shape of one sample for --model, such as 3,64,64")
    add("--batch", type=_positive, help=f"batch size for --model (default: {BATCH})")
    return made


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
