"""Gives parameters the same gradients of zeros or None in fastgan's steps as in PyTorch's.

An optimizer with momentum or weight decay moves a parameter whose gradient is zeros, and skips one without a gradient.
`fill_zeros` adds the zeros of PyTorch's double backward that the graph shows. This module corrects all others, from the
gradients of a step that ran PyTorch's functions.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


class Pattern:
    """The parameters whose gradients were zeros, and those that had none, in a plain step.

    Only parameters that the penalized forward used count. A model may skip layers at random.
    """

    def __init__(self) -> None:
        self._zeros: WeakKeyDictionary[torch.optim.Optimizer, list[Any]] = WeakKeyDictionary()
        self._none: WeakKeyDictionary[torch.optim.Optimizer, list[Any]] = WeakKeyDictionary()

    @property
    def is_empty(self) -> bool:
        return not any((*self._zeros.values(), *self._none.values()))

    def knows(self, optimizer: torch.optim.Optimizer) -> bool:
        return optimizer in self._zeros

    def note(self, optimizer: torch.optim.Optimizer, used: set[int]) -> None:
        """Args:
        used: ids of the parameters that this step's penalized forward used.
        """
        parameters = [parameter for parameter in parameters_of(optimizer) if id(parameter) in used]
        self._none[optimizer] = [ref(parameter) for parameter in parameters if parameter.grad is None]
        self._zeros[optimizer] = [ref(parameter) for parameter in parameters if _is_zeros(parameter.grad)]

    def restore(self, optimizer: torch.optim.Optimizer, used: set[int]) -> int:
        """Restore zeros and None as in the plain step, and return the number of changed parameters."""
        changed = 0
        for reference in self._zeros.get(optimizer, ()):
            parameter = reference()
            if parameter is not None and id(parameter) in used and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
                changed += 1
        for reference in self._none.get(optimizer, ()):
            parameter = reference()
            if parameter is not None and id(parameter) in used and _is_zeros(parameter.grad):
                parameter.grad = None
                changed += 1
        return changed


def _is_zeros(grad: Tensor | None) -> bool:
    return grad is not None and grad.layout == torch.strided and not grad.any()
