from __future__ import annotations

from itertools import product

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import fastgan
from fastgan import nn as fnn
from fastgan import ops
from fastgan.ops.minibatch_stddev import native_kernels
from tests.harness import BACKENDS, DTYPES, HAS_GPU, assert_close, backend_name, device_of
from tests.hypothesis_if_there import given, settings, st

# (shape, group_size, num_channels, eps). Odd, prime, 1; groups of 1, of all, of more than a Triton tile has; lines of
# the CPU kernels and tiles of the Triton kernels that are not full. Of two members the second derivative by x is
# rounding, unless eps is as large as the variance.
CASES = {
    "images": ((8, 6, 5, 5), 4, 2, 1e-8),
    "vectors": ((6, 4), 3, 1, 1e-8),
    "1-D": ((9, 3, 7), 3, 3, 1e-8),
    "3-D": ((4, 2, 3, 4, 5), 4, 1, 1e-8),
    "pairs": ((10, 5, 3, 3), 2, 5, 0.5),
    "one sample": ((1, 3, 4), 4, 1, 1e-8),
    "groups of one": ((3, 2, 4), 1, 1, 1e-8),
    "one position": ((5, 1), 5, 1, 1e-8),
    "many members": ((37, 2, 3), None, 1, 1e-8),
    "long": ((3, 2, 61, 37), 3, 1, 1e-8),
    "several blocks of channels": ((4, 12, 31, 11), 4, 4, 1e-8),
}
FEW = ("images", "vectors", "many members")


def table(every_dtype=True):
    """backend x dtype x case; through Triton's interpreter, which is slow, not every product."""
    for backend in BACKENDS[:3]:
        name = backend_name(backend)
        for dtype, case in product(DTYPES if every_dtype else DTYPES[:2], CASES):
            usual = dtype == torch.float32 and (case in FEW or (every_dtype and case in ("3-D", "pairs")))
            if name == "triton" and not HAS_GPU and not usual and case != "images":
                continue
            marks = backend.marks if hasattr(backend, "marks") else ()
            yield pytest.param(name, dtype, case, marks=marks, id=f"{name}-{str(dtype)[6:]}-{case}")


def apply(case, x, backend):
    _, group_size, num_channels, eps = CASES[case]
    return ops.minibatch_stddev(x, group_size=group_size, num_channels=num_channels, eps=eps, backend=backend)


def problem(case, dtype, backend):
    """x and the weights of a score, drawn in float64 and rounded to a dtype, so that every dtype sees one problem."""
    shape, _, num_channels, _ = CASES[case]
    x = torch.randn(shape, dtype=torch.float64) + 0.5
    scale = torch.randn(shape[0], shape[1] + num_channels, *shape[2:], dtype=torch.float64)
    return [t.to(device_of(backend), dtype) for t in (x, scale)]


def leaves(tensors, dtype):
    return [t.detach().to(dtype, copy=True).requires_grad_() for t in tensors]


def first_order(case, x, scale, backend):
    """(order of derivative, result)."""
    y = apply(case, x, backend)
    statistics, of_statistics = (t[:, x.shape[1] :] for t in (y, scale.detach()))
    (grad,) = torch.autograd.grad(y, x, scale.detach(), retain_graph=True)
    return [(0, y), (0, statistics), (1, grad), (1, torch.autograd.grad(statistics, x, of_statistics)[0])]


def second_order(case, x, scale, backend):
    """Through a penalty on the gradient of x, as for a critic, and one on that of the statistics only."""
    results, values = [], x.shape[1]
    y = apply(case, x, backend)
    for score in ((torch.tanh(y) * scale).sum(), (y * scale)[:, values:].sum()):
        (grad,) = torch.autograd.grad(score, x, create_graph=True)
        # Weighted: the plain norm of the second is all but constant, and its derivative rounding.
        penalty = (grad * x.detach()).square().mean()
        by_x, by_scale = torch.autograd.grad(penalty, (x, scale), retain_graph=True)
        results += [(2, by_x), (2, by_scale), (2, by_scale[:, values:])]
    return results


def compare(compute, case, dtype, backend):
    tensors = problem(case, dtype, backend)
    exact = compute(case, *leaves(tensors, torch.float64), "reference")
    own = compute(case, *leaves(tensors, dtype), "reference")
    for (order, a), (_, e), (_, o) in zip(compute(case, *leaves(tensors, dtype), backend), exact, own, strict=True):
        assert a.dtype == dtype
        assert_close(a, e, order=order, reference=o)


