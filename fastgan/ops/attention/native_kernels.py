"""Calls into fastgan._native. Only this file of the op passes raw addresses; None becomes the address 0."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgan import backends
from fastgan.ops.library import data_pointers, dtype_name


def derive(scores: Tensor, apart: Tensor, tangent: Tensor | None, values: Tensor | None, moved: Tensor | None) -> None:
    """``blocks.derive`` in one pass. ``moved`` may be ``values``."""
    tensors = data_pointers(scores, apart, tangent, values, moved)
    columns = scores.shape[-1]
    sizes = scores.numel() // columns, columns
    backends.native().attention_block(dtype_name(scores), tensors, sizes, torch.get_num_threads())
