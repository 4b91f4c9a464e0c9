"""Convolutions inside fastgan's composite functions. Modes see them as calls of PyTorch's functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgan import torch_private
from fastgan.ops.conv import conv2d as _ours
from fastgan.ops.conv import conv_transpose2d as _ours_transposed


def conv2d(*args: Any, **kwargs: Any) -> Tensor:
    """``ops.conv2d``; PyTorch's function where a mode reroutes or judges it."""
    return _seen(F.conv2d, _ours)(*args, **kwargs)


def conv_transpose2d(*args: Any, **kwargs: Any) -> Tensor:
    """``ops.conv_transpose2d``; PyTorch's function where a mode reroutes or judges it."""
    return _seen(F.conv_transpose2d, _ours_transposed)(*args, **kwargs)


def _seen(pytorchs: Callable[..., Tensor], ours: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return pytorchs if torch.compiler.is_compiling() or torch_private.count_function_modes() else ours
