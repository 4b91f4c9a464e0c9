"""torch.func: transforms run the reference, and a kernel requested by name is refused."""

from __future__ import annotations

import copy
import io
from functools import partial

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

import fastgan
from fastgan import nn as fnn
from fastgan import ops
from fastgan.nn.utils import fuse_spectral_norm, spectral_norm
from tests.integrations.players import SHAPE, make_discriminator

OPS = {
    "layer_norm": partial(ops.layer_norm, normalized_shape=(6, 5)),
    "group_norm": partial(ops.group_norm, num_groups=2),
    "instance_norm": ops.instance_norm,
    "batch_norm": partial(ops.batch_norm, running_mean=None, running_var=None, training=True),
    "bias_act": partial(ops.bias_act, bias=torch.ones(4, dtype=torch.float64)),
    "smooth bias_act": partial(ops.bias_act, activation="gelu"),
    "conv2d": partial(ops.conv2d, weight=torch.ones(3, 4, 3, 3, dtype=torch.float64)),
    "avg_pool2d": partial(ops.avg_pool2d, kernel_size=2),
    "minibatch_stddev": partial(ops.minibatch_stddev, group_size=2),
    "minibatch_discrimination": lambda x: ops.minibatch_discrimination(x.flatten(2)),
}


@pytest.mark.parametrize("name", OPS)
def test_grad_and_vmap_give_what_autograd_gives(name):
    def score(x):
        return torch.tanh(OPS[name](x)).square().sum()

    batches = torch.randn(3, 4, 4, 6, 5, dtype=torch.float64)
    expected = torch.stack([torch.autograd.grad(score(x), x)[0] for x in batches.clone().requires_grad_()])
    torch.testing.assert_close(torch.stack([grad(score)(x) for x in batches]), expected)
    torch.testing.assert_close(vmap(grad(score))(batches), expected)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_a_kernel_asked_for_by_name_is_refused_inside_a_transform(backend):
    with pytest.raises(fastgan.BackendUnavailable, match=r"group_norm: .* cannot run inside a torch\.func transform"):
        grad(lambda x: ops.group_norm(x, 2, backend=backend).sum())(torch.randn(2, 4, 3))


def test_functional_call_uses_the_parameters_that_it_is_given():
    discriminator = make_discriminator()
    other = copy.deepcopy(discriminator)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter))
    given = {name: p.detach().clone().requires_grad_() for name, p in other.named_parameters()}
    x = torch.randn(4, *SHAPE)
    output = functional_call(discriminator, given, (x,))
    expected = other(x)
    torch.testing.assert_close(output, expected)
    actual = torch.autograd.grad(output.sum(), list(given.values()))
    torch.testing.assert_close(actual, torch.autograd.grad(expected.sum(), list(other.parameters())))


def linear(parameters, model, x):
    return functional_call(model, parameters, (x,)).square().sum()


def two_layers(norm, wrap):
    return wrap(nn.Sequential(norm(nn.Linear(6, 4)), nn.Tanh(), norm(nn.Linear(4, 1))))


NORMS = {
    "apart": (spectral_norm, lambda model: model),
    "fused": (spectral_norm, fuse_spectral_norm),
    "fused hooks": (nn.utils.spectral_norm, fuse_spectral_norm),
}


@pytest.mark.parametrize("form", NORMS)
def test_spectral_norm_goes_through_grad_and_renews_u_and_v(form):
    model = two_layers(*NORMS[form])
    twin, x = copy.deepcopy(model), torch.randn(3, 6)
    for _ in range(2):
        actual = grad(linear)({name: p.detach() for name, p in model.named_parameters()}, model, x)
        expected = torch.autograd.grad(twin(x).square().sum(), list(twin.parameters()))
        torch.testing.assert_close(list(actual.values()), list(expected))
    torch.testing.assert_close(list(model.buffers()), list(twin.buffers()))


@pytest.mark.parametrize("form", NORMS)
def test_a_model_can_be_copied_and_saved_after_grad(form):
    model, x = two_layers(*NORMS[form]), torch.randn(3, 6)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    grad(linear)(parameters, model, x)
    grad(lambda x: model(x).sum() + model(2 * x).sum())(x)
    with pytest.raises(RuntimeError):
        grad(linear)(parameters, model, x[:, :2])  # left by an error
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    copies = copy.deepcopy(model), torch.load(saved, weights_only=False)
    expected = model(x)
    for twin in copies:
        torch.testing.assert_close(twin(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("form", ["apart", "fused"])
def test_spectral_norm_in_evaluation_goes_through_per_sample_gradients(form):
    model = two_layers(*NORMS[form]).eval()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    x = torch.randn(3, 6)
    of_samples = vmap(grad(linear), in_dims=(None, None, 0))(parameters, model, x)
    for i, sample in enumerate(x):
        expected = torch.autograd.grad(model(sample).square().sum(), list(model.parameters()))
        for actual, wanted in zip(of_samples.values(), expected, strict=True):
            torch.testing.assert_close(actual[i], wanted)


@pytest.mark.parametrize("call", [fastgan.gradient_penalty, fastgan.logits_and_penalty])
def test_a_penalty_is_refused_inside_grad_which_differentiates_by_itself(call):
    critic = nn.Linear(3, 1)
    with pytest.raises(RuntimeError, match="inside of a function being transformed"):
        grad(lambda x: call(critic, x, kind="r1"))(torch.randn(2, 3))


def test_a_penalty_written_with_grad_runs_inside_twice_differentiable():
    critic = nn.Sequential(
        nn.Conv2d(3, 4, 3), fnn.MinibatchStdDev(2), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(180, 1)
    )
    parameters = {name: p.detach() for name, p in critic.named_parameters()}
    x = torch.randn(4, *SHAPE)

    def penalty(parameters):
        with fastgan.twice_differentiable():
            return grad(lambda x: functional_call(critic, parameters, (x,)).sum())(x).square().sum()

    actual = grad(penalty)(parameters)
    fastgan.gradient_penalty(critic, x, kind="r1", weight=2 * len(x)).backward()
    for name, parameter in critic.named_parameters():
        wanted = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(actual[name], wanted, rtol=1e-4, atol=1e-5)


def test_forward_mode_sees_what_it_sees_in_pytorch():
    x, tangent = torch.randn(2, 128, 16, 16), torch.randn(2, 128, 16, 16)
    weight = torch.randn(8, 128, 3, 3)
    functions = {
        "relu": F.relu,
        "silu": F.silu,
        "tanh": lambda x: torch.tanh(x.repeat(1, 1, 4, 4)),
        "conv2d": lambda x: F.conv2d(x, weight),
        "group_norm": lambda x: F.group_norm(x, 4),
        "avg_pool2d": lambda x: F.avg_pool2d(x, 2),
    }
    for name, function in functions.items():
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, tangent)
            expected = forward_ad.unpack_dual(function(dual))
            with fastgan.twice_differentiable():
                actual = forward_ad.unpack_dual(function(dual))
        assert actual.tangent is not None, name
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
