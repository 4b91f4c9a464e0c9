"""upfirdn2d against its definition, on each backend: values, first and second order, layouts, and the one pass."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

import fastgan
from fastgan import backends, ops
from fastgan.ops.upfirdn2d import filters, native_kernels
from fastgan.ops.upfirdn2d.plan import Taps
from tests.harness import BACKENDS, DTYPES, HAS_GPU, assert_close, backend_name, device_of
from tests.hypothesis_if_there import given, settings, st
from tests.ops.one_pass_problem import work

F32 = torch.float32
FILTERS = {
    "1-D": torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8,
    "rank one": torch.outer(torch.tensor([1.0, 3.0, 3.0, 1.0]), torch.tensor([1.0, 2.0, 1.0])) / 32,
    "plane": torch.tensor([[1.0, -2.0, 0.5], [0.25, 3.0, 1.0]]),
    "long": torch.arange(1.0, 13.0) / 64,
    "none": None,
}
CALLS = {
    "plain": {},
    "up": dict(up=2, padding=(2, 1, 2, 1), gain=4),
    "down": dict(down=2, padding=1),
    "pairs": dict(up=(2, 1), down=(1, 2), padding=(3, 4)),
    "both": dict(up=3, down=2, padding=(4, 3, 2, 5), flip_filter=True),
    "crop": dict(padding=(-1, 2, 3, -2), flip_filter=True),
    "far": dict(down=4, padding=9),
}


def _places(size, up, down, start, taps, results):
    """(results, taps, size): 1 where the element meets the tap in that result."""
    o, k, i = torch.arange(results)[:, None, None], torch.arange(taps)[:, None], torch.arange(size)
    return (o * down + k - start == up * i).double()


def defined(x, f, up=1, down=1, padding=0, flip_filter=False, gain=1.0):
    """The definition as one sum over all elements and taps."""
    pair = lambda v: v if isinstance(v, tuple) else (v, v)  # noqa: E731
    (ux, uy), (dx, dy), padding = pair(up), pair(down), pair(padding)
    left, right, top, bottom = padding if len(padding) == 4 else (padding[0], padding[0], padding[1], padding[1])
    f = torch.ones(1, 1) if f is None else f[:, None] * f if f.ndim == 1 else f
    f = f.to(x.device, torch.float64)
    f = f if flip_filter else f.flip((0, 1))
    rows = (x.shape[2] * uy + top + bottom - f.shape[0]) // dy + 1
    columns = (x.shape[3] * ux + left + right - f.shape[1]) // dx + 1
    vertical = _places(x.shape[2], uy, dy, top, f.shape[0], rows).to(x.device)
    horizontal = _places(x.shape[3], ux, dx, left, f.shape[1], columns).to(x.device)
    return gain * torch.einsum("yah,xbw,ab,nchw->ncyx", vertical, horizontal, f, x)


def _orders(function, x, by):
    """Return the values, the gradient of the sum of their cubes, and the gradient of its squares."""
    x = x.detach().requires_grad_()
    y = function(x)
    (grad,) = torch.autograd.grad((y.pow(3) * by).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), x)
    return y, grad, second


def _table():
    for backend in BACKENDS[:3]:
        interpreted = backend_name(backend) == "triton" and not HAS_GPU
        for call in ("both", "down") if interpreted else CALLS:
            for f in ("1-D", "plane") if interpreted else FILTERS:
                if interpreted and (call, f) == ("both", "plane"):
                    continue  # takes as long as all others together
                if f != "long" or call in ("up", "both", "far"):  # it fits into these padded images
                    values, marks = getattr(backend, "values", (backend,)), getattr(backend, "marks", ())
                    yield pytest.param(*values, call, f, marks=marks)


@pytest.mark.parametrize(("backend", "call", "f"), list(_table()))
def test_values_and_two_orders_equal_the_definition(backend, call, f):
    device = device_of(backend)
    options, taps = CALLS[call], FILTERS[f]
    x = torch.randn(2, 2, 7, 9, dtype=torch.float64, device=device)
    by = torch.randn_like(defined(x, taps, **options))
    actual = _orders(lambda v: ops.upfirdn2d(v, taps, **options, backend=backend), x, by)
    expected = _orders(lambda v: defined(v, taps, **options), x, by)
    for order, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert_close(a, e, order=order)


@pytest.fixture
def no_kernels(monkeypatch):
    monkeypatch.setattr(backends, "select", lambda op, device, dtype, backend=None: "reference")


@pytest.mark.parametrize("call", [*CALLS, "far crop"])
@pytest.mark.parametrize("f", ["1-D", "plane", "none"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_without_kernels_values_and_two_orders_are_the_same(layout, f, call, no_kernels):
    options, taps = CALLS.get(call, dict(down=2, padding=(-20, 25, 30, -12))), FILTERS[f]
    x = torch.randn(2, 3, 7, 9, dtype=torch.float64).contiguous(memory_format=layout)
    by = torch.randn_like(defined(x, taps, **options))
    actual = _orders(lambda v: ops.upfirdn2d(v, taps, **options), x, by)
    expected = _orders(lambda v: defined(v, taps, **options), x, by)
    assert actual[0].is_contiguous(memory_format=layout)
    for order, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert_close(a, e, order=order)


@pytest.mark.parametrize("call", ["up", "down"])
def test_without_kernels_convolutions_have_a_stride_and_multiply_no_zeros(call, no_kernels):
    x = torch.randn(2, 3, 16, 16)
    resample = lambda **named: ops.upfirdn2d(x, FILTERS["1-D"], **CALLS[call], **named)  # noqa: E731
    assert work(resample) < 0.3 * work(lambda: resample(backend="reference"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS[:3])
def test_every_dtype_is_summed_in_float32_or_better(backend, dtype):
    x = torch.randn(1, 2, 6, 8, device=device_of(backend)).to(dtype)
    # The interpreter takes its time. With 12 taps, the kernel has a loop.
    long = backend_name(backend) != "triton" or HAS_GPU or dtype == torch.float32
    options, taps = CALLS["up"], FILTERS["long" if long else "1-D"] / 3
    actual = ops.upfirdn2d(x, taps, **options | {"padding": 6}, backend=backend)
    expected = defined(x.double(), taps, **options | {"padding": 6})
    assert actual.dtype == dtype
    if dtype != torch.float64:  # in which the outer product of the float32 taps is another
        assert_close(actual, expected, order=0, reference=expected.to(dtype))
    else:
        assert_close(actual, expected, order=0)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("f", ["1-D", "rank one", "plane", "none"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_channels_last_stays_so_and_gives_the_same(backend, call, f):
    x = torch.randn(2, 3, 7, 9, dtype=torch.float64)
    expected = ops.upfirdn2d(x, FILTERS[f], **CALLS[call], backend="reference")
    actual = ops.upfirdn2d(x.contiguous(memory_format=torch.channels_last), FILTERS[f], **CALLS[call], backend=backend)
    assert actual.is_contiguous(memory_format=torch.channels_last)
    assert_close(actual, expected, order=0)


def test_triton_reads_channels_last():
    if HAS_GPU:
        pytest.skip("the table has it on a GPU")
    x = torch.randn(1, 3, 5, 6, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    actual = ops.upfirdn2d(x, FILTERS["1-D"], up=2, down=3, padding=3, backend="triton")
    assert_close(actual, defined(x, FILTERS["1-D"], up=2, down=3, padding=3), order=0)


@pytest.mark.parametrize("loads", [0, 240])
def test_triton_adds_up_separable_taps_in_either_way(loads, monkeypatch):
    """A filter with more loads than the compiler can write out takes one phase after the other, in a loop."""
    if HAS_GPU:
        pytest.skip("the interpreter runs a few programs")
    triton_rows = pytest.importorskip("fastgan.ops.upfirdn2d.triton_rows", reason="Triton is not installed")
    monkeypatch.setattr(triton_rows, "MOST_LOADS", loads)
    x, options = torch.randn(1, 1, 5, 6, dtype=torch.float64), dict(up=(2, 1), down=(1, 2), padding=(9, 6, 4, 7))
    assert triton_rows.unrolls((1, 2), (2, 1), (12, 12), (0, 0)) == (loads > 0)
    actual = ops.upfirdn2d(x, FILTERS["long"], **options, backend="triton")
    assert_close(actual, defined(x, FILTERS["long"], **options), order=0)


@pytest.mark.parametrize(
    ("call", "count", "rows", "across"),
    [
        (dict(up=1, padding=2), 4, 8, 4),
        (dict(down=2, padding=1), 4, 4, 2),
        (dict(up=2, padding=(3, 1, 2, 1)), 4, 4, 4),
        (dict(up=(4, 1), down=(1, 3), padding=2), 3, 4, 4),
        (dict(up=3, padding=2), 4, 4, 3),
    ],
    ids=str,
)
def test_a_thread_of_triton_makes_rows_of_neighbors_that_share_their_inputs(call, count, rows, across, monkeypatch):
    """The results end inside a thread's rows and inside its neighbors."""
    if HAS_GPU:
        pytest.skip("the interpreter runs a few programs")
    triton_kernels = pytest.importorskip("fastgan.ops.upfirdn2d.triton_kernels", reason="Triton is not installed")
    plans, of_sizes = [], triton_kernels.tiles_of
    monkeypatch.setattr(triton_kernels, "tiles_of", lambda *given: plans.append(of_sizes(*given)) or plans[-1])
    x, f = torch.randn(1, 2, 9, 5, dtype=torch.float64), torch.rand(count, dtype=torch.float64)
    assert_close(ops.upfirdn2d(x, f, **call, backend="triton"), defined(x, f, **call), order=0)
    assert [(options["ROWS"], options["ACROSS"]) for options, _ in plans] == [(rows, across)]


