"""Penalties inside of torch.compile: a part of the graph that Dynamo makes, with the operations of the eager penalty.

A compiled graph has no second derivative. But AOTAutograd records whatever a graph's functions do, the autograd engine
included. So a penalty is two functions in Dynamo's graph, with the discriminator between them as Dynamo traces it:

    x = enter(real)             # what runs from here on is rerouted, and followed where one pass may do
    logits = discriminator(x)
    g = leave(x, logits)        # the first backward, or one pass

When AOTAutograd runs the graph in order to record it, the reroutes and the first backward run too. The record holds
what they did: the operations of the eager penalty, all of PyTorch's own, so that a compiler fuses them. The backend
"eager" makes no record; it runs the two functions at each step. The penalty of g is traced by Dynamo as any code is.

Dynamo runs both functions once on fake tensors, for the shapes of their results: a rehearsal, which computes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from threading import local
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastgan import backends
from fastgan.ops.gradient_penalty.call import tensors as tensors_in
from fastgan.ops.gradient_penalty.eligibility import Tracer
from fastgan.ops.gradient_penalty.general import INDEPENDENT, gradients
from fastgan.ops.gradient_penalty.inputs import Inputs, floating, replaced
from fastgan.ops.gradient_penalty.one_pass import one_pass
from fastgan.ops.gradient_penalty.outputs import Select, groups_of, logits_of, refuse_dependent
from fastgan.ops.gradient_penalty.zeros import leave_zeros
from fastgan.ops.needed import leave_unread
from fastgan.ops.twice_differentiable import Reroute

P = ParamSpec("P")
R = TypeVar("R")

_OLDEST = (2, 11)  # the oldest PyTorch that this is tested with; older ones break the graph
_PACKAGE = str(Path(__file__).parents[2])
_OURS = tuple(str(Path(_PACKAGE, room)) for room in ("ops", "nn"))


# ---- who may enter ----


def is_entered() -> bool:
    """Whether a penalty that is called now becomes a part of the graph that Dynamo makes."""
    return torch.compiler.is_dynamo_compiling() and _can_enter()


def _can_enter() -> bool:
    """Called while Dynamo traces: whether no graph can end between ``enter`` and ``leave``.

    If Dynamo cannot trace the discriminator, it ends the graph before the call in the function that it was given, and
    later tries what that call runs, by itself. There a graph could end inside of the discriminator.
    """
    from torch._dynamo import config
    from torch._dynamo.symbolic_convert import InstructionTranslator

    if tuple(map(int, torch.__version__.split(".")[:2])) < _OLDEST or torch.compiler.is_exporting():
        return False
    for function in (enter, leave):
        torch._dynamo.allow_in_graph(function)
    root: Any = InstructionTranslator.current_tx().output.root_tx
    if root.one_graph:
        return True
    return not (root.f_code.co_filename.startswith(_OURS) or getattr(config, "nested_graph_breaks", False))


_can_enter._dynamo_marked_constant = True  # type: ignore[attr-defined]


def compilable(function: Callable[P, R]) -> Callable[P, R]:
    """The function, which torch.compile traces where its penalty can be in a graph, and breaks its graph around."""
    apart: Callable[P, R] = _disable_dynamo(function)  # imports the compiler when called

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.compiler.is_compiling():
            close_all()
            return function(*args, **kwargs)
        return (function if is_entered() else apart)(*args, **kwargs)

    return call


# ---- what Dynamo traces ----


def gradients_at(
    discriminator: Callable[..., Any],
    point: Inputs,
    select: Select | None,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
) -> list[Tensor]:
    """The gradients of the discriminator's logits at a point."""
    x, returned = _call(discriminator, point, args, kwargs, follow=False)
    logits = logits_of(returned, select, len(x[0]))
    return list(_leave(x, logits, groups_of(returned, select), (), follow=False, ours=True))


