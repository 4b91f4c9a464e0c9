"""Look up torch functions by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_OWNERS = (torch, Tensor, F, torch.linalg)


def functions(*names: str) -> list[Any]:
    """Return all torch functions, methods and attributes with these names, including the in-place forms."""
    found = []
    for name in names:
        for owner in _OWNERS:
            for form in (name, f"{name}_"):
                function = getattr(owner, form, None)
                if function is not None:
                    found.append(function if callable(function) else getattr(function, "__get__", function))
    return found


def _in_place() -> set[Any]:
    names = {name for owner in _OWNERS for name in dir(owner) if name.endswith("_") and not name.endswith("__")}
    names |= {"__iadd__", "__isub__", "__imul__", "__itruediv__", "__idiv__", "__setitem__"}
    return {getattr(owner, name) for owner in _OWNERS for name in names if callable(getattr(owner, name, None))}


IN_PLACE = _in_place()
# In-place functions whose gradient is independent of the forward, both in PyTorch and in fastgan.
SAFE_IN_PLACE = IN_PLACE.intersection(
    functions(
        *("relu", "leaky_relu", "add", "sub", "mul", "div", "clamp", "clamp_min", "clamp_max", "masked_fill"),
        *("__iadd__", "__isub__", "__imul__", "__itruediv__", "__idiv__", "__setitem__", "copy_"),
        *("fill", "zero"),
    )
)
# Functions that do not read the values of a tensor, or have no effect on the trace.
LOOKS = {
    *functions(
        *("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_leaf", "grad_fn", "grad", "output_nr"),
        *("is_cuda", "is_cpu", "is_sparse", "is_quantized", "is_meta", "itemsize", "nbytes", "_version", "_base"),
    ),
    *functions("size", "dim", "numel", "nelement", "stride", "is_contiguous", "element_size", "storage_offset"),
    *functions("is_floating_point", "is_complex", "is_tensor", "is_same_size", "get_device", "data_ptr"),
    *functions("__len__", "__hash__", "__repr__", "__format__", "requires_grad_", "detach_"),
}
# Functions that read only the dtype, device or shape of their further arguments.
LIKE = {*functions("to", "type_as", "expand_as", "view_as", "reshape_as")}