def test_a_view_is_read_in_order():
    x = torch.randn(9, 2, 7, 3, dtype=torch.float64).permute(1, 3, 2, 0)[:, :, ::2]
    assert_close(ops.upfirdn2d(x, FILTERS["1-D"], padding=2), defined(x, FILTERS["1-D"], padding=2), order=0)


@settings(max_examples=80, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 11), st.integers(1, 11)),
    up=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    down=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    padding=st.tuples(*[st.integers(-3, 7)] * 4),
    taps=st.sampled_from([(1,), (2,), (5,), (8,), (1, 1), (3, 2), (4, 4)]),
    flip=st.booleans(),
    last=st.booleans(),
)
def test_any_call_equals_the_definition_to_second_order(sizes, up, down, padding, taps, flip, last):
    x = torch.randn(sizes, dtype=torch.float64)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    f = torch.randn(taps, dtype=torch.float64)
    options = dict(up=up, down=down, padding=padding, flip_filter=flip, gain=1.5)
    total = sizes[2] * up[1] + sum(padding[2:]), sizes[3] * up[0] + sum(padding[:2])
    if total[0] < taps[0] or total[1] < taps[-1]:
        with pytest.raises(ValueError, match="does not fit"):
            ops.upfirdn2d(x, f, **options)
        return
    by = torch.randn_like(defined(x, f, **options))
    expected = _orders(lambda v: defined(v, f, **options), x, by)
    for backend in ("cpu", "reference"):
        actual = _orders(lambda v, b=backend: ops.upfirdn2d(v, f, **options, backend=b), x, by)
        for order, (a, e) in enumerate(zip(actual, expected, strict=True)):
            assert_close(a, e, order=order)