@pytest.mark.parametrize(("backend", "dtype", "case"), list(table()))
def test_values_and_gradients_equal_the_definition_in_float64(backend, dtype, case):
    compare(first_order, case, dtype, backend)


@pytest.mark.parametrize(("backend", "dtype", "case"), list(table(every_dtype=False)))
def test_second_order_through_a_penalty_equals_the_definition(backend, dtype, case):
    compare(second_order, case, dtype, backend)


@pytest.mark.parametrize(
    ("backend", "dtype"), [("cpu", torch.float16), ("cpu", torch.bfloat16), ("triton", torch.bfloat16)]
)
def test_second_order_in_half_precision_errs_at_most_twice_as_much_as_pytorch(backend, dtype):
    compare(second_order, "images", dtype, backend)


@pytest.mark.parametrize("broken", ["by_dy", "by_x"])
def test_a_broken_double_backward_would_be_seen_by_the_penalty(broken, monkeypatch):
    whole = native_kernels.double_backward

    def without(*arguments):
        whole(*arguments)
        arguments[("by_dy", "by_x").index(broken) + 3][:, -1].mul_(1.01)

    monkeypatch.setattr(native_kernels, "double_backward", without)
    with pytest.raises(AssertionError, match="relative error"):
        compare(second_order, "images", torch.float32, "cpu")


def test_the_definition_is_that_of_a_loop_over_groups():
    x = torch.randn(8, 6, 2, 3, dtype=torch.float64)
    y = ops.minibatch_stddev(x, group_size=4, num_channels=3, backend="reference")
    assert torch.equal(y[:, :6], x)
    for n, f in product(range(8), range(3)):
        members = torch.stack([x[i, 2 * f : 2 * f + 2] for i in range(8) if i % 2 == n % 2])  # strided: 8 / 4 groups
        expected = (members.var(0, correction=0) + 1e-8).sqrt().mean()
        torch.testing.assert_close(y[n, 6 + f], expected.expand(2, 3), rtol=1e-12, atol=0)


def test_one_sample_gives_the_root_of_eps():
    y = ops.minibatch_stddev(torch.randn(1, 3, 4, 4), eps=1e-4)
    torch.testing.assert_close(y[:, 3], torch.full((1, 4, 4), 1e-2))


@pytest.mark.parametrize("backend", BACKENDS[:3])
def test_equal_samples_have_a_finite_gradient(backend):
    x = torch.ones(4, 3, 5, device=device_of(backend), requires_grad=True)
    y = ops.minibatch_stddev(x, backend=backend)
    (grad,) = torch.autograd.grad(y[:, 3].sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum() + grad.sum(), x)
    assert not grad.any()
    assert second.isfinite().all()


@pytest.mark.parametrize(("samples", "group_size", "size"), [(6, 4, 3), (7, 4, 1), (12, 8, 6), (9, None, 9)])
def test_the_largest_divisor_takes_the_place_of_a_group_size_that_does_not_divide(samples, group_size, size):
    x = torch.randn(samples, 3, 4)
    actual = ops.minibatch_stddev(x, group_size=group_size, remainder="largest-divisor")
    assert torch.equal(actual, ops.minibatch_stddev(x, group_size=size))


