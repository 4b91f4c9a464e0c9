"""Stand-ins of StyleGAN's code bases get fastgan's operations, imported before and after."""

from __future__ import annotations

import copy
import inspect
import sys
from unittest.mock import Mock

import pytest
import torch
from torch.nn import functional as F

import fastgan
from fastgan.launcher.compare import Recorder
from fastgan.launcher.timing import Unit
from fastgan.ops.upfirdn2d import native_kernels
from tests.drop_in.stand_in import imported, is_ours
from tests.harness import assert_close
from tests.ops.one_pass_problem import work
from tests.ops.upfirdn2d_problem import defined


@pytest.mark.parametrize("first", ["import", "patch"])
def test_the_functions_are_replaced_before_and_after_they_are_imported(first):
    if first == "patch":
        patch = fastgan.patch_torch_utils()
    networks = imported("networks")
    if first == "import":
        patch = fastgan.patch_torch_utils()
    assert is_ours(networks.upfirdn2d.upfirdn2d)
    assert is_ours(networks.bias_act.bias_act)
    assert is_ours(networks.filtered_lrelu)  # imported by name
    assert networks.upfirdn2d.setup_filter.__module__ == "torch_utils.ops.upfirdn2d"  # stays
    assert "torch_utils.ops.fma.fma" in patch.replaced


def test_every_function_of_the_table_is_there_to_be_replaced():
    patch = fastgan.patch_torch_utils()
    for name in ("networks", "op", "op.upfirdn2d", "basicsr.ops.upfirdn2d", "basicsr.ops.fused_act"):
        imported(name)
    functions = {name.rpartition(".")[2] for name in patch.replaced}
    assert functions == {
        *("upfirdn2d", "filter2d", "upsample2d", "downsample2d", "bias_act", "filtered_lrelu", "conv2d"),
        *("conv_transpose2d", "conv2d_resample", "grid_sample", "fma", "fused_leaky_relu"),
    }


X = torch.randn(2, 3, 9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
TAPS = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=torch.float64) / 8
PLANE = torch.outer(TAPS, torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64))
WEIGHT = torch.ones(6, 3, 3, 3, dtype=torch.float64).cumsum(1)
CALLS = {
    "upfirdn2d": [
        lambda f: f(X, TAPS, up=[2, 1], down=[1, 2], padding=[3, 2], gain=3),
        lambda f: f(X, PLANE, 2, 1, [2, 1, 2, 1], True, 4, "ref"),
        lambda f: f(X, None, padding=-1),
    ],
    "filter2d": [lambda f: f(X, PLANE, padding=[1, 2], gain=2), lambda f: f(X, TAPS, flip_filter=True)],
    "upsample2d": [lambda f: f(X, TAPS), lambda f: f(X, PLANE, up=[3, 2], padding=1)],
    "downsample2d": [lambda f: f(X, TAPS), lambda f: f(X, PLANE, down=[2, 3], padding=[1, 2, 0, 1])],
    "bias_act": [
        *(lambda f, a=a: f(X, X[0, :, 0, 0], act=a) for a in ("linear", "relu", "lrelu", "tanh", "sigmoid")),
        *(lambda f, a=a: f(X, X[0, :, 0, 0].float(), act=a, gain=2) for a in ("elu", "selu", "softplus", "swish")),
        lambda f: f(X, X[0, 0, :, 0], dim=2, act="lrelu", alpha=0.3, gain=2, clamp=1),
        lambda f: f(X, act="relu", clamp=-1),
    ],
    "filtered_lrelu": [lambda f: f(X, TAPS, PLANE, X[0, :, 0, 0], 2, 2, [5, 4, 6, 3], 1.5, 0.1, 0.5, True)],
    "conv2d_resample": [
        lambda f: f(X, WEIGHT, TAPS, down=2, padding=1),
        lambda f: f(X, WEIGHT, TAPS, up=2, padding=[1, 2], flip_weight=False),
        lambda f: f(X, WEIGHT[:, :1], groups=3, padding=1),
    ],
    "conv2d_gradfix.conv2d": [lambda f: f(X, WEIGHT, X[0, 0, :6, 0], 2, 1)],
    "conv2d_gradfix.conv_transpose2d": [lambda f: f(X, WEIGHT[:3], stride=2, padding=1, output_padding=1)],
    "grid_sample_gradfix.grid_sample": [lambda f: f(X, X[:, :2].permute(0, 2, 3, 1))],
    "fma": [lambda f: f(X, X[:1], X[0, :, :1])],
}


@pytest.mark.parametrize("name", CALLS)
def test_the_signatures_and_results_are_theirs(name):
    home, _, function = name.rpartition(".")
    home = home or {"filter2d": "upfirdn2d", "upsample2d": "upfirdn2d", "downsample2d": "upfirdn2d"}.get(name, name)
    module = imported(f"torch_utils.ops.{home}")
    theirs = getattr(module, function)
    expected = [call(theirs) for call in CALLS[name]]
    fastgan.patch_torch_utils()
    replaced = getattr(module, function)
    assert replaced is not theirs
    named = theirs.__closure__[0].cell_contents if theirs.__closure__ else theirs  # one is decorated
    assert [*inspect.signature(replaced).parameters] == [*inspect.signature(named).parameters]
    for call, want in zip(CALLS[name], expected, strict=True):
        assert_close(call(replaced), want, order=1)


