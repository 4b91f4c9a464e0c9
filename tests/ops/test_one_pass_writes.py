"""Discriminators that write tensors into parts of others: exact, and in one pass where samples stay apart."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import fastgan
from tests.ops.one_pass_problem import (
    Between,
    C,
    N,
    S,
    assert_at_the_floor,
    assert_exact,
    constant,
    images,
    parameter,
    uneven,
)

INDEX = torch.tensor([2, 0])
ALL = (torch.arange(C) % 4).view(1, C, 1, 1)


def zeros(*shape):
    return torch.zeros(*(shape or (N, C, S, S)), dtype=torch.float64)


def writes(target, *changes):
    """Return a function that writes into ``target(net, h)``, for the place between two convolutions."""

    def between(net, h):
        made = target(net, h)
        for change in changes:
            change(made, net, h)
        return made

    return between


def copy(net, h):
    return h * 1.5


def put(index, value):
    def change(made, net, h):
        made[index] = value(net, h)

    return change


def tokens(net, h):
    """Return a linear function of the channels (N, S, S, C). PyTorch returns a view of the product."""
    return F.linear(h.movedim(1, 3), constant(C, C), net.p.flatten()[:C])


def through_views(net, h):
    made = h * 1.5
    made[:, ::2] += net.p
    made[:, 0].mul_(2).sub_(0.5)
    made.transpose(2, 3).add_(constant(S, S))
    made.flatten(2)[..., 3:9] *= 0.5
    rows = made.view(N, C, -1)
    rows[:, :2] = h.flatten(2)[:, 2:4]
    rows[:, 3] = 0.25
    made.diagonal(dim1=2, dim2=3).add_(h[..., 0])
    made[:, :2].copy_(h[:, 2:4])
    made.select(1, 4).copy_(net.p)
    made.add_(1)
    made[:, 1:3].relu_()  # last, because it keeps its result for the backward
    return made


ROWS = (slice(None), slice(0, 2))
WRITTEN = {
    "zero": writes(copy, put(ROWS, lambda net, h: 0.0)),
    "number": writes(copy, put((slice(None), 0), lambda net, h: 0.3)),
    "constant": writes(copy, put((slice(None), slice(2, 4)), lambda net, h: constant(2, S, S))),
    "parameter": writes(copy, put((slice(None), 1), lambda net, h: net.p)),
    "number by a mask": writes(copy, put(torch.arange(N * C * S * S).view(N, C, S, S) % 3 > 0, lambda net, h: 0.3)),
    "number by a list": writes(copy, put((slice(None), [1, 3]), lambda net, h: 0.3)),
    "its own slice": writes(copy, put((..., slice(0, 4)), lambda net, h: h[..., 4:] * 2)),
    "a slice of zeros": writes(lambda net, h: zeros(), put((slice(None), slice(1, None)), lambda net, h: h[:, 1:])),
    "a slice of ones": writes(lambda net, h: zeros() + 1, put((..., slice(0, 4)), lambda net, h: h[..., 4:])),
    "all": writes(lambda net, h: zeros(), put(slice(None), lambda net, h: h)),
    "interleaved": writes(
        lambda net, h: zeros(),
        put((..., slice(0, None, 2), slice(None)), lambda net, h: h[..., :4, :]),
        put((..., slice(1, None, 2), slice(None)), lambda net, h: h[..., 4:, :] + h[..., :4, :]),
        put((..., slice(1, None, 2), slice(0, 2)), lambda net, h: 1.0),
    ),
    "samples last": lambda net, h: writes(
        lambda net, h: zeros(C, S, S, N), put(slice(1, 3), lambda net, h: h[:, 1:3].permute(1, 2, 3, 0))
    )(net, h).permute(3, 0, 1, 2),
    "stacked": lambda net, h: writes(
        lambda net, h: zeros(3, N, C, S, S), put(0, lambda net, h: h), put(2, lambda net, h: 2 * h)
    )(net, h).sum(0),
    "copy_": lambda net, h: zeros().copy_(h),
    "copy_ over it": lambda net, h: (h * 2).copy_(h.flip(3)),
    "add_ to a constant": lambda net, h: constant(N, C, S, S).add_(h, alpha=2),
    "sub_ from a constant": lambda net, h: constant(N, C, S, S).sub_(h),
    "+= of a constant": lambda net, h: plus(constant(N, C, S, S), h),
    "views": through_views,
    "a view of a freed tensor": lambda net, h: (h * 2).flatten(1).add_(1.0).sub_(0.5),
    "a view of a view": lambda net, h: plus((h * 2).view(N, C * S, S)[:, 2:], net.p[0]),
    "a view of an inner result": lambda net, h: torch.einsum("nchw,cd->ndhw", h, constant(C, C)).add_(1.0),
    "tokens": lambda net, h: plus(tokens(net, h), net.p[..., None]).movedim(3, 1),
    "a slice of tokens": lambda net, h: writes(
        tokens,
        put((slice(None), slice(1, 3)), lambda net, h: constant(S, C)),
        lambda made, net, h: made[:, 0].add_(0.5),
    )(net, h).movedim(3, 1),
    "tokens by their transpose": lambda net, h: plus(tokens(net, h).transpose(1, 3), net.p),
    "clamped tokens": lambda net, h: tokens(net, h).clamp_(min=-0.1).movedim(3, 1),
    "scatter": lambda net, h: h.scatter(1, ALL[:, :2].expand(N, 2, S, S), 1.5),
    "scatter of it": lambda net, h: constant(N, C, S, S).scatter(1, ALL[:, :2].expand(N, 2, S, S), h[:, :2]),
    "scatter_add": lambda net, h: zeros().scatter_add(1, ALL.expand(N, C, S, S), h),
    "scatter_add_": lambda net, h: constant(N, C, S, S).scatter_add_(1, ALL.expand(N, C, S, S), h),
    "index_add": lambda net, h: h.index_add(1, INDEX, net.p.expand(N, 2, S, S), alpha=2),
    "index_add_": lambda net, h: constant(N, C, S, S).index_add_(1, INDEX, h[:, :2]),
    "index_copy": lambda net, h: h.index_copy(2, INDEX, h[:, :, :2] * 3),
    "index_fill": lambda net, h: h.index_fill(2, INDEX, 0.3),
    "index_fill_": lambda net, h: (h * 2).index_fill_(2, INDEX, 0.3),
    "slice_scatter": lambda net, h: h.slice_scatter(h[:, :2] * 2, 1, 2, 6, 2),
    "slice_scatter of a parameter": lambda net, h: torch.slice_scatter(h, net.p.expand(N, 2, S, S), 1, 1, 3),
    "select_scatter": lambda net, h: torch.select_scatter(h, constant(N, S, S), 1, 2),
    "diagonal_scatter": lambda net, h: torch.diagonal_scatter(constant(N, C, S, S), h[..., 0], 0, 2, 3),
    "diff": lambda net, h: F.pad(h.diff(dim=2), (0, 0, 0, 1)),
    "diff with a constant": lambda net, h: torch.diff(h, dim=2, prepend=constant(N, C, 1, S)),
    "second diff": lambda net, h: torch.diff(h, n=2, dim=1, append=h[:, :2]),
    "max_unpool": lambda net, h: F.max_unpool2d(*F.max_pool2d(h, 2, return_indices=True), 2),
    "cummax": lambda net, h: h.cummax(1)[0],
    "cummin": lambda net, h: torch.cummin(h, 2).values,
}


def plus(made, h):
    made += h
    return made


def build(between):
    return Between(between, p=parameter(S, S))


@pytest.mark.parametrize("name", WRITTEN)
def test_a_write_is_exact_and_one_pass_at_the_floor(name):
    model = build(WRITTEN[name])
    assert fastgan.explain_penalty(model, images()) == "one pass"
    assert_exact(model, images(), uneven)
    assert_at_the_floor(model, images())


@pytest.mark.parametrize("name", ["constant", "a slice of ones", "scatter_add_", "tokens", "+= of a constant"])
def test_a_write_with_a_batch_of_one_is_exact(name, monkeypatch):
    monkeypatch.setattr(f"{__name__}.N", 1)
    monkeypatch.setattr("tests.ops.one_pass_problem.N", 1)
    assert_exact(build(WRITTEN[name]), images(1), uneven)


def to_every_other_sample(made, net, h):
    made[::2] = h


def write_over_a_view(net, h):
    made = h * 1.5
    old = made[:, :2]
    made.add_(1)
    return made + old.mean(1, keepdim=True)


def write_other_samples(made, net, h):
    made[1:] += h[:-1]


MIXED = {
    "a view that is older than a write": (write_over_a_view, "modified"),
    "in place between samples": (writes(copy, write_other_samples), "add"),
    "into a view of a constant": (lambda net, h: zeros()[:, :2].add_(h[:, :2]), "in place on a view"),
    "over a transposed view": (
        lambda net, h: plus((h * 2).to(memory_format=torch.channels_last)[:, :2], net.p),
        "view",
    ),
    "between samples": (
        lambda net, h: writes(lambda net, h: zeros(2 * N, C, S, S), to_every_other_sample)(net, h)[:N],
        "some samples have more logits",
    ),
    "into a parameter's copy": (
        writes(lambda net, h: net.p.expand(N, C, S, S).clone(), put(ROWS, lambda net, h: h[:, :2])),
        "requires a gradient",
    ),
    "at indices": (writes(copy, put((slice(None), [0, 1]), lambda net, h: h[:, 2:4])), "indices given as tensors"),
    "scatter over samples": (lambda net, h: h.scatter_add(0, torch.zeros(N, C, S, S, dtype=torch.long), h), "scatter"),
    "index_add over samples": (lambda net, h: h.index_add(0, torch.tensor([1, 0, 3, 2]), h * 0.5), "index_add"),
    "diff of samples": (lambda net, h: h + h.diff(dim=0, append=constant(1, C, S, S)), "diff"),
    "square in a slice": (writes(copy, put(ROWS, lambda net, h: h[:, :2] ** 2)), "pow"),
}


@pytest.mark.parametrize("name", MIXED)
def test_other_writes_are_refused_by_name_and_exact(name):
    between, reason = MIXED[name]
    model = build(between)
    said = fastgan.explain_penalty(model, images())
    assert said.startswith("general path: ")
    assert reason in said
    assert_exact(model, images(), uneven)
