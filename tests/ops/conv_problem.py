"""Operands for the tests of convolutions."""

from __future__ import annotations

import torch


def operands(name, shape, weight_shape, options, *, bias=True, dtype=torch.float64):
    x, w = torch.randn(shape, dtype=dtype), torch.randn(weight_shape, dtype=dtype)
    channels = weight_shape[1] * options.get("groups", 1) if "transpose" in name else weight_shape[0]
    b = torch.randn(channels, dtype=dtype) if bias else None
    return [None if t is None else t.requires_grad_() for t in (x, w, b)]
