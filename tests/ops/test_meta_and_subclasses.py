"""Tensors on meta and on unknown devices, and subclasses of Tensor."""

from __future__ import annotations

import copy
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastgan
from fastgan import backends, ops
from fastgan.nn.utils import fuse_spectral_norm
from fastgan.ops.bias_act import functions as activations
from fastgan.ops.bias_act.layout import ACTIVATIONS
from fastgan.ops.library import is_plain_class


def meta(*shape):
    return torch.empty(*shape, device="meta", requires_grad=True)


def constant(*shape):
    return torch.empty(*shape, device="meta")


OPS = {
    **{
        f"conv{n}d": (lambda x, n=n: getattr(ops, f"conv{n}d")(x, constant(4, 8, *[3] * n), constant(4)), [6] * n)
        for n in (1, 2, 3)
    },
    **{
        f"conv_transpose{n}d": (
            lambda x, n=n: getattr(ops, f"conv_transpose{n}d")(x, constant(8, 4, *[3] * n), constant(4), 2),
            [4] * n,
        )
        for n in (1, 2, 3)
    },
    **{f"avg_pool{n}d": (lambda x, n=n: getattr(ops, f"avg_pool{n}d")(x, 2), [16] * n) for n in (1, 2, 3)},
    **{f"bias_act {a}": (lambda x, a=a: ops.bias_act(x, constant(8), activation=a), [40, 40]) for a in ACTIVATIONS},
    **{
        name: (lambda x, name=name: getattr(activations, name)(x), [128, 128])
        for name in ("relu", "leaky_relu", "silu", "gelu", "tanh", "sigmoid", "softplus")
    },
    "relu in place": (lambda x: ops.relu(x, inplace=True), [40, 40]),
    "layer_norm": (lambda x: ops.layer_norm(x, (8, 32, 32)), [32, 32]),
    "group_norm": (lambda x: ops.group_norm(x, 2, constant(8), constant(8)), [32, 32]),
    "instance_norm": (lambda x: ops.instance_norm(x), [32, 32]),
    "batch_norm": (lambda x: ops.batch_norm(x, constant(8), constant(8), training=True), [32, 32]),
    "batch_norm in evaluation": (lambda x: ops.batch_norm(x, constant(8), constant(8)), [32, 32]),
    "linear": (lambda x: ops.linear(x, constant(5, 32)), [32]),
    "minibatch_discrimination": (lambda x: ops.minibatch_discrimination(x), [3]),
    "minibatch_stddev": (lambda x: ops.minibatch_stddev(x), [32, 32]),
    "spectral_norm": (lambda x: ops.spectral_norm([x], [constant(4)], [constant(8)])[0], []),
}
SHAPES = {
    "minibatch_discrimination": (4, 8),
    "minibatch_stddev": (4, 9, 32, 32),
    "spectral_norm": (4, 8),
    "linear": (4, 8, 5),
}


@pytest.mark.parametrize("name", OPS)
def test_an_op_on_meta_has_its_shape_and_two_derivatives(name):
    function, sizes = OPS[name]
    x = meta(4, 8, *sizes)
    y = function(x.sin())
    assert y.is_meta
    if name in SHAPES:
        assert y.shape == SHAPES[name]
    (grad,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), x)
    assert grad.shape == second.shape == x.shape


def test_a_backend_that_cannot_run_on_meta_names_the_device():
    with pytest.raises(backends.BackendUnavailable, match="meta"):
        ops.group_norm(meta(4, 8, 5, 5), 2, backend="triton")


BETWEEN = {
    "piecewise": lambda: [nn.LeakyReLU(0.2), nn.Conv2d(16, 16, 3, 1, 1), nn.ReLU(), nn.AvgPool2d(3, 1, 1)],
    "batch norm": lambda: [nn.BatchNorm2d(16), nn.LeakyReLU(0.2)],
    "group norm": lambda: [nn.GroupNorm(2, 16), nn.SiLU()],
    "spectral norm": lambda: [nn.utils.parametrizations.spectral_norm(nn.Conv2d(16, 16, 3, 1, 1)), nn.Tanh()],
    "stddev": lambda: [fastgan.nn.MinibatchStdDev(), nn.Conv2d(17, 16, 1)],
}
KINDS = ("wgan-gp", "wgan-lp", "max-gp", "dragan", "r1+r2")


