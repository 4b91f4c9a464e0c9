from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastgan
from fastgan.nn import utils
from tests.harness import assert_close
from tests.ops.test_gradient_penalty import (
    DISCRIMINATORS,
    CountConvolutions,
    Residual,
    convolutional,
    gradients,
    images,
)


class Then(nn.Module):
    """A convolution, a function of its result (N, 6, 4, 4), and a linear head."""

    def __init__(self, middle, **modules):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 6, 4, 2, 1), nn.Linear(96, 1)
        self.modules_ = nn.ModuleDict(modules)
        self.row, self.halved = nn.Parameter(torch.randn(1, 96)), Halved(torch.randn(96, 96))
        self.offset = nn.Parameter(torch.randn(6, 1, 1))
        self.register_buffer("scale", torch.tensor(1.5))
        self.middle = middle

    def forward(self, x):
        return self.head(self.middle(self, F.leaky_relu(self.conv(x), 0.2)).flatten(1))


class Hidden(torch.autograd.Function):
    """No torch function mode sees the operations inside."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


class Halved(nn.Parameter):
    """A weight that layers see as half its value."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            if func is F.linear:
                args = (args[0], args[1].as_subclass(torch.Tensor) / 2, *args[2:])
            return func(*args, **kwargs or {})


class Filter(Hidden):
    """A weight (6, 6, 1, 1) that depends on a batch (4, 6, 4, 4)."""

    @staticmethod
    def forward(ctx, x):
        ctx.shape = x.shape
        return torch.full((6, 6, 1, 1), 0.1)

    @staticmethod
    def backward(ctx, grad):
        n, _, h, w = ctx.shape
        return grad.sum(0)[None].expand(ctx.shape) / (n * h * w)


def without_gradients(net, h):
    with torch.no_grad():
        return h * 2


def in_place_without_gradients(net, h):
    with torch.no_grad():
        return F.leaky_relu_(h, 0.5)


def unseen_tanh_(h):
    with torch._C.DisableTorchFunction():
        return h.tanh_()


def attention(net, h):
    q = h.flatten(2).transpose(1, 2)
    return F.scaled_dot_product_attention(q, q, q)


