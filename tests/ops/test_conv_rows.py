"""The gradient of a 1d convolution's weight for wide kernels and for few channels in a group, on a CPU."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fastgan import backends, ops
from fastgan.ops.conv import weight_gradient
from tests.harness import assert_close
from tests.ops.conv_problem import needs_kernel, operands, set_of_calls

# name -> shapes of input and weight, options: tiles and tasks that are left over, tails of rows, runs of positions
LONG = {
    "waves": ((3, 32, 300), (40, 8, 21), dict(stride=2, padding=10, groups=4)),
    "one channel": ((2, 1, 400), (7, 1, 15), dict(stride=4, padding=11)),
    "one filter of each group": ((2, 5, 99), (5, 1, 31), dict(padding=15, groups=5)),
    "two filters of each group": ((2, 4, 90), (4, 2, 17), dict(padding=8, groups=2)),
    "whole vectors": ((2, 3, 128), (3, 3, 16), dict(padding=(8,), dilation=1)),
    "odd channels": ((2, 6, 240), (9, 6, 4), dict(stride=3, padding=1)),
    "dilated": ((2, 3, 200), (5, 3, 5), dict(padding=3, dilation=4)),
    "dilated and strided": ((2, 3, 300), (5, 3, 15), dict(stride=2, padding=9, dilation=3)),
    "a step over values": ((2, 3, 900), (5, 3, 2), dict(stride=7)),
    "more zeros than kernel": ((2, 3, 70), (5, 3, 3), dict(padding=20)),
    "runs": ((1, 2, 1300), (3, 2, 25), dict(padding=12)),
    "sums in parts": ((3, 2, 1100), (3, 2, 15), {}),
    "several tasks": ((2, 40, 150), (9, 40, 17), dict(padding=8)),
}


@pytest.fixture
def calls(monkeypatch):
    return set_of_calls(monkeypatch, weight_gradient, "_of_rows")


@needs_kernel
@pytest.mark.parametrize(("shape", "weight", "options"), LONG.values(), ids=LONG)
def test_the_cpu_kernel_gives_the_weights_gradient_of_long_rows(shape, weight, options, calls):
    leaves = operands("conv1d", shape, weight, options, dtype=torch.float32)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    results = []
    for function, inputs in ((ops.conv1d, leaves), (F.conv1d, exact)):
        y = function(*inputs, **options)
        first = torch.autograd.grad(y.sin().sum(), inputs, create_graph=True)
        results.append([*first, *torch.autograd.grad(sum(g.square().sum() for g in first), inputs)])
    assert calls
    for i, (actual, expected) in enumerate(zip(*results, strict=True)):
        assert_close(actual, expected, order=1 if i < 3 else 2)


@needs_kernel
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("shape", "weight", "options"), LONG.values(), ids=LONG)
def test_every_instruction_set_of_the_cpu_kernel_gives_that_gradient(shape, weight, options, threads, isa):
    x, w, _ = operands("conv1d", shape, weight, options, dtype=torch.float32)
    exact = w.detach().double().requires_grad_()
    y = F.conv1d(x.double(), exact, **options)
    grad = torch.randn(y.shape)
    try:
        result = _row_weight_gradient(grad, x, w.shape, options, threads, isa)
    except ValueError as error:
        pytest.skip(str(error))
    assert_close(result, torch.autograd.grad(y, exact, grad.double())[0], order=1)


@needs_kernel
def test_the_weights_gradient_has_the_same_bits_with_any_number_of_threads():
    shape, weight, options = LONG["several tasks"]
    x, w, _ = operands("conv1d", shape, weight, options, dtype=torch.float32)
    grad = torch.randn(F.conv1d(x, w, **options).shape)
    one, *others = (_row_weight_gradient(grad, x, w.shape, options, threads, "best") for threads in (1, 2, 5))
    for other in others:
        assert torch.equal(one, other)


@needs_kernel
def test_values_that_no_output_reads_do_not_reach_the_weights_gradient(calls):
    """The last vector of positions ends after the last output."""
    x, w = torch.randn(2, 3, 378), torch.randn(4, 3, 15, requires_grad=True)
    x[..., 375:] = torch.inf  # the last of 91 outputs reads up to 374
    (actual,) = torch.autograd.grad(ops.conv1d(x, w, stride=4), w, torch.ones(2, 4, 91))
    assert calls
    assert actual.isfinite().all()


def _row_weight_gradient(grad, x, shape, options, threads, isa):
    def number(name, default):
        given = options.get(name, default)
        return given if isinstance(given, int) else given[0]

    result = torch.full(shape, torch.nan)
    groups = number("groups", 1)
    row = x.shape[2], grad.shape[2], shape[2], number("stride", 1), number("padding", 0), number("dilation", 1)
    addresses = grad.data_ptr(), x.data_ptr(), result.data_ptr()
    backends.native().conv_row_weight_gradient(
        *addresses, len(x), groups, shape[1], shape[0] // groups, row, threads, isa
    )
    return result


# name -> shapes of input and weight, options
OTHERS = {
    "full vectors": ((2, 8, 128), (16, 8, 14), {}),
    "short rows": ((2, 3, 80), (5, 3, 15), {}),
    "more channels than positions": ((1, 90, 160), (5, 90, 15), {}),
    "no sample": ((0, 3, 200), (5, 3, 15), {}),
    "double": ((2, 3, 200), (5, 3, 15), {}),
    "transposed in memory": ((2, 3, 200), (5, 3, 15), {}),
    "2d": ((2, 3, 1, 200), (5, 3, 1, 15), {}),
}


@needs_kernel
@pytest.mark.parametrize("change", OTHERS)
def test_what_that_kernel_does_not_take_is_the_vendors(change, calls):
    shape, kernel, options = OTHERS[change]
    dtype = torch.float64 if change == "double" else torch.float32
    name = f"conv{len(shape) - 2}d"
    x, w, _ = operands(name, shape, kernel, options, dtype=dtype)
    if change == "transposed in memory":
        x = x.detach().transpose(1, 2).contiguous().transpose(1, 2)
    y = getattr(ops, name)(x, w, **options)
    (actual,) = torch.autograd.grad(y, w, torch.ones_like(y))
    assert not calls
    expected = getattr(F, name)(x, w, **options)
    assert_close(actual, torch.autograd.grad(expected, w, torch.ones_like(expected))[0].double(), order=1)
