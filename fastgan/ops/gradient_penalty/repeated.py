"""Calls that equal an earlier one that was left to PyTorch, in as few Python functions as possible.

The kernels of a step leave little of Python's code in the caches, so each function that a small penalty calls is slow.
The function below does what several do for other calls.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastgan.ops.gradient_penalty.forward import readable
from fastgan.ops.gradient_penalty.general import plain_gradients
from fastgan.ops.gradient_penalty.graph_pass import gradient_and_logits_of, gradient_of, read_graph
from fastgan.ops.gradient_penalty.inputs import Inputs, differentiable
from fastgan.ops.gradient_penalty.kinds import Penalty
from fastgan.ops.gradient_penalty.outputs import Select, logits_of
from fastgan.ops.twice_differentiable import uncompiled
from fastgan.torch_private import RemovableHandle, has_torch_function, run_backward


def outputs_and_penalty(
    discriminator: Callable[..., Any],
    inputs: Inputs,
    penalty: Penalty,
    select: Select | None,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    read: bool,
    *,
    both: bool = False,
) -> tuple[Any, Tensor]:
    """Call the discriminator and compute the penalty.

    Args:
        read: whether the graph may allow one pass.
        both: whether the caller also differentiates the outputs.
    """
    if type(inputs) is Tensor and not inputs.requires_grad and not inputs.is_inference():
        given: Any = inputs.detach().requires_grad_()
        x: tuple[Tensor, ...] = (given,)
    else:
        given, x = differentiable(inputs)
    hooks = RemovableHandle.next_id
    may_be_compiled = "torch._dynamo.eval_frame" in sys.modules
    if may_be_compiled:
        uncompiled.__enter__()
    try:
        returned = discriminator(given, *args, **(kwargs or {}))
    finally:
        if may_be_compiled:
            uncompiled.__exit__()
    samples = x[0].shape[0]
    if (
        not read
        and type(returned) is Tensor
        and select is None
        and given is x[0]
        and returned.ndim
        and returned.shape[0] == samples
        and returned.requires_grad
        and not returned.is_complex()
        and not has_torch_function((returned, given))
    ):
        ones = (torch.ones_like(returned),)
        grads = run_backward((returned,), ones, True, True, (given,), True, accumulate_grad=False)
        if grads[0] is not None:
            return returned, penalty(grads)
    logits = logits_of(returned, select, samples)
    graph = None
    if read:
        graph = readable(returned, logits, x, hooks) if both else read_graph(logits, x, hooks)
    if graph is None:
        return returned, penalty(plain_gradients(logits, x))
    if not both:
        return returned, penalty([gradient_of(graph)])
    grad, returned = gradient_and_logits_of(graph)
    return returned, penalty([grad])