# Cases in which one pass would be wrong, each hidden in a different way.
INELIGIBLE = {
    "batch norm": (Then(lambda net, h: net.modules_["bn"](h), bn=nn.BatchNorm2d(6)), "batch_norm"),
    "batch mean": (Then(lambda net, h: h - h.mean(0, keepdim=True)), "mean"),
    "batch mean by reshaping": (Then(lambda net, h: h - h.reshape(-1).mean()), "mean"),
    "batch shuffled": (Then(lambda net, h: h + h[torch.arange(4).flip(0)]), "add"),
    "batch rolled": (Then(lambda net, h: h + h.roll(1, 0)), "add"),
    "batch sorted": (Then(lambda net, h: h.sort(0).values), "sort"),
    "batch as channels": (Then(lambda net, h: h.transpose(0, 1).reshape(4, -1)), "reshape"),
    "attention": (Then(attention), "scaled_dot_product_attention"),
    "smooth": (Then(lambda net, h: torch.tanh(h)), "tanh"),
    "square": (Then(lambda net, h: h * h), "mul"),
    "weight from the input": (
        Then(lambda net, h: F.conv2d(h, h[:, :, :1, :1].mean(0)[None].expand(6, -1, -1, -1))),
        "",
    ),
    "custom function": (Then(lambda net, h: Hidden.apply(h)), "a custom autograd.Function"),
    "custom function added": (Then(lambda net, h: h + Hidden.apply(h)), "a custom autograd.Function"),
    "in place where nobody looks": (Then(lambda net, h: unseen_tanh_(h * 1)), "was modified outside torch functions"),
    "in place without gradients": (
        Then(lambda net, h: in_place_without_gradients(net, h * 1)),
        "was modified outside torch functions",
    ),
    "custom weight": (Then(lambda net, h: F.conv2d(h, Filter.apply(h))), "a weight depends on the input"),
    "weight of a class of its own": (Then(lambda net, h: F.linear(h.flatten(1), net.halved)), "linear"),
}
ELIGIBLE = {
    "residual": nn.Sequential(nn.Conv2d(3, 4, 1), Residual(4), Residual(4), nn.Flatten(), nn.Linear(16, 1)),
    "in place": convolutional(),
    "shared weight": DISCRIMINATORS["shared weight"](),
    "no bias": nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(144, 1, bias=False)),
    "linear over positions": nn.Sequential(nn.Linear(8, 8), nn.LeakyReLU(), nn.Flatten(), nn.Linear(192, 1)),
    "linear where positions equal features": nn.Sequential(
        nn.Flatten(2), nn.Linear(64, 3), nn.ReLU(), nn.Flatten(), nn.Linear(9, 1)
    ),
    "transposed": nn.Sequential(nn.ConvTranspose2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(400, 1)),
    "scaled sums": Then(lambda net, h: (h + 0.5 * h) / 2 - h.clone()),
    "concatenated": Then(lambda net, h: torch.cat([h.mean((2, 3), keepdim=True).flatten(1)] * 16, dim=1)),
    "means of space": Then(lambda net, h: F.pad(h.mean((2, 3), keepdim=True), (0, 3, 0, 3))),
    "dropout in eval": Then(lambda net, h: F.dropout(h, 0.5, training=False)),
    "dropout": Then(lambda net, h: F.dropout(h, 0.0)),
    "additive parameter": Then(lambda net, h: h + net.offset),
    "multiplied by a parameter": Then(lambda net, h: h * net.offset),
    "buffer": Then(lambda net, h: h * net.scale),
    "added number": Then(lambda net, h: h + 1),
    "padded with a number": Then(lambda net, h: F.pad(h, (1, 0), value=1.0)[..., 1:]),
    "norm by data": Then(lambda net, h: h / h.detach().abs().max()),
    "norm by .data": Then(lambda net, h: h / h.data.abs().max()),
    "branch on values": Then(lambda net, h: h if h.sum() > 0 else -h),
    "part without gradients": Then(lambda net, h: h + without_gradients(net, h)),
    "bias of two dimensions": Then(lambda net, h: F.linear(h.flatten(1), torch.eye(96, dtype=h.dtype), net.row)),
    "spectral norm": DISCRIMINATORS["spectral norm"](),
    "torch spectral norm": nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)), nn.ReLU(), nn.Flatten(), nn.Linear(144, 1)
    ),
    "sequence": nn.Sequential(
        nn.Flatten(2), nn.Conv1d(3, 4, 3), nn.ReLU(), nn.AvgPool1d(2), nn.Flatten(), nn.Linear(124, 1)
    ),
    "flat logits": nn.Sequential(convolutional(), nn.Flatten(0)),
    "frozen": convolutional(),
}
ELIGIBLE["frozen"][0].requires_grad_(False)


def by_autograd(discriminator, x, loss, weight):
    x = x.detach().requires_grad_()
    logits = discriminator(x)
    (g,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
    return loss(logits) + weight / 2 * g.square().reshape(len(g), -1).sum(1).mean(), logits


def hinge(logits):
    return F.relu(1 - logits).mean()


def softplus(logits):
    return F.softplus(-logits).mean()


def quadratic(logits):
    return (logits - logits.mean()).square().sum()


def assert_exact(discriminator, x=None, *, loss=softplus, dtype=torch.float64):
    fused, exact = copy.deepcopy(discriminator).to(dtype), copy.deepcopy(discriminator).double()
    x = (images()[0] if x is None else x).to(dtype)
    logits, penalty = fastgan.logits_and_penalty(fused, x, kind="r1", weight=3)
    total = loss(logits) + penalty
    expected, plain = by_autograd(exact, x.double(), loss, 3)
    assert_close(logits, plain, order=0)
    assert_close(total, expected, order=1)
    actual, wanted = (
        torch.cat([g.flatten() for g in gradients(*both)]) for both in ((fused, total), (exact, expected))
    )
    assert_close(actual, wanted, order=2)


@pytest.mark.parametrize("loss", [softplus, hinge, quadratic])
@pytest.mark.parametrize("name", ELIGIBLE)
def test_one_pass_gives_autograds_loss_penalty_and_gradients(name, loss):
    discriminator = ELIGIBLE[name]
    assert fastgan.explain_penalty(copy.deepcopy(discriminator), images()[0]) == "one pass"
    assert_exact(discriminator, loss=loss)


@pytest.mark.parametrize("name", ELIGIBLE)
def test_one_pass_in_float32_meets_the_tolerance(name):
    assert_exact(ELIGIBLE[name], dtype=torch.float32)


@pytest.mark.parametrize("name", INELIGIBLE)
def test_the_general_path_is_exact_and_names_the_obstacle(name):
    discriminator, reason = INELIGIBLE[name]
    explained = fastgan.explain_penalty(copy.deepcopy(discriminator), images()[0])
    assert explained.startswith("general path: ")
    assert reason in explained
    if "custom" not in name:  # Hidden cannot be differentiated twice
        assert_exact(discriminator)


def test_all_discriminators_of_the_penalty_tests_are_exact():
    for make in DISCRIMINATORS.values():
        assert_exact(make(), loss=lambda logits: logits.sin().mean())


def test_loss_and_penalty_take_four_forwards_where_pytorch_takes_six():
    discriminator = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), Residual(4), Residual(4), nn.Flatten(), nn.Linear(16, 1)
    )
    x, counts = images()[0], []

    def fused():
        logits, penalty = fastgan.logits_and_penalty(discriminator, x)
        return softplus(logits) + penalty

    for total in (fused, lambda: by_autograd(discriminator, x, softplus, 10)[0]):
        with CountConvolutions() as counter:
            total().backward()
        counts.append(counter.count)
    assert counts == [5 * 4, 5 * 6]


