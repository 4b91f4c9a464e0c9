"""Penalties inside torch.compile: one part of Dynamo's graph, with the operations of the eager penalty.

A compiled graph has no second derivative. But AOTAutograd records everything that the functions in a graph do,
including calls of the autograd engine. A penalty therefore consists of two functions in Dynamo's graph. Between them,
Dynamo traces the discriminator:

    x = enter(real)             # from here on, calls are rerouted, and traced if one pass may be possible
    logits = discriminator(x)
    g = leave(x, logits)        # the first backward, or one pass

AOTAutograd runs the graph to record it. During this run, the reroutes and the first backward run as well. The record
holds the operations of the eager penalty. All of them are PyTorch's own, so the compiler can fuse them. The backend
"eager" makes no record and runs the two functions at each step. Dynamo traces the penalty of g like any other code.

Dynamo also runs both functions once on fake tensors to get the shapes of their results. This is called a rehearsal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastgan import backends
from fastgan.ops import regions
from fastgan.ops.gradient_penalty.eligibility import Tracer
from fastgan.ops.gradient_penalty.general import INDEPENDENT, gradients
from fastgan.ops.gradient_penalty.inputs import Inputs, floating, replaced
from fastgan.ops.gradient_penalty.one_pass import one_pass
from fastgan.ops.gradient_penalty.outputs import Select, groups_of, logits_of, refuse_dependent
from fastgan.ops.gradient_penalty.paths import paths
from fastgan.ops.gradient_penalty.zeros import fill_zeros
from fastgan.ops.needed import mark_unused
from fastgan.ops.twice_differentiable import Reroute, compiled_region, leaves_of

# ---- traced by Dynamo ----


def gradients_at(
    discriminator: Callable[..., Any],
    point: Inputs,
    select: Select | None,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
) -> list[Tensor]:
    """Return the gradients of the sum of the logits with respect to the inputs."""
    x, returned = _call(discriminator, point, args, kwargs, follow=False)
    logits = logits_of(returned, select, len(x[0]))
    return list(_leave(x, logits, groups_of(returned, select), (), follow=False))


def outputs_and_gradients(
    discriminator: Callable[..., Any],
    inputs: Inputs,
    select: Select | None,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
) -> tuple[Any, list[Tensor]]:
    """Return the output of the discriminator and the gradients of its logits. Take one pass if that is possible."""
    x, returned = _call(discriminator, inputs, args, kwargs, follow=True)
    logits = logits_of(returned, select, len(x[0]))
    leaves, structure = tree_flatten(returned)
    results = _leave(x, logits, groups_of(returned, select), leaves, follow=True)
    for i, leaf in enumerate(leaves):
        for logit, result in zip(logits, results, strict=False):
            if leaf is logit:
                leaves[i] = result
    return tree_unflatten(leaves, structure), list(results[len(logits) :])


def gradients_of(logits: Any, x: tuple[Tensor, ...], select: Select | None) -> list[Tensor]:
    """Return the gradients of logits that were computed in this graph."""
    chosen = logits_of(logits, select, len(x[0]))
    return list(_leave(x, chosen, groups_of(logits, select), (), follow=False, entered=False))


def logits_and_gradients(
    discriminator: Callable[..., Any],
    inputs: Inputs,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    create_graph: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Return the logits, as one tensor, and the gradients. Inputs that require a gradient keep their graph."""
    given = replaced(inputs, lambda x: x.view_as(x) if x.requires_grad else leaf(x))
    x = floating(given)
    with compiled_region():
        returned = discriminator(given, *args, **kwargs)
    if not isinstance(returned, Tensor):
        raise TypeError(f"the discriminator must return one tensor of logits, got {type(returned).__name__}")
    logits_of(returned, None, len(x[0]))
    ones = [torch.ones_like(returned)]
    grads = derivative((True, create_graph, False, False), [returned], list(x), ones)
    return returned, [grad for grad in grads if grad is not None]


def _call(
    discriminator: Callable[..., Any],
    inputs: Inputs,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    *,
    follow: bool,
) -> tuple[tuple[Tensor, ...], Any]:
    if isinstance(discriminator, DistributedDataParallel) and regions.is_entered(whole=True):
        raise RuntimeError(
            "DistributedDataParallel cannot be called in a graph: compute the loss in a module that holds the "
            "discriminator, and wrap that module: DistributedDataParallel(torch.compile(losses))"
        )
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
    entered: bool = True,
) -> tuple[Tensor, ...]:
    if not any(output.requires_grad for output in logits):
        raise ValueError(INDEPENDENT)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    return tuple(leave(entered, follow, groups, len(x), len(logits), *x, *logits, *tensors))


# ---- nodes of the graph ----


