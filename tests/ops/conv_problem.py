"""Operands for the tests of convolutions."""

from __future__ import annotations

import pytest
import torch

from fastgan import backends

needs_kernel = pytest.mark.skipif(backends.native() is None, reason="there is no native module")


def operands(name, shape, weight_shape, options, *, bias=True, dtype=torch.float64):
    x, w = torch.randn(shape, dtype=dtype), torch.randn(weight_shape, dtype=dtype)
    channels = weight_shape[1] * options.get("groups", 1) if "transpose" in name else weight_shape[0]
    b = torch.randn(channels, dtype=dtype) if bias else None
    return [None if t is None else t.requires_grad_() for t in (x, w, b)]


def orders(function, inputs, options):
    """Return the gradient of the input, and the gradients of a penalty of it."""
    y = function(*inputs, **options)
    by = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y).requires_grad_()
    (grad,) = torch.autograd.grad(y, inputs[0], by, create_graph=True)
    return [grad, *torch.autograd.grad(grad.square().sum(), [by, inputs[1]])]


def set_of_calls(monkeypatch, way, *names):
    calls = set()
    for name in names:
        function = getattr(way, name)

        def noted(*arguments, function=function, name=name):
            calls.add(name)
            return function(*arguments)

        monkeypatch.setattr(way, name, noted)
    return calls
