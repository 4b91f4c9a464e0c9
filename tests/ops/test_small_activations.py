"""Activations of few elements run PyTorch's operators, with PyTorch's results and no gradient through the slopes."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

import fastgan
from fastgan import ops
from fastgan.ops.bias_act import native_kernels
from fastgan.ops.bias_act.functions import leaky_relu
from tests.harness import DTYPES

PAIRS = {
    "relu": (ops.relu, F.relu),
    "leaky_relu": (partial(leaky_relu, negative_slope=0.2), partial(F.leaky_relu, negative_slope=0.2)),
    "leaky_relu, slope 0": (partial(leaky_relu, negative_slope=0.0), partial(F.leaky_relu, negative_slope=0.0)),
}
each_pair = pytest.mark.parametrize("name", PAIRS)


def gradients(function, x, inplace):
    x = x.clone().requires_grad_()
    y = function(1.0 * x, inplace=inplace)
    (grad,) = torch.autograd.grad(torch.tanh(y).sum(), x, create_graph=True)
    return y, grad, *torch.autograd.grad(grad.square().sum(), x)


@each_pair
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("inplace", [False, True], ids=["copied", "in place"])
def test_every_order_is_pytorchs_to_the_bit(name, dtype, inplace):
    x = torch.randn(3, 5, 7).to(dtype)
    x[0, 0, :3] = torch.tensor([0.0, -0.0, float("inf")])
    for actual, expected in zip(*(gradients(function, x, inplace) for function in PAIRS[name]), strict=True):
        assert torch.equal(actual.nan_to_num(7.0), expected.nan_to_num(7.0))


@each_pair
def test_gradcheck_and_gradgradcheck_hold(name):
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(PAIRS[name][0], x)
    assert gradgradcheck(PAIRS[name][0], x)


@each_pair
@pytest.mark.parametrize("inplace", [False, True], ids=["copied", "in place"])
def test_no_gradient_flows_to_the_input_through_the_slopes(name, inplace):
    x, g = torch.randn(2, 6, requires_grad=True), torch.randn(2, 6, requires_grad=True)
    (grad,) = torch.autograd.grad(PAIRS[name][0](1.0 * x, inplace=inplace), x, g, create_graph=True)
    by_x, by_g = torch.autograd.grad(grad.square().sum(), (x, g), allow_unused=True)
    assert by_x is None
    assert torch.equal(by_g, 2 * grad * (grad / g))


@each_pair
def test_a_result_may_be_written_over_where_pytorchs_may(name):
    refused = pytest.raises(RuntimeError, match="modified by an inplace operation")
    for function in PAIRS[name]:
        x = torch.randn(6, requires_grad=True)
        y = function(1.0 * x).add_(1)
        with refused if name == "relu" else nullcontext():
            y.sum().backward()


@pytest.mark.parametrize("elements", [2**17 - 1, 2**17])
@pytest.mark.parametrize("backend", ["auto", "cpu"])
def test_the_kernels_run_for_more_elements_and_where_they_are_asked_for(elements, backend, monkeypatch):
    calls = []
    whole = native_kernels.piecewise_forward
    monkeypatch.setattr(native_kernels, "piecewise_forward", lambda *a: calls.append(1) or whole(*a))
    with fastgan.use_backend(backend):
        ops.relu(torch.randn(elements, requires_grad=True))
    assert bool(calls) == (backend == "cpu" or elements == 2**17)


def test_a_negative_slope_is_for_the_kernels():
    x = torch.randn(9, dtype=torch.float64, requires_grad=True)
    for inplace in (False, True):
        y = leaky_relu(1.0 * x, -0.5, inplace)
        torch.testing.assert_close(y, torch.where(x > 0, x, -0.5 * x))
        torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], torch.where(x > 0, 1.0, -0.5).double())


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "tanh", "sigmoid", "softplus"])
def test_a_smooth_function_of_few_elements_is_the_reference(activation):
    x, bias = torch.randn(2, 3, 4, requires_grad=True), torch.randn(3, requires_grad=True)
    results = []
    for backend in (None, "reference"):
        y = ops.bias_act(x, bias, activation=activation, gain=1.5, clamp=2.0, backend=backend)
        results.append([y, *torch.autograd.grad(y.square().sum(), (x, bias))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
