"""Infinite constants, such as masks before a maximum: no logit depends on them, so gradients are finite and exact."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import fastgan
from tests.ops.one_pass_problem import Between, C, N, S, assert_exact, constant, images, parameter, uneven

INF = torch.inf
MASK = torch.arange(S) > 2
LESS = torch.where(MASK, -INF, 0.0)


def written(h):
    made = h * 1.5
    made[..., 4:] = -INF
    return made


MASKED = {
    "masked_fill": lambda h: h.masked_fill(MASK, -INF),
    "masked_fill of a view": lambda h: (h * 2).flatten(2).masked_fill_(MASK.repeat(S), -INF).view_as(h),
    "where": lambda h: torch.where(MASK, -INF, h),
    "where with a tensor": lambda h: torch.where(MASK, torch.tensor(-INF, dtype=h.dtype), h),
    "plus a mask": lambda h: h + LESS.double(),
    "minus a mask": lambda h: h - -LESS.double(),
    "pad": lambda h: F.pad(h[..., 2:], (1, 1), value=-INF),
    "cat": lambda h: torch.cat([h[..., 2:], constant(N, C, S, 2) - INF], 3),
    "setitem": written,
    "index_copy": lambda h: torch.full_like(h, -INF).index_copy(3, torch.tensor([0, 3]), h[..., :2]),
    "index_fill": lambda h: h.index_fill(3, torch.tensor([0, 3]), -INF),
    "scatter": lambda h: h.scatter(3, torch.zeros(N, C, S, 1, dtype=torch.long), -INF),
    "full of NaN": lambda h: torch.full_like(h, torch.nan).index_copy(3, torch.arange(S), h),
}
FINITE = {
    "amax": lambda h: h.amax(3, keepdim=True),
    "max": lambda h: h.max(3, keepdim=True)[0],
    "max_pool2d": lambda h: F.max_pool2d(h, (1, S)),
    "maximum": lambda h: torch.maximum(h, constant(C, S, S)),
    "clamp": lambda h: h.clamp(min=-0.3),
    "threshold": lambda h: F.threshold(h, 0.1, 0.2),
    "relu": lambda h: h.relu(),
}


@pytest.mark.parametrize("finite", FINITE)
@pytest.mark.parametrize("masked", MASKED)
def test_infinite_constants_leave_gradients_finite_and_exact(masked, finite):
    model = Between(lambda net, h: h + FINITE[finite](MASKED[masked](h) * 1.0) * net.p, p=parameter(S, S))
    assert fastgan.explain_penalty(model, images()) == "one pass"
    assert_exact(model, images(), uneven)
