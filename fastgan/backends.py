"""What can run here, why the rest cannot, and which implementation of an op a call gets."""

from __future__ import annotations

import importlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from threading import local
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch._C import _len_torch_dispatch_stack, _len_torch_function_stack
from torch._guards import TracingContext
from torch.autograd import forward_ad
from torch.fx._symbolic_trace import is_fx_symbolic_tracing
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from fastgan._version import __version__

# Which implementations a device type tries, the best first. On NVIDIA, Triton leads until a CUDA kernel has been
# measured to beat it (docs/decisions.md); an op whose CUDA kernel wins says so when it registers.
_ORDER = {"cpu": ("cpu", "reference"), "cuda": ("triton", "cuda", "reference")}
_ORDER_ELSEWHERE = ("triton", "reference")
BACKENDS = ("reference", "cpu", "triton", "cuda")

# Triton's interpreter runs kernels on CPU tensors; the variable is Triton's own and is read once.
TRITON_INTERPRETS = os.environ.get("TRITON_INTERPRET", "0") == "1"

_log = logging.getLogger("fastgan")
_forced: ContextVar[str] = ContextVar("fastgan_backend", default="auto")


class BackendUnavailable(RuntimeError):
    """A backend was asked for by name and cannot run this op here; the message says why."""


@dataclass(frozen=True)
class _Op:
    implementations: dict[str, frozenset[torch.dtype]]
    cuda_first: bool


_ops: dict[str, _Op] = {}


def register(op: str, implementations: dict[str, frozenset[torch.dtype]], *, cuda_first: bool = False) -> None:
    """Declare an op, the backends that implement it and the dtypes each takes. Called once, by the op's room."""
    _ops[op] = _Op(implementations, cuda_first)
    _choose.cache_clear()


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force every fastgan op called inside, in this thread, onto one backend; backward follows its forward.

    Args:
        name: ``"auto"``, ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``.

    Raises:
        ValueError: ``name`` is none of these.
        BackendUnavailable: (from the op called) the backend cannot run that op on those tensors here.
    """
    _check_name(name)
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def select(op: str, device: torch.device, dtype: torch.dtype, backend: str | None = None) -> str:
    """Name the backend that runs ``op`` on tensors of this device and dtype.

    ``backend`` overrides ``use_backend``. Raises BackendUnavailable if a named backend cannot run it. Inside a
    transform of torch.func, which sees through PyTorch's own operations alone, it is the reference; where calls are
    recorded it is the reference too, whatever is named, because a record runs elsewhere. So it is in a penalty that
    torch.compile traces: its graph is differentiated twice, and compilers fuse PyTorch's operations.
    """
    if backend is not None:
        _check_name(backend)
    wanted = backend or _forced.get()
    if in_transform():
        if wanted not in ("auto", "reference"):
            raise BackendUnavailable(f"{op}: backend {wanted!r} cannot run inside a transform of torch.func")
        return "reference"
    if is_recorded() or is_lowered():
        return "reference"
    return _choose(op, device.type, dtype, wanted)


def in_transform() -> bool:
    """Whether a transform of torch.func (grad, vmap, jvp, ...) or forward-mode differentiation is under way."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def is_recorded() -> bool:
    """Whether calls are recorded now: by torch.jit.trace, ONNX export, torch.export, make_fx or torch.fx.

    A record must hold PyTorch's own operations alone: it is saved, transformed and run where fastgan is not. Modes that
    only watch (a counter of FLOPs, a profiler, a logger) record nothing. torch.compile doesn't either: what it makes
    runs here, and can call fastgan's operators.
    """
    if is_lowered():
        return False  # a penalty's region, whose record torch.compile runs here
    if torch._C._get_tracing_state() is not None or _is_exporting() or is_fx_symbolic_tracing() or _is_in_penalty():
        return True
    if not (_len_torch_dispatch_stack() or _len_torch_function_stack()):  # as nearly always
        return False
    modes = (*_get_current_dispatch_mode_stack(), *_get_current_function_mode_stack())
    return any(type(mode).__name__ in _RECORDERS for mode in modes)


_RECORDERS = frozenset(
    ("ProxyTorchDispatchMode", "FakeTensorMode", "FunctionalTensorMode", "PreDispatchTorchFunctionMode")
)
_is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)  # torch 2.7


class _Lowered(local):
    depth = 0


_lowered = _Lowered()
_penalties: WeakKeyDictionary[Any, int] = WeakKeyDictionary()  # traces by Dynamo: how many penalties they are inside of


def is_lowered() -> bool:
    """Whether torch.compile turns a penalty's region into operators now (fastgan/ops/gradient_penalty/compiled.py)."""
    return _lowered.depth > 0


def set_lowered(step: int) -> None:
    """Enter (1) or leave (-1) the lowering of a region, in this thread."""
    _lowered.depth += step


def enter_penalty() -> None:
    """Called while Dynamo traces: the discriminator that it traces next will be differentiated twice."""
    context = TracingContext.get()
    _penalties[context] = _penalties.get(context, 0) + 1


def leave_penalty() -> None:
    _penalties[TracingContext.get()] -= 1


def _is_in_penalty() -> bool:
    context = TracingContext.try_get() if _penalties else None
    return context is not None and _penalties.get(context, 0) > 0


def is_plain() -> bool:
    """Whether calls made now are plain eager calls: neither seen through by torch.func nor recorded.

    Where they are not, fastgan's functions and converted models compute in PyTorch's own operations.
    """
    return not (in_transform() or is_recorded())


