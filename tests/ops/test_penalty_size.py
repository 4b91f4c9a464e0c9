"""Estimates of a call's size, by which small discriminators are left to PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastgan
from fastgan.ops.gradient_penalty import small
from fastgan.ops.gradient_penalty.called_modules import call_of
from fastgan.ops.gradient_penalty.overhead import Threshold
from fastgan.ops.gradient_penalty.size import estimate
from fastgan.ops.gradient_penalty.small import Size, size_of
from fastgan.ops.work import NORMALIZED

pytestmark = pytest.mark.small


def mlp(width):
    return nn.Sequential(nn.Linear(2, width), nn.LeakyReLU(0.2), nn.Linear(width, 1))


def test_the_size_follows_from_parameters_and_shapes():
    x = torch.randn(64, 2)
    assert size_of(mlp(2**14), (x,)) is Size.SMALL
    assert size_of(mlp(2**18), (x,)) is Size.LARGE
    assert size_of(nn.Conv2d(3, 64, 4), (torch.randn(2, 3, 8, 8),)) is Size.SMALL
    assert size_of(nn.Conv2d(3, 64, 4), (torch.randn(64, 3, 64, 64),)) is Size.LARGE, "used at every position"
    points = nn.Sequential(nn.Linear(3, 64), nn.ReLU(), nn.Linear(64, 1))
    many = torch.randn(512, 2048, 3)
    assert estimate([points], [many]).multiplications == 512 * 2048 * 4 * 64, "positions lie in the second dimension"
    assert size_of(points, (many,)) is Size.TOKENS, "each call may be for one point"
    assert size_of(points, (torch.randn(512, 3),)) is Size.SMALL
    tokens = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 1))
    assert size_of(tokens, (torch.randn(4, 8, 32),)) is Size.SMALL
    assert size_of(tokens, (torch.randn(512, 512, 32),)) is Size.TOKENS
    wide = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 1))
    assert size_of(wide, (torch.randn(512, 64, 256),)) is Size.LARGE
    assert size_of(mlp(16), (torch.randn(64, 2, device="meta"),)) is Size.LARGE


def test_the_cost_of_a_normalization_depends_on_its_elements():
    for norm in (nn.InstanceNorm2d(32), nn.GroupNorm(4, 32), nn.BatchNorm2d(32), nn.LayerNorm([32, 32, 32])):
        assert size_of(norm, (torch.randn(16, 32, 32, 32),)) is Size.LARGE
    for norm in (nn.InstanceNorm2d(32), nn.GroupNorm(4, 32), nn.BatchNorm2d(32), nn.LayerNorm([32, 4, 4])):
        assert size_of(norm, (torch.randn(2, 32, 4, 4),)) is Size.SMALL


def test_the_size_is_unknown_if_the_parameters_are():
    x = torch.randn(64, 2)
    assert size_of(lambda x: x.square(), (x,)) is Size.UNKNOWN
    assert size_of(nn.Flatten(), (x,)) is Size.UNKNOWN, "it may call functions with parameters"
    assert size_of(nn.LazyLinear(1), (x,)) is Size.UNKNOWN
    weight, holder = torch.randn(1, 2, requires_grad=True), {"net": mlp(16)}
    assert size_of(lambda x: F.linear(x, weight), (x,)) is Size.UNKNOWN
    assert size_of(lambda x: holder["net"](x), (x,)) is Size.UNKNOWN


class PoolsInForward(nn.Module):
    """Its modules do not show that the maps shrink from 32 x 32 to 4 x 4; only the last kernel does."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(3 if i == 0 else 16, 16, 3, 1, 1) for i in range(4)])
        self.norms = nn.ModuleList([nn.InstanceNorm2d(16, affine=True) for _ in range(4)])
        self.whole, self.logit = nn.Conv2d(16, 16, 4), nn.Conv2d(16, 1, 1)

    def forward(self, x):
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = F.leaky_relu(norm(conv(x)), 0.2)
            x = F.avg_pool2d(x, 2) if i < 3 else x
        return self.logit(F.leaky_relu(self.whole(x), 0.2)).flatten(1)


