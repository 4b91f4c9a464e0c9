"""Calls that occur in real discriminators: exact in one pass, with the work of four forwards."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastgan
from tests.ops import one_pass_problem
from tests.ops.one_pass_problem import (
    Between,
    C,
    N,
    S,
    Y,
    assert_at_the_floor,
    assert_exact,
    constant,
    images,
    parameter,
    uneven,
)

POINTS = torch.tensor([5, 3, 3, 0])
ROWS = torch.arange(S).repeat(S, 1)
MASK = torch.arange(N * C * S * S).reshape(N, C, S, S) % 3 > 0
KERNEL = torch.tensor([1.0, 3.0, 3.0, 1.0])
FILTER = ((KERNEL[:, None] * KERNEL) / 64)[None, None].double()


def in_place(change):
    """Applied to a tensor that nothing else reads."""

    def between(net, h):
        h = h * 1.5
        change(net, h)
        return h

    return between


def tokens(net, h):
    t = h.flatten(2).transpose(1, 2)  # (N, S S, C)
    return (t @ net.w + net.p).transpose(1, 2).unflatten(2, (S, S))


def blur(net, h):
    n, c, height, width = h.shape
    padded = F.pad(h, (2, 1, 2, 1)).reshape(n * c, 1, height + 3, width + 3)
    return F.conv2d(padded, FILTER).reshape(n, c, height, width)


def grouped(net, h):
    """A weight of each sample, by groups."""
    n, c, height, width = h.shape
    return F.conv2d(h.reshape(1, n * c, height, width), net.w, padding=1, groups=n).reshape(n, -1, height, width)


def channels_as_rows(net, h):
    return F.linear(h.flatten(2).permute(1, 0, 2).reshape(C * N, S * S), net.w).view(C, N, S, S).transpose(0, 1)


def twice_the_batch(net, h):
    both = net.second(torch.cat([h, h.flip(3)]))
    a, b = both.chunk(2)
    return a + 0.5 * b


def pixels_of_a_grid(net, h):
    """The random translation of DiffAugment."""
    n, y, x = torch.meshgrid(torch.arange(N), torch.arange(S), torch.arange(S), indexing="ij")
    y = torch.clamp(y + torch.tensor([0, 1, -1, 2]).view(N, 1, 1), 0, S - 1)
    return h.permute(0, 2, 3, 1).contiguous()[n, y, torch.clamp(x - 1, 0, S - 1)].permute(0, 3, 1, 2)


def edges(net, h):
    """The features of DGCNN: each point beside its neighbours, by indices into the points of all samples."""
    points = h.flatten(2)
    found = torch.cdist(points.detach().mT, points.detach().mT).topk(3, largest=False).indices
    found = (found + torch.arange(N).view(N, 1, 1) * S * S).view(-1)
    near = points.transpose(2, 1).contiguous().view(N * S * S, C)[found].view(N, S * S, 3, C)
    center = points.mT.view(N, S * S, 1, C).repeat(1, 1, 3, 1)
    return net.second(torch.cat([near - center, center], 3).permute(0, 3, 1, 2)[:, 2 : C + 2]).amax(-1)


def samples_twice(net, h):
    a, b = net.second(h[torch.arange(N).repeat(2)]).chunk(2)
    return a + 0.5 * b.flip(3)


def equalized(net, h):
    return F.conv2d(h, net.w.to(h.dtype) * 0.3, padding=1) + (net.p * 2).view(1, -1, 1, 1)


def evaluated(norm):
    """With statistics and parameters that differ from the initial ones."""
    torch.manual_seed(6)
    for values in (*norm.parameters(), norm.running_mean, norm.running_var):
        nn.init.uniform_(values, 0.5, 2)
    return norm.eval()


def weight_from_code(net, h):
    w = net.w - net.w.mean((1, 2, 3), keepdim=True)
    return F.conv2d(h, w / w.square().sum((1, 2, 3), keepdim=True).sqrt(), net.p, padding=1)


def masked_values(net, h):
    return h + (h.detach().abs() > 0.3) * 0.25


W4, V = (lambda: parameter(C, C, 3, 3)), (lambda: parameter(C))
IDIOMS = {
    # sums
    "broadcast bias": (lambda net, h: h + net.p, {"p": lambda: parameter(C, 1, 1)}),
    "bias from the left": (lambda net, h: net.p + h, {"p": lambda: parameter(1, C, 1, 1)}),
    "position table": (lambda net, h: h + net.p, {"p": lambda: parameter(1, C, S, S)}),
    "noise with a strength": (lambda net, h: h + net.p * constant(N, 1, S, S), {"p": lambda: parameter(1)}),
    "constant of each sample": (lambda net, h: h - constant(N, C, 1, 1), {}),
    "less than a number": (lambda net, h: 1 - h, {}),
    "less than a parameter": (lambda net, h: net.p - h, {"p": lambda: parameter(C, 1, 1)}),
    "add with alpha": (lambda net, h: torch.add(h, net.p, alpha=0.3), {"p": lambda: parameter(S)}),
    "sub with alpha": (lambda net, h: torch.sub(net.p, h, alpha=0.3), {"p": lambda: parameter(S)}),
    "rsub": (lambda net, h: torch.rsub(h, 2.0), {}),
    "python sum": (lambda net, h: sum([h, 0.5 * h]), {}),
    "parameter used twice": (lambda net, h: (h + net.p) * net.p, {"p": lambda: parameter(C, 1, 1)}),
    # products
    "gate": (lambda net, h: h * net.p, {"p": lambda: parameter(C, 1, 1)}),
    "residual gate": (lambda net, h: h + net.p * net.second.weight.mean() * h, {"p": lambda: parameter(1)}),
    "mask": (lambda net, h: h * MASK, {}),
    "mask as an index": (lambda net, h: h[:, torch.arange(C) % 3 > 0][..., torch.eye(S) == 0], {}),
    "division by a parameter": (lambda net, h: h / net.p, {"p": lambda: parameter(C, 1, 1)}),
    "division by a number": (lambda net, h: torch.div(h, math.sqrt(2)), {}),
    "embedding": (lambda net, h: h * net.e(Y)[:, :, None, None], {"e": lambda: nn.Embedding(3, C)}),
    "projection": (
        lambda net, h: (h.sum((2, 3)) * net.e(Y)).sum(1, keepdim=True) + h.mean((1, 2, 3))[:, None],
        {"e": lambda: nn.Embedding(3, C)},
    ),
    "lerp": (lambda net, h: torch.lerp(h, net.p, 0.3), {"p": lambda: parameter(C, 1, 1)}),
    "lerp by a tensor": (
        lambda net, h: torch.lerp(constant(C, S, S), h, net.q),
        {"q": lambda: parameter(C, 1, 1)},
    ),
    "lerp of both": (lambda net, h: torch.lerp(h, 2 * h, 0.3), {}),
    "addcmul": (
        lambda net, h: torch.addcmul(constant(C, 1, 1), h, net.q, value=0.7),
        {"q": lambda: parameter(S)},
    ),
    "addcmul of constants": (
        lambda net, h: torch.addcmul(h, constant(S), net.q, value=0.7),
        {"q": lambda: parameter(C, 1, 1)},
    ),
    "addcdiv": (lambda net, h: torch.addcdiv(constant(S), h, net.q), {"q": lambda: parameter(C, 1, 1)}),
    # in place
    "add_": (in_place(lambda net, h: h.add_(net.p)), {"p": lambda: parameter(C, 1, 1)}),
    "augmented": (in_place(lambda net, h: h.__iadd__(constant(C, 1, 1)).__imul__(2).__isub__(1).__itruediv__(3)), {}),
    "mul_ by a parameter": (in_place(lambda net, h: h.mul_(net.p)), {"p": lambda: parameter(C, 1, 1)}),
    "sub_ and div_": (in_place(lambda net, h: h.sub_(0.5).div_(net.p)), {"p": lambda: parameter(S)}),
    "clamp_": (in_place(lambda net, h: h.clamp_(-0.4, 0.5)), {}),
    "masked_fill_": (in_place(lambda net, h: h.masked_fill_(~MASK, 0.7)), {}),
    "addcmul_": (in_place(lambda net, h: h.addcmul_(constant(C, 1, 1), net.p)), {"p": lambda: parameter(S)}),
    "relu_ of a view": (lambda net, h: F.relu_((h * 2).flatten(1)), {}),
    "mul_ of a slice": (lambda net, h: F.leaky_relu_((h * 2)[:, 1:].mul_(net.p), 0.1), {"p": lambda: parameter(S)}),
    "bias then relu_": (lambda net, h: F.relu_(net.second(h).add_(net.p)), {"p": lambda: parameter(4, 1, 1)}),
    # piecewise affine
    "clamp": (lambda net, h: h.clamp(-0.3, 0.4), {}),
    "clamp from zero": (lambda net, h: h.clamp(min=0), {}),
    "clamp from above": (lambda net, h: torch.clamp(h, max=0.1), {}),
    "clamp between tensors": (lambda net, h: h.clamp(constant(C, 1, 1) - 1, constant(S) + 1), {}),
    "clamp_min": (lambda net, h: h.clamp_min(0.1), {}),
    "clip": (lambda net, h: h.clip(-0.1, 0.2), {}),
    "clamp at a bound that is met": (lambda net, h: h.clamp(0.1, 0.2).clamp(0.1, 0.15), {}),
    "maximum of a constant": (lambda net, h: torch.maximum(h, constant(C, 1, 1)), {}),
    "minimum of a parameter": (lambda net, h: torch.minimum(net.p, h), {"p": lambda: parameter(C, 1, 1)}),
    "maximum of both": (lambda net, h: torch.maximum(h, -0.5 * h), {}),
    "max of two": (lambda net, h: torch.max(h, constant(S)), {}),
    "maxout": (lambda net, h: h.view(N, 2, C // 2, S, S).amax(1), {}),
    "max over a dimension": (lambda net, h: h.max(2)[0] + h.min(dim=3).values, {}),
    "amax and amin": (lambda net, h: h.amax((2, 3)) - h.amin(dim=(2, 3)), {}),
    "sorted": (lambda net, h: h.flatten(2).sort(2).values.topk(3, dim=1)[0], {}),
    "median": (lambda net, h: h.flatten(2).median(2).values, {}),
    "where": (lambda net, h: torch.where(MASK, h, 0.3), {}),
    "where of a parameter": (lambda net, h: torch.where(MASK, net.p, h), {"p": lambda: parameter(C, 1, 1)}),
    "where of both": (lambda net, h: torch.where(h > 0, h, 0.3 * h), {}),
    "masked_fill": (lambda net, h: h.masked_fill(MASK, 0.0) + h.masked_fill(~MASK, -1.0), {}),
    # dropout
    "dropout": (lambda net, h: F.dropout(h, 0.3), {}),
    "dropout in place": (in_place(lambda net, h: F.dropout(h, 0.3, inplace=True)), {}),
    "dropout1d": (lambda net, h: F.dropout1d(h.flatten(2), 0.3), {}),
    "dropout2d": (lambda net, h: F.dropout2d(h, 0.3), {}),
    "alpha dropout": (lambda net, h: F.alpha_dropout(h, 0.3, True), {}),
    "feature alpha dropout": (lambda net, h: F.feature_alpha_dropout(h, 0.3, True), {}),
    "alpha dropout in evaluation": (lambda net, h: F.alpha_dropout(h, 0.3), {}),
    # products of matrices
    "matmul": (lambda net, h: h @ net.p, {"p": lambda: parameter(S, S)}),
    "matmul from the left": (lambda net, h: net.p @ h, {"p": lambda: parameter(S, S)}),
    "matmul with a vector": (lambda net, h: h @ net.p, {"p": lambda: parameter(S)}),
    "vector with a matmul": (lambda net, h: net.p @ h, {"p": lambda: parameter(S)}),
    "matmul of each sample": (lambda net, h: torch.matmul(constant(N, 1, S, S), h), {}),
    "samples as columns": (lambda net, h: (net.p @ h.flatten(1).t()).t(), {"p": lambda: parameter(5, C * S * S)}),
    "mm": (lambda net, h: torch.mm(h.flatten(1), net.p), {"p": lambda: parameter(C * S * S, 5)}),
    "mv": (lambda net, h: torch.mv(h.flatten(1), net.p), {"p": lambda: parameter(C * S * S)}),
    "bmm": (lambda net, h: torch.bmm(h.flatten(2), net.p.expand(N, -1, -1)), {"p": lambda: parameter(S * S, 5)}),
    "addmm": (
        lambda net, h: torch.addmm(net.b, h.flatten(1), net.p, beta=0.5, alpha=2),
        {"p": lambda: parameter(C * S * S, 5), "b": lambda: parameter(5)},
    ),
    "addmm to it": (lambda net, h: h[:, 0].flatten(1).addmm(constant(N, 3), net.p), {"p": lambda: parameter(3, S * S)}),
    "baddbmm": (
        lambda net, h: torch.baddbmm(net.b, net.p.expand(N, -1, -1), h.flatten(2)),
        {"p": lambda: parameter(3, C), "b": lambda: parameter(1, 3, S * S)},
    ),
    "addmv": (
        lambda net, h: torch.addmv(net.b, h.flatten(1), net.p),
        {"p": lambda: parameter(C * S * S), "b": lambda: parameter(1)},
    ),
    "einsum": (lambda net, h: torch.einsum("nchw,wv->nchv", h, net.p), {"p": lambda: parameter(S, S)}),
    "einsum with an ellipsis": (lambda net, h: torch.einsum("vw,...w", net.p, h), {"p": lambda: parameter(S, S)}),
    "einsum that moves the samples": (
        lambda net, h: torch.einsum("nchw,cd->dnhw", h, net.p).transpose(0, 1),
        {"p": lambda: parameter(C, C)},
    ),
    "einsum with a row a sample": (lambda net, h: torch.einsum("nchw, nc -> nhw", h, constant(N, C)), {}),
    "tensordot": (lambda net, h: torch.tensordot(h, net.p, ([1], [0])), {"p": lambda: parameter(C, 3)}),
    "bilinear with a constant": (
        lambda net, h: F.bilinear(h.flatten(1), constant(N, 2), net.p, net.b),
        {"p": lambda: parameter(3, C * S * S, 2), "b": lambda: parameter(3)},
    ),
    "linear with rows of biases": (
        lambda net, h: F.linear(h.flatten(2), net.p, net.b),
        {"p": lambda: parameter(3, S * S), "b": lambda: parameter(C, 3)},
    ),
    "tokens": (tokens, {"w": lambda: parameter(C, C), "p": lambda: parameter(S * S, C)}),
    # weights
    "equalized": (equalized, {"w": W4, "p": V}),
    "weight from code": (weight_from_code, {"w": W4, "p": V}),
    "weight norm": (
        lambda net, h: net.m(h),
        {"m": lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(C, C, 3, 1, 1))},
    ),
    "groups": (grouped, {"w": lambda: parameter(4 * N, C, 3, 3)}),
    "transposed convolution": (
        lambda net, h: F.conv_transpose2d(h, net.w, net.p, 2, groups=2),
        {"w": lambda: parameter(C, 2, 2, 2), "p": lambda: parameter(4)},
    ),
    "batch twice": (twice_the_batch, {}),
    "batch norm in evaluation": (lambda net, h: net.m(h), {"m": lambda: evaluated(nn.BatchNorm2d(C))}),
    "batch norm of rows": (lambda net, h: net.m(h.flatten(1)), {"m": lambda: evaluated(nn.BatchNorm1d(C * S * S))}),
    "batch norm without parameters": (
        lambda net, h: net.m(h),
        {"m": lambda: evaluated(nn.BatchNorm2d(C, affine=False))},
    ),
    # shapes
    "samples times channels": (blur, {}),
    "channels times samples": (channels_as_rows, {"w": lambda: parameter(S * S, S * S)}),
    "slices": (lambda net, h: torch.cat([h[:, 3:], h[:, :3]], 1)[..., 1:, ::2], {}),
    "integers and None": (lambda net, h: h[:, 0, None, ..., -1], {}),
    "class row": (lambda net, h: h.flatten(1)[torch.arange(N), POINTS[:N]], {}),
    "class row by a list": (lambda net, h: h.flatten(1)[list(range(N)), [0, 1, 0, 2]], {}),
    "class row, features behind": (lambda net, h: h[torch.arange(N), Y], {}),
    "class row, apart": (lambda net, h: h[torch.arange(N), :, POINTS], {}),
    "class rows of two": (lambda net, h: h[torch.arange(N)[:, None], torch.stack([Y, POINTS], 1)], {}),
    "pixels of a grid": (pixels_of_a_grid, {}),
    "pixels of all samples": (lambda net, h: h[torch.arange(N).view(N, 1, 1).repeat(1, S, S), 0, ROWS, ROWS.mT], {}),
    "samples counted from the end": (lambda net, h: h[torch.arange(-N, 0)], {}),
    "samples twice by an index": (samples_twice, {}),
    "samples in copies by an index": (
        lambda net, h: net.second(h[torch.arange(N).repeat_interleave(3)]).unflatten(0, (N, 3)).amax(1),
        {},
    ),
    "points of all samples": (edges, {}),
    "index_select of all samples": (lambda net, h: h.flip(2).index_select(0, torch.arange(N)), {}),
    "gather of all samples": (
        lambda net, h: h.transpose(0, 2).gather(2, torch.arange(N).view(1, 1, N, 1).expand(S, 3, N, 2)).transpose(0, 2),
        {},
    ),
    "indices of channels": (lambda net, h: h[:, POINTS, :, [0, 1, 2, 3]].transpose(0, 1), {}),
    "index_select": (lambda net, h: h.index_select(1, POINTS), {}),
    "gather": (lambda net, h: h.flatten(1).gather(1, Y[:, None]), {}),
    "take_along_dim": (lambda net, h: torch.take_along_dim(h, Y.view(N, 1, 1, 1), 1), {}),
    "transposed": (lambda net, h: h.transpose(0, 1).mT.permute(1, 0, 3, 2), {}),
    "moved": (lambda net, h: h.movedim(0, -1).swapaxes(0, 3), {}),
    "T": (lambda net, h: h.flatten(1).T.t(), {}),
    "views": (lambda net, h: h.view(N, 2, -1).squeeze().unsqueeze(0)[0].reshape(N, 3, -1).unflatten(1, (1, 3)), {}),
    "expanded": (lambda net, h: h[:, :1].expand(-1, C, -1, -1) + h[:, None, 0].expand(N, C, S, S), {}),
    "pieces": (
        lambda net, h: torch.cat([*h.chunk(3, 1)[::-1][:2], *h.split([1, 1, 4], 1)[:2], *h.tensor_split(3, 1)[:0]], 1),
        {},
    ),
    "unbound and stacked": (lambda net, h: torch.stack(h.unbind(1)[::-1], 1) + torch.stack([*h.unbind(1)], dim=-3), {}),
    "cat with constants": (lambda net, h: torch.cat([h[:, 1:], constant(N, 1, S, S)], 1), {}),
    "cat with a parameter": (
        lambda net, h: torch.cat([net.p.expand(N, -1, -1, -1), h[:, 2:]], dim=1),
        {"p": lambda: parameter(2, S, S)},
    ),
    "stack with a constant": (lambda net, h: torch.stack([constant(N, C), h.mean((2, 3))], 1), {}),
    "hstack": (lambda net, h: torch.hstack([h.mean((2, 3)), constant(N, 2)]), {}),
    "rolled and flipped": (lambda net, h: h.roll(1, 2).flip(1).rot90(1, (2, 3)).roll((1, 2), (2, 3)), {}),
    "repeated": (lambda net, h: h.repeat(1, 1, 2, 1).repeat_interleave(2, 3).tile(2), {}),
    "samples repeated": (lambda net, h: h.repeat(2, 1, 1, 1).view(2, N, C, S, S).mean(0), {}),
    "samples repeated one by one": (lambda net, h: h.repeat_interleave(2, 0).view(N, 2 * C, S, S), {}),
    "sums": (lambda net, h: h.sum((2, 3), keepdim=True) * torch.ones(1, 1, S, S).double() + h.mean(-1, True), {}),
    "sum with axis": (lambda net, h: h.sum(axis=3) + torch.mean(h, dim=2), {}),
    "cumsum": (lambda net, h: h.cumsum(2), {}),
    "triangle": (lambda net, h: h.tril() - h.triu(1), {}),
    "diagonal": (lambda net, h: h.diagonal(0, 2, 3), {}),
    "unfolded": (lambda net, h: h.unfold(2, 3, 2), {}),
    "F.unfold and F.fold": (lambda net, h: F.fold(F.unfold(h, 2, stride=2), (S, S), 2, stride=2), {}),
    "pixel shuffle": (lambda net, h: F.pixel_shuffle(F.pixel_unshuffle(h, 2), 2), {}),
    "channel shuffle": (lambda net, h: F.channel_shuffle(h, 3), {}),
    "instance norm in evaluation": (
        lambda net, h: net.m(h),
        {"m": lambda: evaluated(nn.InstanceNorm2d(C, affine=True, track_running_stats=True))},
    ),
    "samples padded by none": (lambda net, h: F.pad(h, (1, 1, 1, 1, 0, 0, 0, 0))[:, :, 2:, :-2], {}),
    "padded": (lambda net, h: F.pad(F.pad(h, (1, 2, 0, 1)), (1, 0), value=0.5), {}),
    "cast": (lambda net, h: h.to(torch.float64).double().type_as(net.p).to(net.p) * 2, {"p": V}),
    "casts of a parameter": (lambda net, h: h + net.p.to(h).expand_as(h[0]), {"p": lambda: parameter(C, 1, 1)}),
    "nearest": (lambda net, h: F.interpolate(h, scale_factor=2), {}),
    "nearest exact": (lambda net, h: F.interpolate(h, scale_factor=0.5, mode="nearest-exact"), {}),
    "bilinear": (lambda net, h: F.interpolate(h, scale_factor=2, mode="bilinear", align_corners=False), {}),
    "antialiased": (lambda net, h: F.interpolate(h, size=5, mode="bilinear", antialias=True), {}),
    "bicubic": (lambda net, h: F.interpolate(h, size=(12, 9), mode="bicubic"), {}),
    "linear": (lambda net, h: F.interpolate(h.flatten(2), scale_factor=0.5, mode="linear"), {}),
    "trilinear": (lambda net, h: F.interpolate(h[:, None], scale_factor=0.5, mode="trilinear"), {}),
    # constants of the batch
    "detached": (lambda net, h: h * h.detach().mean() + h.detach(), {}),
    "mask from values": (masked_values, {}),
    "normed by the batch": (lambda net, h: h / h.norm().detach(), {}),
    "straight through": (lambda net, h: h + (h.round() - h).detach(), {}),
    "noise like it": (lambda net, h: h + 0.1 * torch.randn_like(h), {}),
}


def build(name):
    between, parameters = IDIOMS[name]
    return Between(between, **{key: make() for key, make in parameters.items()})


if torch.__version__ >= (2, 13):  # before, PyTorch has no second derivative of this function
    IDIOMS["sampled at constant places"] = (
        lambda net, h: F.grid_sample(h, net.p, padding_mode="reflection", align_corners=False),
        {"p": lambda: constant(N, S, S, 2).tanh()},
    )


@pytest.mark.parametrize("name", IDIOMS)
def test_an_idiom_is_exact_and_one_pass_at_the_floor(name):
    model = build(name)
    torch.manual_seed(3)
    assert fastgan.explain_penalty(model, images()) == "one pass"
    assert_exact(model, images(), uneven)
    assert_at_the_floor(model, images())


@pytest.mark.parametrize("name", ["position table", "blur", "class row", "groups", "einsum", "cat with constants"])
def test_a_batch_of_one_is_exact(name, monkeypatch):
    for module in (__name__, one_pass_problem.__name__):
        monkeypatch.setattr(f"{module}.N", 1)
    between, parameters = IDIOMS.get(name, (blur, {}))
    if name == "class row":
        between = lambda net, h: h.flatten(1)[torch.arange(1), POINTS[:1]]  # noqa: E731
    model = Between(between, **{key: make() for key, make in parameters.items()})
    assert_exact(model, images(1), uneven)


def test_rows_of_a_single_sample_are_exact():
    model = Between(
        lambda net, h: F.linear(h[0].flatten(1).t(), net.w, net.b).t()[None], w=parameter(C, C), b=parameter(C)
    )
    assert_exact(model, images(1), uneven)


def test_a_discriminator_that_reroutes_itself_is_one_pass():
    model = build("gate")

    def rerouted(x):
        with fastgan.twice_differentiable():
            return model(x)

    assert fastgan.explain_penalty(rerouted, images()) == "one pass"
