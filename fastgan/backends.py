"""Backends: which can run on this machine, why others cannot, and which one an op uses."""

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

from fastgan import torch_private
from fastgan._version import __version__
from fastgan.words import number_of

# The backends of each device type, best first. On NVIDIA GPUs, Triton comes first until a CUDA kernel is measured to be
# faster (docs/decisions.md). An op whose CUDA kernel is faster registers with cuda_first.
_ORDER = {"cpu": ("cpu", "reference"), "cuda": ("triton", "cuda", "reference"), "meta": ("reference",)}
_ORDER_ELSEWHERE = ("triton", "reference")
_KNOWN = frozenset(("cpu", "cuda", "xpu", "meta"))
BACKENDS = ("reference", "cpu", "triton", "cuda")

# Triton's interpreter runs kernels on CPU tensors. Triton defines this variable and reads it once.
TRITON_INTERPRETS = os.environ.get("TRITON_INTERPRET", "0") == "1"

_log = logging.getLogger("fastgan")
_forced: ContextVar[str] = ContextVar("fastgan_backend", default="auto")


class BackendUnavailable(RuntimeError):
    """A backend was requested by name and cannot run this op here. The message states the reason.

    ```python
    import torch
    import fastgan

    try:
        fastgan.ops.layer_norm(torch.randn(2, 64), 64, backend="cuda")
    except fastgan.BackendUnavailable as error:
        print(error)  # layer_norm has no cuda implementation
    ```
    """


@dataclass(frozen=True)
class _Op:
    implementations: dict[str, frozenset[torch.dtype]]
    cuda_first: bool


_ops: dict[str, _Op] = {}


def register(op: str, implementations: dict[str, frozenset[torch.dtype]], *, cuda_first: bool = False) -> None:
    """Declare an op, the backends that implement it and the dtypes that each supports. Each op calls this once."""
    _ops[op] = _Op(implementations, cuda_first)
    _choose.cache_clear()
    _has_kernel.cache_clear()


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Context manager: run every fastgan op inside, in this thread, on one backend. A backward uses its forward's.

    ```python
    import torch
    import fastgan

    with fastgan.use_backend("reference"):  # pure PyTorch
        y = fastgan.ops.layer_norm(torch.randn(8, 64), 64)
    ```

    Args:
        name: ``"auto"``, ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``.

    Raises:
        ValueError: ``name`` is not a backend.
        BackendUnavailable: (raised by the op) the backend cannot run the op on these tensors on this machine.
    """
    _check_name(name)
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def select(op: str, device: torch.device, dtype: torch.dtype, backend: str | None = None) -> str:
    """Return the name of the backend that runs ``op`` on tensors of this device and dtype.

    ``backend`` overrides ``use_backend``. Inside a torch.func transform, which can only differentiate PyTorch's own
    operations, it is the reference. If calls are being recorded it is also the reference, even if another backend is
    named, because the recorded graph may run without fastgan. It is the reference in a penalty that torch.compile
    traces, too: that graph is differentiated twice, and compilers fuse PyTorch's operations.

    Raises:
        BackendUnavailable: a named backend cannot run the op.
    """
    if backend is not None:
        _check_name(backend)
    wanted = backend or _forced.get()
    if in_transform():
        if wanted not in ("auto", "reference"):
            raise BackendUnavailable(f"{op}: backend {wanted!r} cannot run inside a torch.func transform")
        return "reference"
    if is_recorded() or is_lowered():
        return "reference"
    return _choose(op, device.type, dtype, wanted)


def is_known(device: torch.device) -> bool:
    """Whether fastgan's formulas run on tensors of this device. Other devices use only PyTorch's operations."""
    return device.type in _KNOWN


def in_transform() -> bool:
    """Whether a torch.func transform (grad, vmap, jvp, ...) or forward-mode differentiation is active."""
    return torch_private.in_transform()


def is_recorded() -> bool:
    """Whether calls are being recorded by torch.jit.trace, ONNX export, torch.export, make_fx or torch.fx.

    A recorded graph may only contain PyTorch's own operations, because it can be saved, transformed and run without
    fastgan. Modes that only observe (a FLOP counter, a profiler, a logger) do not record. Neither does torch.compile:
    its graphs run in this process and can call fastgan's operators.
    """
    if _lowered.depth:
        return False  # a region of a penalty, whose record torch.compile runs in this process
    if _penalty_was_traced and _is_in_penalty():
        return True
    if torch_private.jit_trace() is not None or torch_private.is_exported_or_symbolic():
        return True
    if not (torch_private.count_dispatch_modes() or torch_private.count_function_modes()):  # the usual case
        return False
    modes = (*torch_private.dispatch_modes(), *torch_private.function_modes())
    return any(type(mode).__name__ in _RECORDERS for mode in modes)


_RECORDERS = frozenset(
    ("ProxyTorchDispatchMode", "FakeTensorMode", "FunctionalTensorMode", "PreDispatchTorchFunctionMode")
)


class _Lowered(local):
    depth = 0


_lowered = _Lowered()
_penalty_was_traced = False  # by Dynamo in this process; spares eager calls the next look-up
_penalties: WeakKeyDictionary[Any, int] = WeakKeyDictionary()  # traces by Dynamo: how many penalties they are inside of


def is_lowered() -> bool:
    """Whether torch.compile turns a penalty's region into operators now (fastgan/ops/gradient_penalty/compiled.py)."""
    return _lowered.depth > 0