def test_extensions_that_are_compiled_at_import_are_not():
    with pytest.raises((RuntimeError, OSError, ImportError)):
        imported("op")
    for name in [name for name in sys.modules if name.split(".")[0] == "op"]:
        del sys.modules[name]
    fastgan.patch_torch_utils()
    op = imported("op")
    x = X.float()
    want = F.leaky_relu(x + torch.ones(3)[:, None, None], 0.2) * 2**0.5
    torch.testing.assert_close(op.FusedLeakyReLU(3)(x), want)
    torch.testing.assert_close(op.fused_leaky_relu(x, negative_slope=0.5, scale=1.0), F.leaky_relu(x, 0.5))
    assert_close(op.upfirdn2d(X, PLANE, up=2, down=1, pad=(2, 1)), defined(X, PLANE, 2, 1, (2, 1, 2, 1)), order=0)
    assert_close(op.upfirdn2d(X, PLANE, (2, 1), 1, (2, 1, 3, 4)), defined(X, PLANE, (2, 1), 1, (2, 1, 3, 4)), order=0)


def test_basicsr_gets_them_too():
    package = imported("basicsr.ops.upfirdn2d")
    fastgan.patch_torch_utils()
    assert_close(package.upfirdn2d(X, PLANE, 2, 1, (2, 1)), defined(X, PLANE, 2, 1, (2, 1, 2, 1)), order=0)
    act = imported("basicsr.ops.fused_act")
    torch.testing.assert_close(act.fused_leaky_relu(X, None, scale=1.0), F.leaky_relu(X, 0.2))


def r1_by_hand(model, x):
    """R1 as in the training loops of the StyleGAN family."""
    x = x.detach().requires_grad_()
    logits = model(x)
    (grad,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
    return F.softplus(-logits).mean() + 5 * grad.square().sum((1, 2, 3)).mean()


def one_pass(model, x):
    logits, penalty = fastgan.logits_and_penalty(model, x, kind="r1", weight=10.0)
    return F.softplus(-logits).mean() + penalty


def test_a_discriminator_written_against_them_is_one_pass_exact_and_does_less(monkeypatch):
    networks = imported("networks")
    torch.manual_seed(0)
    plain = networks.Discriminator()
    model, x = copy.deepcopy(plain), torch.randn(4, 3, 16, 16)
    theirs = work(lambda: r1_by_hand(plain, x).backward())
    fastgan.patch_torch_utils()
    calls = []
    kernel = native_kernels.upfirdn2d
    monkeypatch.setattr(native_kernels, "upfirdn2d", lambda *a: calls.append(1) or kernel(*a))
    assert fastgan.explain_penalty(model, x) == "one pass"
    forward = work(lambda: model(x))
    assert calls
    spent = work(lambda: one_pass(model, x).backward())
    assert spent <= 4.1 * forward
    assert spent < 0.6 * theirs
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, plain.get_parameter(name).grad.double(), order=1)
    by_hand = copy.deepcopy(plain).requires_grad_()
    by_hand.zero_grad()
    assert work(lambda: r1_by_hand(by_hand, x).backward()) < 0.75 * theirs
    for name, parameter in by_hand.named_parameters():
        assert_close(parameter.grad, plain.get_parameter(name).grad.double(), order=1)


class Noisy(torch.nn.Module):
    """A bias, a linear layer's bias and a factor of noise, none of which the penalty depends on."""

    def __init__(self, call):
        super().__init__()
        self.conv, self.strength = torch.nn.Conv2d(3, 3, 3), torch.nn.Parameter(torch.ones(()))
        self.bias, self.last, self.call = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(1)), call

    def forward(self, x):
        x = self.conv(x)
        return self.call(x + self.strength * torch.ones_like(x), self.bias).sum((1, 2, 3)) + self.last


ACTIVATED = {
    "torch_utils.ops.bias_act": lambda f, x, b: f.bias_act(x, b, act="lrelu", clamp=256),
    "torch_utils.ops.filtered_lrelu": lambda f, x, b: f.filtered_lrelu(x, TAPS, TAPS, b, 2, 2, 3),
}


@pytest.mark.parametrize("name", ACTIVATED)
def test_a_penalty_leaves_zeros_and_none_where_theirs_does(name):
    module = imported(name)
    torch.manual_seed(0)
    model = Noisy(lambda x, b: ACTIVATED[name](module, x, b)).double()

    def penalized():
        model.zero_grad()
        x = X.clone().requires_grad_()
        (grad,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        grad.square().sum().backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    theirs = penalized()
    assert not theirs["strength"].any()
    assert theirs["last"] is None
    fastgan.patch_torch_utils()
    ours = penalized()
    for key, grad in theirs.items():
        assert (ours[key] is None) == (grad is None), key
        torch.testing.assert_close(ours[key], grad)


def test_rosinalitys_activation_leaves_zeros_without_cuda():
    fastgan.patch_torch_utils()
    fused, bias = imported("basicsr.ops.fused_act").fused_leaky_relu, torch.ones(3, requires_grad=True)
    x = X.float().requires_grad_()
    (grad,) = torch.autograd.grad(fused(x, bias).sum(), x, create_graph=True)
    grad.square().sum().backward()
    assert not bias.grad.any()


@pytest.mark.parametrize("role", ["PyTorch", "fastgan", "turns"])
def test_a_comparison_is_with_the_scripts_own_operations(role, tmp_path):
    networks = imported("networks")
    recorder = Recorder(role, 100, str(tmp_path / "found.pt"), 1)
    assert is_ours(networks.bias_act.bias_act) == (role != "PyTorch")
    if role == "turns":
        unit = Unit(torch.nn.Identity(), (), "script.py:1", recorder.way)
        session = Mock(units=[unit])
        ways = []
        for _ in range(8):
            step = unit.begin()
            step.start()
            step.lap()
            step.penalized = True
            ways.append(step.is_fused)
            step.end()
            recorder.stepped(session, torch.optim.SGD([torch.ones(1)]))
            assert is_ours(networks.bias_act.bias_act) == unit.is_next_fused()
        assert ways[0] is False  # PyTorch's
        assert True in ways
