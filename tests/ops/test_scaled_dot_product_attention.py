from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastgan import ops
from fastgan.ops.attention import layout
from tests.harness import DTYPES, device_of
from tests.hypothesis_if_there import given, settings, st
from tests.ops.attention_problem import (
    OPTIONS,
    WAYS,
    compare,
    penalty_gradients,
    problem_of,
    table,
    values_and_gradients,
)

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("backend", "dtype", "case", "option"), list(table()))
def test_values_and_gradients_equal_the_formulas_in_float64(backend, dtype, case, option):
    compare(values_and_gradients, problem_of(case, option, dtype, device_of(backend)), backend, dtype)


@pytest.mark.parametrize(("backend", "dtype", "case", "option"), list(table(DTYPES[:2])))
def test_second_order_through_a_penalty_equals_the_formulas(backend, dtype, case, option):
    compare(penalty_gradients, problem_of(case, option, dtype, device_of(backend)), backend, dtype)


@pytest.mark.parametrize("option", ["plain", "additive"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", WAYS[1:])
def test_second_order_in_half_precision_errs_at_most_twice_as_much_as_the_formulas(backend, dtype, option):
    problem = problem_of("primes", option, dtype, device_of(backend))
    compare(penalty_gradients, problem, backend, dtype)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("case", ["primes", "grouped", "wide values", "one query"])
def test_the_reference_is_pytorchs(case, option):
    problem = problem_of(case, option).to(torch.float64)
    problem.weight.requires_grad_(False)
    with sdpa_kernel(SDPBackend.MATH):
        expected = problem(None, attend=F.scaled_dot_product_attention)
    actual = problem("reference")
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    pairs = (torch.autograd.grad(o, problem.leaves(), problem.weight) for o in (actual, expected))
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("option", ["causal", "padding", "masked rows", "additive", "bias a head"])
@pytest.mark.parametrize("case", [(2, 2, 2, 11, 9, 4, 4), (3, 4, 2, 11, 9, 4, 6), (1, 4, 1, 7, 30, 8, 8)])
def test_however_the_scores_are_shared_out_in_blocks_the_result_is_the_same(case, option, monkeypatch):
    problem = problem_of(case, option)
    for scores in (1, 40, 100, 500, 2000):
        monkeypatch.setattr(layout, "BLOCK", scores)
        monkeypatch.setattr(layout, "_LEAST_ROWS", 1 if scores < 500 else 4)
        compare(values_and_gradients, problem, "cpu", torch.float64)
        compare(penalty_gradients, problem, "cpu", torch.float64)


@pytest.mark.parametrize("option", ["plain", "masked rows", "bias a head"])
@pytest.mark.parametrize("backend", WAYS)
def test_gradcheck_and_gradgradcheck_hold(backend, option):
    problem = problem_of((1, 2, 1, 3, 4, 2, 2), option, device=device_of(backend)).to(torch.float64)
    fast = backend == "triton"  # its interpreter is slow: random projections instead of every element
    run = lambda *leaves: problem(backend, *leaves)  # noqa: E731
    # test_gradients_of_some_operands_alone_are_the_same has undefined gradients
    assert gradcheck(run, problem.leaves(), fast_mode=fast, check_undefined_grad=not fast)
    assert gradgradcheck(run, problem.leaves(), fast_mode=fast, check_undefined_grad=not fast)


@pytest.mark.parametrize("wanted", [["q"], ["k"], ["v"], ["q", "k"], ["mask"], ["v", "mask"]])
@pytest.mark.parametrize("backend", WAYS[1:])
def test_gradients_of_some_operands_alone_are_the_same(backend, wanted):
    results = []
    for name in ("reference", backend):
        torch.manual_seed(0)
        problem = problem_of("primes", "bias a head", device=device_of(backend)).to(torch.float64)
        for leaf in ("q", "k", "v", "mask"):
            getattr(problem, leaf).requires_grad_(leaf in wanted)
        weight = problem.weight.requires_grad_()
        leaves = [getattr(problem, leaf) for leaf in wanted]
        grads = torch.autograd.grad(problem(name, problem.q, problem.k, problem.v), leaves, weight, create_graph=True)
        for i, grad in enumerate(grads):
            second = torch.autograd.grad(grad.square().sum(), [*leaves, weight], retain_graph=True, allow_unused=True)
            results.append((name, i, [weight.new_zeros(()) if g is None else g for g in second]))
    half = len(results) // 2
    for (_, i, exact), (_, _, actual) in zip(results[:half], results[half:], strict=True):
        for e, a in zip(exact, actual, strict=True):
            torch.testing.assert_close(a, e.expand_as(a), rtol=1e-9, atol=1e-9, msg=lambda m, i=i: f"{i}: {m}")


@pytest.mark.parametrize("backend", WAYS[1:])
def test_all_orders_see_the_same_dropout(backend):
    """As the plain formulas with the factors that the values tell."""
    problem = problem_of((2, 2, 1, 12, 9, 9, 9), "causal", device=device_of(backend), dropout_p=0.4).to(torch.float64)

    def drawn(v):
        torch.manual_seed(5)
        return problem(backend, problem.q, problem.k, v)

    eye = torch.eye(9, dtype=torch.float64, device=problem.v.device).expand(2, 1, 9, 9)
    probabilities = replace(problem, dropout_p=0.0)("reference", problem.q, problem.k, eye)
    factors = torch.where(probabilities > 0, drawn(eye) / probabilities, 0.0).detach()  # of values that are one-hot
    kept = factors[probabilities > 0]
    assert set(kept.mul(0.6).round(decimals=9).tolist()) == {0.0, 1.0}
    assert 0.4 < (kept > 0).double().mean() < 0.8

    def plain():
        k, v = (t.expand(2, 2, 9, 9) for t in (problem.k, problem.v))
        scores = problem.q @ k.mT / 3
        causal = torch.ones(12, 9, dtype=torch.bool, device=scores.device).tril()
        return (scores.masked_fill(~causal, -math.inf).softmax(-1) * factors) @ v

    results = []
    for o in (drawn(problem.v), plain()):
        grads = torch.autograd.grad((o.square() * problem.weight).sum(), problem.leaves(), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in grads), problem.leaves())
        results.append([o, *grads, *second])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", WAYS)
def test_dropout_of_everything_gives_zeros_and_a_seed_gives_the_same_again(backend):
    problem = problem_of("primes", dtype=torch.float32, device=device_of(backend), dropout_p=1.0).to(torch.float32)
    o = problem(backend)
    assert not o.any()
    grads = torch.autograd.grad(o, problem.leaves(), problem.weight)
    assert not any(g.any() for g in grads)
    problem.dropout_p = 0.5
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(problem(backend))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_dropout_keeps_as_much_as_it_says_in_many_blocks(monkeypatch):
    monkeypatch.setattr(layout, "BLOCK", 5000)
    q, k, v = torch.zeros(3, 2, 200, 4), torch.zeros(3, 2, 100, 4), torch.eye(100).expand(3, 2, 100, 100)
    o = ops.scaled_dot_product_attention(q, k, v, dropout_p=0.3, backend="cpu")
    kept = o > 0
    assert kept.float().mean().item() == pytest.approx(0.7, abs=0.01)
    rows = kept.flatten(0, 2)
    assert len(torch.unique(rows, dim=0)) == len(rows), "two rows have the same mask"


@pytest.mark.parametrize("backend", WAYS[1:])
def test_the_third_order_raises(backend):
    problem = problem_of("primes", device=device_of(backend)).to(torch.float64)
    first = torch.autograd.grad(problem(backend).pow(3).sum(), problem.q, create_graph=True)[0]
    second = torch.autograd.grad(first.pow(3).sum(), problem.q, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="third derivative"):
        torch.autograd.grad(second.sum(), problem.q)


def test_the_reference_has_a_third_order():
    problem = problem_of((1, 1, 1, 3, 2, 2, 2)).to(torch.float64)
    first = torch.autograd.grad(problem("reference").pow(3).sum(), problem.q, create_graph=True)[0]
    second = torch.autograd.grad(first.pow(3).sum(), problem.q, create_graph=True)[0]
    assert torch.autograd.grad(second.sum(), problem.q)[0].isfinite().all()


@pytest.mark.parametrize("option", ["plain", "causal", "bias a head"])
@pytest.mark.parametrize("backend", WAYS[1:])
def test_opcheck_accepts_the_operators(backend, option, monkeypatch):
    monkeypatch.undo()  # opcheck compares allocations of its own
    p = problem_of("primes", option, torch.float32, device_of(backend))
    options = None, 0.3, option == "causal", 0.0, backend
    mask = () if p.mask is None else (p.mask[None],)
    operands = p.q, p.k, p.v, *(mask or (None,))
    terms = (2,) if backend == "triton" else ()
    o, lse = torch.empty_like(p.weight), torch.empty(*p.weight.shape[:3], *terms, device=p.weight.device)
    torch.ops.fastgan.attention_fwd(*operands, o, lse, *options)
    absent = [None] * (1 - len(mask))
    results = [torch.empty_like(t) for t in (p.q, p.k, p.v, *mask)] + absent
    grads = [torch.randn_like(t) for t in (p.q, p.k, p.v, *mask)] + absent
    seconds = [torch.empty_like(p.weight), *results]
    torch.library.opcheck(torch.ops.fastgan.attention_fwd, (*operands, o, lse, *options))
    torch.library.opcheck(torch.ops.fastgan.attention_bwd, (p.weight, *operands, o, lse, *results, *options))
    second = (*grads, p.weight, *operands, o, lse, *seconds, *options)
    torch.library.opcheck(torch.ops.fastgan.attention_bwd_bwd, second)


@pytest.mark.parametrize("backend", WAYS[1:])
def test_the_same_inputs_give_the_same_bits(backend):
    problem = problem_of("grouped", "bias a head", torch.float32, device_of(backend), dropout_p=0.2)
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        runs.append(
            values_and_gradients(problem.to(torch.float32), backend)
            + penalty_gradients(problem.to(torch.float32), backend)
        )
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(*runs, strict=True))


