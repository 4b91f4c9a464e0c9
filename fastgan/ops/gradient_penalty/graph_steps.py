"""The piecewise affine functions of PyTorch that a graph of autograd records, and how a tangent passes each of them.

With its masks held fixed, such a function is y = L x + k. A tangent t of its input becomes L t. The node that autograd
has recorded stores all that this needs: weights, masks, strides.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgan.torch_private import shape_of_result

Push = Callable[[Any, Tensor], Tensor]

_convolution_backward: Any = torch.ops.aten.convolution_backward.default
_leaky_relu_backward: Any = torch.ops.aten.leaky_relu_backward.default
_relu_backward: Any = torch.ops.aten.threshold_backward.default
_WRAPPED = 2**63  # nodes return negative dimensions as unsigned numbers


class Kind(NamedTuple):
    """How to differentiate the function of a node. Positions are indices of its ``next_functions``."""

    push: Push  # (node, t) -> L t
    data: tuple[int, ...] = (0,)  # positions of arguments that may depend on the input
    weight: int | None = None  # position of the weight
    bias: int | None = None
    input: str = ""  # the names of the saved input and weight, if there is a weight
    weights: str = "_saved_mat2"
    by_weight: Callable[[Any, Tensor, Tensor], Tensor] | None = None  # (node, input, delta) -> gradient of the weight
    fits: Callable[[Any, int], bool] | None = None  # (node, N) -> whether the node keeps the N samples apart
    sends_zeros: bool = False  # whether PyTorch's double backward returns zeros for its input


def _geometry(node: Any) -> tuple[Any, ...]:
    return (
        node._saved_stride,
        node._saved_padding,
        node._saved_dilation,
        node._saved_transposed,
        node._saved_output_padding,
        node._saved_groups,
    )


def _convolution(node: Any, t: Tensor) -> Tensor:
    return torch.convolution(t, node._saved_weight, None, *_geometry(node))


def _weight_of_convolution(node: Any, input: Tensor, delta: Tensor) -> Tensor:
    mask = False, True, False
    result: Tensor = _convolution_backward(delta, input, node._saved_weight, None, *_geometry(node), mask)[1]
    return result


def _weight_of_product(node: Any, input: Tensor, delta: Tensor) -> Tensor:
    return (delta.t() @ input).t()  # the strides of a transposed weight


def _is_linear(node: Any, samples: int) -> bool:
    return bool(node._saved_alpha == node._saved_beta == 1)


def _reshape(node: Any, t: Tensor) -> Tensor:
    return t.reshape(shape_of_result(node))


def _keeps_rows(node: Any, samples: int) -> bool:
    shape = shape_of_result(node)
    return len(shape) > 0 and shape[0] == samples


def _keeps_shape(node: Any, samples: int) -> bool:
    """Return whether no argument is broadcast in a dimension of the input."""
    shape = shape_of_result(node)
    return all(shape_of_result(following, index) == shape for following, index in node.next_functions if following)


def _adds(node: Any, samples: int) -> bool:
    return node._saved_alpha == 1 and _keeps_shape(node, samples)


def _factor(node: Any) -> Tensor:
    factor: Tensor = node._saved_self if node.next_functions[0][0] is None else node._saved_other
    return factor


def _has_factor(node: Any, samples: int) -> bool:
    (first, second) = node.next_functions
    return (first[0] is None) != (second[0] is None) and (_factor(node).ndim == 0 or _keeps_shape(node, samples))


def _has_divisor(node: Any, samples: int) -> bool:
    return node.next_functions[1][0] is None and (node._saved_other.ndim == 0 or _keeps_shape(node, samples))


def _dims(node: Any) -> tuple[int, ...]:
    ndim = len(node._saved_self_sym_sizes)
    return tuple((d - 2 * _WRAPPED if d >= _WRAPPED else d) % ndim for d in node._saved_dim or ())


def _reduces_other_dims(node: Any, samples: int) -> bool:
    return len(node._saved_self_sym_sizes) > 1 and bool(node._saved_dim) and 0 not in _dims(node)


def _avg_pool(node: Any, t: Tensor) -> Tensor:
    return F.avg_pool2d(
        t,
        node._saved_kernel_size,
        node._saved_stride or None,
        node._saved_padding,
        node._saved_ceil_mode,
        node._saved_count_include_pad,
        node._saved_divisor_override,
    )


def _max_pool(node: Any, t: Tensor) -> Tensor:
    chosen: Tensor = node._saved_result1
    return t.flatten(-2).gather(-1, chosen.flatten(-2)).view(chosen.shape)


def _leaky_relu(node: Any, t: Tensor) -> Tensor:
    result: Tensor = _leaky_relu_backward(t, node._saved_self, node._saved_negative_slope, False)
    return result


def _leaky_relu_in_place(node: Any, t: Tensor) -> Tensor:
    result: Tensor = _leaky_relu_backward(t, node._saved_result, node._saved_negative_slope, True)
    return result


def _relu(node: Any, t: Tensor) -> Tensor:
    result: Tensor = _relu_backward(t, node._saved_result, 0)
    return result


# The names of the nodes. A function that is not listed, such as a smooth activation, needs PyTorch's double backward.
KINDS = {
    "ConvolutionBackward0": Kind(
        _convolution,
        weight=1,
        bias=2,
        input="_saved_input",
        weights="_saved_weight",
        by_weight=_weight_of_convolution,
    ),
    "AddmmBackward0": Kind(
        lambda node, t: t @ node._saved_mat2,
        data=(1,),
        weight=2,
        bias=0,
        input="_saved_mat1",
        by_weight=_weight_of_product,
        fits=_is_linear,
    ),
    "MmBackward0": Kind(
        lambda node, t: t @ node._saved_mat2, weight=1, input="_saved_self", by_weight=_weight_of_product
    ),
    "LeakyReluBackward0": Kind(_leaky_relu, sends_zeros=True),
    "LeakyReluBackward1": Kind(_leaky_relu_in_place, sends_zeros=True),
    "ReluBackward0": Kind(_relu, sends_zeros=True),
    "AvgPool2DBackward0": Kind(_avg_pool, sends_zeros=True),
    "MaxPool2DWithIndicesBackward0": Kind(_max_pool, sends_zeros=True),
    "AddBackward0": Kind(lambda node, t: t, data=(0, 1), fits=_adds),
    "MulBackward0": Kind(lambda node, t: t * _factor(node), data=(0, 1), fits=_has_factor),
    "DivBackward0": Kind(lambda node, t: t / node._saved_other, data=(0, 1), fits=_has_divisor),
    "NegBackward0": Kind(lambda node, t: -t),
    "CloneBackward0": Kind(lambda node, t: t),
    "MeanBackward1": Kind(lambda node, t: t.mean(_dims(node), node._saved_keepdim), fits=_reduces_other_dims),
    "SumBackward1": Kind(lambda node, t: t.sum(_dims(node), node._saved_keepdim), fits=_reduces_other_dims),
    **dict.fromkeys(
        (
            *("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0"),
            *(f"SqueezeBackward{version}" for version in range(6)),  # from 3 on, in place
            *("UnsqueezeBackward0", "UnsqueezeBackward1"),
        ),
        Kind(_reshape, fits=_keeps_rows),
    ),
}
