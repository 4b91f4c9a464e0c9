"""fastgan's convolutions on a CPU: few channels, and 1x1 kernels."""

from __future__ import annotations

from math import prod

import pytest
import torch
from torch.nn import functional as F
from torch.testing._internal.two_tensor import TwoTensor

from fastgan import backends, ops, use_backend
from fastgan.ops.conv import native_kernels, pointwise, weight_gradient
from tests.harness import assert_close
from tests.ops.conv_problem import needs_kernel, operands, orders, set_of_calls

# Inputs with few channels: more and fewer columns than a vector has lanes, and every kind of row.
NARROW = {
    "dilated": ((2, 3, 40, 36), (40, 3, 2, 1), dict(dilation=3)),
    "3x3": ((2, 3, 33, 37), (20, 3, 3, 3), dict(padding=1)),
    "halving": ((2, 1, 46, 70), (16, 1, 4, 4), dict(stride=2, padding=1)),
    "few columns": ((3, 6, 24, 9), (32, 6, 3, 2), dict(stride=(1, 2))),
    "rows left over": ((1, 3, 68, 68), (12, 3, 5, 3), dict(stride=3, padding=(4, 0), dilation=(2, 3))),
    "kernel beyond stride": ((2, 2, 50, 50), (48, 2, 2, 2), dict(stride=(5, 4))),
    "1d": ((4, 2, 600), (8, 2, 9), dict(stride=3, padding=4, dilation=2)),
    "whole vectors": ((2, 3, 8, 64), (16, 3, 3, 3), dict(padding=1)),
    "whole vectors of steps": ((2, 3, 16, 64), (16, 3, 4, 4), dict(stride=2, padding=1)),
}


def noted(monkeypatch, way):
    """Record calls of one implementation of the input gradient."""
    calls, function = [], way.input_gradient

    def note(*arguments):
        calls.append(arguments)
        return function(*arguments)

    monkeypatch.setattr(way, "input_gradient", note)
    return calls


@pytest.fixture
def narrow_calls(monkeypatch):
    return noted(monkeypatch, native_kernels)


