"""Calls of small discriminators that are equal to an earlier one: as few operations as PyTorch, and the same errors."""

from __future__ import annotations

import sys
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastgan
from fastgan.ops.gradient_penalty import small
from fastgan.ops.gradient_penalty.called_modules import call_of

pytestmark = pytest.mark.small


def net():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(8 * 36, 1))


def images(n=4, dtype=torch.float32):
    return torch.randn(n, 3, 8, 8, dtype=dtype)


class Counting(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func] += 1
        return func(*args, **(kwargs or {}))


def by_hand(discriminator, real, fake, kind):
    x = torch.lerp(fake, real, torch.rand(len(real), 1, 1, 1)) if kind == "wgan-gp" else real
    x = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(discriminator(x).sum(), x, create_graph=True)
    if kind == "wgan-gp":
        return 10 * (g.flatten(1).norm(dim=1) - 1).square().mean()
    return 10 / 2 * g.flatten(1).square().sum(1).mean()


@pytest.mark.parametrize("kind", ["wgan-gp", "r1"])
def test_a_known_call_runs_fewer_operations_than_a_penalty_by_hand(kind):
    discriminator, real, fake = net(), images(), images()
    for _ in range(2):
        fastgan.gradient_penalty(discriminator, real, fake, kind=kind)
    with Counting() as ours:
        fastgan.gradient_penalty(discriminator, real, fake, kind=kind).backward()
    with Counting() as written:
        by_hand(discriminator, real, fake, kind).backward()
    assert ours.counts.total() < written.counts.total()


@pytest.mark.parametrize("smooth", [False, True], ids=["piecewise affine", "smooth"])
@pytest.mark.parametrize("call", ["gradient_penalty", "logits_and_penalty"])
def test_a_known_call_makes_few_python_calls(call, smooth):
    discriminator, x = net(), images()
    if smooth:
        discriminator[1] = nn.Tanh()
    inside = Counter()

    def count(frame, event, _):
        if event == "call" and "/fastgan/" in frame.f_code.co_filename:
            inside[frame.f_code.co_qualname if hasattr(frame.f_code, "co_qualname") else frame.f_code.co_name] += 1

    for _ in range(2):
        getattr(fastgan, call)(discriminator, x, kind="r1")
    sys.setprofile(count)
    try:
        getattr(fastgan, call)(discriminator, x, kind="r1")
    finally:
        sys.setprofile(None)
    assert inside.total() <= 18, inside


class Changing(nn.Module):
    """A discriminator whose output changes between equal calls."""

    def __init__(self, of):
        super().__init__()
        self.inner, self.of = net(), [of]

    def forward(self, x):
        return self.of[0](x, self.inner)


@pytest.mark.parametrize("call", ["gradient_penalty", "logits_and_penalty"])
@pytest.mark.parametrize(
    ("later", "error"),
    [
        (lambda x, inner: inner(x).detach(), ValueError),  # needs no gradient
        (lambda x, inner: inner(x.detach()), ValueError),  # depends on the weights only
        (lambda x, inner: inner(x)[1:], ValueError),
        (lambda x, inner: inner(x).sum(), ValueError),
        (lambda x, inner: inner(x) + 0j, TypeError),
        (lambda x, inner: {"logits": inner(x)}, ValueError),
        (lambda x, inner: None, TypeError),
    ],
)
def test_a_known_call_checks_its_output(call, later, error):
    discriminator, x = Changing(lambda x, inner: inner(x)), images()
    for _ in range(2):
        getattr(fastgan, call)(discriminator, x, kind="r1")
    assert (
        small.left_to_pytorch(call_of(discriminator, ("r1", x, None) if call == "gradient_penalty" else (x,))) is False
    )
    discriminator.of[0] = later
    with pytest.raises(error):
        getattr(fastgan, call)(discriminator, x, kind="r1")
    discriminator.of[0] = lambda x, inner: [inner(x)]  # one tensor in a list is valid
    returned = getattr(fastgan, call)(discriminator, x, kind="r1")
    value = returned if call == "gradient_penalty" else returned[1]
    torch.testing.assert_close(value, by_hand(discriminator.inner, x, None, "r1"))


