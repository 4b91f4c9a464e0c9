"""Normalization: values and derivatives on every backend."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import fastgan
from fastgan.ops.norm import native_kernels
from tests.harness import BACKENDS, DTYPES, HAS_GPU, assert_close, backend_name, device_of
from tests.ops.norm_problem import AFFINE, CASES, apply, compare, penalty_gradients, problem_of, values_and_gradients

FEW = ("layer, images", "group, 1-D", "batch, channels_last")
SLOW = ("layer, many rows", "layer, long rows", "batch, long channels")
TOO_SLOW = (  # through Triton's interpreter: a second a case for kernels that another case has been through
    "batch, many vectors",
    "group, channels_last, wide",
    "group, channels_last, many",
    "instance, channels_last",
    "batch, channels_last, 3-D",
    "batch, 1-D",
    "layer, channels_last",
)


def table(every_dtype=True):
    """backend x dtype x case x affine; through Triton's interpreter, which is slow, not every product."""
    for backend in BACKENDS[:3]:
        name = backend_name(backend)
        interpreted = name == "triton" and not HAS_GPU
        for dtype, case, (label, affine) in product(DTYPES if every_dtype else DTYPES[:2], CASES, AFFINE.items()):
            usual = dtype == torch.float32 and affine == (True, True) and case not in TOO_SLOW
            if interpreted and not usual and (case not in FEW or (dtype != torch.float32 and affine != (True, True))):
                continue
            if interpreted and not every_dtype and case in SLOW:
                continue
            marks = backend.marks if hasattr(backend, "marks") else ()
            yield pytest.param(name, dtype, case, affine, marks=marks, id=f"{name}-{str(dtype)[6:]}-{case}-{label}")


@pytest.mark.parametrize(("backend", "dtype", "case", "affine"), list(table()))
def test_values_and_gradients_equal_pytorch_in_float64(backend, dtype, case, affine):
    compare(values_and_gradients, problem_of(case, affine, dtype, device_of(backend)), backend, dtype)


@pytest.mark.parametrize(("backend", "dtype", "case", "affine"), list(table(every_dtype=False)))
def test_second_order_through_a_penalty_equals_pytorch(backend, dtype, case, affine):
    compare(penalty_gradients, problem_of(case, affine, dtype, device_of(backend)), backend, dtype)


