"""Whether a forward may be let go as soon as the gradient of its inputs is taken, with all that it kept.

The gradient g of a piecewise affine discriminator is made from the incoming gradient, the weights and the masks alone:
no path leads from g back into the forward. A penalty of g then never asks for an activation, and what each node kept is
freed as the first backward passes it.
"""

from __future__ import annotations

from collections.abc import Collection

from torch.autograd.graph import Node

# PyTorch's nodes from whose backward no path leads to their inputs, whatever these are made from: linear ones, and
# those that choose among elements, by indices or masks.
_CLEAR = frozenset(
    f"{name}Backward{version}"
    for version in (0, 1)
    for name in (
        *("Add", "Sub", "Rsub", "Neg", "Sum", "Nansum", "Mean", "Cumsum", "Cat", "Stack", "Clone", "ToCopy", "Alias"),
        *("View", "UnsafeView", "ReshapeAlias", "T", "Transpose", "Permute", "Squeeze", "Unsqueeze", "Expand"),
        *("Select", "Slice", "Split", "SplitWithSizes", "Unbind", "Unfold", "Diagonal", "AsStrided", "Values"),
        *("Repeat", "Flip", "Roll", "Rot90", "Tril", "Triu", "Im2Col", "Col2Im"),
        *("Index", "IndexSelect", "Gather", "Scatter", "ScatterAdd", "IndexAdd", "IndexCopy"),
        *("Where", "MaskedFill", "NativeDropout", "Clamp", "ClampMin", "ClampMax", "Maximum", "Minimum"),
        *("Amax", "Amin", "Max", "Min", "Fmax", "Fmin", "Sort", "Topk", "Median", "Nanmedian", "Kthvalue"),
        *("Cummax", "Cummin", "Frac", "NanToNum"),
        *("ConstantPadNd", "PixelShuffle", "PixelUnshuffle", "ChannelShuffle", "NativeChannelShuffle"),
        *("UpsampleNearest1D", "UpsampleNearest2D", "UpsampleNearest3D"),
        *("UpsampleNearestExact1D", "UpsampleNearestExact2D", "UpsampleNearestExact3D"),
        *("UpsampleLinear1D", "UpsampleBilinear2D", "UpsampleBilinear2DAa", "UpsampleTrilinear3D"),
        *("UpsampleBicubic2D", "UpsampleBicubic2DAa", "MaxUnpool2D", "MaxUnpool3D"),
    )
) | {"LerpBackward0"}
# Piecewise affine ones whose double backward sends zeros back into the forward.
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
# Products: their backward by one factor reads the others. The positions of the factors among the node's inputs.
_FACTORS = {
    **dict.fromkeys(("MulBackward0", "MmBackward0", "MvBackward0", "BmmBackward0"), (0, 1)),
    **dict.fromkeys(("AddmmBackward0", "AddmvBackward0", "BaddbmmBackward0", "AddbmmBackward0"), (1, 2)),
    "AddcmulBackward0": (1, 2),
    "TrilinearBackward0": (0, 1, 2),
}
# The position of what must be a constant.
_FIXED = {"DivBackward0": 1, "AddcdivBackward0": 2, "LerpBackward1": 2}


def may_let_go(path: set[Node], *targets: Node) -> bool:
    """``path``: the nodes that lead from the outputs to ``targets``, the nodes of the inputs."""
    return not any(node not in targets and not keeps_clear(node, path) for node in path)


def keeps_clear(node: Node, path: set[Node], also: Collection[str] = ()) -> bool:
    """Whether nothing made by this node's backward leads back into the forward.

    ``also``: names of nodes that are known to, as they are used here.
    """
    name = type(node).__name__
    if name in _CLEAR or name in also:
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
    # Ours say so themselves; as a convolution's weight, something made from the inputs is read.
    return not any(leading[1:])


def is_piecewise_affine(node: Node) -> bool:
    """Whether this is the node of one of our Functions that is piecewise affine in its first input."""
    return getattr(getattr(node, "_forward_cls", None), "piecewise_affine", False) is True
