"""The forward of a penalty: which functions run, and whether one pass is possible."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgan.ops.gradient_penalty.called_modules import Call, call_of
from fastgan.ops.gradient_penalty.eligibility import Tracer
from fastgan.ops.gradient_penalty.graph_pass import Graph, read_graph
from fastgan.ops.gradient_penalty.inputs import Inputs, check_inputs, differentiable
from fastgan.ops.gradient_penalty.missing_derivatives import Layers, NoSecondDerivative
from fastgan.ops.gradient_penalty.outputs import Select, check_select, logits_of
from fastgan.ops.gradient_penalty.selection import Selection, selected
from fastgan.ops.gradient_penalty.sharding import ShardingNotSupported
from fastgan.ops.gradient_penalty.small import (
    Size,
    forget,
    leave_to_pytorch,
    reason,
    remember,
    size_of,
    was_small,
)
from fastgan.ops.twice_differentiable import Rerouting
from fastgan.torch_private import count_hooks


class Forward(NamedTuple):
    returned: Any  # the output of the discriminator
    logits: list[Tensor]
    inputs: tuple[Tensor, ...]
    tracer: Tracer | None  # None: PyTorch's own functions ran
    obstacle: str | None  # why one pass is not possible
    graph: Graph | None = None  # PyTorch's own functions ran, and their graph allows one pass
    selection: Selection | None = None  # if one pass is possible


def readable(
    returned: Any, logits: list[Tensor], x: tuple[Tensor, ...], hooks: int, tracer: Tracer | None = None
) -> Graph | None:
    """Return the graph of a forward that only ran PyTorch's functions, if loss and penalty can take one pass."""
    views = None
    if tracer is not None:
        views = {node: leaf for node, leaf in tracer.nodes_of_views().items() if leaf.is_leaf}
    graph = read_graph(logits, x, hooks, views) if returned is logits[0] else None
    return graph if graph is not None and graph.single else None


def run_forward(
    discriminator: Callable[..., Any],
    inputs: Inputs,
    select: Select | None,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
) -> Forward:
    """Call the discriminator and look for an obstacle to one pass."""
    require_grad_mode()
    return run_unknown(discriminator, inputs, select, args, kwargs, call_of(discriminator, (inputs,), args, kwargs))


def run_unknown(
    discriminator: Callable[..., Any],
    inputs: Inputs,
    select: Select | None,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    known: Call | None,
) -> Forward:
    check_call(inputs, select)
    given, x = differentiable(inputs)

    def call() -> Any:
        return discriminator(given, *args, **(kwargs or {}))

    size = size_of(discriminator, x, known)
    if size is not Size.LARGE:
        return _run_maybe_small(discriminator, call, known, size, select, x)
    with Rerouting(), Tracer(*x) as tracer:
        box = [call()]
    tracer.note_stored(box)
    returned = box.pop()
    return _traced(returned, selected(returned, select, x[0].shape[0], tracer), x, tracer)


def _traced(
    returned: Any, selection: Selection, x: tuple[Tensor, ...], tracer: Tracer, *, late: bool = False
) -> Forward:
    obstacle = selection.obstacle or tracer.find_obstacle(selection.outputs, returned, late=late)
    return Forward(returned, selection.logits, x, tracer, obstacle, selection=selection)


def _run_maybe_small(
    discriminator: Callable[..., Any],
    call: Callable[[], Any],
    known: Call | None,
    size: Size,
    select: Select | None,
    x: tuple[Tensor, ...],
) -> Forward:
    """Run a forward and count its multiplications, unless its parameters already show that it is small."""
    seen = size is Size.SMALL or was_small(discriminator, x)
    tracer = None if seen else Tracer(*x)
    hooks = count_hooks()
    with size.rerouting(x) as rerouting, tracer or nullcontext():
        box = [call()]
    if tracer is not None:
        tracer.note_stored(box)
    returned = box.pop()
    selection = selected(returned, select, x[0].shape[0], tracer) if tracer is not None else None
    logits = logits_of(returned, select, x[0].shape[0]) if selection is None else selection.logits
    small = rerouting.never_started
    ran_pytorch = small and rerouting.only_pytorch_ran
    if size is not Size.SMALL and small != seen and (known is None or not ran_pytorch):
        remember(discriminator, x, small)
    if ran_pytorch:
        graph = readable(returned, logits, x, hooks, tracer)
        if known is not None:
            leave_to_pytorch(known, x[0].shape[0], readable=graph is not None)
        return Forward(returned, logits, x, None, reason(x), graph)
    if small:
        return Forward(returned, logits, x, None, reason(x))
    if tracer is None or selection is None:
        return Forward(returned, logits, x, None, "an earlier forward with these shapes was small")
    return _traced(returned, selection, x, tracer, late=True)


def check_call(inputs: Inputs, select: Select | None) -> None:
    check_inputs("inputs", inputs)
    check_select(select)
    require_grad_mode()


def require_grad_mode() -> None:
    if not torch.is_grad_enabled():
        raise RuntimeError("a gradient penalty needs gradients: call it outside torch.no_grad() and inference_mode()")


@contextmanager
def naming_layers(
    discriminator: Callable[..., Any],
    inputs: Inputs,
    select: Select | None,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
) -> Iterator[None]:
    """Add the names of the layers to an error about second derivatives. This needs a second forward."""
    try:
        yield
    except (torch.OutOfMemoryError, ShardingNotSupported):
        raise
    except RuntimeError as error:
        missing = _missing(discriminator, inputs, select, args, kwargs)
        if isinstance(error, NoSecondDerivative):
            raise error.named(missing) from None
        if missing:
            raise NoSecondDerivative(missing) from error
        raise


def _missing(
    discriminator: Callable[..., Any],
    inputs: Inputs,
    select: Select | None,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
) -> list[str]:
    layers = Layers(discriminator)
    with layers.watched():
        forward = run_forward(discriminator, inputs, select, args, kwargs)
    forget(call_of(discriminator, (inputs,), args, kwargs))
    return layers.missing(forward.logits, forward.inputs)