def outputs_and_gradients(
    discriminator: Callable[..., Any],
    inputs: Inputs,
    select: Select | None,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
) -> tuple[Any, list[Tensor]]:
    """What the discriminator returns, and the gradients of the logits among it, of one pass where that is possible."""
    x, returned = _call(discriminator, inputs, args, kwargs, follow=True)
    logits = logits_of(returned, select, len(x[0]))
    leaves, structure = tree_flatten(returned)
    results = _leave(x, logits, groups_of(returned, select), leaves, follow=True, ours=False)
    for i, leaf in enumerate(leaves):
        for logit, result in zip(logits, results, strict=False):
            if leaf is logit:
                leaves[i] = result
    return tree_unflatten(leaves, structure), list(results[len(logits) :])


def gradients_of(logits: Any, x: tuple[Tensor, ...], select: Select | None) -> list[Tensor]:
    """The gradients of logits that were computed in this graph."""
    chosen = logits_of(logits, select, len(x[0]))
    return list(_leave(x, chosen, groups_of(logits, select), (), follow=False, ours=False, entered=False))


def _call(
    discriminator: Callable[..., Any],
    inputs: Inputs,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    *,
    follow: bool,
) -> tuple[tuple[Tensor, ...], Any]:
    x = tuple(enter(follow, *floating(inputs)))
    rest = iter(x)
    given = replaced(inputs, lambda _: next(rest))
    backends.enter_penalty()
    try:
        return x, discriminator(given, *args, **(kwargs or {}))
    finally:
        backends.leave_penalty()


def _leave(
    x: tuple[Tensor, ...],
    logits: Sequence[Tensor],
    groups: tuple[int, ...],
    leaves: Sequence[Any],
    *,
    follow: bool,
    ours: bool,
    entered: bool = True,
) -> tuple[Tensor, ...]:
    if not any(output.requires_grad for output in logits):
        raise ValueError(INDEPENDENT)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    others = all(isinstance(leaf, Tensor | bool | int | float | str | None) for leaf in leaves)
    way = entered, follow, ours, not others
    return tuple(leave(way, groups, len(x), len(logits), *x, *logits, *tensors))


# ---- what is in the graph ----


class _Rerouted(Reroute):
    """Also remembers the graph's inputs that require a gradient: while it is recorded, their nodes do not know them."""

    def __init__(self) -> None:
        super().__init__()
        self.leaves: dict[Node, Tensor] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for tensor in tensors_in((args, kwargs)):
            with torch._C.DisableTorchFunction():
                node = tensor.grad_fn
                if node is not None and type(node).__name__ == "Error":
                    self.leaves[node] = tensor
        return super().__torch_function__(func, types, args, kwargs)


class _Region(NamedTuple):
    modes: list[TorchFunctionMode]
    tracer: Tracer | None
    is_lowered: bool  # recorded by AOTAutograd
    grad_mode: bool

    @property
    def leaves(self) -> dict[Node, Tensor]:
        first = self.modes[0]
        return first.leaves if isinstance(first, _Rerouted) else {}


class _Open(local):
    def __init__(self) -> None:
        self.regions: list[_Region] = []


_open = _Open()


def enter(follow: bool, *inputs: Tensor) -> tuple[Tensor, ...]:
    """The inputs as leaves that require a gradient; the calls that follow are rerouted.

    Args:
        follow: whether to look for one pass.
    """
    with torch.enable_grad():
        given = tuple(x.detach().requires_grad_() for x in inputs)
    if _is_rehearsal(inputs):
        return given
    close_all()
    tracer = Tracer(*given) if follow else None
    lowered = any(isinstance(x, FunctionalTensor) for x in inputs)
    modes: list[TorchFunctionMode] = [_Rerouted() if lowered else Reroute()]
    modes += [] if tracer is None else [tracer]
    _open.regions.append(_Region(modes, tracer, lowered, torch.is_grad_enabled()))
    backends.set_lowered(int(lowered))
    torch.set_grad_enabled(True)
    for mode in modes:
        mode.__enter__()
    return given


