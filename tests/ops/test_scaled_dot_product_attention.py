from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastgan
from fastgan import ops
from fastgan.ops.attention import autograd, blocks, layout
from fastgan.ops.attention.autograd import fits_triton
from tests.harness import BACKENDS, DTYPES, HAS_GPU, assert_close, backend_name, device_of
from tests.hypothesis_if_there import given, settings, st

ROOT = Path(__file__).parents[2]
# B, H, G, L, S, E, Ev: odd, prime, 1; one block of rows and several; fewer queries than keys and more.
CASES = {
    "one token": (2, 1, 1, 1, 1, 16, 16),
    "one query": (1, 2, 2, 1, 17, 16, 16),
    "primes": (2, 3, 3, 17, 13, 7, 5),
    "wide values": (1, 2, 2, 9, 31, 16, 40),
    "grouped": (1, 4, 2, 19, 11, 16, 16),
    "one group": (2, 3, 1, 5, 7, 8, 8),
    "odd": (1, 2, 2, 127, 127, 16, 16),
    "long": (1, 1, 1, 200, 1000, 8, 8),
}
WAYS = BACKENDS[:3]
FEW = ("one query", "primes", "grouped")
OPTIONS = (
    "plain",
    "causal",
    "boolean",
    "padding",
    "additive",
    "bias a head",
    "masked rows",
    "additive masked rows",
    "scaled",
)


@dataclass
class Problem:
    """Operands drawn in float64 and rounded to a dtype, so that every dtype sees one problem."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    weight: Tensor
    option: str
    dropout_p: float = 0.0

    def to(self, dtype: torch.dtype) -> Problem:
        q, k, v, weight = (t.detach().to(dtype, copy=True) for t in (self.q, self.k, self.v, self.weight))
        mask = self.mask
        if mask is not None and mask.is_floating_point():
            mask = mask.detach().to(dtype, copy=True).requires_grad_()
        return replace(self, q=q.requires_grad_(), k=k.requires_grad_(), v=v.requires_grad_(), mask=mask, weight=weight)

    def leaves(self) -> list[Tensor]:
        masks = [self.mask] if self.mask is not None and self.mask.requires_grad else []
        return [self.q, self.k, self.v, *masks]

    def __call__(self, backend: str | None, *leaves: Tensor, attend=ops.scaled_dot_product_attention) -> Tensor:
        q, k, v, *masks = leaves or self.leaves()
        options = {} if backend is None else {"backend": backend}
        return attend(
            q,
            k,
            v,
            masks[0] if masks else self.mask,
            dropout_p=self.dropout_p,
            is_causal=self.option == "causal",
            scale=0.3 if self.option == "scaled" else None,
            enable_gqa=q.shape[1] != k.shape[1],
            **options,
        )


DERIVE = blocks.native_kernels.derive


def not_called(*operands):
    raise AssertionError("the native kernel was called")


def mask_of(option, shape, device):
    b, h, _, length, keys, _, _ = shape
    if option == "boolean":
        return torch.rand(length, keys, device=device) > 0.3
    if option == "padding":
        return torch.rand(b, 1, 1, keys, device=device) > 0.3
    if option == "masked rows":
        return torch.rand(b, h, length, keys, device=device) > torch.randint(2, (length, 1), device=device)
    if option == "additive":
        mask = torch.randn(b, h, length, keys, dtype=torch.float64, device=device)
        return mask.masked_fill(torch.rand_like(mask) < 0.2, -math.inf)
    if option == "additive masked rows":
        mask = torch.randn(b, h, length, keys, dtype=torch.float64, device=device)
        return mask.masked_fill(torch.arange(length, device=device).unsqueeze(-1) % 2 == 0, -math.inf)
    if option == "bias a head":
        return torch.randn(h, 1, keys, dtype=torch.float64, device=device)
    return None


def problem_of(case, option="plain", dtype=torch.float64, device="cpu", dropout_p=0.0):
    shape = b, h, g, length, keys, width, wide = CASES[case] if isinstance(case, str) else case
    q, k, v, weight = (
        torch.randn(size, dtype=torch.float64).to(device, dtype)
        for size in ((b, h, length, width), (b, g, keys, width), (b, g, keys, wide), (b, h, length, wide))
    )
    mask = mask_of(option, shape, device)
    if mask is not None and mask.is_floating_point():
        mask = mask.to(dtype)
    return Problem(q, k, v, mask, weight, option, dropout_p)


def table(dtypes=DTYPES):
    """backend x dtype x case x option; through Triton's interpreter, which is slow, not every product."""
    for backend in WAYS:
        name = backend_name(backend)
        interpreted = name == "triton" and not HAS_GPU
        for dtype in dtypes:
            for case in CASES:
                for option in OPTIONS:
                    usual = dtype == torch.float32 and option in ("plain", "causal")
                    if case not in FEW and option not in ("plain", "causal"):
                        continue
                    if (
                        interpreted
                        and not usual
                        and (case not in FEW or (dtype != torch.float32 and option != "causal"))
                    ):
                        continue
                    marks = backend.marks if hasattr(backend, "marks") else ()
                    id = f"{name}-{str(dtype)[6:]}-{case}-{option}"
                    yield pytest.param(name, dtype, case, option, marks=marks, id=id)