BAD = {
    "query": ({"query": [1]}, TypeError, "query must be a tensor"),
    "dtype": ({"query": torch.zeros(2, 3, 4).int()}, TypeError, "query must be float16"),
    "dtypes": ({"key": torch.zeros(2, 5, 4).double()}, TypeError, "the same dtype"),
    "dimensions": ({"query": torch.zeros(4)}, ValueError, r"got shape \(4,\)"),
    "width": ({"key": torch.zeros(2, 5, 3)}, ValueError, "key must have the query's width, 4"),
    "tokens": ({"value": torch.zeros(2, 6, 4)}, ValueError, "as many tokens as key, 5"),
    "batch": ({"query": torch.zeros(3, 3, 4)}, ValueError, "must broadcast, got"),
    "mask": ({"attn_mask": torch.zeros(4, 5)}, ValueError, r"broadcast to \(2, 3, 5\), got shape \(4, 5\)"),
    "mask's dtype": ({"attn_mask": torch.zeros(3, 5).long()}, TypeError, "attn_mask must be bool"),
    "mask's type": ({"attn_mask": 3.0}, TypeError, "attn_mask must be a tensor or None"),
    "causal mask": ({"attn_mask": torch.zeros(3, 5), "is_causal": True}, ValueError, "is_causal"),
    "dropout": ({"dropout_p": 1.5}, ValueError, "dropout_p must be a probability, got 1.5"),
    "groups": ({"query": torch.zeros(3, 3, 4), "enable_gqa": True}, ValueError, "a divisor of the query's"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_with_what_was_given(name):
    changed, error, message = BAD[name]
    good = {"query": torch.zeros(2, 3, 4), "key": torch.zeros(2, 5, 4), "value": torch.zeros(2, 5, 4)}
    ops.scaled_dot_product_attention(**good)
    with pytest.raises(error, match=message):
        ops.scaled_dot_product_attention(**good | changed)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 40), st.integers(1, 40), st.integers(1, 9)),
    repeats=st.integers(1, 3),
    option=st.sampled_from(OPTIONS),
)
def test_any_shape_matches_on_the_cpu(sizes, repeats, option):
    b, g, length, keys, width = sizes
    problem = problem_of((b, g * repeats, g, length, keys, width, width), option)
    for compute in (values_and_gradients, penalty_gradients):
        pairs = zip(*(compute(problem.to(torch.float64), name) for name in ("cpu", "reference")), strict=True)
        for (_, actual), (_, expected) in pairs:
            torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_grows_with_the_tokens_and_not_with_their_square():
    code = """
import torch
from fastgan import ops

def peak():
    return 1024 * int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1])

def step(length, **options):
    q, k, v = torch.randn(3, 1, 1, length, 16).unbind()
    leaves = [t.requires_grad_() for t in (q, k, v)]
    o = ops.scaled_dot_product_attention(q, k, v, **options)
    (g,) = torch.autograd.grad(o.sum(), q, create_graph=True)
    g.square().sum().backward()

step(64)
before = peak()
for options in ({}, {"is_causal": True}, {"dropout_p": 0.1}, {"attn_mask": torch.rand(4096) > 0.5}):
    step(4096, **options)
print(peak() - before)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert int(result.stdout) < 40e6  # one matrix of the scores of one head would be 67 MB


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_as_pytorchs(dtype):
    q, k, v = (torch.randn(2, 3, 9, 8, requires_grad=True) for _ in range(3))
    mask = torch.randn(9, 9)
    with torch.autocast("cpu", dtype):
        expected = F.scaled_dot_product_attention(q, k, v, mask)
        for backend in ("cpu", "reference"):
            actual = ops.scaled_dot_product_attention(q, k, v, mask, backend=backend)
            assert actual.dtype == expected.dtype == dtype
            torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.05)
            (grad,) = torch.autograd.grad(actual.float().square().sum(), q, create_graph=True)
            assert grad.dtype == torch.float32
            assert torch.autograd.grad(grad.square().sum(), k)[0].isfinite().all()
        assert ops.scaled_dot_product_attention(q.double(), k.double(), v.double()).dtype == torch.float64
        for operands in ((q, k, v.double()), (q.double(), k, v), (q, k, v, mask.double())):  # autocast leaves float64
            with pytest.raises(RuntimeError, match="dtype"):
                F.scaled_dot_product_attention(*operands)
            with pytest.raises(TypeError, match="dtype"):
                ops.scaled_dot_product_attention(*operands)


def test_writing_into_the_result_is_refused_as_by_pytorchs_kernel():
    """The backward reads the result, so autograd's version check must see the change."""
    q = torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    for attention in (ops.scaled_dot_product_attention, F.scaled_dot_product_attention):
        o = attention(q, q, q).mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(o.sum(), q)


