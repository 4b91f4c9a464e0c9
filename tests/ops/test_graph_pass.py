"""Penalties of small discriminators whose graph of PyTorch's functions is piecewise affine."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint

import fastgan
from fastgan.ops.gradient_penalty import graph_pass
from fastgan.ops.gradient_penalty.graph_steps import KINDS
from fastgan.ops.gradient_penalty.small import Size, size_of
from tests.ops.one_pass_problem import work

pytestmark = pytest.mark.small
N = 3


@pytest.fixture(autouse=True)
def few_weights_suffice(monkeypatch):
    """Allow the pass for the small convolutions of these tests."""
    monkeypatch.setattr(graph_pass, "_LEAST_CONVOLVED", 0)


def test_a_convolution_of_few_weights_does_not_pay(monkeypatch):
    monkeypatch.undo()
    few, more = torch.zeros(8, 3, 4, 4), torch.zeros(16, 16, 4, 4)
    assert not graph_pass.pays_in_one_pass([few], samples=2)
    assert graph_pass.pays_in_one_pass([more], samples=2)
    assert not graph_pass.pays_in_one_pass([more.flatten(1)], samples=2)


class Net(nn.Module):
    """A convolution, a function of its features (N, 6, 8, 8), and one logit per sample."""

    def __init__(self, between, **parts):
        super().__init__()
        self.first, self.head, self.between = nn.Conv2d(3, 6, 3, 1, 1), nn.LazyLinear(1), between
        for name, part in parts.items():
            setattr(self, name, part)
        self.double()
        self(images())

    def forward(self, x):
        return self.head(self.between(self, F.leaky_relu(self.first(x), 0.2)).reshape(len(x), -1))


def images():
    return torch.randn(N, 3, 8, 8, dtype=torch.float64)


def parameter(*shape):
    return nn.Parameter(torch.randn(*shape, dtype=torch.float64))


def conv(*args, **options):
    return nn.Conv2d(*args, **options)


TAKEN = {
    "convolution": (lambda net, h: F.relu(net.more(h)), {"more": lambda: conv(6, 4, 3, 2, 1)}),
    "groups": (lambda net, h: h + net.more(h), {"more": lambda: conv(6, 6, 3, 1, 2, dilation=2, groups=3, bias=False)}),
    "transposed": (lambda net, h: net.more(h), {"more": lambda: nn.ConvTranspose2d(6, 4, 3, 2, 1, 1)}),
    "in place": (lambda net, h: F.leaky_relu_(F.relu_(net.more(h)) * 2, 0.1), {"more": lambda: conv(6, 4, 1)}),
    "average pool": (lambda net, h: F.avg_pool2d(h, 3, 2, 1, count_include_pad=False), {}),
    "max pool": (lambda net, h: F.max_pool2d(net.more(h), 3, 2, 1), {"more": lambda: conv(6, 6, 1)}),
    "mean": (lambda net, h: h.mean((2, -1)), {}),
    "sum": (lambda net, h: h.sum(1, keepdim=True).sum(-1).clone(), {}),
    "constants": (lambda net, h: -(h * 0.5 + 1) / 3 * torch.linspace(-1, 1, 8).double() / torch.arange(1, 9), {}),
    "reshapes": (lambda net, h: net.more(h.unsqueeze(1).squeeze(1).flatten(2).view(N, 6, 64)), {"more": nn.Identity}),
    "in-place shapes": (
        lambda net, h: (h * 1).unsqueeze_(1).squeeze_(1).unsqueeze_(2).squeeze_((2,)).unsqueeze_(4).squeeze_(),
        {},
    ),
    "1d": (lambda net, h: net.more(h.flatten(2)), {"more": lambda: nn.Conv1d(6, 2, 3)}),
    "products": (
        lambda net, h: F.relu(net.more(h.flatten(1))) @ net.matrix,
        {"more": lambda: nn.Linear(384, 5, bias=False), "matrix": lambda: parameter(5, 5)},
    ),
    "shared": (lambda net, h: net.more(F.relu(net.more(h))), {"more": lambda: conv(6, 6, 3, 1, 1)}),
    "computed": (lambda net, h: net.more(h), {"more": lambda: spectral_norm(conv(6, 6, 3))}),
    "scaled": (
        lambda net, h: F.conv2d(h, net.w * 0.3, net.b),
        {"w": lambda: parameter(4, 6, 3, 3), "b": lambda: parameter(4)},
    ),
    "branches": (lambda net, h: F.relu(net.more(h)) + h * 2, {"more": lambda: conv(6, 6, 1)}),
}
REFUSED = {
    "smooth": (lambda net, h: torch.tanh(h), {}),
    "batch norm": (lambda net, h: net.more(h), {"more": lambda: nn.BatchNorm2d(6)}),
    "a parameter is added": (lambda net, h: h + net.p, {"p": lambda: parameter(6, 1, 1)}),
    "a parameter is a factor": (lambda net, h: h * net.p, {"p": lambda: parameter(6, 1, 1)}),
    "a computed bias": (
        lambda net, h: F.conv2d(h, net.w, net.b * 2),
        {"w": lambda: parameter(4, 6, 3, 3), "b": lambda: parameter(4)},
    ),
    "a square": (lambda net, h: h * h, {}),
    "a quotient": (lambda net, h: 1 / (h.abs() + 1), {}),
    "samples mixed": (lambda net, h: h + h.flip(0), {}),
    "samples mixed by a mean": (lambda net, h: h - h.mean(0), {}),
    "samples broadcast": (lambda net, h: h[:, 0, 0, :N] + h[:, 0, 0, 0], {}),
    "a reshape across samples": (lambda net, h: h.view(6, N, 8, 8).relu().view(N, 6, 8, 8), {}),
    "a weight made from the input": (lambda net, h: F.conv2d(h, h[:, :, :3, :3] * 1), {}),
    "a hook": (lambda net, h: hooked(h * 1), {}),
    "a checkpoint": (lambda net, h: checkpoint(net.more, h, use_reentrant=False), {"more": lambda: conv(6, 6, 3)}),
    "a cast": (lambda net, h: h.float().double(), {}),
}


def hooked(h):
    if h.requires_grad:
        h.register_hook(lambda grad: 3 * grad)
    return h


def built(between, parts):
    torch.manual_seed(0)
    return Net(between, **{name: make() for name, make in parts.items()})


def by_hand(net, x, loss):
    x = x.detach().requires_grad_()
    y = net(x)
    (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    penalty = 1.5 * g.square().flatten(1).sum(1).mean()
    return penalty + uneven(y) if loss else penalty


def by_fastgan(net, x, loss):
    if not loss:
        return fastgan.gradient_penalty(net, x, kind="r1", weight=3.0)
    y, penalty = fastgan.logits_and_penalty(net, x, weight=3.0)
    return uneven(y) + penalty


def uneven(logits):
    return (F.softplus(-logits) * torch.arange(1, 1 + logits.numel()).view_as(logits)).sum()


def passes(total):
    waiting, seen = [total.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
    return any(type(node).__name__ == "_PenalizedBackward" for node in seen)


def assert_equal_gradients(net, twin, tolerance=1e-9):
    for (name, found), wanted in zip(net.named_parameters(), twin.parameters(), strict=True):
        assert (found.grad is None) == (wanted.grad is None), name
        if wanted.grad is not None:
            torch.testing.assert_close(
                found.grad,
                wanted.grad,
                rtol=tolerance,
                atol=tolerance / 100,
                msg=lambda text, name=name: f"{name}: {text}",
            )


@pytest.mark.parametrize("loss", [False, True], ids=["penalty", "loss and penalty"])
@pytest.mark.parametrize("name", TAKEN)
def test_gradients_equal_pytorchs_also_where_they_are_zeros_or_none(name, loss):
    net = built(*TAKEN[name])
    twin, x = copy.deepcopy(net), images()
    for _ in range(2):  # the second call is known
        net.zero_grad()
        twin.zero_grad()
        total = by_fastgan(net, x, loss)
        expected = by_hand(twin, x, loss)
        assert passes(total), "the graph was not read"
        torch.testing.assert_close(total, expected, rtol=1e-12, atol=0)
        total.backward()
        expected.backward()
        assert_equal_gradients(net, twin)


def test_parameters_on_which_the_penalty_does_not_depend_get_no_gradient_and_no_hook_runs():
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3), nn.ReLU(), nn.Conv2d(6, 1, 4)).double()
    twin, x, seen = copy.deepcopy(net), images(), []
    net[3].bias.register_hook(seen.append)
    total = by_fastgan(net, x, False)
    assert passes(total)
    with torch.no_grad():
        net[0].bias.mul_(2)  # PyTorch saves no bias
    total.backward()
    by_hand(twin, x, False).backward()
    assert net[3].bias.grad is None
    assert not net[0].bias.grad.any()
    assert not seen
    assert_equal_gradients(net, twin)


@pytest.mark.parametrize("loss", [False, True], ids=["penalty", "loss and penalty"])
@pytest.mark.parametrize("name", REFUSED)
def test_other_graphs_are_left_to_pytorch(name, loss):
    net = built(*REFUSED[name])
    twin, x = copy.deepcopy(net), images()
    total = by_fastgan(net, x, loss)
    assert not passes(total)
    total.backward()
    by_hand(twin, x, loss).backward()
    assert_equal_gradients(net, twin, tolerance=1e-5 if name == "a cast" else 1e-9)


def test_activations_that_retain_their_gradient_get_pytorchs():
    def retained(net, h):
        net.kept = h * 1
        if h.requires_grad:
            net.kept.retain_grad()
        return net.kept

    net, twin, x = built(retained, {}), built(retained, {}), images()
    for _ in range(2):
        by_fastgan(net, x, True).backward()
        by_hand(twin, x, True).backward()
        torch.testing.assert_close(net.kept.grad, twin.kept.grad)


def test_a_constant_that_raises_the_dtype_is_left_to_pytorch():
    torch.manual_seed(0)
    net = nn.ModuleList([nn.Conv2d(3, 6, 3), nn.Linear(216, 1).double()])
    for name, change in (
        ("sum", lambda h: h + images()[0, 0, 0, 0].expand(216)),
        ("product", lambda h: h * images().sum(3).sum(1)[0, :1]),
    ):

        def model(x, change=change):
            return net[1](change(net[0](x).flatten(1)))

        total = fastgan.gradient_penalty(model, images().float(), kind="r1")
        assert not passes(total), name


def test_every_kind_of_node_is_compared_with_pytorch(monkeypatch):
    met = set()
    original = graph_pass.Graph._step

    def step(self, node, *args):
        met.add(type(node).__name__)
        return original(self, node, *args)

    monkeypatch.setattr(graph_pass.Graph, "_step", step)
    for between, parts in TAKEN.values():
        by_fastgan(built(between, parts), images(), True)
    # PyTorch chooses among nodes for the same function.
    assert set(KINDS) - met <= {"UnsafeViewBackward0", "ReshapeAliasBackward0", "SqueezeBackward0", "SqueezeBackward2"}


@pytest.mark.parametrize("loss", [False, True], ids=["penalty", "loss and penalty"])
def test_loss_and_penalty_cost_four_forwards(loss):
    net, x = built(*TAKEN["convolution"]), images()
    forward = work(lambda: net(x))
    assert work(lambda: by_fastgan(net, x, loss).backward()) <= 4.05 * forward
    assert work(lambda: by_hand(net, x, loss).backward()) > 5 * forward


def test_a_gradient_is_differentiable_again():
    net, x = built(*TAKEN["convolution"]), images()
    twin = copy.deepcopy(net)
    for model, function in ((net, by_fastgan), (twin, by_hand)):
        total = function(model, x, True)
        assert passes(total) == (model is net)
        first = torch.autograd.grad(total, [*model.parameters()], create_graph=True)
        sum(g.square().sum() for g in first).backward()
    assert_equal_gradients(net, twin)


def test_frozen_parameters_get_no_gradient():
    net, x = built(*TAKEN["convolution"]), images()
    net.first.weight.requires_grad_(False)
    net.more.bias.requires_grad_(False)
    twin = copy.deepcopy(net)
    total = by_fastgan(net, x, True)
    assert passes(total)
    total.backward()
    by_hand(twin, x, True).backward()
    assert_equal_gradients(net, twin)
    net.requires_grad_(False)
    assert not passes(fastgan.gradient_penalty(net, x, kind="r1"))


def test_hooks_of_parameters_run_once():
    net, calls = built(*TAKEN["shared"]), []
    net.more.weight.register_hook(lambda grad: calls.append(grad))
    by_fastgan(net, images(), True).backward()
    assert len(calls) == 1


def test_parameters_changed_before_the_backward_are_an_error():
    net = built(*TAKEN["convolution"])
    total = by_fastgan(net, images(), True)
    with torch.no_grad():
        net.more.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_a_graph_is_kept_if_the_backward_retains_it():
    net = built(*TAKEN["convolution"])
    total = by_fastgan(net, images(), True)
    total.backward(retain_graph=True)
    once = [p.grad.clone() for p in net.parameters()]
    total.backward()
    for p, before in zip(net.parameters(), once, strict=True):
        torch.testing.assert_close(p.grad, 2 * before)
    with pytest.raises(RuntimeError, match="second time"):
        total.backward()


def test_features_stored_by_the_forward_stay_differentiable():
    def storing(net, h):
        net.features = h
        return h

    net, x, twin = built(storing, {}), images(), built(storing, {})
    (by_fastgan(net, x, True) + net.features.square().sum()).backward()
    (by_hand(twin, x, True) + twin.features.square().sum()).backward()
    assert_equal_gradients(net, twin)


def test_a_penalty_without_the_loss_gives_the_same_zeros():
    for layers in ((nn.Conv2d(3, 6, 3), nn.Conv2d(6, 1, 6)), (nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 1, 6))):
        net = nn.Sequential(*layers, nn.Flatten()).double()
        twin, x = copy.deepcopy(net), images()
        fastgan.logits_and_penalty(net, x, weight=3.0)[1].backward()
        by_hand(twin, x, False).backward()
        assert_equal_gradients(net, twin)


def test_several_logits_per_sample_allow_the_pass_for_a_penalty_alone():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 1, 3)).double(), images()
    for loss in (False, True):
        net.zero_grad()
        twin = copy.deepcopy(net)
        total = by_fastgan(net, x, loss)
        assert passes(total) is not loss
        total.backward()
        by_hand(twin, x, loss).backward()
        assert_equal_gradients(net, twin)


def test_matrix_products_need_enough_work():
    def taken(width):
        net = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))
        return passes(fastgan.gradient_penalty(net, torch.randn(16, 4), kind="r1"))

    assert not taken(64)
    assert taken(512)


def test_the_pass_is_reported():
    assert fastgan.explain_penalty(built(*TAKEN["convolution"]), images()) == "one pass"
    assert "so small" in fastgan.explain_penalty(built(*REFUSED["smooth"]), images())


@pytest.mark.parametrize("call", [fastgan.gradient_penalty, fastgan.logits_and_penalty])
def test_a_known_call_that_does_not_pay_is_not_read(call, monkeypatch):
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    call(net, torch.randn(N, 4), kind="r1")
    monkeypatch.setattr(graph_pass.Graph, "read", lambda graph: pytest.fail("the graph was read"))
    call(net, torch.randn(N, 4), kind="r1")


@pytest.mark.small
@pytest.mark.parametrize("call", [fastgan.gradient_penalty, fastgan.logits_and_penalty])
def test_a_known_call_whose_graph_allows_no_pass_is_not_read_again(call, monkeypatch):
    net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.Tanh(), nn.Flatten(), nn.Linear(32 * 36, 1))
    x = torch.randn(8, 3, 8, 8)
    expected = call(net, x, kind="r1")
    monkeypatch.setattr(graph_pass.Graph, "read", lambda graph: pytest.fail("the graph was read"))
    again = call(net, x, kind="r1")
    for one, other in zip(
        expected if isinstance(expected, tuple) else (expected,),
        again if isinstance(again, tuple) else (again,),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_the_first_forward_takes_the_pass_if_only_its_count_shows_that_it_is_small():
    net = nn.Sequential(nn.Conv2d(3, 64, 4, 2, 1), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(64 * 16 * 16, 1)).double()
    x = torch.randn(8, 3, 32, 32, dtype=torch.float64)
    assert size_of(net, [x]) is Size.UNKNOWN
    copies = [copy.deepcopy(net) for _ in range(3)]
    for _ in range(2):
        assert fastgan.explain_penalty(copies[0], x) == "one pass"
    for ours in copies[1:]:
        for call in range(2):
            ours.zero_grad()
            if ours is copies[1]:
                logits, penalty = fastgan.logits_and_penalty(lambda x, ours=ours: ours(x), x, kind="r1")
            else:
                logits, penalty = fastgan.logits_and_penalty(ours, x, kind="r1")
            (logits.mean() + penalty).backward()
            if call == 0:
                first = [p.grad.clone() for p in ours.parameters()]
        assert all(torch.equal(a, p.grad) for a, p in zip(first, ours.parameters(), strict=True))
    leaf = x.clone().requires_grad_()
    logits = net(leaf)
    (g,) = torch.autograd.grad(logits.sum(), leaf, create_graph=True)
    (logits.mean() + g.square().sum((1, 2, 3)).mean() * 5).backward()
    for p, ours in zip(net.parameters(), copies[1].parameters(), strict=True):
        torch.testing.assert_close(ours.grad, p.grad)
