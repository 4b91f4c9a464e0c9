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
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastgan import backends
from fastgan.ops import regions
from fastgan.ops.gradient_penalty.eligibility import Tracer
from fastgan.ops.gradient_penalty.general import INDEPENDENT, gradients
from fastgan.ops.gradient_penalty.inputs import Inputs, floating, replaced
from fastgan.ops.gradient_penalty.one_pass import one_pass
from fastgan.ops.gradient_penalty.outputs import Select, groups_of, logits_of, refuse_dependent
from fastgan.ops.gradient_penalty.zeros import leave_zeros
from fastgan.ops.needed import mark_unused
from fastgan.ops.twice_differentiable import Reroute, leaves_of

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


@regions.in_graph
def enter(follow: bool, *inputs: Tensor) -> tuple[Tensor, ...]:
    """The inputs as leaves that require a gradient; the calls that follow are rerouted.

    Args:
        follow: whether to look for one pass.
    """
    with torch.enable_grad():
        given = tuple(x.detach().requires_grad_() for x in inputs)
    if not regions.is_rehearsal():
        regions.begin([Reroute(), Tracer(*given)] if follow else [Reroute()])
    return given


@regions.in_graph
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
    if regions.is_rehearsal():
        return _rehearsed(inputs, logits, follow)
    modes = regions.end() if entered else []
    with regions.lowering() as lowered, torch.enable_grad():
        refuse_dependent(logits, groups)
        if follow:
            returned: list[Any] = [*tensors[n_inputs + n_logits :], *([object()] if opaque else [])]
            tracer: Any = modes[1]
            if tracer.judge(logits, returned) is None:
                results, of_inputs = one_pass(logits, logits, inputs, tracer, _as_they_are)
                return *results, *of_inputs
        # A record frees nothing, and what the discriminator has left on itself leaves the graph with a derivative.
        grads = _gradients(logits, inputs, ours and not lowered, leaves_of(modes))
    if entered:
        for x in inputs:
            mark_unused(x)
    return (*logits, *grads) if follow else grads


def _gradients(
    logits: list[Tensor], inputs: tuple[Tensor, ...], ours: bool, leaves: Mapping[Node, Tensor]
) -> tuple[Tensor, ...]:
    found, path = gradients(logits, inputs, ours=ours)
    if any(type(node).__name__ in _OPAQUE for node in path):
        raise RuntimeError(
            "the discriminator calls a custom autograd.Function, and torch.compile loses the second derivative of "
            "those that it traces: call torch._dynamo.allow_in_graph(TheFunction) before, or take the penalty inside "
            "a function decorated with torch.compiler.disable"
        )
    first = next(i for i, grad in enumerate(found) if grad is not None)
    made = [grad for grad in found if grad is not None]
    found[first] = leave_zeros(made[0], path, inputs, made, leaves)
    return tuple(torch.zeros_like(x) if grad is None else grad for grad, x in zip(found, inputs, strict=True))


_OPAQUE = ("ApplyTemplateBackward",)  # the node of a Function that Dynamo has traced


def _as_they_are(grads: tuple[Tensor, ...]) -> Any:
    return grads


def _rehearsed(inputs: Sequence[Tensor], logits: Sequence[Tensor], follow: bool) -> tuple[Tensor, ...]:
    """Tensors with the shapes, strides and dtypes of the results, which require a gradient."""
    anchor = sum(logit.sum() for logit in logits if logit.requires_grad) * 0
    grads = tuple(torch.zeros_like(x) + anchor.to(x.dtype) for x in inputs)  # type: ignore[union-attr]
    return (*(logit.clone() for logit in logits), *grads) if follow else grads
