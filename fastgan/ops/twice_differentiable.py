"""PyTorch's own functions, called by unchanged code, rerouted to the ops that differentiate twice without waste."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from threading import Lock
from typing import Any

import torch
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd.graph import Node
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._pytree import tree_leaves

from fastgan import backends
from fastgan.ops import conv, norm, piecewise, pool, regions
from fastgan.ops.bias_act import functions as activations
from fastgan.ops.library import checkpointed_region, is_traced


def _of_numbers(ours: Callable[..., Any], theirs: Callable[..., Any]) -> Callable[..., Any]:
    """PyTorch's own for what is not floating point, which it refuses in its own words."""

    def route(input: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return (ours if input.is_floating_point() else theirs)(input, *args, **kwargs)

    return route


def _unless_autocast(ours: Callable[..., Any], theirs: Callable[..., Any]) -> Callable[..., Any]:
    """Autocast has a precision of its own for these, which PyTorch's own functions know."""

    def route(input: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        plain = torch.is_autocast_enabled(input.device.type) or not input.is_floating_point()
        return (theirs if plain else ours)(input, *args, **kwargs)

    return route


def _unless_out(ours: Callable[..., Any], theirs: Callable[..., Any]) -> Callable[..., Any]:
    def route(input: torch.Tensor, *, out: torch.Tensor | None = None) -> Any:
        return ours(input) if out is None else theirs(input, out=out)

    return route


def _contiguous(ours: Callable[..., Any]) -> Callable[..., Any]:
    """As PyTorch's layer and instance norm leave a result: `view` is often next."""
    return lambda *args, **kwargs: ours(*args, **kwargs).contiguous()


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
    **piecewise.ROUTES,
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
    F.layer_norm: _of_numbers(_contiguous(norm.layer_norm), F.layer_norm),
    F.group_norm: _of_numbers(norm.group_norm, F.group_norm),
    F.instance_norm: _of_numbers(_contiguous(norm.instance_norm), F.instance_norm),
    F.batch_norm: _of_numbers(norm.batch_norm, F.batch_norm),
    torch.batch_norm: _batch_norm,
    F.leaky_relu: activations.leaky_relu,
    F.leaky_relu_: partial(activations.leaky_relu, inplace=True),
    **dict.fromkeys((F.relu, torch.relu, torch.Tensor.relu), activations.relu),
    **dict.fromkeys((F.relu_, torch.relu_, torch.Tensor.relu_), partial(activations.relu, inplace=True)),
    F.silu: activations.silu,
    F.gelu: activations.gelu,
    F.softplus: _unless_autocast(activations.softplus, F.softplus),
    **dict.fromkeys((torch.tanh, torch.Tensor.tanh), _unless_out(activations.tanh, torch.tanh)),
    **dict.fromkeys((torch.tanh_, torch.Tensor.tanh_), partial(activations.tanh, inplace=True)),
    **dict.fromkeys((torch.sigmoid, torch.Tensor.sigmoid), _unless_out(activations.sigmoid, torch.sigmoid)),
    **dict.fromkeys((torch.sigmoid_, torch.Tensor.sigmoid_), partial(activations.sigmoid, inplace=True)),
}


_PLAIN = {torch.Tensor, torch.nn.Parameter, FunctionalTensor}  # the last while torch.compile makes a graph


class Reroute(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.leaves: dict[Node, torch.Tensor] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if backends.is_lowered():
            self._keep_leaves((args, kwargs))
        route = _ROUTES.get(func)
        if (
            route is None
            or not torch.is_grad_enabled()
            or not _PLAIN.issuperset(types)
            or checkpointed_region() is not None
            or is_traced()
        ):
            return func(*args, **(kwargs or {}))
        return route(*args, **(kwargs or {}))

    def _keep_leaves(self, given: Any) -> None:
        """While a graph is recorded, the nodes of its inputs do not know them."""
        for tensor in tree_leaves(given):
            if isinstance(tensor, torch.Tensor):
                with torch._C.DisableTorchFunction():
                    node = tensor.grad_fn
                if node is not None and type(node).__name__ == "Error":
                    self.leaves[node] = tensor


def leaves_of(modes: Iterable[TorchFunctionMode]) -> dict[Node, torch.Tensor]:
    """The graph's inputs that require a gradient, by their nodes, which a reroute has met while it was recorded."""
    return {node: leaf for mode in modes if isinstance(mode, Reroute) for node, leaf in mode.leaves.items()}


def is_rerouting() -> bool:
    return any(isinstance(mode, Reroute) for mode in _get_current_function_mode_stack())


@regions.in_graph
def _begin() -> torch.Tensor:
    if not regions.is_rehearsal():
        regions.begin([Reroute()])
    return torch.empty(0)  # a node of Dynamo's graph has a result


@regions.in_graph
def _end() -> torch.Tensor:
    if not regions.is_rehearsal():
        regions.end()
    return torch.empty(0)


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


uncompiled = _Uncompiled()


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Inside, PyTorch functions use fastgan's ops wherever these differentiate twice with less work.

    Covers conv1d/2d/3d, conv_transpose1d/2d/3d, layer_norm, group_norm, instance_norm, batch_norm (in training);
    relu, leaky_relu, silu, gelu, tanh, sigmoid and (outside autocast) softplus; hardtanh, relu6, clamp, threshold,
    softshrink, hardshrink, abs, prelu, rrelu, and maximum and minimum with a constant; avg_pool, max_pool,
    adaptive_avg_pool and adaptive_max_pool of 1, 2 and 3 dimensions, fractional_max_pool2d/3d; pad by reflection,
    replication and around a circle; interpolate by area: called as functions, as methods or by modules, in place too.
    Everything else is PyTorch's own: tensor subclasses, all calls while gradients are off, those that
    torch.utils.checkpoint will run again, and those that are recorded (torch.jit.trace, torch.export, make_fx,
    torch.fx). What torch.compile made runs uncompiled. A function that torch.compile traces with ``fullgraph=True`` is
    rerouted too; in other functions that it traces, this does nothing. Holds for this thread; may be nested.

        with fastgan.twice_differentiable():
            logits = discriminator(images)
    """
    if regions.is_entered(whole=True):
        _begin()
        backends.enter_penalty()
        try:
            yield
        finally:
            backends.leave_penalty()
            _end()
        return
    if is_traced():  # the compiler's stance cannot change inside of a function that it traces
        yield
        return
    with uncompiled, Reroute():
        yield