def test_the_checks_of_a_known_call_are_not_those_of_another():
    discriminator, real = net(), images()
    for _ in range(2):
        fastgan.gradient_penalty(discriminator, real, images(), kind="wgan-gp")
        fastgan.gradient_penalty(discriminator, real, images(2), kind="r1")  # "r1" ignores fake
    for fake in (images(2), images(1)):
        with pytest.raises(ValueError, match="must have the shape"):
            fastgan.gradient_penalty(discriminator, real, fake, kind="wgan-gp")
    with pytest.raises(TypeError, match="needs fake"):
        fastgan.gradient_penalty(discriminator, real, kind="wgan-gp")
    with pytest.raises(TypeError, match="must be floating-point"):
        fastgan.gradient_penalty(discriminator, real, real.int(), kind="wgan-gp")
    with pytest.raises(TypeError, match="select must be"):
        fastgan.gradient_penalty(discriminator, real, kind="r1", select=1.5)
    with torch.no_grad(), pytest.raises(RuntimeError, match="needs gradients"):
        fastgan.gradient_penalty(discriminator, real, kind="r1")
    with pytest.raises(ValueError, match="returned one"):
        fastgan.gradient_penalty(discriminator, real, kind="r1", select=0)


def test_another_dtype_or_class_of_the_inputs_is_another_call():
    class Other(torch.Tensor):
        pass

    discriminator, real = net(), images()
    calls = [
        call_of(discriminator, ("r1", x, None))
        for x in (real, real.double(), real.as_subclass(Other), real[:2], [real], {"x": real}, (real, real))
    ]
    assert None not in calls
    assert len({call.details for call in calls}) == len(calls)
    assert call_of(discriminator, ("r1", object(), None)) is None
    assert call_of(discriminator, ("r1", real, None)).details == calls[0].details


def test_inputs_in_a_dict_are_remembered():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()
            self.modes = []

        def forward(self, inputs):
            self.modes.append(len(torch.overrides._get_current_function_mode_stack()))
            return self.net(inputs["image"])

    discriminator = Named()
    for _ in range(3):
        fastgan.gradient_penalty(discriminator, {"image": images(), "label": torch.arange(4)}, kind="r1")
    assert discriminator.modes == [1, 0, 0]


def test_a_module_that_is_replaced_by_a_larger_one_is_counted_again():
    discriminator, x = net(), images()
    for _ in range(2):
        fastgan.gradient_penalty(discriminator, x, kind="r1")
    assert small.left_to_pytorch(call_of(discriminator, ("r1", x, None))) is not None
    discriminator[1] = nn.Sequential(nn.LeakyReLU(0.2), nn.Identity())
    assert small.left_to_pytorch(call_of(discriminator, ("r1", x, None))) is None


@pytest.mark.parametrize("shape", [(4, 3, 8, 8), (4, 3, 128, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_small_and_large_gradients_have_the_same_penalty(shape, dtype):
    g = torch.randn(shape, dtype=torch.float64).requires_grad_()
    for kind, definition in (
        ("wgan-gp", lambda n: 10 * (n - 1).square().mean()),
        ("wgan-lp", lambda n: 10 * (n - 1).clamp(min=0).square().mean()),
        ("r1", lambda n: 5 * n.square().mean()),
    ):
        wanted = definition(g.flatten(1).norm(dim=1))
        (expected,) = torch.autograd.grad(wanted, g)
        for made in (g.to(dtype), g.to(dtype).contiguous(memory_format=torch.channels_last)):
            found = fastgan.ops.gradient_penalty.kinds.penalize(kind, made, 10.0)
            (actual,) = torch.autograd.grad(found, g)
            tolerance = 1e-5 if dtype == torch.float32 else 1e-12
            torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=0)
            torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def test_a_zero_gradient_has_a_zero_derivative():
    g = torch.zeros(4, 3, 8, 8, requires_grad=True)
    fastgan.ops.gradient_penalty.kinds.penalize("wgan-gp", g, 10.0).backward()
    assert torch.equal(g.grad, torch.zeros_like(g))


def test_a_converted_model_runs_original_after_its_first_call():
    discriminator = net()
    fastgan.convert(discriminator)
    x = images()
    assert not discriminator.runs_original((x,), {})
    discriminator(x)
    assert discriminator.runs_original((x,), {})
    assert not discriminator.runs_original((x.clone().requires_grad_(),), {})
    assert not discriminator.runs_original((images(2),), {})
    assert not discriminator.runs_original((x.double(),), {})
    assert not discriminator.runs_original((x,), {"more": 1})
    assert not discriminator.runs_original((x, 1), {})
    discriminator.eval()
    assert not discriminator.runs_original((x,), {})
