"""Tracers record PyTorch's operations of spectral norm, never kernels or addresses."""

from __future__ import annotations

import copy
import io
import re
from itertools import product

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrizations

from fastgan import ops
from fastgan.nn import utils
from tests.harness import VERSION

X = torch.linspace(-1, 1, 2 * 2 * 4 * 4).reshape(2, 2, 4, 4)
FORMS = {
    "parametrization fused": (parametrizations.spectral_norm, parametrizations.spectral_norm, utils.fuse_spectral_norm),
    "hook fused": (nn.utils.spectral_norm, nn.utils.spectral_norm, utils.fuse_spectral_norm),
    "fastgan's": (parametrizations.spectral_norm, utils.spectral_norm, lambda model: model),
}


def build(norm):
    layers = norm(nn.Conv2d(2, 5, 3)), nn.LeakyReLU(0.2), norm(nn.ConvTranspose2d(5, 3, 2)), nn.Flatten()
    return nn.Sequential(*layers, norm(nn.Linear(27, 1)))


def pair(form):
    """Return PyTorch's model with converged u and v, and fastgan's from the same state."""
    theirs, ours, fuse = FORMS[form]
    twin, model = build(theirs), build(ours)
    with torch.no_grad():
        for _ in range(10):
            twin(X)
    model.load_state_dict(twin.state_dict())
    return fuse(model), twin


def saved(model, x):
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, (x,), check_trace=False), file)
    file.seek(0)
    return torch.jit.load(file)


def functional(mode, pre_dispatch):
    """make_fx of a function of parameters and buffers too: with fake tensors, they must be the function's inputs."""

    def trace(model, x):
        state = dict(model.named_parameters()) | dict(model.named_buffers())
        make = make_fx(
            lambda state, x: functional_call(model, state, (x,)), tracing_mode=mode, pre_dispatch=pre_dispatch
        )
        graph = make(state, x)
        return lambda x: graph(state, x)

    return trace


TRACERS = {
    "jit": lambda model, x: torch.jit.trace(model, (x,)),
    "jit, unchecked": lambda model, x: torch.jit.trace(model, (x,), check_trace=False),
    "jit, saved": saved,
    "export": lambda model, x: torch.export.export(model, (x,), strict=False).module(),
    "export, strict": lambda model, x: torch.export.export(model, (x,), strict=True).module(),
    "make_fx": lambda model, x: make_fx(model)(x),
    "make_fx, pre_dispatch": lambda model, x: make_fx(model, pre_dispatch=True)(x),
    **{f"make_fx, {mode}, {pre}": functional(mode, pre) for mode, pre in product(("fake", "symbolic"), (False, True))},
    "fx": lambda model, x: torch.fx.symbolic_trace(model),
    "fx, a part": lambda model, x: torch.fx.symbolic_trace(nn.Sequential(nn.Identity(), model)),
}
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")


@pytest.fixture(autouse=True)
def plain_memory(monkeypatch):
    monkeypatch.undo()  # poisoned memory cannot be traced


def outcome(trace, model, grad):
    """Return the traced model's results for two inputs and the state after them, or the class of the error."""
    try:
        with torch.set_grad_enabled(grad):
            traced = trace(model, X)
            churn = [torch.full((n,), float("nan")) for n in (3, 27, 90, 4000) for _ in range(20)]
            outputs = [traced(X).detach(), traced(1 - X).detach()]
            del churn
    except (RuntimeError, torch.jit.TracingCheckError, AssertionError) as error:
        return type(error)
    return [*outputs, *(value.clone() for value in model.state_dict().values())]


@pytest.mark.parametrize(("training", "grad"), [(False, True), (True, False)], ids=["eval with grad", "train"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tracer", TRACERS)
def test_a_traced_model_is_pytorchs(tracer, form, training, grad):
    if VERSION < (2, 11) and tracer == "export, strict":
        pytest.skip("before 2.11 Dynamo cannot trace fused spectral norm")
    model, twin = pair(form)
    model.train(training)
    twin.train(training)
    ours, theirs = (outcome(TRACERS[tracer], net, grad) for net in (model, twin))
    if isinstance(theirs, type):
        assert ours is theirs, "PyTorch's own cannot be traced in this way"
    else:
        assert not isinstance(ours, type), ours
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(model(X), twin(X), rtol=1e-4, atol=1e-5)
    copy.deepcopy(model)


@pytest.mark.parametrize("update", [False, True])
@pytest.mark.parametrize("tracer", ["jit", "make_fx", "fake", "pre_dispatch", "export"])
def test_the_operation_is_recorded_as_pytorchs(tracer, update):
    if VERSION < (2, 11) and tracer == "export":
        pytest.skip("before 2.11 it is exported as an operation of fastgan")
    weight, u, v = torch.randn(4, 6), torch.randn(4), torch.randn(6)

    class Normalized(nn.Module):
        def forward(self, w, u, v):
            return ops.spectral_norm([w], [u.clone()], [v.clone()], update=update)[0]

    call, inputs = Normalized(), (weight, u, v)
    traced = {
        "jit": lambda: torch.jit.trace(call, inputs),
        "make_fx": lambda: make_fx(call)(*inputs),
        "fake": lambda: make_fx(call, tracing_mode="fake")(*inputs),
        "pre_dispatch": lambda: make_fx(call, pre_dispatch=True)(*inputs),
        "export": lambda: torch.export.export(call, inputs).module(),
    }[tracer]()
    assert "fastgan" not in re.sub(r"#.*", "", str(traced.graph))  # comments name source files
    torch.testing.assert_close(traced(2 * weight + 1, v[:4], v), call(2 * weight + 1, v[:4], v))


def test_onnx_export_is_pytorchs():
    pytest.importorskip("onnx", reason="the onnx package is not installed")
    pytest.importorskip("onnxscript", reason="the onnxscript package is not installed")
    model, twin = pair("parametrization fused")
    programs = [torch.onnx.export(net.eval(), (X,), dynamo=True) for net in (model, twin)]
    ours, theirs = ([node.op_type for node in program.model.graph] for program in programs)
    assert ours == theirs
