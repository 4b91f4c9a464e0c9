from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastgan
from fastgan import ops
from fastgan.ops import norm as norms
from fastgan.ops.norm import native_kernels
from tests.harness import BACKENDS, assert_close, device_of

CHANNELS = 6


@pytest.fixture(autouse=True)
def kernels_at_any_size(monkeypatch):
    monkeypatch.setattr(norms, "_LEAST", 0)


def images(dtype=torch.float32, device="cpu"):
    return (torch.randn(5, CHANNELS, 4, 3, device=device) + 0.5).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("momentum", [0.1, 0.75, 1.0])
@pytest.mark.parametrize("backend", BACKENDS[1:3])
def test_running_statistics_move_as_pytorch_moves_them(backend, momentum, dtype):
    device = device_of(backend)
    of_running = torch.float32 if dtype == torch.bfloat16 else dtype
    mine, theirs = ([torch.ones(CHANNELS, dtype=of_running, device=device) for _ in range(2)] for _ in range(2))
    weight = torch.ones(CHANNELS, dtype=of_running, device=device)
    for _ in range(2):
        x = images(dtype, device)
        ops.batch_norm(x, *mine, weight, training=True, momentum=momentum, backend=backend)
        F.batch_norm(x, *theirs, weight, training=True, momentum=momentum)
    for actual, expected in zip(mine, theirs, strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-6, atol=1e-6)


def test_a_tiny_input_is_pytorchs_unless_a_backend_is_forced(monkeypatch):
    monkeypatch.undo()
    x = images().requires_grad_()
    kernels = "_NormBackward"
    assert type(ops.group_norm(x, 2).grad_fn).__name__ != kernels
    assert type(ops.group_norm(x, 2, backend="cpu").grad_fn).__name__ == kernels
    assert type(ops.group_norm(torch.cat([x] * 20), 2).grad_fn).__name__ == kernels


@pytest.mark.parametrize("one", [0, 1])
def test_one_running_statistic_alone_is_updated(one):
    # PyTorch's own CPU kernel takes both or none.
    running = [None, None]
    running[one] = torch.full((CHANNELS,), 2.0)
    x = images()
    ops.batch_norm(x, *running, training=True, momentum=0.5)
    exact = (x.mean((0, 2, 3)), x.var((0, 2, 3)))[one]
    torch.testing.assert_close(running[one], (2.0 + exact) / 2)


def test_without_training_it_is_pytorchs_and_any_order():
    x = images(torch.float64).requires_grad_()
    running = torch.randn(CHANNELS).double(), 1 + torch.rand(CHANNELS).double()
    kept = [t.clone() for t in running]
    weight = torch.randn(CHANNELS).double().requires_grad_()
    actual = ops.batch_norm(x, *running, weight)
    assert torch.equal(actual, F.batch_norm(x, *running, weight))
    assert all(torch.equal(a, b) for a, b in zip(running, kept, strict=True))
    for _ in range(3):
        (actual,) = torch.autograd.grad(actual.pow(3).sum(), x, create_graph=True)
    assert actual.isfinite().all()


@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"track_running_stats": False}, {"affine": False}])
@pytest.mark.parametrize(("module", "shape"), [(nn.BatchNorm1d, (9, 4)), (nn.BatchNorm2d, (3, 4, 5, 6))])
def test_modules_inside_twice_differentiable_do_as_outside(module, shape, options, monkeypatch):
    calls = []
    kernel = native_kernels.double_backward
    monkeypatch.setattr(native_kernels, "double_backward", lambda *a: (calls.append(1), kernel(*a)))
    own, theirs = module(shape[1], **options), module(shape[1], **options)
    x = torch.randn(shape, requires_grad=True)
    scale = torch.randn(shape)
    results = []
    for norm, inside in ((own, True), (theirs, False)):
        outputs = []
        for _ in range(2):
            if inside:
                with fastgan.twice_differentiable():
                    y = norm(x)
            else:
                y = norm(x)
            (grad,) = torch.autograd.grad((torch.tanh(y) * scale).sum(), x, create_graph=True)
            by = [x, *norm.parameters()]
            outputs += [y, grad, *torch.autograd.grad(grad.square().sum(), by, allow_unused=True)]
        results.append(outputs)
    assert len(calls) == 2
    for actual, expected in zip(*results, strict=True):
        if expected is None or actual is None:
            assert actual is None  # the bias, on which the gradient does not depend
            continue
        torch.testing.assert_close(actual, expected, rtol=2e-4, atol=2e-5)
    for name, buffer in own.named_buffers():
        torch.testing.assert_close(buffer, theirs.get_buffer(name), msg=name)


