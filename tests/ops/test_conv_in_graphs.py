"""The gradients of a convolution in a graph of torch.compile, which are further convolutions."""

from __future__ import annotations

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd

import fastgan
from fastgan.ops.conv import compiled
from fastgan.ops.conv.geometry import Geometry
from tests.harness import VERSION
from tests.hypothesis_if_there import given, settings, st

compiles_penalties = pytest.mark.skipif(VERSION < (2, 11), reason="before 2.11 a penalty breaks the graph")
CONVOLUTIONS = {
    1: (nn.Conv1d, nn.ConvTranspose1d),
    2: (nn.Conv2d, nn.ConvTranspose2d),
    3: (nn.Conv3d, nn.ConvTranspose3d),
}


def gradients(layer: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Geometry]:
    """The output's gradient, the input's and the weight's, and the geometry."""
    x = x.clone().requires_grad_()
    y = layer(x)
    by = torch.randn_like(y)
    by_input, by_weight = torch.autograd.grad(y, (x, layer.weight), by)
    parts = layer.stride, layer.padding, layer.dilation, layer.transposed, layer.output_padding, layer.groups
    return by, by_input, by_weight, Geometry(*parts, True)


@settings(max_examples=60, deadline=None)
@given(
    dims=st.integers(1, 3),
    transposed=st.booleans(),
    channels=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 2)),
    size=st.integers(5, 8),
    kernel=st.integers(1, 4),
    stride=st.integers(1, 3),
    padding=st.integers(0, 3),
    dilation=st.integers(1, 2),
    beyond=st.integers(0, 2),
)
def test_gradients_are_those_of_pytorch(dims, transposed, channels, size, kernel, stride, padding, dilation, beyond):
    (cin, cout, groups), few = channels, size + 2 * padding < dilation * (kernel - 1) + 1
    if few or (transposed and (beyond >= max(stride, dilation) or 2 * padding > dilation * (kernel - 1))):
        return
    options = dict(stride=stride, padding=padding, dilation=dilation, groups=groups, dtype=torch.float64)
    if transposed:
        options["output_padding"] = beyond
    layer = CONVOLUTIONS[dims][transposed](cin * groups, cout * groups, kernel, **options)
    x = torch.randn(2, cin * groups, *[size] * dims, dtype=torch.float64)
    by, by_input, by_weight, geometry = gradients(layer, x)
    found = compiled.input_gradient(by, x.shape, layer.weight, geometry)
    if transposed and beyond >= stride:
        assert found is None  # the convolution's result would be larger than the input
    else:
        torch.testing.assert_close(found, by_input)
    few_weights = compiled.weight_gradient(by, x, layer.weight.shape, geometry)
    assert few_weights is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "_MANY", 0)
        found = compiled.weight_gradient(by, x, layer.weight.shape, geometry)
    if transposed or groups > 1:
        assert found is None
    else:
        torch.testing.assert_close(found, by_weight)


def operations(layer: nn.Module, x: torch.Tensor) -> list[str]:
    """The convolutions in the graphs of R1 through a layer, whose gradients are compared with PyTorch's."""
    found = []

    def record(graph, inputs):
        names = [str(node.target) for node in graph.graph.nodes]
        found.extend(name for name in names if "convolution" in name)
        return graph

    backend = aot_autograd(fw_compiler=record, bw_compiler=record)

    def loss(x):
        return fastgan.gradient_penalty(lambda x: layer(x).square().flatten(1).sum(1), x, kind="r1", weight=1.0)

    torch.compile(loss, backend=backend, fullgraph=True)(x).backward()
    v = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(layer(v).square().sum(), v, create_graph=True)
    expected = torch.autograd.grad(g.square().flatten(1).sum(1).mean() / 2, list(layer.parameters()))
    torch.testing.assert_close([p.grad for p in layer.parameters()], list(expected))
    layer.zero_grad()
    return found


@compiles_penalties
def test_a_layer_with_more_weights_than_positions_has_no_convolution_backward_in_the_graph():
    layer, x = nn.Conv2d(32, 64, 4, 2, 1).double(), torch.randn(2, 32, 4, 4).double()
    assert "aten.convolution_backward.default" not in operations(layer, x)
    assert "aten.convolution_backward.default" in operations(layer, torch.randn(2, 32, 16, 16).double())


@compiles_penalties
@pytest.mark.parametrize("stride", [1, 2])
def test_without_a_stride_one_operation_computes_both_gradients(stride):
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Conv2d(3, 4, 3, stride), nn.Tanh()).double()
    x = torch.randn(2, 2, 9, 9).double()
    masks = []

    def record(graph, inputs):
        nodes = [node for node in graph.graph.nodes if "convolution_backward" in str(node.target)]
        masks.extend(tuple(node.args[-1][:2]) for node in nodes)
        return make_boxed_func(graph.forward)

    def penalty(x):
        return fastgan.gradient_penalty(lambda x: net(x).flatten(1).sum(1), x, kind="r1", weight=1.0)

    compiled = torch.compile(penalty, backend=aot_autograd(fw_compiler=record, bw_compiler=record), fullgraph=True)
    compiled(x).backward()
    v = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(net(v).sum(), v, create_graph=True)
    expected = torch.autograd.grad(g.square().flatten(1).sum(1).mean() / 2, list(net.parameters()))
    torch.testing.assert_close([p.grad for p in net.parameters()], list(expected))
    assert ((True, True) in masks) == (stride == 1)
