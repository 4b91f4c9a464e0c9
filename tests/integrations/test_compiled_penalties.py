"""Penalties inside torch.compile: one graph, PyTorch's numbers, and the eager penalty's count of convolutions."""

from __future__ import annotations

import copy
import functools
import os
import shutil

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.overrides import _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint

import fastgan
from fastgan import backends
from fastgan import nn as fnn
from fastgan.nn.utils import fuse_spectral_norm

pytestmark = [
    pytest.mark.skipif(
        tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11), reason="before 2.11 a penalty breaks the graph"
    ),
    # Dynamo reads .grad of what the graph's functions return, which are no leaves.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]
N, WEIGHT = 4, 3.0
# By hand, FASTGAN_TEST_COMPILED=all runs every discriminator on every backend, each function in a graph of its own.
EVERYTHING = os.environ.get("FASTGAN_TEST_COMPILED") == "all"
COMPILER = shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.undo()  # poisoned memory cannot be traced
    torch.compiler.reset()
    yield
    assert not _get_current_function_mode_stack()
    assert not backends.is_lowered()


class Critic(nn.Module):
    """Two convolutions, with something between them, and a linear layer."""

    def __init__(self, between: nn.Module | None = None, activation: nn.Module | None = None, channels: int = 6):
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, 2, 1)  # (N, 6, 8, 8)
        self.between = between or nn.Identity()
        self.activation = activation or nn.LeakyReLU(0.2)
        self.second = nn.Conv2d(channels, 5, 3, 2, 1)  # (N, 5, 4, 4)
        self.last = nn.Linear(80, 1)

    def features(self, x):
        return self.activation(self.between(self.first(x)))

    def forward(self, x):
        return self.last(self.activation(self.second(self.features(x))).flatten(1))


class Attributes(Critic):
    def __init__(self):
        super().__init__()
        self.scale, self.shift = torch.full((6, 1, 1), 0.7), 0.3

    def features(self, x):
        return F.relu(self.first(x) * self.scale.to(x.dtype) + self.shift)


class Remembers(Critic):
    def features(self, x):
        self.seen = super().features(x).detach()
        return super().features(x)


class Checkpointed(Critic):
    def features(self, x):
        return checkpoint(super().features, x, use_reentrant=False)


class Scales(Critic):
    def forward(self, x):
        h = self.features(x)
        score = self.second.weight[:1, :, :1, :1]
        return [F.conv2d(h, score), F.conv2d(F.avg_pool2d(h, 2), score)]


class Tied(Critic):
    def __init__(self):
        super().__init__(nn.Conv2d(6, 6, 3, 1, 1))
        self.again = nn.Conv2d(6, 6, 3, 1, 1)
        self.again.weight = self.between.weight

    def features(self, x):
        return F.relu(self.again(F.relu(super().features(x))))


class Attention(Critic):
    def features(self, x):
        h = self.first(x).flatten(2)  # (N, 6, 64)
        return (h @ (h.mT @ h).mul(0.1).softmax(-1)).view(-1, 6, 8, 8)


class Residual(Critic):
    def features(self, x):
        h = self.first(x)
        return h + F.interpolate(F.avg_pool2d(F.relu(h), 2), scale_factor=2) / 2


class Hooked(Critic):
    def __init__(self):
        super().__init__()
        self.first.register_forward_hook(lambda module, inputs, output: output * 0.5)


class Multiplied(Critic):
    """Modules of one and three dimensions, and a transposed convolution."""

    def __init__(self):
        super().__init__()
        self.along = nn.Conv1d(6, 6, 3, 1, 1)
        self.up = nn.ConvTranspose2d(6, 6, 3, 1, 1)
        self.deep = nn.Conv3d(1, 1, 3, 1, 1)

    def features(self, x):
        h = self.up(F.relu(self.first(x)))
        h = self.along(F.relu(h).flatten(2)).view(-1, 6, 8, 8)
        return self.deep(F.relu(h)[:, None])[:, 0]


