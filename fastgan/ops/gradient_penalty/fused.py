"""The rule of bias_act. Its constant, the bias, is added before the activation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgan.ops.bias_act.layout import ALIASES, PIECEWISE
from fastgan.ops.gradient_penalty.call import Call
from fastgan.ops.gradient_penalty.layout import Ineligible, Layout
from fastgan.torch_private import gradient_edge


def split_bias(
    call: Call, input: Tensor, bias: Tensor | None = None, *, activation: str = "leaky_relu", **options: Any
) -> None:
    """Make the call read input + bias from a tensor of its own. One pass needs the gradient of each sample there."""
    call.require_input(input)
    call.require_constants(bias)
    if ALIASES.get(activation, activation) not in PIECEWISE:
        raise Ineligible(f"is smooth with activation={activation!r}; one pass needs linear, relu or leaky_relu")
    if options.get("inplace"):
        raise Ineligible("is in place; use the form that is not")
    summed = input
    if bias is not None:
        after = input.ndim - 1 - options.get("dim", 1) % input.ndim
        bias = bias.view(-1, *[1] * after)
        summed = input + bias.to(input.dtype)
    call.source = input, summed, bias
    call.args, call.kwargs = (summed,), {**options, "activation": activation}


def bias_act(call: Call, summed: Tensor, **options: Any) -> Layout:
    input, _, bias = call.source
    if bias is not None:
        call.constants.append((gradient_edge(summed), bias, 0))
    if options.get("clamp") is not None:
        leaf = summed.detach().requires_grad_()
        (slopes,) = torch.autograd.grad(call.func(leaf, **options).sum(), leaf)
        call.add_constant(call.result.detach() - slopes * leaf.detach())
    return call.layout_of(input)