def on_meta(between):
    return nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1), *between(), nn.Flatten(), nn.Linear(16 * 256, 1)).to("meta")


@pytest.mark.parametrize("prepare", [lambda model: model, fastgan.convert, fuse_spectral_norm], ids=["", "c", "f"])
@pytest.mark.parametrize("between", BETWEEN.values(), ids=BETWEEN)
def test_penalties_of_a_model_on_meta_are_scalars_with_gradients(between, prepare):
    model, x = on_meta(between), constant(8, 3, 16, 16)
    if prepare is not fuse_spectral_norm or between is BETWEEN["spectral norm"]:
        prepare(model)
    for kind in KINDS:
        penalty = fastgan.gradient_penalty(model, x, x, kind=kind)
        assert penalty.is_meta
        assert penalty.shape == ()
        penalty.backward()
    logits, penalty = fastgan.logits_and_penalty(model, x)
    assert (logits.shape, penalty.shape) == ((8, 1), ())
    (logits.mean() + penalty).backward()
    module = fastgan.nn.GradientPenalty("r1", every=2)
    assert module(model, x).shape == module(model, x).shape == ()
    assert model[0].weight.grad.shape == model[0].weight.shape


def test_explain_penalty_says_on_meta_what_it_says_elsewhere():
    model = on_meta(BETWEEN["piecewise"])
    assert fastgan.explain_penalty(model, constant(8, 3, 16, 16)) == "one pass"


UNKNOWN = """
    import torch
    from torch import nn
    from torch.utils import backend_registration
    backend_registration._setup_privateuseone_for_python_backend("strange")
    import fastgan
    from fastgan import backends, ops
    device = torch.device("strange")
    for op in ("bias_act", "group_norm", "minibatch_stddev", "spectral_norm", "minibatch_discrimination"):
        assert backends.select(op, device, torch.float32) == "reference", op
        try:
            backends.select(op, device, torch.float32, "triton")
        except backends.BackendUnavailable as error:
            assert "strange" in str(error), error
        else:
            raise AssertionError(op)
    assert not backends.is_known(device)
"""


def test_a_device_that_fastgan_does_not_know_is_pytorchs():
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(UNKNOWN)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_functions_of_an_unknown_device_are_pytorchs_own(monkeypatch):
    monkeypatch.setattr(backends, "_KNOWN", frozenset(("cuda", "meta")))
    x, w = torch.randn(2, 3, 8, 8, requires_grad=True), torch.randn(4, 3, 3, 3)
    assert type(ops.conv2d(x, w).grad_fn).__name__ == "ConvolutionBackward0"
    assert type(ops.conv_transpose2d(x, w.transpose(0, 1)).grad_fn).__name__ == "ConvolutionBackward0"
    assert type(ops.avg_pool2d(x, 2).grad_fn).__name__ == "AvgPool2DBackward0"


class Distribution(torch.Tensor):
    """A latent tensor that can draw itself, and whose ``to`` would lose the graph."""

    def to(self, *args, **kwargs):
        raise AssertionError("PyTorch's functions never call a method of a subclass")

    new_empty = detach = contiguous = to


class Counted(torch.Tensor):
    """A subclass with its own ``__torch_function__``."""

    calls = 0

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.calls += 1
        return super().__torch_function__(func, types, args, kwargs or {})


class Other(torch.Tensor):
    pass


def layers():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 1, 1),
        nn.BatchNorm2d(8),
        nn.LeakyReLU(0.2),
        nn.AvgPool2d(2),
        nn.ConvTranspose2d(8, 4, 4, 2, 1),
        nn.GroupNorm(2, 4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 3, 1),
        nn.Tanh(),
    ).double()