def test_meta_and_nested_tensors_are_pytorchs():
    q = torch.empty(2, 3, 9, 8, device="meta")
    assert ops.scaled_dot_product_attention(q, q, q).device.type == "meta"
    parts = [torch.randn(3, n, 8) for n in (4, 6)]
    nested = torch.nested.nested_tensor(parts)
    actual = ops.scaled_dot_product_attention(nested, nested, nested).unbind()
    for part, result in zip(parts, actual, strict=True):
        torch.testing.assert_close(result, F.scaled_dot_product_attention(part, part, part))


def test_a_trace_has_pytorchs_own():
    from torch.fx.experimental.proxy_tensor import make_fx

    q = torch.randn(2, 3, 9, 8)
    graph = make_fx(lambda q: ops.scaled_dot_product_attention(q, q, q), tracing_mode="fake")(q)
    assert "fastgan" not in graph.code
    torch.testing.assert_close(graph(q), F.scaled_dot_product_attention(q, q, q))


def test_transforms_have_every_order():
    q = torch.randn(4, 2, 5, 3, dtype=torch.float64)

    def f(q):
        return ops.scaled_dot_product_attention(q, q, q).square().sum()

    hessian = torch.func.vmap(torch.func.hessian(f))(q)
    assert hessian.shape == (4, 2, 5, 3, 2, 5, 3)
    torch.testing.assert_close(hessian[1], torch.autograd.functional.hessian(f, q[1]))
