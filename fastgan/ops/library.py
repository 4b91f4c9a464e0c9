"""What every op is defined with: the operator library, when its dispatcher may be passed by, where derivatives end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.overrides import handle_torch_function
from torch.utils._python_dispatch import _get_current_dispatch_mode

from fastgan import backends

P = ParamSpec("P")
R = TypeVar("R")

LIBRARY = torch.library.Library("fastgan", "FRAGMENT")


def is_traced() -> bool:
    """Whether calls are recorded or compiled now: by torch.compile, or by what `backends.is_recorded` knows.

    There a model must be in PyTorch's own form: fastgan's reroutes, fused weights and raw kernels stand back.
    A mode that only watches (a counter of FLOPs, a profiler) is no recorder.
    """
    return not backends.is_lowered() and (torch.compiler.is_compiling() or backends.is_recorded())


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
        and torch._C._get_tracing_state() is None
        and _get_current_dispatch_mode() is None
    )


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


def is_batched(tensor: Tensor) -> bool:
    """Whether this stands for several gradients that autograd sends through a graph at once."""
    return torch._C._functorch.is_legacy_batchedtensor(tensor) or torch._C._functorch.is_batchedtensor(tensor)


def returns_nothing(*operators: str) -> None:
    """Tell a trace that these operators write into what they are given: there is nothing for it to make."""
    for operator in operators:
        torch.library.register_fake(f"fastgan::{operator}", _nothing, lib=LIBRARY)


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
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if hooks is None or getattr(hooks[0], "__module__", None) != "torch.utils.checkpoint":
        return None
    return hooks[0]


def untraced(function: Callable[P, R]) -> Callable[P, R]:
    """The function, around which torch.compile breaks its graph: what it does cannot be traced."""
    apart: Callable[P, R] = _disable_dynamo(function)  # imports the compiler when called

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