def second_order(model, x):
    y = model(x)
    (grad,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
    return y, grad, torch.autograd.grad(grad.square().sum(), list(model.parameters()), allow_unused=True)


def nodes_of(y):
    seen, waiting = set(), [y.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
    return {type(node).__name__ for node in seen}


@pytest.mark.parametrize("cls", [Distribution, Counted])
def test_a_subclass_that_spreads_through_a_model_has_pytorchs_results_and_types(cls):
    model = layers()
    twin = copy.deepcopy(model)
    draw = torch.randn(4, 3, 8, 8).double()
    x, z = draw.clone().as_subclass(cls).requires_grad_(), draw.clone().as_subclass(cls).requires_grad_()
    expected = second_order(twin, x)
    with fastgan.twice_differentiable():
        actual = second_order(model, z)
    assert type(actual[0]) is type(expected[0]) is cls
    for a, e in zip([*actual[:2], *actual[2]], [*expected[:2], *expected[2]], strict=True):
        assert (a is None) == (e is None)
        if a is not None:
            a, e = (torch.Tensor.as_subclass(t, torch.Tensor) for t in (a, e))
            torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-10)


def test_a_subclass_is_rerouted_unless_it_has_a_say_of_its_own():
    model = layers()
    rerouted = {}
    for cls in (torch.Tensor, Distribution, Counted):
        z = torch.randn(4, 3, 8, 8).double().as_subclass(cls).requires_grad_()
        with fastgan.twice_differentiable():
            rerouted[cls] = {name for name in nodes_of(model(z)) if name.startswith("_")}
    assert "_ConvolutionBackward" in rerouted[torch.Tensor]
    assert rerouted[Distribution] | {"_RectifyBackward", "_PiecewiseBackward"} == rerouted[torch.Tensor] | {
        "_RectifyBackward",
        "_PiecewiseBackward",
    }
    assert rerouted[Counted] == set()


def test_what_has_a_say():
    assert all(map(is_plain_class, (torch.Tensor, nn.Parameter, Distribution, Other)))
    assert not is_plain_class(Counted)
    assert not is_plain_class(torch._subclasses.FakeTensor)
    assert not is_plain_class(nn.UninitializedParameter)


def test_two_subclasses_together_are_left_to_pytorch():
    x = torch.randn(2, 3, 5, 5).as_subclass(Distribution)
    w = torch.randn(4, 3, 3, 3).as_subclass(Other)
    with pytest.raises(TypeError, match=r"dispatch failed|no implementation"):
        F.conv2d(x, w)
    with fastgan.twice_differentiable(), pytest.raises(TypeError, match=r"dispatch failed|no implementation"):
        F.conv2d(x, w)


@pytest.mark.parametrize("call", [lambda z: F.relu(z, True), lambda z: F.relu_(z), lambda z: F.silu(z, inplace=True)])
def test_a_subclass_in_place_stays_itself(call):
    leaf = torch.randn(5).as_subclass(Distribution).requires_grad_()
    with fastgan.twice_differentiable():
        z = leaf * 1
        assert call(z) is z
    z.sum().backward()
    assert leaf.grad is not None


def test_a_penalty_at_points_of_a_subclass():
    model, x = layers().append(nn.Flatten()).append(nn.Linear(192, 1).double()), torch.randn(4, 3, 8, 8).double()
    penalties = [
        fastgan.gradient_penalty(copy.deepcopy(model), points, kind="r1") for points in (x, x.as_subclass(Other))
    ]
    torch.testing.assert_close(penalties[0], torch.Tensor.as_subclass(penalties[1], torch.Tensor))


def test_a_penalty_at_points_of_a_subclass_gives_zeros_where_pytorch_does():
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 1)), torch.randn(4, 3, 8, 8)
    for penalty in (
        fastgan.gradient_penalty(model, x.as_subclass(Other), kind="r1"),
        fastgan.logits_and_penalty(model, x.as_subclass(Other), kind="r1")[1],
    ):
        model.zero_grad()
        penalty.backward()
        assert model[1].bias.grad is not None  # the bias before the ReLU
        assert not model[1].bias.grad.any()
        assert model[3].bias.grad is None
