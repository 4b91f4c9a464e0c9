"""A fused model and an unfused copy go through the same random sequence of operations."""

from __future__ import annotations

import copy
from contextlib import suppress

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

from fastgan.nn import utils
from tests.hypothesis_if_there import given, settings, st

FORMS = {"parametrization": parametrizations.spectral_norm, "hook": nn.utils.spectral_norm}
X = torch.linspace(-1, 1, 4 * 2 * 5 * 5, dtype=torch.float64).sin().reshape(4, 2, 5, 5)


class Broken(Exception):
    pass


class Net(nn.Module):
    """Calls its parts in the order of a plan. "!" raises an error."""

    def __init__(self, norm):
        super().__init__()
        self.a = norm(nn.Conv2d(2, 3, 3, padding=1))
        self.b = norm(nn.ConvTranspose2d(3, 3, 3, padding=1))
        self.c = nn.Sequential(norm(nn.Conv2d(3, 3, 3, padding=1)), nn.Tanh(), norm(nn.Conv2d(3, 3, 1)))
        self.head = norm(nn.Linear(75, 1))

    def forward(self, x, plan="bc", reentrant=None):
        x = self.a(x)
        for name in plan:
            if name == "!":
                raise Broken
            part = getattr(self, name)
            y = part(x) if reentrant is None else checkpoint(part, x, use_reentrant=reentrant)
            x = torch.tanh(y) + x
        return self.head(x.flatten(1))


def converged(form):
    """A model in float64 with converged u and v. The first sigma of a hook may be about zero."""
    torch.manual_seed(0)
    model = Net(FORMS[form]).double()
    with torch.no_grad():
        for _ in range(10):
            model(X)
    return model


def backward(loss, model):
    """A step of gradient descent."""
    if loss.requires_grad:
        loss.backward()
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p -= 1e-2 * p.grad


# Operations on a model. Each returns values that must be equal too. `fused` tells which model it is.
def train(model, fused, plan):
    output = model(X, plan)
    backward(output.square().mean(), model)
    return [output]


def real_and_fake(model, fused, plan):
    loss = model(X, plan).mean() - model(0.5 - X, plan).mean()
    backward(loss, model)
    return [loss]


def penalty(model, fused, plan):
    x = X.clone().requires_grad_()
    (grad,) = torch.autograd.grad(model(x, plan).sum(), x, create_graph=True)
    backward((grad.flatten(1).norm(dim=1) - 1).square().mean(), model)
    return [grad]


def evaluate(model, fused, plan):
    model.eval()
    output = model(X, plan)
    backward(output.mean(), model)
    model.train()
    return [output]


def one_part_in_evaluation(model, fused, plan):
    model.c.eval()
    output = model(X, plan)
    model.c.train()
    return [output]


def without_gradients(model, fused, plan):
    with torch.no_grad():
        return [model(X, plan)]


def cached(model, fused, plan):
    with parametrize.cached():
        outputs = [model(X, plan), model(2 * X, "bb")]
    backward(outputs[0].mean() - outputs[1].mean(), model)
    return outputs


def broken_off(model, fused, plan):
    with suppress(Broken):
        model(X, plan + "!" + plan)
    return []


def checkpointed(model, fused, plan, reentrant=False):
    """PyTorch updates u and v again when it recomputes, so the copy restores them."""
    plan = "".join(dict.fromkeys(plan))  # each part once, because a recomputation uses the u and v of the last call
    output = model(X, plan, reentrant if fused else None)
    backward(output.square().mean(), model)
    return [output]


def checkpointed_reentrant(model, fused, plan):
    return checkpointed(model, fused, plan, reentrant=True)


def a_part_by_itself(model, fused, plan):
    return [model.c(torch.ones(1, 3, 4, 4, dtype=torch.float64)), *train(model, fused, plan)]


def regularize(model, fused, plan):
    """Return the weights after a forward. Reading a parametrized weight iterates once more."""
    output = model(X, plan)
    backward(output.mean() + model.a.weight.square().sum() + model.head.weight.abs().sum(), model)
    return [output]


def freeze(model, fused, plan):
    original = next(iter(model.b.parameters()))
    original.requires_grad_(not original.requires_grad)
    return train(model, fused, plan)


def swap_data(model, fused, plan):
    for p in model.parameters():
        p.data = (p.data * 1.1).clone()
    return train(model, fused, plan)


def load(model, fused, plan):
    state = {key: (value * 1.05).clone() for key, value in model.state_dict().items()}
    model.load_state_dict(state, assign=len(plan) % 2 == 0)
    return train(model, fused, plan)


ACTIONS = [
    *(train, real_and_fake, penalty, evaluate, one_part_in_evaluation, without_gradients, cached, broken_off),
    *(checkpointed, checkpointed_reentrant, a_part_by_itself, regularize, freeze, swap_data, load),
]


def copied(model, names=("weight", "original")):
    """PyTorch's older hook leaves a weight that cannot be copied, and pruning such an original."""
    for module in model.modules():
        for name in names:
            if isinstance(module.__dict__.get(name), torch.Tensor):
                setattr(module, name, module.__dict__[name].detach())
    return copy.deepcopy(model)


def pruned(model):
    torch.manual_seed(1)
    if parametrize.is_parametrized(model.b):
        prune.random_unstructured(model.b.parametrizations.weight, "original", 0.3)
    return model


def same(fused, twin, results, what):
    states = fused.state_dict(), twin.state_dict()
    assert list(states[0]) == list(states[1])
    grads = [{name: p.grad for name, p in model.named_parameters()} for model in (fused, twin)]
    assert [g is None for g in grads[0].values()] == [g is None for g in grads[1].values()], f"{what}: gradients"
    for kind, ours, theirs in (
        *(("result", ours, theirs) for ours, theirs in zip(*results, strict=True)),
        *((name, states[0][name], theirs) for name, theirs in states[1].items()),
        *((f"gradient of {name}", grads[0][name], theirs) for name, theirs in grads[1].items() if theirs is not None),
    ):
        close = torch.allclose(ours, theirs, rtol=1e-8, atol=1e-10)
        assert close, f"{what}: {kind} differs by {(ours - theirs).abs().max():.1e}"


def follow(form, steps):
    twin = converged(form)
    fused = utils.fuse_spectral_norm(copied(twin))
    for action, plan in steps:
        if action is copied:
            fused, twin = copied(fused, ["original"]), copied(twin)
        elif action is pruned:
            fused, twin = pruned(fused), pruned(twin)
        else:
            for model in (fused, twin):
                model.zero_grad()
            results = action(fused, True, plan), action(twin, False, plan)
            same(fused, twin, results, action.__name__)
        assert not any(key.startswith("_normalized") for m in fused.modules() for key in vars(m))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("plan", ["bc", "b", "cbc"])
@pytest.mark.parametrize("action", ACTIONS, ids=lambda action: action.__name__)
def test_each_leaves_a_fused_model_as_its_twin(action, plan, form):
    follow(form, [(action, plan), (train, "bc"), (action, plan)])


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=25, deadline=None)
@given(
    steps=st.lists(st.tuples(st.sampled_from([*ACTIONS, copied]), st.text("bc", max_size=3)), min_size=2, max_size=6),
    prune_at=st.integers(0, 8),
)
def test_any_sequence_leaves_a_fused_model_as_its_twin(form, steps, prune_at):
    follow(form, [*steps[:prune_at], (pruned, ""), *steps[prune_at:]] if form == "parametrization" else steps)