def values_and_gradients(problem: Problem, backend: str) -> list[tuple[int, Tensor]]:
    """(order of derivative, result)."""
    o = problem(backend)
    return [(0, o), *((1, g) for g in torch.autograd.grad(o, problem.leaves(), problem.weight))]


def penalty_gradients(problem: Problem, backend: str) -> list[tuple[int, Tensor]]:
    """Through a penalty on all gradients; the gradient of the output depends on the output too."""
    o = problem(backend)
    loss = (o.square() * problem.weight).sum()
    grads = torch.autograd.grad(loss, problem.leaves(), create_graph=True)
    penalty = sum((g.square() + 0.1 * g).sum() for g in grads)
    return [(2, g) for g in torch.autograd.grad(penalty, problem.leaves())]


def compare(compute, problem, backend, dtype):
    exact = compute(problem.to(torch.float64), "reference")
    own = compute(problem.to(dtype), "reference")
    actual = compute(problem.to(dtype), backend)
    for (order, a), (_, e), (_, o) in zip(actual, exact, own, strict=True):
        assert a.dtype == dtype
        if e.norm() < 1e-10:  # what is zero in exact arithmetic: one key has one probability
            assert a.norm() <= 1e-3 * (1 + problem.weight.norm())
            continue
        assert_close(a, e.to(a.device), order=order, reference=o)


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
        theirs = problem(None, attend=F.scaled_dot_product_attention)
    ours = problem("reference")
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    pairs = (torch.autograd.grad(o, problem.leaves(), problem.weight) for o in (ours, theirs))
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
    assert gradcheck(run, problem.leaves(), fast_mode=fast)
    assert gradgradcheck(run, problem.leaves(), fast_mode=fast)


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
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


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


@pytest.mark.small
def test_few_scores_take_the_plain_formulas_if_a_gradient_is_needed(monkeypatch):
    q = torch.randn(1, 2, 9, 4, dtype=torch.float64)
    taken = []
    plain = autograd.reference.attention
    monkeypatch.setattr(autograd, "_reference", lambda *operands: taken.append(operands) or plain(*operands))
    for rows, needs_grad, backend, expected in (
        (9, True, None, 1),
        (9, False, None, 0),
        (9, True, "cpu", 0),
        (10, True, None, 0),
    ):
        monkeypatch.setattr(layout, "FEW", 2 * 9 * 9)
        taken.clear()
        query = torch.randn(1, 2, rows, 4, dtype=torch.float64, requires_grad=needs_grad)
        o = ops.scaled_dot_product_attention(query, q, q, backend=backend)
        assert len(taken) == expected
        torch.testing.assert_close(o, F.scaled_dot_product_attention(query, q, q))


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("case", FEW)
def test_the_formulas_between_two_products_are_the_same_in_pytorch_and_in_cpp(case, option, monkeypatch):
    """Without the native module, and on devices without kernels, the blocks run PyTorch's functions."""
    problem = problem_of(case, option, dropout_p=0.3 if option == "causal" else 0.0)
    results = []
    for name in ("cpu", "blocks"):
        monkeypatch.setattr(fastgan.backends, "select", lambda *args, name=name: name)
        monkeypatch.setattr(blocks.native_kernels, "derive", not_called if name == "blocks" else DERIVE)
        torch.manual_seed(1)
        results.append(penalty_gradients(problem.to(torch.float64), None))
    for (_, a), (_, b) in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("given", ["none", "tangent", "values", "both"])
