from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F
from torch.testing._internal.two_tensor import TwoTensor

from fastgan import backends, ops, use_backend
from fastgan.ops.conv import native_kernels, pointwise
from tests.harness import assert_close

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


def operands(name, shape, weight_shape, options, *, bias=True, dtype=torch.float64):
    x, w = torch.randn(shape, dtype=dtype), torch.randn(weight_shape, dtype=dtype)
    channels = weight_shape[1] * options.get("groups", 1) if "transpose" in name else weight_shape[0]
    b = torch.randn(channels, dtype=dtype) if bias else None
    return [None if t is None else t.requires_grad_() for t in (x, w, b)]


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
    """Where PyTorch fills zeros: nothing may reach what made the input."""
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


def test_the_third_order_raises():
    x, w, _ = operands(*CASES["conv2d"])
    (first,) = torch.autograd.grad(ops.conv2d(x, w).pow(3).sum(), w, create_graph=True)
    (second,) = torch.autograd.grad(first.pow(3).sum(), w, create_graph=True)
    with pytest.raises(RuntimeError, match="third derivative"):
        torch.autograd.grad(second.sum(), w)


def test_channels_last_is_kept():
    x = torch.randn(2, 4, 6, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    w = torch.randn(8, 4, 3, 3).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = ops.conv2d(x, w)
    expected = F.conv2d(x, w)
    assert y.stride() == expected.stride()
    assert_close(y, expected.double(), order=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_computes_in_half_precision_as_pytorchs_does(dtype):
    results = []
    for function in (ops.conv2d, F.conv2d):
        torch.manual_seed(1)
        x, w, b = operands(*CASES["conv2d strided"], dtype=torch.float32)
        with torch.autocast("cpu", dtype):
            y = function(x, w, b, stride=2, padding=1)
        (g,) = torch.autograd.grad(y.float().square().sum(), x, create_graph=True)
        g.square().sum().backward()
        results.append((y, g, w.grad))
    for actual, expected in zip(*results, strict=True):
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


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


# Inputs of few channels: more and fewer columns than a vector has lanes, and all that a convolution's rows may do.
NARROW = {
    "dilated": ((2, 3, 40, 36), (40, 3, 2, 1), dict(dilation=3)),
    "3x3": ((2, 3, 33, 37), (20, 3, 3, 3), dict(padding=1)),
    "halving": ((2, 1, 46, 70), (16, 1, 4, 4), dict(stride=2, padding=1)),
    "few columns": ((3, 6, 24, 9), (32, 6, 3, 2), dict(stride=(1, 2))),
    "rows left over": ((1, 3, 68, 68), (12, 3, 5, 3), dict(stride=3, padding=(4, 0), dilation=(2, 3))),
    "kernel beyond stride": ((2, 2, 50, 50), (48, 2, 2, 2), dict(stride=(5, 4))),
    "1d": ((4, 2, 600), (8, 2, 9), dict(stride=3, padding=4, dilation=2)),
}


@pytest.fixture
def narrow_calls(monkeypatch):
    """How often the kernel ran."""
    calls = []
    kernel = native_kernels.input_gradient

    def counted(*arguments):
        calls.append(arguments)
        return kernel(*arguments)

    monkeypatch.setattr(native_kernels, "input_gradient", counted)
    return calls


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


def orders(function, inputs, options):
    """The input's gradient, and the gradients of a penalty of it by each that it depends on."""
    y = function(*inputs, **options)
    by = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y).requires_grad_()
    (grad,) = torch.autograd.grad(y, inputs[0], by, create_graph=True)
    return [grad, *torch.autograd.grad(grad.square().sum(), [by, inputs[1]])]


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


# Of few channels and of many: one product a sample, or one of all samples, for the weight.
POINTWISE = {
    "1d": ((3, 5, 70), (4, 5, 1)),
    "2d": ((2, 3, 9, 8), (6, 3, 1, 1)),
    "2d, many channels": ((3, 40, 3, 2), (30, 40, 1, 1)),
    "3d": ((2, 3, 4, 3, 5), (2, 3, 1, 1, 1)),
    "one sample": ((1, 4, 6, 6), (3, 4, 1, 1)),
}


@pytest.fixture
def products(monkeypatch):
    """The functions of pointwise.py that ran."""
    calls = set()
    for name in ("forward", "input_gradient", "weight_gradient"):
        function = getattr(pointwise, name)

        def noted(*arguments, function=function, name=name):
            calls.add(name)
            return function(*arguments)

        monkeypatch.setattr(pointwise, name, noted)
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(("shape", "weight"), POINTWISE.values(), ids=POINTWISE)
def test_kernels_of_size_one_are_matrix_products_on_a_cpu(shape, weight, bias, dtype, products):
    name = f"conv{len(shape) - 2}d"
    leaves = operands(name, shape, weight, {}, bias=bias, dtype=dtype)
    exact = [None if t is None else t.detach().double().requires_grad_() for t in leaves]
    results = []
    for function, (x, w, b) in ((getattr(ops, name), leaves), (getattr(F, name), exact)):
        y = function(x, w, b)
        inputs = [t for t in (x, w, b) if t is not None]
        first = torch.autograd.grad(y.sin().sum(), inputs, create_graph=True)
        results.append([y, *first, *torch.autograd.grad(sum(g.square().sum() for g in first), inputs)])
    assert products == {"forward", "input_gradient", "weight_gradient"}
    for i, (actual, expected) in enumerate(zip(*results, strict=True)):
        assert actual.is_contiguous()
        assert_close(actual, expected, order=0 if i == 0 else 1 if i <= len(inputs) else 2)


def test_a_large_result_of_a_kernel_of_size_one_is_whole():
    """Its memory is asked for in huge pages."""
    x, w = torch.randn(2, 3, 512, 512), torch.randn(20, 3, 1, 1)
    y = ops.conv2d(x, w)
    assert y.nbytes >= native_kernels._MAPPED
    assert_close(y, F.conv2d(x.double(), w.double()), order=0)


@pytest.mark.parametrize(
    "options",
    [dict(stride=2), dict(padding=1), dict(groups=3), "channels_last", "bfloat16", "reference", "3x3"],
    ids=str,
)
def test_other_convolutions_are_no_matrix_products(options, products):
    x, w = torch.randn(2, 3, 8, 8), torch.randn(6, 3, 1, 1)
    if options == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    if options == "bfloat16":
        x, w = x.bfloat16(), w.bfloat16()
    if options == "3x3":
        w = torch.randn(6, 3, 3, 3)
    options, backend = (options, "auto") if isinstance(options, dict) else ({}, options)
    w = w[:, :1] if "groups" in options else w
    with use_backend("reference" if backend == "reference" else "auto"):
        y = ops.conv2d(x, w, **options)
    assert not products
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
def test_the_precision_of_matrix_products_is_not_that_of_convolutions(precision, products):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        ops.conv2d(*pointwise_operands()).sin().sum().backward()
    finally:
        torch.set_float32_matmul_precision(before)
    assert not products


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


@pytest.mark.parametrize("wrapped", [0, 1, 2], ids=["input", "weight", "bias"])
def test_tensors_of_a_class_of_their_own_are_the_vendors(wrapped, products):
    """Their class says what a convolution of them is, and what it gives."""
    inputs = [t.detach() for t in pointwise_operands()]
    expected = F.conv2d(*inputs)
    inputs[wrapped] = TwoTensor(inputs[wrapped], inputs[wrapped])
    y = ops.conv2d(*inputs)
    assert not products
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
def test_a_backward_is_of_its_forwards_backend(size, products, narrow_calls):
    x, w = torch.randn(2, 3, 32, 32, requires_grad=True), torch.randn(9, 3, size, size)
    with use_backend("reference"):
        y = ops.conv2d(x, w)
    torch.autograd.grad(y, x, torch.ones_like(y))
    assert not products
    assert not narrow_calls