def leave(
    way: tuple[bool, bool, bool, bool], groups: tuple[int, ...], n_inputs: int, n_logits: int, *tensors: Tensor
) -> tuple[Tensor, ...]:
    """The gradients in the inputs, after the logits if these were followed.

    Args:
        way: whether ``enter`` came first, whether it follows, whether nobody else has the logits, and whether
            something was returned that is no tensor and may hold some.
        groups: how many of the logits each output is made of.
        tensors: the inputs, the logits, and all tensors that the discriminator returned.
    """
    entered, follow, ours, opaque = way
    inputs, logits = tensors[:n_inputs], list(tensors[n_inputs : n_inputs + n_logits])
    if _is_rehearsal(tensors):
        return _rehearsed(inputs, logits, follow)
    region = _close(_open.regions[-1]) if entered else None
    tracer = None if region is None else region.tracer
    lowered = any(isinstance(tensor, FunctionalTensor) for tensor in tensors)
    backends.set_lowered(int(lowered))
    try:
        with torch.enable_grad():
            refuse_dependent(logits, groups)
            if tracer is not None:
                returned: list[Any] = [*tensors[n_inputs + n_logits :], *([object()] if opaque else [])]
                if tracer.judge(logits, returned) is None:
                    results, grads = one_pass(logits, logits, inputs, tracer, _as_they_are)
                    return *results, *grads
            # A record frees nothing, and what the discriminator has left on itself leaves the graph with a derivative.
            grads = _gradients(logits, inputs, ours and not lowered, {} if region is None else region.leaves)
    finally:
        backends.set_lowered(-int(lowered))
    if entered:
        for x in inputs:
            leave_unread(x)
    return (*logits, *grads) if follow else grads


def _gradients(
    logits: list[Tensor], inputs: tuple[Tensor, ...], ours: bool, leaves: Mapping[Node, Tensor]
) -> tuple[Tensor, ...]:
    found, path = gradients(logits, inputs, ours=ours, plain=False)
    if any(type(node).__name__ in _OPAQUE for node in path):
        raise RuntimeError(
            "the discriminator calls a custom autograd.Function, and torch.compile loses the second derivative of those "
            "that it traces: call torch._dynamo.allow_in_graph(TheFunction) before, or take the penalty inside a "
            "function decorated with torch.compiler.disable"
        )
    first = next(i for i, grad in enumerate(found) if grad is not None)
    made = [grad for grad in found if grad is not None]
    found[first] = leave_zeros(made[0], path, inputs, made, leaves)
    return tuple(torch.zeros_like(x) if grad is None else grad for grad, x in zip(found, inputs, strict=True))


_OPAQUE = ("ApplyTemplateBackward",)  # the node of a Function that Dynamo has traced


def _as_they_are(grads: tuple[Tensor, ...]) -> Any:
    return grads


def _close(region: _Region) -> _Region:
    """End a region, and those that were entered after it and not left."""
    while True:
        last = _open.regions.pop()
        for mode in reversed(last.modes):
            if any(mode is other for other in _get_current_function_mode_stack()):
                mode.__exit__(None, None, None)
        backends.set_lowered(-int(last.is_lowered))
        torch.set_grad_enabled(last.grad_mode)
        if last is region:
            return region


def close_all() -> None:
    """End the regions whose discriminator has raised an error."""
    if _open.regions:
        _close(_open.regions[0])


def _is_rehearsal(tensors: Sequence[Tensor]) -> bool:
    return any(isinstance(tensor, FakeTensor) for tensor in tensors)


def _rehearsed(inputs: Sequence[Tensor], logits: Sequence[Tensor], follow: bool) -> tuple[Tensor, ...]:
    """Tensors with the shapes, strides and dtypes of the results, which require a gradient."""
    anchor = sum(logit.sum() for logit in logits if logit.requires_grad) * 0
    grads = tuple(torch.zeros_like(x) + anchor.to(x.dtype) for x in inputs)  # type: ignore[union-attr]
    return (*(logit.clone() for logit in logits), *grads) if follow else grads
