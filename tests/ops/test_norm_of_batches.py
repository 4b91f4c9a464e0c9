"""Batch and instance norm in the graph of a compiled penalty: PyTorch's numbers, and sizes that may be symbols."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from fastgan.ops.norm import of_batches

EPS = 1e-5


def batch_norm(x, weight, bias):
    return of_batches.batch_norm(x, None, None, weight, bias, 0.1, EPS)


def instance_norm(x, weight, bias):
    return of_batches.instance_norm(x, weight, bias, EPS)


PYTORCH = {
    batch_norm: lambda x, weight, bias: F.batch_norm(x, None, None, weight, bias, True, 0.1, EPS),
    instance_norm: lambda x, weight, bias: F.instance_norm(x, None, None, weight, bias, True, 0.1, EPS),
}
SHAPES = {batch_norm: [(4, 3), (4, 3, 5), (2, 3, 4, 5)], instance_norm: [(4, 3, 5), (2, 3, 4, 5)]}
CASES = [(function, shape) for function, shapes in SHAPES.items() for shape in shapes]


def operands(shape, dtype=torch.float64):
    x, weight, bias = torch.randn(shape), torch.rand(3) + 0.5, torch.randn(3)
    return [t.to(dtype).requires_grad_() for t in (x, weight, bias)]


@pytest.mark.parametrize(("function", "shape"), CASES)
def test_values_and_two_derivatives(function, shape):
    inputs = operands(shape)
    torch.testing.assert_close(function(*inputs), PYTORCH[function](*inputs))
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


@pytest.mark.parametrize("left_out", [(1, 2), (1,), (2,)])
def test_a_missing_weight_or_bias(left_out):
    inputs = [None if i in left_out else x for i, x in enumerate(operands((4, 3, 5)))]
    given = [x for x in inputs if x is not None]

    def function(*tensors):
        rest = iter(tensors)
        return batch_norm(*(None if x is None else next(rest) for x in inputs))

    assert gradcheck(function, given)
    assert gradgradcheck(function, given)


def test_the_third_derivative():
    x, weight, bias = operands((4, 3, 5))

    def slopes(x):
        (grad,) = torch.autograd.grad(batch_norm(x, weight, bias).pow(3).sum(), x, create_graph=True)
        return grad

    assert gradgradcheck(slopes, x)


def test_running_statistics():
    x, weight, bias = operands((4, 3, 5))
    ours, theirs = ([torch.zeros(3).double(), torch.ones(3).double()] for _ in range(2))
    of_batches.batch_norm(x, *ours, weight, bias, 0.1, EPS)
    F.batch_norm(x, *theirs, weight, bias, True, 0.1, EPS)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("function", SHAPES)
def test_a_graph_with_two_derivatives_fits_any_batch(function):
    _, weight, bias = operands((4, 3, 5), torch.float32)

    def penalty(norm, x, weight, bias):
        x = x.detach().requires_grad_()
        (grad,) = torch.autograd.grad(norm(x, weight, bias).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), [x, weight])

    graph = make_fx(partial(penalty, function), tracing_mode="symbolic")(torch.randn(4, 3, 5), weight, bias)
    for n in (2, 6):
        x = torch.randn(n, 3, 5)
        expected = penalty(PYTORCH[function], x, weight, bias)
        torch.testing.assert_close(graph(x, weight, bias), expected, rtol=1e-3, atol=1e-3)