def test_a_kernel_as_large_as_the_map_shows_that_functions_have_pooled():
    net, x = PoolsInForward(), torch.randn(8, 3, 32, 32)
    assert net(x).shape == (8, 1)
    positions, estimated = (1024 + 256 + 64 + 16) * 8, estimate([net], [x])
    counted = positions * 16 * NORMALIZED
    assert estimated.layers == 10
    assert counted / 2 < estimated.multiplications < 2 * counted
    padded = nn.Sequential(net.convs[0], nn.Conv2d(16, 1, 4, 1, 1))
    assert estimate([padded], [x]).multiplications > 8 * 1000 * (16 * 27 + 16 * 16)


def test_linear_layers_behind_a_flattening_run_once_per_sample():
    layers = [nn.Linear(1024, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)]
    once = 8 * (1024 * 64 + 64 * 64 + 64)
    for shape in ((8, 64, 16), (8, 1024)):
        assert estimate([nn.Sequential(nn.Flatten(), *layers)], [torch.randn(shape)]).multiplications == once
    tokens = nn.Sequential(
        nn.Linear(16, 32), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 64, 64), nn.ReLU(), nn.Linear(64, 1)
    )
    expected = 8 * (64 * 16 * 32 + 32 * 64 * 64 + 64)
    assert estimate([tokens], [torch.randn(8, 64, 16)]).multiplications == expected


def test_the_input_that_fits_a_layer_says_how_often_it_runs():
    edges, nodes = torch.randn(16, 9, 9, 7), torch.randn(16, 9, 5)
    assert estimate([nn.Linear(5, 64)], [edges, nodes]).multiplications == 16 * 9 * 5 * 64
    first_registered_last = nn.ModuleList([nn.Conv1d(64, 64, 5, padding=2), nn.Conv1d(40, 64, 1)])
    expected = 16 * 32 * (64 * 64 * 5 + 40 * 64)
    assert estimate([first_registered_last], [torch.randn(16, 32, 40)]).multiplications == expected


class Recurrent(nn.Module):
    def __init__(self, width=64):
        super().__init__()
        self.input, self.hidden, self.logit = nn.Linear(16, width), nn.Linear(width, width), nn.Linear(width, 1)

    def forward(self, x):
        h = x.new_zeros(len(x), self.hidden.in_features)
        for t in range(x.shape[1]):
            h = torch.tanh(self.input(x[:, t]) + self.hidden(h))
        return self.logit(h)


def test_a_loop_of_small_calls_is_counted_and_left_to_pytorch():
    x = torch.randn(64, 200, 16)
    assert size_of(Recurrent(), (x,)) is Size.TOKENS
    assert "so small" in fastgan.explain_penalty(Recurrent(), x)
    assert size_of(Recurrent(512), (x,)) is Size.LARGE
    points = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    pooled = lambda x: points(x).mean(1)  # noqa: E731
    assert size_of(pooled, (x,)) is Size.TOKENS
    assert fastgan.explain_penalty(pooled, x) == "one pass", "its first call is large"


def test_the_size_of_a_large_call_is_estimated_once(monkeypatch):
    net, x, estimates = mlp(2**18), torch.randn(64, 2), []
    monkeypatch.setattr(small, "estimate", lambda *a, estimate=small.estimate: estimates.append(a) or estimate(*a))
    call = call_of(net, (x,))
    assert [size_of(net, (x,), call) for _ in range(3)] == [Size.LARGE] * 3
    assert len(estimates) == 1
    few = torch.randn(2, 2)
    assert size_of(net, (few,), call_of(net, (few,))) is size_of(net, (few,))
    monkeypatch.setattr(small, "threshold", lambda x: Threshold(2**60, 2**60))  # as of another device or precision
    assert size_of(net, (x,), call) is Size.SMALL
