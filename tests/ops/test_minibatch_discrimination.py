from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import fastgan
from fastgan import ops
from fastgan.ops.minibatch_discrimination import native_kernels
from fastgan.ops.minibatch_discrimination.autograd import packed
from tests.harness import BACKENDS, DTYPES, HAS_GPU, assert_close, backend_name, device_of
from tests.hypothesis_if_there import given, settings, st

ROOT = Path(__file__).parents[2]
# N, B, C: odd, prime, 1; below a tile of samples and above one; kernels enough to share out among threads, and fewer.
CASES = {
    "one sample": (1, 3, 4),
    "two samples": (2, 1, 1),
    "primes": (7, 3, 2),
    "one dimension": (37, 3, 1),
    "many kernels": (29, 19, 5),
    "above a tile": (67, 1, 3),
    "many samples and kernels": (90, 11, 16),
    "many dimensions": (3, 1, 37),
}
FEW = ("two samples", "primes")
MANY_PROGRAMS = ("many kernels", "many samples and kernels")
OPTIONS = {"others": (True, 1), "oneself too": (False, 1), "segments": (True, 3), "segments, oneself too": (False, 2)}


@dataclass
class Problem:
    """Operands drawn in float64 and rounded to a dtype, so that every dtype sees one problem."""

    m: Tensor
    scale: Tensor
    exclude_self: bool
    segments: Tensor | None

    def to(self, dtype: torch.dtype) -> Problem:
        m, scale = (t.detach().to(dtype, copy=True).requires_grad_() for t in (self.m, self.scale))
        return replace(self, m=m, scale=scale)

    def __call__(self, backend: str, m: Tensor | None = None) -> Tensor:
        m = self.m if m is None else m
        return ops.minibatch_discrimination(m, exclude_self=self.exclude_self, segments=self.segments, backend=backend)


def problem_of(case, option="others", dtype=torch.float64, device="cpu"):
    n, b, c = CASES[case] if isinstance(case, str) else case
    exclude_self, segments = OPTIONS[option]
    m = torch.randn(n, b, c, dtype=torch.float64) / c  # distances of about 1
    scale = torch.randn(n, b, dtype=torch.float64)
    of = torch.randint(segments, (n,), device=device) if segments > 1 else None
    return Problem(m.to(device, dtype), scale.to(device, dtype), exclude_self, of)


def table(every_dtype=True):
    """backend x dtype x case x option; through Triton's interpreter, which is slow, not every product."""
    for backend in BACKENDS:
        name = backend_name(backend)
        interpreted = name == "triton" and not HAS_GPU
        for dtype, case, option in product(DTYPES if every_dtype else DTYPES[:2], CASES, OPTIONS):
            usual = dtype == torch.float32 and option == "others"
            if interpreted and case in MANY_PROGRAMS:
                continue
            if interpreted and not usual and (case not in FEW or (dtype != torch.float32 and option != "others")):
                continue
            marks = backend.marks if hasattr(backend, "marks") else ()
            yield pytest.param(name, dtype, case, option, marks=marks, id=f"{name}-{str(dtype)[6:]}-{case}-{option}")


def values_and_gradients(problem: Problem, backend: str) -> list[tuple[int, Tensor]]:
    """(order of derivative, result)."""
    o = problem(backend)
    return [(0, o), (1, *torch.autograd.grad(o, problem.m, problem.scale.detach()))]


def penalty_gradients(problem: Problem, backend: str) -> list[tuple[int, Tensor]]:
    """Through a penalty on the gradient of m, as for a critic."""
    score = (problem(backend).square() * problem.scale).mean()
    (grad,) = torch.autograd.grad(score, problem.m, create_graph=True)
    return [(2, g) for g in torch.autograd.grad(grad.square().sum(), (problem.m, problem.scale))]


def compare(compute, problem, backend, dtype):
    exact = compute(problem.to(torch.float64), "reference")
    own = compute(problem.to(dtype), "reference")
    actual = compute(problem.to(dtype), backend)
    for (order, a), (_, e), (_, o) in zip(actual, exact, own, strict=True):
        assert a.dtype == dtype
        assert_close(a, e.to(a.device), order=order, reference=o)


