"""Operands and masks for the tests of attention, and the comparison with the formulas in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from fastgan import ops
from tests.harness import BACKENDS, DTYPES, HAS_GPU, assert_close, backend_name

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
    "two blocks of heads of 64": (1, 1, 1, 70, 90, 64, 64),
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
    """Through a penalty on all gradients. The gradient of the output also depends on the output."""
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
        if e.norm() < 1e-10:  # zero in exact arithmetic, because a single key has the probability 1
            assert a.norm() <= 1e-3 * (1 + problem.weight.norm())
            continue
        assert_close(a, e.to(a.device), order=order, reference=o)
