"""A backward computes only the gradients that are requested."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastgan
from fastgan import ops
from fastgan.ops.conv import autograd as conv_autograd
from tests.harness import assert_close


@pytest.fixture
def masks(monkeypatch):
    """(input, weight, bias) of each convolution's backward, in order."""
    seen = []
    backward = conv_autograd._backward

    def recorded(*arguments):
        if any(arguments[-1]):
            seen.append(arguments[-1])
        return backward(*arguments)

    monkeypatch.setattr(conv_autograd, "_backward", recorded)
    return seen


def problem():
    x, w, b = torch.randn(2, 8, 6, 6), torch.randn(8, 8, 3, 3), torch.randn(8)
    return [t.requires_grad_() for t in (x, w, b)]


ALL, INPUT, PARAMETERS = (True, True, True), (True, False, False), (False, True, True)


@pytest.mark.parametrize(
    ("asked", "create_graph", "mask"),
    [
        ("x", True, INPUT),
        ("x", False, ALL),  # in a pass that is not differentiated, only the gradient of the input is checked
        ("wb", False, PARAMETERS),
        ("wb", True, ALL),
        ("xwb", True, ALL),
        ("xwb", False, ALL),
    ],
)
def test_of_two_layers_the_first_forms_what_autograd_grad_asks_for(asked, create_graph, mask, masks):
    x, w, b = problem()
    leaves = {"x": x, "w": w, "b": b}
    y = ops.conv2d(ops.conv2d(x, w, b), w.detach()).sin().sum()
    grads = torch.autograd.grad(y, [leaves[name] for name in asked], create_graph=create_graph)
    assert masks == [INPUT, mask]
    expected = torch.autograd.grad(F.conv2d(F.conv2d(x, w, b), w.detach()).sin().sum(), [leaves[n] for n in asked])
    for actual, exact in zip(grads, expected, strict=True):
        assert_close(actual, exact.double(), order=1)


def test_backward_forms_all_that_require_a_gradient(masks):
    x, w, b = problem()
    ops.conv2d(x, w, b).sum().backward()
    assert masks == [ALL]
    assert all(t.grad is not None for t in (x, w, b))


def test_backward_for_some_leaves_forms_theirs(masks):
    x, w, b = problem()
    ops.conv2d(x, w, b).sum().backward(inputs=[w, b])
    assert masks == [PARAMETERS]
    assert x.grad is None
    assert w.grad is not None


def test_a_gradient_that_a_hook_looks_at_is_formed():
    x, w, b = problem()
    seen = []
    made = x * 1
    made.register_hook(lambda grad: seen.append(grad.shape))
    ops.conv2d(made, w, b).sum().backward()
    assert seen == [x.shape]


def test_a_convolution_whose_weight_is_made_from_the_input_gets_the_weights_gradient(masks):
    x = torch.randn(2, 8, 6, 6, requires_grad=True)

    def function(conv):
        return conv(x, x.mean(0)[:, :3, :3].expand(8, 8, 3, 3)).sin().sum()

    (grad,) = torch.autograd.grad(function(ops.conv2d), x, create_graph=True)
    assert masks == [(True, True, False)]
    assert_close(grad, torch.autograd.grad(function(F.conv2d), x)[0].double(), order=1)


def critic():
    return nn.Sequential(nn.Conv2d(8, 8, 3), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 8, 3), nn.Flatten())


def test_a_penalty_written_by_hand_forms_no_parameters_gradient_in_its_first_pass(masks):
    discriminator, x = critic(), torch.randn(2, 8, 6, 6, requires_grad=True)
    with fastgan.twice_differentiable():
        logits = discriminator(x)
    torch.autograd.grad(logits.sum(), x, create_graph=True)
    assert masks == [INPUT, INPUT]


@pytest.mark.parametrize("penalty", ["gradient_penalty", "logits_and_penalty"])
def test_the_backward_of_a_penalty_does_not_reach_for_its_own_points(penalty, masks):
    discriminator, x = critic(), torch.randn(2, 8, 6, 6)
    if penalty == "gradient_penalty":
        loss = fastgan.gradient_penalty(discriminator, x, kind="r1")
    else:
        logits, loss = fastgan.logits_and_penalty(discriminator, x)
        loss = loss + logits.sum()
    masks.clear()
    loss.backward()
    first_pass = (False, True, False)  # the part of the weights, for each layer
    assert masks.count(first_pass) == 2
    assert [mask for mask in masks if mask != first_pass] == ([ALL] if penalty == "logits_and_penalty" else []) + [
        PARAMETERS
    ]
