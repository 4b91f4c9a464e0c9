"""PyTorch's activation functions, as its users call them, and the linear layer that goes with them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fastgan
from fastgan import ops
from fastgan.ops.bias_act import functions, reference
from fastgan.ops.bias_act.layout import SMOOTH, Options
from tests.harness import assert_close


def orders(y, x, count):
    """y and its derivatives by x."""
    results = [y]
    for _ in range(count):
        results += torch.autograd.grad(results[-1].pow(3).sum(), x, create_graph=True)
    return results


# Each as PyTorch's users call it.
ROUTED = {
    "F.silu": lambda x: F.silu(x),
    "SiLU in place": lambda x: nn.SiLU(inplace=True)(x),
    "F.gelu": lambda x: F.gelu(x),
    "GELU tanh": lambda x: nn.GELU(approximate="tanh")(x),
    "torch.tanh": lambda x: torch.tanh(x),
    "F.tanh": lambda x: F.tanh(x),
    "x.tanh_": lambda x: x.tanh_(),
    "Tanh": lambda x: nn.Tanh()(x),
    "torch.sigmoid": lambda x: torch.sigmoid(x),
    "F.sigmoid": lambda x: F.sigmoid(x),
    "x.sigmoid_": lambda x: x.sigmoid_(),
    "Sigmoid": lambda x: nn.Sigmoid()(x),
    "F.softplus": lambda x: F.softplus(x),
    "Softplus": lambda x: nn.Softplus()(x),
    "LeakyReLU in place": lambda x: nn.LeakyReLU(0.3, inplace=True)(x),
    "F.leaky_relu_": lambda x: F.leaky_relu_(x, 0.3),
    "F.relu_": lambda x: F.relu_(x),
    "x.relu": lambda x: x.relu(),
    "negative slope below 0": lambda x: F.leaky_relu(x, -0.5),
}


@pytest.mark.parametrize("call", ROUTED.values(), ids=ROUTED)
def test_pytorchs_functions_are_rerouted_with_equal_derivatives(call):
    x = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    plain = orders(call(x * 1), x, 2)
    with fastgan.twice_differentiable(), fastgan.use_backend("cpu"):
        y = call(x * 1)
    assert type(y.grad_fn).__name__ in ("_PiecewiseBackward", "_SmoothBackward", "CopyBackwards")
    for a, e in zip(orders(y, x, 2), plain, strict=True):
        assert_close(a, e, order=0)


@pytest.mark.parametrize("name", ["silu", "gelu", "tanh", "sigmoid", "softplus"])
def test_small_smooth_activations_stay_pytorchs_unless_a_backend_is_forced(name):
    x = torch.randn(10, requires_grad=True)
    assert type(getattr(functions, name)(x).grad_fn).__name__ != "_SmoothBackward"
    large = torch.randn(2**20, requires_grad=True)
    assert type(getattr(functions, name)(large).grad_fn).__name__ == "_SmoothBackward"


def test_what_is_not_ours_stays_pytorchs():
    x = torch.randn(3, 4, requires_grad=True)
    integers, out = torch.arange(-3, 3), torch.empty(3, 4)
    with fastgan.twice_differentiable():
        assert torch.equal(F.relu(integers), integers.clamp(min=0))
        assert torch.equal(torch.tanh(x.detach(), out=out), out)
        assert torch.equal(F.softplus(x, beta=2), functions.softplus(x, 2, 20))
        with pytest.raises(RuntimeError, match="approximate"):
            F.gelu(x, approximate="sigmoid")
        with torch.autocast("cpu", torch.bfloat16):
            assert type(F.softplus(x).grad_fn).__name__ == "SoftplusBackward0"


@pytest.mark.parametrize("name", ["relu", "leaky_relu", "silu", "gelu", "tanh", "sigmoid", "softplus"])
def test_infinity_and_nan_give_what_pytorch_gives(name):
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0] * 9)
    expected = getattr(F, name)(x)
    with fastgan.use_backend("cpu"):
        actual = getattr(functions, name)(x)
    if name == "gelu":  # PyTorch's vectorized gelu of infinity is NaN; the limit is infinity
        actual, expected = actual[2::2], expected[2::2]
    torch.testing.assert_close(actual, expected, equal_nan=True)


@pytest.mark.parametrize("activation", SMOOTH)
@pytest.mark.parametrize("isa", ["baseline", "best"])
def test_float32_is_within_a_millionth_over_the_whole_line(activation, isa):
    x = torch.cat([torch.linspace(-100, 100, 100_001), torch.linspace(-3, 3, 100_001), torch.tensor([1e-30, -1e-30])])
    exact = x.double().requires_grad_()
    value = reference.bias_act(exact, None, 0, Options(activation))
    (first,) = torch.autograd.grad(value.sum(), exact, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), exact)
    y, f1, f2, one = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x), torch.ones_like(x)
    native, rest = fastgan.backends.native(), ((1, 1, len(x)), Options(activation), 1, isa)
    native.smooth_forward("float32", [x.data_ptr(), 0, y.data_ptr()], *rest)
    tensors = (one, None, one, x, None, f1, f2, None)
    native.smooth_double_backward("float32", [0 if t is None else t.data_ptr() for t in tensors], *rest)
    for actual, expected in ((y, value), (f1, first), (f2, second)):
        error = (actual.double() - expected.detach()).abs() / expected.detach().abs().clamp(min=1)
        assert error.max() < 1e-6


@pytest.mark.parametrize("slope", [0.2, 0.0, 1.0])
@pytest.mark.parametrize("inplace", [False, True])
def test_activations_equal_pytorchs_to_every_order(slope, inplace):
    x = torch.randn(5, 7, dtype=torch.float64)
    results = []
    for function in (ops.leaky_relu, F.leaky_relu) if slope else (ops.relu, F.relu):
        a = x.clone().requires_grad_()
        y = function(a * 1, inplace=inplace) if slope == 0 else function(a * 1, slope, inplace)
        orders = [y]
        for _ in range(3):
            orders.append(torch.autograd.grad(orders[-1].pow(3).sum(), a, create_graph=True)[0])
        results.append(orders)
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected, order=0)


def test_an_activation_in_place_writes_over_its_input():
    x = torch.randn(4, 4, requires_grad=True)
    y = x * 1
    assert ops.leaky_relu(y, 0.1, inplace=True).data_ptr() == y.data_ptr()
    with pytest.raises(RuntimeError, match="leaf"):
        ops.relu(x, inplace=True)


def test_a_penalty_forms_no_weight_gradient_of_a_linear_layer_in_its_first_pass():
    class Count(TorchDispatchMode):
        products = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.products += func.name() in ("aten::mm", "aten::addmm")
            return func(*args, **(kwargs or {}))

    critic = nn.Sequential(nn.Linear(6, 5), nn.LeakyReLU(0.2), nn.Linear(5, 1))
    x = torch.randn(4, 6, requires_grad=True)
    with Count() as forward, fastgan.twice_differentiable():
        logits = critic(x)
    with Count() as first:
        (grad,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
    with Count() as second:
        grad.square().sum().backward()
    # Two layers: W x, W^T g, and for each one product with W and one for its weight; none for the ones at the end.
    assert (forward.products, first.products, second.products) == (2, 2, 3)


def test_linear_is_pytorchs():
    x, w, b = torch.randn(3, 4), torch.randn(5, 4), torch.randn(5)
    assert torch.equal(ops.linear(x, w, b), F.linear(x, w, b))