def test_torch_batch_norm_is_rerouted_with_its_own_order_of_arguments():
    x = images().requires_grad_()
    weight, bias = torch.randn(CHANNELS), torch.randn(CHANNELS)
    running = torch.zeros(CHANNELS), torch.ones(CHANNELS)
    with fastgan.twice_differentiable():
        y = torch.batch_norm(x, weight, bias, *running, True, 0.1, 1e-5, False)
    assert type(y.grad_fn).__name__ == "_NormBackward"
    expected = F.batch_norm(x, torch.zeros(CHANNELS), torch.ones(CHANNELS), weight, bias, True)
    torch.testing.assert_close(y, expected)


def test_it_keeps_a_discriminator_from_the_one_pass():
    discriminator = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(1))
    x = torch.randn(4, 3, 6, 6)
    discriminator(x)
    assert "batch_norm" in fastgan.explain_penalty(discriminator, x)


@pytest.mark.parametrize("backend", BACKENDS[1:3])
def test_a_constant_channel_has_finite_derivatives(backend):
    x = torch.ones(4, 3, 5, device=device_of(backend)).requires_grad_()
    y = ops.batch_norm(x, None, None, training=True, backend=backend)
    (grad,) = torch.autograd.grad(y.pow(3).sum() + y.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), x)
    assert torch.equal(y, torch.zeros_like(y))
    assert grad.isfinite().all()
    assert second.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("op", ["layer_norm", "group_norm", "instance_norm", "batch_norm"])
def test_under_cpu_autocast_norms_are_rerouted_and_equal_pytorchs(op, dtype):
    x = images(dtype).requires_grad_()
    weight = torch.randn(CHANNELS).requires_grad_()
    bias = torch.randn(CHANNELS)

    def call():
        if op == "layer_norm":
            return F.layer_norm(x, (3,), weight[:3], bias[:3])
        if op == "group_norm":
            return F.group_norm(x, 2, weight, bias)
        if op == "instance_norm":
            return F.instance_norm(x, None, None, weight, bias)
        return F.batch_norm(x, None, None, weight, bias, True)

    with torch.autocast("cpu", dtype):
        expected = call()
        with fastgan.twice_differentiable():
            actual = call()
    assert type(actual.grad_fn).__name__ == "_NormBackward"
    assert actual.dtype == expected.dtype == dtype
    double = [t.detach().double() for t in (x, weight, bias)]
    x, weight, bias = double
    assert_close(actual, call(), order=0, reference=expected)


BAD = {
    "one value a channel": (
        lambda: ops.batch_norm(torch.randn(1, 3), None, None, training=True),
        ValueError,
        r"more than one value per channel, got \(1, 3\)",
    ),
    "eps": (
        lambda: ops.batch_norm(images(), None, None, training=True, eps=0.0),
        ValueError,
        "eps must be positive in training, got 0.0",
    ),
    "shape of running_mean": (
        lambda: ops.batch_norm(images(), torch.ones(2), None, training=True),
        ValueError,
        r"running_mean must have shape \(6,\), one value per channel, or be None, got \(2,\)",
    ),
    "type of running_var": (
        lambda: ops.batch_norm(images(), None, [1.0], training=True),
        TypeError,
        "running_var must be a tensor or None, got list",
    ),
    "shape of weight": (
        lambda: ops.batch_norm(images(), None, None, torch.ones(2), training=True),
        ValueError,
        r"weight must have shape \(6,\)",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input_raises_a_message_that_names_it(call, error, message):
    with pytest.raises(error, match=message):
        call()
