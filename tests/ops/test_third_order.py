"""Derivatives beyond the second, as in meta-learning and Hessian-vector products."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck
from torch.func import functional_call
from torch.nn import functional as F

import fastgan
from fastgan import ops
from fastgan.ops import norm as norms
from fastgan.ops import pool as pools
from fastgan.ops.bias_act import functions as activations
from tests.harness import BACKENDS, assert_close, device_of


@pytest.fixture(autouse=True)
def kernels_at_any_size(monkeypatch):
    monkeypatch.setattr(norms, "_LEAST", 0)
    monkeypatch.setattr(pools, "_LEAST", 0)
    monkeypatch.setattr(activations, "_LEAST", dict.fromkeys(activations._LEAST, 0))


def leaves_of(*shapes, device="cpu", offset=0.0):
    draws = (torch.randn(shape, dtype=torch.float64) + offset for shape in shapes)
    return [draw.to(device).requires_grad_() for draw in draws]


def derivatives(function, leaves, count):
    """Return each order with respect to all leaves, of a scalar of the order before."""
    results, last = [], [function(*leaves)]
    for _ in range(count):
        score = sum(t.pow(3).sum() + t.sin().sum() for t in last)
        grads = torch.autograd.grad(score, leaves, create_graph=True, allow_unused=True)
        last = [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(grads, leaves, strict=True)]
        results += last
    return results


def assert_same_derivatives(actual, expected, leaves, count=4):
    for a, e in zip(derivatives(actual, leaves, count), derivatives(expected, leaves, count), strict=True):
        assert_close(a, e, order=0)


CONVOLUTIONS = {
    "conv1d": ("conv1d", (2, 3, 9), (4, 3, 3), dict(stride=2, padding=1)),
    "conv2d groups": ("conv2d", (2, 4, 6, 5), (4, 2, 3, 3), dict(groups=2, dilation=(1, 2))),
    "conv2d 1x1": ("conv2d", (2, 3, 4, 4), (5, 3, 1, 1), {}),
    "conv2d same": ("conv2d", (1, 2, 5, 5), (2, 2, 3, 3), dict(padding="same")),
    "conv3d": ("conv3d", (1, 2, 4, 4, 3), (2, 2, 2, 2, 2), {}),
    "transposed": ("conv_transpose2d", (2, 3, 4, 4), (3, 4, 3, 3), dict(stride=2, padding=1)),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("name", "shape", "weight", "options"), CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_a_convolution_has_pytorchs_derivatives_of_every_order(name, shape, weight, options, bias):
    out = weight[0] if "transpose" not in name else weight[1]
    leaves = leaves_of(shape, weight, *[(out,)] * bias)
    ours, theirs = getattr(ops, name), getattr(F, name)
    assert_same_derivatives(lambda *t: ours(*t, **options), lambda *t: theirs(*t, **options), leaves)


@pytest.mark.parametrize("fixed", [0, 1])
def test_a_convolution_with_a_constant_operand(fixed):
    leaves = leaves_of((2, 3, 5, 5), (4, 3, 3, 3))
    constant = leaves.pop(fixed).detach()

    def operands(t):
        return (constant, t) if fixed == 0 else (t, constant)

    assert_same_derivatives(lambda t: ops.conv2d(*operands(t)), lambda t: F.conv2d(*operands(t)), leaves)


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 3, 8, 8, 4)])
def test_pooling_has_every_order(shape):
    name = "avg_pool2d" if len(shape) == 4 else "avg_pool3d"
    ours, theirs = getattr(ops, name), getattr(F, name)
    assert_same_derivatives(lambda t: ours(t.sin(), 2), lambda t: theirs(t.sin(), 2), leaves_of(shape))


def by_hand(x, weight, bias, dims, shape):
    """A norm in elementary operations: PyTorch's own third derivatives of batch, layer and instance norm are wrong."""
    var, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
    return (x - mean) / (var + 1e-5).sqrt() * weight.view(shape) + bias.view(shape)


