"""PyTorch's own functions, called by unchanged code, rerouted to the ops that differentiate twice without waste."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fastgan.ops import activation, conv, norm, pool


def _of_numbers(ours: Callable[..., Any], theirs: Callable[..., Any]) -> Callable[..., Any]:
    """PyTorch's own for what is not floating point, which it refuses in its own words."""

    def route(input: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return (ours if input.is_floating_point() else theirs)(input, *args, **kwargs)

    return route


def _batch_norm(
    input: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> torch.Tensor:
    """The order of ``torch.batch_norm``."""
    result: torch.Tensor = _ROUTES[F.batch_norm](
        input, running_mean, running_var, weight, bias, training, momentum, eps
    )
    return result


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
    F.layer_norm: _of_numbers(norm.layer_norm, F.layer_norm),
    F.group_norm: _of_numbers(norm.group_norm, F.group_norm),
    F.instance_norm: _of_numbers(norm.instance_norm, F.instance_norm),
    F.batch_norm: _of_numbers(norm.batch_norm, F.batch_norm),
    torch.batch_norm: _batch_norm,
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
        if route is None or not plain or not torch.is_grad_enabled():
            return func(*args, **(kwargs or {}))
        return route(*args, **(kwargs or {}))


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Inside, PyTorch functions use fastgan's ops wherever these differentiate twice with less work.

    Covers conv1d/2d/3d, conv_transpose1d/2d/3d, relu, leaky_relu, avg_pool1d/2d/3d, layer_norm, group_norm,
    instance_norm and batch_norm (in training), called as functions or by modules, in place too. Everything else, tensor
    subclasses, and all calls while gradients are off, are PyTorch's own. Holds for this thread; may be nested.

        with fastgan.twice_differentiable():
            logits = discriminator(images)
    """
    with _Reroute():
        yield
