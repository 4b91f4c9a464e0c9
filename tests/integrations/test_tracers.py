"""Recorded models contain PyTorch's operations only, and can be saved, loaded and run without fastgan."""

from __future__ import annotations

import io
from importlib import import_module

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fastgan
from fastgan import nn as fnn
from fastgan import ops
from tests.harness import VERSION, needs_dynamo

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:Using padding=.same."),
]
IMAGES = (8, 8, 16, 16)


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """Use kernels for small inputs too, and no graph of another test."""
    monkeypatch.undo()  # poisoned memory cannot be traced
    torch.compiler.reset()
    with fastgan.use_backend("cpu"):
        yield


class Calls(nn.Module):
    """A function of an input and of parameters of these shapes."""

    def __init__(self, function, *shapes):
        super().__init__()
        self.function = function
        self.names = [f"tensor{i}" for i in range(len(shapes))]
        for name, shape in zip(self.names, shapes, strict=True):
            self.register_parameter(name, nn.Parameter(torch.randn(shape) * 0.3))

    def forward(self, x):
        return self.function(x, *[getattr(self, name) for name in self.names])


def scaled(function):
    return Calls(lambda x, w: function(x * w), (1,))


OPS = {
    "conv1d": (lambda: Calls(ops.conv1d, (4, 8, 3), (4,)), (8, 8, 16)),
    "conv2d": (lambda: Calls(lambda x, w, b: ops.conv2d(x, w, b, 2, 1), (4, 8, 3, 3), (4,)), IMAGES),
    "conv2d, same": (lambda: Calls(lambda x, w: ops.conv2d(x, w, padding="same"), (4, 8, 4, 4)), IMAGES),
    "conv3d": (lambda: Calls(ops.conv3d, (4, 8, 3, 3, 3), (4,)), (4, 8, 4, 5, 6)),
    "conv_transpose1d": (lambda: Calls(ops.conv_transpose1d, (8, 4, 3), (4,)), (8, 8, 16)),
    "conv_transpose2d": (lambda: Calls(lambda x, w: ops.conv_transpose2d(x, w, None, 2), (8, 4, 3, 3)), IMAGES),
    "conv_transpose3d": (lambda: Calls(ops.conv_transpose3d, (8, 4, 3, 3, 3)), (4, 8, 4, 5, 6)),
    "linear": (lambda: Calls(ops.linear, (4, 16), (4,)), IMAGES),
    "relu": (lambda: scaled(ops.relu), IMAGES),
    "relu, in place": (lambda: scaled(lambda x: ops.relu(x, inplace=True)), IMAGES),
    "leaky_relu": (lambda: scaled(lambda x: ops.leaky_relu(x, 0.2)), IMAGES),
    "avg_pool1d": (lambda: scaled(lambda x: ops.avg_pool1d(x, 2)), (8, 8, 64)),
    "avg_pool2d": (lambda: scaled(lambda x: ops.avg_pool2d(x, 2)), IMAGES),
    "avg_pool3d": (lambda: scaled(lambda x: ops.avg_pool3d(x, 2)), (8, 8, 4, 4, 4)),
    "layer_norm": (lambda: Calls(lambda x, w, b: ops.layer_norm(x, IMAGES[1:], w, b), IMAGES[1:], IMAGES[1:]), IMAGES),
    "group_norm": (lambda: Calls(lambda x, w, b: ops.group_norm(x, 2, w, b), (8,), (8,)), IMAGES),
    "instance_norm": (lambda: Calls(lambda x, w, b: ops.instance_norm(x, weight=w, bias=b), (8,), (8,)), IMAGES),
    "batch_norm": (
        lambda: Calls(lambda x, w, b: ops.batch_norm(x, None, None, w, b, training=True), (8,), (8,)),
        IMAGES,
    ),
    "minibatch_discrimination": (
        lambda: Calls(lambda x, w: ops.minibatch_discrimination((x.flatten(1) @ w).view(-1, 5, 3)), (2048, 15)),
        IMAGES,
    ),
    "minibatch_stddev": (lambda: scaled(lambda x: ops.minibatch_stddev(x, group_size=4)), IMAGES),
    "MinibatchDiscrimination": (lambda: nn.Sequential(nn.Flatten(), fnn.MinibatchDiscrimination(2048, 5, 3)), IMAGES),
    "MinibatchStdDev": (lambda: nn.Sequential(nn.Conv2d(8, 8, 1), fnn.MinibatchStdDev(4)), IMAGES),
    **{
        f"bias_act, {name}": (
            lambda name=name: Calls(lambda x, b: ops.bias_act(x, b, activation=name, gain=1.5, clamp=2.0), (8,)),
            IMAGES,
        )
        for name in ("linear", "relu", "leaky_relu", "silu", "gelu", "gelu_tanh", "tanh", "sigmoid", "softplus")
    },
}