NORMS = {
    "batch": (
        lambda backend: lambda x, w, b: ops.batch_norm(x, None, None, w, b, training=True, backend=backend),
        lambda x, w, b: by_hand(x, w, b, (0, 2, 3), (1, -1, 1, 1)),
    ),
    "layer": (
        lambda backend: (
            lambda x, w, b: ops.layer_norm(
                x, (4, 3, 2), w.view(4, 1, 1).expand(4, 3, 2), b.view(4, 1, 1).expand(4, 3, 2), backend=backend
            )
        ),
        lambda x, w, b: by_hand(x, w, b, (1, 2, 3), (1, -1, 1, 1)),
    ),
    "instance": (
        lambda backend: lambda x, w, b: ops.instance_norm(x, weight=w, bias=b, backend=backend),
        lambda x, w, b: by_hand(x, w, b, (2, 3), (1, -1, 1, 1)),
    ),
    "group": (
        lambda backend: lambda x, w, b: ops.group_norm(x, 2, w, b, backend=backend),
        lambda x, w, b: by_hand(x.unflatten(1, (2, 2)), w, b, (2, 3, 4), (1, 2, 2, 1, 1)).flatten(1, 2),
    ),
}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("ours", "expected"), NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("backend", BACKENDS[1:3])
def test_a_norm_has_every_order(backend, ours, expected, memory_format):
    leaves = leaves_of((3, 4, 3, 2), (4,), (4,), device=device_of(backend), offset=0.5)
    leaves[0] = leaves[0].detach().contiguous(memory_format=memory_format).requires_grad_()
    # Through a function of the leaf, so that each operand of a backward is made from the others.
    assert_same_derivatives(
        lambda x, w, b: ours(backend)(x.sin(), w, b), lambda x, w, b: expected(x.sin(), w, b), leaves, count=3
    )


@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 3)])
def test_batch_norm_of_vectors_and_rows(shape):
    (x,) = leaves_of(shape)
    dims = (0, *range(2, len(shape)))

    def expected(x):
        var, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
        return (x - mean) / (var + 1e-5).sqrt()

    assert_same_derivatives(lambda x: ops.batch_norm(x, None, None, training=True, backend="cpu"), expected, [x], 3)


SMOOTH = ["silu", "gelu", "gelu_tanh", "tanh", "sigmoid", "softplus"]


@pytest.mark.parametrize("options", [{}, {"gain": 1.5, "clamp": 0.9}], ids=str)
@pytest.mark.parametrize("activation", SMOOTH)
@pytest.mark.parametrize("backend", BACKENDS[1:3])
def test_a_smooth_activation_has_every_order(backend, activation, options):
    leaves = leaves_of((3, 4, 2), (4,), device=device_of(backend))

    def activated(backend):
        return lambda x, b: ops.bias_act(x.sin(), b, activation=activation, backend=backend, **options)

    assert_same_derivatives(activated(backend), activated("reference"), leaves)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_a_smooth_activation_of_transposed_values_has_every_order(dim):
    x, bias = leaves_of((3, 4, 2), (3, 4, 2)[dim : dim + 1])

    def activated(backend):
        return lambda x, b: ops.bias_act(x.transpose(0, 2).sin(), b, activation="silu", dim=2 - dim, backend=backend)

    assert_same_derivatives(activated("cpu"), activated("reference"), [x, bias])


@pytest.mark.parametrize("segments", [None, torch.tensor([0, 1, 0, 1, 1])])
@pytest.mark.parametrize("backend", BACKENDS[1:3])
def test_minibatch_discrimination_has_every_order(backend, segments):
    device = device_of(backend)
    segments = segments if segments is None else segments.to(device)
    assert_same_derivatives(
        lambda m: ops.minibatch_discrimination(m.sin(), segments=segments, backend=backend),
        lambda m: ops.minibatch_discrimination(m.sin(), segments=segments, backend="reference"),
        leaves_of((5, 2, 3), device=device),
    )


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("backend", BACKENDS[1:3])
def test_minibatch_stddev_has_every_order(backend, memory_format):
    (x,) = leaves_of((6, 4, 2, 3), device=device_of(backend))
    x = x.detach().contiguous(memory_format=memory_format).requires_grad_()

    def appended(backend):
        return lambda x: ops.minibatch_stddev(x.sin(), group_size=3, num_channels=2, backend=backend)

    assert_same_derivatives(appended(backend), appended("reference"), [x])


