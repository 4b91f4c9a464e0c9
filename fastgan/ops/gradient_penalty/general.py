"""The gradients of logits in the inputs, for any discriminator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from fastgan.ops.gradient_penalty.lacks import watched
from fastgan.ops.gradient_penalty.let_go import may_let_go
from fastgan.ops.gradient_penalty.paths import paths
from fastgan.ops.gradient_penalty.sharding import refuse_sharded_graph

INDEPENDENT = "the discriminator's output does not depend on its input, or was detached from it"


def gradients(
    logits: Sequence[Tensor],
    inputs: tuple[Tensor, ...],
    *,
    ours: bool = False,
    create_graph: bool = True,
) -> tuple[list[Tensor | None], set[Node]]:
    """The gradients of the logits' sum in the inputs, and the nodes that lead from the logits to the inputs.

    Args:
        ours: nobody else has these logits, so what their forward saved may be freed.
        create_graph: whether the gradients keep their graph.

    Raises:
        ValueError: there is no gradient in any input.
    """
    connected = [output for output in logits if output.requires_grad]
    if not connected:
        raise ValueError(INDEPENDENT)
    path = paths(connected, *inputs)
    refuse_sharded_graph(path)
    keep = create_graph and not (ours and may_let_go(path, *(get_gradient_edge(x).node for x in inputs)))
    with watched(path, inputs) as watch:
        ones = [watch.factor(output) for output in connected]
        grads = torch.autograd.grad(
            connected, inputs, ones, retain_graph=keep, create_graph=create_graph, allow_unused=True
        )
        if create_graph:
            watch.refuse(grads)
    if all(grad is None for grad in grads):
        raise ValueError(INDEPENDENT)
    return list(grads), path


def plain_gradients(logits: Sequence[Tensor], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """The same, of a forward that was PyTorch's own: it has every derivative, and nothing is to be freed."""
    connected = [output for output in logits if output.requires_grad]
    if connected:
        ones = [torch.ones_like(output) for output in connected]
        grads = torch.autograd.grad(connected, inputs, ones, create_graph=True, allow_unused=True)
        found = [grad for grad in grads if grad is not None]
        if found:
            return found
    raise ValueError(INDEPENDENT)