@pytest.mark.parametrize(("shape", "weight", "options"), NARROW.values(), ids=NARROW)
@pytest.mark.parametrize("threads", [1, 3])
def test_the_cpu_kernel_gives_the_gradient_of_an_input_of_few_channels(shape, weight, options, threads, narrow_calls):
    name = f"conv{len(shape) - 2}d"
    x, w, b = operands(name, shape, weight, options, dtype=torch.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        actual = orders(getattr(ops, name), (x, w, b), options)
    finally:
        torch.set_num_threads(before)
    assert narrow_calls
    exact = [t.detach().double().requires_grad_() for t in (x, w, b)]
    for order, (result, expected) in enumerate(zip(actual, orders(getattr(F, name), exact, options), strict=True)):
        assert_close(result, expected, order=min(order, 2))


@needs_kernel
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_of_the_cpu_kernel_gives_that_gradient(isa):
    grad, weight, x = torch.randn(2, 16, 20, 21), torch.randn(16, 3, 4, 4), torch.empty(2, 3, 40, 42)
    dimensions = [(40, 20, 4, 2, 1, 1), (42, 21, 4, 2, 1, 1)]
    addresses = grad.data_ptr(), weight.data_ptr(), x.data_ptr()
    try:
        backends.native().conv_input_gradient(*addresses, 2, 3, 16, dimensions, 2, isa)
    except ValueError as error:
        pytest.skip(str(error))
    assert_close(x, F.conv_transpose2d(grad.double(), weight.double(), stride=2, padding=1), order=1)


@pytest.mark.parametrize("change", ["double", "channels_last", "reference", "groups", "small", "many channels"])
def test_what_the_cpu_kernel_does_not_take_is_the_vendors(change, narrow_calls):
    channels = 8 if change == "many channels" else 3
    x = torch.randn(2, channels, 4 if change == "small" else 32, 32, requires_grad=True)
    w = torch.randn(9, 1 if change == "groups" else channels, 3, 3)
    if change == "double":
        x, w = x.detach().double().requires_grad_(), w.double()
    if change == "channels_last":
        x = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    options = dict(padding=1, groups=3 if change == "groups" else 1)
    with use_backend("reference" if change == "reference" else "auto"):
        y = ops.conv2d(x, w, **options)
        (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert not narrow_calls
    (expected,) = torch.autograd.grad(F.conv2d(x, w, **options).sum(), x)
    assert_close(grad, expected.double(), order=1)


# Rows and lanes that are full, idle or left over; samples that share a panel of positions, and panels of one sample.
POINTWISE = {
    "1d": ((3, 33, 70), (40, 33, 1)),
    "2d": ((2, 32, 9, 8), (64, 32, 1, 1)),
    "3d": ((2, 40, 4, 3, 5), (9, 40, 1, 1, 1)),
    "small samples": ((21, 36, 2, 3), (35, 36, 1, 1)),
    "quarters of a panel": ((5, 8, 4, 4), (48, 8, 1, 1)),
    "one position": ((3, 70, 1), (34, 70, 1)),
    "one output": ((4, 64, 7, 5), (1, 64, 1, 1)),
    "many positions": ((2, 3, 48, 47), (32, 3, 1, 1)),
}


@pytest.fixture
def pointwise_calls(monkeypatch):
    """Record the 1x1 functions that run, on any processor as on one with long vectors."""
    if backends.native() is None:
        pytest.skip("there is no native module")
    monkeypatch.setattr(pointwise, "TAKEN", (backends.native().isa(),))
    calls = set_of_calls(monkeypatch, pointwise, "forward", "input_gradient")
    return calls, set_of_calls(monkeypatch, weight_gradient, "weight_gradient")


def all_of(calls):
    return set.union(*calls)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(("shape", "weight"), POINTWISE.values(), ids=POINTWISE)
def test_the_cpu_kernel_gives_convolutions_of_one_pixel(shape, weight, bias, pointwise_calls):
    name = f"conv{len(shape) - 2}d"
    leaves = operands(name, shape, weight, {}, bias=bias, dtype=torch.float32)
    exact = [None if t is None else t.detach().double().requires_grad_() for t in leaves]
    results = []
    for function, (x, w, b) in ((getattr(ops, name), leaves), (getattr(F, name), exact)):
        y = function(x, w, b)
        inputs = [t for t in (x, w, b) if t is not None]
        first = torch.autograd.grad(y.sin().sum(), inputs, create_graph=True)
        results.append([y, *first, *torch.autograd.grad(sum(g.square().sum() for g in first), inputs)])
    few_channels = weight[1] <= 6  # the kernel for few channels then computes the gradient of the input
    assert all_of(pointwise_calls) == {"forward", "weight_gradient"} | (set() if few_channels else {"input_gradient"})
    for i, (actual, expected) in enumerate(zip(*results, strict=True)):
        assert actual.is_contiguous()
        assert_close(actual, expected, order=0 if i == 0 else 1 if i <= len(inputs) else 2)


@needs_kernel
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("shape", "weight"), POINTWISE.values(), ids=POINTWISE)
def test_every_instruction_set_of_the_cpu_kernel_gives_convolutions_of_one_pixel(shape, weight, threads, isa):
    name = f"conv{len(shape) - 2}d"
    x, w, b = operands(name, shape, weight, {}, dtype=torch.float32)
    exact = [t.detach().double().requires_grad_() for t in (x, w, b)]
    y = getattr(F, name)(*exact)
    grad = torch.randn(y.shape)
    by_y, by_x, by_w = (torch.full(t.shape, torch.nan) for t in (y, x, w))
    pixels = prod(shape[2:])
    sizes = len(x), x.shape[1], len(w)
    native = backends.native()
    addresses = x.data_ptr(), w.data_ptr(), b.data_ptr(), by_y.data_ptr()
    try:
        native.conv_pointwise_forward(*addresses, *sizes, pixels, threads, isa)
    except ValueError as error:
        pytest.skip(str(error))
    addresses = grad.data_ptr(), w.data_ptr(), by_x.data_ptr()
    native.conv_pointwise_input_gradient(*addresses, *sizes, pixels, threads, isa)
    plane = [native_kernels.ONE_ROW, (pixels, pixels, 1, 1, 0, 1)]
    native.conv_weight_gradient(grad.data_ptr(), x.data_ptr(), by_w.data_ptr(), *sizes, plane, threads, isa)
    assert_close(by_y, y, order=0)
    for actual, expected in zip((by_x, by_w), torch.autograd.grad(y, exact[:2], grad.double()), strict=True):
        assert_close(actual, expected, order=1)


@pytest.mark.parametrize(("size", "stride"), [(1, 1), (4, 2)])
def test_a_bias_may_lie_in_steps(size, stride, pointwise_calls):
    x, w, _ = operands("conv2d", (4, 32, 20, 20), (32, 32, size, size), {}, dtype=torch.float32)
    b = torch.randn(64)[::2]
    assert_close(ops.conv2d(x, w, b, stride), F.conv2d(x.double(), w.double(), b.double(), stride), order=0)


def test_convolutions_of_one_pixel_are_the_same_bits_for_any_number_of_threads(pointwise_calls):
    x, w, b = operands("conv2d", (5, 40, 9, 33), (72, 40, 1, 1), {}, dtype=torch.float32)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            y = ops.conv2d(x, w, b)
            results.append([y, *torch.autograd.grad(y, (x, w), torch.ones_like(y))])
    finally:
        torch.set_num_threads(before)
    assert all_of(pointwise_calls) == {"forward", "input_gradient", "weight_gradient"}
    for others in results[1:]:
        assert all(map(torch.equal, results[0], others))


def test_the_weights_gradient_of_one_pixel_keeps_its_digits_over_many_positions(pointwise_calls):
    """The kernel adds partial sums. Adding a hundred thousand products one by one would lose digits of float32."""
    x, w = torch.rand(2, 32, 256, 256), torch.randn(8, 32, 1, 1, requires_grad=True)
    y = ops.conv2d(x, w)
    (actual,) = torch.autograd.grad(y, w, torch.ones_like(y))
    assert "weight_gradient" in all_of(pointwise_calls)
    expected = x.double().sum((0, 2, 3)).expand(8, -1)
    assert ((actual.flatten(1) - expected).abs() / expected).max() < 2e-6


@pytest.mark.parametrize(
    "options",
    [dict(stride=2), dict(padding=1), dict(groups=3), "channels_last", "double", "bfloat16", "reference", "3x3"],
    ids=str,
)
def test_other_convolutions_are_not_of_that_kernel(options, pointwise_calls):
    x, w = torch.randn(2, 3, 8, 8), torch.randn(6, 3, 1, 1)
    if options == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    if options in ("double", "bfloat16"):
        x, w = (t.to(getattr(torch, options)) for t in (x, w))
    if options == "3x3":
        w = torch.randn(6, 3, 3, 3)
    options, backend = (options, "auto") if isinstance(options, dict) else ({}, options)
    w = w[:, :1] if "groups" in options else w
    with use_backend("reference" if backend == "reference" else "auto"):
        y = ops.conv2d(x, w, **options)
    assert not all_of(pointwise_calls)
    assert torch.equal(y, F.conv2d(x, w, **options))


@pytest.mark.parametrize("channels", [3, 40], ids=["few channels", "many channels"])
def test_an_activation_in_place_may_follow_a_kernel_of_size_one(channels):
    leaves = operands("conv2d", (2, channels, 3, 2), (30, channels, 1, 1), {}, dtype=torch.float32)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    results = []
    for conv, (x, w, b) in ((ops.conv2d, leaves), (F.conv2d, exact)):
        first = torch.autograd.grad(conv(x, w, b).tanh_().sum(), (x, w), create_graph=True)
        results.append([*first, *torch.autograd.grad(sum(g.square_().sum() for g in first), (x, w, b))])
    for i, (actual, expected) in enumerate(zip(*results, strict=True)):
        assert_close(actual, expected.double(), order=1 if i < 2 else 2)


def pointwise_operands():
    return operands("conv2d", (2, 3, 9, 8), (6, 3, 1, 1), {}, dtype=torch.float32)


@pytest.mark.parametrize(
    ("shape", "weight", "bias", "options"),
    [
        ((2, 4, 5, 5), (6, 3, 1, 1), None, {}),
        ((2, 3, 5, 5), (6, 3, 1, 1), torch.randn(1), {}),
        ((2, 3, 5, 5), (6, 3, 1, 1), torch.randn(6, 1), {}),
        ((2, 3, 5, 5), (0, 3, 1, 1), None, {}),
        ((2, 3, 5, 5), (6, 3, 1, 1), None, dict(dilation=0)),
        ((2, 3, 5, 5), (6, 3, 1, 1), None, dict(stride=(1, 1, 1))),
    ],
    ids=["channels", "one bias", "bias of two dimensions", "no outputs", "dilation", "strides"],
)
def test_what_pytorch_refuses_of_a_kernel_of_size_one_is_refused_alike(shape, weight, bias, options):
    x, w = torch.randn(shape), torch.randn(weight)
    with pytest.raises(RuntimeError) as expected, use_backend("reference"):
        ops.conv2d(x, w, bias, **options)
    with pytest.raises(RuntimeError) as actual:
        ops.conv2d(x, w, bias, **options)
    assert str(actual.value) == str(expected.value)


@pytest.mark.parametrize("spatial", [(4, 5), (1, 1)], ids=str)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("which", ["input", "weight", "both", "neither"])
def test_a_kernel_of_size_one_gives_the_memory_format_that_pytorchs_does(which, channels, spatial):
    results = []
    for conv in (ops.conv2d, F.conv2d):
        x, w, _ = operands("conv2d", (2, channels, *spatial), (6, channels, 1, 1), {}, dtype=torch.float32)
        x, w = (
            t.detach().to(memory_format=torch.channels_last).requires_grad_() if which in (name, "both") else t
            for name, t in (("input", x), ("weight", w))
        )
        y = conv(x, w)
        results.append([t.stride() for t in (y, *torch.autograd.grad(y.flatten(1).sin().sum(), (x, w)))])
    assert results[0] == results[1]


@pytest.mark.parametrize("precision", ["medium", "high"])
def test_the_precision_of_matrix_products_does_not_round_convolutions_of_one_pixel(precision, pointwise_calls):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        x, w, b = pointwise_operands()
        y = ops.conv2d(x, w, b)
    finally:
        torch.set_float32_matmul_precision(before)
    assert all_of(pointwise_calls) == {"forward"}
    assert_close(y, F.conv2d(x.double(), w.double(), b.double()), order=0)


def test_autocast_around_a_backward_leaves_kernels_of_size_one_in_single_precision():
    x, w, b = pointwise_operands()
    y = ops.conv2d(x, w, b).sin().sum()
    with torch.autocast("cpu", torch.bfloat16):
        first = torch.autograd.grad(y, (x, w, b), create_graph=True)
        actual = [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), (x, w, b))]
    exact = [t.detach().double().requires_grad_() for t in (x, w, b)]
    first = torch.autograd.grad(F.conv2d(*exact).sin().sum(), exact, create_graph=True)
    expected = [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), exact)]
    for i, (result, by) in enumerate(zip(actual, expected, strict=True)):
        assert_close(result, by, order=1 if i < 3 else 2)


