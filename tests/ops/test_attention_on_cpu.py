"""Which code computes attention on a CPU: PyTorch's kernels, plain formulas or blocks with C++ between products."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

import fastgan
from fastgan import ops, torch_private
from fastgan.ops.attention import autograd, blocks, layout, pytorch_kernel
from tests.harness import VERSION
from tests.ops.attention_problem import CASES, FEW, OPTIONS, penalty_gradients, problem_of, values_and_gradients

DERIVE = blocks.native_kernels.derive


def not_called(*operands):
    raise AssertionError("the native kernel was called")


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
    """Bitwise equal, with and without a graph."""
    problem = problem_of((*CASES[case][:6], CASES[case][5]), option).to(torch.float32)
    monkeypatch.setattr(autograd.blocks, "backward", not_called)
    their = torch.autograd.grad(problem(None, attend=F.scaled_dot_product_attention), problem.leaves(), problem.weight)
    for create_graph in (False, True):
        ours = torch.autograd.grad(problem("cpu"), problem.leaves(), problem.weight, create_graph=create_graph)
        if problem.mask is None and (VERSION >= (2, 11) or case != "grouped"):
            assert all(torch.equal(a, b) for a, b in zip(ours, their, strict=True))
        torch.testing.assert_close(ours, their)


@pytest.mark.parametrize("shape", [(150, 200), (2, 2, 150, 200), (2, 1, 150, 200), (2, 1, 1, 200)])
def test_a_large_boolean_mask_reaches_pytorchs_kernel_in_parts(shape, monkeypatch):
    """So that its additive form is never in memory as a whole."""
    given = []
    monkeypatch.setattr(pytorch_kernel, "_COPY", 0)

    def noted(kernel):
        return lambda *operands, **options: given.append(options["attn_mask"]) or kernel(*operands, **options)

    for name in ("attention_on_cpu", "attention_on_cpu_backward"):
        monkeypatch.setattr(torch_private, name, noted(getattr(torch_private, name)))
    problem = problem_of((2, 2, 1, 150, 200, 64, 64)).to(torch.float64)
    problem.mask = torch.rand(shape) > 0.3
    problem.mask[..., 3 % shape[-2], :] = False
    for compute in (values_and_gradients, penalty_gradients):
        for (_, a), (_, b) in zip(compute(problem, "cpu"), compute(problem, "reference"), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)
    assert all(mask.numel() <= problem.q.numel() + problem.k.numel() for mask in given)
    assert sum(mask.shape[-2] for mask in given) == 5 * shape[-2]  # forward and backward, and again with a double one


@pytest.mark.parametrize("threads", [1, 2, 3, 16])
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 1, 1), (2, 3, 3), (3, 6, 2), (1, 12, 4), (4, 8, 8)])
@pytest.mark.parametrize(("length", "keys"), [(1, 1), (100, 30), (4096, 4096)])
def test_a_block_has_a_head_for_each_thread_and_no_more_scores_than_allowed(threads, shape, length, keys):
    batch, heads, groups = shape
    q, k = torch.empty(batch, heads, length, 0), torch.empty(batch, groups, keys, 0)
    parts, rows = layout.partition(q, k, threads)
    of_keys = torch.zeros(batch, groups)
    of_queries = torch.zeros(batch, heads)
    for part in parts:
        of_keys[part.samples, part.groups] += 1
        of_queries[part.samples, part.heads] += 1
        together = of_queries[part.samples, part.heads].numel()
        assert together * rows * keys <= layout.BLOCK * max(1, min(threads, 8) // 2)
    assert torch.all(of_keys == 1)
    assert torch.all(of_queries == 1)
    first = of_queries[parts[0].samples, parts[0].heads].numel()
    assert first >= min(threads, 8, batch * heads if groups == 1 else heads)


def test_all_orders_draw_the_same_dropout_if_the_number_of_threads_changes(monkeypatch):
    monkeypatch.setattr(layout, "BLOCK", 40)
    monkeypatch.setattr(layout, "_LEAST_ROWS", 1)
    problem = problem_of((2, 4, 4, 11, 9, 5, 5), "causal", dropout_p=0.4).to(torch.float64)
    results, now = [], [2]
    monkeypatch.setattr(torch, "get_num_threads", lambda: now[0])
    for threads in ((2, 2, 2), (1, 4, 2)):
        torch.manual_seed(2)
        now[0] = threads[0]
        o = problem("cpu")
        now[0] = threads[1]
        grads = torch.autograd.grad(o, problem.leaves(), problem.weight, create_graph=True)
        now[0] = threads[2]
        results.append([o, *grads, *torch.autograd.grad(sum(g.square().sum() for g in grads), problem.leaves())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_transforms_take_a_batch_of_boolean_masks():
    q = torch.randn(4, 2, 5, 3, dtype=torch.float64)
    masks = torch.rand(4, 5, 5) > 0.4
    masks[:, 2] = False
    ours = torch.func.vmap(lambda q, mask: ops.scaled_dot_product_attention(q, q, q, mask))(q, masks)
    torch.testing.assert_close(ours, F.scaled_dot_product_attention(q, q, q, masks[:, None]))
