"""Discriminators with one idiom each, PyTorch's gradients of loss and penalty, and the amount of work."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fastgan

N, C, S = 4, 6, 8  # samples, channels and pixels of the features
Y = torch.tensor([2, 0, 1, 2])  # classes


class Work(TorchDispatchMode):
    """Multiply-adds of every convolution, its backward, and every matrix product."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.__name__.split(".")[0]
        if name == "convolution":
            side = args[0] if args[6] else out
            self.total += side.shape[0] * side[0, 0].numel() * args[1].numel()
        elif name == "convolution_backward":
            side = args[1] if args[7] else args[0]
            self.total += sum(args[-1][:2]) * side.shape[0] * side[0, 0].numel() * args[2].numel()
        elif name in ("mm", "bmm", "mv"):
            self.total += args[0].numel() * (args[1].shape[-1] if args[1].ndim > 1 else 1)
        elif name in ("addmm", "baddbmm"):
            self.total += args[1].numel() * args[2].shape[-1]
        return out


def work(function):
    with Work() as count:
        function()
    return count.total


class Between(nn.Module):
    """A convolution, a function of its features (N, C, S, S), another convolution, and one logit per sample."""

    def __init__(self, between, **parameters):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, C, 3, 1, 1), nn.Conv2d(C, 4, 3, 1, 1)
        self.head = nn.LazyLinear(1)
        self.between = between
        for name, value in parameters.items():
            setattr(self, name, value)
        self.double()
        self(torch.randn(N, 3, S, S, dtype=torch.float64))

    def forward(self, x):
        h = self.between(self, F.leaky_relu(self.first(x), 0.2))
        if h.ndim == 4 and h.shape[1] == C:
            h = F.leaky_relu(self.second(h), 0.2)
        return self.head(h.reshape(len(h), -1))


def parameter(*shape):
    torch.manual_seed(7)
    return nn.Parameter(torch.randn(*shape, dtype=torch.float64))


def constant(*shape):
    torch.manual_seed(8)
    return torch.randn(*shape, dtype=torch.float64)


def softplus(logits):
    return F.softplus(-logits).mean()


def uneven(logits):
    """A loss whose gradient differs between logits."""
    return (logits * torch.linspace(-1, 2, logits.numel(), dtype=logits.dtype).view_as(logits)).sum() + softplus(logits)


def by_pytorch(model, x, loss, pick=lambda output: output):
    x = x.detach().requires_grad_()
    output = pick(model(x))
    outputs = [output] if isinstance(output, torch.Tensor) else output
    (g,) = torch.autograd.grad(sum(o.sum() for o in outputs), x, create_graph=True)
    return loss(output) + 1.5 * g.square().reshape(len(g), -1).sum(1).mean()


def gradients(model, total):
    model.zero_grad()
    total.backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}


def assert_exact(model, x, loss=softplus, pick=lambda output: output):
    twin = copy.deepcopy(model)
    torch.manual_seed(3)
    want = gradients(twin, by_pytorch(twin, x, loss, pick))
    torch.manual_seed(3)
    output, penalty = fastgan.logits_and_penalty(model, x, kind="r1", weight=3.0)
    got = gradients(model, loss(pick(output)) + penalty)
    scale = max(w.norm() for w in want.values())
    for name, w in want.items():
        error = (got[name] - w).norm() / max(w.norm(), 1e-3 * scale)
        assert error < 1e-9, f"{name}: {error:.1e}"


def assert_at_the_floor(model, x, most=4.05):
    forward = work(lambda: model(x))

    def step():
        logits, penalty = fastgan.logits_and_penalty(model, x, kind="r1", weight=3.0)
        (softplus(logits) + penalty).backward()

    spent = work(step) / forward
    assert spent <= most, f"{spent:.2f} forwards"


def images(n=N):
    torch.manual_seed(1)
    return torch.randn(n, 3, S, S, dtype=torch.float64)
