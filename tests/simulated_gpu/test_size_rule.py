"""On a GPU, discriminators for which the host would take longer than the device are left to PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastgan
from fastgan.ops.gradient_penalty import overhead
from fastgan.ops.gradient_penalty.small import Size, at_any_size, size_of

pytestmark = pytest.mark.small


def discriminator(activation=nn.Tanh):
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 4, 2, 1), activation(), nn.Conv2d(8, 8, 4, 2, 1), activation()
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32, 1)).cuda()


def images():
    return torch.randn(4, 3, 8, 8, device="cuda")


def first_node(net, call):
    seen = []
    handle = net[0].register_forward_hook(lambda module, inputs, output: seen.append(output.grad_fn.name()))
    call()
    handle.remove()
    return seen[0]


def test_a_small_discriminator_runs_pytorchs_functions_and_explain_recommends_compiling():
    net, x = discriminator(), images()
    assert size_of(net, (x,)) is Size.SMALL
    for _ in range(2):  # the second call is remembered
        assert first_node(net, lambda: fastgan.gradient_penalty(net, x, kind="r1")) == "ConvolutionBackward0"
        assert first_node(net, lambda: fastgan.logits_and_penalty(net, x)) == "ConvolutionBackward0"
    explained = fastgan.explain_penalty(net, x)
    assert explained.startswith("general path: the discriminator and its inputs are so small")
    assert "torch.compile" in explained
    assert "graphed_step" in explained


def test_a_small_piecewise_affine_discriminator_takes_one_pass_through_pytorchs_graph():
    net, x = discriminator(nn.ReLU), images()
    assert size_of(net, (x,)) is Size.SMALL
    assert first_node(net, lambda: fastgan.logits_and_penalty(net, x)) == "ConvolutionBackward0"
    assert fastgan.explain_penalty(net, x) == "one pass"


def test_a_large_discriminator_runs_fastgans(monkeypatch):
    net, x = discriminator(), images()
    monkeypatch.setattr(overhead, "HOST_SECONDS", 1e-12)
    assert size_of(net, (x,)) is Size.LARGE
    assert "so small" not in fastgan.explain_penalty(net, x)
    assert first_node(net, lambda: fastgan.gradient_penalty(net, x, kind="r1")) != "ConvolutionBackward0"


def test_a_function_is_counted_with_the_threshold_of_the_device(monkeypatch):
    net, x = discriminator(), images()
    holder = {"net": net}

    def function(x):
        return holder["net"](x)

    assert size_of(function, (x,)) is Size.UNKNOWN
    assert first_node(net, lambda: fastgan.gradient_penalty(function, x, kind="r1")) == "ConvolutionBackward0"
    monkeypatch.setattr(overhead, "HOST_SECONDS", 1e-12)
    assert first_node(net, lambda: fastgan.gradient_penalty(function, x, kind="r1")) != "ConvolutionBackward0"


def test_both_ways_have_the_same_gradients():
    net, x = discriminator().double(), images().double()
    found = []
    for any_size in (False, True):
        net.zero_grad()
        if any_size:
            with at_any_size():
                logits, penalty = fastgan.logits_and_penalty(net, x)
        else:
            logits, penalty = fastgan.logits_and_penalty(net, x)
        (F.softplus(-logits).mean() + penalty).backward()
        found.append([p.grad.cpu() for p in net.parameters()])
    for small, large in zip(*found, strict=True):
        torch.testing.assert_close(small, large, rtol=1e-9, atol=1e-12)


def test_a_graphed_step_uses_fastgans_functions_at_any_size():
    net = discriminator()
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    nodes = []
    net[0].register_forward_hook(lambda module, inputs, output: nodes.append(output.grad_fn.name()))

    def step(real):
        optimizer.zero_grad()
        penalty = fastgan.gradient_penalty(net, real, kind="r1")
        penalty.backward()
        optimizer.step()
        return penalty

    graphed = fastgan.graphed_step(step, [images()], warmup=1, modules=[net], optimizers=[optimizer])
    for _ in range(3):
        graphed(images())
    assert graphed.reason is None
    assert nodes
    assert "ConvolutionBackward0" not in nodes