def spectral(norm, fuse=False):
    model = Critic()
    for name in ("first", "second", "last"):
        norm(getattr(model, name))
    return fuse_spectral_norm(model) if fuse else model


def frozen(*names):
    model = Critic()
    for name in names:
        getattr(model, name).requires_grad_(False)
    return model


def weight_normed():
    model = Critic()
    parametrizations.weight_norm(model.second)
    return model


def converted():
    model = spectral(parametrizations.spectral_norm)
    assert fastgan.convert(model).replaced
    return model


def part_compiled():
    model = Critic(nn.Conv2d(6, 6, 3, 1, 1))
    model.between.compile(backend="aot_eager")
    return model


DISCRIMINATORS = {
    "leaky ReLU": Critic,
    "ReLU in place": lambda: Critic(activation=nn.ReLU(inplace=True)),
    "PReLU": lambda: Critic(activation=nn.PReLU()),
    "SiLU": lambda: Critic(activation=nn.SiLU()),
    "tanh": lambda: Critic(activation=nn.Tanh()),
    "batch norm": lambda: Critic(nn.BatchNorm2d(6)),
    "batch norm in evaluation": lambda: Critic(nn.BatchNorm2d(6)).eval(),
    "layer norm": lambda: Critic(nn.LayerNorm([6, 8, 8])),
    "group norm": lambda: Critic(nn.GroupNorm(3, 6)),
    "instance norm": lambda: Critic(nn.InstanceNorm2d(6, affine=True)),
    "spectral norm": lambda: spectral(parametrizations.spectral_norm),
    "fastgan's spectral norm": lambda: spectral(fnn.utils.spectral_norm),
    "fused spectral norm": lambda: spectral(parametrizations.spectral_norm, fuse=True),
    "fused spectral norm of the older hook": lambda: spectral(nn.utils.spectral_norm, fuse=True),
    "converted": converted,
    "weight norm": weight_normed,
    "minibatch stddev": lambda: Critic(fnn.MinibatchStdDev(4), channels=7),
    "minibatch discrimination": lambda: Critic(
        nn.Sequential(
            nn.Flatten(), nn.Linear(384, 12), fnn.MinibatchDiscrimination(12, 4, 3), nn.Unflatten(1, (4, 2, 2))
        ),
        channels=4,
    ),
    "max pooling": lambda: Critic(nn.MaxPool2d(3, 1, 1)),
    "reflection": lambda: Critic(nn.Sequential(nn.ReflectionPad2d(1), nn.AvgPool2d(3, 1))),
    "residual": Residual,
    "attention": Attention,
    "other convolutions": Multiplied,
    "tensors as attributes": Attributes,
    "features left on the module": Remembers,
    "checkpointed": Checkpointed,
    "several scales": Scales,
    "tied weights": Tied,
    "a forward hook": Hooked,
    "a frozen layer": lambda: frozen("first"),
    "all frozen but one": lambda: frozen("first", "last"),
    "a part compiled by itself": part_compiled,
}


def make(name):
    torch.manual_seed(0)
    model = DISCRIMINATORS[name]()
    if name == "minibatch discrimination":
        model.last = nn.Linear(5, 1)
    return model


def images(n=N):
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def loss_of(logits):
    parts = logits if isinstance(logits, list) else [logits]
    return sum(F.softplus(-part).mean() for part in parts)


def plain_penalty(logits, x):
    """R1 by PyTorch alone."""
    parts = logits if isinstance(logits, list) else [logits]
    (grad,) = torch.autograd.grad([part.sum() for part in parts], x, create_graph=True)
    return WEIGHT / 2 * grad.square().sum((1, 2, 3)).mean()


def gradient_penalty(discriminator, x):
    return loss_of(discriminator(x)) + fastgan.gradient_penalty(discriminator, x, kind="r1", weight=WEIGHT)


def logits_and_penalty(discriminator, x):
    logits, penalty = fastgan.logits_and_penalty(discriminator, x, kind="r1", weight=WEIGHT)
    return loss_of(logits) + penalty


