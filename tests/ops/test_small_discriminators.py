"""Penalties of small discriminators run PyTorch's own functions, with the same results."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastgan
from fastgan import backends, torch_private
from fastgan.ops.gradient_penalty import called_modules, small
from fastgan.ops.gradient_penalty.called_modules import call_of
from fastgan.ops.gradient_penalty.small import Size, size_of
from tests.ops.test_gradient_penalty import DISCRIMINATORS, KINDS, by_definition, gradients, images

pytestmark = pytest.mark.small


def mlp(width):
    return nn.Sequential(nn.Linear(2, width), nn.LeakyReLU(0.2), nn.Linear(width, 1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", DISCRIMINATORS)
def test_penalty_and_gradients_equal_the_definition(name, kind):
    discriminator = DISCRIMINATORS[name]().double()
    exact = copy.deepcopy(discriminator)
    real, fake = (x.double() for x in images())
    seeds = [torch.Generator().manual_seed(1) for _ in range(2)]
    penalty = fastgan.gradient_penalty(discriminator, real, fake, kind=kind, weight=3.0, generator=seeds[0])
    expected = by_definition(exact, real, fake, kind, 3.0, seeds[1])
    for actual, wanted in zip(gradients(discriminator, penalty), gradients(exact, expected), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_loss_and_penalty_in_one_backward_equal_the_definition(compiled):
    exact = mlp(16).double()
    discriminator = copy.deepcopy(exact)
    x = torch.randn(8, 2, dtype=torch.float64)
    called = torch.compile(discriminator, backend="aot_eager") if compiled else discriminator
    logits, penalty = fastgan.logits_and_penalty(called, x)
    expected = F.softplus(-exact(x)).mean() + by_definition(exact, x, None, "r1", 10.0, None)
    actual = gradients(discriminator, F.softplus(-logits).mean() + penalty)
    for found, wanted in zip(actual, gradients(exact, expected), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def test_pytorchs_functions_run_and_explain_penalty_reports_it():
    discriminator, x = mlp(16), torch.randn(8, 2)
    outputs = []
    discriminator[1].register_forward_hook(lambda module, inputs, output: outputs.append(output))
    fastgan.gradient_penalty(discriminator, x, kind="r1")
    fastgan.logits_and_penalty(discriminator, x)
    assert "so small" in fastgan.explain_penalty(discriminator, x)
    assert [output.grad_fn.name() for output in outputs] == ["LeakyReluBackward0"] * 3
    with fastgan.use_backend("cpu"):
        assert fastgan.explain_penalty(discriminator, x) == "one pass"
        fastgan.gradient_penalty(discriminator, x, kind="r1")
    assert "LeakyReluBackward0" not in {output.grad_fn.name() for output in outputs[3:]}


NET = mlp(16)


def through_a_global(x):
    return NET(x)


class Trainer:
    def __init__(self, net):
        self.net = net

    def logits(self, x):
        return self.net(x)


class Critic(nn.Sequential):
    def logits(self, x, scale=1.0):
        return self(x) * scale


def test_modules_are_found_inside_functions():
    x, net, large = torch.randn(64, 2), mlp(16), mlp(2**18)
    inner = lambda x: net(x)  # noqa: E731
    critic = Critic(*net)
    around = [
        lambda x: net(x),
        lambda x: inner(x).squeeze(1),
        lambda x, y=net: y(x),
        lambda x: [part(x) for part in (lambda: [net, critic])()],
        functools.partial(critic.logits, scale=2.0),
        functools.partial(lambda net, x: net(x), net),
        critic.logits,
        net.forward,
        through_a_global,
    ]
    for function in around:
        assert size_of(function, (x,)) is Size.SMALL
    assert size_of(lambda x: large(x), (x,)) is Size.LARGE
    assert size_of(lambda x: net(x) + large(x), (x,)) is Size.LARGE
    assert size_of(Trainer(net).logits, (x,)) is Size.UNKNOWN


def test_a_selected_backend_and_transforms_ignore_the_size():
    x, found = torch.randn(64, 2), []
    torch.func.grad(lambda x: (found.append(size_of(mlp(16), (x,))), x.sum())[1])(x)
    with fastgan.use_backend("cpu"):
        found.append(size_of(mlp(16), (x,)))
    with small.at_any_size():
        found.append(size_of(lambda x: x, (x,)))
    assert found == [Size.LARGE] * 3


def nodes(logits):
    names, waiting = [], [logits.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None:
            names.append(node.name())
            waiting.extend(following for following, _ in node.next_functions)
    return set(names)


def late_net():
    """Return a network whose first layer is small and whose other layers are large."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 4, 1), nn.LeakyReLU(0.2), nn.Conv2d(4, 128, 3, 1, 1), nn.LeakyReLU(0.2)),
        *(nn.Conv2d(128, 64, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 64, 1)),
    ).double()


