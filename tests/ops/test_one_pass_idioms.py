"""What real discriminators are made of, one call after another: exact, in one pass, with four forwards' work."""

from __future__ import annotations

import copy
import math
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fastgan
from fastgan.ops.gradient_penalty.eligibility import Tracer
from fastgan.ops.gradient_penalty.one_pass import one_pass

N, C, S = 4, 6, 8  # samples, channels and pixels of the features
Y = torch.tensor([2, 0, 1, 2])
POINTS = torch.tensor([5, 3, 3, 0])
MASK = torch.arange(N * C * S * S).reshape(N, C, S, S) % 3 > 0
KERNEL = torch.tensor([1.0, 3.0, 3.0, 1.0])
FILTER = ((KERNEL[:, None] * KERNEL) / 64)[None, None].double()


class Work(TorchDispatchMode):
    """Multiply-adds of every convolution, its backward, and every matrix product."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.__name__.split(".")[0]
        if name == "convolution":
            side = args[0] if args[6] else out
            self.total += side.shape[0] * side[0, 0].numel() * args[1].numel()
        elif name == "convolution_backward":
            side = args[1] if args[7] else args[0]
            self.total += sum(args[-1][:2]) * side.shape[0] * side[0, 0].numel() * args[2].numel()
        elif name in ("mm", "bmm", "mv"):
            self.total += args[0].numel() * (args[1].shape[-1] if args[1].ndim > 1 else 1)
        elif name in ("addmm", "baddbmm"):
            self.total += args[1].numel() * args[2].shape[-1]
        return out


def work(function):
    with Work() as count:
        function()
    return count.total


class Between(nn.Module):
    """A convolution, what is done with its features (N, C, S, S), another convolution, and one logit of each sample."""

    def __init__(self, between, **parameters):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, C, 3, 1, 1), nn.Conv2d(C, 4, 3, 1, 1)
        self.head = nn.LazyLinear(1)
        self.between = between
        for name, value in parameters.items():
            setattr(self, name, value)
        self.double()
        self(torch.randn(N, 3, S, S, dtype=torch.float64))

    def forward(self, x):
        h = self.between(self, F.leaky_relu(self.first(x), 0.2))
        if h.ndim == 4 and h.shape[1] == C:
            h = F.leaky_relu(self.second(h), 0.2)
        return self.head(h.reshape(len(h), -1))


def parameter(*shape):
    torch.manual_seed(7)
    return nn.Parameter(torch.randn(*shape, dtype=torch.float64))


def constant(*shape):
    torch.manual_seed(8)
    return torch.randn(*shape, dtype=torch.float64)


def softplus(logits):
    return F.softplus(-logits).mean()


def uneven(logits):
    """Another gradient in every logit."""
    return (logits * torch.linspace(-1, 2, logits.numel(), dtype=logits.dtype).view_as(logits)).sum() + softplus(logits)


def by_pytorch(model, x, loss, pick=lambda output: output):
    x = x.detach().requires_grad_()
    output = pick(model(x))
    outputs = [output] if isinstance(output, torch.Tensor) else output
    (g,) = torch.autograd.grad(sum(o.sum() for o in outputs), x, create_graph=True)
    return loss(output) + 1.5 * g.square().reshape(len(g), -1).sum(1).mean()


def gradients(model, total):
    model.zero_grad()
    total.backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}


def assert_exact(model, x, loss=softplus, pick=lambda output: output):
    twin = copy.deepcopy(model)
    torch.manual_seed(3)
    want = gradients(twin, by_pytorch(twin, x, loss, pick))
    torch.manual_seed(3)
    output, penalty = fastgan.logits_and_penalty(model, x, kind="r1", weight=3.0)
    got = gradients(model, loss(pick(output)) + penalty)
    scale = max(w.norm() for w in want.values())
    for name, w in want.items():
        error = (got[name] - w).norm() / max(w.norm(), 1e-3 * scale)
        assert error < 1e-9, f"{name}: {error:.1e}"


def assert_at_the_floor(model, x, most=4.05):
    forward = work(lambda: model(x))

    def step():
        logits, penalty = fastgan.logits_and_penalty(model, x, kind="r1", weight=3.0)
        (softplus(logits) + penalty).backward()

    spent = work(step) / forward
    assert spent <= most, f"{spent:.2f} forwards"


def images(n=N):
    torch.manual_seed(1)
    return torch.randn(n, 3, S, S, dtype=torch.float64)


def in_place(change):
    """Applied to a tensor that nobody else reads."""

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


def equalized(net, h):
    return F.conv2d(h, net.w.to(h.dtype) * 0.3, padding=1) + (net.p * 2).view(1, -1, 1, 1)


def evaluated(norm):
    """With statistics and parameters that are not those of its beginning."""
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
    "division by a parameter": (lambda net, h: h / net.p, {"p": lambda: parameter(C, 1, 1)}),
    "division by a number": (lambda net, h: torch.div(h, math.sqrt(2)), {}),
    "embedding": (lambda net, h: h * net.e(Y)[:, :, None, None], {"e": lambda: nn.Embedding(3, C)}),
    "projection": (
        lambda net, h: (h.sum((2, 3)) * net.e(Y)).sum(1, keepdim=True) + h.mean((1, 2, 3))[:, None],
        {"e": lambda: nn.Embedding(3, C)},
    ),
    "lerp": (lambda net, h: torch.lerp(h, net.p, 0.3), {"p": lambda: parameter(C, 1, 1)}),
    "lerp by a tensor": (lambda net, h: torch.lerp(net.p, h, net.q), {"p": V, "q": V})
    if C == S
    else (lambda net, h: torch.lerp(constant(C, S, S), h, net.q), {"q": lambda: parameter(C, 1, 1)}),
    "lerp of both": (lambda net, h: torch.lerp(h, 2 * h, 0.3), {}),
    "addcmul": (lambda net, h: torch.addcmul(net.p, h, net.q, value=0.7), {"p": V, "q": lambda: parameter(S)})
    if C == S
    else (lambda net, h: torch.addcmul(constant(C, 1, 1), h, net.q, value=0.7), {"q": lambda: parameter(S)}),
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
    "lerp_": (in_place(lambda net, h: h.lerp_(net.p, 0.3)), {"p": lambda: parameter(C, 1, 1).expand(N, C, S, S)})
    if False
    else (in_place(lambda net, h: h.addcmul_(constant(C, 1, 1), net.p)), {"p": lambda: parameter(S)}),
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


@pytest.mark.parametrize("name", IDIOMS)
def test_an_idiom_is_exact_and_one_pass_at_the_floor(name):
    model = build(name)
    torch.manual_seed(3)
    assert fastgan.explain_penalty(model, images()) == "one pass"
    assert_exact(model, images(), uneven)
    assert_at_the_floor(model, images())


@pytest.mark.parametrize("name", ["position table", "blur", "class row", "groups", "einsum", "cat with constants"])
def test_a_batch_of_one_is_exact(name, monkeypatch):
    monkeypatch.setattr(f"{__name__}.N", 1)
    between, parameters = IDIOMS.get(name, (blur, {}))
    if name == "class row":
        between = lambda net, h: h.flatten(1)[torch.arange(1), POINTS[:1]]  # noqa: E731
    model = Between(between, **{key: make() for key, make in parameters.items()})
    assert_exact(model, images(1), uneven)


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


def through_a_view(net, h):
    h = h * 1.5
    h[:, :2].mul_(2)
    return h


def assigned(net, h):
    h = h * 1.5
    h[:, 0] = 0.3
    return h


def into_a_buffer(net, h):
    buffer = torch.zeros(N, C, S, S).double()
    buffer[:, 1:] = h[:, 1:]
    return buffer


def hooked(net, h):
    h = h * 1.5
    h.register_hook(lambda grad: grad * 2)
    return h


def sizes_that_agree(n):
    """Samples, channels and pixels of the same number, so that shapes alone tell nothing apart."""
    return nn.Sequential(nn.Conv2d(3, n, 3, 1, 1), nn.LeakyReLU(0.2)).double(), torch.randn(n, 3, n, n).double()


def permuted_samples(index):
    return lambda net, h: h + h[index]


# What mixes samples, or is not affine, or cannot be seen: each is refused by name, and exact all the same.
REFUSED = {
    "mean over samples": (lambda net, h: h - h.mean(0), "mean"),
    "mean over all": (lambda net, h: h - h.mean(), "mean"),
    "sum over samples after a transpose": (lambda net, h: h + h.transpose(0, 1).sum(1), "sum"),
    "sum over rows of samples and channels": (lambda net, h: h + h.reshape(N * C, S, S).sum(0), "sum"),
    "amax over samples": (lambda net, h: h - h.amax(0), "amax"),
    "sorted samples": (lambda net, h: h.sort(0).values, "sort"),
    "cumsum over samples": (lambda net, h: h.cumsum(0), "cumsum"),
    "flipped samples": (lambda net, h: h + h.flip(0), "flip"),
    "flipped samples among all": (lambda net, h: h + h.flip((0, 2)), "flip"),
    "rolled samples": (lambda net, h: h + h.roll(1, 0), "roll"),
    "rolled flat": (lambda net, h: h + h.roll(1), "roll"),
    "rot90 of samples": (lambda net, h: torch.rot90(h, 2, (0, 1)) + h, "rot90"),
    "flipud": (lambda net, h: torch.flipud(h) + h, "flipud"),
    "permuted samples": (permuted_samples(torch.tensor([1, 0, 2, 3])), "getitem"),
    "permuted samples by a list": (permuted_samples([3, 2, 1, 0]), "getitem"),
    "one sample for all": (lambda net, h: h + h[0], "getitem"),
    "every other sample": (lambda net, h: h + h[::2].repeat(2, 1, 1, 1), "getitem"),
    "other samples": (lambda net, h: h + torch.cat([h[1:], h[:1]]), "getitem"),
    "half of the samples repeated": (lambda net, h: h + h.narrow(0, 0, 2).repeat(2, 1, 1, 1), "narrow"),
    "index_select of samples": (lambda net, h: h + h.index_select(0, torch.tensor([1, 2, 3, 0])), "index_select"),
    "gather of samples": (lambda net, h: h.gather(0, Y.view(N, 1, 1, 1).expand_as(h).clamp(max=3)), "gather"),
    "mask of samples": (lambda net, h: h[torch.ones(N, dtype=torch.bool)], "getitem"),
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
    "an unseen buffer": (unseen(lambda h: h.add_(1.0)), "was written to"),
    "an unseen tanh": (unseen(lambda h: h.tanh_()), "was written to"),
    "written through .data": (by_data, "was written to"),
    "written through a view": (through_a_view, "was written to"),
    "written through a detached one": (
        lambda net, h: (lambda y: (y.detach().mul_(2.0), y)[1])(h.mul(1.5)),
        "was written to",
    ),
    "added in place to a view": (lambda net, h: (h * 2).flatten(1).add_(1.0).sub_(0.5), "adds in place to a view"),
    "assigned": (assigned, "setitem"),
    "assigned into a buffer": (into_a_buffer, "setitem"),
    "added into a buffer": (lambda net, h: torch.zeros(N, C, S, S).double().add_(h), "add_"),
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
    between, reason = REFUSED[name]
    model = Between(between)
    assert reason in fastgan.explain_penalty(model, images())
    assert_exact(model, images(), uneven)


def test_the_reason_names_the_call_and_its_line():
    def between(net, h):
        return torch.tanh(h)

    line = between.__code__.co_firstlineno + 1
    assert f"torch.tanh (test_one_pass_idioms.py:{line})" in fastgan.explain_penalty(Between(between), images())


def test_what_does_not_reach_the_logits_does_not_matter():
    def between(net, h):
        net.statistics = h.mean(), h.tanh()
        return h

    assert fastgan.explain_penalty(Between(between), images()) == "one pass"


class Heads(nn.Module):
    """Features, and what each head makes of them, in a container."""

    def __init__(self, heads, container):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.heads, self.container = nn.Conv2d(3, C, 3, 2, 1), nn.ModuleList(heads), container
        self.double()

    def forward(self, x):
        h = F.leaky_relu(self.body(x), 0.2)
        return self.container([head(h) for head in self.heads])


class Output(NamedTuple):
    a: torch.Tensor
    b: torch.Tensor


def patches():
    return nn.Conv2d(C, 1, 3, 1, 1)


def pooled():
    return nn.Sequential(nn.Conv2d(C, 1, 3, 2, 1))


SEVERAL = "one pass, where all logits of a sample have the same gradient"
OUTPUTS = {
    "patches": ([patches], lambda parts: parts[0]),
    "scales": ([patches, pooled], list),
    "scales in a tuple": ([patches, pooled], tuple),
}
LOSSES = {
    "the same in a sample": lambda parts: sum(
        (p.flatten(1).sum(1) * torch.arange(1.0, 1 + len(p))).sum() for p in parts
    ),
    "mean": lambda parts: sum(p.mean() for p in parts),
    "other in each": lambda parts: sum(F.softplus(-p).mean() + p.square().sum() for p in parts),
    "one alone": lambda parts: parts[-1].sum(),
    "one unevenly": lambda parts: F.softplus(parts[0]).sum(),
}


def parts_of(output):
    return [output] if isinstance(output, torch.Tensor) else list(output)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", OUTPUTS)
def test_several_logits_a_sample_are_exact_whatever_the_loss(name, loss):
    heads, container = OUTPUTS[name]
    model = Heads([head() for head in heads], container)
    assert fastgan.explain_penalty(model, images()).startswith(SEVERAL)
    output, _ = fastgan.logits_and_penalty(model, images())
    assert type(output) is type(model(images()))
    assert_exact(model, images(), lambda output: LOSSES[loss](parts_of(output)))


def test_patches_with_one_gradient_a_sample_take_four_forwards_and_others_six():
    model = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1), nn.LeakyReLU(0.2), nn.Conv2d(16, 1, 3, 1, 1)).double()
    forward = work(lambda: model(images()))

    def step(loss):
        logits, penalty = fastgan.logits_and_penalty(model, images())
        (loss(logits) + penalty).backward()

    assert work(lambda: step(torch.mean)) <= 4.05 * forward
    assert work(lambda: step(softplus)) <= 6.05 * forward


def test_loss_and_penalty_of_patches_may_be_differentiated_apart():
    model = Heads([patches()], lambda parts: parts[0])
    for loss in (torch.mean, softplus):
        twin = copy.deepcopy(model)
        want = gradients(twin, by_pytorch(twin, images(), loss))
        logits, penalty = fastgan.logits_and_penalty(model, images(), kind="r1", weight=3.0)
        model.zero_grad()
        loss(logits).backward(retain_graph=True)
        penalty.backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad, want[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("container", [dict, Output, list])
def test_what_else_is_returned_keeps_its_graph(container):
    """A class head beside the logit, chosen by the caller."""

    def pack(parts):
        return (
            container(zip("ab", parts, strict=True))
            if container is dict
            else container(*parts)
            if container is Output
            else parts
        )

    model = Heads(
        [nn.Sequential(nn.Flatten(), nn.Linear(C * 16, 1)), nn.Sequential(nn.Flatten(), nn.Linear(C * 16, 3))], pack
    )
    x = images().requires_grad_()
    with fastgan.twice_differentiable(), Tracer(x) as tracer:
        returned = model(x)
    logits = returned["a"] if container is dict else returned[0]
    assert tracer.judge([logits], returned) is None
    assert "what else it returns" in tracer.remark()
    returned, penalty = one_pass(
        returned, [logits], (x,), tracer, lambda grads: 1.5 * grads[0].square().sum((1, 2, 3)).mean()
    )
    assert type(returned) is (container if container is not list else list)
    a, b = returned.values() if container is dict else returned
    got = gradients(model, softplus(a) + F.cross_entropy(b, Y) + penalty)
    twin = copy.deepcopy(model)

    def loss(output):
        a, b = output.values() if container is dict else output
        return softplus(a) + F.cross_entropy(b, Y)

    x = images().requires_grad_()
    output = twin(x)
    (g,) = torch.autograd.grad((output["a"] if container is dict else output[0]).sum(), x, create_graph=True)
    want = gradients(twin, loss(output) + 1.5 * g.square().sum((1, 2, 3)).mean())
    for name, w in want.items():
        torch.testing.assert_close(got[name], w, rtol=1e-9, atol=1e-12)


def test_several_inputs_are_differentiated_together():
    torch.manual_seed(0)
    image, text, head = (m.double() for m in (nn.Conv2d(3, 4, 4, 4), nn.Linear(5, 8), nn.Linear(24, 1)))
    model = nn.ModuleList([image, text, head])

    def forward(x, t):
        return head(torch.cat([F.leaky_relu(image(x), 0.2).flatten(1), F.leaky_relu(text(t), 0.2)], 1))

    def squares(grads):
        return sum(g.square().flatten(1).sum(1) for g in grads).mean()

    x, t = images().requires_grad_(), torch.randn(N, 5, dtype=torch.float64).requires_grad_()
    with fastgan.twice_differentiable(), Tracer(x, t) as tracer:
        logits = forward(x, t)
    assert tracer.judge([logits], logits) is None
    logits, penalty = one_pass(logits, [logits], (x, t), tracer, squares)
    got = gradients(model, uneven(logits) + penalty)
    logits = forward(x, t)
    want = gradients(model, uneven(logits) + squares(torch.autograd.grad(logits.sum(), (x, t), create_graph=True)))
    for name, w in want.items():
        torch.testing.assert_close(got[name], w, rtol=1e-9, atol=1e-12)


def test_a_penalty_that_has_parameters_of_its_own_gives_them_their_gradient():
    model = build("gate")
    target = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    x = images().requires_grad_()
    with fastgan.twice_differentiable(), Tracer(x) as tracer:
        logits = model(x)
    assert tracer.judge([logits], logits) is None
    _, penalty = one_pass(logits, [logits], (x,), tracer, lambda grads: (grads[0].square().sum() - target).square())
    (by_target,) = torch.autograd.grad(penalty, target)
    (g,) = torch.autograd.grad(model(x).sum(), x)
    torch.testing.assert_close(by_target, -2 * (g.square().sum() - target))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_idioms_under_autocast_are_as_near_as_autograds(dtype):
    for name in ("tokens", "position table", "cat with constants", "addmm", "equalized"):
        model = build(name).float()
        model.between = lambda net, h, between=model.between: between(net, h).float()
        x = images().float()
        exact = gradients(model, by_pytorch(model, x, softplus))
        errors = []
        for ours in (True, False):
            with torch.autocast("cpu", dtype):
                if ours:
                    logits, penalty = fastgan.logits_and_penalty(model, x, kind="r1", weight=3.0)
                    total = softplus(logits.float()) + penalty
                else:
                    total = by_pytorch(model, x, lambda logits: softplus(logits.float()))
            got = gradients(model, total)
            errors.append(sum((got[n] - w).norm() for n, w in exact.items()))
        assert errors[0] <= 2 * errors[1] + 1e-3 * sum(w.norm() for w in exact.values())
