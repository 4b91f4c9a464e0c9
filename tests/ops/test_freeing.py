"""The first backward of a penalty frees the forward of a piecewise affine function, and no other."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional as F

import fastgan
from fastgan.bench.memory import peak_bytes, saved_bytes
from fastgan.ops.gradient_penalty.freeing import may_free
from fastgan.ops.gradient_penalty.paths import paths
from tests.harness import assert_close
from tests.ops.test_gradient_penalty import DISCRIMINATORS, gradients, images

CPU = torch.device("cpu")
W = torch.randn(6, 3, 3, 3, requires_grad=True)
M = torch.randn(8, 8, requires_grad=True)
ORDER = torch.randint(3, (2, 3, 8, 8))

INDEPENDENT = {
    "conv2d": lambda x: F.conv2d(x, W),
    "leaky_relu": F.leaky_relu,
    "relu": F.relu,
    "relu in place": lambda x: F.relu_(x * 1),
    "avg_pool2d": lambda x: F.avg_pool2d(x, 2),
    "linear": lambda x: F.linear(x, M, M[0]),
    "linear of two dimensions": lambda x: F.linear(x.flatten(0, 2), M, M[0]),
    "matmul": lambda x: x @ M,
    "bmm": lambda x: torch.bmm(x[:, 0], M.expand(2, 8, 8)),
    "product with a parameter": lambda x: x * M,
    "quotient by a parameter": lambda x: x / M,
    "sums": lambda x: x + M - 2 * x + x.sum(1, keepdim=True) - x.mean((2, 3), keepdim=True) + x.sum() - x.mean(),
    "shapes": lambda x: x.flatten(1).view(2, 3, 64).transpose(1, 2).permute(0, 2, 1).squeeze()[None],
    "expanded": lambda x: x[:, :1].expand(2, 3, 8, 8) * 2,
    "pieces": lambda x: torch.cat([x[:, 1:], *x.split(1, 1), torch.stack(x.unbind(1), 1).flip(1).roll(1, 2)], 1),
    "split": lambda x: torch.cat(x.split([1, 2], 1), 1).repeat(1, 2, 1, 1).clone(),
    "padded": lambda x: F.pad(x, (1, 2)),
    "resampled": lambda x: F.interpolate(x, scale_factor=2) + F.interpolate(x, scale_factor=2, mode="bilinear"),
    "shuffled": lambda x: F.pixel_shuffle(F.pixel_unshuffle(x, 2), 2),
    "cast": lambda x: x.double().float(),
    "max pool": lambda x: F.max_pool2d(x, 2),
    "adaptive pool": lambda x: F.adaptive_avg_pool2d(x, 3),
    "clamped": lambda x: F.relu6(x).clamp(0.1, 1).abs() + F.prelu(x, M[0, :3]),
    "mirrored": lambda x: F.pad(x, (1, 1, 1, 1), "reflect") + F.pad(x, (1, 1, 1, 1), "circular"),
    "unpooled": lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2),
    "resampled to any size": lambda x: sum(
        F.interpolate(x, (5, 7), mode=m, antialias=a)
        for m, a in (("nearest-exact", 0), ("bilinear", 1), ("bicubic", 0), ("bicubic", 1), ("area", 0))
    ),
    "resampled in 1 and 3 dimensions": lambda x: (
        F.interpolate(x[:, 0], 5, mode="linear").sum() + F.interpolate(x[None], (2, 5, 7), mode="trilinear").sum()
    ),
    "largest": lambda x: x.amax(2) + x.amin(2) + x.max(2)[0] + x.min(2)[0] + x.max() + x.min(),
    "larger": lambda x: torch.maximum(x, x.flip(3)) + torch.minimum(x, x.flip(3)) + torch.fmax(x, x.flip(3)),
    "ordered": lambda x: x.sort(1)[0] + x.topk(3, 1)[0] + x.median(1, keepdim=True)[0] + x.kthvalue(2, 1, True)[0],
    "so far": lambda x: x.cumsum(1) + x.cummax(2)[0] + x.cummin(2)[0],
    "indexed": lambda x: x[:, [2, 0, 1]] + x.index_select(1, torch.tensor([0, 2, 1])) + x.gather(1, ORDER),
    "masked": lambda x: torch.where(x > 0, x, 0.1 * x) + x.masked_fill(x < 0, 0) + x.nan_to_num() + x.frac(),
    "triangles and turns": lambda x: x.tril() + x.triu() + x.rot90(1, (2, 3)),
    "columns": lambda x: F.fold(F.unfold(x, 2, stride=2), 8, 2, stride=2) + F.channel_shuffle(x, 3),
}  # fmt: skip
DEPENDENT = {
    "group norm": lambda x: fastgan.ops.group_norm(x, 3),
    "layer norm": lambda x: F.layer_norm(x, [8, 8]),
    "smooth": F.silu,
    "square": lambda x: x * x,
    "quotient of both": lambda x: x / (1 + x),
    "quotient by it": lambda x: M / x,
    "product of both": lambda x: x @ x,
    "elu": F.elu,
    "softmax": lambda x: x.softmax(1),
    "weight from the input": lambda x: F.conv2d(x, x.mean(0, keepdim=True)[:, :, :3, :3]),
    "norm": lambda x: x.norm(dim=1),
}


def inspect(function):
    """Return whether the forward may be freed, and the forward nodes that its gradient leads back to."""
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    with fastgan.twice_differentiable():
        y = function(x)
    target = get_gradient_edge(x).node
    path = paths([y], x)
    (g,) = torch.autograd.grad(y, x, torch.randn_like(y).requires_grad_(), create_graph=True)
    seen, waiting = set(), [g.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting.extend(following for following, _ in node.next_functions)
    return may_free(path, target), seen & path


@pytest.mark.parametrize("function", INDEPENDENT.values(), ids=INDEPENDENT)
def test_the_gradient_of_a_piecewise_affine_function_does_not_depend_on_its_forward(function):
    freed, shared = inspect(function)
    assert freed
    assert not shared


@pytest.mark.parametrize("function", DEPENDENT.values(), ids=DEPENDENT)
def test_other_forwards_are_not_freed(function):
    assert not inspect(function)[0]


def critic():
    """Return a network that halves the image in each layer, so most activations are in the first layers."""
    layers = []
    for inputs, outputs in ((3, 16), (16, 32), (32, 64), (64, 64)):
        layers += [nn.Conv2d(inputs, outputs, 4, 2, 1), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 1))


def by_pytorch(discriminator, x):
    x = x.detach().requires_grad_()
    logits = discriminator(x)
    (g,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
    return logits, 5 * g.square().sum((1, 2, 3)).mean()


PASSES = {
    "penalty": (
        lambda d, x: fastgan.gradient_penalty(d, x, kind="r1"),
        lambda d, x: by_pytorch(d, x)[1],
    ),
    "loss and penalty": (
        lambda d, x: sum(t.mean() for t in fastgan.logits_and_penalty(d, x)),
        lambda d, x: sum(t.mean() for t in by_pytorch(d, x)),
    ),
}


@pytest.mark.parametrize(("fused", "plain"), PASSES.values(), ids=PASSES)
def test_a_pass_needs_less_memory_than_pytorch(fused, plain):
    discriminator, x = critic(), torch.randn(8, 3, 32, 32)
    parameters = list(discriminator.parameters())

    def run(penalty):
        return lambda: torch.autograd.grad(penalty(discriminator, x), parameters, allow_unused=True)

    # Small activations run PyTorch's operators, which store floats where the kernels store bits.
    with fastgan.use_backend("cpu"):
        peaks = [peak_bytes(run(penalty), CPU) for penalty in (fused, plain)]
        saved = [saved_bytes(run(penalty), [*parameters, x]) for penalty in (fused, plain)]
    assert peaks[0] <= 0.5 * peaks[1]
    assert saved[0] <= 0.5 * saved[1]


def test_penalty_from_logits_keeps_the_callers_forward():
    discriminator, x = critic(), torch.randn(2, 3, 32, 32, requires_grad=True)
    with fastgan.twice_differentiable():
        logits = discriminator(x)
    penalty = fastgan.penalty_from_logits(logits, x)
    (logits.sum() + penalty).backward()
    assert all(p.grad is not None for p in discriminator.parameters())


@pytest.mark.parametrize("name", DISCRIMINATORS)
def test_freeing_the_forward_does_not_change_the_gradients(name):
    discriminator = DISCRIMINATORS[name]().double().eval()
    kept, x = copy.deepcopy(discriminator), images()[0].double()
    actual = gradients(discriminator, fastgan.gradient_penalty(discriminator, x, kind="r1"))
    x.requires_grad_()
    with fastgan.twice_differentiable():
        logits = kept(x)
    for got, wanted in zip(actual, gradients(kept, fastgan.penalty_from_logits(logits, x)), strict=True):
        assert_close(got, wanted, order=0)