@pytest.mark.parametrize("call", ["penalty", "both"])
def test_a_forward_is_rerouted_from_the_layer_that_makes_it_large(call):
    exact = late_net()
    net = copy.deepcopy(exact)
    x = torch.randn(8, 3, 16, 16, dtype=torch.float64)
    seen = []
    net[-1].register_forward_hook(lambda module, inputs, output: seen.append(nodes(output)))
    for _ in range(2):  # the second call makes the same choices
        wanted = by_definition(exact, x, None, "r1", 10.0, None)
        if call == "penalty":
            total = fastgan.gradient_penalty(Trainer(net).logits, x, kind="r1")
        else:
            logits, penalty = fastgan.logits_and_penalty(Trainer(net).logits, x)
            total = F.softplus(-logits).mean() + penalty
            wanted = wanted + F.softplus(-exact(x)).mean()
        for found, expected in zip(gradients(net, total), gradients(exact, wanted), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert seen[0] == seen[1]
    assert {"ConvolutionBackward0", "LeakyReluBackward0"} <= seen[0], "PyTorch runs the first layers"
    assert "ReluBackward0" not in seen[0], "fastgan runs the last layers"
    assert fastgan.explain_penalty(Trainer(net).logits, x).startswith("one pass, after the first layers")


def test_pytorch_runs_a_forward_that_is_counted_as_small_each_time():
    net, x = mlp(16), torch.randn(8, 2)
    function = Trainer(net).logits
    results = []
    for _ in range(3):
        for parameter in net.parameters():
            parameter.grad = None
        logits, penalty = fastgan.logits_and_penalty(function, x)
        assert "LeakyReluBackward0" in nodes(logits)
        (logits.sum() + penalty).backward()
        results.append([p.grad.clone() for p in net.parameters()])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
    assert fastgan.explain_penalty(function, x) == f"general path: {small.REASON}"
    assert small.was_small(function, (x,))


def test_a_discriminator_that_grows_is_rerouted():
    class Growing(Trainer):
        def logits(self, x):
            return self.net[0](x) if len(self.net) == 1 else self.net[1](x)

    torch.manual_seed(0)
    small_one = nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(1024, 1)).double()
    x = torch.randn(8, 3, 16, 16, dtype=torch.float64)
    function = Growing([small_one])
    fastgan.logits_and_penalty(function.logits, x)
    function.net.append(late_net())
    exact = copy.deepcopy(function.net[1])
    for _ in range(2):
        logits, penalty = fastgan.logits_and_penalty(function.logits, x)
        total = F.softplus(-logits).mean() + penalty
        wanted = by_definition(exact, x, None, "r1", 10.0, None) + F.softplus(-exact(x)).mean()
        for found, expected in zip(gradients(function.net[1], total), gradients(exact, wanted), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


class Constant(nn.Linear):
    def forward(self, x):
        return self.bias.expand(len(x))


class Named(nn.Linear):
    def forward(self, x):
        return {"logits": x}


@pytest.mark.parametrize("call", [fastgan.gradient_penalty, fastgan.logits_and_penalty])
def test_small_discriminators_raise_the_same_errors(call):
    x = torch.randn(4, 2)
    with pytest.raises(ValueError, match="does not depend on its input"):
        call(Constant(2, 1), x, kind="r1")
    with torch.no_grad(), pytest.raises(RuntimeError, match="needs gradients"):
        call(mlp(16), x, kind="r1")
    with pytest.raises(ValueError, match="must return only logits"):
        call(Named(2, 1), x, kind="r1")


def test_attention_with_a_small_module_is_differentiated_twice():
    net, other = nn.Linear(4, 4), nn.Linear(4, 1)

    def attending(x):
        h = net(x).unsqueeze(1)
        return other(F.scaled_dot_product_attention(h, h, h).squeeze(1))

    x = torch.randn(8, 4)
    for function in (lambda x: other(x), lambda x: other(attending(x) * x), attending):
        assert size_of(function, (x,)) is Size.SMALL
        for _ in range(2):
            fastgan.gradient_penalty(function, x, kind="r1").backward()
            logits, penalty = fastgan.logits_and_penalty(function, x)
            (logits.mean() + penalty).backward()


class Watched(nn.Sequential):
    """Record the number of active function modes in each forward."""

    def forward(self, x, scale=1.0, extra=None):
        self.modes.append(len(torch_private.function_modes()))
        return super().forward(x) * scale


def watched(width=16):
    net = Watched(*mlp(width))
    net.modes = []
    return net


@pytest.mark.parametrize("call", [fastgan.gradient_penalty, fastgan.logits_and_penalty])
def test_a_small_call_is_intercepted_only_the_first_time(call):
    net, x, y = watched(), torch.randn(8, 2), torch.randn(8)
    ways = [
        net,
        net.forward,
        lambda v: net(v).squeeze(1),
        lambda v: net(v, y[:, None]),
    ]
    for way in ways:
        net.modes.clear()
        for _ in range(3):
            call(way, x, kind="r1")
        assert net.modes == [1, 0, 0]
    net.modes.clear()
    for scale in (2.0, 2.0, 3.0, 2):
        call(net, x, kind="r1", args=(scale,))
    assert net.modes == [1, 0, 1, 1], "numbers may change which layers run"
    net.modes.clear()
    for _ in range(2):
        call(net, x, kind="r1", kwargs={"extra": object()})
    assert net.modes == [1, 1], "calls with unknown arguments are not remembered"


def test_a_changed_call_is_intercepted_again():
    net, x = watched(), torch.randn(8, 2)

    def modes(x):
        net.modes.clear()
        fastgan.gradient_penalty(net, x, kind="r1")
        return net.modes[0]

    assert [modes(x), modes(x)] == [1, 0]
    assert [modes(x[:4]), modes(x[:4]), modes(x)] == [1, 0, 0]
    net.eval()
    assert [modes(x), modes(x)] == [1, 0]
    net.append(nn.Linear(1, 1))
    assert [modes(x), modes(x)] == [1, 0]
    with fastgan.use_backend("cpu"):
        assert modes(x) == 1
    with small.at_any_size():
        assert modes(x) == 1
    assert modes(x) == 0


@pytest.mark.parametrize("walk", ["native", "python"])
def test_a_call_depends_on_all_modules_inside(walk, monkeypatch):
    if walk == "python":
        monkeypatch.setattr(called_modules, "_walk", lambda: called_modules._structure)
    elif backends.native() is None:
        pytest.skip("needs fastgan._native")
    net = nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.ReLU(), nn.ReLU()), Watched())
    inputs = ("r1", torch.ones(2, 1), None)
    before = call_of(net, inputs)
    assert call_of(net, inputs) == before
    net.register_module("empty", None)
    assert call_of(net, inputs) == before
    net.empty = nn.ReLU()
    assert call_of(net, inputs) != before
    del net.empty
    assert call_of(net, inputs) == before
    net[1][0] = nn.Tanh()
    replaced = call_of(net, inputs)
    assert replaced != before
    for forward in (torch.sin, torch.cos, lambda x: x):
        net[1][0].forward = forward
        assert call_of(net, inputs) != replaced
    del net[1][0].forward
    net[2].activation = torch.tanh  # a value that is no function of Python does not count
    assert call_of(net, inputs) == replaced
    net[2].activation = lambda x: x
    assert call_of(net, inputs) != replaced
    del net[2].activation
    handles = [net[1][1].register_forward_hook(print), net[0].register_full_backward_hook(print)]
    assert call_of(net, inputs) != replaced
    for handle in handles:
        handle.remove()
    assert call_of(net, inputs) == replaced
    net[1].register_module("parent", net)  # a cycle
    assert call_of(net, inputs) is None


