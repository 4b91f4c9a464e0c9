"""Tensors whose memory does not hold their values: zeros of autograd without storage, and flipped signs."""

import pytest
import torch
from torch import nn

import fastgan
from fastgan import ops
from fastgan.nn import MinibatchStdDev
from tests.harness import BACKENDS, device_of

LAYERS = {
    "conv": lambda: nn.Conv2d(8, 8, 3, padding=1),
    "avg_pool": lambda: nn.AvgPool2d(2),
    "leaky_relu": lambda: nn.LeakyReLU(0.2),
    "silu": nn.SiLU,
    "instance_norm": lambda: nn.InstanceNorm2d(8),
    "group_norm": lambda: nn.GroupNorm(2, 8),
    "batch_norm": lambda: nn.BatchNorm2d(8),
    "minibatch_stddev": lambda: MinibatchStdDev(4),
}


class Abs(nn.Module):
    """Its double backward is a zero without storage."""

    def forward(self, x):
        return x.abs()


@pytest.mark.parametrize("layer", LAYERS)
def test_r1_through_a_layer_and_an_absolute_value_is_pytorchs(layer):
    d = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), LAYERS[layer](), Abs(), nn.Flatten(), nn.LazyLinear(1)).double()
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    d(x)
    fastgan.gradient_penalty(d, x, kind="r1", weight=1.0).backward()
    actual = [p.grad for p in d.parameters()]
    d.zero_grad()
    with fastgan.use_backend("reference"):
        (grad,) = torch.autograd.grad(d(x.requires_grad_()).sum(), x, create_graph=True)
        (grad.square().flatten(1).sum(1).mean() / 2).backward()
    for ours, p in zip(actual, d.parameters(), strict=True):
        zeros = torch.zeros_like(p)
        torch.testing.assert_close(zeros if ours is None else ours, zeros if p.grad is None else p.grad)


def spectral_norm(x):
    (rows, columns), vector = x.shape, torch.ones_like(x[0])
    return ops.spectral_norm([x], [vector[:1].expand(rows).contiguous()], [vector[:columns].contiguous()])[0]


OPS = {
    "avg_pool2d": (ops.avg_pool2d, (8, 4, 32, 32), (2,)),
    "relu": (ops.relu, (4, 4, 6, 6), ()),
    "silu": (lambda x: ops.bias_act(x, activation="silu"), (4, 4, 6, 6), ()),
    "group_norm": (ops.group_norm, (4, 4, 6, 6), (2,)),
    "layer_norm": (ops.layer_norm, (4, 4, 6, 6), ((6,),)),
    "minibatch_stddev": (ops.minibatch_stddev, (4, 4, 6, 6), ()),
    "minibatch_discrimination": (ops.minibatch_discrimination, (8, 4, 3), ()),
    "spectral_norm": (spectral_norm, (16, 24), ()),
}


@pytest.mark.parametrize("backend", BACKENDS[1:])  # PyTorch's own group norm reads the missing storage
@pytest.mark.parametrize("op", OPS)
def test_a_gradient_of_zeros_that_are_not_stored_gives_zeros(op, backend):
    function, shape, arguments = OPS[op]
    x = torch.randn(shape, device=device_of(backend), requires_grad=True)
    with _backend_of(op, backend):
        y = function(x, *arguments)
        (grad,) = torch.autograd.grad(y, x, torch._efficientzerotensor(y.shape, device=y.device), allow_unused=True)
    assert grad is None or not grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_signs_that_are_flipped_when_read_are_read_so(op, backend):
    function, shape, arguments = OPS[op]
    x = torch.randn(shape, device=device_of(backend))

    def values_and_gradient(flip):
        given = flip(x).requires_grad_()
        with _backend_of(op, backend):
            y = function(given, *arguments)
            by_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.device)
            return y, torch.autograd.grad(y, given, flip(by_y))[0]

    flipped = values_and_gradient(torch._neg_view)
    for actual, expected in zip(flipped, values_and_gradient(torch.neg), strict=True):
        torch.testing.assert_close(actual, expected)


def _backend_of(op, backend):
    """Return the backend, or the one that runs if the op lacks it."""
    own = {"avg_pool2d": ("reference", "cpu")}
    many = "spectral_norm", "minibatch_discrimination"
    if backend == "cuda" and op not in many:
        pytest.skip(f"{op} has no CUDA kernel of its own")
    if backend not in own.get(op, (backend,)):
        pytest.skip(f"{op} has no {backend} kernel")
    return fastgan.use_backend(backend)


def batched(function, x):
    """Return the input gradients for three output gradients, at once and one by one."""
    y = function(x)
    by = torch.randn(3, *y.shape)
    one_by_one = [torch.autograd.grad(y, x, each, retain_graph=True)[0] for each in by]
    return torch.autograd.grad(y, x, by, is_grads_batched=True)[0], torch.stack(one_by_one)


@pytest.mark.parametrize("op", OPS)
def test_batched_gradients_are_refused_by_name_and_the_reference_takes_them(op):
    function, shape, arguments = OPS[op]
    x = torch.randn(1024, *shape[1:], requires_grad=True)  # PyTorch's own operations run for fewer elements
    with pytest.raises(RuntimeError, match=r"kernels take no batched gradients .*use_backend\('reference'\)"):
        batched(lambda x: function(x, *arguments), x)
    with fastgan.use_backend("reference"):
        torch.testing.assert_close(*batched(lambda x: function(x, *arguments), x))


@pytest.mark.parametrize("size", [1, 3])
def test_convolutions_take_batched_gradients(size):
    weight = torch.randn(16, 3, size, size)
    torch.testing.assert_close(*batched(lambda x: ops.conv2d(x, weight), torch.randn(2, 3, 20, 20, requires_grad=True)))