def set_lowered(step: int) -> None:
    """Enter (1) or leave (-1) the lowering of a region, in this thread."""
    _lowered.depth += step


def enter_penalty() -> None:
    """Called while Dynamo traces: the discriminator that it traces next will be differentiated twice."""
    global _penalty_was_traced
    _penalty_was_traced = True
    context = torch_private.TracingContext.get()
    _penalties[context] = _penalties.get(context, 0) + 1


def leave_penalty() -> None:
    _penalties[torch_private.TracingContext.get()] -= 1


def _is_in_penalty() -> bool:
    context = torch_private.TracingContext.try_get() if _penalties else None
    return context is not None and _penalties.get(context, 0) > 0


def is_plain() -> bool:
    """Whether calls are plain eager calls, neither transformed by torch.func nor recorded.

    Otherwise fastgan's functions and converted models use PyTorch's own operations.
    """
    return not (in_transform() or is_recorded())


def forced() -> str:
    """Return the backend that ``use_backend`` set, or "auto"."""
    return _forced.get()


def is_forced(backend: str | None = None) -> bool:
    """Whether a backend is requested by name, as an argument or with ``use_backend``."""
    return (backend or _forced.get()) != "auto"


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
    chosen, reasons = _best(op, device_type, dtype)
    if chosen == "reference" and len(reasons) > 1 and len(_ops[op].implementations) > 1:
        passed_over = "; ".join(f"{name}: {reason}" for name, reason in reasons.items() if reason)
        _log.warning("%s falls back to pure PyTorch on %s %s (%s)", op, device_type, dtype, passed_over)
    return chosen


def _best(op: str, device_type: str, dtype: torch.dtype) -> tuple[str, dict[str, str | None]]:
    """Return the fastest backend that can run ``op`` here, and for each candidate the reason why it cannot."""
    order = _ORDER.get(device_type, _ORDER_ELSEWHERE)
    if device_type == "cuda" and _ops[op].cuda_first:
        order = ("cuda", "triton", "reference")
    reasons = {name: why_not(op, name, device_type, dtype) for name in order}
    return next(name for name in order if reasons[name] is None), reasons


def has_kernel(op: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a backend other than the reference can run ``op`` on such tensors here."""
    return _has_kernel(op, device.type, dtype)


@cache
def _has_kernel(op: str, device_type: str, dtype: torch.dtype) -> bool:
    return _best(op, device_type, dtype)[0] != "reference"


# torch.compile cannot read a ContextVar, so these functions' results while tracing are constants of its graph. This is
# what torch.compiler.assume_constant_result does, but that would import the compiler.
_answers: tuple[Any, ...] = (select, forced, is_forced, in_transform, is_recorded, is_plain, is_lowered)
_answers += (has_kernel, enter_penalty, leave_penalty)
for _answer in _answers:
    _answer._dynamo_marked_constant = True


def why_not(op: str, backend: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Return the reason why ``backend`` cannot run ``op`` on such tensors here, or None if it can."""
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
        return "it needs CPU tensors"
    return _import("fastgan._native")[1]


def _no_cuda(device_type: str) -> str | None:
    if device_type != "cuda" or torch.version.cuda is None:
        return "it needs tensors on an NVIDIA GPU"
    return _import("fastgan._native_cuda")[1]


def _no_triton(device_type: str) -> str | None:
    if device_type not in ("cpu", "cuda", "xpu"):
        return "it needs tensors on an NVIDIA, AMD or Intel GPU"
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
        return None, f"{name} is not available: {built.get('reason') or error}"


def is_off() -> bool:
    """Return whether the environment variable FASTGAN turns off what changes the code of others."""
    return os.environ.get("FASTGAN", "").lower() == "off"


def native() -> Any:
    """Return the CPU kernels (``fastgan._native``). Call this only if ``select`` returned "cpu"."""
    return _import("fastgan._native")[0]


def native_cuda() -> Any:
    """Return the CUDA kernels (``fastgan._native_cuda``). Call this only if ``select`` returned "cuda"."""
    return _import("fastgan._native_cuda")[0]


@cache
def build_info() -> dict[str, Any]:
    """Return setup.py's record of which modules were built. It is empty in a source tree that was never built."""
    path = Path(__file__).with_name("_build_info.json")
    return dict(json.loads(path.read_text())) if path.exists() else {}


def info() -> str:
    """Return a table as text: versions, devices, the build, and the backends of each op or why they cannot run here.

    ```python
    import fastgan

    print(fastgan.info())  # the output of the command `fastgan info`
    ```
    """
    lines = [f"fastgan {__version__}   torch {torch.__version__}   triton {_version('triton')}"]
    lines.append(f"CPU      {number_of(torch.get_num_threads(), 'thread')}, {_native_summary()}")
    lines.append(f"GPU      {_gpu_summary()}")
    lines += [f"built    {name}: {_built(part)}" for name, part in (("_native", "native"), ("_native_cuda", "cuda"))]
    ops = sorted(op for op, declared in _ops.items() if len(declared.implementations) > 1)
    width = max(map(len, ops))
    device_types = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for device_type in device_types:
        lines += ["", f"on {device_type} tensors (float32)"]
        for op in ops:
            chosen, _ = _best(op, device_type, torch.float32)
            for backend in BACKENDS:
                reason = why_not(op, backend, device_type, torch.float32)
                state = "chosen" if backend == chosen else "can run" if reason is None else f"no: {reason}"
                lines.append(f"  {op:<{width}} {backend:<10} {state}")
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
