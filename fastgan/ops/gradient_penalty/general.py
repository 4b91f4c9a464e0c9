"""The general path: a penalty, and the gradients that it needs, from the logits of any discriminator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import Node

from fastgan import torch_private
from fastgan.ops.gradient_penalty.freeing import may_free
from fastgan.ops.gradient_penalty.kinds import Penalty
from fastgan.ops.gradient_penalty.missing_derivatives import watched
from fastgan.ops.gradient_penalty.paths import paths
from fastgan.ops.gradient_penalty.sharding import refuse_sharded_graph
from fastgan.ops.gradient_penalty.zeros import fill_zeros
from fastgan.ops.needed import node_of

INDEPENDENT = "the discriminator's output does not depend on its input, or was detached from it"


def general_penalty(
    logits: Sequence[Tensor], inputs: tuple[Tensor, ...], penalty: Penalty, *, private_graph: bool = False
) -> Tensor:
    """Compute a penalty from the gradients of the sum of the logits.

    Args:
        private_graph: the user has no access to these logits, so the activations of their forward may be freed.
    """
    grads, path = gradients(logits, inputs, private_graph=private_graph)
    value = penalty([grad for grad in grads if grad is not None])
    return fill_zeros(value, path, inputs) if path else value


def gradients(
    logits: Sequence[Tensor],
    inputs: tuple[Tensor, ...],
    *,
    private_graph: bool = False,
    create_graph: bool = True,
) -> tuple[list[Tensor | None], set[Node]]:
    """Return the gradients of the sum of the logits, and the nodes between the logits and the inputs.

    Args:
        private_graph: the user has no access to these logits, so the activations of their forward may be freed.
        create_graph: whether the gradients keep their graph.

    Raises:
        ValueError: the logits depend on none of the inputs.
    """
    connected = [output for output in logits if output.requires_grad]
    if not connected:
        raise ValueError(INDEPENDENT)
    path = paths(connected, *inputs)
    refuse_sharded_graph(path)
    keep = create_graph and not (private_graph and may_free(path, *(node_of(x) for x in inputs)))
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
    """Return the gradients after a forward that ran only PyTorch's functions. It needs no checks and frees nothing."""
    connected = [output for output in logits if output.requires_grad]
    if connected:
        ones = [*map(torch.ones_like, connected)]
        grads = torch_private.gradients(connected, inputs, ones)
        found = [grad for grad in grads if grad is not None]
        if found:
            return found
    raise ValueError(INDEPENDENT)
