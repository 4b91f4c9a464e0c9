from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import init

import fastgan
from fastgan import nn as fnn


class UsualLayer(nn.Module):
    """The layer as it is usually written in PyTorch."""

    def __init__(self, in_features, out_features, kernel_dims):
        super().__init__()
        self.T = nn.Parameter(init.normal_(torch.empty(in_features, out_features, kernel_dims)))

    def forward(self, x):
        matrices = x.mm(self.T.flatten(1)).view(-1, *self.T.shape[1:])
        norm = torch.abs(matrices.unsqueeze(0) - matrices.unsqueeze(1)).sum(3)
        return torch.cat([x, torch.exp(-norm).sum(0) - 1], 1)


def of_the_paper(x, theta, log_weight_scale, bias):
    """As in Salimans et al.: columns of norm exp(log_weight_scale), and a large distance of a sample from itself."""
    W = theta * (log_weight_scale.exp() / theta.square().sum(0).sqrt())
    activation = torch.tensordot(x, W, 1)  # (N, B, C)
    distance = (activation[..., None] - activation.permute(1, 2, 0)).abs().sum(2)  # (N, B, N)
    distance = distance + 1e6 * torch.eye(len(x), dtype=x.dtype)[:, None]
    return torch.cat([x, (-distance).exp().sum(2) + bias], 1)


def gradients(y, *inputs):
    first = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
    return [*first, *torch.autograd.grad(first[0].square().sum(), inputs)]


def test_it_loads_and_computes_what_the_usual_layer_does():
    usual = UsualLayer(8, 5, 3).double()
    layer = fnn.MinibatchDiscrimination(8, 5, 3).double()
    assert layer.load_state_dict(usual.state_dict()) == ([], [])
    x = torch.randn(11, 8, dtype=torch.float64, requires_grad=True)
    actual, expected = layer(x), usual(x)
    assert actual.shape == (11, 8 + 5)
    for a, e in zip(
        [actual, *gradients(actual, x, layer.T)], [expected, *gradients(expected, x, usual.T)], strict=True
    ):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)


def test_weight_scale_and_bias_make_the_layer_of_the_paper():
    layer = fnn.MinibatchDiscrimination(6, 4, 3, weight_scale=True, bias=True).double()
    assert (layer.bias == -1).all()
    with torch.no_grad():
        layer.log_weight_scale.normal_()
        layer.bias.normal_()
    x = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    inputs = x, layer.T, layer.log_weight_scale, layer.bias
    actual, expected = layer(x), of_the_paper(*inputs)
    for a, e in zip(
        [actual, *gradients(actual, *inputs[:3])], [expected, *gradients(expected, *inputs[:3])], strict=True
    ):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(*(torch.autograd.grad(y.sum(), layer.bias) for y in (actual, expected)))


def test_it_starts_where_features_of_unit_size_are_about_their_own_size_apart():
    layer = fnn.MinibatchDiscrimination(1024, 64, 16)
    assert layer.T.norm(dim=0).mean().item() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("options", [{}, {"bias": True, "weight_scale": True}, {"exclude_self": False}])
def test_it_is_copied_saved_and_described(options):
    layer = fnn.MinibatchDiscrimination(6, 4, 3, **options)
    other = fnn.MinibatchDiscrimination(6, 4, 3, **options)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(5, 6)
    assert torch.equal(other(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert repr(layer).startswith("MinibatchDiscrimination(6, 4, 3, exclude_self=")
    assert all(f"{name}={value}" in repr(layer) for name, value in options.items())


def test_segments_keep_real_and_fake_apart():
    layer = fnn.MinibatchDiscrimination(6, 4, 3)
    real, fake = torch.randn(5, 6), torch.randn(5, 6)
    both = layer(torch.cat([real, fake]), segments=torch.arange(10) // 5)
    torch.testing.assert_close(both, torch.cat([layer(real), layer(fake)]))


def test_a_penalty_reaches_its_parameters():
    layer = fnn.MinibatchDiscrimination(6, 4, 3, bias=True)
    discriminator = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), layer, nn.Linear(10, 1))
    real = torch.randn(8, 6)
    grads = []
    for backend in ("auto", "reference"):
        with fastgan.use_backend(backend):
            penalty = fastgan.gradient_penalty(discriminator, real, kind="r1", weight=1)
        grads.append(torch.autograd.grad(penalty, layer.T)[0])
    assert grads[0].norm() > 0
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_keeps_the_dtype_of_the_input(dtype):
    layer, x = fnn.MinibatchDiscrimination(6, 4, 3), torch.randn(5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x.to(dtype))
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), layer(x), rtol=0.05, atol=0.05)


def test_bad_sizes_and_inputs_are_named():
    with pytest.raises(ValueError, match="kernel_dim must be at least 1, got 0"):
        fnn.MinibatchDiscrimination(3, 4, 0)
    with pytest.raises(ValueError, match=r"x must be \(N, 6\), got shape \(5, 7\)"):
        fnn.MinibatchDiscrimination(6, 4, 3)(torch.randn(5, 7))
    with pytest.raises(ValueError, match="segments must have shape"):
        fnn.MinibatchDiscrimination(6, 4, 3)(torch.randn(5, 6), segments=torch.zeros(4, dtype=torch.int64))
