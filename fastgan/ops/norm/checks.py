"""Checks of the arguments of normalizations. Each error names the argument and what was given."""

from __future__ import annotations

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, torch.float64, *HALF)


def check_input(input: Tensor) -> None:
    if not isinstance(input, Tensor):
        raise TypeError(f"input must be a tensor, got {type(input).__name__}")
    if input.dtype not in DTYPES:
        raise TypeError(f"input must be float16, bfloat16, float32 or float64, got {input.dtype}")


def check_channels(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    check_input(input)
    if input.ndim < 2:
        raise ValueError(f"input must be (N, C, *), got shape {tuple(input.shape)}")
    check_affine("weight", weight, input, (input.shape[1],), "one value per channel")
    check_affine("bias", bias, input, (input.shape[1],), "one value per channel")


def check_affine(name: str, values: Tensor | None, input: Tensor, shape: tuple[int, ...], what: str) -> None:
    if values is None:
        return
    if not isinstance(values, Tensor):
        raise TypeError(f"{name} must be a tensor or None, got {type(values).__name__}")
    if values.dtype != input.dtype and not (values.dtype == torch.float32 and input.dtype in HALF):
        raise TypeError(
            f"{name} must have the input's dtype, {input.dtype}, or float32 if the input is in half precision, "
            f"got {values.dtype}"
        )
    if values.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, {what}, got {tuple(values.shape)}")
    if values.device != input.device:
        raise ValueError(f"{name} must be on the input's device, {input.device}, got {values.device}")


def check_running(input: Tensor, running_mean: Tensor | None, running_var: Tensor | None) -> None:
    for name, values in (("running_mean", running_mean), ("running_var", running_var)):
        if values is not None and not isinstance(values, Tensor):
            raise TypeError(f"{name} must be a tensor or None, got {type(values).__name__}")
        if values is not None and values.shape != input.shape[1:2]:
            expected, given = tuple(input.shape[1:2]), tuple(values.shape)
            raise ValueError(f"{name} must have shape {expected}, one value per channel, or be None, got {given}")