class Inside(nn.Module):
    """A model that is called inside twice_differentiable()."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        with fastgan.twice_differentiable():
            return self.model(x)


def discriminator():
    features = [nn.Conv2d(8, 16, 3), nn.LeakyReLU(0.2), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3), nn.GroupNorm(2, 16)]
    features += [nn.SiLU(), nn.AvgPool2d(2), nn.InstanceNorm2d(16), nn.ReLU(True), nn.LayerNorm(6), nn.Tanh()]
    return nn.Sequential(*features, nn.Flatten(), nn.Linear(576, 1)).eval()


@pytest.fixture
def rerouted_at_any_size(monkeypatch, kernels):
    """The forward of a large converted model, without a requested backend."""
    monkeypatch.setattr(import_module("fastgan.convert.reroute"), "_LEAST", 0)
    with fastgan.use_backend("auto"):
        yield


class MinibatchStdLayer(nn.Module):
    def forward(self, x):
        y = x.reshape(4, -1, *x.shape[1:])
        y = ((y - y.mean(0)).square().mean(0) + 1e-8).sqrt().mean([1, 2, 3], keepdim=True)
        return torch.cat([x, y.repeat(4, 1, *x.shape[2:])], 1)


def converted():
    model = nn.Sequential(discriminator()[:9], MinibatchStdLayer(), nn.Flatten(), nn.Linear(17 * 36, 1)).eval()
    assert fastgan.convert(model).replaced
    return model


MODELS = {"inside twice_differentiable": lambda: Inside(discriminator()), "converted": converted}


def traced_by_jit(model, x, check):
    traced, file = torch.jit.trace(model, x, check_trace=check), io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    return torch.jit.load(file), [node.kind() for node in traced.inlined_graph.nodes()]


def names_in(module):
    return [str(n.target) for m in module.modules() if hasattr(m, "graph") for n in m.graph.nodes]


def exported(model, x, strict):
    program = torch.export.export(model, (x,), strict=strict)
    return program.module(), names_in(program.graph_module)


def drafted(model, x):
    return torch.export.draft_export(model, (x,)).module(), []


def made(model, x, **options):
    graph = make_fx(model, _allow_non_fake_inputs=True, **options)(x)
    return graph, names_in(graph)


RECORDERS = {
    "jit.trace": lambda model, x: traced_by_jit(model, x, check=True),
    "jit.trace, unchecked": lambda model, x: traced_by_jit(model, x, check=False),
    "export": lambda model, x: exported(model, x, strict=False),
    "make_fx": made,
    "make_fx, fake": lambda model, x: made(model, x, tracing_mode="fake"),
    "make_fx, symbolic": lambda model, x: made(model, x, tracing_mode="symbolic"),
    "make_fx, pre_dispatch": lambda model, x: made(model, x, pre_dispatch=True),
}
OF_MODELS = {
    **RECORDERS,
    "export, strict": lambda model, x: exported(model, x, strict=True),
    "draft_export": drafted,
}


def assert_recorded_as_pytorch(model, shape, record):
    x = torch.randn(shape)
    with fastgan.use_backend("reference"):
        expected = [model(x), model(2 * x)]
    with fastgan.use_backend("reference"):
        wanted = torch.autograd.grad(expected[0].square().sum(), list(model.parameters()), allow_unused=True)
    recorded, names = record(model, x)
    assert not [name for name in names if "fastgan" in name or "PythonOp" in name or name.startswith("^")]
    _junk = [torch.full((100_000,), float("nan")) for _ in range(5)]  # reuses memory that the trace has freed
    for y, e in zip((recorded(x), recorded(2 * x)), expected, strict=True):
        torch.testing.assert_close(y, e, rtol=1e-4, atol=1e-4)
    assert recorded(x).requires_grad == any(g is not None for g in wanted)


@pytest.mark.parametrize("record", RECORDERS.values(), ids=RECORDERS)
@pytest.mark.parametrize("op", OPS)
def test_an_op_is_recorded_in_pytorchs_operations(op, record):
    make, shape = OPS[op]
    assert_recorded_as_pytorch(make(), shape, record)


@pytest.mark.usefixtures("rerouted_at_any_size")
@pytest.mark.parametrize("record", OF_MODELS.values(), ids=OF_MODELS)
@pytest.mark.parametrize("model", MODELS)
def test_a_model_is_recorded_in_pytorchs_operations(model, record):
    if (
        VERSION < (2, 11)
        and model == "inside twice_differentiable"
        and record in (OF_MODELS["export, strict"], drafted)
    ):
        pytest.skip("before 2.11 PyTorch cannot record it")
    assert_recorded_as_pytorch(MODELS[model](), IMAGES, record)


@pytest.mark.parametrize("op", OPS)
def test_an_op_is_a_node_of_a_symbolic_trace(op):
    make, shape = OPS[op]
    model, x = make(), torch.randn(shape)
    graph = torch.fx.symbolic_trace(model)
    with fastgan.use_backend("reference"):
        torch.testing.assert_close(graph(x), model(x))


@pytest.mark.usefixtures("rerouted_at_any_size")
def test_a_symbolic_trace_and_a_script_of_a_converted_model_are_those_of_the_original():
    model, plain, x = discriminator(), discriminator(), torch.randn(IMAGES)
    model.load_state_dict(plain.state_dict())
    fastgan.convert(model)
    assert "_ConvolutionBackward" in functions_behind(model(x))
    for record in (torch.fx.symbolic_trace, torch.jit.script):
        recorded, expected = record(model), record(plain)
        assert recorded.code == expected.code
        assert torch.equal(recorded(x), expected(x))
    assert type(model[0]) is nn.Conv2d


@pytest.mark.usefixtures("rerouted_at_any_size")
@pytest.mark.parametrize("model", MODELS)
def test_a_compiled_model_computes_in_pytorchs_form(model):
    if VERSION < (2, 11) and model == "inside twice_differentiable":
        pytest.skip("before 2.11 PyTorch cannot record it")
    model, x, names = MODELS[model](), torch.randn(IMAGES), []

    def backend(graph, inputs):
        names.extend(names_in(graph))
        return graph

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    assert "_ConvolutionBackward" in functions_behind(model(x))
    assert names
    assert not [name for name in names if "fastgan" in name]


@needs_dynamo
@pytest.mark.parametrize("op", OPS)
def test_a_compiled_op_gives_the_same(op):
    make, shape = OPS[op]
    model, x = make(), torch.randn(shape)
    results = []
    for function in (torch.compile(model, backend="aot_eager", fullgraph=True), model):
        y = function(x)
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), list(model.parameters()))])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


class DispatchLog(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class FunctionLog(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


WATCHING = {
    "FlopCounterMode": lambda: FlopCounterMode(display=False),
    "profile": lambda: torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]),
    "TorchDispatchMode": DispatchLog,
    "TorchFunctionMode": FunctionLog,
}


def functions_behind(y):
    found, left = set(), [y.grad_fn]
    while left:
        node = left.pop()
        found.add(type(node).__name__)
        left += [n for n, _ in node.next_functions if n is not None]
    return found


@pytest.mark.parametrize("watch", WATCHING)
def test_a_mode_that_only_watches_leaves_fastgans_ops_in_play(watch):
    model, x = discriminator(), torch.randn(IMAGES)
    with fastgan.twice_differentiable():
        expected = model(x)
    with WATCHING[watch](), fastgan.twice_differentiable():
        watched = model(x)
    assert functions_behind(watched) == functions_behind(expected)
    assert "_NormBackward" in functions_behind(watched)
    torch.testing.assert_close(watched, expected)
    with fastgan.twice_differentiable(), WATCHING[watch]():
        assert functions_behind(model(x)) == functions_behind(expected)


def test_a_recorder_below_a_mode_that_watches_is_seen():
    model, x = Inside(discriminator()), torch.randn(IMAGES)

    def watched(x):
        with DispatchLog(), FunctionLog():
            return model(x)

    for options in ({}, {"pre_dispatch": True}):
        graph, names = made(watched, x, **options)
        assert not [name for name in names if "fastgan" in name]
        torch.testing.assert_close(graph(x), fastgan.revert(model)(x), rtol=1e-4, atol=1e-4)