@pytest.mark.parametrize("case", ["layer, images", "group, 2-D", "batch, channels_last"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS[1:3])
def test_second_order_in_half_precision_errs_at_most_twice_as_much_as_pytorch(backend, dtype, case):
    compare(penalty_gradients, problem_of(case, (True, True), dtype, device_of(backend)), backend, dtype)


@pytest.mark.parametrize("broken", ["by_dy", "by_x", "by_weight"])
def test_a_broken_double_backward_would_be_seen_by_the_penalty(broken, monkeypatch):
    whole = native_kernels.double_backward

    def without(operands, layout):
        whole(operands, layout)
        result = getattr(operands, broken)
        if result is not None:
            result.mul_(1.01)

    monkeypatch.setattr(native_kernels, "double_backward", without)
    with pytest.raises(AssertionError, match="relative error"):
        compare(penalty_gradients, problem_of("group, 2-D", dtype=torch.float32), "cpu", torch.float32)


@pytest.mark.parametrize(
    "case", ["layer, images", "group, 1-D", "group, vectors", "group, channels_last", "instance, 1-D", "batch, 1-D"]
)
@pytest.mark.parametrize("backend", BACKENDS[:3])
def test_gradcheck_and_gradgradcheck_hold(backend, case):
    smaller = {
        "layer, images": ("layer_norm", (3, 2, 3), (2, 3)),
        "group, 1-D": ("group_norm", (2, 4, 3), 2),
        "group, vectors": ("group_norm", (2, 6), 2),
        "group, channels_last": ("group_norm", (2, 4, 3, 1), 2, torch.channels_last),
        "instance, 1-D": ("instance_norm", (2, 2, 5), None),
        "batch, 1-D": ("batch_norm", (3, 2, 3), None),
    }
    if backend == "triton" and case not in ("layer, images", "group, vectors", "batch, 1-D") and not HAS_GPU:
        pytest.skip("the interpreter is slow: a case each for rows, vectors and channels")
    problem = problem_of(smaller[case], device=device_of(backend)).to(torch.float64)
    inputs = problem.x, problem.weight, problem.bias

    def normalized(x, weight, bias):
        return apply(problem.op, problem.argument, x, weight, bias, backend)

    fast = backend == "triton"  # its interpreter is slow: random projections instead of every element
    assert gradcheck(normalized, inputs, fast_mode=fast)
    assert gradgradcheck(normalized, inputs, fast_mode=fast)


def recorded(monkeypatch, name):
    """Record the results that each call of a native kernel computes: True if one was requested."""
    kernel, calls = getattr(native_kernels, name), []

    def spy(operands, layout):
        calls.append(tuple(t is not None for t in operands[-3:]))
        kernel(operands, layout)

    monkeypatch.setattr(native_kernels, name, spy)
    return calls


def test_only_the_gradients_that_are_asked_for_are_made(monkeypatch):
    calls = recorded(monkeypatch, "backward")
    for wanted in [(True, False, False), (False, True, False), (False, False, True), (True, True, True)]:
        problem = problem_of("group, 2-D", dtype=torch.float32).to(torch.float32)
        leaves = problem.x, problem.weight, problem.bias
        for leaf, wants in zip(leaves, wanted, strict=True):
            leaf.requires_grad_(wants)
        problem("cpu").square().sum().backward()
        assert calls.pop() == wanted
        assert tuple(leaf.grad is not None for leaf in leaves) == wanted


def test_a_gradient_of_the_input_alone_leaves_the_parameters_out(monkeypatch):
    calls = recorded(monkeypatch, "backward")
    problem = problem_of("group, 2-D", dtype=torch.float32).to(torch.float32)
    loss = problem("cpu").square().sum()
    (grad,) = torch.autograd.grad(loss, problem.x, create_graph=True)
    assert calls == [(True, False, False)]
    actual = torch.autograd.grad(grad.square().sum(), problem.leaves()[:3])
    (grad,) = torch.autograd.grad(problem("reference").square().sum(), problem.x, create_graph=True)
    for a, e in zip(actual, torch.autograd.grad(grad.square().sum(), problem.leaves()[:3]), strict=True):
        assert_close(a, e.double(), order=2)
    assert calls[1:] == [(True, True, True)]


def test_the_double_backward_makes_no_gradient_for_an_input_that_wants_none(monkeypatch):
    calls = recorded(monkeypatch, "double_backward")
    problem = problem_of("group, 2-D", dtype=torch.float32).to(torch.float32)
    problem.x.requires_grad_(False)
    out = problem("cpu")
    (by_weight,) = torch.autograd.grad(out, problem.weight, problem.scale, create_graph=True)
    torch.autograd.grad(by_weight.square().sum(), problem.scale)
    assert calls == [(True, False, False)]


def test_what_does_not_depend_on_an_input_has_no_gradient_there():
    problem = problem_of("group, 2-D", dtype=torch.float32).to(torch.float32)
    leaves = problem.scale, problem.x, problem.weight
    by_x, by_weight, by_bias = torch.autograd.grad(
        problem("cpu"), (problem.x, problem.weight, problem.bias), problem.scale, create_graph=True
    )
    for result, depends_on in (
        (by_x, (True, True, True)),
        (by_weight, (True, True, False)),
        (by_bias, (True, False, False)),
    ):
        grads = torch.autograd.grad(result.sin().sum(), leaves, allow_unused=True, retain_graph=True)
        assert tuple(g is not None for g in grads) == depends_on


@pytest.mark.parametrize("backend", BACKENDS[1:3])
def test_opcheck_accepts_the_operators(backend, monkeypatch):
    monkeypatch.undo()  # opcheck compares allocations of its own
    problem = problem_of("group, 2-D", dtype=torch.float32, device=device_of(backend))
    x, w, b, dy = problem.x, problem.weight, problem.bias, problem.scale
    layout = [3, 1, 12, 25, 4, False]
    y, statistics = torch.empty_like(x), x.new_empty(2, 12)
    forward = x, w, b, y, statistics, layout, 1e-5, backend
    torch.ops.fastgan.norm_fwd(*forward)
    backward = dy, x, statistics, w, torch.empty_like(x), torch.empty_like(w), None, layout, backend
    double = x, w, None, dy, x, statistics, w, torch.empty_like(x), None, torch.empty_like(w), layout, backend
    for name, arguments in (("norm_fwd", forward), ("norm_bwd", backward), ("norm_bwd_bwd", double)):
        torch.library.opcheck(getattr(torch.ops.fastgan, name), arguments)


@pytest.mark.parametrize("case", FEW)
@pytest.mark.parametrize("backend", BACKENDS[:3])
def test_the_same_inputs_give_the_same_bits(backend, case):
    problem = problem_of(case, dtype=torch.float32, device=device_of(backend))
    first, second = (penalty_gradients(problem.to(torch.float32), backend) for _ in range(2))
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(first, second, strict=True))


