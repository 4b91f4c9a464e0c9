"""One pass with several logits per sample, several inputs, and further outputs."""

from __future__ import annotations

import copy
import gc
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastgan
from fastgan.ops.gradient_penalty.eligibility import Tracer
from fastgan.ops.gradient_penalty.one_pass import one_pass
from tests.ops.one_pass_problem import (
    Between,
    C,
    N,
    S,
    Y,
    assert_exact,
    by_pytorch,
    constant,
    gradients,
    images,
    parameter,
    softplus,
    uneven,
    work,
)
from tests.ops.test_one_pass_idioms import build


class Heads(nn.Module):
    """Return the features and the result of each head in a container."""

    def __init__(self, heads, container):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.heads, self.container = nn.Conv2d(3, C, 3, 2, 1), nn.ModuleList(heads), container
        self.double()

    def forward(self, x):
        h = F.leaky_relu(self.body(x), 0.2)
        return self.container([head(h) for head in self.heads])


class Output(NamedTuple):
    a: torch.Tensor
    b: torch.Tensor


def patches():
    return nn.Conv2d(C, 1, 3, 1, 1)


def pooled():
    return nn.Sequential(nn.Conv2d(C, 1, 3, 2, 1))


SEVERAL = "one pass, if the loss has the same gradient for all logits of a sample"
OUTPUTS = {
    "patches": ([patches], lambda parts: parts[0]),
    "scales": ([patches, pooled], list),
    "scales in a tuple": ([patches, pooled], tuple),
}
LOSSES = {
    "the same in a sample": lambda parts: sum(
        (p.flatten(1).sum(1) * torch.arange(1.0, 1 + len(p))).sum() for p in parts
    ),
    "mean": lambda parts: sum(p.mean() for p in parts),
    "other in each": lambda parts: sum(F.softplus(-p).mean() + p.square().sum() for p in parts),
    "one alone": lambda parts: parts[-1].sum(),
    "one unevenly": lambda parts: F.softplus(parts[0]).sum(),
}


def parts_of(output):
    return [output] if isinstance(output, torch.Tensor) else list(output)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", OUTPUTS)
def test_several_logits_a_sample_are_exact_whatever_the_loss(name, loss):
    heads, container = OUTPUTS[name]
    model = Heads([head() for head in heads], container)
    assert fastgan.explain_penalty(model, images()).startswith(SEVERAL)
    output, _ = fastgan.logits_and_penalty(model, images())
    assert type(output) is type(model(images()))
    assert_exact(model, images(), lambda output: LOSSES[loss](parts_of(output)))


def test_patches_with_one_gradient_a_sample_take_four_forwards_and_others_six():
    model = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1), nn.LeakyReLU(0.2), nn.Conv2d(16, 1, 3, 1, 1)).double()
    forward = work(lambda: model(images()))

    def step(loss):
        logits, penalty = fastgan.logits_and_penalty(model, images())
        (loss(logits) + penalty).backward()

    assert work(lambda: step(torch.mean)) <= 4.05 * forward
    assert work(lambda: step(softplus)) <= 6.05 * forward


