"""``fastgan run --compare N``: a script's steps with PyTorch's penalties and with fastgan's.

The script runs in four processes with the same seeds: with PyTorch's penalties, with fastgan's, with PyTorch's and
another number of threads, and alternating between both to time them. Each process stops after the requested steps.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from fastgan.launcher.command import Command
from fastgan.launcher.timing import Way

VARIABLE = "FASTGAN_COMPARISON"
ROLES = {"PyTorch": Way.PYTORCH, "fastgan": Way.FASTGAN, "threads": Way.PYTORCH, "turns": Way.TURNS}


class Recorder:
    """Records the losses, parameters, times and memory of one process."""

    def __init__(self, role: str, steps: int, file: str, threads: int) -> None:
        self.way = ROLES[role]
        self._steps = 2 * steps + 2 if self.way is Way.TURNS else steps
        self._file = file
        self._losses: list[float] = []
        self._optimizers: list[torch.optim.Optimizer] = []
        self._ended = False
        self._patch = self._begin_patch()
        random.seed(0)
        torch.manual_seed(0)
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed(0)
        if role == "threads":
            torch.set_num_threads(threads)

    def _begin_patch(self) -> Any:
        """Replace the operations of StyleGAN's code bases, unless this process runs the script's own.

        With CUDA, the script's own would have to be compiled, so all processes use fastgan's.
        """
        from fastgan.drop_in import patch_torch_utils

        return None if self.way is Way.PYTORCH and not torch.cuda.is_available() else patch_torch_utils()

    def loss(self, tensors: Any) -> None:
        values = [tensors] if isinstance(tensors, Tensor) else tensors
        self._losses += [float(value.detach().sum()) for value in values if isinstance(value, Tensor)]

    def stepped(self, session: Any, optimizer: torch.optim.Optimizer) -> None:
        if not any(optimizer is other for other in self._optimizers):
            self._optimizers.append(optimizer)
        if self._patch is not None and self.way is Way.TURNS and not torch.cuda.is_available():
            self._patch.pause(not any(unit.is_next_fused() for unit in session.units))
        if sum(unit.penalties for unit in session.units) >= self._steps and session.here.step.ended:
            self.end(session)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)

    def end(self, session: Any) -> None:
        if self._ended:
            return
        self._ended = True
        groups = [group for optimizer in self._optimizers for group in optimizer.param_groups]
        unit = max(session.units, key=lambda unit: unit.steps, default=None)
        found = {
            "losses": self._losses,
            "parameters": [parameter.detach().cpu() for group in groups for parameter in group["params"]],
            "steps": sum(unit.penalties for unit in session.units),
            "times": {} if unit is None else {way: unit.time(way) for way in (False, True)},
            "refused": session.refused,
            "memory": _peak_memory(),
        }
        torch.save(found, self._file)


def _peak_memory() -> int:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def recorder_of_this_process() -> Recorder | None:
    """Return the recorder if this process is part of a comparison. Children of the script are not part of it."""
    given = os.environ.pop(VARIABLE, None)
    return Recorder(**json.loads(given)) if given else None


def compare(command: Command) -> int:
    """Run the comparison, print it, and return the exit status."""
    now = torch.get_num_threads()
    other = 2 if now == 1 else max(1, now // 2)
    found: dict[str, Any] = {}
    with TemporaryDirectory() as folder:
        for role in ROLES:
            file = Path(folder) / f"{role}.pt"
            given = {"role": role, "steps": command.settings.compare, "file": str(file), "threads": other}
            start = [*_interpreter(), "-m", "fastgan", "run", *(["-m"] if command.module else [])]
            errors = Path(folder) / "errors"
            status = _run([*start, command.name, *command.arguments], json.dumps(given), errors)
            if status or not file.exists():  # a script that fails writes the file, too
                print(errors.read_text(errors="replace"), end="", file=sys.stderr)
                print(f"fastgan: {command.name} ended with status {status}", file=sys.stderr)
                return status or 1
            found[role] = torch.load(file)
    print("\n".join(report(found, now, other)))
    return 0


def _interpreter() -> list[str]:
    """Return the interpreter and its options, such as -u or -O."""
    return [sys.executable, *subprocess._args_from_interpreter_flags()]  # type: ignore[attr-defined]


def _run(arguments: list[str], given: str, errors: Path) -> int:
    """Run a process of the comparison. Workers that its script leaves behind end with it."""
    with errors.open("wb") as file:
        process = subprocess.Popen(
            arguments,
            env={**os.environ, VARIABLE: given},
            stdout=subprocess.DEVNULL,
            stderr=file,  # not a pipe, which workers would hold open
            start_new_session=True,
        )
        try:
            return process.wait()
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            process.wait()


def report(found: dict[str, Any], now: int, other: int) -> list[str]:
    plain, fused = found["PyTorch"], found["fastgan"]
    if not fused["steps"]:
        reasons = "".join(f"\n  {where}: {reason}" for where, reason in fused["refused"].items())
        return [f"fastgan: nothing to compare, no penalty was rerouted{reasons}"]
    lines = [f"fastgan: {plain['steps']} steps with a penalty, in PyTorch and with fastgan, from the same seeds"]
    before, after = found["turns"]["times"].get(False), found["turns"]["times"].get(True)
    if before and after:
        speed = f"{before / after:.2f} times as fast"
        lines.append(f"  time per step, alternating: PyTorch {_ms(before)}, fastgan {_ms(after)}: {speed}")
    lines.append(f"  peak memory: PyTorch {_mb(plain['memory'])}, fastgan {_mb(fused['memory'])}")
    noise = f"PyTorch with {other} threads instead of {now}"
    for name in ("losses", "parameters"):
        by_fastgan, by_threads = (_difference(plain[name], found[role][name]) for role in ("fastgan", "threads"))
        lines.append(f"  largest difference of {name}: fastgan {by_fastgan:.2g}; {noise} {by_threads:.2g}")
    return lines


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"


def _mb(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"


def _difference(left: Any, right: Any) -> float:
    pairs = ((torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(left, right, strict=False))
    return max((float((a.double() - b.double()).abs().max()) for a, b in pairs if a.numel()), default=0.0)
