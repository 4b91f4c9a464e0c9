"""Functions with a derivative inside, such as a penalty of one's own or a loss on forces, within torch.compile.

Dynamo traces the unchanged function. It may use any modules, and Dynamo guards everything that it reads. A torch
function mode replaces two calls that Dynamo refuses:

    x.requires_grad_()               makes x a leaf; afterwards, the variable denotes the leaf
    torch.autograd.grad(y, x, ...)   becomes one node of the graph

Around the function, calls are rerouted, as in ``twice_differentiable``. AOTAutograd records the rerouted functions and
the run of the autograd engine. The record holds the operations of the eager function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastgan import torch_private
from fastgan.ops import regions
from fastgan.ops.gradient_penalty.compiled import derivative, leaf
from fastgan.ops.twice_differentiable import compiled_region, twice_differentiable

P = ParamSpec("P")
R = TypeVar("R")


def compilable(function: Callable[P, R]) -> Callable[P, R]:
    """Make a function that calls ``torch.autograd.grad`` part of a compiled step.

    PyTorch cannot compile a penalty of your own or a loss on forces, because it computes a derivative that will be
    differentiated again. Wrap the function that computes it. Then call it inside a function that is compiled by
    ``torch.compile``, also with ``fullgraph=True``. The results are those of the function itself, up to rounding.
    The graph holds the operations of ``twice_differentiable``, which save a third of the work of convolutions.

    torch.compile traces the wrapped function like any other code. It may be a function, method, partial or module, and
    use modules and tensors from anywhere. The graph depends on all that the function reads: it is compiled again if a
    flag or number changes. Inside the function,

    - call ``x.requires_grad_()``; torch.compile refuses to set ``x.requires_grad = True``. An argument gets the flag
      only inside the function: the caller's tensor does not change;
    - call ``torch.autograd.grad``, once or several times. Its option ``is_grads_batched``, and ``backward``, are
      refused.

    Outside of ``torch.compile``, the function runs inside ``twice_differentiable``. With PyTorch before 2.11, the graph
    breaks around the function, which then runs in the same way.

    Args:
        function: a function of any arguments. It can be used as a decorator.

    Returns:
        A function with the same arguments and results. The results can be differentiated once, and as often as the
        function itself outside of ``torch.compile``.

    Raises:
        TypeError: ``function`` is not callable.
        RuntimeError: (inside ``torch.compile``) a custom autograd.Function that torch.compile traces lies between the
            outputs and the inputs of a derivative.

    ```python
    import torch
    import fastgan

    potential = torch.nn.Sequential(
        torch.nn.Linear(3, 32), torch.nn.SiLU(), torch.nn.Linear(32, 1)
    )

    @fastgan.compilable
    def forces(positions):
        positions.requires_grad_()
        energy = potential(positions).sum()
        (gradient,) = torch.autograd.grad(energy, positions, create_graph=True)
        return -gradient

    @torch.compile(backend="aot_eager", fullgraph=True)
    def loss(positions, measured):
        return (forces(positions) - measured).square().mean()

    loss(torch.randn(16, 3), torch.randn(16, 3)).backward()
    ```
    """
    if not callable(function):
        raise TypeError(f"function must be callable, got {type(function).__name__}")

    @wraps(function, updated=())  # the attributes of a module are its parameters
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return _call(function, args, kwargs)

    return call


@regions.traceable
def _call(function: Callable[..., R], args: Sequence[Any], kwargs: Mapping[str, Any]) -> R:
    if not regions.is_entered():
        with twice_differentiable():
            return function(*args, **kwargs)
    _prepare()
    with compiled_region(), _Derivatives():
        return function(*args, **kwargs)


# ---- traced by Dynamo ----


class _Derivatives(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.autograd.grad:
            return _autograd_grad(*args, **(kwargs or {}))
        if func is Tensor.requires_grad_:
            return _requires_grad(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _requires_grad(x: Tensor, requires_grad: bool = True) -> Tensor:
    if x.requires_grad or not requires_grad:
        return x.requires_grad_(requires_grad)
    new = leaf(x)
    _rebind()
    return new


def _autograd_grad(
    outputs: Any,
    inputs: Any,
    grad_outputs: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    only_inputs: bool = True,
    allow_unused: bool | None = None,
    is_grads_batched: bool = False,
    materialize_grads: bool = False,
) -> Any:
    if is_grads_batched:
        raise ValueError("fastgan.compilable: torch.compile cannot run is_grads_batched=True")
    ys, xs = _listed(outputs), _listed(inputs.values() if isinstance(inputs, dict) else inputs)
    factors = [None] * len(ys) if grad_outputs is None else _listed(grad_outputs)
    options = retain_graph, create_graph, allow_unused, materialize_grads
    grads = derivative(options, ys, xs, factors)
    return dict(zip(inputs, grads, strict=True)) if isinstance(inputs, dict) else tuple(grads)


def _listed(value: Any) -> list[Any]:
    return [value] if isinstance(value, Tensor) else list(value)


# ---- run while Dynamo traces ----


def _prepare() -> None:
    torch_private.intercept_autograd_grad()


def _rebind() -> None:
    torch_private.rebind("x", "new")


for _function in (_prepare, _rebind):
    _function._dynamo_marked_constant = True  # type: ignore[attr-defined]
