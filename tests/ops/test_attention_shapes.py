"""Strides, broadcasting, empty tensors, large scores and wide heads."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastgan
from fastgan import ops
from fastgan.ops.attention.autograd import fits_triton
from tests.harness import HAS_GPU, device_of
from tests.ops.attention_problem import WAYS, penalty_gradients, problem_of, values_and_gradients


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
        expected = F.scaled_dot_product_attention(q, k, v, mask)
    actual = ops.scaled_dot_product_attention(q, k, v, mask, backend=backend)
    results = []
    for o in (actual, expected):
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
        expected = F.scaled_dot_product_attention(q, k, v)
    assert o.shape == expected.shape
    assert torch.equal(o.nan_to_num(), expected.nan_to_num())
    assert not torch.autograd.grad(o.sum(), q)[0].any()


@pytest.mark.parametrize("backend", WAYS)
def test_large_scores_neither_overflow_nor_vanish(backend):
    problem = problem_of("primes", "masked rows", torch.float32, device_of(backend))
    problem.q = problem.q * 300
    problem = problem.to(torch.float32)
    results = values_and_gradients(problem, backend) + penalty_gradients(problem, backend)
    assert all(t.isfinite().all() for _, t in results)
    assert results[0][1].any()


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("added", [torch.finfo(torch.float32).min, -1e9, 1e6])
@pytest.mark.parametrize("backend", WAYS)
def test_a_mask_may_add_a_huge_number_to_whole_rows(backend, added, requires_grad):
    """A float32 log-sum-exp of that size has no digits for the logarithm of the sum."""
    problem = problem_of("grouped", dtype=torch.float32, device=device_of(backend))
    mask = torch.zeros(19, 11, device=problem.q.device)
    mask[::2] = added
    mask[1, ::3] = -abs(added)
    results = []
    for name in (backend, None):
        ours = problem.to(torch.float32)
        ours.mask = mask.clone().requires_grad_(requires_grad)
        with sdpa_kernel(SDPBackend.MATH):
            attend = ops.scaled_dot_product_attention if name else F.scaled_dot_product_attention
            o = ours(name, attend=attend)
            first = torch.autograd.grad((o.square() * problem.weight).sum(), ours.leaves(), create_graph=True)
            results.append([o, *first, *torch.autograd.grad(sum(g.square().sum() for g in first), ours.leaves())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


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
