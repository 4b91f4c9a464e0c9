"""Strided convolutions on a CPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from fastgan import backends, ops, use_backend
from fastgan.ops.conv import strided
from tests.harness import assert_close
from tests.ops.conv_problem import needs_kernel, operands, orders, set_of_calls

# Every kind of strided convolution. Channels fill blocks of lanes and squares of them, or leave some idle.
STRIDED = {
    "halving": ((2, 32, 20, 28), (64, 32, 4, 4), dict(stride=2, padding=1)),
    "many small samples": ((70, 32, 4, 4), (32, 32, 4, 4), dict(stride=2, padding=1)),
    "3x3": ((9, 29, 9, 11), (61, 29, 3, 3), dict(stride=2, padding=1)),
    "5x5": ((4, 48, 18, 18), (48, 48, 5, 5), dict(stride=2, padding=2)),
    "kernel beyond stride": ((4, 32, 39, 40), (32, 32, 2, 2), dict(stride=(5, 4))),
    "steps one way": ((3, 32, 12, 40), (32, 32, 5, 3), dict(stride=(1, 3), padding=(2, 1), dilation=(1, 2))),
    "rows left over": ((11, 30, 19, 20), (31, 30, 3, 3), dict(stride=4, padding=(2, 0))),
    "more zeros than kernel": ((9, 32, 9, 9), (32, 32, 2, 2), dict(stride=2, padding=4)),
    "one pixel of the kernel": ((4, 32, 17, 16), (32, 32, 1, 1), dict(stride=2)),
}


@pytest.fixture
def strided_calls(monkeypatch):
    """Record the functions of strided.py that run, on any processor as on one with long vectors."""
    isa = backends.native().isa()
    monkeypatch.setattr(strided, "_BLOCK", {isa: 32})
    monkeypatch.setattr(strided, "_has_fast_forward", lambda: True)
    return set_of_calls(monkeypatch, strided, "forward", "input_gradient")


@needs_kernel
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(("shape", "weight", "options"), STRIDED.values(), ids=STRIDED)
def test_the_cpu_kernel_gives_convolutions_with_steps(shape, weight, options, bias, strided_calls):
    x, w, b = operands("conv2d", shape, weight, options, bias=bias, dtype=torch.float32)
    actual = orders(ops.conv2d, (x, w, b), options)
    assert strided_calls == {"forward", "input_gradient"}
    exact = [None if t is None else t.detach().double().requires_grad_() for t in (x, w, b)]
    for order, (result, expected) in enumerate(zip(actual, orders(F.conv2d, exact, options), strict=True)):
        assert result.is_contiguous()
        assert_close(result, expected, order=min(order, 2))
    assert_close(ops.conv2d(x, w, b, **options), F.conv2d(*exact, **options), order=0)


@needs_kernel
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("shape", "weight", "options"), STRIDED.values(), ids=STRIDED)
def test_every_instruction_set_of_the_cpu_kernel_gives_convolutions_with_steps(shape, weight, options, threads, isa):
    x, w, b = operands("conv2d", shape, weight, options, dtype=torch.float32)
    y = F.conv2d(x.double(), w.double(), b.double(), **options)
    grad = torch.randn(y.shape)
    by_x, by_y = torch.full_like(x, torch.nan), torch.full_like(grad, torch.nan)
    given = options.get("stride", 1), options.get("padding", 0), options.get("dilation", 1)
    stride, padding, dilation = ((size, size) if isinstance(size, int) else size for size in given)
    dimensions = list(zip(x.shape[2:], y.shape[2:], w.shape[2:], stride, padding, dilation, strict=True))
    sizes = len(x), x.shape[1], len(w), dimensions, threads, isa
    native = backends.native()
    try:
        native.conv_strided_forward(x.data_ptr(), w.data_ptr(), b.data_ptr(), by_y.data_ptr(), *sizes)
    except ValueError as error:
        pytest.skip(str(error))
    native.conv_strided_input_gradient(grad.data_ptr(), w.data_ptr(), by_x.data_ptr(), *sizes)
    assert_close(by_y, y, order=0)
    (expected,) = torch.autograd.grad(y, x, grad.double())
    assert_close(by_x, expected.double(), order=1)


@needs_kernel
def test_convolutions_with_steps_are_the_same_bits_for_any_number_of_threads():
    x, w, b = operands("conv2d", (5, 32, 36, 36), (64, 32, 3, 3), dict(stride=2), dtype=torch.float32)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            y = ops.conv2d(x, w, b, stride=2)
            results.append([y, *torch.autograd.grad(y, x, torch.ones_like(y))])
    finally:
        torch.set_num_threads(before)
    for others in results[1:]:
        assert all(map(torch.equal, results[0], others))


# name -> shapes of input and weight, and the one of the two functions that still takes them
UNFIT = {
    "few channels of the input": ((4, 15, 20, 20), (32, 15, 3, 3), set()),
    "few channels of the output": ((4, 32, 20, 20), (15, 32, 3, 3), set()),
    "idle lanes of the input": ((4, 17, 20, 20), (32, 17, 3, 3), {"forward"}),
    "idle lanes of the output": ((4, 32, 20, 20), (17, 32, 3, 3), {"input_gradient"}),
    "few positions": ((3, 32, 18, 20), (32, 32, 3, 3), {"input_gradient"}),
    # Both contiguous and channels_last, which the results then are.
    "channels_last of one pixel": ((300, 32, 1, 1), (32, 32, 1, 1), set()),
    "channels_last weight of one pixel": ((4, 32, 20, 20), (32, 32, 1, 1), set()),
}
VENDORS = ["double", "channels_last", "channels_last weight", "reference", "groups", "no steps", "3d", *UNFIT]


@needs_kernel
@pytest.mark.parametrize("change", VENDORS)
def test_what_the_cpu_kernel_of_steps_does_not_take_is_the_vendors(change, strided_calls):
    shape, kernel, taken = UNFIT.get(change, ((4, 32, 20, 20), (32, 8 if change == "groups" else 32, 3, 3), set()))
    if change == "3d":
        shape, kernel = (*shape, 4), (*kernel, 2)
    dtype = torch.float64 if change == "double" else torch.float32
    x, w = torch.randn(shape, dtype=dtype), torch.randn(kernel, dtype=dtype)
    if change.startswith("channels_last weight"):
        w = w.to(memory_format=torch.channels_last)
    elif change.startswith("channels_last"):
        x = x.to(memory_format=torch.channels_last)
    x.requires_grad_()
    name = "conv3d" if change == "3d" else "conv2d"
    options = dict(stride=1 if change == "no steps" else 2, groups=4 if change == "groups" else 1)
    with use_backend("reference" if change == "reference" else "auto"):
        y = getattr(ops, name)(x, w, **options)
    (grad,) = torch.autograd.grad(y, x, torch.ones(y.shape, dtype=dtype))
    assert strided_calls == taken
    expected = getattr(F, name)(x, w, **options)
    (by_x,) = torch.autograd.grad(expected.sum(), x)
    assert y.stride() == expected.stride()
    assert grad.stride() == by_x.stride()
    assert_close(y, expected.double(), order=0)
    assert_close(grad, by_x.double(), order=1)


@pytest.mark.parametrize(
    ("shape", "bias", "options"),
    [
        ((4, 31, 20, 20), None, dict(stride=2)),
        ((4, 32, 20, 20), torch.randn(1), dict(stride=2)),
        ((4, 32, 20, 20), torch.randn(32, 1), dict(stride=2)),
        ((4, 32, 20, 20), torch.randn(32, dtype=torch.float64), dict(stride=2)),
        ((400, 32, 2, 20), None, dict(stride=2)),
        ((400, 32, 1, 1), None, dict(stride=2, dilation=3)),
        ((4, 32, 20, 20), None, dict(stride=(2, 2, 2))),
        ((4, 32, 20, 20), None, dict(stride=(2, 0))),
        ((4, 32, 20, 20), None, dict(stride=2, padding=-1)),
        ((4, 32, 20, 20), None, dict(stride=2, dilation=0)),
    ],
    ids=[
        "channels",
        "one bias",
        "bias of two dimensions",
        "bias of another dtype",
        "rows of the kernel beyond input",
        "kernel beyond input",
        "strides",
        "zero",
        "padding",
        "dilation",
    ],
)
def test_what_pytorch_refuses_of_a_convolution_with_steps_is_refused_alike(shape, bias, options):
    x, w = torch.randn(shape), torch.randn(32, 32, 3, 3)
    with pytest.raises(RuntimeError) as expected, use_backend("reference"):
        ops.conv2d(x, w, bias, **options)
    with pytest.raises(RuntimeError) as actual:
        ops.conv2d(x, w, bias, **options)
    assert str(actual.value) == str(expected.value)


def test_the_steps_of_a_plane_are_refused_for_a_volume_as_pytorch_does():
    x, w = torch.randn(4, 32, 9, 9, 9), torch.randn(32, 32, 3, 3, 3)
    with pytest.raises(RuntimeError) as expected, use_backend("reference"):
        ops.conv3d(x, w, None, (2, 2), (0, 0), (1, 1))
    with pytest.raises(RuntimeError) as actual:
        ops.conv3d(x, w, None, (2, 2), (0, 0), (1, 1))
    assert str(actual.value) == str(expected.value)


@pytest.mark.parametrize(
    ("isa", "intel", "fast"), [("avx512", True, True), ("avx512", False, False), ("avx2", True, False)]
)
def test_the_forward_uses_the_kernel_where_it_was_faster(isa, intel, fast, monkeypatch):
    native = SimpleNamespace(isa=lambda: isa, is_intel=lambda: intel)
    monkeypatch.setattr(backends, "native", lambda: native)
    assert strided._has_fast_forward.__wrapped__() == fast