def test_every_instruction_set_computes_what_lies_between_two_products(isa, dtype, given):
    native = pytest.importorskip("fastgan._native")
    for columns in (1, 3, 16, 17, 127, 1000):
        scores = -5 * torch.rand(2, 3, columns, dtype=torch.float64)
        scores[:, 1:, ::2] = -math.inf
        operands = [scores, *torch.randn(3, 2, 3, columns, dtype=torch.float64)]
        operands[2] = operands[2] if given in ("tangent", "both") else None
        operands[3] = operands[3] if given in ("values", "both") else None
        ours = [None if t is None else t.to(dtype, copy=True) for t in operands]
        moved = [None if operands[2] is None else torch.full_like(t, math.nan) for t in (scores, ours[0])]
        blocks.derive(*operands, moved[0])
        addresses = [0 if t is None else t.data_ptr() for t in (*ours, moved[1])]
        try:
            native.attention_block(str(dtype)[6:], addresses, (6, columns), 2, isa)
        except ValueError as error:
            pytest.skip(str(error))
        if given == "both":
            operands[3] = ours[3] = None  # read only
        for a, e in zip((*ours, moved[1]), (*operands, moved[0]), strict=True):
            if e is not None:
                tolerance = 1e-12 if dtype == torch.float64 else 3e-6
                torch.testing.assert_close(a.double(), e, rtol=tolerance, atol=tolerance * e.abs().max().item())


