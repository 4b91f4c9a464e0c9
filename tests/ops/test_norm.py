from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

import fastgan
from fastgan import ops
from fastgan.ops.inputs_only import inputs_only
from fastgan.ops.norm import native_kernels
from tests.harness import BACKENDS, DTYPES, HAS_GPU, assert_close, backend_name, device_of, relative_error

# Odd, prime, 1; one element a channel, one channel a row; above a line of the CPU kernels and a block of the Triton
# kernels and below them; many short rows, few long ones.
CASES = {
    "layer, rows of 7": ("layer_norm", (5, 7), (7,)),
    "layer, rows of 1": ("layer_norm", (4, 1), (1,)),
    "layer, one vector": ("layer_norm", (31,), (31,)),
    "layer, images": ("layer_norm", (3, 4, 5, 6), (4, 5, 6)),
    "layer, many rows": ("layer_norm", (70, 33), (33,)),
    "layer, long rows": ("layer_norm", (2, 10007), (10007,)),
    "group, vectors": ("group_norm", (6, 12), 3),
    "group, 1-D": ("group_norm", (2, 15, 13), 5),
    "group, 2-D": ("group_norm", (3, 12, 5, 5), 4),
    "group, 3-D": ("group_norm", (2, 4, 3, 4, 5), 2),
    "group, one group": ("group_norm", (2, 6, 7), 1),
    "group, long rows": ("group_norm", (1, 6, 61, 37), 2),
    "instance, 1-D": ("instance_norm", (3, 5, 17), None),
    "instance, 2-D": ("instance_norm", (2, 3, 9, 11), None),
    "instance, 3-D": ("instance_norm", (2, 3, 3, 4, 5), None),
    "instance, long channels": ("instance_norm", (1, 2, 97, 53), None),
    "batch, vectors": ("batch_norm", (13, 6), None),
    "batch, 1-D": ("batch_norm", (3, 5, 17), None),
    "batch, 2-D": ("batch_norm", (5, 3, 7, 5), None),
    "batch, long channels": ("batch_norm", (2, 2, 41, 31), None),
    "batch, many vectors": ("batch_norm", (1031, 40), None),
    "group, channels_last": ("group_norm", (3, 12, 5, 7), 4, torch.channels_last),
    "group, channels_last, wide": ("group_norm", (2, 1034, 3, 3), 2, torch.channels_last),
    "group, channels_last, many": ("group_norm", (17, 6, 3, 3), 3, torch.channels_last),
    "instance, channels_last": ("instance_norm", (2, 6, 23, 31), None, torch.channels_last),
    "batch, channels_last": ("batch_norm", (3, 5, 7, 9), None, torch.channels_last),
    "batch, channels_last, 3-D": ("batch_norm", (2, 3, 11, 13, 17), None, torch.channels_last_3d),
    "layer, channels_last": ("layer_norm", (3, 4, 5, 6), (4, 5, 6), torch.channels_last),
}
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
# No bias alone: PyTorch's group_norm and layer_norm have no derivative there, see the test of it below.
AFFINE = {"weight and bias": (True, True), "no affine": (False, False), "weight": (True, False)}
PARTS = ("x", "weight", "bias", "scale")


@dataclass
class Problem:
    """An op and its operands, drawn in float64 and rounded to a dtype, so that every dtype sees one problem."""

    op: str
    argument: object
    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    scale: Tensor

    def to(self, dtype: torch.dtype) -> Problem:
        parts = {name: getattr(self, name) for name in PARTS}
        leaves = {n: None if t is None else t.detach().to(dtype, copy=True).requires_grad_() for n, t in parts.items()}
        return Problem(self.op, self.argument, **leaves)

    def leaves(self) -> list[Tensor]:
        return [t for t in (self.x, self.weight, self.bias, self.scale) if t is not None]

    def __call__(self, backend: str, x: Tensor | None = None) -> Tensor:
        return apply(self.op, self.argument, self.x if x is None else x, self.weight, self.bias, backend)


def apply(op, argument, x, weight, bias, backend):
    if op == "instance_norm":
        return ops.instance_norm(x, weight=weight, bias=bias, backend=backend)
    if op == "batch_norm":
        return ops.batch_norm(x, None, None, weight, bias, training=True, backend=backend)
    return getattr(ops, op)(x, argument, weight, bias, backend=backend)


