"""Whether a forward may be let go as soon as the gradient of its inputs is taken, with all that it kept.

The gradient g of a piecewise affine discriminator is made from the incoming gradient, the weights and the masks alone:
no path leads from g back into the forward. A penalty of g then never asks for an activation, and what each node kept is
freed as the first backward passes it.
"""

from __future__ import annotations

from torch.autograd.graph import Node

# PyTorch's nodes from whose backward no path leads to their inputs, whatever these are made from: linear ones, and
# those that choose among elements, by indices or masks.
_CLEAR = frozenset(
    f"{name}Backward{version}"
    for version in (0, 1)
    for name in (
        *("Add", "Sub", "Neg", "Sum", "Mean", "Cat", "Stack", "Clone", "ToCopy", "Alias", "Cumsum"),
        *("View", "UnsafeView", "ReshapeAlias", "T", "Transpose", "Permute", "Squeeze", "Unsqueeze", "Expand"),
        *("Select", "Slice", "Split", "SplitWithSizes", "Unbind", "Repeat", "Flip", "Roll", "Rot90", "Tril", "Triu"),
        *("Gather", "Index", "IndexSelect", "MaskedFill", "Where"),
        *("ConstantPadNd", "PixelShuffle", "PixelUnshuffle", "ChannelShuffle", "Im2Col", "Col2Im"),
        *("UpsampleNearest1D", "UpsampleNearest2D", "UpsampleNearest3D", "UpsampleLinear1D", "UpsampleTrilinear3D"),
        *("UpsampleNearestExact1D", "UpsampleNearestExact2D", "UpsampleNearestExact3D"),
        *("UpsampleBilinear2D", "UpsampleBicubic2D", "UpsampleBilinear2DAa", "UpsampleBicubic2DAa"),
        *("MaxUnpool2D", "MaxUnpool3D", "Max", "Min", "Amax", "Amin", "Maximum", "Minimum", "Fmax", "Fmin"),
        *("Sort", "Topk", "Median", "Kthvalue", "Cummax", "Cummin", "Frac", "NanToNum"),
    )
)
# Products: their backward by one factor reads the other.
_BILINEAR = frozenset({"MulBackward0", "MmBackward0", "AddmmBackward0", "BmmBackward0"})


def may_let_go(path: set[Node], *targets: Node) -> bool:
    """``path``: the nodes that lead from the outputs to ``targets``, the nodes of the inputs."""
    return all(node in targets or _keeps_clear(node, path) for node in path)


def _keeps_clear(node: Node, path: set[Node]) -> bool:
    name = type(node).__name__
    if name in _CLEAR:
        return True
    leading = [following in path for following, _ in node.next_functions]
    if name in _BILINEAR:
        return sum(leading) == 1
    if name == "DivBackward0":
        return not leading[1]
    # Ours say so themselves; as a convolution's weight, something made from the inputs is read.
    return is_piecewise_affine(node) and not any(leading[1:])


def is_piecewise_affine(node: Node) -> bool:
    """Whether this is the node of one of our Functions that is piecewise affine in its first input."""
    return getattr(getattr(node, "_forward_cls", None), "piecewise_affine", False) is True
