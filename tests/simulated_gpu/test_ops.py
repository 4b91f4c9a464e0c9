"""Every op of fastgan on CUDA tensors, by Triton's kernels: values, first order, and second order through a penalty."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

import fastgan
from fastgan import ops
from fastgan.nn import MinibatchDiscrimination, MinibatchStdDev
from fastgan.nn.utils import spectral_norm
from tests.harness import assert_close

IMAGES = (4, 6, 3, 5)  # (N, C, H, W)


def channels(*offsets):
    """A weight and a bias for the channels of the images."""
    return [torch.randn(6, dtype=torch.float64) + offset for offset in offsets]


# Name: the function of x and parameters, and the parameters in float64.
CASES = {
    "bias_act": (lambda x, b: ops.bias_act(x, b, activation="leaky_relu", gain=1.4), channels(0)),
    "bias_act, smooth": (lambda x, b: ops.bias_act(x, b, activation="silu"), channels(0)),
    "leaky_relu": (lambda x: ops.leaky_relu(x, 0.2), []),
    "relu": (lambda x: ops.relu(x), []),
    "layer_norm": (lambda x, w, b: ops.layer_norm(x.flatten(2), (15,), w, b), [torch.randn(15).double() for _ in "wb"]),
    "group_norm": (lambda x, w, b: ops.group_norm(x, 3, w, b), channels(1, 0)),
    "instance_norm": (lambda x, w, b: ops.instance_norm(x, weight=w, bias=b), channels(1, 0)),
    "batch_norm": (lambda x, w, b: ops.batch_norm(x, None, None, w, b, training=True), channels(1, 0)),
    "minibatch_stddev": (lambda x: ops.minibatch_stddev(x, group_size=2), []),
    "minibatch_discrimination": (lambda x: ops.minibatch_discrimination(x.flatten(2)[:, :, :3].contiguous()), []),
    "conv2d": (
        lambda x, w: ops.conv2d(x, w, padding=1),
        [torch.randn(2, 6, 3, 3, dtype=torch.float64)],
    ),
    "linear": (lambda x, w: ops.linear(x.flatten(1), w), [torch.randn(3, 90, dtype=torch.float64)]),
    "avg_pool2d": (lambda x: ops.avg_pool2d(x[..., :2, :4], 2), []),
}


def orders(function, x, parameters):
    """The value, its gradients, and the gradients of a penalty on the first of them."""
    x, parameters = x.clone().requires_grad_(), [p.clone().requires_grad_() for p in parameters]
    value = function(x, *parameters)
    weights = torch.linspace(-1, 1, value.numel(), dtype=torch.float64).to(value).view_as(value)
    leaves = [x, *parameters]
    gradients = torch.autograd.grad((value.square() * weights).sum(), leaves, create_graph=True)
    penalty = (gradients[0].flatten(1).square().sum(1) + 1).sqrt().sum()
    second = torch.autograd.grad(penalty, leaves, allow_unused=True, materialize_grads=True)
    return [(0, value), *((1, g) for g in gradients), *((2, g) for g in second)]


@pytest.mark.parametrize("name", CASES)
def test_values_and_both_orders_are_the_references(name):
    function, parameters = CASES[name]
    x = torch.randn(IMAGES, dtype=torch.float64)
    only_pytorch = name in ("conv2d", "linear", "avg_pool2d")  # these have no kernels of their own on a GPU
    with fastgan.use_backend("auto" if only_pytorch else "triton"):
        actual = orders(function, x.to("cuda", torch.float32), [p.to("cuda", torch.float32) for p in parameters])
    with fastgan.use_backend("reference"):
        expected = orders(function, x, parameters)
    for (order, a), (_, e) in zip(actual, expected, strict=True):
        assert a.is_cuda
        if e.norm() > 0:
            assert_close(a, e, order=order)


def test_spectral_norm_and_its_penalty_are_the_references():
    torch.manual_seed(0)
    layer = spectral_norm(torch.nn.Linear(9, 5)).double()
    twin = copy.deepcopy(layer)
    layer = layer.to("cuda", torch.float32)
    x = torch.randn(4, 9, dtype=torch.float64)
    found = []
    for model, backend, inputs in ((layer, "triton", x.to("cuda", torch.float32)), (twin, "reference", x)):
        with fastgan.use_backend(backend):
            inputs = inputs.requires_grad_()
            (grad,) = torch.autograd.grad(F.softplus(model(inputs)).sum(), inputs, create_graph=True)
            penalty = grad.square().sum()
            found.append([penalty, *torch.autograd.grad(penalty, list(model.parameters()), materialize_grads=True)])
    for a, e in zip(*found, strict=True):
        assert_close(a, e, order=2)


def test_the_penalty_of_a_whole_discriminator_is_the_references():
    torch.manual_seed(0)
    discriminator = torch.nn.Sequential(
        spectral_norm(torch.nn.Conv2d(3, 4, 3)),
        torch.nn.LeakyReLU(0.2),
        MinibatchStdDev(2),
        torch.nn.Flatten(),
        MinibatchDiscrimination(20, 3, 2),
        torch.nn.Linear(23, 1),
    ).double()
    twin = copy.deepcopy(discriminator)
    discriminator = discriminator.to("cuda", torch.float32)
    real = torch.randn(4, 3, 4, 4, dtype=torch.float64)
    found = []
    for model, backend, images in (
        (discriminator, "triton", real.to("cuda", torch.float32)),
        (twin, "reference", real),
    ):
        with fastgan.use_backend(backend):
            penalty = fastgan.gradient_penalty(model, images, kind="r1")
            found.append([penalty, *torch.autograd.grad(penalty, list(model.parameters()), materialize_grads=True)])
    for a, e in zip(*found, strict=True):
        assert_close(a, e, order=2)


@pytest.mark.parametrize("choose", ["with", "set"])
def test_spectral_norm_works_while_cuda_is_the_default_device(choose):
    weight = torch.randn(4, 6, device="cuda")
    u, v = torch.randn(4, device="cuda"), torch.randn(6, device="cuda")
    expected = ops.spectral_norm([weight], [u.clone()], [v.clone()], backend="reference")[0]
    before = torch.get_default_device()
    if choose == "set":
        torch.set_default_device("cuda")
    try:
        with torch.device("cuda"):
            actual = ops.spectral_norm([weight], [u], [v])[0]
    finally:
        torch.set_default_device(None if before.type == "cpu" else before)
    assert_close(actual, expected.double(), order=0)
