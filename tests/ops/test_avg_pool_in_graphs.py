"""The transpose of an average pooling in a penalty that torch.compile traces: views, where windows tile the input."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd

import fastgan

POOLS = {
    "halves": (nn.AvgPool2d(2), (3, 2, 6, 10), True),
    "unequal": (nn.AvgPool2d((3, 2)), (3, 2, 6, 10), True),
    "divisor": (nn.AvgPool2d(2, divisor_override=3), (3, 2, 4, 4), True),
    "1d": (nn.AvgPool1d(2), (3, 4, 10), True),
    "3d": (nn.AvgPool3d((1, 2, 3)), (2, 2, 5, 4, 6), True),
    "overlap": (nn.AvgPool2d(3, 2, 1), (3, 2, 7, 7), False),
    "a row left over": (nn.AvgPool2d(2), (3, 2, 7, 6), False),
    "rounded up": (nn.AvgPool2d(2, ceil_mode=True), (3, 2, 7, 7), False),
}


@pytest.mark.parametrize(("pool", "shape", "tiled"), POOLS.values(), ids=POOLS)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_penalties_and_the_operators_in_their_graphs(pool, shape, tiled, dynamic):
    torch.manual_seed(0)
    torch._dynamo.reset()
    x = torch.randn(shape, dtype=torch.float64)
    layer = nn.Sequential(nn.Tanh(), pool, nn.Flatten())
    net = nn.Sequential(layer, nn.Linear(layer(x).shape[1], 1)).double()
    found = []

    def record(graph, inputs):
        found.extend(str(node.target) for node in graph.graph.nodes if "avg_pool" in str(node.target))
        return graph

    compiled = torch.compile(
        lambda x: fastgan.gradient_penalty(net, x, kind="r1", weight=3.0),
        backend=aot_autograd(fw_compiler=record, bw_compiler=record),
        fullgraph=True,
        dynamic=dynamic,
    )
    for batch in (x, torch.cat([x, x.flip(0)])):
        points = batch.clone().requires_grad_()
        (grad,) = torch.autograd.grad(net(points).sum(), points, create_graph=True)
        expected = 1.5 * grad.square().flatten(1).sum(1).mean()
        wanted = torch.autograd.grad(expected, net[1].weight)
        actual = compiled(batch)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(torch.autograd.grad(actual, net[1].weight), wanted)
    assert found
    assert any("backward" in name for name in found) == (not tiled)