def by_definition_r1(net, x):
    """R1 with weight 10, and its gradients."""
    points = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(net(points).sum(), points, create_graph=True)
    penalty = 5 * grad.square().sum(1).mean()
    return penalty, *torch.autograd.grad(penalty, [net[0].weight, net[2].weight])


@pytest.mark.parametrize("walk", ["native", "python"])
@pytest.mark.parametrize("make", ["script", "trace", "inside"])
def test_scripted_and_traced_modules(make, walk, monkeypatch):
    if walk == "python":
        monkeypatch.setattr(called_modules, "_walk", lambda: called_modules._structure)
    net, x = mlp(16), torch.randn(8, 2)
    want, weights = by_definition_r1(net, x), [net[0].weight, net[2].weight]
    script = torch.jit.trace(net, x) if make == "trace" else torch.jit.script(net)
    model = nn.Sequential(script) if make == "inside" else script
    for _ in range(3):
        penalty = fastgan.gradient_penalty(model, x, kind="r1")
        torch.testing.assert_close((penalty, *torch.autograd.grad(penalty, weights)), want)
    inputs = ("r1", x, None)
    before = call_of(model, inputs)
    assert before is not None
    assert call_of(model, inputs) == before
    assert call_of(model.eval(), inputs) != before


def test_calls_that_need_fastgans_second_derivatives_are_always_intercepted():
    class Hard(Watched):
        def forward(self, x):
            return F.hardsigmoid(super().forward(x))

    net, x = Hard(*mlp(16)), torch.randn(8, 2)
    net.modes = []
    for _ in range(3):
        fastgan.gradient_penalty(net, x, kind="r1").backward()
    assert net.modes == [1, 1, 1]


def test_the_number_of_remembered_shapes_is_limited(monkeypatch):
    monkeypatch.setattr(small, "MOST_SHAPES", 3)
    net = mlp(16)
    for n in range(1, 12):
        fastgan.gradient_penalty(net, torch.randn(n, 2), kind="r1")
        assert 1 <= len(small._left_to_pytorch[net]) <= 3


@pytest.mark.parametrize("between", [nn.Identity, nn.ReLU, lambda: nn.AvgPool2d(1), lambda: nn.MaxPool2d(1)])
@pytest.mark.parametrize("call", ["penalty", "both"])
def test_biases_get_none_or_zeros_as_in_pytorch(between, call):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), between(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 1))
    x = torch.randn(3, 3, 8, 8)
    points = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(model(points).sum(), points, create_graph=True)
    (5 * grad.square().flatten(1).sum(1).mean()).backward()
    want = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    make = fastgan.gradient_penalty if call == "penalty" else fastgan.logits_and_penalty
    made = make(model, x, kind="r1")
    (made if call == "penalty" else made[1]).backward()
    for parameter, theirs in zip(model.parameters(), want, strict=True):
        assert (parameter.grad is None) == (theirs is None)
        if theirs is not None:
            torch.testing.assert_close(parameter.grad, theirs)
