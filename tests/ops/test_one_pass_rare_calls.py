"""Rarely used linear functions, and writes in place: one pass, or refused by name if samples mix."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import fastgan
from tests.ops.one_pass_problem import Between, C, N, S, assert_exact, constant, images, parameter, uneven

MASK = torch.arange(N * C * S * S).reshape(N, C, S, S) % 3 > 0
LEFT = torch.cat([torch.ones(N, C, S, S), torch.zeros(N, C, S, S)], 3) > 0  # as many elements as h, in each sample

FIRST = torch.arange(N).view(N, 1, 1, 1).expand_as(LEFT) < N // 2  # as many elements as h, but of half of the samples


def in_place(change):
    """Apply ``change`` to a tensor that nobody else reads."""

    def between(net, h):
        h = h * 1.5
        change(net, h)
        return h

    return between


def rows(h):
    return h.flatten(1)


TAKEN = {
    "inner": (lambda net, h: torch.inner(h, net.p), {"p": lambda: parameter(3, S)}),
    "inner of a parameter": (lambda net, h: torch.inner(net.p, rows(h)).t(), {"p": lambda: parameter(2, C * S * S)}),
    "inner of a number": (lambda net, h: torch.inner(h, net.p.sum()), {"p": lambda: parameter(1)}),
    "multi_dot": (
        lambda net, h: torch.linalg.multi_dot([rows(h), net.p, net.q]),
        {"p": lambda: parameter(C * S * S, 4), "q": lambda: parameter(4)},
    ),
    "multi_dot at the end": (
        lambda net, h: torch.linalg.multi_dot([net.q, net.p, rows(h).t()]).t(),
        {"p": lambda: parameter(4, C * S * S), "q": lambda: parameter(2, 4)},
    ),
    "vecdot": (lambda net, h: torch.linalg.vecdot(h, net.p, dim=1), {"p": lambda: parameter(C, 1, 1)}),
    "vecdot of a parameter": (lambda net, h: torch.linalg.vecdot(net.p, h), {"p": lambda: parameter(C, 1, S)}),
    "outer": (lambda net, h: torch.outer(h.mean((1, 2, 3)), net.p), {"p": lambda: parameter(5)}),
    "outer from the left": (lambda net, h: torch.outer(net.p, h.mean((1, 2, 3))).t(), {"p": lambda: parameter(5)}),
    "kron": (lambda net, h: torch.kron(h, net.p), {"p": lambda: parameter(2, 1)}),
    "kron that repeats each sample": (
        lambda net, h: torch.kron(h, net.p).view(N, 2 * C, S, S),
        {"p": lambda: parameter(2, 1, 1, 1)},
    ),
    "kron that repeats the batch": (
        lambda net, h: torch.kron(net.p, h).view(2, N, C, S, S).sum(0),
        {"p": lambda: parameter(2, 1, 1, 1)},
    ),
    "cross": (lambda net, h: torch.linalg.cross(h[:, :3], net.p, dim=1), {"p": lambda: parameter(1, 3, 1, 1)}),
    "cross with a dimension": (
        lambda net, h: torch.cross(net.p.expand(N, -1, S, S), h[:, :3], 1),
        {"p": lambda: parameter(3, 1, 1)},
    ),
    "first power": (lambda net, h: h**1 + torch.pow(h, 1.0), {}),
    "fmax": (lambda net, h: torch.fmax(h, net.p), {"p": lambda: parameter(S)}),
    "squeezed dimensions": (lambda net, h: h[:, None, :, :, None].squeeze((1, 4)), {}),
    "shape changed in place": (
        in_place(lambda net, h: h.unsqueeze_(2).transpose_(1, 4).squeeze_(2).swapaxes_(1, 2).unsqueeze_(0).squeeze_()),
        {},
    ),
    "t_": (lambda net, h: (rows(h) * 2).t_().mul(2).t(), {}),
    "stacks": (
        lambda net, h: torch.column_stack(
            [torch.dstack([h, h * 2])[:, :, :S], torch.vstack([h, 3 * h]).view(2, N, C, S, S).sum(0)]
        ),
        {},
    ),
    "stacks of rows": (
        lambda net, h: (
            torch.column_stack([h.sum((1, 2, 3)), constant(N)])
            + torch.vstack([h.mean((1, 2, 3)), constant(N)]).t()
            + torch.dstack([h[:, 0, 0], constant(N, S)]).sum(1)
        ),
        {},
    ),
    "at least 3": (lambda net, h: torch.atleast_3d(rows(h)) * net.p, {"p": lambda: parameter(2)}),
    "masked_scatter_": (in_place(lambda net, h: h.masked_scatter_(MASK, constant(N, C, S, S))), {}),
    "masked_scatter of a parameter": (
        lambda net, h: h.masked_scatter(MASK[:, :1], net.p),
        {"p": lambda: parameter(C, N, S, S)},
    ),
    "scattered by a mask": (lambda net, h: constant(N, C, S, 2 * S).masked_scatter(LEFT, h), {}),
    "scattered by a mask into both": (lambda net, h: torch.cat([h, -h], 3).masked_scatter_(LEFT, h * 3), {}),
    "index_put": (
        lambda net, h: h.index_put((torch.arange(N), torch.arange(N)), net.p),
        {"p": lambda: parameter(S, S)},
    ),
    "accumulated index_put": (
        lambda net, h: h.index_put((torch.tensor([0, 0]),), net.p, accumulate=True),
        {"p": lambda: parameter(S)},
    ),
    "filled slices": (in_place(lambda net, h: (h[:, 0].fill_(0.5), h[..., 1].zero_())), {}),
}
REFUSED = {
    "inner of the samples": (lambda net, h: torch.inner(constant(2, N), rows(h).t()).view(2, -1).repeat(2, 1), "inner"),
    "inner of both": (lambda net, h: torch.inner(rows(h), rows(h)), "inner"),
    "multi_dot in the middle": (
        lambda net, h: torch.linalg.multi_dot([constant(N, N), rows(h), constant(C * S * S, 2)]),
        "multi_dot",
    ),
    "multi_dot of the samples": (
        lambda net, h: torch.linalg.multi_dot([rows(h).t(), constant(N, 3)]).repeat(1, 2)[:N],
        "multi_dot",
    ),
    "vecdot of the samples": (lambda net, h: h + torch.linalg.vecdot(h, constant(N, 1, 1, 1), dim=0), "vecdot"),
    "vecdot of both": (lambda net, h: torch.linalg.vecdot(h, h), "vecdot"),
    "kron of both": (lambda net, h: torch.kron(h.mean((1, 2, 3)), h.mean((1, 2, 3))).view(N, N), "kron"),
    "cross of both": (lambda net, h: torch.linalg.cross(h[:, :3], h[:, 3:], dim=1), "cross"),
    "second power": (lambda net, h: h**2.0, "pow"),
    "the input as exponent": (lambda net, h: 1 ** (h * 0.1) + h, "pow"),
    "scattered by a mask across samples": (
        lambda net, h: constant(N, C, S, 2 * S).masked_scatter(FIRST, h),
        "masked_scatter",
    ),
    "samples transposed in place": (
        in_place(lambda net, h: h.transpose_(0, 1).add_(1).transpose_(0, 1).sub_(h.sum(0))),
        "sum",
    ),
}


def build(name):
    between, parameters = TAKEN[name]
    return Between(between, **{key: make() for key, make in parameters.items()})


@pytest.mark.parametrize("name", TAKEN)
def test_a_rare_call_is_exact_in_one_pass(name):
    model = build(name)
    assert fastgan.explain_penalty(model, images()) == "one pass"
    assert_exact(model, images(), uneven)


@pytest.mark.parametrize("name", REFUSED)
def test_a_rare_call_that_mixes_samples_or_is_not_affine_is_refused_by_name_and_exact(name):
    model = Between(REFUSED[name][0])
    said = fastgan.explain_penalty(model, images())
    assert said.startswith("general path: ")
    assert REFUSED[name][1] in said
    assert_exact(model, images(), uneven)


def test_a_batch_of_one(monkeypatch):
    for name in ("inner", "masked_scatter_", "filled slices", "cross", "t_"):
        monkeypatch.setattr(f"{__name__}.MASK", MASK[:1])
        model = build(name)
        assert_exact(model, images()[:1], uneven)


def test_the_derivative_of_a_relu_after_a_masked_write():
    model = Between(lambda net, h: F.relu_((h * 1).masked_scatter_(MASK, constant(N, C, S, S))))
    assert fastgan.explain_penalty(model, images()) == "one pass"
    assert_exact(model, images(), uneven)