@pytest.mark.parametrize("option", ["plain", "causal", "boolean"])
@pytest.mark.parametrize("case", FEW)
def test_the_first_backward_is_pytorchs_kernel(case, option, monkeypatch):
    """With and without a graph; to the bit."""
    problem = problem_of((*CASES[case][:6], CASES[case][5]), option).to(torch.float32)
    monkeypatch.setattr(autograd.blocks, "backward", not_called)
    their = torch.autograd.grad(problem(None, attend=F.scaled_dot_product_attention), problem.leaves(), problem.weight)
    for create_graph in (False, True):
        ours = torch.autograd.grad(problem("cpu"), problem.leaves(), problem.weight, create_graph=create_graph)
        if problem.mask is None:
            assert all(torch.equal(a, b) for a, b in zip(ours, their, strict=True))
        torch.testing.assert_close(ours, their)


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
    o, lse = torch.empty_like(p.weight), torch.empty(p.weight.shape[:3], device=p.weight.device)
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
def test_strides_do_not_matter(backend):
    problem = problem_of((2, 3, 3, 5, 4, 8, 8), "boolean", torch.float32, device_of(backend)).to(torch.float32)
    forms = {
        "contiguous": lambda t: t,
        "tokens before heads": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        "width first": lambda t: t.mT.contiguous().mT,
        "sliced": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
        "of one projection": lambda t: torch.stack([t, t, t])[1],
    }
    results = {}
    for name, form in forms.items():
        leaves = [form(t.detach()).requires_grad_() for t in problem.leaves()]
        o = problem(backend, *leaves)
        grads = torch.autograd.grad(o, leaves, form(problem.weight), create_graph=True)
        results[name] = [o, *grads, *torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)]
    for name, result in results.items():
        for a, b in zip(result, results["contiguous"], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("form", ["rows", "expanded", "transposed", "sliced"])
@pytest.mark.parametrize("backend", WAYS)
def test_strides_of_a_mask_do_not_matter(backend, form):
    device = device_of(backend)
    mask = {
        "rows": lambda: torch.randn(5, 1, dtype=torch.float64),
        "expanded": lambda: torch.randn(5, 1, dtype=torch.float64).expand(5, 7),
        "transposed": lambda: torch.randn(2, 7, 5, dtype=torch.float64).mT,
        "sliced": lambda: torch.randn(2, 1, 5, 14, dtype=torch.float64)[..., ::2],
    }[form]()
    mask = mask.to(device).requires_grad_()
    q, k, v = (torch.randn(2, 2, n, 8, dtype=torch.float64, device=device, requires_grad=True) for n in (5, 7, 7))
    leaves = [q, k, v, mask]
    results = []
    for o in (
        ops.scaled_dot_product_attention(q, k, v, mask, backend=backend),
        (q @ k.mT / 8**0.5 + mask).softmax(-1) @ v,
    ):
        grads = torch.autograd.grad(o.square().sum(), leaves, create_graph=True)
        results.append([o, *grads, *torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("query", "key", "mask"),
    [
        ((5, 8), (7, 8), (5, 7)),
        ((3, 5, 8), (3, 7, 8), (3, 5, 7)),
        ((2, 3, 4, 5, 8), (2, 3, 4, 7, 8), (3, 1, 5, 7)),
        ((2, 4, 5, 8), (1, 7, 8), (5, 7)),
        ((4, 5, 8), (2, 4, 7, 8), None),
        ((2, 4, 5, 8), (7, 8), (2, 1, 1, 7)),
    ],
)
@pytest.mark.parametrize("backend", WAYS)
def test_any_number_of_dimensions_is_broadcast_as_pytorchs(query, key, mask, backend):
    device = device_of(backend)
    q, k, v = (torch.randn(s, dtype=torch.float64, device=device, requires_grad=True) for s in (query, key, key))
    mask = None if mask is None else torch.randn(mask, dtype=torch.float64, device=device, requires_grad=True)
    leaves = [q, k, v] if mask is None else [q, k, v, mask]
    with sdpa_kernel(SDPBackend.MATH):
        theirs = F.scaled_dot_product_attention(q, k, v, mask)
    ours = ops.scaled_dot_product_attention(q, k, v, mask, backend=backend)
    results = []
    for o in (ours, theirs):
        grads = torch.autograd.grad(o.square().sum(), leaves, create_graph=True)
        results.append([o, *grads, *torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(0, 2, 3, 4, 8), (2, 2, 0, 4, 8), (2, 2, 3, 0, 8), (2, 0, 3, 4, 8), (2, 2, 3, 4, 0)])
@pytest.mark.parametrize("backend", WAYS)
def test_nothing_at_all_is_as_pytorchs(shape, backend):
    b, h, length, keys, width = shape
    q, k, v = (torch.ones(b, h, n, width, device=device_of(backend)) for n in (length, keys, keys))
    q.requires_grad_()
    o = ops.scaled_dot_product_attention(q, k, v, backend=backend)
    with sdpa_kernel(SDPBackend.MATH):
        theirs = F.scaled_dot_product_attention(q, k, v)
    assert o.shape == theirs.shape
    assert torch.equal(o.nan_to_num(), theirs.nan_to_num())
    assert not torch.autograd.grad(o.sum(), q)[0].any()


@pytest.mark.parametrize("backend", WAYS)
def test_large_scores_neither_overflow_nor_vanish(backend):
    problem = problem_of("primes", "masked rows", torch.float32, device_of(backend))
    problem.q = problem.q * 300
    problem = problem.to(torch.float32)
    results = values_and_gradients(problem, backend) + penalty_gradients(problem, backend)
    assert all(t.isfinite().all() for _, t in results)
    assert results[0][1].any()


@pytest.mark.skipif(HAS_GPU, reason="a GPU's own memory decides")
@pytest.mark.parametrize(
    ("width", "dtype", "shared", "fits"),
    [
        (128, torch.float32, 99 * 1024, True),
        (129, torch.float32, 99 * 1024, False),
        (256, torch.float32, 163 * 1024, True),
        (256, torch.float64, 227 * 1024, False),
        (257, torch.float32, 227 * 1024, False),
    ],
)
def test_heads_that_do_not_fit_into_shared_memory_are_left_to_the_blocks(width, dtype, shared, fits, monkeypatch):
    properties = SimpleNamespace(shared_memory_per_block_optin=shared)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    q = SimpleNamespace(shape=(1, 1, 4, width), is_cuda=True, dtype=dtype, device="cuda")
    assert fits_triton(q, q) == fits


@pytest.mark.skipif(HAS_GPU, reason="on CPU tensors")
def test_a_head_that_triton_cannot_take_is_refused_if_triton_is_asked_for_by_name():
    q = torch.randn(1, 1, 4, 257)
    with pytest.raises(fastgan.backends.BackendUnavailable, match=r"heads of widths \(257, 257\)"):
        ops.scaled_dot_product_attention(q, q, q, backend="triton")


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


class Attention(nn.Module):
    def __init__(self, attend=F.scaled_dot_product_attention, **options):
        super().__init__()
        torch.manual_seed(0)
        self.attend, self.options = attend, options
        self.embed, self.qkv, self.out = nn.Linear(6, 24), nn.Linear(24, 72), nn.Linear(24, 1)

    def forward(self, x):
        h = F.leaky_relu(self.embed(x), 0.2)
        q, k, v = self.qkv(h).unflatten(-1, (3, 3, 8)).permute(2, 0, 3, 1, 4)
        return self.out(h + self.attend(q, k, v, **self.options).transpose(1, 2).flatten(2)).mean((1, 2))


def parameter_gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)


def r1(model, x):
    x = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return 5 * g.square().sum() / len(x)


def expected(model, x):
    with sdpa_kernel(SDPBackend.MATH):
        return parameter_gradients(model, r1(model, x))


def penalise(model, x):
    return parameter_gradients(model, fastgan.gradient_penalty(model, x, kind="r1"))


def with_logits(model, x):
    return parameter_gradients(model, fastgan.logits_and_penalty(model, x, kind="r1")[1])


def rerouted(model, x):
    x = x.detach().requires_grad_()
    with fastgan.twice_differentiable():
        logits = model(x)
    return parameter_gradients(model, fastgan.penalty_from_logits(logits, x, kind="r1"))


def by_the_module(model, x):
    return parameter_gradients(model, fastgan.nn.GradientPenalty("r1")(model, x))


class Tokens(nn.Module):
    def __init__(self, layer, call):
        super().__init__()
        self.layer, self.call, self.out = layer, call, nn.Linear(24, 1)

    def forward(self, x):
        return self.out(self.call(self.layer, x)).mean((1, 2))


PADDING = torch.tensor([[False] * 7, [False] * 4 + [True] * 3])
CAUSAL = nn.Transformer.generate_square_subsequent_mask(7, dtype=torch.float64)
EIGHT = {"nhead": 4, "dim_feedforward": 32, "dropout": 0.0, "batch_first": True}
LAYERS = {
    "heads": lambda: Tokens(nn.MultiheadAttention(24, 4, batch_first=True), lambda m, x: m(x, x, x)[0]),
    "heads without weights": lambda: Tokens(
        nn.MultiheadAttention(24, 4, batch_first=True), lambda m, x: m(x, x, x, need_weights=False)[0]
    ),
    "padded": lambda: Tokens(
        nn.MultiheadAttention(24, 4, batch_first=True, add_bias_kv=True),
        lambda m, x: m(x, x, x, key_padding_mask=PADDING, need_weights=False)[0],
    ),
    "padded and masked": lambda: Tokens(
        nn.MultiheadAttention(24, 4, batch_first=True),
        lambda m, x: m(x, x, x, key_padding_mask=PADDING, attn_mask=CAUSAL, need_weights=False, is_causal=True)[0],
    ),
    "causal, tokens first": lambda: Tokens(
        nn.MultiheadAttention(24, 4),
        lambda m, x: m(*[x.transpose(0, 1)] * 3, attn_mask=CAUSAL, is_causal=True, need_weights=False)[0].transpose(
            0, 1
        ),
    ),
    "encoder layer": lambda: Tokens(nn.TransformerEncoderLayer(24, **EIGHT), lambda m, x: m(x)),
    "encoder layer, norm first": lambda: Tokens(
        nn.TransformerEncoderLayer(24, **EIGHT, activation=F.gelu, norm_first=True), lambda m, x: m(x)
    ),
    "encoder, padded": lambda: Tokens(
        nn.TransformerEncoder(nn.TransformerEncoderLayer(24, **EIGHT), 2),
        lambda m, x: m(x, src_key_padding_mask=PADDING),
    ),
    "decoder layer": lambda: Tokens(
        nn.TransformerDecoderLayer(24, **EIGHT), lambda m, x: m(x, x.flip(1), tgt_mask=CAUSAL, tgt_is_causal=True)
    ),
}


@pytest.mark.parametrize("by", [penalise, with_logits, rerouted, by_the_module])
@pytest.mark.parametrize("small", [False, pytest.param(True, marks=pytest.mark.small)])
def test_penalties_go_through_attention_that_a_model_calls_itself(by, small):
    x = torch.randn(3, 11, 6, dtype=torch.float64)
    for options in ({}, {"is_causal": True}, {"attn_mask": torch.randn(11, 11, dtype=torch.float64)}, {"scale": 0.2}):
        model = Attention(**options).double()
        for _ in range(2):
            for a, b in zip(by(model, x), expected(model, x), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.small
def test_operands_by_keyword_are_rerouted_too():
    x = torch.randn(3, 11, 6, dtype=torch.float64)
    model = Attention(lambda q, k, v: F.scaled_dot_product_attention(query=q, key=k, value=v)).double()
    for a, b in zip(penalise(model, x), expected(model, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("small", [False, pytest.param(True, marks=pytest.mark.small)])
@pytest.mark.parametrize("name", LAYERS)
def test_penalties_go_through_pytorchs_layers_with_attention(name, training, small):
    model = LAYERS[name]().double().train(training)
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    want = expected(model, x)
    for by in (penalise, with_logits, rerouted):
        for a, b in zip(by(model, x), want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)


def test_dropout_of_a_model_draws_pytorchs_numbers():
    model = Attention(dropout_p=0.4).double()
    x = torch.randn(3, 11, 6, dtype=torch.float64)
    torch.manual_seed(3)
    want = expected(model, x)
    torch.manual_seed(3)
    for a, b in zip(penalise(model, x), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_the_weights_of_heads_are_differentiated_too():
    """need_weights=True, whose second result a loss may use."""
    model = Tokens(nn.MultiheadAttention(24, 4, batch_first=True), lambda m, x: m(x, x, x)[1] @ x).double()
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    for a, b in zip(penalise(model, x), expected(model, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)


@pytest.mark.small
def test_a_small_model_that_attends_later_is_seen_where_its_mode_or_shapes_change():
    class Later(Attention):
        def forward(self, x):
            return super().forward(x) if self.training else self.out(self.embed(x)).mean((1, 2))

    model = Later().double()
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    for training in (False, False, True, True):
        model.train(training)
        for a, b in zip(penalise(model, x), expected(model, x), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_attention_is_no_part_of_one_pass():
    x = torch.randn(3, 11, 6)
    assert fastgan.explain_penalty(Attention(), x).startswith("general path")
    heads = LAYERS["heads without weights"]()
    assert fastgan.explain_penalty(heads, torch.randn(2, 7, 24)).startswith("general path")


def test_attention_that_a_model_writes_itself_stays_as_it_is(monkeypatch):
    monkeypatch.setattr(ops.attention.autograd, "attend", None)
    x = torch.randn(3, 11, 6, dtype=torch.float64)
    model = Attention(lambda q, k, v: (q @ k.mT / 8**0.5).softmax(-1) @ v).double()
    for a, b in zip(penalise(model, x), expected(model, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_as_pytorchs(dtype):
    q, k, v = (torch.randn(2, 3, 9, 8, requires_grad=True) for _ in range(3))
    mask = torch.randn(9, 9)
    with torch.autocast("cpu", dtype):
        theirs = F.scaled_dot_product_attention(q, k, v, mask)
        for backend in ("cpu", "reference"):
            ours = ops.scaled_dot_product_attention(q, k, v, mask, backend=backend)
            assert ours.dtype == theirs.dtype == dtype
            torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)
            (grad,) = torch.autograd.grad(ours.float().square().sum(), q, create_graph=True)
            assert grad.dtype == torch.float32
            assert torch.autograd.grad(grad.square().sum(), k)[0].isfinite().all()
        assert ops.scaled_dot_product_attention(q.double(), k.double(), v.double()).dtype == torch.float64


@pytest.mark.parametrize("backend", WAYS[1:])
def test_a_loss_and_a_penalty_in_one_backward_add_up(backend):
    x = torch.randn(3, 11, 6, dtype=torch.float64)
    model = Attention().double()
    device = device_of(backend)
    model, x = model.to(device), x.to(device)
    with fastgan.use_backend(backend):
        logits, penalty = fastgan.logits_and_penalty(model, x, kind="r1")
        both = parameter_gradients(model, F.softplus(-logits).mean() + penalty)
    with sdpa_kernel(SDPBackend.MATH):
        want = parameter_gradients(model, F.softplus(-model(x)).mean() + r1(model, x))
    for a, b in zip(both, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


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
    ours = ops.scaled_dot_product_attention(nested, nested, nested).unbind()
    for part, result in zip(parts, ours, strict=True):
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