@pytest.mark.parametrize("op", ["conv", "transposed", "norm", "activation", "stddev", "discrimination"])
def test_numerical_third_derivatives(op):
    """Compare the first derivatives of the second derivatives with finite differences."""
    functions = {
        "conv": (ops.conv2d, [(1, 2, 4, 4), (2, 2, 3, 3)]),
        # PyTorch's own third derivative raises where there is an output_padding.
        "transposed": (
            lambda x, w: ops.conv_transpose2d(x, w, stride=2, output_padding=1),
            [(1, 2, 3, 3), (2, 1, 3, 3)],
        ),
        "norm": (lambda x, w: ops.group_norm(x, 2, w, w, backend="cpu"), [(2, 4, 3), (4,)]),
        "activation": (lambda x, b: ops.bias_act(x, b, activation="silu", backend="cpu"), [(3, 2), (2,)]),
        "stddev": (lambda x: ops.minibatch_stddev(x, group_size=3, backend="cpu"), [(3, 2, 2)]),
        "discrimination": (lambda m: ops.minibatch_discrimination(m, backend="cpu"), [(4, 2, 2)]),
    }
    function, shapes = functions[op]
    assert gradcheck(lambda *t: tuple(derivatives(function, t, 2)[-len(t) :]), leaves_of(*shapes), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", ["conv", "norm", "activation", "stddev", "discrimination"])
def test_half_precision_has_a_third_derivative_of_its_dtype(op, dtype):
    functions = {
        "conv": (ops.conv2d, [(1, 2, 4, 4), (2, 2, 3, 3)]),
        "norm": (lambda x, w: ops.group_norm(x, 2, w, w, backend="cpu"), [(2, 4, 3), (4,)]),
        "activation": (lambda x, b: ops.bias_act(x, b, activation="tanh", backend="cpu"), [(3, 2), (2,)]),
        "stddev": (lambda x: ops.minibatch_stddev(x, group_size=3, backend="cpu"), [(3, 2, 2)]),
        "discrimination": (lambda m: ops.minibatch_discrimination(m, backend="cpu"), [(4, 2, 2)]),
    }
    function, shapes = functions[op]
    exact = [(t.detach() / 2).requires_grad_() for t in leaves_of(*shapes)]
    rounded = [t.detach().to(dtype).requires_grad_() for t in exact]
    for leaf, other in zip(exact, rounded, strict=True):
        leaf.data.copy_(other)

    def third(leaves):
        (first,) = torch.autograd.grad(function(*leaves).double().sin().sum(), leaves[0], create_graph=True)
        (second,) = torch.autograd.grad(first.double().square().mean(), leaves[0], create_graph=True, allow_unused=True)
        if second is None:
            (second,) = torch.autograd.grad(first.double().square().mean(), leaves[1], create_graph=True)
        return torch.autograd.grad(second.double().square().mean(), leaves[0], allow_unused=True)[0]

    actual, expected = third(rounded), third(exact)
    assert actual.dtype == dtype
    assert (actual.double() - expected).norm() <= 0.1 * expected.norm()


def discriminator_of(*between):
    convolution, last = nn.Conv2d(3, 6, 3), nn.Linear(6 * 36, 1)
    return nn.Sequential(convolution, *between, nn.Flatten(), last).double()


BETWEEN = {
    "piecewise": lambda: [nn.LeakyReLU(0.2), nn.Conv2d(6, 6, 3, 1, 1), nn.ReLU(inplace=True)],
    "pooled": lambda: [nn.ReLU(), nn.AvgPool2d(3, 1, 1), nn.Conv2d(6, 6, 1)],
    "group norm": lambda: [nn.GroupNorm(2, 6), nn.LeakyReLU(0.2)],
    "smooth": lambda: [nn.SiLU(), nn.Conv2d(6, 6, 3, 1, 1), nn.Tanh()],
}


def penalty_of(model, x, kind, ours):
    if ours:
        return fastgan.gradient_penalty(model, x, x.flip(0) * 0, kind=kind, weight=1, generator=seeded())
    alpha = torch.rand(4, dtype=torch.float64, generator=seeded()).view(4, 1, 1, 1)
    points = x if kind == "r1" else torch.lerp(x.flip(0) * 0, x, alpha)
    points = points.detach().requires_grad_()
    (grad,) = torch.autograd.grad(model(points).sum(), points, create_graph=True)
    norm = grad.flatten(1).norm(dim=1)
    return norm.square().mean() / 2 if kind == "r1" else (norm - 1).square().mean()


def seeded():
    return torch.Generator().manual_seed(5)


@pytest.mark.parametrize("kind", ["r1", "wgan-gp"])
@pytest.mark.parametrize("between", BETWEEN.values(), ids=BETWEEN)
def test_a_step_by_a_penalty_is_differentiated_through(between, kind):
    """Meta-learning: a loss of the weights after a step along the gradient of the penalty."""
    model, x = discriminator_of(*between()), torch.randn(4, 3, 8, 8).double()
    results = []
    for ours in (True, False):
        parameters = dict(copy.deepcopy(model).named_parameters())

        def play(points, parameters=parameters):
            return functional_call(model, parameters, (points,))

        penalty = penalty_of(play, x, kind, ours)
        grads = torch.autograd.grad(penalty, parameters.values(), create_graph=True, allow_unused=True)
        stepped = {n: p if g is None else p - 0.1 * g for (n, p), g in zip(parameters.items(), grads, strict=True)}
        loss = F.softplus(functional_call(model, stepped, (x,))).mean()
        results.append(torch.autograd.grad(loss, parameters.values()))
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected, order=0)


