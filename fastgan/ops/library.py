"""What every op is defined with: the operator library, when its dispatcher may be passed by, where derivatives end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.overrides import handle_torch_function

from fastgan import backends, torch_private
from fastgan.torch_private import is_batched as is_batched

P = ParamSpec("P")
R = TypeVar("R")

LIBRARY = torch.library.Library("fastgan", "FRAGMENT")
# The function of each operator, kept where the operators are: these outlive a module whose import failed.
_implementations: dict[str, Callable[..., None]] = vars(torch.ops.fastgan).setdefault("_implementations", {})


def is_traced() -> bool:
    """Whether calls are recorded or compiled now: by torch.compile, or by what `backends.is_recorded` knows.

    There a model must be in PyTorch's own form: fastgan's reroutes, fused weights and raw kernels stand back.
    A mode that only watches (a counter of FLOPs, a profiler) is no recorder.
    """
    return torch.compiler.is_compiling() or backends.is_recorded()


def symbolic(function: Callable[P, R]) -> Callable[P, R]:
    """The function, which a stand-in for a tensor (torch.fx's Proxy) takes over when it is the first argument."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0] if args else None
        if isinstance(first, Tensor) or not hasattr(type(first), "__torch_function__"):
            return function(*args, **kwargs)
        return handle_torch_function(call, (first,), *args, **kwargs)

    return call


def is_eager(tensor: Tensor) -> bool:
    """Whether this is a plain tensor that nobody traces or intercepts, not even a mode that only watches.

    Then an implementation may be called directly: going through the dispatcher with lists of tensors costs more than
    the kernel on a small model (docs/decisions.md).
    """
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()
        and not torch_private.is_jit_tracing()
        and torch_private.dispatch_mode() is None
    )


@cache
def is_plain_class(cls: type) -> bool:
    """Whether PyTorch's functions do with tensors of this class what they do with its own.

    A class with a ``__torch_function__`` or ``__torch_dispatch__`` of its own has a say in every call.
    """
    own: Any = cls
    functions = (Tensor.__torch_function__, torch.nn.Parameter.__torch_function__)
    says = {getattr(function, "__func__", function) for function in functions}
    has_no_say = getattr(own.__torch_function__, "__func__", own.__torch_function__) in says
    return has_no_say and own.__torch_dispatch__ is Tensor.__torch_dispatch__


def is_autocast(device_type: str) -> bool:
    """Whether autocast is on for tensors of this device. PyTorch raises for a device that has none, such as meta."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    return torch.autocast(device_type, enabled=False) if is_autocast(device_type) else nullcontext()


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums over elements of this dtype are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def dtype_name(tensor: Tensor) -> str:
    """As the native modules call a tensor's dtype."""
    return str(tensor.dtype).removeprefix("torch.")


def stored(tensor: Tensor) -> Tensor:
    """The tensor with its values in memory, where kernels read them.

    Autograd has zeros that lie nowhere (the double backward of ``abs`` makes some), and PyTorch views whose signs are
    flipped when they are read.
    """
    if torch.compiler.is_compiling():
        return tensor  # whatever runs the graph stores them
    if is_batched(tensor):
        raise RuntimeError(
            "kernels take no batched gradients (is_grads_batched=True, vectorize=True): "
            "run the forward inside fastgan.use_backend('reference')"
        )
    return tensor.clone() if tensor._is_zerotensor() else tensor.resolve_neg()


def operator(schema: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Define an operator of this schema. It writes into what it is given: there is nothing for a trace to make.

    An import that follows one which failed halfway defines it again. The operator then stays, and the function that it
    runs is the newest.
    """
    name = schema.partition("(")[0]

    def define(function: Callable[..., None]) -> Callable[..., None]:
        _implementations[name] = function
        if not hasattr(torch.ops.fastgan, name):
            LIBRARY.define(schema)
            LIBRARY.impl(name, lambda *arguments: _implementations[name](*arguments), "CompositeExplicitAutograd")
            torch.library.register_fake(f"fastgan::{name}", _nothing, lib=LIBRARY)
        return function

    return define


def _nothing(*arguments: Any) -> None:
    return None


def copy_back(target: Tensor | None, output: Tensor | None) -> None:
    """Bring into an output what was written into its stand-in, where it has one."""
    if target is not None and output is not None and target is not output:
        output.copy_(target)


def checkpointed_region() -> object | None:
    """Which call of torch.utils.checkpoint this is inside of, by an object of its own; None: of none.

    What it runs again, outside of any mode, must save what was saved at first.
    """
    if torch.compiler.is_compiling():
        return None
    return torch_private.checkpoint_hook()


def untraced(function: Callable[P, R]) -> Callable[P, R]:
    """The function, around which torch.compile breaks its graph: what it does cannot be traced."""
    apart: Callable[P, R] = torch_private.apart_from_dynamo(function)  # imports the compiler when called

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return (apart if torch.compiler.is_compiling() else function)(*args, **kwargs)

    return call


def last_order(message: str, outputs: Sequence[Tensor | None], inputs: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The outputs, of which a further derivative raises.

    ``once_differentiable`` is not enough: its error hangs on nodes of their own, which
    ``torch.autograd.grad(y, x)`` never visits where another path leads to x, and a part of the gradient is lost.
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