def problem_of(case, affine=(True, True), dtype=torch.float64, device="cpu", offset=0.5):
    op, shape, argument, *order = CASES[case] if isinstance(case, str) else case
    of_channel = argument if op == "layer_norm" else shape[1:2]
    draws = {"x": torch.randn(shape, dtype=torch.float64) + offset, "scale": torch.randn(shape, dtype=torch.float64)}
    draws["weight"] = 1 + torch.randn(of_channel, dtype=torch.float64) / 2 if affine[0] else None
    draws["bias"] = torch.randn(of_channel, dtype=torch.float64) if affine[1] else None
    if order:
        draws["x"] = draws["x"].contiguous(memory_format=order[0])
    return Problem(op, argument, **{n: None if t is None else t.to(device, dtype) for n, t in draws.items()})


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


def values_and_gradients(problem: Problem, backend: str) -> list[tuple[int, Tensor]]:
    """(order of derivative, result)."""
    y = problem(backend)
    by = [t for t in (problem.x, problem.weight, problem.bias) if t is not None]
    return [(0, y), *((1, g) for g in torch.autograd.grad(y, by, problem.scale.detach()))]


def penalty_gradients(problem: Problem, backend: str) -> list[tuple[int, Tensor]]:
    """Through a penalty on the gradient by x, as of a critic, and through one on the gradients by weight and bias."""
    score = (torch.tanh(problem(backend)) * problem.scale).sum()
    (grad_x,) = torch.autograd.grad(score, problem.x, create_graph=True)
    affine = [t for t in (problem.weight, problem.bias) if t is not None]
    grads = torch.autograd.grad(score, affine, create_graph=True) if affine else ()
    results = list(torch.autograd.grad(grad_x.square().mean(), problem.leaves(), retain_graph=True))
    if grads:
        results += torch.autograd.grad(sum(g.square().mean() for g in grads), problem.leaves())
    return [(2, result) for result in results]


def compare(compute, problem, backend, dtype):
    exact = compute(problem.to(torch.float64), "reference")
    own = compute(problem.to(dtype), "reference")
    actual = compute(problem.to(dtype), backend)
    for (order, a), (_, e), (_, o) in zip(actual, exact, own, strict=True):
        assert a.dtype == dtype
        if e.norm() < 1e-9:  # of one value a row nothing is left but rounding, times 1 / sqrt(eps) an order
            assert a.double().norm() <= 1e5 * torch.finfo(dtype).eps
        else:
            assert_close(a, e.to(a.device), order=order, reference=o)


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

    def normalised(x, weight, bias):
        return apply(problem.op, problem.argument, x, weight, bias, backend)

    fast = backend == "triton"  # its interpreter is slow: random projections instead of every element
    assert gradcheck(normalised, inputs, fast_mode=fast)
    assert gradgradcheck(normalised, inputs, fast_mode=fast)


@pytest.mark.parametrize("backend", BACKENDS[1:3])  # PyTorch's group_norm of channels_last does lose them
@pytest.mark.parametrize(
    "case", ["layer, long rows", "group, 2-D", "instance, long channels", "batch, 2-D", "group, channels_last"]
)
def test_a_mean_far_from_zero_costs_no_digits(backend, case):
    problem = problem_of(case, (False, False), torch.float32, device_of(backend), offset=100.0)
    exact = problem.to(torch.float64)("reference")
    assert relative_error(problem(backend), exact) <= 1e-5


@pytest.mark.parametrize("backend", BACKENDS[1:3])
def test_the_third_order_raises(backend):
    problem = problem_of("group, 1-D", device=device_of(backend)).to(torch.float64)
    (first,) = torch.autograd.grad(problem(backend).pow(3).sum(), problem.x, create_graph=True)
    (second,) = torch.autograd.grad(first.pow(3).sum(), problem.x, create_graph=True)
    with pytest.raises(RuntimeError, match="third derivative"):
        torch.autograd.grad(second.sum(), problem.x)


def recorded(monkeypatch, name):
    """What each call of a native kernel was asked for: True where a result was wanted."""
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


def test_a_penalty_that_asks_for_inputs_only_leaves_the_parameters_out(monkeypatch):
    calls = recorded(monkeypatch, "backward")
    problem = problem_of("group, 2-D", dtype=torch.float32).to(torch.float32)
    loss = problem("cpu").square().sum()
    with inputs_only([loss], problem.x):
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