def plain_gradient_penalty(discriminator, x):
    loss, points = loss_of(discriminator(x)), x.detach().requires_grad_()
    return loss + plain_penalty(discriminator(points), points)


def plain_logits_and_penalty(discriminator, x):
    points = x.detach().requires_grad_()
    logits = discriminator(points)
    return loss_of(logits) + plain_penalty(logits, points)


def both(discriminator, x):
    return gradient_penalty(discriminator, x) + logits_and_penalty(discriminator, x)


def plain_both(discriminator, x):
    return plain_gradient_penalty(discriminator, x) + plain_logits_and_penalty(discriminator, x)


PLAIN = {
    gradient_penalty: plain_gradient_penalty,
    logits_and_penalty: plain_logits_and_penalty,
    both: plain_both,
}
STEPS = (gradient_penalty, logits_and_penalty)


def gradients(model, loss):
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values()), allow_unused=True), strict=True))


def assert_same(actual, expected, tolerance):
    scale = max(grad.norm() for grad in expected.values() if grad is not None)
    for name, grad in expected.items():
        if grad is None or not grad.any():
            assert actual[name] is None or actual[name].norm() <= tolerance * scale, name
        else:
            error = (actual[name].to(grad.dtype) - grad).norm() / max(grad.norm(), 1e-3 * scale)
            assert error <= tolerance, f"{name}: {error:.1e}"


