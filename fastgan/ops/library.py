"""Shared infrastructure of the ops: operator registration, checks for the eager shortcut, the end of derivatives."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial, wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from fastgan import backends, torch_private
from fastgan.torch_private import is_batched as is_batched

P = ParamSpec("P")
R = TypeVar("R")

LIBRARY = torch.library.Library("fastgan", "FRAGMENT")
# The function of each operator. They are stored in torch.ops.fastgan, because the operators survive a failed import.
_implementations: dict[str, Callable[..., None]] = vars(torch.ops.fastgan).setdefault("_implementations", {})
_written: dict[str, tuple[int, ...]] = {}  # the arguments that each of them writes


def is_traced() -> bool:
    """Return whether calls are being compiled by torch.compile or recorded by a tracer (see `backends.is_recorded`).

    A traced model must consist of PyTorch's own operations, so fastgan's rerouting, fused weights and raw kernels are
    off. A mode that only observes (a FLOP counter, a profiler) does not count as a tracer.
    """
    return not backends.is_lowered() and (torch.compiler.is_compiling() or backends.is_recorded())


def symbolic(function: Callable[P, R]) -> Callable[P, R]:
    """Wrap a function so that a first argument which stands in for a tensor (torch.fx's Proxy) can intercept it."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0] if args else None
        if isinstance(first, Tensor) or not hasattr(type(first), "__torch_function__"):
            return function(*args, **kwargs)
        return handle_torch_function(call, (first,), *args, **kwargs)

    return call


def visible(function: Callable[P, R]) -> Callable[P, R]:
    """Wrap a function so that modes and tensor subclasses see its calls, as they see those of PyTorch's functions.

    The one pass of a penalty then has a rule for the function (gradient_penalty/rules.py) and does not look inside.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling() and not backends.is_lowered():
            return function(*args, **kwargs)
        first = args[0] if args else kwargs.get("input")
        if not has_torch_function((first,)):
            return function(*args, **kwargs)
        return handle_torch_function(call, (first,), *args, **kwargs)

    return call


_PLAIN = (Tensor, torch.nn.Parameter)


def is_eager(*tensors: Tensor) -> bool:
    """Return whether these are plain tensors and no tracer or mode intercepts calls, not even one that only observes.

    If so, an implementation may be called directly. On a small model, dispatching a call with lists of tensors costs
    more than the kernel itself (docs/decisions.md).
    """
    for tensor in tensors:
        if type(tensor) not in _PLAIN:
            return False
    if torch.compiler.is_dynamo_compiling():
        return False
    return torch_private.jit_trace() is None and torch_private.count_dispatch_modes() == 0


@cache
def is_plain_class(cls: type) -> bool:
    """Return whether PyTorch's functions treat tensors of this class like plain tensors.

    A class with its own ``__torch_function__`` or ``__torch_dispatch__`` can intercept every call.
    """
    own: Any = cls
    functions = (Tensor.__torch_function__, torch.nn.Parameter.__torch_function__)
    defaults = {getattr(function, "__func__", function) for function in functions}
    has_default_function = getattr(own.__torch_function__, "__func__", own.__torch_function__) in defaults
    return has_default_function and own.__torch_dispatch__ is Tensor.__torch_dispatch__


def is_autocast(device_type: str) -> bool:
    """Return whether autocast is on for this device type.

    PyTorch raises for a device type without autocast, such as meta. This function returns False for it.
    """
    available = (
        device_type in ("cpu", "cuda")
        or torch.compiler.is_dynamo_compiling()  # the next function cannot be traced in torch 2.11
        or torch.amp.is_autocast_available(device_type)
    )
    return available and torch.is_autocast_enabled(device_type)


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    return torch.autocast(device_type, enabled=False) if is_autocast(device_type) else nullcontext()


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which sums over elements of ``dtype`` are accumulated."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def dtype_name(tensor: Tensor) -> str:
    """Return the name that the native modules use for a tensor's dtype."""
    return str(tensor.dtype).removeprefix("torch.")


def data_pointers(*tensors: Tensor | None) -> list[int]:
    """Return the addresses of tensors for the native modules; 0 stands for None."""
    return [0 if t is None else t.data_ptr() for t in tensors]


def stored(tensor: Tensor) -> Tensor:
    """Return the tensor with its values in memory, where kernels can read them.

    Autograd has zero tensors without storage (the double backward of ``abs`` creates some), and PyTorch has views whose
    values are negated on each read.
    """
    if torch.compiler.is_dynamo_compiling():
        return tensor  # the code that runs the compiled graph stores the values
    if is_batched(tensor):
        raise RuntimeError(
            "kernels take no batched gradients (is_grads_batched=True, vectorize=True): "
            "run the forward inside fastgan.use_backend('reference')"
        )
    return tensor.clone() if tensor._is_zerotensor() else tensor.resolve_neg()


def operator(schema: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function that writes into the arguments which the schema marks, such as ``Tensor(a!) y``.

    There are two operators: one that writes, for modes that observe, and one for graphs, whose name ends in ``_new``.
    The second writes into nothing, because Inductor may read a tensor before an operator writes into it
    (docs/decisions.md). It gets the marked arguments for their sizes, and returns new tensors in their order. It also
    reads those marked with ``!rw``. ``traced`` chooses one of the two. If an import failed halfway and is repeated, the
    operators stay registered and run the newest function.
    """
    name, _, arguments = schema.partition("(")
    marks = [re.search(r"\((\w!\w*)\)", argument) for argument in arguments.split(", ")]
    written = {i: mark[1].endswith("rw") for i, mark in enumerate(marks) if mark}

    def with_results(*arguments: Any) -> list[Any]:
        """Return the arguments, with new tensors in place of those that are written."""
        made = list(arguments)
        for i, is_read in written.items():
            made[i] = _map(torch.clone if is_read else torch.empty_like, arguments[i])
        return made

    def write(*arguments: Any) -> None:
        _implementations[name](*arguments)

    def make(*arguments: Any) -> list[Tensor]:
        made = with_results(*arguments)
        write(*made)
        return _tensors(made[i] for i in written)

    def fake(*arguments: Any) -> list[Tensor]:
        made = with_results(*arguments)
        return _tensors(made[i] for i in written)

    def define(function: Callable[..., None]) -> Callable[..., None]:
        _implementations[name], _written[name] = function, tuple(written)
        if not hasattr(torch.ops.fastgan, name):
            LIBRARY.define(schema.replace("!rw)", "!)") + " -> ()")
            LIBRARY.define(re.sub(r"\(\w!\w*\)", "", schema.replace(name, name + "_new", 1)) + " -> Tensor[]")
            for called, run, run_fake in ((name, write, _nothing), (name + "_new", make, fake)):
                LIBRARY.impl(called, run, "CompositeExplicitAutograd")
                torch.library.register_fake(f"fastgan::{called}", run_fake, lib=LIBRARY)
        return function

    return define


def _nothing(*arguments: Any) -> None:
    return None


def traced(name: str) -> Callable[..., None]:
    """Return a function that runs an operator and writes into its arguments.

    In a graph, it copies the results of ``_new`` into them. PyTorch leaves out these copies where it compiles.
    """
    return partial(_run_operator, name)


def _run_operator(name: str, *arguments: Any) -> None:
    in_graph = torch.compiler.is_compiling() or any(
        isinstance(tensor, torch_private.FunctionalTensor) for tensor in _tensors(arguments)
    )
    if not in_graph:
        getattr(torch.ops.fastgan, name)(*arguments)
        return
    results = getattr(torch.ops.fastgan, name + "_new")(*arguments)
    targets = _tensors([arguments[i] for i in _written[name]])
    for target, result in zip(targets, results, strict=True):
        # copy_ returns the target, which torch 2.11 makes a second output of a Function, so that its gradient is lost.
        target[...] = result


def _map(function: Callable[[Tensor], Tensor], argument: Any) -> Any:
    """Apply a function to a tensor, a list of tensors, or None."""
    if isinstance(argument, (list, tuple)):
        return list(map(function, argument))
    return None if argument is None else function(argument)


def _tensors(arguments: Iterable[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for argument in arguments:
        if isinstance(argument, (list, tuple)):
            found += argument
        elif argument is not None:
            found.append(argument)
    return found


def copy_back(target: Tensor | None, output: Tensor | None) -> None:
    """Copy ``target`` into ``output``, unless they are the same tensor or one of them is None."""
    if target is not None and output is not None and target is not output:
        output.copy_(target)


def checkpointed_region() -> object | None:
    """Return an object that identifies the enclosing call of torch.utils.checkpoint, or None outside of one.

    The checkpoint reruns its function outside of any mode, and the rerun must save the same tensors as the first run.
    """
    if torch.compiler.is_dynamo_compiling():
        return None
    return torch_private.checkpoint_hook()


def untraced(function: Callable[P, R]) -> Callable[P, R]:
    """Wrap a function that cannot be traced: torch.compile breaks its graph around the call."""
    apart: Callable[P, R] = torch_private.apart_from_dynamo(function)  # imports the compiler when called

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return (apart if torch.compiler.is_compiling() else function)(*args, **kwargs)

    return call


def last_order(message: str, outputs: Sequence[Tensor | None], inputs: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return the outputs with a graph whose backward raises ``message``.

    ``once_differentiable`` is not enough. It raises in separate nodes, and ``torch.autograd.grad(y, x)`` never visits
    them if another path leads to x. A part of the gradient would then be lost without an error.
    """
    made = [t for t in outputs if t is not None]
    ends = iter(_Refuse.apply(message, len(made), *made, *inputs))  # type: ignore[no-untyped-call]
    return [None if t is None else next(ends) for t in outputs]


class _Refuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, message: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.message = message
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(ctx.message)