@pytest.mark.parametrize("backend", BACKENDS[1:3])
@pytest.mark.parametrize("case", ["layer, images", "group, 2-D", "batch, 2-D"])
def test_strides_are_kept_and_do_not_matter(backend, case):
    problem = problem_of(case, dtype=torch.float32, device=device_of(backend)).to(torch.float32)
    forms = {
        "contiguous": problem.x,
        "channels_last": problem.x.contiguous(memory_format=torch.channels_last),
        "transposed": problem.x.mT.contiguous().mT,
        "sliced": torch.cat([problem.x, problem.x], 1)[:, : problem.x.shape[1]],
    }
    results = {}
    for name, x in forms.items():
        x = x.detach().requires_grad_()
        y = problem(backend, x)
        assert y.stride() == torch.empty_like(x).stride()
        (grad,) = torch.autograd.grad(y, x, problem.scale.mT.contiguous().mT, create_graph=True)
        results[name] = [y, grad, *torch.autograd.grad(grad.square().sum(), (x, problem.weight))]
    for name, result in results.items():
        for order, a, b in zip((0, 1, 2, 2), result, results["contiguous"], strict=True):
            if name == "channels_last":  # sums are taken in the order of memory
                assert_close(a, b.double(), order=order)
            else:
                assert torch.equal(a, b), name


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_computes_the_same(isa, dtype, monkeypatch):
    native = fastgan.backends.native()
    available = ["baseline", "avx2", "avx512"]
    if available.index(isa) > available.index(native.isa()):
        pytest.skip(f"this processor's best instruction set is {native.isa()}")
    used = []

    class Forced:
        def __getattr__(self, name):
            used.append(name)
            return lambda *arguments: getattr(native, name)(*arguments, isa=isa)

    monkeypatch.setattr(fastgan.backends, "native", Forced)
    compare(values_and_gradients, problem_of("group, 2-D", dtype=dtype), "cpu", dtype)
    compare(penalty_gradients, problem_of("group, 2-D", dtype=dtype), "cpu", dtype)
    assert {"norm_forward", "norm_backward", "norm_double_backward"} <= set(used)


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 5),
    groups=st.integers(1, 4),
    channels=st.integers(1, 5),
    spatial=st.lists(st.integers(1, 40), max_size=2),
    affine=st.sampled_from(list(AFFINE.values())),
)
def test_any_shape_matches_on_the_cpu(batch, groups, channels, spatial, affine):
    shape = (batch, groups * channels, *spatial)
    if torch.Size(shape).numel() // groups == 1:
        return
    problem = problem_of(("group_norm", shape, groups), affine)
    for compute in (values_and_gradients, penalty_gradients):
        pairs = zip(
            compute(problem.to(torch.float64), "cpu"), compute(problem.to(torch.float64), "reference"), strict=True
        )
        for (_, actual), (_, expected) in pairs:
            torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("op", ["layer_norm", "group_norm", "instance_norm"])
def test_a_float32_weight_goes_with_an_input_in_half_precision(op, dtype):
    case = {"layer_norm": "layer, images", "group_norm": "group, 2-D", "instance_norm": "instance, 2-D"}[op]
    problem = problem_of(case, dtype=dtype).to(dtype)
    problem.weight, problem.bias = (t.detach().float().requires_grad_() for t in (problem.weight, problem.bias))
    actual = values_and_gradients(problem, "cpu")
    exact = values_and_gradients(problem.to(torch.float64), "reference")
    assert [a.dtype for _, a in actual] == [dtype, dtype, torch.float32, torch.float32]
    for (order, a), (_, e), (_, o) in zip(actual, exact, values_and_gradients(problem, "reference"), strict=True):
        assert_close(a, e, order=order, reference=o)


@pytest.mark.parametrize("case", ["layer, images", "group, 2-D", "instance, 2-D"])
@pytest.mark.parametrize("backend", BACKENDS[1:3])
def test_a_bias_alone_is_a_bias_with_a_weight_of_one(backend, case):
    alone = problem_of(case, (False, True), torch.float64, device_of(backend)).to(torch.float64)
    with_one = alone.to(torch.float64)
    with_one.weight = torch.ones_like(alone.bias)
    for problem in (alone, with_one):
        problem.results = [
            *torch.autograd.grad(
                torch.tanh(problem(backend)).square().sum(), (problem.x, problem.bias), create_graph=True
            )
        ]
        penalty = sum(g.square().sum() for g in problem.results)
        problem.results += torch.autograd.grad(penalty, (problem.x, problem.bias))
    for a, e in zip(alone.results, with_one.results, strict=True):
        assert_close(a, e, order=2)