def assert_trains_alike(step, compiled, model, tolerance=1e-4):
    """Two steps against PyTorch in float64: gradients, and what they leave in parameters and buffers."""
    twin = copy.deepcopy(model).double()
    x = images()
    for _ in range(2):
        expected = gradients(twin, PLAIN[step](twin, x.double()))
        assert_same(gradients(model, compiled(model, x)), expected, tolerance)
        with torch.no_grad():
            for net in (model, twin):
                for name, parameter in net.named_parameters():
                    if expected.get(name) is not None:
                        parameter -= 0.01 * expected[name].to(parameter.dtype)
    for (name, value), wanted in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(value.to(wanted.dtype), wanted, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("step", STEPS if EVERYTHING else [both])
@pytest.mark.parametrize("name", DISCRIMINATORS)
def test_a_step_with_a_penalty_is_one_graph_with_pytorchs_numbers(name, step):
    assert_trains_alike(step, torch.compile(step, backend="aot_eager", fullgraph=True), make(name))


# A graph of this backend is the discriminator's own calls; the modes are the eager ones.
BY_BACKEND_EAGER = (
    list(DISCRIMINATORS) if EVERYTHING else ["leaky ReLU", "batch norm", "fused spectral norm", "checkpointed"]
)


@pytest.mark.parametrize("step", STEPS if EVERYTHING else [both])
@pytest.mark.parametrize("name", BY_BACKEND_EAGER)
def test_the_eager_backend_runs_the_eager_penalty_at_each_step(name, step):
    assert_trains_alike(step, torch.compile(step, backend="eager", fullgraph=True), make(name))


BY_INDUCTOR = (
    [name for name in DISCRIMINATORS if name != "a part compiled by itself"] if EVERYTHING else ["minibatch stddev"]
)


@pytest.mark.skipif(COMPILER is None, reason="Inductor needs a C++ compiler")
@pytest.mark.parametrize("step", STEPS if EVERYTHING else [both])
@pytest.mark.parametrize("name", BY_INDUCTOR)
def test_inductor_compiles_a_step(name, step):
    assert_trains_alike(step, torch.compile(step, fullgraph=True), make(name), tolerance=1e-3)


class Counted:
    """aot_eager, with the number of convolutions in what AOTAutograd recorded."""

    def __init__(self):
        self.convolutions = 0

    def __call__(self, graph, inputs):
        return aot_autograd(fw_compiler=self.count, bw_compiler=self.count)(graph, inputs)

    def count(self, graph, _):
        for node in graph.graph.nodes:
            if node.target is torch.ops.aten.convolution_backward.default:
                self.convolutions += sum(node.args[-1][:2])
            elif node.target is torch.ops.aten.convolution.default:
                self.convolutions += 1
        return make_boxed_func(graph.forward)


class CountedEagerly(torch.utils._python_dispatch.TorchDispatchMode):
    convolutions = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.convolution_backward.default:
            CountedEagerly.convolutions += sum(args[-1][:2])
        elif function is torch.ops.aten.convolution.default:
            CountedEagerly.convolutions += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", ["leaky ReLU", "batch norm in evaluation", "max pooling", "SiLU"])
def test_the_graph_holds_the_convolutions_of_the_eager_penalty(name, step):
    backend, model, x = Counted(), make(name), images()
    torch.compile(step, backend=backend, fullgraph=True)(model, x).backward()
    CountedEagerly.convolutions = 0
    with CountedEagerly():
        step(model, x).backward()
    assert backend.convolutions == CountedEagerly.convolutions > 0


def run(function, *inputs, backend="aot_eager", **options):
    return torch.compile(function, backend=backend, fullgraph=True, **options)(*inputs)


class Labeled(Critic):
    def __init__(self):
        super().__init__()
        self.classes = nn.Embedding(3, 80)

    def forward(self, x, y):
        h = self.activation(self.second(self.features(x))).flatten(1)
        return self.last(h) + (self.classes(y) * h).sum(1, keepdim=True)


WRAPPED = {
    "arguments": lambda model, x, y: fastgan.gradient_penalty(model, x, kind="r1", args=(y,)),
    "keywords": lambda model, x, y: fastgan.gradient_penalty(model, x, kind="r1", kwargs={"y": y}),
    "a lambda": lambda model, x, y: fastgan.gradient_penalty(lambda v: model(v, y) * 2, x, kind="r1"),
    "a partial": lambda model, x, y: fastgan.gradient_penalty(functools.partial(model, y=y), x, kind="r1"),
    "a bound method": lambda model, x, y: fastgan.gradient_penalty(model.forward, x, kind="r1", args=(y,)),
    "two modules": lambda model, x, y: fastgan.gradient_penalty(lambda v: model(v, y) + model(v * 2, y), x, kind="r1"),
}


@pytest.mark.parametrize("way", WRAPPED)
def test_the_discriminator_may_be_any_function_of_modules(way):
    model, x, y = Labeled(), images(), torch.tensor([0, 2, 1, 1])
    expected = gradients(model, WRAPPED[way](model, x, y))
    assert_same(gradients(model, run(WRAPPED[way], model, x, y)), expected, 1e-5)


class Pair(Critic):
    def forward(self, parts):
        a, b = parts.values() if isinstance(parts, dict) else parts
        return super().forward(a + b.relu()), a.mean()


def of_norms(norms):
    return norms.square() / 2


W = torch.tensor(2.0)
OPTIONS = {
    **{
        kind: lambda model, x, kind=kind: fastgan.gradient_penalty(lambda v: model((v, v))[0], x, x.flip(0), kind=kind)
        for kind in ("r2", "r1+r2", "zero-centered", "max-gp", "wgan-gp", "wgan-lp", "dragan")
    },
    "a function of the norms": lambda model, x: fastgan.gradient_penalty(model, (x, x), kind=of_norms, select=0),
    "two inputs": lambda model, x: fastgan.gradient_penalty(model, [x, x * 2], kind="r1", select=0),
    "a dict": lambda model, x: fastgan.gradient_penalty(model, {"a": x, "b": x}, kind="r1", select=lambda out: out[0]),
    "one pass": lambda model, x: fastgan.logits_and_penalty(model, (x, x * 2), select=0, weight=W)[1],
    "one pass, by sample": lambda model, x: (
        fastgan.logits_and_penalty(model, (x, x), select=0, reduction="none")[1] @ torch.arange(4.0)
    ),
    "dims": lambda model, x: fastgan.gradient_penalty(
        model, (x, x), kind="r1", select=0, dims=(2, 3), reduction="sum", weight=W
    ),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_gives_the_eager_penalty(option):
    model, x = Pair(), images()
    torch.manual_seed(3)
    expected = gradients(model, OPTIONS[option](model, x))
    torch.manual_seed(3)
    assert_same(gradients(model, run(OPTIONS[option], model, x)), expected, 1e-5)


def test_a_weight_that_is_learned_gets_its_gradient():
    model, weight = Critic(), nn.Parameter(torch.tensor(2.0))
    penalty = fnn.GradientPenalty("r1", weight)
    torch.compile(penalty, backend="aot_eager", fullgraph=True)(model, images()).backward()
    compiled, weight.grad = weight.grad, None
    penalty(model, images()).backward()
    torch.testing.assert_close(compiled, weight.grad)


def test_a_lazy_penalty_makes_two_graphs_and_keeps_its_count():
    model, x = Critic(), images()
    penalty, counter = fnn.GradientPenalty("r1", every=12), CompileCounter()
    twin = copy.deepcopy(penalty)
    compiled = torch.compile(lambda x: penalty(model, x), backend=counter, fullgraph=True)
    for _ in range(26):
        torch.testing.assert_close(compiled(x), twin(model, x))
    assert counter.frame_count == 2
    assert penalty.calls == twin.calls == 26 % 12


def test_a_generator_draws_as_in_eager_mode_and_another_one_is_not_mistaken_for_it():
    model, x = Critic(), images()

    def step(x, generator):
        return fastgan.gradient_penalty(model, x, x.flip(0), kind="dragan", generator=generator)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for seed in (1, 2):
        ours, theirs = (torch.Generator().manual_seed(seed) for _ in range(2))
        for _ in range(2):
            torch.testing.assert_close(compiled(x, ours), step(x, theirs))


def test_dropout_draws_as_in_eager_mode():
    model, x = Critic(nn.Dropout(0.5)), images()
    for step in STEPS:
        torch.manual_seed(3)
        expected = gradients(model, step(model, x))
        torch.manual_seed(3)
        assert_same(gradients(model, run(step, model, x)), expected, 1e-5)


def test_training_and_evaluation_are_different_graphs():
    model, x = Critic(nn.Dropout(0.5)), images()
    compiled = torch.compile(gradient_penalty, backend="aot_eager", fullgraph=True)
    compiled(model, x)
    torch.testing.assert_close(compiled(model.eval(), x), gradient_penalty(model, x))


@pytest.mark.parametrize("step", STEPS)
def test_another_batch_size_needs_no_further_graph_if_sizes_are_dynamic(step):
    model, counter, graphs = Critic(), CompileCounter(), []

    def compiled_by(graph, inputs):
        counter.frame_count += 1
        return aot_autograd(fw_compiler=lambda g, _: make_boxed_func(g.forward))(graph, inputs)

    compiled = torch.compile(step, backend=compiled_by, fullgraph=True, dynamic=True)
    for n in (4, 6, 5):
        expected = gradients(model, step(model, images(n)))
        assert_same(gradients(model, compiled(model, images(n))), expected, 1e-5)
        graphs.append(counter.frame_count)  # Dynamo may start anew while it makes the first
    assert graphs[0] == graphs[-1]


@pytest.mark.parametrize("step", STEPS)
def test_autocast_in_the_graph(step):
    model, x = Critic(), images()

    def mixed(model, x):
        with torch.autocast("cpu", torch.bfloat16):
            return step(model, x)

    assert_same(gradients(model, run(mixed, model, x)), gradients(model, mixed(model, x)), 2e-2)


def test_half_precision_parameters():
    model = Critic().bfloat16()
    expected = gradients(model, gradient_penalty(model, images().bfloat16()))
    assert_same(gradients(model, run(gradient_penalty, model, images().bfloat16())), expected, 2e-2)


def test_a_gradscaler_around_a_compiled_loss():
    model, x = Critic(), images()
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler.scale(run(logits_and_penalty, model, x)).backward()
    scaler.unscale_(optimizer)
    actual = {name: p.grad for name, p in model.named_parameters()}
    assert_same(actual, gradients(model, logits_and_penalty(model, x)), 1e-5)


def test_logits_computed_in_the_graph():
    model, x = Critic(fnn.MinibatchStdDev(4), channels=7), images().requires_grad_()

    def step(model, x):
        with fastgan.twice_differentiable():
            logits = model(x)
        return loss_of(logits) + fastgan.penalty_from_logits(logits, x, kind="r1", weight=WEIGHT)

    expected = gradients(model, step(model, x))
    assert_same(gradients(model, run(step, model, x)), expected, 1e-5)


def test_parameters_that_a_penalty_does_not_depend_on_get_zeros_and_none_as_in_eager_mode():
    model, x = Critic(), images()

    def step(model, x):
        return fastgan.gradient_penalty(model, x, kind="r1")

    compiled, eager = gradients(model, run(step, model, x)), gradients(model, step(model, x))
    assert (
        {name for name, grad in compiled.items() if grad is None}
        == {name for name, grad in eager.items() if grad is None}
        == {"last.bias"}
    )


def test_the_optimizers_step_is_in_the_graph():
    models = [Critic(), Critic()]
    models[1].load_state_dict(models[0].state_dict())
    x = images()
    for model, way in zip(models, (lambda f: torch.compile(f, backend="aot_eager"), lambda f: f), strict=True):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)

        def step(x, model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = logits_and_penalty(model, x)
            loss.backward()
            optimizer.step()
            return loss

        for _ in range(2):
            way(step)(x)
    for actual, expected in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(actual, expected)


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


class CubeRoots(Square):
    pass


class Custom(Critic):
    function = Square

    def features(self, x):
        return self.function.apply(self.first(x))


def test_a_custom_function_is_refused_or_exact():
    model, x = Custom(), images()
    with pytest.raises(RuntimeError, match=r"custom autograd\.Function"):
        run(gradient_penalty, model, x)
    torch.compiler.reset()
    model.function = torch._dynamo.allow_in_graph(CubeRoots)
    expected = gradients(model, gradient_penalty(model, x))
    assert_same(gradients(model, run(gradient_penalty, model, x)), expected, 1e-5)


class Broken(Critic):
    def features(self, x):
        h = self.first(x)
        torch._dynamo.graph_break()
        return h


@pytest.mark.parametrize("step", STEPS)
def test_a_discriminator_that_breaks_the_graph_runs_eagerly(step):
    assert_trains_alike(step, torch.compile(step, backend="aot_eager"), Broken())


def test_a_penalty_that_is_compiled_by_itself():
    model, x = Critic(), images()
    expected = fastgan.gradient_penalty(model, x, kind="r1")
    for whole in (True, False):
        compiled = torch.compile(fastgan.gradient_penalty, backend="aot_eager", fullgraph=whole)
        torch.testing.assert_close(compiled(model, x, kind="r1"), expected)


WRONG = {
    "kind must be one of": lambda model, x: fastgan.gradient_penalty(model, x, kind="r3"),
    "does not depend on its input": lambda model, x: fastgan.gradient_penalty(
        lambda v: model(v.detach()), x, kind="r1"
    ),
    "select=": lambda model, x: fastgan.gradient_penalty(lambda v: (model(v), v), x, kind="r1"),
    "computed from another": lambda model, x: fastgan.gradient_penalty(
        lambda v: [(h := v.mean(1, keepdim=True)), F.avg_pool2d(h, 2)], x, kind="r1"
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_raises_in_eager_mode_raises_in_a_graph(message):
    with pytest.raises(RuntimeError, match=message):
        run(WRONG[message], Critic(), images())


def test_without_gradients_it_raises_as_in_eager_mode():
    with torch.no_grad(), pytest.raises(RuntimeError, match="no_grad"):
        torch.compile(gradient_penalty, backend="aot_eager")(Critic(), images())


class Raises(Critic):
    def features(self, x):
        return super().features(x) * torch.linalg.inv(torch.zeros(8, 8))


def test_a_discriminator_that_raises_leaves_nothing_behind():
    with pytest.raises(RuntimeError, match="inv"):
        run(gradient_penalty, Raises(), images(), backend="eager")
    gradient_penalty(Critic(), images())
