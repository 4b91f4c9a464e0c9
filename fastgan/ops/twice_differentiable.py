"""PyTorch's own functions, called by unchanged code, rerouted to the ops that differentiate twice without waste."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fastgan.ops import activation, conv, norm, pool


def _unless_autocast(ours: Callable[..., Any], theirs: Callable[..., Any]) -> Callable[..., Any]:
    """Autocast has a precision of its own for norms, which PyTorch's own functions know."""

    def route(input: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        plain = torch.is_autocast_enabled(input.device.type) or not input.is_floating_point()
        return (theirs if plain else ours)(input, *args, **kwargs)

    return route


_ROUTES: dict[Callable[..., Any], Callable[..., Any]] = {
    **{
        function: getattr(conv, f"conv{kind}{n}d")
        for kind in ("", "_transpose")
        for n in (1, 2, 3)
        for function in {getattr(F, f"conv{kind}{n}d"), getattr(torch, f"conv{kind}{n}d")}
    },
    **{
        function: getattr(pool, f"avg_pool{n}d")
        for n, functions in ((1, {F.avg_pool1d, torch.avg_pool1d}), (2, {F.avg_pool2d}), (3, {F.avg_pool3d}))
        for function in functions
    },
    F.layer_norm: _unless_autocast(norm.layer_norm, F.layer_norm),
    F.group_norm: _unless_autocast(norm.group_norm, F.group_norm),
    F.instance_norm: _unless_autocast(norm.instance_norm, F.instance_norm),
    F.leaky_relu: activation.leaky_relu,
    F.leaky_relu_: lambda x, slope=0.01: activation.leaky_relu(x, slope, inplace=True),
    F.relu: activation.relu,
    torch.relu: activation.relu,
    torch.Tensor.relu: activation.relu,
    F.relu_: lambda x: activation.relu(x, inplace=True),
    torch.relu_: lambda x: activation.relu(x, inplace=True),
    torch.Tensor.relu_: lambda x: activation.relu(x, inplace=True),
}


class _Reroute(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        route = _ROUTES.get(func)
        plain = all(kind in (torch.Tensor, torch.nn.Parameter) for kind in types)
        if route is None or not plain or not torch.is_grad_enabled() or _checkpointed():
            return func(*args, **(kwargs or {}))
        return route(*args, **(kwargs or {}))


def _checkpointed() -> bool:
    """Inside torch.utils.checkpoint: what it runs again, outside of any mode, must save what was saved at first."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint"


class _Uncompiled:
    """While anybody is inside, on whatever thread, what torch.compile made runs as it was written.

    A compiled graph cannot be differentiated twice. The stance is the process's: the last to leave gives it back.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._inside = 0
        self._stance: Any = None

    def __enter__(self) -> None:
        with self._lock:
            # Without the compiler nothing was compiled, and importing it takes a second.
            if self._stance is None and "torch._dynamo" in sys.modules:
                self._stance = torch.compiler.set_stance("force_eager")
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0 and self._stance is not None:
                self._stance.__exit__(None, None, None)
                self._stance = None


_uncompiled = _Uncompiled()


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Inside, PyTorch functions use fastgan's ops wherever these differentiate twice with less work.

    Covers conv1d/2d/3d, conv_transpose1d/2d/3d, relu, leaky_relu, avg_pool1d/2d/3d and (outside autocast) layer_norm,
    group_norm and instance_norm, called as functions or by modules, in place too. Everything else, tensor subclasses,
    all calls while gradients are off, and those that torch.utils.checkpoint will run again, are PyTorch's own. What
    torch.compile made runs uncompiled; inside a function that it traces, this raises. Holds for this thread; may be
    nested.

        with fastgan.twice_differentiable():
            logits = discriminator(images)
    """
    with _uncompiled, _Reroute():
        yield
