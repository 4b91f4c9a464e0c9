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
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch.nn import functional as F
from torch.overrides import _get_current_function_mode_stack

import fastgan
from fastgan import backends
from fastgan import nn as fnn
from tests.harness import VERSION
from tests.integrations.compiled_problem import (
    DISCRIMINATORS,
    STEPS,
    WEIGHT,
    Counted,
    CountedEagerly,
    Critic,
    assert_same,
    assert_trains_alike,
    both,
    gradient_penalty,
    gradients,
    images,
    logits_and_penalty,
    loss_of,
    make,
)

pytestmark = [
    pytest.mark.skipif(
        tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11), reason="before 2.11 a penalty breaks the graph"
    ),
    # Dynamo reads .grad of tensors that the functions in the graph return. They are not leaves.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]
# FASTGAN_TEST_COMPILED=all runs every discriminator on every backend, with one graph per function.
EVERYTHING = os.environ.get("FASTGAN_TEST_COMPILED") == "all"
PARTITIONED = "aot_eager_decomp_partition"  # Inductor without its kernels: the backward computes values again
COMPILER = shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.undo()  # poisoned memory cannot be traced
    torch.compiler.reset()
    yield
    assert not _get_current_function_mode_stack()
    assert not backends.is_lowered()


@pytest.mark.parametrize("step", STEPS if EVERYTHING else [both])
@pytest.mark.parametrize("name", DISCRIMINATORS)
def test_a_step_with_a_penalty_is_one_graph_and_equals_pytorch(name, step):
    assert_trains_alike(step, torch.compile(step, backend=PARTITIONED, fullgraph=True), make(name))


# A graph of this backend is the discriminator's own calls; the modes are the eager ones.
BY_BACKEND_EAGER = (
    list(DISCRIMINATORS) if EVERYTHING else ["leaky ReLU", "batch norm", "fused spectral norm", "checkpointed"]
)


@pytest.mark.parametrize("step", STEPS if EVERYTHING else [both])
@pytest.mark.parametrize("name", BY_BACKEND_EAGER)
def test_the_eager_backend_runs_the_eager_penalty_at_each_step(name, step):
    assert_trains_alike(step, torch.compile(step, backend="eager", fullgraph=True), make(name))


BY_INDUCTOR = (
    [name for name in DISCRIMINATORS if name != "a compiled submodule"] if EVERYTHING else ["minibatch stddev"]
)


@pytest.mark.skipif(COMPILER is None, reason="Inductor needs a C++ compiler")
@pytest.mark.parametrize("step", STEPS if EVERYTHING else [both])
@pytest.mark.parametrize("name", BY_INDUCTOR)
def test_inductor_compiles_a_step(name, step):
    assert_trains_alike(step, torch.compile(step, fullgraph=True), make(name), tolerance=1e-3)


@pytest.mark.long
@pytest.mark.skipif(COMPILER is None, reason="Inductor needs a C++ compiler")
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_inductors_modes_compile_a_step(mode):
    step = logits_and_penalty
    assert_trains_alike(step, torch.compile(step, mode=mode, fullgraph=True), make("batch norm"), tolerance=1e-3)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", ["leaky ReLU", "batch norm", "batch norm in evaluation", "max pooling", "SiLU"])
def test_the_graph_holds_the_convolutions_of_the_eager_penalty(name, step):
    backend, eager, model, x = Counted(), CountedEagerly(), make(name), images()
    torch.compile(step, backend=backend, fullgraph=True)(model, x).backward()
    with eager:
        step(model, x).backward()
    assert backend.convolutions == eager.convolutions > 0


def run(function, *inputs, backend=PARTITIONED, **options):
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


def test_a_learned_weight_gets_its_gradient():
    model, weight = Critic(), nn.Parameter(torch.tensor(2.0))
    penalty = fnn.GradientPenalty("r1", weight)
    torch.compile(penalty, backend="aot_eager", fullgraph=True)(model, images()).backward()
    compiled, weight.grad = weight.grad, None
    penalty(model, images()).backward()
    torch.testing.assert_close(compiled, weight.grad)


def test_a_lazy_penalty_compiles_two_graphs_with_one_counter():
    model, x = Critic(), images()
    penalty, counter = fnn.GradientPenalty("r1", every=12), CompileCounter()
    twin = copy.deepcopy(penalty)
    compiled = torch.compile(lambda x: penalty(model, x), backend=counter, fullgraph=True)
    for _ in range(26):
        torch.testing.assert_close(compiled(x), twin(model, x))
    assert counter.frame_count == 2
    assert penalty.calls == twin.calls == 26 % 12


