from __future__ import annotations

import copy
import threading
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fastgan
from fastgan.nn import utils
from tests.harness import assert_close

KINDS = ["wgan-gp", "wgan-lp", "r1", "r2", "r1+r2", "dragan", "max-gp", "zero-centered"]


class Residual(nn.Module):
    """conv, leaky_relu, avg_pool and a skip connection."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.skip = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        return F.avg_pool2d(F.leaky_relu(self.conv(x), 0.2) + self.skip(x), 2)


class Shared(nn.Module):
    """One convolution used twice."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x):
        return self.conv(F.relu(self.conv(x))).flatten(1).sum(1)


def convolutional(*norm):
    return nn.Sequential(
        nn.Conv2d(3, 8, 4, 2, 1),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(8, 8, 3, padding=1),
        *norm,
        nn.LeakyReLU(0.2),
        nn.Flatten(),
        nn.Linear(8 * 16, 1),
    )


DISCRIMINATORS = {
    "convolutional": convolutional,
    "residual": lambda: nn.Sequential(nn.Conv2d(3, 4, 1), Residual(4), Residual(4), nn.Flatten(), nn.Linear(16, 1)),
    "patches": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 1, 3)),
    "shared weight": Shared,
    "group norm": lambda: convolutional(nn.GroupNorm(2, 8)),
    "layer norm": lambda: convolutional(nn.LayerNorm([8, 4, 4])),
    "smooth": lambda: nn.Sequential(nn.Conv2d(3, 8, 4, 2), nn.SiLU(), nn.Flatten(), nn.Linear(72, 4), nn.Softplus()),
    "spectral norm": lambda: utils.fuse_spectral_norm(
        nn.Sequential(utils.spectral_norm(nn.Conv2d(3, 8, 4, 2)), nn.ReLU(), nn.Flatten(), nn.Linear(72, 1))
    ),
    "mlp": lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1)),
}


def images(n=4):
    return torch.randn(n, 3, 8, 8), torch.randn(n, 3, 8, 8)


def by_definition(discriminator, real, fake, kind, weight, generator, **call):
    """Compute the penalty with plain PyTorch."""
    per_sample = (len(real), *[1] * (real.ndim - 1))

    def squares(x):
        x = x.detach().requires_grad_()
        (g,) = torch.autograd.grad(discriminator(x, **call).sum(), x, create_graph=True)
        return g.flatten(1).square().sum(1)

    if kind in ("r1", "r2", "r1+r2"):
        return sum(weight / 2 * squares({"r1": real, "r2": fake}[part]).mean() for part in kind.split("+"))
    if kind == "dragan":
        noise = torch.rand(real.shape, dtype=real.dtype, generator=generator)
        x = real + torch.rand(per_sample, dtype=real.dtype, generator=generator) * 0.5 * real.std() * noise
    else:
        alpha = torch.rand(per_sample, dtype=real.dtype, generator=generator)
        x = alpha * real + (1 - alpha) * fake
    square = squares(x)
    return (
        weight
        * {
            "wgan-gp": lambda: (square.sqrt() - 1).square().mean(),
            "dragan": lambda: (square.sqrt() - 1).square().mean(),
            "wgan-lp": lambda: (square.sqrt() - 1).clamp(min=0).square().mean(),
            "max-gp": square.max,
            "zero-centered": square.mean,
        }[kind]()
    )


def gradients(discriminator, loss):
    discriminator.zero_grad()
    loss.backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in discriminator.parameters()]


def assert_equal_penalties(discriminator, kind, *, train=True, dtype=torch.float32):
    real, fake = (x.to(dtype) for x in images())
    fused, exact = discriminator.to(dtype).train(train), copy.deepcopy(discriminator).double().train(train)
    # float64 would draw other random numbers than float32, so draw them once for both.
    draws = lambda: torch.Generator().manual_seed(3)  # noqa: E731
    actual = fastgan.gradient_penalty(fused, real, fake, kind=kind, weight=7.0, generator=draws())
    if dtype == torch.float64 or kind in ("r1", "r2", "r1+r2"):
        expected = by_definition(exact, real.double(), fake.double(), kind, 7.0, draws())
        assert_close(actual, expected, order=1)
        for a, e in zip(gradients(fused, actual), gradients(exact, expected), strict=True):
            if e.any() or a.any():
                assert_close(a, e, order=2)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", DISCRIMINATORS.values(), ids=DISCRIMINATORS)