class TwoHeads(nn.Module):
    """Return two maps and the features."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.first, self.second = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 2, 1), nn.Conv2d(8, 1, 3, 1, 1)
        self.double()

    def forward(self, x):
        h = F.leaky_relu(self.body(x), 0.2)
        return self.first(h), self.second(h), h


SELECTED = {
    "rows of patches": lambda output: output[1].flatten(1),
    "joined maps": lambda output: torch.cat([output[0].flatten(1), output[1].flatten(1)], 1),
    "a mean": lambda output: output[1].mean((2, 3)),
    "two means": lambda output: [output[0].mean((1, 2, 3)), output[1].mean((1, 2, 3))],
    "a map and a mean": lambda output: [output[1], output[0].mean((1, 2, 3))],
    "one channel": lambda output: output[0][:, 0].sum((1, 2)),
    "a difference": lambda output: output[0][:, 0] - output[0][:, 1],
    "a factor": lambda output: 2 * output[1] + 3,
    "weights": lambda output: output[1].flatten(1) @ torch.arange(1.0, 1 + output[1][0].numel()).double(),
}
# As means of a sample: one gradient, in proportion to the weights. As patches: other gradients.
OF_SELECTED = {
    "means": lambda parts: sum(F.softplus(-part.reshape(len(part), -1).mean(1)).mean() for part in parts),
    "patches": lambda parts: sum(F.softplus(-part).mean() for part in parts),
}


def assert_selection_is_exact(model, loss, select):
    twin, x = copy.deepcopy(model), images().requires_grad_()
    output = twin(x)
    (g,) = torch.autograd.grad(sum(part.sum() for part in parts_of(select(output))), x, create_graph=True)
    want = gradients(twin, loss(output) + 1.5 * g.square().sum((1, 2, 3)).mean())
    output, penalty = fastgan.logits_and_penalty(model, images(), kind="r1", weight=3.0, select=select)
    for name, grad in gradients(model, loss(output) + penalty).items():
        torch.testing.assert_close(grad, want[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("loss", OF_SELECTED)
@pytest.mark.parametrize("name", SELECTED)
def test_logits_that_select_computes_are_exact_in_one_pass(name, loss):
    model, select = TwoHeads(), SELECTED[name]
    assert fastgan.explain_penalty(model, images(), select=select).startswith(SEVERAL)

    def total(output):
        return OF_SELECTED[loss](parts_of(select(output))) + output[2].square().mean()

    assert_selection_is_exact(model, total, select)


def test_logits_that_select_computes_take_four_forwards_if_the_loss_is_in_proportion():
    model = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1), nn.LeakyReLU(0.2), nn.Conv2d(16, 1, 3, 1, 1)).double()
    forward = work(lambda: model(images()))

    def step(select, loss):
        logits, penalty = fastgan.logits_and_penalty(model, images(), select=select)
        (loss(select(logits)) + penalty).backward()

    for select in (lambda logits: logits.flatten(1), lambda logits: logits.mean((1, 2, 3))):
        assert work(lambda select=select: step(select, torch.mean)) <= 4.05 * forward
    assert work(lambda: step(lambda logits: logits.mean((1, 2, 3)), softplus)) <= 4.05 * forward
    assert work(lambda: step(lambda logits: logits.flatten(1), softplus)) <= 6.05 * forward


def test_selected_logits_that_are_not_affine_or_learned_name_the_call():
    model, gate = TwoHeads(), nn.Parameter(torch.ones(()).double())

    refused = {
        "tanh": lambda output: output[1].tanh(),
        "mixes the samples": lambda output: output[1] - output[1].mean(0),
        "select= uses a parameter": lambda output: output[1] * gate,
    }
    for reason, select in refused.items():
        assert reason in fastgan.explain_penalty(model, images(), select=select)
        assert_selection_is_exact(model, lambda output, select=select: softplus(select(output)), select)
    batch_norm = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 1, 1)).double()
    why = fastgan.explain_penalty(batch_norm, images(), select=lambda logits: logits.flatten(1))
    assert "batch_norm" in why


def test_selected_logits_that_also_depend_on_stored_features_take_the_general_path():
    model, stored = TwoHeads(), []
    model.body.register_forward_hook(lambda body, inputs, output: stored.append(output))

    def select(output):
        return [output[1].mean((1, 2, 3)), stored[-1][:, 0]]

    x = images().requires_grad_()
    parts = select(model(x))
    (g,) = torch.autograd.grad(sum(part.sum() for part in parts), x, create_graph=True)
    want = gradients(model, softplus(parts[0]) + 1.5 * g.square().sum((1, 2, 3)).mean())
    want = {name: grad.clone() for name, grad in want.items()}
    assert "not among the tensors" in fastgan.explain_penalty(model, images(), select=select)
    output, penalty = fastgan.logits_and_penalty(model, images(), kind="r1", weight=3.0, select=select)
    torch.testing.assert_close(gradients(model, softplus(select(output)[0]) + penalty), want)


def test_loss_and_penalty_of_patches_may_be_differentiated_apart():
    model = Heads([patches()], lambda parts: parts[0])
    for loss in (torch.mean, softplus):
        twin = copy.deepcopy(model)
        want = gradients(twin, by_pytorch(twin, images(), loss))
        logits, penalty = fastgan.logits_and_penalty(model, images(), kind="r1", weight=3.0)
        model.zero_grad()
        loss(logits).backward(retain_graph=True)
        penalty.backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad, want[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("change", ["input", "bias", "weight"])
def test_patches_notice_what_is_modified_before_the_backward(change):
    """PyTorch raises too if a backward needs a tensor that was modified in place since the forward."""
    model, x = nn.Conv2d(3, 1, 3).double(), images()
    logits, penalty = fastgan.logits_and_penalty(model, x, kind="r1")
    with torch.no_grad():
        {"input": x, "bias": model.bias, "weight": model.weight}[change].mul_(2)
    with pytest.raises(RuntimeError, match="modified"):
        (logits.mean() + penalty).backward()


def written(net, h):
    h = h * 1.0
    h[:, 0] = net.p[0, 0]
    return h


ADDED = {
    "added": lambda net, h: h + net.p,
    "added in place": lambda net, h: (h * 1.0).add_(net.p),
    "subtracted": lambda net, h: net.p - h,
    "a bias of a convolution": lambda net, h: F.conv2d(h, net.second.weight, net.p[0, :, 0, 0], padding=1),
    "a bias of a linear layer": lambda net, h: F.linear(h, net.w, net.p[0, 0, 0]),
    "written": written,
}


@pytest.mark.parametrize("patch", [False, True], ids=["one logit", "patches"])
@pytest.mark.parametrize("name", ADDED)
def test_a_constant_may_change_between_two_forwards_of_one_backward(name, patch):
    """A buffer of noise, a counter, or a running mean: PyTorch's sums save none of them."""

    def between(net, h):
        with torch.no_grad():
            net.p.mul_(-0.5).add_(1)
        h = ADDED[name](net, h)
        return F.leaky_relu(h, 0.2)

    def step(model, first):
        logits, penalty = first(model, images())
        (softplus(logits) + 2 * softplus(-model(images().flip(0))) + penalty).backward()
        return [p.grad for p in model.parameters()]

    def plain(model, x):
        x = x.detach().requires_grad_()
        logits = model(x)
        (g,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
        return logits, 1.5 * g.square().flatten(1).sum(1).mean()

    model = Between(between, p=constant(1, C, S, S)[:, : 4 if "convolution" in name else C].clone(), w=parameter(S, S))
    if patch:
        model.head = nn.Flatten()
    twin = copy.deepcopy(model)
    want = step(twin, plain)
    got = step(model, lambda model, x: fastgan.logits_and_penalty(model, x, kind="r1", weight=3.0))
    for actual, expected in zip(got, want, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("container", [dict, Output, list])
def test_what_else_is_returned_keeps_its_graph(container):
    """A class head beside the logit, chosen by the caller."""

    def pack(parts):
        return (
            container(zip("ab", parts, strict=True))
            if container is dict
            else container(*parts)
            if container is Output
            else parts
        )

    model = Heads(
        [nn.Sequential(nn.Flatten(), nn.Linear(C * 16, 1)), nn.Sequential(nn.Flatten(), nn.Linear(C * 16, 3))], pack
    )
    x = images().requires_grad_()
    with fastgan.twice_differentiable(), Tracer(x) as tracer:
        returned = model(x)
    logits = returned["a"] if container is dict else returned[0]
    assert tracer.find_obstacle([logits], returned) is None
    assert "have a backward of their own" in tracer.conditions()
    returned, penalty = one_pass(
        returned, [logits], (x,), tracer, lambda grads: 1.5 * grads[0].square().sum((1, 2, 3)).mean()
    )
    assert type(returned) is (container if container is not list else list)
    a, b = returned.values() if container is dict else returned
    got = gradients(model, softplus(a) + F.cross_entropy(b, Y) + penalty)
    twin = copy.deepcopy(model)

    def loss(output):
        a, b = output.values() if container is dict else output
        return softplus(a) + F.cross_entropy(b, Y)

    x = images().requires_grad_()
    output = twin(x)
    (g,) = torch.autograd.grad((output["a"] if container is dict else output[0]).sum(), x, create_graph=True)
    want = gradients(twin, loss(output) + 1.5 * g.square().sum((1, 2, 3)).mean())
    for name, w in want.items():
        torch.testing.assert_close(got[name], w, rtol=1e-9, atol=1e-12)


def test_several_inputs_are_differentiated_together():
    torch.manual_seed(0)
    image, text, head = (m.double() for m in (nn.Conv2d(3, 4, 4, 4), nn.Linear(5, 8), nn.Linear(24, 1)))
    model = nn.ModuleList([image, text, head])

    def forward(x, t):
        return head(torch.cat([F.leaky_relu(image(x), 0.2).flatten(1), F.leaky_relu(text(t), 0.2)], 1))

    def squares(grads):
        return sum(g.square().flatten(1).sum(1) for g in grads).mean()

    x, t = images().requires_grad_(), torch.randn(N, 5, dtype=torch.float64).requires_grad_()
    with fastgan.twice_differentiable(), Tracer(x, t) as tracer:
        logits = forward(x, t)
    assert tracer.find_obstacle([logits], logits) is None
    logits, penalty = one_pass(logits, [logits], (x, t), tracer, squares)
    got = gradients(model, uneven(logits) + penalty)
    logits = forward(x, t)
    want = gradients(model, uneven(logits) + squares(torch.autograd.grad(logits.sum(), (x, t), create_graph=True)))
    for name, w in want.items():
        torch.testing.assert_close(got[name], w, rtol=1e-9, atol=1e-12)


def test_a_penalty_that_has_parameters_of_its_own_gives_them_their_gradient():
    model = build("gate")
    target = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    x = images().requires_grad_()
    with fastgan.twice_differentiable(), Tracer(x) as tracer:
        logits = model(x)
    assert tracer.find_obstacle([logits], logits) is None
    _, penalty = one_pass(logits, [logits], (x,), tracer, lambda grads: (grads[0].square().sum() - target).square())
    (by_target,) = torch.autograd.grad(penalty, target)
    (g,) = torch.autograd.grad(model(x).sum(), x)
    torch.testing.assert_close(by_target, -2 * (g.square().sum() - target))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_idioms_under_autocast_are_as_near_as_autograds(dtype):
    for name in ("tokens", "position table", "cat with constants", "addmm", "equalized"):
        model = build(name).float()
        model.between = lambda net, h, between=model.between: between(net, h).float()
        x = images().float()
        exact = gradients(model, by_pytorch(model, x, softplus))
        errors = []
        for ours in (True, False):
            with torch.autocast("cpu", dtype):
                if ours:
                    logits, penalty = fastgan.logits_and_penalty(model, x, kind="r1", weight=3.0)
                    total = softplus(logits.float()) + penalty
                else:
                    total = by_pytorch(model, x, lambda logits: softplus(logits.float()))
            got = gradients(model, total)
            errors.append(sum((got[n] - w).norm() for n, w in exact.items()))
        assert errors[0] <= 2 * errors[1] + 1e-3 * sum(w.norm() for w in exact.values())


@pytest.mark.parametrize("loss", [softplus, uneven])
def test_what_the_forward_computes_and_throws_away_does_not_matter(loss):
    """The graph nodes of these results are gone when the pass looks for the constants that were added."""

    def between(net, h):
        for _ in range(3):
            net.second(h)
            F.leaky_relu(h + net.p, 0.2)
        gc.collect()
        return h + net.p

    model = Between(between, p=parameter(C, 1, 1))
    assert fastgan.explain_penalty(model, images()) == "one pass"
    assert_exact(model, images(), loss)
