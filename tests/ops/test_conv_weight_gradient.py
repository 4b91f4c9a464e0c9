"""The gradient of a convolution's weight where outputs have few pixels, on a CPU."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fastgan import backends, ops, use_backend
from fastgan.ops.conv import weight_gradient
from tests.harness import assert_close
from tests.ops.conv_problem import needs_kernel, operands, set_of_calls

# name -> shapes of input and weight, options: rows of kernels that are copied whole, in parts and value by value;
# blocks of lanes and tiles of rows that are left over
FEW = {
    "one": ((3, 9, 4, 4), (5, 9, 4, 4), {}),
    "one of many": ((300, 64, 2, 2), (160, 64, 2, 2), {}),
    "a row": ((2, 4, 9), (6, 4, 3), dict(stride=2)),
    "four": ((3, 8, 6, 6), (5, 8, 3, 3), dict(stride=3, padding=1)),
    "four, dilated": ((3, 8, 5, 7), (5, 8, 3, 3), dict(padding=(0, 1), dilation=(2, 4))),
    "sixteen of steps": ((9, 8, 9, 8), (17, 8, 4, 4), dict(stride=2, padding=1)),
    "wide kernel": ((2, 5, 9, 9), (8, 5, 7, 6), dict(stride=2, padding=(1, 2))),
    "fifteen": ((4, 33, 5, 3), (40, 33, 3, 3), dict(padding=1)),
    "rows that no step reaches": ((3, 8, 8, 9), (5, 8, 3, 2), dict(stride=4)),
    "more zeros than kernel": ((3, 8, 2, 2), (5, 8, 2, 2), dict(stride=3, padding=4)),
}


@pytest.fixture
def calls(monkeypatch):
    return set_of_calls(monkeypatch, weight_gradient, "weight_gradient")


@needs_kernel
@pytest.mark.parametrize(("shape", "weight", "options"), FEW.values(), ids=FEW)
def test_the_cpu_kernel_gives_the_weights_gradient_of_few_pixels(shape, weight, options, calls):
    name = f"conv{len(shape) - 2}d"
    leaves = operands(name, shape, weight, options, dtype=torch.float32)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    results = []
    for function, inputs in ((getattr(ops, name), leaves), (getattr(F, name), exact)):
        y = function(*inputs, **options)
        first = torch.autograd.grad(y.sin().sum(), inputs, create_graph=True)
        results.append([*first, *torch.autograd.grad(sum(g.square().sum() for g in first), inputs)])
    assert calls
    for i, (actual, expected) in enumerate(zip(*results, strict=True)):
        assert actual.is_contiguous()
        assert_close(actual, expected, order=1 if i < 3 else 2)


@needs_kernel
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("shape", "weight", "options"), FEW.values(), ids=FEW)
def test_every_instruction_set_of_the_cpu_kernel_gives_that_gradient(shape, weight, options, threads, isa):
    name, dimensions = f"conv{len(shape) - 2}d", len(shape) - 2
    x, w, _ = operands(name, shape, weight, options, dtype=torch.float32)
    exact = w.detach().double().requires_grad_()
    y = getattr(F, name)(x.double(), exact, **options)
    grad, result = torch.randn(y.shape), torch.full_like(w, torch.nan)
    given = options.get("stride", 1), options.get("padding", 0), options.get("dilation", 1)
    slides = ((size,) * dimensions if isinstance(size, int) else size for size in given)
    plane = [(1, 1, 1, 1, 0, 1), *zip(x.shape[2:], y.shape[2:], w.shape[2:], *slides, strict=True)][-2:]
    addresses = grad.data_ptr(), x.data_ptr(), result.data_ptr()
    try:
        backends.native().conv_weight_gradient(*addresses, len(x), x.shape[1], len(w), plane, threads, isa)
    except ValueError as error:
        pytest.skip(str(error))
    assert_close(result, torch.autograd.grad(y, exact, grad.double())[0], order=1)


# name -> shapes of input and weight, options
OTHERS = {
    "seventeen": ((3, 8, 19, 3), (5, 8, 3, 3), {}),
    "many samples": ((20, 8, 6, 6), (5, 8, 3, 3), {}),
    "groups": ((3, 8, 4, 4), (6, 4, 4, 4), dict(groups=2)),
    "3d": ((3, 8, 4, 4, 4), (6, 8, 4, 4, 4), {}),
    "channels_last": ((3, 8, 4, 4), (6, 8, 4, 4), {}),
    "double": ((3, 8, 4, 4), (6, 8, 4, 4), {}),
    "reference": ((3, 8, 4, 4), (6, 8, 4, 4), {}),
}


@needs_kernel
@pytest.mark.parametrize("change", OTHERS)
def test_what_that_kernel_does_not_take_is_the_vendors(change, calls):
    shape, kernel, options = OTHERS[change]
    dtype = torch.float64 if change == "double" else torch.float32
    x, w, _ = operands(f"conv{len(shape) - 2}d", shape, kernel, options, dtype=dtype)
    if change == "channels_last":
        x = x.detach().to(memory_format=torch.channels_last)
    conv = f"conv{len(shape) - 2}d"
    with use_backend("reference" if change == "reference" else "auto"):
        y = getattr(ops, conv)(x, w, **options)
    (actual,) = torch.autograd.grad(y, w, torch.ones_like(y))
    assert not calls
    expected = getattr(F, conv)(x, w, **options)
    assert_close(actual, torch.autograd.grad(expected, w, torch.ones_like(expected))[0].double(), order=1)


@needs_kernel
def test_a_bias_alone_costs_no_weights_gradient(monkeypatch):
    """oneDNN would also compute the gradient of the weight."""
    x, w, b = operands("conv2d", (3, 8, 9, 9), (6, 8, 3, 3), {}, dtype=torch.float32)
    y = ops.conv2d(x, w.detach(), b)
    seen = []
    backward = torch.ops.aten.convolution_backward
    monkeypatch.setattr(torch.ops.aten, "convolution_backward", lambda *a: (seen.append(a[-1]), backward(*a))[1])
    by_x, by_b = torch.autograd.grad(y, (x, b), torch.ones_like(y))
    assert seen in ([], [(True, False, False)])
    assert_close(by_b, torch.full((6,), 3.0 * 49, dtype=torch.float64), order=1)
    assert_close(by_x, torch.autograd.grad(F.conv2d(x, w, b).sum(), x)[0].double(), order=1)


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("which", ["input", "weight", "both", "neither"])
def test_the_weights_gradient_of_few_pixels_has_the_memory_format_of_pytorchs(which, size):
    results = []
    for conv in (ops.conv2d, F.conv2d):
        x, w = torch.randn(3, 9, size, size), torch.randn(5, 9, size, size)
        x = x.to(memory_format=torch.channels_last) if which in ("input", "both") else x
        w = w.to(memory_format=torch.channels_last) if which in ("weight", "both") else w
        y = conv(x, w.requires_grad_())
        results.append(torch.autograd.grad(y, w, torch.ones_like(y))[0].stride())
    assert results[0] == results[1]