@pytest.mark.parametrize("weight", [(16, 8, 1, 1), (16, 3, 3, 3), (16, 8, 3, 3)], ids=str)
def test_gradients_may_come_in_batches(weight):
    x, w, _ = operands("conv2d", (2, weight[1], 32, 32), weight, {}, dtype=torch.float32)
    y = ops.conv2d(x, w)
    grads = torch.randn(3, *y.shape)
    actual = torch.autograd.grad(y, (x, w), grads, is_grads_batched=True)
    expected = torch.autograd.grad(F.conv2d(x, w), (x, w), grads, is_grads_batched=True)
    for result, by in zip(actual, expected, strict=True):
        assert_close(result, by.double(), order=1)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("wrapped", [0, 1, 2], ids=["input", "weight", "bias"])
def test_tensors_of_a_class_of_their_own_are_the_vendors(wrapped, stride):
    """A subclass with its own convolution and result type."""
    leaves = operands("conv2d", (2, 32, 24, 24), (32, 32, 1, 1), {}, dtype=torch.float32)
    inputs = [t.detach() for t in leaves]
    expected = F.conv2d(*inputs, stride)
    inputs[wrapped] = TwoTensor(inputs[wrapped], inputs[wrapped])
    y = ops.conv2d(*inputs, stride)
    assert isinstance(y, TwoTensor)
    assert torch.equal(y.a, expected)


