"""Calls for which one pass would be wrong: they are detected and named, and the general path is exact."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import fastgan
from tests.ops import one_pass_problem
from tests.ops.one_pass_problem import Between, C, N, S, Y, assert_exact, constant, images, uneven

POINTS = torch.tensor([5, 3, 3, 0])


class Hidden(torch.autograd.Function):
    """Linear, but no torch function."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


def unseen(change):
    def between(net, h):
        h = h * 1.5
        with torch._C.DisableTorchFunction():
            change(h)
        return h

    return between


def by_data(net, h):
    h = h * 1.5
    h.data.mul_(2.0)
    return h


def hooked(net, h):
    h = h * 1.5
    h.register_hook(lambda grad: grad * 2)
    return h


def permuted_samples(index):
    return lambda net, h: h + h[index]


# Calls that mix samples, are not affine, or cannot be traced. Each is named, and the result is exact.
REFUSED = {
    "mean over samples": (lambda net, h: h - h.mean(0), "mean"),
    "mean over all": (lambda net, h: h - h.mean(), "mean"),
    "sum over samples after a transpose": (lambda net, h: h + h.transpose(0, 1).sum(1), "sum"),
    "sum over rows of samples and channels": (lambda net, h: h + h.reshape(N * C, S, S).sum(0), "sum"),
    "amax over samples": (lambda net, h: h - h.amax(0), "amax"),
    "sorted samples": (lambda net, h: h.sort(0).values, "sort"),
    "cumsum over samples": (lambda net, h: h.cumsum(0), "cumsum"),
    "flipped samples": (lambda net, h: h + h.flip(0), "add"),
    "flipped samples among all": (lambda net, h: h + h.flip((0, 2)), "add"),
    "rolled samples": (lambda net, h: h + h.roll(1, 0), "add"),
    "rolled flat": (lambda net, h: h + h.roll(1), "roll"),
    "rot90 of samples": (lambda net, h: torch.rot90(h, 2, (0, 1)) + h, "rot90"),
    "flipud": (lambda net, h: torch.flipud(h) + h, "add"),
    "permuted samples": (permuted_samples(torch.tensor([1, 0, 2, 3])), "add"),
    "samples counted along the channels": (
        lambda net, h: h[torch.arange(N).repeat(N, 1), torch.arange(N)[:, None]].flatten(1),
        "linear",
    ),
    "checkpointed": (
        lambda net, h: torch.utils.checkpoint.checkpoint(net.second, h, use_reentrant=False),
        "torch.utils.checkpoint (test_one_pass_refused.py",
    ),
    "permuted samples by a list": (permuted_samples([3, 2, 1, 0]), "add"),
    "one sample for all": (lambda net, h: h + h[0], "add"),
    "every other sample": (lambda net, h: h + h[::2].repeat(2, 1, 1, 1), "add"),
    "other samples": (lambda net, h: h + torch.cat([h[1:], h[:1]]), "add"),
    "half of the samples repeated": (lambda net, h: h + h.narrow(0, 0, 2).repeat(2, 1, 1, 1), "add"),
    "index_select of samples": (lambda net, h: h + h.index_select(0, torch.tensor([1, 2, 3, 0])), "add"),
    "gather of samples": (
        lambda net, h: h.gather(0, Y.view(N, 1, 1, 1).expand_as(h).clamp(max=3)),
        "some samples have more logits",
    ),
    "samples as channels": (lambda net, h: h + h.reshape(C, N, S, S).transpose(0, 1), "reshape"),
    "groups of samples": (lambda net, h: h + h.view(2, 2, C, S, S).mean(0).repeat(2, 1, 1, 1), "view"),
    "samples added crosswise": (lambda net, h: h.mean((1, 2, 3)) + h.mean((1, 2, 3))[:, None], "add"),
    "samples multiplied in": (lambda net, h: torch.einsum("nchw,nm->mchw", h, constant(N, N)), "einsum"),
    "samples summed by einsum": (lambda net, h: h + torch.einsum("nchw->chw", h), "einsum"),
    "samples in a product": (lambda net, h: (constant(N, N) @ h.flatten(1)).view_as(h), "matmul"),
    "samples as features": (lambda net, h: (h.flatten(1).T @ constant(N, N)).T.reshape(h.shape), "matmul"),
    "gram matrix": (lambda net, h: h.flatten(1) @ h.flatten(1).T, "matmul"),
    "convolved along the samples": (
        lambda net, h: F.conv1d(h.flatten(1).T[:, None], constant(1, 1, 3), padding=1)[:, 0].T.reshape(h.shape),
        "conv1d",
    ),
    "pooled along the samples": (lambda net, h: h + F.max_pool1d(h.flatten(1).T, 3, 1, 1).T.view_as(h), "max_pool1d"),
    "resampled along the samples": (
        lambda net, h: h + F.interpolate(h.flatten(1).T[None], size=N, mode="linear")[0].T.reshape(h.shape) * 0.3,
        "interpolate",
    ),
    "padded by other samples": (lambda net, h: F.pad(h.flatten(1).T[None], (1, 1), "circular")[0, :, 1:-1].T, "pad"),
    "square": (lambda net, h: h * h, "mul"),
    "quotient": (lambda net, h: h / (h.abs() + 1), "div"),
    "reciprocal": (lambda net, h: 0.1 / (h + 10), "div"),
    "both in addcmul": (lambda net, h: torch.addcmul(h, h, h), "addcmul"),
    "lerp by it": (lambda net, h: torch.lerp(h, h * 2, h), "lerp"),
    "matmul with itself": (lambda net, h: h @ h.mT, "matmul"),
    "bilinear with itself": (lambda net, h: F.bilinear(h, h, constant(2, S, S)), "bilinear"),
    "softmax": (lambda net, h: h.softmax(1), "softmax"),
    "norm": (lambda net, h: h / h.norm(dim=1, keepdim=True), "norm"),
    "tanh in place": (lambda net, h: (h * 1).tanh_(), "tanh_"),
    "power": (lambda net, h: h**2, "pow"),
    "layer norm": (lambda net, h: F.layer_norm(h, [S, S]), "layer_norm"),
    "instance norm": (lambda net, h: F.instance_norm(h), "instance_norm"),
    "weight from the input": (lambda net, h: F.conv2d(h, h.mean(0).mean((1, 2)).expand(C, C)[..., None, None]), "mean"),
    "weight of each sample": (
        lambda net, h: torch.bmm(h.flatten(2), h.mean(1).flatten(1)[:, :, None]),
        "bmm",
    ),
    "an unseen buffer": (unseen(lambda h: h.add_(1.0)), "was modified outside torch functions"),
    "an unseen tanh": (unseen(lambda h: h.tanh_()), "was modified outside torch functions"),
    "written through .data": (by_data, "was modified outside torch functions"),
    "written through a detached one": (
        lambda net, h: (lambda y: (y.detach().mul_(2.0), y)[1])(h.mul(1.5)),
        "was modified outside torch functions",
    ),
    "added in place to a real part": (
        lambda net, h: torch.complex(h, h).real.add_(1.0),
        "adds in place to a view",
    ),
    "multiplied into a buffer": (lambda net, h: torch.ones(N, C, S, S).double().mul_(h), "mul_"),
    "a custom function": (lambda net, h: Hidden.apply(h), "HiddenBackward is a custom autograd.Function"),
    "a hook": (hooked, "register_hook"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_affine_and_per_sample_is_refused_by_name_and_exact(name):
    between, reason = REFUSED[name]
    model = Between(between)
    said = fastgan.explain_penalty(model, images())
    assert said.startswith("general path: ")
    assert reason in said
    if reason not in ("HiddenBackward is a custom autograd.Function", "register_hook"):
        assert_exact(model, images(), uneven)


@pytest.mark.parametrize(
    "name", [name for name, (_, reason) in REFUSED.items() if "getitem" in reason or "flip" in name]
)
def test_sizes_that_agree_do_not_hide_that_samples_are_moved(name, monkeypatch):
    for size in ("C", "S"):
        monkeypatch.setattr(f"{__name__}.{size}", N)
        monkeypatch.setattr(one_pass_problem, size, N)
    between, reason = REFUSED[name]
    model = Between(between)
    assert reason in fastgan.explain_penalty(model, images())
    assert_exact(model, images(), uneven)


def test_the_reason_names_the_call_and_its_line():
    def between(net, h):
        return torch.tanh(h)

    line = between.__code__.co_firstlineno + 1
    assert f"torch.tanh (test_one_pass_refused.py:{line})" in fastgan.explain_penalty(Between(between), images())


def test_what_does_not_reach_the_logits_does_not_matter():
    def between(net, h):
        net.statistics = h.mean(), h.tanh()
        return h

    assert fastgan.explain_penalty(Between(between), images()) == "one pass"