def test_each_generator_draws_the_same_numbers_as_in_eager_mode():
    model, x = Critic(), images()

    def step(x, generator):
        return fastgan.gradient_penalty(model, x, x.flip(0), kind="dragan", generator=generator)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for seed in (1, 2):
        ours, theirs = (torch.Generator().manual_seed(seed) for _ in range(2))
        for _ in range(2):
            torch.testing.assert_close(compiled(x, ours), step(x, theirs))


def test_dropout_draws_the_same_numbers_as_in_eager_mode():
    model, x = Critic(nn.Dropout(0.5)), images()
    for step in STEPS:
        torch.manual_seed(3)
        expected = gradients(model, step(model, x))
        torch.manual_seed(3)
        assert_same(gradients(model, run(step, model, x, backend="aot_eager")), expected, 1e-5)


def test_training_and_evaluation_use_different_graphs():
    model, x = Critic(nn.Dropout(0.5)), images()
    compiled = torch.compile(gradient_penalty, backend="aot_eager", fullgraph=True)
    compiled(model, x)
    torch.testing.assert_close(compiled(model.eval(), x), gradient_penalty(model, x))


OF_THE_BATCH = ("batch norm", "instance norm", "minibatch stddev")  # these read the number of samples


@pytest.mark.parametrize(
    ("name", "step"),
    [*(("leaky ReLU", step) for step in STEPS), *((name, gradient_penalty) for name in OF_THE_BATCH)],
)
def test_dynamic_graphs_work_for_other_batch_sizes(name, step):
    model, counter, graphs = make(name), CompileCounter(), []

    def compiled_by(graph, inputs):
        counter.frame_count += 1
        return aot_autograd(fw_compiler=lambda g, _: make_boxed_func(g.forward))(graph, inputs)

    compiled = torch.compile(step, backend=compiled_by, fullgraph=True, dynamic=True)
    for n in (8, 12, 16):
        twin = copy.deepcopy(model)  # has the same buffers
        expected = gradients(twin, step(twin, images(n)))
        assert_same(gradients(model, compiled(model, images(n))), expected, 1e-4)
        graphs.append(counter.frame_count)  # Dynamo may start anew while it makes the first
    assert graphs[0] == graphs[-1]


@pytest.mark.parametrize(
    ("kind", "generator"),
    [("wgan-gp", None), ("dragan", None), ("dragan", torch.Generator())],
    ids=["wgan-gp", "dragan", "generator"],
)
def test_a_dynamic_graph_draws_random_numbers_for_other_batch_sizes(kind, generator):
    model, counter = nn.Sequential(nn.Flatten(), nn.Linear(768, 1)), CompileCounterWithBackend("aot_eager")

    def step(x):
        return fastgan.gradient_penalty(lambda x: model(x.square()), x, x.flip(0), kind=kind, generator=generator)

    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=True)
    for n in (8, 5):
        results = []
        for function in (step, compiled):
            (generator or torch.default_generator).manual_seed(n)
            results.append(gradients(model, function(images(n))))
        assert_same(*results, 1e-5)
    assert counter.frame_count <= (1 if VERSION >= (2, 13) else 2)  # 2.11 compiles the second size, too


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


@pytest.mark.parametrize("function", [CubeRoots, Square])
def test_a_custom_function_raises_and_names_the_remedy(function):
    model, x = Custom(), images()
    model.function = function
    for step in (gradient_penalty, logits_and_penalty):
        with pytest.raises(RuntimeError, match=r"custom autograd\.Function.*torch\._dynamo\.allow_in_graph"):
            run(step, model, x)
        torch.compiler.reset()


def test_a_custom_function_that_dynamo_does_not_trace_is_exact():
    model, x = Custom(), images()
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


def test_a_compiled_function_may_hold_only_a_penalty():
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
def test_errors_are_the_same_as_in_eager_mode(message):
    with pytest.raises(RuntimeError, match=message):
        run(WRONG[message], Critic(), images())


def test_without_gradients_it_raises_as_in_eager_mode():
    with torch.no_grad(), pytest.raises(RuntimeError, match="no_grad"):
        torch.compile(gradient_penalty, backend="aot_eager")(Critic(), images())


class Raises(Critic):
    def features(self, x):
        return super().features(x) * torch.linalg.inv(torch.zeros(8, 8))


def test_state_is_restored_if_the_discriminator_raises():
    with pytest.raises(RuntimeError, match="inv"):
        run(gradient_penalty, Raises(), images(), backend="eager")
    gradient_penalty(Critic(), images())