@settings(max_examples=40 if os.environ.get("FASTGAN_TESTS") == "all" else 2, deadline=None)
@given(
    sizes=st.tuples(st.just(1), st.integers(1, 2), st.integers(1, 5), st.integers(1, 5)),
    up=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    down=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.tuples(*[st.integers(-1, 4)] * 4),
    taps=st.sampled_from([(1,), (2,), (3,), (1, 2), (3, 2), (2, 3)]),
    flip=st.booleans(),
    last=st.booleans(),
)
def test_any_call_in_the_interpreter_equals_the_definition_to_second_order(sizes, up, down, padding, taps, flip, last):
    pytest.importorskip("triton", reason="Triton is not installed")
    x, f = torch.randn(sizes, dtype=torch.float64), torch.randn(taps, dtype=torch.float64)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    options = dict(up=up, down=down, padding=padding, flip_filter=flip)
    if sizes[2] * up[1] + sum(padding[2:]) < taps[0] or sizes[3] * up[0] + sum(padding[:2]) < taps[-1]:
        return
    device = device_of("triton")
    by = torch.randn_like(defined(x, f, **options))
    expected = _orders(lambda v: defined(v, f, **options), x, by)
    actual = _orders(lambda v: ops.upfirdn2d(v, f, **options, backend="triton"), x.to(device), by.to(device))
    for order, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert_close(a.cpu(), e, order=order)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_gives_the_same(isa):
    x, y = torch.randn(6, 18, 70), torch.full((6, 36, 140), torch.nan)
    sizes = (6, 1, 18, 70, 36, 140, 2, 2, 1, 1, 2, 2, 4, 4)
    taps = [1.0, 3.0, 3.0, 1.0] * 2
    try:
        backends.native().upfirdn2d("float32", x.data_ptr(), y.data_ptr(), sizes, True, taps, 2, isa)
    except ValueError as missing:
        pytest.skip(str(missing))
    f = torch.tensor(taps[:4])
    assert_close(y[None], defined(x[None].double(), f, up=2, padding=(2, 1, 2, 1)), order=0)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_gradcheck_and_the_third_order_pass(backend):
    x = torch.randn(1, 1, 4, 5, dtype=torch.float64, requires_grad=True)
    call = lambda v: ops.upfirdn2d(v, FILTERS["1-D"], up=2, down=3, padding=3, backend=backend)  # noqa: E731
    assert torch.autograd.gradcheck(call, x)
    assert torch.autograd.gradgradcheck(lambda v: call(v).pow(3), x)
    g = call(x).pow(4).sum()
    for _ in range(3):
        (g,) = torch.autograd.grad(g, x, create_graph=True)
        g = g.sum()
    expected = defined(x, FILTERS["1-D"], up=2, down=3, padding=3).pow(4).sum()
    for _ in range(3):
        (expected,) = torch.autograd.grad(expected, x, create_graph=True)
        expected = expected.sum()
    assert_close(g, expected, order=0)


