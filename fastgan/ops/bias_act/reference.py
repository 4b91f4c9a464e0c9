"""Reference implementation in PyTorch, differentiable to any order. It is the fallback and the benchmark's baseline."""

from __future__ import annotations

from collections.abc import Callable
from math import inf

from torch import Tensor
from torch.nn import functional as F

from fastgan.ops.bias_act.layout import Options
from fastgan.ops.library import accumulation_dtype

_FUNCTIONS: dict[str, Callable[[Tensor, Options], Tensor]] = {
    "linear": lambda u, options: u.clone(),
    "relu": lambda u, options: F.relu(u),
    "leaky_relu": lambda u, options: F.leaky_relu(u, options.negative_slope),
    "silu": lambda u, options: F.silu(u),
    "gelu": lambda u, options: F.gelu(u),
    "gelu_tanh": lambda u, options: F.gelu(u, approximate="tanh"),
    "tanh": lambda u, options: F.tanh(u),
    "sigmoid": lambda u, options: F.sigmoid(u),
    "softplus": lambda u, options: F.softplus(u),
    "elu": lambda u, options: F.elu(u),
    "selu": lambda u, options: F.selu(u),
}


def bias_act(input: Tensor, bias: Tensor | None, dim: int, options: Options, inplace: bool = False) -> Tensor:
    """Compute in float32 or better, and round once: otherwise a mask could differ from that of a kernel."""
    acc = accumulation_dtype(input.dtype)
    u = input.clone() if inplace else input
    u = u.to(acc)
    if bias is not None:
        u = u + bias.to(acc).view(-1, *[1] * (input.ndim - 1 - dim))
    y = _FUNCTIONS[options.activation](u, options)
    if options.gain != 1:
        y = y * options.gain
    if options.clamp != inf:
        y = y.clamp(-options.clamp, options.clamp)
    return input.copy_(y) if inplace else y.to(input.dtype)