def test_only_the_logits_or_only_the_penalty_may_be_differentiated():
    discriminator = convolutional().double()
    x = images()[0].double()
    for pick in (0, 1):
        actual = gradients(discriminator, fastgan.logits_and_penalty(discriminator, x)[pick].sum())
        plain, logits = by_autograd(discriminator, x, lambda logits: 0 * logits.sum(), 10)
        expected = gradients(discriminator, (logits.sum(), plain)[pick])
        for a, e in zip(actual, expected, strict=True):
            assert_close(a, e, order=0)


def test_relativistic_losses_of_two_calls_with_r1_and_r2_are_exact():
    fused = ELIGIBLE["residual"].double()
    exact = copy.deepcopy(fused)
    real, fake = (x.double() for x in images())
    (a, r1), (b, r2) = (fastgan.logits_and_penalty(fused, x, weight=2) for x in (real, fake))
    actual = F.softplus(b - a).mean() + r1 + r2
    (p1, plain_a), (p2, plain_b) = (by_autograd(exact, x, lambda logits: 0, 2) for x in (real, fake))
    expected = F.softplus(plain_b - plain_a).mean() + p1 + p2
    for got, wanted in zip(gradients(fused, actual), gradients(exact, expected), strict=True):
        assert_close(got, wanted, order=0)


def test_gradients_accumulate_through_a_retained_graph():
    discriminator = convolutional().double()
    logits, penalty = fastgan.logits_and_penalty(discriminator, images()[0].double())
    total = softplus(logits) + penalty
    total.backward(retain_graph=True)
    once = [p.grad.clone() for p in discriminator.parameters()]
    total.backward()
    for p, g in zip(discriminator.parameters(), once, strict=True):
        assert_close(p.grad, 2 * g, order=0)


def assert_takes(path, discriminator, x):
    assert fastgan.explain_penalty(copy.deepcopy(discriminator), x).startswith(path)
    assert_exact(discriminator, x)


def test_inputs_of_one_dimension_take_one_pass():
    discriminator = nn.Sequential(nn.Unflatten(0, (-1, 1)), nn.Linear(1, 8), nn.ReLU(), nn.Linear(8, 1))
    assert_takes("one pass", discriminator, torch.randn(5))


def test_a_bias_that_broadcasts_to_all_outputs_is_exact():
    class OneBias(nn.Linear):
        def forward(self, x):
            return F.linear(x, self.weight, self.bias[:1])

    assert_takes("one pass", nn.Sequential(OneBias(6, 4), nn.ReLU(), nn.Linear(4, 1)), torch.randn(5, 6))


def test_only_biases_may_require_gradients():
    discriminator = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 1))
    for parameter in discriminator.parameters():
        parameter.requires_grad_(parameter.ndim == 1)
    assert_takes("one pass", discriminator, torch.randn(5, 6))


def test_a_parameter_added_outside_torch_functions_is_found_in_the_graph():
    class Offset(nn.Module):
        def __init__(self):
            super().__init__()
            self.offset = nn.Parameter(torch.randn(4))

        def forward(self, x):
            with torch._C.DisableTorchFunction():
                return x.add_(self.offset)

    assert_takes(
        "general path", nn.Sequential(nn.Linear(6, 4), Offset(), nn.ReLU(), nn.Linear(4, 1)), torch.randn(5, 6)
    )


