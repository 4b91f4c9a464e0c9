"""Builds the simulated device and runs tests on it: ``python tests/simulated_gpu/run.py [short|all|PART...]``."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(HERE / "python")]

from plan import ABOUT_THE_CPU, LONG, SHORT, Part  # noqa: E402
from simulated_gpu.build import CannotSimulate, library  # noqa: E402


@dataclass(frozen=True)
class Outcome:
    """The result of a part."""

    part: Part
    status: int
    seconds: float
    output: str

    @property
    def line(self) -> str:
        said = self.output.strip().splitlines()[-1:] or ["it said nothing"]
        return f"{'ok' if not self.status else 'FAILED':<7} {self.part.name:<24} {self.seconds:5.0f} s  {said[0]}"


def environment(part: Part) -> dict[str, str]:
    """Of a process that has the device; the project's modules come from this tree."""
    paths = [str(HERE / "python"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "SIMULATED_GPU": "1",
        "SIMULATED_GPU_REFUSES": "fastgan._native_cuda",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        **part.environment,
    }


def run(part: Part) -> Outcome:
    """One part, in a process of its own."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "simulated_gpu.pytest_plugin", *part.options, *part.tests]
    started = time.monotonic()
    with subprocess.Popen(
        command, cwd=ROOT, env=environment(part), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        try:
            output, _ = process.communicate(timeout=part.seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            output += f"\nstopped after {part.seconds} s"
    return Outcome(part, process.returncode, time.monotonic() - started, output)


def check_names() -> None:
    """Check the names of the deselected tests: pytest ignores a name that does not exist."""
    for name in ABOUT_THE_CPU:
        file, _, test = name.partition("::")
        if f"def {test.partition('[')[0]}" not in (ROOT / file).read_text():
            sys.exit(f"plan.py leaves out {name}, which does not exist")


def chosen(names: list[str]) -> tuple[Part, ...]:
    if names in ([], ["short"]):
        return SHORT
    if names == ["all"]:
        return (*SHORT, *LONG)
    known = {part.name: part for part in (*SHORT, *LONG)}
    unknown = [name for name in names if name not in known]
    if unknown:
        sys.exit(f"no part {', '.join(unknown)}; there are: short, all, {', '.join(known)}")
    return tuple(known[name] for name in names)


def main(names: list[str]) -> int:
    parts = chosen(names)
    check_names()
    try:
        library()
    except CannotSimulate as error:
        print(f"skipped: no simulated GPU here: {error}")
        return 0
    failed = 0
    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        for future in as_completed([pool.submit(run, part) for part in parts]):
            outcome = future.result()
            if outcome.status:
                failed += 1
                print(outcome.output)
            print(outcome.line, flush=True)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
