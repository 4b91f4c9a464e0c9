"""Average pooling: PyTorch's results to every order, by the kernel where windows tile the input."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fastgan import backends, ops
from fastgan.ops.pool import native_kernels
from tests.harness import DTYPES, assert_close

POOLS = {
    "1d": ("avg_pool1d", (2, 3, 9), dict(kernel_size=3, stride=2, padding=1)),
    "2d": ("avg_pool2d", (2, 3, 6, 7), dict(kernel_size=2)),
    "2d all": ("avg_pool2d", (2, 3, 7, 7), dict(kernel_size=(3, 2), stride=2, ceil_mode=True, count_include_pad=False)),
    "2d divisor": ("avg_pool2d", (1, 2, 4, 4), dict(kernel_size=2, divisor_override=3)),
    "1d of one sample": ("avg_pool1d", (3, 9), dict(kernel_size=3, stride=2)),
    "2d of one sample": ("avg_pool2d", (3, 6, 7), dict(kernel_size=2)),
    "3d of one sample": ("avg_pool3d", (2, 4, 5, 4), dict(kernel_size=2, padding=1)),
    "3d": ("avg_pool3d", (1, 2, 4, 5, 4), dict(kernel_size=2, padding=1)),
}


@pytest.mark.parametrize(("name", "shape", "options"), POOLS.values(), ids=POOLS)
def test_pools_equal_pytorchs_to_every_order(name, shape, options):
    x = torch.randn(shape, dtype=torch.float64)
    results = []
    for function in (getattr(ops, name), getattr(F, name)):
        a = x.clone().requires_grad_()
        orders = [function(a, **options)]
        for _ in range(3):
            orders.append(torch.autograd.grad(orders[-1].pow(3).sum(), a, create_graph=True)[0])
        results.append(orders)
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected, order=0)


# Windows that tile inputs of 4096 elements or more: lines that end within a vector, and of more than one buffer.
TILED = {
    "halves": ((2, 3, 38, 46), 2),
    "long rows": ((1, 2, 2, 2100), 2),
    "unequal": ((2, 4, 30, 21), (5, 3)),
    "wide": ((1, 3, 40, 40), (1, 8)),
    "1d": ((3, 4, 1002), 2),
    "3d": ((2, 3, 8, 10, 12), (2, 5, 2)),
}


def _pools(shape):
    name = f"avg_pool{len(shape) - 2}d"
    return getattr(ops, name), getattr(F, name)


def _orders(pool, x, by, kernel, **options):
    """Return the values, the gradient, and the gradient with respect to ``by`` of a penalty on the gradient."""
    x, by = x.clone().requires_grad_(), by.clone().requires_grad_()
    y = pool(x, kernel, **options)
    (grad,) = torch.autograd.grad(y, x, by, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), by)
    return y, grad, second


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "kernel"), TILED.values(), ids=TILED)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_tiling_windows_match_float64(shape, kernel, dtype, backend):
    if len(shape) == 5 and dtype.itemsize == 2:
        pytest.skip("PyTorch's avg_pool3d takes no half precision on a CPU")
    ours, pytorchs = _pools(shape)
    x = torch.randn(shape, dtype=dtype)
    by = torch.randn_like(pytorchs(x, kernel))
    with backends.use_backend(backend):
        actual = _orders(ours, x, by, kernel)
    exact = _orders(pytorchs, x.double(), by.double(), kernel)
    reference = _orders(pytorchs, x, by, kernel)
    for order, (a, e, r) in enumerate(zip(actual, exact, reference, strict=True)):
        assert_close(a, e, order=order, reference=r)


@pytest.mark.parametrize(("shape", "kernel"), TILED.values(), ids=TILED)
def test_in_float32_the_kernel_gives_pytorchs_bits(shape, kernel):
    ours, pytorchs = _pools(shape)
    x = torch.randn(shape)
    by = torch.randn_like(pytorchs(x, kernel))
    for actual, expected in zip(_orders(ours, x, by, kernel)[:2], _orders(pytorchs, x, by, kernel), strict=False):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_gives_the_same(isa):
    module = backends.native()
    x, y, back = torch.randn(6, 18, 70), torch.empty(6, 9, 35), torch.full((6, 18, 70), torch.nan)
    shape = (6, 1, 9, 35, 1, 2, 2)
    try:
        module.avg_pool("float32", x.data_ptr(), y.data_ptr(), shape, 4.0, 2, isa)
    except ValueError as missing:
        pytest.skip(str(missing))
    module.avg_pool_transpose("float32", y.data_ptr(), back.data_ptr(), shape, 4.0, 2, isa)
    torch.testing.assert_close(y, F.avg_pool2d(x, 2))
    torch.testing.assert_close(back, F.interpolate(y[None], scale_factor=2.0)[0] / 4)


def test_the_kernel_runs_where_windows_tile_and_pytorch_elsewhere(monkeypatch):
    calls = []
    for name in ("pool", "transpose"):
        kernel = getattr(native_kernels, name)
        monkeypatch.setattr(native_kernels, name, lambda *a, name=name, kernel=kernel: calls.append(name) or kernel(*a))

    def names(x, kernel=2, **options):
        calls.clear()
        x = x.requires_grad_()
        ops.avg_pool2d(x, kernel, **options).sum().backward()
        return list(calls)

    x = torch.randn(2, 4, 32, 32)
    assert names(x) == ["pool", "transpose"]
    assert names(x, divisor_override=3) == ["pool", "transpose"]
    assert names(x.to(memory_format=torch.channels_last)) == []
    assert names(x, stride=1) == []
    assert names(x, padding=1) == []
    assert names(x, 3) == []
    assert names(x[:, :1]) == []  # too small for the kernel
    with backends.use_backend("reference"):
        assert names(x) == []


def test_a_gradient_that_is_not_contiguous_is_read_in_order():
    x = torch.randn(2, 4, 32, 32, requires_grad=True)
    by = torch.randn(16, 16, 4, 2).permute(3, 2, 0, 1)
    actual, expected = (torch.autograd.grad(pool(x, 2), x, by)[0] for pool in (ops.avg_pool2d, F.avg_pool2d))
    torch.testing.assert_close(actual, expected)


def test_a_divisor_is_taken_as_pytorch_takes_it():
    x = torch.randn(2, 4, 32, 32)
    torch.testing.assert_close(ops.avg_pool2d(x, 2, divisor_override=3), F.avg_pool2d(x, 2, divisor_override=3))
    for pool in (ops.avg_pool2d, F.avg_pool2d):
        with pytest.raises(RuntimeError, match="divisor"):
            pool(x, 2, divisor_override=0)


@pytest.mark.parametrize("kernel", [(2,), [2, 2], np.int64(2), torch.Size((2, 2))], ids=repr)
def test_sizes_are_given_in_the_forms_that_pytorch_takes(kernel):
    x = torch.randn(2, 4, 32, 32)
    assert torch.equal(ops.avg_pool2d(x, kernel), F.avg_pool2d(x, 2))


@pytest.mark.parametrize("kernel", [0, (2, 2, 2), (0, 2), -1])
def test_sizes_that_pytorch_refuses_are_refused_so(kernel):
    x = torch.randn(2, 4, 32, 32)
    for pool in (ops.avg_pool2d, F.avg_pool2d):
        with pytest.raises(RuntimeError):
            pool(x, kernel)


@pytest.mark.parametrize("pool", ["avg_pool1d", "avg_pool2d", "avg_pool3d"])
@pytest.mark.parametrize("input", [[1.0], {"x": 1.0}, None], ids=repr)
def test_an_input_that_is_no_tensor_raises_pytorchs_error(pool, input):
    with pytest.raises(TypeError, match=rf"input.* must be Tensor, not {type(input).__name__}"):
        getattr(ops, pool)(input, 2)


@pytest.mark.parametrize("pool", ["avg_pool1d", "avg_pool2d", "avg_pool3d"])
def test_under_autocast_the_result_is_of_pytorchs_dtype(pool):
    x = torch.randn(2, 4, *[8] * int(pool[-2])).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = (getattr(module, pool)(x, 2) for module in (ops, F))
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected)


def test_a_backward_follows_its_forward(monkeypatch):
    x = torch.randn(2, 4, 32, 32, requires_grad=True)
    with backends.use_backend("reference"):
        y = ops.avg_pool2d(x, 2)
    monkeypatch.setattr(native_kernels, "transpose", None)
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad, torch.full_like(x, 0.25))