@pytest.mark.parametrize(("backend", "dtype", "case", "option"), list(table()))
def test_values_and_gradients_equal_pytorch_in_float64(backend, dtype, case, option):
    compare(values_and_gradients, problem_of(case, option, dtype, device_of(backend)), backend, dtype)


@pytest.mark.parametrize(("backend", "dtype", "case", "option"), list(table(every_dtype=False)))
def test_second_order_through_a_penalty_equals_pytorch(backend, dtype, case, option):
    compare(penalty_gradients, problem_of(case, option, dtype, device_of(backend)), backend, dtype)


@pytest.mark.parametrize("backend", BACKENDS[2:3])
def test_the_tiles_of_large_batches_give_the_same(backend, monkeypatch):
    kernels = pytest.importorskip("fastgan.ops.minibatch_discrimination.triton_kernels")
    monkeypatch.setattr(kernels, "_tile", lambda m, most: kernels._pairs(4, most))  # as from 1,024 samples on
    problem = problem_of((70, 2, 3), "segments", torch.float32, device_of(backend))
    compare(values_and_gradients, problem, backend, torch.float32)
    compare(penalty_gradients, problem, backend, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_second_order_in_half_precision_errs_at_most_twice_as_much_as_pytorch(backend, dtype):
    compare(penalty_gradients, problem_of("primes", "others", dtype, device_of(backend)), backend, dtype)


@pytest.mark.parametrize("name", ["by_h", "by_m"])
def test_a_broken_double_backward_would_be_seen_by_the_penalty(name, monkeypatch):
    whole = native_kernels.Native.double_backward

    def broken(self, w, h, m, segments, by_h, by_m, first):
        whole(self, w, h, m, segments, by_h, by_m, first)
        {"by_h": by_h, "by_m": by_m}[name].mul_(1.01)

    monkeypatch.setattr(native_kernels.Native, "double_backward", broken)
    with pytest.raises(AssertionError, match="relative error"):
        compare(penalty_gradients, problem_of("many kernels", dtype=torch.float32), "cpu", torch.float32)


@pytest.mark.parametrize("option", ["others", "segments, oneself too"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_and_gradgradcheck_hold(backend, option):
    problem = problem_of((5, 1, 2), option, device=device_of(backend)).to(torch.float64)
    fast = backend == "triton"  # its interpreter is slow: random projections instead of every element
    assert gradcheck(lambda m: problem(backend, m), (problem.m,), fast_mode=fast)
    assert gradgradcheck(lambda m: problem(backend, m), (problem.m,), fast_mode=fast)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_have_no_derivative(backend, dtype):
    problem = problem_of((23, 2, 3), dtype=dtype, device=device_of(backend))
    problem.m = problem.m.mul(2).round().div(2) * (torch.arange(23, device=problem.m.device) % 3 > 0)[:, None, None]
    compare(values_and_gradients, problem, backend, dtype)
    compare(penalty_gradients, problem, backend, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_samples_far_apart_have_a_similarity_of_zero_and_equal_ones_of_one(backend):
    m = torch.tensor([0.0, 0.0, 80.0, 3e4, -3e4, 1e30, -1e30], device=device_of(backend))[:, None, None]
    m = m.requires_grad_()
    o = ops.minibatch_discrimination(m, backend=backend)
    assert o.flatten().tolist() == pytest.approx([1, 1, 2 * 1.804851387e-35, 0, 0, 0, 0], rel=1e-5, abs=1e-38)
    (grad,) = torch.autograd.grad(o.sum(), m, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), m)
    assert grad.isfinite().all()
    assert second.isfinite().all()


@pytest.mark.parametrize(("dtype", "range"), [(torch.float32, 87.3), (torch.float64, 708.3)])
def test_the_cpu_kernels_exponential_errs_by_less_than_a_unit_in_the_last_place(dtype, range):
    distance = torch.cat([torch.linspace(0, range, 200_001), torch.rand(100_001)]).to(dtype)
    m = torch.stack([torch.zeros_like(distance), distance])[..., None]  # two samples, one kernel per distance
    actual = ops.minibatch_discrimination(m, backend="cpu")[0].double()
    exact = torch.exp(-distance.double())
    unit = torch.finfo(dtype).eps * torch.exp2(exact.log2().floor())
    own = 0 if dtype == torch.float32 else 1  # the error of the exponential that it is compared with
    assert ((actual - exact).abs() / unit).max() < 1 + own


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_finite_spreads_to_whom_it_is_compared_with(backend):
    m = torch.randn(20, 3, 3, device=device_of(backend))
    m[4, 2, 1] = float("nan")
    m.requires_grad_()
    o = ops.minibatch_discrimination(m, backend=backend)
    (grad,) = torch.autograd.grad(o.sum(), m)
    assert o[:, 2].isnan().all()
    assert grad[:, 2].isnan().all(1).all()
    others = [0, 1]
    assert o[:, others].isfinite().all()
    assert grad[:, others].isfinite().all()


def test_only_the_gradients_that_are_asked_for_are_made(monkeypatch):
    whole, calls = native_kernels.Native.double_backward, []

    def spy(self, w, h, m, segments, by_h, by_m, first):
        calls.append((by_h is not None, by_m is not None))
        whole(self, w, h, m, segments, by_h, by_m, first)

    monkeypatch.setattr(native_kernels.Native, "double_backward", spy)
    for wanted in ("m", "scale"):
        problem = problem_of("many kernels", dtype=torch.float32).to(torch.float32)
        problem.scale.requires_grad_(wanted == "scale")
        (grad,) = torch.autograd.grad(problem("cpu"), problem.m, problem.scale, create_graph=True)
        torch.autograd.grad(grad.square().sum(), getattr(problem, wanted))
    assert calls == [(False, True), (True, True)]


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_opcheck_accepts_the_operators(backend, monkeypatch):
    monkeypatch.undo()  # opcheck compares allocations of its own
    problem = problem_of("primes", "segments", torch.float32, device_of(backend))
    h, segments = problem.scale, problem.segments
    m, w = packed(problem.m, backend), problem.m
    forward = m, segments, torch.empty_like(h), 0, True, backend
    backward = h, m, segments, torch.empty_like(w), 0, backend
    double = w, h, m, None, torch.empty_like(h), torch.empty_like(w), 0, backend
    for order, arguments in (("fwd", forward), ("bwd", backward), ("bwd_bwd", double)):
        torch.library.opcheck(getattr(torch.ops.fastgan, f"minibatch_discrimination_{order}"), arguments)


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_strides_do_not_matter(backend):
    problem = problem_of((5, 3, 2), dtype=torch.float32, device=device_of(backend)).to(torch.float32)
    forms = {
        "contiguous": problem.m,
        "transposed": problem.m.mT.contiguous().mT,
        "batch last": problem.m.permute(1, 2, 0).contiguous().permute(2, 0, 1),
        "sliced": torch.cat([problem.m, problem.m], 1)[:, : problem.m.shape[1]],
    }
    results = {}
    for name, m in forms.items():
        m = m.detach().requires_grad_()
        o = problem(backend, m)
        (grad,) = torch.autograd.grad(o, m, problem.scale.mT.contiguous().mT, create_graph=True)
        results[name] = [o, grad, *torch.autograd.grad(grad.square().sum(), m)]
    for name, result in results.items():
        assert all(torch.equal(a, b) for a, b in zip(result, results["contiguous"], strict=True)), name


@pytest.mark.parametrize("case", ["two samples", "primes"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_inputs_give_the_same_bits(backend, case):
    problem = problem_of(case, "segments", torch.float32, device_of(backend))
    runs = [
        values_and_gradients(problem.to(torch.float32), backend) + penalty_gradients(problem.to(torch.float32), backend)
        for _ in range(2)
    ]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(*runs, strict=True))


@pytest.mark.parametrize("case", [(150, 3, 5), (70, 21, 16)])
def test_the_cpu_kernels_give_the_same_bits_on_any_number_of_threads(case):
    problem = problem_of(case, "others", torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            leaves = problem.to(torch.float32)
            results.append(values_and_gradients(leaves, "cpu") + penalty_gradients(leaves, "cpu"))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(results[0], other, strict=True))


@pytest.mark.parametrize("case", ["primes", "many kernels", "many samples and kernels"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_computes_the_same(isa, dtype, case, monkeypatch):
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
    problem = problem_of(case, "others", dtype)
    compare(values_and_gradients, problem, "cpu", dtype)
    compare(penalty_gradients, problem, "cpu", dtype)
    assert {f"minibatch_discrimination_{order}" for order in ("forward", "backward", "double_backward")} <= set(used)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 10), st.integers(1, 20)),
    option=st.sampled_from(list(OPTIONS)),
)
def test_any_shape_matches_on_the_cpu(shape, option):
    problem = problem_of(shape, option)
    for compute in (values_and_gradients, penalty_gradients):
        pairs = zip(*(compute(problem.to(torch.float64), b) for b in ("cpu", "reference")), strict=True)
        for (_, actual), (_, expected) in pairs:
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_grows_with_the_batch_and_not_with_its_square():
    code = """
import torch
from fastgan import ops

def peak():
    return 1024 * int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1])

def step(m, scale):
    torch.autograd.grad(ops.minibatch_discrimination(m, backend="cpu"), m, scale)

def operands(n):
    return torch.randn(n, 16, 16, requires_grad=True), torch.randn(n, 16)

step(*operands(64))
m, scale = operands(3000)
before = peak()
step(m, scale)
print((peak() - before) / m.nbytes)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    # The gradient, and what two threads or four pack; one matrix of pairs of one b would be 12 times the input.
    assert float(result.stdout) < 4


def test_the_rows_of_a_part_are_those_of_the_whole():
    problem = problem_of((53, 9, 4), "segments", torch.float64)
    m, h, w = problem.m, problem.scale, torch.randn_like(problem.m)
    whole = [torch.empty_like(t) for t in (h, m, h, m)]
    part = [torch.empty_like(t[20:37]) for t in whole]
    for (o, dm, by_h, by_m), first in ((whole, 0), (part, 20)):
        torch.ops.fastgan.minibatch_discrimination_fwd(m, problem.segments, o, first, True, "cpu")
        torch.ops.fastgan.minibatch_discrimination_bwd(h, m, problem.segments, dm, first, "cpu")
        torch.ops.fastgan.minibatch_discrimination_bwd_bwd(w, h, m, problem.segments, by_h, by_m, first, "cpu")
    for a, b in zip(part, whole, strict=True):
        torch.testing.assert_close(a, b[20:37], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(0, 3, 2), (4, 0, 2), (4, 3, 0)])
def test_nothing_to_compare_gives_a_sum_over_nothing(shape):
    m = torch.randn(shape, requires_grad=True)
    o = ops.minibatch_discrimination(m)
    assert torch.equal(o, torch.full(shape[:2], shape[0] - 1.0))  # exp(0) each, of C = 0
    assert torch.autograd.grad(o.sum(), m)[0].shape == shape


M, SEGMENTS = torch.randn(4, 3, 2), torch.zeros(4, dtype=torch.int64)
run = ops.minibatch_discrimination
BAD = {
    "a list": (lambda: run(M.tolist()), TypeError, "activations must be a tensor, got list"),
    "integers": (lambda: run(M.long()), TypeError, "activations must be float.* torch.int64"),
    "two dimensions": (lambda: run(M[0]), ValueError, r"activations must be \(N, B, C\), got shape \(3, 2\)"),
    "exclude_self": (lambda: run(M, exclude_self=1), TypeError, "exclude_self must be a bool, got int"),
    "segments a list": (lambda: run(M, segments=[0, 0, 1, 1]), TypeError, "segments must be a tensor or None"),
    "float segments": (
        lambda: run(M, segments=SEGMENTS.float()),
        TypeError,
        "segments must be integers, got .*float32",
    ),
    "length of segments": (lambda: run(M, segments=SEGMENTS[:3]), ValueError, r"shape \(4,\), got \(3,\)"),
    "device of segments": (
        lambda: run(M, segments=SEGMENTS.to("meta")),
        ValueError,
        "device of the activations, cpu, got meta",
    ),
    "process_group": (lambda: run(M, process_group="all"), TypeError, "process_group must be a process group or None"),
    "backend": (lambda: run(M, backend="cudnn"), ValueError, "backend must be one of"),
    "no such backend": (lambda: run(M, backend="cuda"), fastgan.BackendUnavailable, "'cuda' cannot run on cpu"),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input_raises_a_message_that_names_it(call, error, message):
    with pytest.raises(error, match=message):
        call()