class SizeOne(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(6, 3, 1, 1))

    def forward(self, x):
        return ops.conv2d(x, self.weight)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
def test_kernels_of_size_one_are_exported_for_any_batch(strict, monkeypatch):
    monkeypatch.undo()  # poisoned memory cannot be traced
    model = SizeOne()
    sizes = {"x": {0: torch.export.Dim("batch", min=2)}}
    program = torch.export.export(model, (torch.randn(4, 3, 5, 5),), dynamic_shapes=sizes, strict=strict)
    x = torch.randn(7, 3, 5, 5)
    assert_close(program.module()(x), F.conv2d(x.double(), model.weight.double()), order=0)


def test_one_graph_of_kernels_of_size_one_serves_batches_of_any_size(monkeypatch):
    monkeypatch.undo()
    torch.compiler.reset()
    model = SizeOne()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch in (4, 7):
        x = torch.randn(batch, 3, 5, 5, requires_grad=True)
        actual = torch.autograd.grad(compiled(x).sin().sum(), (x, model.weight))
        expected = torch.autograd.grad(F.conv2d(x, model.weight).sin().sum(), (x, model.weight))
        for result, by in zip(actual, expected, strict=True):
            assert_close(result, by.double(), order=1)


@pytest.mark.parametrize("size", [1, 3])
def test_a_backward_is_of_its_forwards_backend(size, pointwise_calls, narrow_calls):
    x, w = torch.randn(2, 3, 32, 32, requires_grad=True), torch.randn(9, 3, size, size)
    with use_backend("reference"):
        y = ops.conv2d(x, w)
    torch.autograd.grad(y, x, torch.ones_like(y))
    assert not all_of(pointwise_calls)
    assert not narrow_calls
