"""Convolutions inside fastgan's composite functions. Modes see them as calls of PyTorch's functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgan import torch_private
from fastgan.ops.conv import conv2d as _fused
from fastgan.ops.conv import conv_transpose2d as _fused_transposed


def conv2d(*args: Any, **kwargs: Any) -> Tensor:
    """Call ``ops.conv2d``, or PyTorch's function if a mode or torch.compile watches the calls."""
    return _choose(F.conv2d, _fused)(*args, **kwargs)


def conv_transpose2d(*args: Any, **kwargs: Any) -> Tensor:
    """Call ``ops.conv_transpose2d``, or PyTorch's function if a mode or torch.compile watches the calls."""
    return _choose(F.conv_transpose2d, _fused_transposed)(*args, **kwargs)


def _choose(original: Callable[..., Tensor], fused: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return original if torch.compiler.is_compiling() or torch_private.count_function_modes() else fused