def test_hessian_vector_products_of_a_penalty():
    model, x = discriminator_of(nn.LeakyReLU(0.2)), torch.randn(4, 3, 8, 8).double()
    weight = model[0].weight.detach()
    vector = torch.randn_like(weight)
    products = []
    for ours in (True, False):

        def penalty(weight, ours=ours):
            def play(points):
                return functional_call(model, {"0.weight": weight}, (points,))

            return penalty_of(play, x, "r1", ours)

        products.append(torch.autograd.functional.hvp(penalty, weight, vector)[1])
    assert_close(products[0], products[1], order=0)


def test_a_gradient_of_zero_has_finite_derivatives_of_every_order():
    """Some samples' gradients are zero: the norm's derivatives there are zero, not NaN."""
    x = torch.randn(4, 3, 80, 80)
    weight = torch.randn(3, 1, 1, requires_grad=True)
    gate = torch.tensor([1.0, 0.0, 1.0, 0.0]).view(4, 1, 1, 1)
    penalty = fastgan.gradient_penalty(lambda v: (gate * weight.sin() * v).flatten(1).sum(1), x, x, weight=1.0)
    for _ in range(3):
        (grad,) = torch.autograd.grad(penalty, weight, create_graph=True)
        assert grad.isfinite().all()
        penalty = grad.square().sum()


def test_the_second_order_keeps_nothing_for_a_third(monkeypatch):
    """A backward without create_graph builds no graph: the maps run themselves, not their Functions."""
    from fastgan.ops.conv import autograd as convolutions

    calls = []
    for name in ("_Convolution", "_InputGradient", "_WeightGradient"):
        function = getattr(convolutions, name)
        forward = function.forward
        spy = staticmethod(lambda *a, forward=forward, name=name: (calls.append(name), forward(*a))[1])
        monkeypatch.setattr(function, "forward", spy)
    x, w = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3, requires_grad=True)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(ops.conv2d(x, w).sum(), x, create_graph=True)
    grad.square().sum().backward()
    assert calls == ["_Convolution", "_InputGradient"]