def test_the_operator_is_registered_as_torch_expects():
    x, y = torch.randn(1, 2, 4, 5), torch.empty(1, 2, 8, 10)
    sizes = [2, 1, 4, 5, 8, 10, 2, 2, 1, 1, 2, 2, 4, 4]
    arguments = (x, y, sizes, True, [1.0, 3.0, 3.0, 1.0] * 2, "cpu")
    torch.library.opcheck(torch.ops.fastgan.upfirdn2d.default, arguments, test_utils=("test_schema", "test_faketensor"))


def test_the_same_inputs_give_the_same_bits():
    x = torch.randn(4, 8, 40, 40)
    first, second = (ops.upfirdn2d(x, FILTERS["1-D"], up=2, padding=2) for _ in range(2))
    assert torch.equal(first, second)


def test_a_batch_of_none_has_a_result_of_none():
    assert ops.upfirdn2d(torch.randn(0, 3, 8, 8), FILTERS["1-D"], down=2, padding=1).shape == (0, 3, 4, 4)


def test_a_plane_of_rank_one_is_applied_in_two_passes():
    assert filters.taps_of(FILTERS["rank one"], False, 1.0, F32).separable
    assert not filters.taps_of(FILTERS["plane"], False, 1.0, F32).separable
    rounded = torch.outer(torch.rand(4), torch.rand(5))
    assert filters.taps_of(rounded, False, 1.0, F32).separable
    assert not filters.taps_of(rounded, False, 1.0, torch.float64).separable


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_the_taps_of_a_half_precision_filter_are_multiplied_in_float32(backend, dtype):
    f = torch.tensor([1.0, 3.1, 2.7, 0.9]).to(dtype)
    assert filters.taps_of(f, False, 1.0, F32).separable
    x = torch.randn(1, 2, 6, 6)
    assert_close(ops.upfirdn2d(x, f, padding=2, backend=backend), defined(x.double(), f.float(), padding=2), order=0)


