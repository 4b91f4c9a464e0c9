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
import socket
import stat
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from fastgan.convert.distance import largest_difference
from fastgan.launcher.command import Command
from fastgan.launcher.gradients import parameters_of
from fastgan.launcher.timing import Way
from fastgan.words import number_of

VARIABLE = "FASTGAN_COMPARISON"
ROLES = {"PyTorch": Way.PYTORCH, "fastgan": Way.FASTGAN, "threads": Way.PYTORCH, "turns": Way.TURNS}
LONGEST_WAIT = 2000  # optimizer steps in which to wait for the first penalty
LONGEST_WAIT_AFTER_REFUSAL = 200  # if the penalties that were seen cannot be rerouted


class Recorder:
    """Records the losses, parameters, times and memory of one process."""

    def __init__(self, role: str, steps: int, file: str, threads: int) -> None:
        self.way = ROLES[role]
        self._steps = 2 * steps + 1 if self.way is Way.TURNS else steps
        self._file = file
        self._losses: list[float] = []
        self._optimizers: list[torch.optim.Optimizer] = []
        self._waited = 0  # optimizer steps
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
        self._waited += 1
        is_vain = self._waited >= (LONGEST_WAIT_AFTER_REFUSAL if session.refused else LONGEST_WAIT)
        if (is_vain and not session.units) or (session.here.step is not None and session.here.step.ended):
            self._stop_if_complete(session)

    def begins(self, session: Any) -> None:
        """Called before a penalized call. Without optimizers, a step ends here."""
        if not self._optimizers:
            self._stop_if_complete(session)

    def _stop_if_complete(self, session: Any) -> None:
        if not session.units or _compared(session) >= self._steps:
            self.end(session)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)

    def end(self, session: Any) -> None:
        if self._ended:
            return
        self._ended = True
        found = {
            "losses": self._losses,
            "parameters": [parameter.detach().cpu() for parameter in self._parameters(session)],
            "steps": _compared(session),
            "times": [
                (f"{unit.name} at {unit.place}", unit.time(False), unit.time(True))
                for unit in session.units
                if unit.steps
            ],
            "seen": bool(session.units),
            "waited": self._waited,
            "refused": session.refused,
            "memory": _peak_memory(),
        }
        torch.save(found, self._file)

    def _parameters(self, session: Any) -> list[Tensor]:
        if self._optimizers:
            return [parameter for optimizer in self._optimizers for parameter in parameters_of(optimizer)]
        modules = [unit.module() for unit in session.units]
        return [parameter for module in modules if module is not None for parameter in module.parameters()]


def _compared(session: Any) -> int:
    """Return the number of steps that fastgan may compute. PyTorch computes the first step of each unit."""
    return sum(max(0, unit.penalties - 1) for unit in session.units)


def _peak_memory() -> int:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def recorder_of_this_process() -> Recorder | None:
    """Return the recorder if this process is part of a comparison. Children of the script are not part of it."""
    given = os.environ.pop(VARIABLE, None)
    return Recorder(**json.loads(given)) if given else None


