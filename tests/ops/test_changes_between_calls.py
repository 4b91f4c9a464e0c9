"""A small discriminator changes after a penalty of it was remembered: the next penalties are still PyTorch's."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

import fastgan
from fastgan.ops.gradient_penalty import small
from fastgan.ops.gradient_penalty.called_modules import call_of

pytestmark = pytest.mark.small


class Critic(nn.Module):
    """Piecewise affine unless ``smooth``. The flags change what its forward does."""

    def __init__(self, smooth):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1)
        self.act, self.head = nn.Tanh() if smooth else nn.LeakyReLU(0.2), nn.Linear(8 * 36, 1)
        self.kept, self.between = [], None
        self.double()

    def forward(self, x):
        h = self.act(self.first(x))
        if self.between is not None:
            h = self.between(h)
        return self.head(self.act(self.second(h)).flatten(1))


def keep(D, h):
    if h.requires_grad:
        h.retain_grad()
        D.kept.append(h)
    return h


class Flagged(Critic):
    """Calls of functions that a penalty must notice, behind flags."""

    retains = attends = False

    def forward(self, x):
        h = self.first(x)
        if self.retains:
            keep(self, h)
        h = self.act(h)
        if self.attends:
            h = h + attention(h)
        return self.head(self.act(self.second(h)).flatten(1))


def attention(h):
    q = h.flatten(2).transpose(1, 2)
    return F.scaled_dot_product_attention(q, q, q).transpose(1, 2).reshape(h.shape)


def attention_by_hand(h):
    q = h.flatten(2).transpose(1, 2)
    weights = (q @ q.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1)
    return (weights @ q).transpose(1, 2).reshape(h.shape)


def hooked(register, hook):
    def change(D):
        register(D)(lambda *args: hook(D, *args))

    return change


def keep_output(D, module, args, output):
    keep(D, output)


def scaled_gradient(D, module, args, output):
    if output.requires_grad:
        output.register_hook(lambda grad: 2 * grad)


def with_forward(D):
    own = D.forward
    D.forward = lambda x: own(keep(D, 2 * x))


def attending(D):
    D.between = attention


def shared(D):
    D.first.weight = nn.Parameter(D.first.weight * 3)
    D.second.weight.register_hook(lambda grad: 2 * grad)


def doubled(D):
    def double(parameter):
        parameter.grad *= 2

    D.first.weight.register_post_accumulate_grad_hook(double)


def assigned(D):
    D.load_state_dict({name: 2 * value.detach() for name, value in D.state_dict().items()}, assign=True)


def swapped(D):
    for parameter in D.parameters():
        parameter.data = 1.5 * parameter.data


def frozen(D):
    D.first.requires_grad_(False)
    D.head.bias.requires_grad_(False)


CHANGES = {
    "nothing": lambda D: None,
    "retain_grad in a hook of a layer": hooked(lambda D: D.first.register_forward_hook, keep_output),
    "retain_grad in a hook of the activation": hooked(lambda D: D.act.register_forward_hook, keep_output),
    "retain_grad in a hook of the whole": hooked(lambda D: D.register_forward_hook, keep_output),
    "retain_grad in a hook before": hooked(lambda D: D.second.register_forward_pre_hook, lambda D, m, a: keep(D, a[0])),
    "retain_grad in a new forward": with_forward,
    "retain_grad in the new act": lambda D: setattr(D, "act", Keeping(D)),
    "retain_grad in a function between": lambda D: setattr(D, "between", lambda h: keep(D, h)),
    "a hook of an activation": hooked(lambda D: D.first.register_forward_hook, scaled_gradient),
    "a hook that changes the output": hooked(lambda D: D.first.register_forward_hook, lambda D, m, a, y: 2 * y),
    "a backward hook": hooked(lambda D: D.second.register_full_backward_hook, lambda D, m, i, o: (3 * i[0],)),
    "a hook before the backward": hooked(
        lambda D: D.second.register_full_backward_pre_hook, lambda D, m, o: (2 * o[0],)
    ),
    "a hook of a parameter": lambda D: D.first.weight.register_hook(lambda grad: 3 * grad),
    "a hook after accumulation": doubled,
    "another activation": lambda D: setattr(D, "act", nn.Softplus()),
    "an activation without a second derivative": lambda D: setattr(D, "act", nn.Hardsigmoid()),
    "attention between": attending,
    "spectral norm": lambda D: parametrizations.spectral_norm(D.second).eval(),
    "weight norm": lambda D: parametrizations.weight_norm(D.second),
    "pruning": lambda D: prune.l1_unstructured(D.second, "weight", 0.5),
    "another parameter with a hook": shared,
    "weights assigned": assigned,
    "weights swapped": swapped,
    "frozen layers": frozen,
    "evaluation mode": lambda D: D.eval(),
    "one module in evaluation mode": lambda D: D.second.eval(),
    "converted": lambda D: fastgan.convert(D),
}


class Keeping(nn.Module):
    def __init__(self, D):
        super().__init__()
        self.keep = lambda h: keep(D, h)

    def forward(self, h):
        return self.keep(F.relu(self.keep(h)))


def images(dtype=torch.float64):
    torch.manual_seed(1)
    return torch.randn(4, 3, 8, 8, dtype=dtype)


def by_fastgan(D, x, loss):
    if not loss:
        return fastgan.gradient_penalty(D, x, kind="r1")
    logits, penalty = fastgan.logits_and_penalty(D, x)
    return F.softplus(-logits).mean() + penalty


def by_hand(D, x, loss):
    x = x.detach().requires_grad_()
    logits = D(x)
    (g,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
    penalty = 5 * g.square().sum((1, 2, 3)).mean()
    return penalty + F.softplus(-logits).mean() if loss else penalty


def step(D, total):
    D.zero_grad()
    total.backward()
    grads = {name: p.grad for name, p in D.named_parameters() if p.grad is not None}
    return grads | {f"kept {i}": h.grad for i, h in enumerate(D.kept)}


def assert_equal(actual, expected, tolerance=1e-9):
    assert actual.keys() == expected.keys()
    for name, wanted in expected.items():
        if wanted is None:
            assert actual[name] is None, name
        else:
            torch.testing.assert_close(actual[name], wanted, rtol=tolerance, atol=tolerance)


def remembered(make, smooth, loss):
    """A discriminator with a remembered call, and an equal one that fastgan has never seen."""
    D = make(smooth)
    twin = copy.deepcopy(D)
    for _ in range(2):
        step(D, by_fastgan(D, images(), loss))
    call = call_of(D, (images(),) if loss else ("r1", images(), None))
    assert (small.left_to_pytorch(call) is None) == (make is Flagged)
    return D, twin


@pytest.mark.parametrize(
    ("smooth", "loss"), [(False, False), (False, True), (True, False)], ids=["affine", "affine, with loss", "smooth"]
)
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_discriminator(change, smooth, loss):
    D, twin = remembered(Critic, smooth, loss)
    for model in (D, twin):
        torch.manual_seed(2)
        CHANGES[change](model)
    if change == "attention between":
        twin.between = attention_by_hand
    if change == "an activation without a second derivative":
        twin.act = Hardsigmoid()
    for _ in range(2):
        D.kept, twin.kept = [], []
        actual, expected = step(D, by_fastgan(D, images(), loss)), step(twin, by_hand(twin, images(), loss))
        if change == "an activation without a second derivative":  # PyTorch has no zeros or None to compare with
            expected = {name: expected[name] for name in actual}
        assert_equal(actual, expected)


class Hardsigmoid(nn.Module):
    def forward(self, h):
        return F.relu6(h + 3) / 6


@pytest.mark.parametrize("loss", [False, True], ids=["penalty", "loss and penalty"])
@pytest.mark.parametrize("flag", ["retains", "attends"])
def test_a_flag_of_the_forward(flag, loss, monkeypatch):
    D, twin = remembered(Flagged, False, loss)
    setattr(D, flag, True)
    setattr(twin, flag, True)
    for _ in range(2):
        D.kept, twin.kept = [], []
        actual = step(D, by_fastgan(D, images(), loss))
        with monkeypatch.context() as patched:
            patched.setitem(globals(), "attention", attention_by_hand)
            assert_equal(actual, step(twin, by_hand(twin, images(), loss)))


@pytest.mark.parametrize("loss", [False, True], ids=["penalty", "loss and penalty"])
@pytest.mark.parametrize("mode", ["autocast", "anomaly", "float32"])
def test_another_mode(mode, loss):
    D, twin = remembered(Critic, False, loss)
    dtype = torch.float64 if mode == "anomaly" else torch.float32
    context = {"autocast": torch.autocast("cpu", torch.bfloat16), "anomaly": torch.autograd.detect_anomaly(False)}
    with context.get(mode, nullcontext()):
        for _ in range(2):
            actual = step(D.to(dtype), by_fastgan(D, images(dtype), loss))
            expected = step(twin.to(dtype), by_hand(twin, images(dtype), loss))
    scale = max(float(grad.abs().max()) for grad in expected.values())
    tolerance = {"autocast": 2e-2 * scale, "float32": 1e-5 * scale}.get(mode, 1e-9)
    assert_equal(actual, expected, tolerance)


def test_gradients_that_are_disabled_later():
    D, _ = remembered(Critic, False, False)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context, pytest.raises(RuntimeError, match="needs gradients"):
            by_fastgan(D, images(), False)