def forced() -> str:
    """The backend that ``use_backend`` names, or "auto"."""
    return _forced.get()


def is_forced(backend: str | None = None) -> bool:
    """Whether a backend is asked for by name, as an argument or by ``use_backend``."""
    return (backend or _forced.get()) != "auto"


# torch.compile cannot read a ContextVar: what these say while it traces is a constant of its graph. This is all that
# torch.compiler.assume_constant_result does, which imports the compiler.
_answers: tuple[Any, ...] = (select, forced, is_forced, in_transform, is_recorded, is_plain, is_lowered)
_answers += (enter_penalty, leave_penalty)
for _answer in _answers:
    _answer._dynamo_marked_constant = True


def _check_name(name: str) -> None:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"backend must be one of {('auto', *BACKENDS)}, got {name!r}")


@cache
def _choose(op: str, device_type: str, dtype: torch.dtype, wanted: str) -> str:
    if wanted != "auto":
        reason = why_not(op, wanted, device_type, dtype)
        if reason is not None:
            raise BackendUnavailable(f"{op}: backend {wanted!r} cannot run on {device_type} {dtype}: {reason}")
        return wanted
    order = _ORDER.get(device_type, _ORDER_ELSEWHERE)
    if device_type == "cuda" and _ops[op].cuda_first:
        order = ("cuda", "triton", "reference")
    reasons = {name: why_not(op, name, device_type, dtype) for name in order}
    chosen = next(name for name in order if reasons[name] is None)
    if chosen == "reference" and len(_ops[op].implementations) > 1:
        passed_over = "; ".join(f"{name}: {reason}" for name, reason in reasons.items() if reason)
        _log.warning("%s falls back to pure PyTorch on %s %s (%s)", op, device_type, dtype, passed_over)
    return chosen


def why_not(op: str, backend: str, device_type: str, dtype: torch.dtype) -> str | None:
    """The reason why ``backend`` cannot run ``op`` here on such tensors, or None if it can."""
    implementations = _ops[op].implementations
    if backend not in implementations:
        return f"{op} has no {backend} implementation"
    if dtype not in implementations[backend]:
        return f"{dtype} is not supported"
    return _MISSING[backend](device_type)


def _no_reference(device_type: str) -> str | None:
    return None


def _no_cpu(device_type: str) -> str | None:
    if device_type != "cpu":
        return "it runs on CPU tensors"
    return _import("fastgan._native")[1]


def _no_cuda(device_type: str) -> str | None:
    if device_type != "cuda" or torch.version.cuda is None:
        return "it runs on tensors on an NVIDIA GPU"
    return _import("fastgan._native_cuda")[1]


def _no_triton(device_type: str) -> str | None:
    reason = _import("triton")[1]
    if reason is None and device_type == "cpu" and not TRITON_INTERPRETS:
        return "on CPU tensors it needs TRITON_INTERPRET=1, set before the process starts"
    return reason


_MISSING: dict[str, Callable[[str], str | None]] = {
    "reference": _no_reference,
    "cpu": _no_cpu,
    "triton": _no_triton,
    "cuda": _no_cuda,
}


@cache
def _import(name: str) -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module(name), None
    except ImportError as error:
        built = build_info().get({"fastgan._native": "native", "fastgan._native_cuda": "cuda"}.get(name, ""), {})
        return None, f"{name} is not there: {built.get('reason') or error}"


def native() -> Any:
    """The CPU kernels (``fastgan._native``). Call only where ``select`` returned "cpu"."""
    return _import("fastgan._native")[0]


def native_cuda() -> Any:
    """The CUDA kernels (``fastgan._native_cuda``). Call only where ``select`` returned "cuda"."""
    return _import("fastgan._native_cuda")[0]


@cache
def build_info() -> dict[str, Any]:
    """What the build made and what it left out, as written by setup.py; empty when run from a bare source tree."""
    path = Path(__file__).with_name("_build_info.json")
    return dict(json.loads(path.read_text())) if path.exists() else {}


def info() -> str:
    """Devices, versions, build and, for each op and backend, whether it can run here and why not: a table of text."""
    lines = [f"fastgan {__version__}   torch {torch.__version__}   triton {_version('triton')}"]
    lines.append(f"CPU      {torch.get_num_threads()} threads, {_native_summary()}")
    lines.append(f"GPU      {_gpu_summary()}")
    lines += [f"built    {name}: {_built(part)}" for name, part in (("_native", "native"), ("_native_cuda", "cuda"))]
    device_types = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for device_type in device_types:
        lines += ["", f"on {device_type} tensors (float32)"]
        for op in sorted(_ops):
            chosen = _choose(op, device_type, torch.float32, "auto")
            for backend in BACKENDS:
                reason = why_not(op, backend, device_type, torch.float32)
                state = "chosen" if backend == chosen else "can run" if reason is None else f"no: {reason}"
                lines.append(f"  {op:<24} {backend:<10} {state}")
    return "\n".join(lines)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(not installed)"


def _native_summary() -> str:
    module, reason = _import("fastgan._native")
    return f"kernels for {module.isa()}" if module is not None else f"no kernels: {reason}"


def _gpu_summary() -> str:
    if not torch.cuda.is_available():
        return "none that torch can use"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{', '.join(names)} (CUDA {torch.version.cuda})"


def _built(part: str) -> str:
    built = build_info().get(part)
    if built is None:
        return "unknown (no build record)"
    details = {key: value for key, value in built.items() if key not in ("built", "reason") and value}
    return ", ".join(f"{key} {value}" for key, value in details.items()) if built["built"] else f"no: {built['reason']}"
