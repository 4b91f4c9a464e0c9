"""Results of empty inputs, with derivatives of every order, all zero."""

from __future__ import annotations

from torch import Tensor


def constant_in(value: Tensor, *inputs: Tensor) -> Tensor:
    """Return ``value``, connected to the inputs. It must be empty, or the inputs must be."""
    for x in inputs:
        value = value + 0 * x.sum()
    return value
