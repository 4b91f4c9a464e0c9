"""upfirdn2d against its definition, on each backend: values, first and second order, layouts."""

from __future__ import annotations

import os

import pytest
import torch

from fastgan import backends, ops
from tests.harness import BACKENDS, DTYPES, HAS_GPU, assert_close, backend_name, device_of
from tests.hypothesis_if_there import given, settings, st
from tests.ops.one_pass_problem import work
from tests.ops.upfirdn2d_problem import CALLS, FILTERS, defined, orders


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
    actual = orders(lambda v: ops.upfirdn2d(v, taps, **options, backend=backend), x, by)
    expected = orders(lambda v: defined(v, taps, **options), x, by)
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
    actual = orders(lambda v: ops.upfirdn2d(v, taps, **options), x, by)
    expected = orders(lambda v: defined(v, taps, **options), x, by)
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
    expected = orders(lambda v: defined(v, f, **options), x, by)
    for backend in ("cpu", "reference"):
        actual = orders(lambda v, b=backend: ops.upfirdn2d(v, f, **options, backend=b), x, by)
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
    expected = orders(lambda v: defined(v, f, **options), x, by)
    actual = orders(lambda v: ops.upfirdn2d(v, f, **options, backend="triton"), x.to(device), by.to(device))
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


@pytest.mark.parametrize("call", [{}, {"up": 2}])
@pytest.mark.parametrize("backend", BACKENDS[:3])
def test_what_is_not_finite_reaches_only_results_that_it_has_a_tap_in(backend, call):
    x = torch.ones(1, 1, 12, 12, device=device_of(backend))
    x[0, 0, 5, 5] = float("inf")
    f = torch.tensor([1.0, 2.0, 3.0, 1.0], device=x.device)
    met = ops.upfirdn2d(x.isinf().float(), f, padding=2, backend=backend, **call) > 0
    y = ops.upfirdn2d(x, f, padding=2, backend=backend, **call)
    assert torch.equal(~y.isfinite(), met)
