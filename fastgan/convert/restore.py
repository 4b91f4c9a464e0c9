"""Undo a conversion."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from fastgan.convert import replace, torch_spectral_norm

M = TypeVar("M", bound=nn.Module)


def revert(model: M) -> M:
    """Restore the original class of every module that ``fastgan.convert`` changed, in place.

    Parameters and buffers stay the same tensors and keep their trained values. Layers that were fastgan's before the
    conversion do not change.

    ```python
    import torch
    import fastgan

    layer = torch.nn.utils.parametrizations.spectral_norm(torch.nn.Linear(8, 1))
    model = torch.nn.Sequential(layer)
    fastgan.convert(model)
    fastgan.revert(model)
    ```

    Args:
        model: a converted model. It is changed in place.

    Returns:
        The model itself.

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