def test_a_filter_that_is_overwritten_is_read_again():
    f = torch.ones(2)
    x = torch.ones(1, 1, 4, 4)
    assert ops.upfirdn2d(x, f).unique().tolist() == [4.0]
    f.mul_(3)
    assert ops.upfirdn2d(x, f).unique().tolist() == [36.0]


def test_the_taps_of_a_filter_are_let_go_with_it():
    f = torch.rand(3, 3)
    filters.taps_of(f, False, 1.0, F32)
    key = id(f)
    assert key in filters._read
    del f
    assert key not in filters._read


def test_a_filter_of_zeros_gives_zeros():
    assert ops.upfirdn2d(torch.randn(1, 1, 4, 4), torch.zeros(2, 2)).abs().max() == 0


def test_a_filter_that_requires_a_gradient_gets_it():
    x, f = torch.randn(1, 2, 5, 5, dtype=torch.float64), torch.rand(3, dtype=torch.float64, requires_grad=True)
    (actual,) = torch.autograd.grad(ops.upfirdn2d(x, f, up=2, padding=2).square().sum(), f)
    (expected,) = torch.autograd.grad(defined(x, f, up=2, padding=2).square().sum(), f)
    assert_close(actual, expected, order=0)


def test_a_double_backward_sends_no_zeros_into_the_input():
    x = torch.randn(1, 2, 5, 5, requires_grad=True)
    by = torch.randn(1, 2, 4, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(ops.upfirdn2d(x, torch.ones(2)), x, by, create_graph=True)
    by_x, by_by = torch.autograd.grad(grad.square().sum(), (x, by), allow_unused=True)
    assert by_x is None
    assert by_by is not None


def test_the_transpose_keeps_the_taps_in_reverse():
    assert Taps((1.0, 2.0, 5.0, 6.0, 7.0), 2, 3, True).flipped().values == (2.0, 1.0, 7.0, 6.0, 5.0)


def test_torch_func_differentiates_and_maps_it():
    x, f = torch.randn(3, 1, 2, 5, 5, dtype=torch.float64), FILTERS["1-D"]
    y = torch.func.vmap(lambda v: ops.upfirdn2d(v, f, up=2, padding=2))(x)
    assert_close(y, torch.stack([defined(v, f, up=2, padding=2) for v in x]), order=0)
    grad = torch.func.grad(lambda v: ops.upfirdn2d(v, f, padding=2).pow(2).sum())(x[0])
    v = x[0].requires_grad_()
    (expected,) = torch.autograd.grad(defined(v, f, padding=2).pow(2).sum(), v)
    assert_close(grad, expected, order=1)


def test_batched_gradients_are_taken():
    x = torch.randn(1, 1, 3, 3, dtype=torch.float64)
    call = lambda v: ops.upfirdn2d(v, FILTERS["1-D"], padding=2)  # noqa: E731
    actual = torch.autograd.functional.jacobian(call, x, vectorize=True)
    assert_close(
        actual, torch.autograd.functional.jacobian(lambda v: defined(v, FILTERS["1-D"], padding=2), x), order=0
    )


def test_autocast_changes_nothing():
    x = torch.randn(1, 2, 6, 6)
    for backend in ("reference", "cpu"):
        plain = ops.upfirdn2d(x, FILTERS["1-D"], padding=2, backend=backend)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(ops.upfirdn2d(x, FILTERS["1-D"], padding=2, backend=backend), plain)


BAD = {
    "no tensor": (TypeError, "input", lambda x: ops.upfirdn2d([1], None)),
    "integers": (TypeError, "input", lambda x: ops.upfirdn2d(x.long(), None)),
    "3-D": (ValueError, "input", lambda x: ops.upfirdn2d(x[0], None)),
    "filter": (TypeError, "filter", lambda x: ops.upfirdn2d(x, [1, 2])),
    "3-D filter": (ValueError, "filter", lambda x: ops.upfirdn2d(x, torch.ones(1, 2, 2))),
    "integer filter": (TypeError, "filter", lambda x: ops.upfirdn2d(x, torch.ones(2).long())),
    "up": (ValueError, "up", lambda x: ops.upfirdn2d(x, None, up=0)),
    "down": (ValueError, "down", lambda x: ops.upfirdn2d(x, None, down=(1, 2, 3))),
    "fraction": (TypeError, "up", lambda x: ops.upfirdn2d(x, None, up=1.5)),
    "padding": (ValueError, "padding", lambda x: ops.upfirdn2d(x, None, padding=(1, 2, 3))),
    "gain": (TypeError, "gain", lambda x: ops.upfirdn2d(x, None, gain=torch.ones((), requires_grad=True))),
    "no gain": (TypeError, "gain", lambda x: ops.upsample2d(x, None, gain=None)),
    "nothing left": (ValueError, "does not fit", lambda x: ops.upfirdn2d(x, torch.ones(9))),
    "backend": (ValueError, "backend", lambda x: ops.upfirdn2d(x, None, backend="nvcc")),
}


@pytest.mark.parametrize(("error", "said", "call"), BAD.values(), ids=BAD)
def test_bad_input_is_refused_by_name(error, said, call):
    with pytest.raises(error, match=said):
        call(torch.randn(1, 2, 6, 6))


SIZES = {
    "upsample2d": (dict(up=2), (12, 16)),
    "upsample2d in one direction": (dict(up=(3, 1)), (6, 24)),
    "downsample2d": (dict(down=2), (3, 4)),
    "filter2d": ({}, (6, 8)),
}


@pytest.mark.parametrize("taps", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("name", SIZES)
def test_the_filter_is_centered(name, taps):
    options, size = SIZES[name]
    x = torch.ones(1, 1, 6, 8, dtype=torch.float64)
    f = torch.ones(taps, dtype=torch.float64) / taps
    y = getattr(ops, name.split()[0])(x, f, **options)
    if taps >= 3 or name == "filter2d":  # a filter smaller than the factor leaves a part of the image out
        assert y.shape[2:] == size
    # The center of gravity of an even image is its middle, up to the half pixel of a filter of even length.
    weights = torch.arange(y.shape[3], dtype=torch.float64)
    middle = (y * weights).sum() / y.sum()
    assert abs(middle - (y.shape[3] - 1) / 2) <= 0.5


def test_upsampling_keeps_the_mean_of_a_constant_image():
    f = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    y = ops.upsample2d(torch.ones(1, 1, 8, 8), f, up=2)
    torch.testing.assert_close(y[:, :, 2:-2, 2:-2], torch.ones(1, 1, 12, 12))


def test_the_cpu_kernel_runs_where_it_can(monkeypatch):
    calls = []
    kernel = native_kernels.upfirdn2d
    monkeypatch.setattr(native_kernels, "upfirdn2d", lambda *a: calls.append(1) or kernel(*a))
    x = torch.randn(1, 2, 6, 6, requires_grad=True)
    ops.upfirdn2d(x, FILTERS["1-D"], padding=2).sum().backward()
    assert len(calls) == 2
    with backends.use_backend("reference"):
        ops.upfirdn2d(x, FILTERS["1-D"], padding=2).sum().backward()
    assert len(calls) == 2


class Blocks(nn.Module):
    """Convolutions, each followed by a filtered downsampling, as in StyleGAN2's discriminator."""

    def __init__(self, resample):
        super().__init__()
        torch.manual_seed(0)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, 1, 1) for a, b in ((3, 16), (16, 32)))
        self.head = nn.Linear(32 * 16, 1)
        self.register_buffer("f", torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8)
        self.resample = resample

    def forward(self, x):
        for conv in self.convs:
            x = self.resample(nn.functional.leaky_relu(conv(x), 0.2), self.f, down=2, padding=1)
        return self.head(x.flatten(1))