def test_a_hook_on_the_input_receives_its_gradient():
    class Hooked(nn.Module):
        def forward(self, x):
            if x.requires_grad:
                x.register_hook(lambda grad: grad * 2)
            return x

    seen = nn.Sequential(Hooked(), nn.Conv2d(3, 6, 4, 2, 1), nn.Tanh(), nn.Flatten(), nn.Linear(96, 1))
    assert_takes("general path", seen, images()[0])


def test_labels_are_passed_to_the_discriminator():
    class Conditional(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.embed = convolutional()[:-1], nn.Embedding(5, 128)

        def forward(self, x, label):
            return (self.body(x) * self.embed(label)).sum(1)

    discriminator, label = Conditional().double(), torch.tensor([0, 1, 4, 2])
    x = images()[0].double()
    assert fastgan.explain_penalty(discriminator, x, args=[label]) == "one pass"
    logits, penalty = fastgan.logits_and_penalty(discriminator, x, kind="r1", weight=3, args=[label])
    actual = gradients(discriminator, softplus(logits) + penalty)
    expected = gradients(discriminator, by_autograd(lambda x: discriminator(x, label), x, softplus, 3)[0])
    for got, wanted in zip(actual, expected, strict=True):
        assert_close(got, wanted, order=0)


def test_fused_spectral_norm_in_the_hook_form_and_accumulation_work():
    discriminator = utils.fuse_spectral_norm(
        nn.Sequential(nn.utils.spectral_norm(nn.Conv2d(3, 8, 4, 2)), nn.ReLU(), nn.Flatten(), nn.Linear(72, 1))
    )
    assert fastgan.explain_penalty(discriminator.eval(), images()[0]) == "one pass"
    assert_exact(discriminator)


def plain_loss(discriminator, x):
    return by_autograd(discriminator, x, softplus, 10)[0]


def one_pass_loss(discriminator, x):
    assert fastgan.explain_penalty(discriminator, x) == "one pass"
    logits, penalty = fastgan.logits_and_penalty(discriminator, x)
    return softplus(logits) + penalty


def test_weights_shared_by_several_calls_get_the_gradients_of_all_calls():
    norm = nn.utils.parametrizations.spectral_norm
    discriminator = nn.Sequential(norm(nn.Conv2d(3, 4, 4, 2)), nn.ReLU(), nn.Flatten(), norm(nn.Linear(36, 1)))
    discriminator.double().eval()
    real, fake = (x.double() for x in images())
    results = []
    for call in (one_pass_loss, plain_loss):
        with nn.utils.parametrize.cached():
            results.append(gradients(discriminator, call(discriminator, real) + call(discriminator, fake)))
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected, order=0)


def test_a_hook_on_a_parameter_receives_its_gradient_once():
    discriminator, x = convolutional().double(), images()[0].double()
    seen, results = [], []
    for parameter in discriminator.parameters():
        parameter.register_hook(lambda grad: seen.append(grad) or 2 * grad)
    for call in (one_pass_loss, plain_loss):
        discriminator.zero_grad()
        call(discriminator, x).backward()
        results.append([p.grad for p in discriminator.parameters()])
        assert len(seen) == len(results[0])
        seen.clear()
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected, order=0)


def test_its_gradient_cannot_be_differentiated_again():
    discriminator = convolutional()
    logits, penalty = fastgan.logits_and_penalty(discriminator, images()[0])
    weight = discriminator[0].weight
    (grad,) = torch.autograd.grad(softplus(logits) + penalty, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(grad.sum(), weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast_it_is_as_accurate_as_autograd(dtype):
    discriminator, x = ELIGIBLE["residual"].float(), images()[0]
    exact = gradients(discriminator, by_autograd(discriminator, x, softplus, 3)[0])

    def error(total):
        return sum((g - e).norm() for g, e in zip(gradients(discriminator, total), exact, strict=True))

    with torch.autocast("cpu", dtype):
        logits, penalty = fastgan.logits_and_penalty(discriminator, x, weight=3)
        fused = softplus(logits.float()) + penalty
        plain = by_autograd(discriminator, x, lambda logits: softplus(logits.float()), 3)[0]
    assert error(fused) <= 2 * error(plain)