@pytest.mark.parametrize("op", ["layer_norm", "group_norm"])  # PyTorch's instance_norm raises an IndexError
def test_an_empty_batch_gives_what_pytorch_gives(op):
    x = torch.randn(0, 4, 5, requires_grad=True)
    weight = torch.randn((5,) if op == "layer_norm" else (4,), requires_grad=True)
    argument = (5,) if op == "layer_norm" else 2
    out = apply(op, argument, x, weight, None, "cpu")
    assert out.shape == x.shape
    grads = torch.autograd.grad(out.sum(), (x, weight))
    assert torch.equal(grads[1], torch.zeros_like(weight))


def test_instance_norm_with_running_statistics_is_pytorchs():
    x = torch.randn(3, 4, 5, 6)
    for use_input_stats in (True, False):
        mine, theirs = ([torch.ones(4), torch.full((4,), 2.0)] for _ in range(2))
        actual = ops.instance_norm(x, *mine, use_input_stats=use_input_stats, momentum=0.3)
        expected = F.instance_norm(x, *theirs, use_input_stats=use_input_stats, momentum=0.3)
        assert torch.equal(actual, expected)
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
        assert torch.equal(mine[0], torch.ones(4)) != use_input_stats


def test_cpu_autocast_changes_nothing_as_in_pytorch():
    for dtype in (torch.float32, torch.bfloat16):
        problem = problem_of("group, 2-D", dtype=dtype)
        plain = problem("cpu")
        with torch.autocast("cpu", torch.bfloat16):
            assert problem("reference").dtype == dtype
            assert torch.equal(problem("cpu"), plain)


X, W = torch.randn(3, 4, 5), torch.randn(4)
BAD = {
    "a list": (lambda: ops.layer_norm(X.tolist(), (5,)), TypeError, "input must be a tensor, got list"),
    "integers": (lambda: ops.group_norm(X.long(), 2), TypeError, "input must be float.* torch.int64"),
    "complex": (lambda: ops.instance_norm(X.cfloat()), TypeError, "input must be float.* torch.complex64"),
    "normalized_shape": (lambda: ops.layer_norm(X, (4,)), ValueError, r"normalized_shape .* got \(4,\)"),
    "no normalized_shape": (lambda: ops.layer_norm(X, ()), ValueError, r"normalized_shape .* got \(\)"),
    "shape of weight": (lambda: ops.layer_norm(X, (5,), W), ValueError, r"weight must have shape \(5,\).*\(4,\)"),
    "shape of bias": (lambda: ops.group_norm(X, 2, W, W[:3]), ValueError, r"bias must have shape \(4,\).*\(3,\)"),
    "dtype of weight": (lambda: ops.group_norm(X, 2, W.double()), TypeError, "weight must have the input's dtype"),
    "half weight": (lambda: ops.group_norm(X, 2, W.half()), TypeError, "weight must have the input's dtype"),
    "device of bias": (lambda: ops.group_norm(X, 2, W, W.to("meta")), ValueError, "bias must be on .* meta"),
    "weight a list": (lambda: ops.instance_norm(X, weight=[1.0]), TypeError, "weight must be a tensor or None"),
    "num_groups": (lambda: ops.group_norm(X, 3), ValueError, "num_groups must divide the input's 4 channels, got 3"),
    "no groups": (lambda: ops.group_norm(X, 0), ValueError, "num_groups must divide"),
    "one dimension": (lambda: ops.group_norm(W, 2), ValueError, r"input must be \(N, C, \*\)"),
    "one value a group": (lambda: ops.group_norm(X[:1, :, 0], 4), ValueError, "more than one value a group"),
    "one value a channel": (lambda: ops.instance_norm(X[:, :, :1]), ValueError, "more than one value a channel"),
    "backend": (lambda: ops.layer_norm(X, (5,), backend="cudnn"), ValueError, "backend must be one of"),
    "no such backend": (
        lambda: ops.layer_norm(X, (5,), backend="cuda"),
        fastgan.BackendUnavailable,
        "layer_norm has no cuda",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input_raises_a_message_that_names_it(call, error, message):
    with pytest.raises(error, match=message):
        call()