def test_a_discriminator_through_it_is_one_pass_exact_and_at_four_forwards():
    x = torch.randn(4, 3, 16, 16)
    plain, ours = Blocks(lambda *a, **k: defined(a[0].double(), *a[1:], **k).float()), Blocks(ops.upfirdn2d)
    assert fastgan.explain_penalty(ours, x) == "one pass"
    v = x.clone().requires_grad_()
    logits = plain(v)
    (g,) = torch.autograd.grad(logits.sum(), v, create_graph=True)
    (nn.functional.softplus(-logits).mean() + 5 * g.square().flatten(1).sum(1).mean()).backward()

    def step():
        logits, penalty = fastgan.logits_and_penalty(ours, x, kind="r1", weight=10.0)
        (nn.functional.softplus(-logits).mean() + penalty).backward()

    spent = work(step) / work(lambda: ours(x))
    for name, parameter in ours.named_parameters():
        assert_close(parameter.grad, plain.get_parameter(name).grad.double(), order=1)
    assert spent <= 4.1


def test_it_is_seen_by_modes_and_subclasses():
    seen = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    x = torch.randn(1, 1, 4, 4)
    with Watch():
        ops.upfirdn2d(x, None, up=2)
        ops.upfirdn2d(input=x, filter=None, up=2)
    assert seen.count(ops.upfirdn2d) == 2
    wrapped = x.as_subclass(type("Wrapped", (torch.Tensor,), {}))
    assert type(ops.upfirdn2d(wrapped, None, up=2)) is type(wrapped)