def compare(command: Command) -> int:
    """Run the comparison, print it, and return the exit status. Of several ranks, the first one prints it."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # ends the processes of _run, too
    now = torch.get_num_threads()
    other = 2 if now == 1 else max(1, now // 2)
    found: dict[str, Any] = {}
    start_of_input = _position()
    with TemporaryDirectory() as folder:
        for number, role in enumerate(ROLES):
            if start_of_input is not None:
                os.lseek(0, start_of_input, os.SEEK_SET)
            file = Path(folder) / f"{role}.pt"
            given = {"role": role, "steps": command.settings.compare, "file": str(file), "threads": other}
            start = [*_interpreter(), "-m", "fastgan", "run", *(["-m"] if command.module else [])]
            errors = Path(folder) / "errors"
            variables = {VARIABLE: json.dumps(given), **_rendezvous(number)}
            status = _run([*start, command.name, *command.arguments], variables, errors)
            if status or not file.exists():  # a script that fails writes the file, too
                print(errors.read_text(errors="replace"), end="", file=sys.stderr)
                without = "" if status else " and without exit handlers (os._exit), so its steps were not recorded"
                print(f"fastgan: {command.name} ended with status {status}{without}", file=sys.stderr)
                return status or 1
            found[role] = torch.load(file)
            if not found[role]["steps"]:
                break
    if os.environ.get("RANK", "0") == "0":
        print("\n".join(report(found, command.settings.compare, now, other)))
    return 0


def _position() -> int | None:
    """Return the position in the standard input if it is a file, which each process reads again."""
    with suppress(OSError):
        return os.lseek(0, 0, os.SEEK_CUR) if stat.S_ISREG(os.fstat(0).st_mode) else None
    return None


def _interpreter() -> list[str]:
    """Return the interpreter and its options, such as -u or -O."""
    return [sys.executable, *subprocess._args_from_interpreter_flags()]  # type: ignore[attr-defined]


def _run(arguments: list[str], variables: dict[str, str], errors: Path) -> int:
    """Run a process of the comparison. Workers that its script leaves behind end with it."""
    with errors.open("wb") as file:
        process = subprocess.Popen(
            arguments,
            env={**os.environ, **variables},
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


def _rendezvous(number: int) -> dict[str, str]:
    """Return the variables by which ranks of torchrun find each other.

    Each process of the comparison needs its own store, because torchrun's keeps the addresses of the last one.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # some builds of torch lack it

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store, key = TCPStore(address, port, is_master=False), f"fastgan/{number}"
    if os.environ["RANK"] == "0":
        with socket.socket() as free:
            free.bind(("", 0))
            store.set(key, str(free.getsockname()[1]))
    return {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": store.get(key).decode()}


def report(found: dict[str, Any], wanted: int, now: int, other: int) -> list[str]:
    plain = found["PyTorch"]
    reasons = [f"  not rerouted: {where}: {reason}" for where, reason in plain["refused"].items()]
    if not all(one["steps"] for one in found.values()):
        return [f"fastgan: nothing to compare, {_why_nothing(plain)}", *reasons]
    steps = "1 step" if plain["steps"] == 1 else f"{plain['steps']} steps"
    early = f" (the script ended before {wanted})" if plain["steps"] < wanted else ""
    lines = [f"fastgan: {steps} with a penalty{early}, in PyTorch and with fastgan, from the same seeds"]
    times = [one for one in found["turns"]["times"] if all(one)]
    for name, before, after in times:
        which = f" that begins with {name}" if len(times) > 1 else ""
        speed = f"{before / after:.2f} times as fast"
        lines.append(f"  time per step{which}, alternating: PyTorch {_ms(before)}, fastgan {_ms(after)}: {speed}")
    lines.append(f"  peak memory: PyTorch {_mb(plain['memory'])}, fastgan {_mb(found['fastgan']['memory'])}")
    for name in ("losses", "parameters"):
        lines += _differences(name, plain[name], found["fastgan"][name], found["threads"][name], now, other)
    return lines + reasons


def _why_nothing(plain: dict[str, Any]) -> str:
    if plain["refused"]:
        return "no penalty was rerouted"
    if plain["seen"]:
        return "the script ended too early: PyTorch computes the first two steps with a penalty"
    return f"there was no penalty in {plain['waited']} optimizer steps"


def _differences(name: str, plain: Any, fused: Any, threads: Any, now: int, other: int) -> list[str]:
    if not plain:
        return []
    noise = f"PyTorch with {number_of(other, 'thread')} instead of {now}"
    fastgans, noises = _difference(plain, fused), _difference(plain, threads)
    lines = [f"  largest difference of {name}: fastgan {fastgans:.2g}; {noise} {noises:.2g}"]
    if len(plain) != len(fused):
        lines.append(f"  number of {name}: PyTorch {len(plain)}, fastgan {len(fused)}")
    if not all(torch.as_tensor(value).isfinite().all() for value in plain):
        lines.append(f"  PyTorch's {name} have infinite values or NaN, of which only the places are compared")
    return lines


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"


def _mb(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"


def _difference(left: Any, right: Any) -> float:
    pairs = ((torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(left, right, strict=False))
    return max((largest_difference(b, a) for a, b in pairs), default=0.0)
