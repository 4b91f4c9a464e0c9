"""Undoing a conversion."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from fastgan.convert import replace, torch_spectral_norm

M = TypeVar("M", bound=nn.Module)


def revert(model: M) -> M:
    """Give every module that ``fastgan.convert`` changed its own class back, in place.

    Parameters and buffers stay the same tensors, with the values that training has given them. What was fastgan's
    before the conversion stays so.

    Raises:
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        if replace.is_converted(module):
            replace.restore(module)
    torch_spectral_norm.restore(model)
    return model