@regions.in_graph
def enter(follow: bool, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Return the inputs as leaves that require a gradient, and reroute all calls that follow.

    Args:
        follow: whether to trace the calls for one pass.
    """
    with torch.enable_grad():
        given = tuple(x.detach().requires_grad_() for x in inputs)
    if not regions.is_rehearsal():
        regions.begin([Reroute(), Tracer(*given)] if follow else [Reroute()])
    return given


@regions.in_graph
def leave(
    entered: bool, follow: bool, groups: tuple[int, ...], n_inputs: int, n_logits: int, *tensors: Tensor
) -> tuple[Tensor, ...]:
    """Return the gradients with respect to the inputs. If the calls were traced, return the logits before them.

    Args:
        entered: whether ``enter`` ran before.
        follow: whether it traced the calls.
        groups: the number of logits in each selected output.
        tensors: the inputs, the logits, and all tensors that the discriminator returned.
    """
    inputs, logits = tensors[:n_inputs], list(tensors[n_inputs : n_inputs + n_logits])
    if regions.is_rehearsal():
        return _rehearsed(inputs, logits, follow)
    modes = regions.end() if entered else []
    with regions.lowering(), torch.enable_grad():
        refuse_dependent(logits, groups)
        if follow:
            tracer: Any = modes[1]
            tracer.attached = True  # frees nothing, because the rest of the graph may differentiate any result
            if tracer.find_obstacle(logits, tensors[n_inputs + n_logits :]) is None:
                results, of_inputs = one_pass(logits, logits, inputs, tracer, _unchanged)
                return *results, *of_inputs
        grads = _gradients(logits, inputs, leaves_of(modes))
    if entered:
        for x in inputs:
            mark_unused(x)
    return (*logits, *grads) if follow else grads


def _gradients(logits: list[Tensor], inputs: tuple[Tensor, ...], leaves: Mapping[Node, Tensor]) -> tuple[Tensor, ...]:
    refuse_opaque(paths((output for output in logits if output.requires_grad), *inputs))
    found, path = gradients(logits, inputs)
    first = next(i for i, grad in enumerate(found) if grad is not None)
    made = [grad for grad in found if grad is not None]
    found[first] = fill_zeros(made[0], path, inputs, made, leaves)
    return tuple(torch.zeros_like(x) if grad is None else grad for grad, x in zip(found, inputs, strict=True))


def refuse_opaque(path: Iterable[Node]) -> None:
    """Raise if these nodes include one whose second derivative Dynamo has lost."""
    if any(type(node).__name__ in _OPAQUE for node in path):
        raise RuntimeError(
            "a custom autograd.Function is differentiated twice, and torch.compile loses the second derivative of "
            "those that it traces: call torch._dynamo.allow_in_graph(TheFunction) first, or compute the derivative "
            "inside a function decorated with torch.compiler.disable"
        )


@regions.in_graph
def leaf(x: Tensor) -> Tensor:
    """Return the tensor as a leaf that requires a gradient."""
    return x.detach().requires_grad_()


@regions.in_graph
def derivative(
    options: tuple[bool | None, bool, bool | None, bool],
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    grad_outputs: Sequence[Tensor | None],
) -> tuple[Tensor | None, ...]:
    """Run ``torch.autograd.grad``.

    Args:
        options: its ``retain_graph``, ``create_graph``, ``allow_unused`` and ``materialize_grads``.
    """
    retain_graph, create_graph, allow_unused, materialize_grads = options
    try:
        with regions.lowering() as recorded:
            if create_graph and recorded:
                refuse_opaque(paths((y for y in outputs if y.requires_grad), *inputs))
            # The record of the backward passes the graph again if the function also returns the outputs.
            retain_graph = True if recorded else retain_graph
            return torch.autograd.grad(
                outputs,
                inputs,
                grad_outputs,
                retain_graph,
                create_graph,
                allow_unused=allow_unused,
                materialize_grads=materialize_grads,
            )
    except BaseException:
        regions.end_all()  # no node after this one runs
        raise


_OPAQUE = ("ApplyTemplateBackward",)  # the node of a Function that Dynamo traced


def _unchanged(grads: tuple[Tensor, ...]) -> Any:
    return grads


def _rehearsed(inputs: Sequence[Tensor], logits: Sequence[Tensor], follow: bool) -> tuple[Tensor, ...]:
    """Return tensors that require a gradient and have the shapes, strides and dtypes of the results."""
    anchor = sum(logit.sum() for logit in logits if logit.requires_grad) * 0
    grads = tuple(torch.zeros_like(x) + anchor.to(x.dtype) for x in inputs)  # type: ignore[union-attr]
    return (*(logit.clone() for logit in logits), *grads) if follow else grads