@pytest.mark.parametrize(
    "case",
    [
        ("layer_norm", (2, 50021), (50021,)),
        ("layer_norm", (700, 67), (67,)),
        ("group_norm", (9, 12, 19, 23), 4),
        ("instance_norm", (1, 3, 160, 160), None),
        ("batch_norm", (5, 3, 67, 61), None),
        ("batch_norm", (5, 24, 19, 23), None, torch.channels_last),
        ("group_norm", (17, 12, 19, 23), 4, torch.channels_last),
    ],
    ids=lambda case: "-".join(map(str, case)),
)
def test_the_cpu_kernels_give_the_same_bits_on_any_number_of_threads(case):
    problem = problem_of(case, dtype=torch.float32)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            leaves = problem.to(torch.float32)
            by = leaves.x, leaves.weight, leaves.bias
            y = leaves("cpu")
            grads = torch.autograd.grad(y, by, leaves.scale, create_graph=True)
            results.append([y, *grads, *torch.autograd.grad(grads, (leaves.x, leaves.weight, leaves.scale), by)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def forced_isa(request, monkeypatch):
    """The kernels of one instruction set; yields the names of those that are called."""
    native, isa = fastgan.backends.native(), request.param
    available = ["baseline", "avx2", "avx512"]
    if available.index(isa) > available.index(native.isa()):
        pytest.skip(f"this processor's best instruction set is {native.isa()}")
    used = []

    class Forced:
        def __getattr__(self, name):
            used.append(name)
            return lambda *arguments: getattr(native, name)(*arguments, isa=isa)

    monkeypatch.setattr(fastgan.backends, "native", Forced)
    yield used
    assert {"norm_forward", "norm_backward", "norm_double_backward"} <= set(used)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set_computes_the_same(dtype, forced_isa):
    compare(values_and_gradients, problem_of("group, 2-D", dtype=dtype), "cpu", dtype)
    compare(penalty_gradients, problem_of("group, 2-D", dtype=dtype), "cpu", dtype)


@pytest.mark.parametrize(
    "case",
    [
        ("layer_norm", (41, 102407), (102407,)),
        pytest.param(("instance_norm", (2, 3, 853, 821), None), marks=pytest.mark.long),
    ],
    ids=lambda case: f"cpu-{case[0]}",
)
def test_results_that_are_written_past_the_caches_are_whole(case, forced_isa):
    """From 16 MB on; lines begin and end anywhere."""
    problem = problem_of(case, dtype=torch.float32)
    assert problem.x.nbytes >= 16 << 20
    compare(values_and_gradients, problem, "cpu", torch.float32)
    compare(penalty_gradients, problem, "cpu", torch.float32)


def test_an_input_that_is_not_contiguous_is_copied_once():
    """All orders of derivative read the copy, and the penalty's gradients are exact."""
    x = torch.randn(4, 64, 16, dtype=torch.float64).transpose(1, 2).requires_grad_()
    by_norm = []
    for norm in (fastgan.ops.layer_norm, torch.nn.functional.layer_norm):
        y = norm(x, (64,))
        (grad,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        by_norm.append((y, grad, torch.autograd.grad(grad.square().sum(), x)[0]))
    torch.testing.assert_close(*by_norm)
    y = fastgan.ops.layer_norm(x, (64,), backend="cpu")
    assert y.grad_fn.saved_tensors[0].is_contiguous()
