from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

from fastgan import ops
from tests.harness import assert_close
from tests.ops.conv_problem import operands

# (function, input, weight, arguments): strides, dilation, groups, named and odd padding, one to three dimensions.
CASES = {
    "conv1d": ("conv1d", (2, 3, 11), (4, 3, 3), dict(stride=2, padding=1)),
    "conv1d same, odd total": ("conv1d", (2, 3, 8), (4, 3, 4), dict(padding="same")),
    "conv2d": ("conv2d", (2, 3, 7, 6), (5, 3, 3, 2), {}),
    "conv2d strided": ("conv2d", (2, 3, 8, 8), (4, 3, 4, 4), dict(stride=2, padding=1)),
    "conv2d dilated groups": ("conv2d", (2, 4, 9, 9), (6, 2, 3, 3), dict(dilation=2, groups=2, padding=(2, 1))),
    "conv2d valid": ("conv2d", (2, 3, 5, 5), (2, 3, 3, 3), dict(padding="valid")),
    "conv2d same": ("conv2d", (2, 3, 6, 6), (2, 3, 3, 4), dict(padding="same", dilation=(1, 1))),
    "conv2d 1x1": ("conv2d", (1, 3, 1, 1), (1, 3, 1, 1), {}),
    "conv3d": ("conv3d", (1, 2, 5, 4, 5), (3, 2, 3, 2, 2), dict(padding=1)),
    "transposed 1d": ("conv_transpose1d", (2, 3, 6), (3, 4, 4), dict(stride=2, padding=1)),
    "transposed 2d": ("conv_transpose2d", (2, 3, 5, 5), (3, 4, 3, 3), dict(stride=2, output_padding=1)),
    "transposed 2d groups": ("conv_transpose2d", (2, 4, 4, 4), (4, 3, 3, 3), dict(groups=2, dilation=2)),
    "transposed 3d": ("conv_transpose3d", (1, 2, 3, 3, 2), (2, 2, 2, 2, 2), dict(stride=2)),
}
PARAMETERS = pytest.mark.parametrize(("name", "shape", "weight", "options"), CASES.values(), ids=CASES)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@PARAMETERS
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_values_and_both_derivatives_equal_pytorchs(name, shape, weight, options, bias):
    results = []
    for function in (getattr(ops, name), getattr(F, name)):
        torch.manual_seed(1)
        x, w, b = operands(name, shape, weight, options, bias=bias)
        inputs = [t for t in (x, w, b) if t is not None]
        y = function(x, w, b, **options)
        first = torch.autograd.grad(y.sin().sum(), inputs, create_graph=True)
        loss = sum(g.square().sum() for g in first)
        results.append([y, *first, *torch.autograd.grad(loss, inputs)])
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected, order=0)


@PARAMETERS
def test_gradcheck_and_gradgradcheck_hold(name, shape, weight, options):
    x, w, b = operands(name, shape, weight, options)
    assert gradcheck(lambda *t: getattr(ops, name)(*t, **options), (x, w, b), fast_mode=True)
    assert gradgradcheck(lambda *t: getattr(ops, name)(*t, **options), (x, w, b), fast_mode=True)


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (True, True)], ids=["input", "weight", "both"])
def test_only_what_requires_a_gradient_gets_one(wanted):
    x, w = torch.randn(2, 3, 5, 5).requires_grad_(wanted[0]), torch.randn(4, 3, 3, 3).requires_grad_(wanted[1])
    ops.conv2d(x, w).sum().backward()
    assert ((x.grad is not None), (w.grad is not None)) == wanted


def test_a_penalty_sends_no_gradient_into_the_forward():
    """PyTorch returns zeros for the input. fastgan must not run the backward of the input."""
    seen = []
    x = torch.randn(2, 3, 5, 5, requires_grad=True)
    made = x * 2
    made.register_hook(lambda grad: None if grad is None else seen.append(grad))
    w = torch.randn(4, 3, 3, 3, requires_grad=True)
    (g,) = torch.autograd.grad(ops.conv2d(made, w).sum(), made, create_graph=True)
    seen.clear()
    g.square().sum().backward()
    assert seen == []
    assert w.grad is not None


def test_channels_last_is_kept():
    x = torch.randn(2, 4, 6, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    w = torch.randn(8, 4, 3, 3).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = ops.conv2d(x, w)
    expected = F.conv2d(x, w)
    assert y.stride() == expected.stride()
    assert_close(y, expected.double(), order=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_computes_in_half_precision_as_pytorchs_does(dtype):
    def results(function, enabled):
        torch.manual_seed(1)
        wide = torch.float32 if enabled else torch.float64
        x, w, b = (t.detach().to(wide).requires_grad_() for t in operands(*CASES["conv2d strided"]))
        with torch.autocast("cpu", dtype, enabled=enabled):
            y = function(x, w, b, stride=2, padding=1)
        (g,) = torch.autograd.grad(y.to(wide).square().sum(), x, create_graph=True)
        g.square().sum().backward()
        return y, g, w.grad

    exact = results(F.conv2d, False)
    for ours, pytorchs, value in zip(results(ops.conv2d, True), results(F.conv2d, True), exact, strict=True):
        assert ours.dtype == pytorchs.dtype
        error, allowed = ((result.double() - value).norm() for result in (ours, pytorchs))
        assert error <= 2 * allowed


def test_autocast_leaves_float64_alone():
    x, w = torch.randn(2, 3, 6, 6).double(), torch.randn(4, 3, 3, 3).double()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.conv2d(x, w), F.conv2d(x, w))


@pytest.mark.parametrize("stride", [(2,), [2, 2], np.int64(2), torch.Size((2, 2)), torch.tensor(2)], ids=repr)
def test_sizes_are_given_in_the_forms_that_pytorch_takes(stride):
    x, w = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3)
    assert torch.equal(ops.conv2d(x, w, stride=stride), F.conv2d(x, w, stride=2))


def test_what_is_not_batched_real_input_is_pytorchs_own():
    x, w = torch.randn(3, 5, 5), torch.randn(4, 3, 3, 3)
    assert torch.equal(ops.conv2d(x, w), F.conv2d(x, w))
    with pytest.raises(RuntimeError, match="Expected"):
        ops.conv2d(torch.randn(2, 3), w)
    with pytest.raises(RuntimeError, match="channels"):
        ops.conv2d(torch.randn(2, 5, 6, 6), w)
    with pytest.raises(ValueError, match="'valid' or 'same', got 'full'"):
        ops.conv2d(x[None], w, padding="full")
    with pytest.raises(ValueError, match="strided"):
        ops.conv2d(x[None], w, padding="same", stride=2)


@pytest.mark.parametrize("function", [ops.leaky_relu, ops.relu, lambda x: ops.avg_pool2d(x, 2)])
def test_piecewise_linear_functions_send_nothing_through_their_derivative(function):
    seen = []
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    made = x * 2
    made.register_hook(lambda grad: None if grad is None else seen.append(grad))
    (g,) = torch.autograd.grad((function(made) * torch.ones(1, requires_grad=True)).sum(), made, create_graph=True)
    seen.clear()
    g.square().sum().backward()
    assert seen == []
