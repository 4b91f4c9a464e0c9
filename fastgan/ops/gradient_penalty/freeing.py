"""Decide whether the first backward of a penalty may free the saved activations of the forward.

The gradient g of a piecewise affine discriminator depends only on the incoming gradient, the weights and the masks. No
path of the graph leads from g back into the forward, so the derivative of a penalty of g never reads an activation. The
first backward can then free the saved tensors of each node as soon as it has passed the node.
"""

from __future__ import annotations

from collections.abc import Collection

from torch.autograd.graph import Node

# Nodes of PyTorch whose gradient never depends on their inputs: linear functions, and functions that select elements by
# indices or masks.
_AVOID_FORWARD = frozenset(
    f"{name}Backward{version}"
    for version in (0, 1)
    for name in (
        *("Add", "Sub", "Rsub", "Neg", "Sum", "Nansum", "Mean", "Cumsum", "Cat", "Stack", "Clone", "ToCopy", "Alias"),
        *("View", "UnsafeView", "ReshapeAlias", "T", "Transpose", "Permute", "Squeeze", "Unsqueeze", "Expand"),
        *("Select", "Slice", "Split", "SplitWithSizes", "Unbind", "Unfold", "Diagonal", "AsStrided", "Values"),
        *("Repeat", "Flip", "Roll", "Rot90", "Tril", "Triu", "Im2Col", "Col2Im", "UnfoldBackward"),
        *("Index", "IndexSelect", "Gather", "Scatter", "ScatterAdd", "IndexAdd", "IndexCopy"),
        *("IndexPut", "IndexFill", "SliceScatter", "SelectScatter", "DiagonalScatter"),
        *(
            "Where",
            "MaskedFill",
            "MaskedScatter",
            "NativeDropout",
            "Clamp",
            "ClampMin",
            "ClampMax",
            "Maximum",
            "Minimum",
        ),
        *("Amax", "Amin", "Max", "Min", "Fmax", "Fmin", "Sort", "Topk", "Median", "Nanmedian", "Kthvalue"),
        *("Cummax", "Cummin", "Frac", "NanToNum"),
        *("FftR2C", "FftC2C", "FftC2R", "Real", "Imag", "Complex", "ViewAsReal", "ViewAsComplex"),
        *("Conj", "ConjPhysical", "ResolveConj", "ResolveNeg", "NegView"),
        *("ConstantPadNd", "PixelShuffle", "PixelUnshuffle", "ChannelShuffle", "NativeChannelShuffle"),
        *("UpsampleNearest1D", "UpsampleNearest2D", "UpsampleNearest3D"),
        *("UpsampleNearestExact1D", "UpsampleNearestExact2D", "UpsampleNearestExact3D"),
        *("UpsampleLinear1D", "UpsampleBilinear2D", "UpsampleBilinear2DAa", "UpsampleTrilinear3D"),
        *("UpsampleBicubic2D", "UpsampleBicubic2DAa", "MaxUnpool2D", "MaxUnpool3D"),
    )
) | {"LerpBackward0", "CopyBackwards", *(f"SqueezeBackward{version}" for version in range(2, 6))}
# Piecewise affine functions whose double backward returns zeros for their inputs.
SENDS_ZEROS = frozenset(
    f"{name}Backward{version}"
    for version in (0, 1)
    for name in (
        *("Convolution", "LeakyRelu", "Relu", "Prelu", "PreluKernel", "RreluWithNoise", "Hardtanh", "Threshold"),
        *("Softshrink", "Hardshrink", "Abs", "AvgPool2D", "AvgPool3D", "AdaptiveAvgPool2D", "AdaptiveAvgPool3D"),
        *("MaxPool2DWithIndices", "MaxPool3DWithIndices", "AdaptiveMaxPool2D", "AdaptiveMaxPool3D"),
        *("FractionalMaxPool2D", "FractionalMaxPool3D"),
        *(f"{kind}Pad{n}D" for kind in ("Reflection", "Replication") for n in (1, 2, 3)),
    )
)
# Products: the gradient of one factor depends on the others. These are the positions of the factors among the inputs.
_FACTORS = {
    **dict.fromkeys(("MulBackward0", "MmBackward0", "MvBackward0", "BmmBackward0", "LinalgCrossBackward0"), (0, 1)),
    **dict.fromkeys(("AddmmBackward0", "AddmvBackward0", "BaddbmmBackward0", "AddbmmBackward0"), (1, 2)),
    "AddcmulBackward0": (1, 2),
    "TrilinearBackward0": (0, 1, 2),
}
# The position of the input that must be a constant.
_FIXED = {"DivBackward0": 1, "AddcdivBackward0": 2, "LerpBackward1": 2}


def may_free(path: set[Node], *targets: Node) -> bool:
    """Return whether the saved tensors of a forward may be freed.

    Args:
        path: the nodes between the outputs and the inputs.
        targets: the nodes of the inputs.
    """
    return not any(node not in targets and not is_independent_of_forward(node, path) for node in path)


def is_independent_of_forward(node: Node, path: set[Node], also: Collection[str] = ()) -> bool:
    """Return whether the gradient that this node computes is independent of the forward.

    Args:
        node: a node between the outputs and the inputs.
        path: all of these nodes.
        also: names of further nodes for which this holds at this place.
    """
    name = type(node).__name__
    if name in _AVOID_FORWARD or name in also:
        return True
    factors = _FACTORS.get(name)
    fixed = _FIXED.get(name)
    if factors is None and fixed is None and not is_piecewise_affine(node):
        return False
    leading = [following in path for following, _ in node.next_functions]
    if factors is not None:
        return sum(leading[factor] for factor in factors) <= 1
    if fixed is not None:
        return not leading[fixed]
    # fastgan's own Functions are piecewise affine in their first input. The others must not depend on the input.
    return not any(leading[1:])


def is_piecewise_affine(node: Node) -> bool:
    """Return whether the node belongs to a Function of fastgan that is piecewise affine in its first input."""
    return getattr(getattr(node, "_forward_cls", None), "piecewise_affine", False) is True