def test_a_compiled_function_may_call_it():
    x, f = torch.randn(2, 2, 6, 6), FILTERS["1-D"]
    compiled = torch.compile(lambda v: ops.upfirdn2d(v, f, up=2, padding=2), backend="eager", fullgraph=True)
    assert_close(compiled(x), defined(x.double(), f, up=2, padding=2), order=0)


def test_a_compiled_penalty_through_it_has_the_gradients_of_the_eager_one():
    model, x = Blocks(ops.upfirdn2d), torch.randn(4, 3, 16, 16)

    def step(x):
        logits, penalty = fastgan.logits_and_penalty(model, x, kind="r1", weight=10.0)
        return nn.functional.softplus(-logits).mean() + penalty

    step(x).backward()
    expected = {name: parameter.grad.double() for name, parameter in model.named_parameters()}
    model.zero_grad()
    torch.compile(step, backend="aot_eager", fullgraph=True)(x).backward()
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, expected[name], order=1)


def test_a_recorded_model_has_pytorchs_operations_alone():
    class Half(nn.Module):
        def forward(self, x):
            return ops.upfirdn2d(x, FILTERS["1-D"], down=2, padding=1)

    x = torch.randn(2, 3, 8, 8)
    expected = defined(x.double(), FILTERS["1-D"], down=2, padding=1)
    traced = torch.jit.trace(Half(), x)
    assert "fastgan::" not in str(traced.inlined_graph)
    exported = torch.export.export(Half(), (x,)).module()
    for recorded in (traced, exported, torch.fx.experimental.proxy_tensor.make_fx(Half())(x)):
        assert_close(recorded(x), expected, order=0)


@pytest.mark.parametrize("call", [{}, {"up": 2}])
@pytest.mark.parametrize("backend", BACKENDS[:3])
def test_what_is_not_finite_reaches_only_results_that_it_has_a_tap_in(backend, call):
    x = torch.ones(1, 1, 12, 12, device=device_of(backend))
    x[0, 0, 5, 5] = float("inf")
    f = torch.tensor([1.0, 2.0, 3.0, 1.0], device=x.device)
    met = ops.upfirdn2d(x.isinf().float(), f, padding=2, backend=backend, **call) > 0
    y = ops.upfirdn2d(x, f, padding=2, backend=backend, **call)
    assert torch.equal(~y.isfinite(), met)
