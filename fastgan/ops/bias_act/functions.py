"""PyTorch's activation functions, with its signatures and results, on `bias_act`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from fastgan import backends
from fastgan.ops.bias_act.autograd import activate
from fastgan.ops.bias_act.layout import DTYPES, Options
from fastgan.ops.bias_act.small import is_small, rectify
from fastgan.ops.library import symbolic


@symbolic
def leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    """``torch.nn.functional.leaky_relu``: same arguments and results.

    Keeps one bit an element for its derivatives, of which there is any order; no gradient flows to ``input`` through
    the slopes, where PyTorch sends zeros.

    Args:
        input: any shape; of dtypes other than float16, bfloat16, float32 and float64 PyTorch's own runs.
        negative_slope: of the negative half.
        inplace: write over ``input``.
    """
    if input.dtype not in DTYPES:
        return F.leaky_relu(input, negative_slope, inplace)
    if is_small(input) and (negative_slope >= 0 or not inplace):
        return rectify(input, negative_slope, inplace)
    return activate(input, None, 0, Options("leaky_relu", float(negative_slope)), inplace)


@symbolic
def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """``torch.nn.functional.relu``, as `leaky_relu` with slope 0.

    Args:
        input: any shape; of dtypes other than float16, bfloat16, float32 and float64 PyTorch's own runs.
        inplace: write over ``input``.
    """
    if input.dtype not in DTYPES:
        return F.relu(input, inplace)
    if is_small(input):
        return rectify(input, None, inplace)
    return activate(input, None, 0, Options("relu"), inplace)


# Elements from which on, on a CPU, three orders in one pass each are faster than PyTorch's chains.
_LEAST = {"silu": 2**14, "gelu": 2**14, "softplus": 2**17, "tanh": 2**20, "sigmoid": 2**20}


@symbolic
def silu(input: Tensor, inplace: bool = False) -> Tensor:
    """``torch.nn.functional.silu``, x sigmoid(x), differentiable twice."""
    return _smooth(F.silu, "silu", input, inplace)


@symbolic
def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """``torch.nn.functional.gelu``, x times the normal distribution at x, differentiable twice."""
    if not _pays("gelu", input) or approximate not in ("none", "tanh"):
        return F.gelu(input, approximate=approximate)
    return activate(input, None, 0, Options("gelu" if approximate == "none" else "gelu_tanh"))


@symbolic
def tanh(input: Tensor, inplace: bool = False) -> Tensor:
    """``torch.tanh``, differentiable twice; keeps its result."""
    return _smooth(lambda x, inplace: x.tanh_() if inplace else x.tanh(), "tanh", input, inplace)


@symbolic
def sigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """``torch.sigmoid``, differentiable twice; keeps its result."""
    return _smooth(lambda x, inplace: x.sigmoid_() if inplace else x.sigmoid(), "sigmoid", input, inplace)


@symbolic
def softplus(input: Tensor, beta: float = 1, threshold: float = 20) -> Tensor:
    """``torch.nn.functional.softplus``, log(1 + exp(x)), differentiable twice; PyTorch's own for another beta."""
    if not _pays("softplus", input) or beta != 1 or threshold != 20:
        return F.softplus(input, beta, threshold)
    return activate(input, None, 0, Options("softplus"))


def _smooth(plain: Callable[..., Any], activation: str, input: Tensor, inplace: bool) -> Tensor:
    if not _pays(activation, input):
        result: Tensor = plain(input, inplace)
        return result
    return activate(input, None, 0, Options(activation), inplace)


def _pays(activation: str, input: Tensor) -> bool:
    on_cpu = input.device.type == "cpu" and not backends.is_forced()
    return input.dtype in DTYPES and not (on_cpu and input.numel() < _LEAST[activation])