@pytest.mark.parametrize("shape", [(6, 4, 2, 1), (3, 2), (6, 2, 3)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_gradcheck_and_gradgradcheck_hold(backend, shape):
    shapes = shape, (shape[0], shape[1] + 2, *shape[2:])
    x, scale = (torch.randn(s, dtype=torch.float64, device=device_of(backend), requires_grad=True) for s in shapes)

    def appended(x):
        return ops.minibatch_stddev(x, group_size=3, num_channels=2, backend=backend)

    assert gradcheck(appended, x)
    assert gradgradcheck(appended, x, scale)


@pytest.mark.parametrize("backend", BACKENDS[2:3])
def test_gradcheck_and_gradgradcheck_hold_along_random_directions(backend):
    x, scale = (torch.randn(3, n, dtype=torch.float64, device=device_of(backend), requires_grad=True) for n in (2, 4))

    def appended(x):
        return ops.minibatch_stddev(x, group_size=3, num_channels=2, backend=backend)

    assert gradcheck(appended, x, fast_mode=True)
    assert gradgradcheck(appended, x, scale, fast_mode=True)


def test_only_the_second_derivatives_that_are_asked_for_are_made(monkeypatch):
    whole, calls = native_kernels.double_backward, []

    def spy(*arguments):
        calls.append(tuple(t is not None for t in arguments[3:5]))
        whole(*arguments)

    monkeypatch.setattr(native_kernels, "double_backward", spy)
    for wanted in (False, True):
        x, scale = leaves(problem("images", torch.float32, "cpu"), torch.float32)
        (grad,) = torch.autograd.grad(apply("images", x, "cpu"), x, scale.requires_grad_(wanted), create_graph=True)
        grad.square().sum().backward()
        assert calls.pop() == (wanted, True)


def test_what_is_kept_for_backward_is_the_input_alone():
    x = torch.randn(8, 6, 5, 5, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        y = ops.minibatch_stddev(x, backend="cpu")
        assert [t.data_ptr() for t in kept] == [x.data_ptr()]
        kept.clear()
        torch.autograd.grad(y.sum(), x, create_graph=True)
    assert sum(t.numel() for t in kept if t.data_ptr() != x.data_ptr()) <= 8


@pytest.mark.parametrize("backend", BACKENDS[1:3])
def test_opcheck_accepts_the_operators(backend, monkeypatch):
    monkeypatch.undo()  # opcheck compares allocations of its own
    x, y = (t.float() for t in problem("images", torch.float32, backend))
    layout = [2, 4, 1, 2, 75, 25]
    slope = x.new_ones(2, 2)
    forward = x, torch.empty_like(y), layout, 1e-8, backend
    backward = y, x, torch.empty_like(x), torch.empty_like(slope), layout, 1e-8, backend
    double = x, x, slope, torch.empty_like(y), None, layout, 1e-8, backend
    for order, arguments in (("fwd", forward), ("bwd", backward), ("bwd_bwd", double)):
        torch.library.opcheck(getattr(torch.ops.fastgan, f"minibatch_stddev_{order}"), arguments)


@pytest.mark.parametrize(("backend", "case"), [("cpu", "images"), ("cpu", "3-D"), ("triton", "images")])
def test_strides_do_not_matter_and_channels_last_is_kept(backend, case):
    x, scale = problem(case, torch.float32, backend)
    last = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
    forms = {
        "contiguous": x,
        "channels_last": x.contiguous(memory_format=last),
        "transposed": x.mT.contiguous().mT,
        "sliced": torch.cat([x, x], 1)[:, : x.shape[1]],
    }
    results = {}
    for name, form in forms.items():
        form = form.detach().requires_grad_()
        y = apply(case, form, backend)
        kept = last if name == "channels_last" else torch.contiguous_format
        assert y.is_contiguous(memory_format=kept)
        (grad,) = torch.autograd.grad(y, form, scale.mT.contiguous().mT, create_graph=True)
        results[name] = [y, grad, *torch.autograd.grad(grad.square().sum(), form)]
        assert all(t.is_contiguous(memory_format=kept) for t in results[name])
    for name, result in results.items():
        for order, (a, e) in enumerate(zip(result, results["contiguous"], strict=True)):
            assert_close(a, e.double(), order=order)  # channels_last adds in another order
            assert name == "channels_last" or torch.equal(a, e)


@pytest.mark.parametrize("backend", BACKENDS[:3])
def test_the_same_inputs_give_the_same_bits(backend):
    tensors = problem("images", torch.float32, backend)
    first, second = (second_order("images", *leaves(tensors, torch.float32), backend) for _ in range(2))
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(first, second, strict=True))


@pytest.mark.parametrize("shape", [(8, 16, 64, 64), (64, 96, 5), (4, 70001)])
def test_the_cpu_kernels_give_the_same_bits_on_any_number_of_threads(shape):
    x, scale = torch.randn(shape, requires_grad=True), torch.randn(shape[0], shape[1] + 1, *shape[2:])
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            y = ops.minibatch_stddev(x, backend="cpu")
            (grad,) = torch.autograd.grad(y, x, scale, create_graph=True)
            results.append([y, grad, *torch.autograd.grad(grad.square().sum(), x)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_computes_the_same(isa, dtype, monkeypatch):
    native = fastgan.backends.native()
    available = ["baseline", "avx2", "avx512"]
    if available.index(isa) > available.index(native.isa()):
        pytest.skip(f"this processor's best instruction set is {native.isa()}")
    used = set()

    class Forced:
        def __getattr__(self, name):
            used.add(name)
            return lambda *arguments: getattr(native, name)(*arguments, isa=isa)

    monkeypatch.setattr(fastgan.backends, "native", Forced)
    compare(first_order, "images", dtype, "cpu")
    compare(second_order, "images", dtype, "cpu")
    assert used == {f"minibatch_stddev_{order}" for order in ("forward", "backward", "double_backward")}


@settings(max_examples=50, deadline=None)
@given(
    groups=st.integers(1, 3),
    size=st.integers(3, 9),
    blocks=st.integers(1, 3),
    channels=st.integers(1, 4),
    spatial=st.lists(st.integers(1, 30), max_size=2),
    last=st.booleans(),
)
def test_any_shape_matches_on_the_cpu(groups, size, blocks, channels, spatial, last):
    x = torch.randn(groups * size, blocks * channels, *spatial, dtype=torch.float64)
    if last and x.ndim == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    results = []
    for backend in ("cpu", "reference"):
        x = x.detach().requires_grad_()
        y = ops.minibatch_stddev(x, group_size=size, num_channels=blocks, backend=backend)
        (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        results.append([y, grad, *torch.autograd.grad(grad.square().sum(), x)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def test_autocast_keeps_the_statistics_in_float32():
    x = 1000 + torch.randn(4, 8, 4, 4)  # whose squares overflow float16
    with torch.autocast("cpu", torch.float16):
        assert ops.minibatch_stddev(x).dtype == torch.float32
        y = ops.minibatch_stddev(x.half())
    assert y.dtype == torch.float16
    assert_close(y, ops.minibatch_stddev(x.half().double()), order=0, reference=y)


def test_a_penalty_in_one_call_is_exact_with_the_layer_in_the_discriminator():
    discriminator = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), fnn.MinibatchStdDev(), torch.nn.Flatten(), torch.nn.Linear(180, 1)
    )
    x = torch.randn(8, 3, 8, 8)
    logits, penalty = fastgan.logits_and_penalty(discriminator, x, kind="r1", weight=1.0)
    actual = torch.autograd.grad(logits.square().sum() + penalty, list(discriminator.parameters()))
    leaf = x.clone().requires_grad_()
    with fastgan.use_backend("reference"):
        out = discriminator(leaf)
        (grad,) = torch.autograd.grad(out.sum(), leaf, create_graph=True)
        exact = out.square().sum() + 0.5 * grad.square().sum() / 8
    for a, e in zip(actual, torch.autograd.grad(exact, list(discriminator.parameters())), strict=True):
        assert_close(a, e.double(), order=2)


def test_the_layer_is_the_op_and_says_its_settings():
    layer = fnn.MinibatchStdDev(2, 3, eps=0.1, remainder="largest-divisor")
    x = torch.randn(6, 9, 2, 2)
    assert torch.equal(layer(x), ops.minibatch_stddev(x, group_size=2, num_channels=3, eps=0.1))
    assert repr(layer) == "MinibatchStdDev(group_size=2, num_channels=3, eps=0.1, remainder='largest-divisor')"
    assert not layer.state_dict()


X = torch.randn(6, 4, 5, generator=torch.Generator().manual_seed(0))
BAD = {
    "not a tensor": (lambda: ops.minibatch_stddev([1.0]), TypeError, "x must be a tensor, got list"),
    "integers": (lambda: ops.minibatch_stddev(X.int()), TypeError, r"x must be float16, .* got torch\.int32"),
    "one dimension": (lambda: ops.minibatch_stddev(X[0, 0]), ValueError, r"x must be \(N, C, \*S\).* got shape \(5,\)"),
    "empty": (lambda: ops.minibatch_stddev(X[:0]), ValueError, r"at least one element, got shape \(0, 4, 5\)"),
    "a remainder": (lambda: ops.minibatch_stddev(X), ValueError, "got N = 6 and groups of 4"),
    "channels": (
        lambda: ops.minibatch_stddev(X, group_size=3, num_channels=3),
        ValueError,
        "num_channels must divide the 4 channels of x, got 3",
    ),
    "no channels": (lambda: ops.minibatch_stddev(X, num_channels=0), ValueError, "num_channels must be a positive"),
    "group_size": (lambda: ops.minibatch_stddev(X, group_size=0), ValueError, "group_size must be a positive .* got 0"),
    "eps": (lambda: ops.minibatch_stddev(X, eps=0.0), ValueError, r"eps must be a positive number, got 0\.0"),
    "word": (lambda: ops.minibatch_stddev(X, remainder="drop"), ValueError, "remainder must be one of .* got 'drop'"),
    "module": (lambda: fnn.MinibatchStdDev(num_channels=-1), ValueError, "num_channels must be a positive"),
    "backend": (lambda: ops.minibatch_stddev(X, group_size=3, backend="cudnn"), ValueError, "backend must be one of"),
    "no such backend": (
        lambda: ops.minibatch_stddev(X, group_size=3, backend="cuda"),
        fastgan.BackendUnavailable,
        "minibatch_stddev has no cuda",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input_raises_a_message_that_names_it(call, error, message):
    with pytest.raises(error, match=message):
        call()
