"""The logits and their gradients with respect to the inputs, for modules that are not penalties."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from fastgan.ops.gradient_penalty import compiled
from fastgan.ops.gradient_penalty.general import gradients
from fastgan.ops.gradient_penalty.inputs import Inputs, check_inputs, floating, replaced
from fastgan.ops.gradient_penalty.outputs import logits_of
from fastgan.ops.gradient_penalty.sharding import gathering
from fastgan.ops.regions import is_entered
from fastgan.ops.twice_differentiable import twice_differentiable


def gradients_of_logits(
    discriminator: Callable[..., Any],
    inputs: Inputs,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    create_graph: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Return the logits (one tensor) and the gradients of their sum with respect to the inputs.

    Inputs that require a gradient stay connected to their own graph.
    """
    check_inputs("inputs", inputs)
    if is_entered():
        return compiled.logits_and_gradients(discriminator, inputs, args, kwargs, create_graph)
    given = replaced(inputs, lambda x: x.view_as(x) if x.requires_grad else x.detach().requires_grad_())
    x = floating(given)
    with gathering(discriminator):
        with twice_differentiable():
            returned = discriminator(given, *args, **kwargs)
        if not isinstance(returned, Tensor):
            raise TypeError(f"the discriminator must return one tensor of logits, got {type(returned).__name__}")
        grads, _ = gradients(logits_of(returned, None, x[0].shape[0]), x, create_graph=create_graph)
    return returned, [grad for grad in grads if grad is not None]
