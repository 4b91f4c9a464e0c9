"""Activation functions with PyTorch's signatures and results, implemented with `bias_act`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from fastgan import backends
from fastgan.ops.bias_act.autograd import activate
from fastgan.ops.bias_act.layout import DTYPES, Options
from fastgan.ops.bias_act.small import is_for_pytorch, rectify
from fastgan.ops.library import symbolic


@symbolic
def leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    """Drop-in for ``torch.nn.functional.leaky_relu`` with the same arguments, results and errors.

    Order of derivative: any. It saves one bit per element for its derivatives. No gradient flows to ``input`` through
    the slopes, whereas PyTorch propagates zeros.

    ```python
    import torch
    import fastgan

    y = fastgan.ops.leaky_relu(torch.randn(8, 64, 16, 16), 0.2)
    ```

    Args:
        input: tensor of any shape. PyTorch's function runs for dtypes other than float16, bfloat16, float32 and
            float64.
        negative_slope: slope for negative values.
        inplace: overwrite ``input``.

    Returns:
        A tensor with the shape and dtype of the input.

    Raises:
        RuntimeError, TypeError, ValueError: as in PyTorch's function.
    """
    if not isinstance(input, Tensor) or input.dtype not in DTYPES:
        return F.leaky_relu(input, negative_slope, inplace)
    if is_for_pytorch(input) and (negative_slope >= 0 or not inplace):
        return rectify(input, negative_slope, inplace)
    return activate(input, None, 0, Options("leaky_relu", float(negative_slope)), inplace)


@symbolic
def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """Drop-in for ``torch.nn.functional.relu`` with the same arguments, results and errors.

    Order of derivative: any. Like `leaky_relu`, it saves one bit per element, and no gradient flows to ``input``
    through the slopes.

    ```python
    import torch
    import fastgan

    y = fastgan.ops.relu(torch.randn(8, 64, 16, 16))
    ```

    Args:
        input: tensor of any shape. PyTorch's function runs for dtypes other than float16, bfloat16, float32 and
            float64.
        inplace: overwrite ``input``.

    Returns:
        A tensor with the shape and dtype of the input.

    Raises:
        RuntimeError, TypeError, ValueError: as in PyTorch's function.
    """
    if not isinstance(input, Tensor) or input.dtype not in DTYPES:
        return F.relu(input, inplace)
    if is_for_pytorch(input):
        return rectify(input, None, inplace)
    return activate(input, None, 0, Options("relu"), inplace)


# Number of elements from which the fused kernels are faster on a CPU than PyTorch's operations, over all three passes.
_LEAST = {"silu": 2**14, "gelu": 2**14, "softplus": 2**17, "tanh": 2**20, "sigmoid": 2**20}


@symbolic
def silu(input: Tensor, inplace: bool = False) -> Tensor:
    """``torch.nn.functional.silu``, x * sigmoid(x), with a fused double backward."""
    return _smooth(F.silu, "silu", input, inplace)


@symbolic
def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """``torch.nn.functional.gelu``, x times the normal CDF at x, with a fused double backward."""
    if not _is_faster("gelu", input) or approximate not in ("none", "tanh"):
        return F.gelu(input, approximate=approximate)
    return activate(input, None, 0, Options("gelu" if approximate == "none" else "gelu_tanh"))


@symbolic
def tanh(input: Tensor, inplace: bool = False) -> Tensor:
    """``torch.tanh`` with a fused double backward. It saves its result."""
    return _smooth(lambda x, inplace: x.tanh_() if inplace else x.tanh(), "tanh", input, inplace)


@symbolic
def sigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """``torch.sigmoid`` with a fused double backward. It saves its result."""
    return _smooth(lambda x, inplace: x.sigmoid_() if inplace else x.sigmoid(), "sigmoid", input, inplace)


@symbolic
def softplus(input: Tensor, beta: float = 1, threshold: float = 20) -> Tensor:
    """``torch.nn.functional.softplus``, log(1 + exp(x)), with a fused double backward.

    PyTorch's function runs for any other beta or threshold.
    """
    if not _is_faster("softplus", input) or beta != 1 or threshold != 20:
        return F.softplus(input, beta, threshold)
    return activate(input, None, 0, Options("softplus"))


def _smooth(plain: Callable[..., Any], activation: str, input: Tensor, inplace: bool) -> Tensor:
    if not _is_faster(activation, input):
        result: Tensor = plain(input, inplace)
        return result
    return activate(input, None, 0, Options(activation), inplace)


def _is_faster(activation: str, input: Tensor) -> bool:
    on_cpu = input.device.type == "cpu" and not backends.is_forced()
    return input.dtype in DTYPES and not (on_cpu and input.numel() < _LEAST[activation])