def test_penalty_and_parameter_gradients_equal_the_definition(make, kind, train):
    assert_equal_penalties(make(), kind, train=train, dtype=torch.float64)


@pytest.mark.parametrize("make", DISCRIMINATORS.values(), ids=DISCRIMINATORS)
def test_float32_penalties_meet_the_tolerance(make):
    assert_equal_penalties(make(), "r1+r2")


class CountConvolutions(TorchDispatchMode):
    """Count convolutions, input gradients and weight gradients. Each costs as much as one forward of its layer."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        if name == "aten::convolution":
            self.count += 1
        elif name == "aten::convolution_backward":
            self.count += sum(args[-1][:2])
        return func(*args, **(kwargs or {}))


def plain_penalty(discriminator, x):
    x = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(discriminator(x).sum(), x, create_graph=True)
    return g.square().sum()


def critic():
    sizes = [3, 8, 8, 8, 8]
    layers = [m for a, b in pairwise(sizes) for m in (nn.Conv2d(a, b, 3, padding=1), nn.LeakyReLU())]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 1))


def test_a_penalty_takes_four_forwards_where_pytorch_takes_six():
    discriminator, (real, _) = critic(), images()
    counts = []
    for penalty in (
        lambda: fastgan.gradient_penalty(discriminator, real, kind="r1"),
        lambda: plain_penalty(discriminator, real),
    ):
        with CountConvolutions() as counter:
            penalty().backward()
        counts.append(counter.count)
    assert counts == [4 * 4, 6 * 4]


def test_a_penalty_and_a_loss_in_one_backward_are_exact():
    discriminator, (real, fake) = convolutional().double(), (x.double() for x in images())
    exact = copy.deepcopy(discriminator)
    real, fake = real.requires_grad_(), fake.requires_grad_()
    for _ in range(2):
        with fastgan.twice_differentiable():
            logits = discriminator(real)
        loss = F.softplus(-logits).mean() + fastgan.penalty_from_logits(logits, real, kind="r1", weight=3)
        plain = exact(real)
        (g,) = torch.autograd.grad(plain.sum(), real, create_graph=True)
        expected = F.softplus(-plain).mean() + 1.5 * g.square().flatten(1).sum(1).mean()
        for a, e in zip(gradients(discriminator, loss), gradients(exact, expected), strict=True):
            assert_close(a, e, order=2)


def test_two_backwards_through_a_retained_graph_accumulate():
    discriminator, (real, _) = convolutional().double(), images()
    penalty = fastgan.gradient_penalty(discriminator, real.double(), kind="r1")
    penalty.backward(retain_graph=True)
    once = [None if p.grad is None else p.grad.clone() for p in discriminator.parameters()]
    penalty.backward()
    for p, g in zip(discriminator.parameters(), once, strict=True):
        assert (p.grad is None) == (g is None)
        if g is not None:
            assert_close(p.grad, 2 * g, order=0)


def test_frozen_parameters_get_no_gradient():
    discriminator, (real, _) = convolutional(), images()
    discriminator[0].requires_grad_(False)
    fastgan.gradient_penalty(discriminator, real, kind="r1").backward()
    assert discriminator[0].weight.grad is None
    assert discriminator[2].weight.grad is not None


def test_the_real_and_fake_batches_get_no_gradient():
    real, fake = (x.requires_grad_() for x in images())
    fastgan.gradient_penalty(convolutional(), real, fake).backward()
    assert real.grad is None
    assert fake.grad is None


def test_labels_and_several_scales_are_supported():
    class Conditional(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.embed = convolutional()[:-1], nn.Embedding(5, 128)

        def forward(self, x, label, *, scale):
            features = self.body(x)
            return [
                scale * (features * self.embed(label)).unflatten(1, (1, -1)),
                features.unflatten(1, (1, -1))[..., ::2],
            ]

    discriminator, (real, _) = Conditional().double(), images()
    label = torch.tensor([0, 1, 4, 2])

    def summed(x, label, scale):
        fine, coarse = discriminator(x, label, scale=scale)
        return fine.sum() + coarse.sum()

    actual = fastgan.gradient_penalty(
        discriminator, real.double(), kind="r1", weight=2, args=[label], kwargs={"scale": 3}
    )
    expected = by_definition(summed, real.double(), None, "r1", 2.0, None, label=label, scale=3)
    assert_close(actual, expected, order=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_zero_gradient_gives_finite_gradients(kind):
    discriminator = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(72, 1))
    nn.init.zeros_(discriminator[2].weight)
    penalty = fastgan.gradient_penalty(discriminator, *images(), kind=kind)
    assert penalty.isfinite()
    assert all(g.isfinite().all() for g in gradients(discriminator, penalty))


def test_the_same_generator_gives_the_same_penalty():
    discriminator, batch = convolutional(), images()
    draw = lambda seed: fastgan.gradient_penalty(discriminator, *batch, generator=torch.Generator().manual_seed(seed))  # noqa: E731
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_norms_are_computed_in_float32_under_autocast(dtype):
    discriminator, (real, _) = convolutional(), images()
    expected = fastgan.gradient_penalty(discriminator, real, kind="r1")
    with torch.autocast("cpu", dtype):
        actual = fastgan.gradient_penalty(discriminator, real, kind="r1")
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=0.1, atol=0)
    large = nn.Conv2d(3, 1, 3)
    nn.init.constant_(large.weight, 300.0)  # the squares overflow float16
    with torch.autocast("cpu", dtype):
        assert fastgan.gradient_penalty(large, real, kind="r1").isfinite()


def test_twice_differentiable_cleans_up_after_an_error():
    with pytest.raises(KeyError), fastgan.twice_differentiable(), fastgan.twice_differentiable():
        raise KeyError
    y = nn.Conv2d(3, 4, 3)(torch.randn(1, 3, 5, 5))
    assert type(y.grad_fn).__name__ == "ConvolutionBackward0"


def test_twice_differentiable_reroutes_functions_modules_and_methods():
    x = torch.randn(2, 3, 32, 32, requires_grad=True)
    w = torch.randn(4, 3, 3, 3)
    calls = {
        "F.conv2d": lambda: F.conv2d(x, w),
        "torch.conv2d": lambda: torch.conv2d(x, w),
        "Conv2d": lambda: nn.Conv2d(3, 4, 3)(x),
        "Conv2d circular": lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular")(x),
        "ConvTranspose2d": lambda: nn.ConvTranspose2d(3, 4, 3)(x),
        "F.relu": lambda: F.relu(x),
        "torch.relu": lambda: torch.relu(x),
        "x.relu": lambda: x.relu(),
        "x.relu_": lambda: (x * 1).relu_(),
        "F.relu_": lambda: F.relu_(x * 1),
        "ReLU": lambda: nn.ReLU(inplace=True)(x * 1),
        "LeakyReLU": lambda: nn.LeakyReLU(0.1)(x),
        "F.leaky_relu_": lambda: F.leaky_relu_(x * 1),
        "F.leaky_relu_ by name": lambda: F.leaky_relu_(input=x * 1, negative_slope=0.3),
        "AvgPool2d": lambda: nn.AvgPool2d(2)(x),
        "LayerNorm": lambda: nn.LayerNorm([3, 32, 32])(x),
        "GroupNorm": lambda: nn.GroupNorm(3, 3)(x),
        "InstanceNorm2d": lambda: nn.InstanceNorm2d(3, affine=True)(x),
        "F.avg_pool2d": lambda: F.avg_pool2d(x, kernel_size=3, stride=1),
    }
    for name, call in calls.items():
        torch.manual_seed(0)
        plain = call()
        torch.manual_seed(0)
        with fastgan.twice_differentiable():
            fused = call()
        assert type(fused.grad_fn).__module__ == "torch.autograd.function", name
        assert type(plain.grad_fn).__module__ != "torch.autograd.function", name
        assert_close(fused, plain.double(), order=0)


def test_saved_tensor_hooks_may_be_any_callable():
    x = torch.randn(2, 3, 8, 8)
    with torch.autograd.graph.saved_tensors_hooks(torch.Tensor.clone, torch.Tensor.clone):
        fastgan.gradient_penalty(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), x, kind="r1").backward()


def test_pytorchs_functions_run_without_gradients():
    with fastgan.twice_differentiable(), torch.no_grad():
        assert not nn.Conv2d(3, 4, 3)(torch.randn(1, 3, 5, 5)).requires_grad


def test_another_models_backward_during_a_penalty_keeps_its_weight_gradients():
    """A hook in the backward of a penalty runs the backward of another model."""
    other = convolutional()
    with fastgan.twice_differentiable():
        other_loss = other(images()[0]).sum()
    discriminator, (real, _) = convolutional(), images()
    real.requires_grad_()
    real.register_hook(lambda grad: other_loss.backward())
    with fastgan.twice_differentiable():
        logits = discriminator(real)
    fastgan.penalty_from_logits(logits, real)
    assert all(p.grad is not None for p in other.parameters())


def test_later_gradients_are_complete_after_an_error_in_the_first_backward():
    discriminator, (real, _) = convolutional(), images()
    real.requires_grad_()

    def fail(grad):
        raise KeyError

    handle = real.register_hook(fail)
    with fastgan.twice_differentiable():
        logits = discriminator(real)
    with pytest.raises(KeyError):
        fastgan.penalty_from_logits(logits, real)
    handle.remove()
    logits.sum().backward()
    assert all(p.grad is not None for p in discriminator.parameters())


def test_penalties_in_several_threads_are_independent():
    discriminators, (real, _) = [convolutional() for _ in range(4)], images()
    expected = [gradients(d, fastgan.gradient_penalty(d, real, kind="r1")) for d in discriminators]
    results = [None] * 4

    def work(i):
        for _ in range(5):
            results[i] = gradients(discriminators[i], fastgan.gradient_penalty(discriminators[i], real, kind="r1"))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for actual, exact in zip(results, expected, strict=True):
        for a, e in zip(actual, exact, strict=True):
            assert_close(a, e.double(), order=2)


REAL, FAKE = images()
BAD = {
    "kind": (dict(kind="wgan"), ValueError, "kind must be one of wgan-gp"),
    "kinds": (dict(kind=["r1"]), ValueError, "kind must be one of wgan-gp"),
    "weight": (dict(weight="1"), TypeError, "weight must be a number or a tensor .*, got '1'"),
    "weights": (
        dict(weight=torch.ones(2)),
        ValueError,
        r"weight must be a number or a tensor of shape \(\), got shape \(2,\)",
    ),
    "no fake": (dict(fake=None), TypeError, "needs fake"),
    "shapes": (dict(fake=FAKE[:2]), ValueError, r"fake must have the shape of real, \(4, 3, 8, 8\), got \(2"),
    "integers": (dict(real=REAL.long()), TypeError, "real must be floating-point, got torch.int64"),
    "empty": (dict(real=REAL[:0], fake=FAKE[:0]), ValueError, "real must be .* not empty"),
    "not a tensor": (dict(real=[1.0]), TypeError, r"real\[0\] must be a tensor, got float"),
    "device": (dict(fake=FAKE.to("meta")), ValueError, "fake must be on the device of real"),
    "detached": (dict(discriminator=lambda x: x.detach().sum((1, 2, 3))), ValueError, "does not depend on its input"),
    "constant": (dict(discriminator=lambda x: torch.ones(4, requires_grad=True)), ValueError, "does not depend"),
    "heads": (
        dict(discriminator=lambda x: (x.sum((1, 2, 3)), x.flatten(1))),
        ValueError,
        r"several outputs, \[\(4,\), \(4, 192\)\], .* select the logits with select=",
    ),
    "mapping": (
        dict(discriminator=lambda x: {"logits": x}),
        ValueError,
        r"only logits, got {'logits': \(4, 3, 8, 8\)}: select the logits with select=",
    ),
    "output": (dict(discriminator=lambda x: None), TypeError, "must return a tensor or a sequence of .*, got NoneType"),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input_raises_an_error_that_names_it(change, error, message):
    arguments = dict(discriminator=convolutional(), real=REAL, fake=FAKE) | change
    with pytest.raises(error, match=message):
        fastgan.gradient_penalty(**arguments)


def test_disabled_gradients_raise():
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"outside torch\.no_grad"):
        fastgan.gradient_penalty(convolutional(), REAL, kind="r1")
    with pytest.raises(ValueError, match="must require a gradient before"):
        fastgan.penalty_from_logits(convolutional()(REAL), REAL)
    with pytest.raises(TypeError, match=r"inputs must be a tensor, .* got NoneType"):
        fastgan.penalty_from_logits(convolutional()(REAL), None)


def test_these_tests_detect_a_broken_second_derivative(monkeypatch):
    from fastgan.ops.conv import autograd

    original = autograd._InputGradient.backward
    broken = staticmethod(lambda *a: tuple(None if t is None else 1.01 * t for t in original(*a)))
    monkeypatch.setattr(autograd._InputGradient, "backward", broken)
    with pytest.raises(AssertionError, match="relative error"):
        assert_equal_penalties(convolutional(), "r1", dtype=torch.float64)
