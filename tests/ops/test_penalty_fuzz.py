"""Random discriminators of affine and other operations: PyTorch's gradients in float64, and the promised work.

FASTGAN_FUZZ=5000 in the environment tries 5000 discriminators.
"""

from __future__ import annotations

import copy
import os

import torch
from torch import nn
from torch.nn import functional as F

import fastgan
from tests.hypothesis_if_there import given, settings, st
from tests.ops.one_pass_problem import work

EXAMPLES = int(os.environ.get("FASTGAN_FUZZ", "200"))
ALL = os.environ.get("FASTGAN_TESTS") == "all"
Y = torch.tensor([2, 0, 1, 2, 1, 0, 2, 2])


class Program(nn.Module):
    """A sequence of steps on features (N, ...). Parameters are created as it runs."""

    def __init__(self, steps, ending, shape):
        super().__init__()
        self.steps, self.ending = steps, ENDINGS[ending]
        self.made = nn.ParameterDict()
        self(torch.zeros(shape, dtype=torch.float64))

    def p(self, *shape):
        """A parameter of this step."""
        key = f"{self.at}_{self.count}"
        self.count += 1
        if key not in self.made:
            values = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(self.made)))
            self.made[key] = nn.Parameter(values / max(1, values[0].numel() if values.ndim > 1 else 1) ** 0.5)
        return self.made[key]

    def c(self, *shape):
        """A constant of this step."""
        seed = 1000 + self.at * 10 + self.count
        self.count += 1
        return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

    def forward(self, x):
        self.at, self.count = 0, 0
        h = F.leaky_relu(F.conv2d(x, self.p(6, x.shape[1], 3, 3), self.p(6), padding=1), 0.2)
        for at, (name, choice) in enumerate(self.steps, 1):
            self.at, self.count = at, 0
            changed = OPERATIONS[name](self, h, choice)
            h = h if changed is None or changed.numel() > 4000 else changed
        self.at, self.count = len(self.steps) + 1, 0
        return self.ending(self, h)


def conv(net, h, choice):
    if h.ndim != 4:
        return None
    out = (2, 4, 6)[choice % 3]
    if choice % 2:
        return F.conv2d(h, net.p(out, h.shape[1], 3, 3) * 0.7, net.p(out), padding=1)
    return F.conv_transpose2d(h, net.p(h.shape[1], out, 3, 3), net.p(out), padding=1)


def strided(net, h, choice):
    if h.ndim == 4 and min(h.shape[2:]) > 3:
        return F.conv2d(h, net.p(4, h.shape[1], 2, 2), stride=2) + net.p(4, 1, 1)
    return None


def linear(net, h, choice):
    return F.linear(h, net.p(5, h.shape[-1]), net.p(5) if choice % 2 else None) if h.ndim > 1 else None


def product(net, h, choice):
    if h.ndim < 3:
        return h @ net.p(h.shape[-1], 3) if h.ndim == 2 else None
    k = h.shape[-1]
    return (
        h @ net.p(k, 4),
        net.p(3, h.shape[-2]) @ h,
        torch.einsum("n...k,kl->n...l", h, net.p(k, 4)),
        torch.einsum("n...k,nk->n...", h, net.c(len(h), k)),
        torch.tensordot(h, net.p(k, 2), 1),
        torch.matmul(h.transpose(0, -2), net.p(k, k)).transpose(0, -2),
        torch.baddbmm(net.p(1, 2), h.flatten(1, -2), net.p(k, 2).expand(len(h), -1, -1)),
        torch.addmm(net.p(3), h.flatten(1), net.p(h[0].numel(), 3)),
    )[choice]


def added(net, h, choice):
    last, first = h.shape[-1], len(h)
    return (
        lambda: h + net.p(last),
        lambda: net.c(*h.shape) - h,
        lambda: h - 0.5,
        lambda: torch.add(h, net.p(1, *h.shape[1:]), alpha=0.5),
        lambda: torch.lerp(h, net.p(*h.shape[1:]), 0.25) if h.ndim > 1 else None,
        lambda: (h * 1).add_(net.p(last)).sub_(0.25),
        lambda: torch.addcmul(net.c(last), h, net.p(last), value=0.5),
        lambda: h + net.p(1) * net.c(first, *[1] * (h.ndim - 1)),
    )[choice]()


def scaled(net, h, choice):
    last = h.shape[-1]
    rows = (-1, *[1] * (h.ndim - 1))
    return (
        lambda: h * net.p(last),
        lambda: h * (net.c(*h.shape) > 0),
        lambda: h / (net.p(last).square() + 1),
        lambda: h * net.p(3, 1)[Y[: len(h)]].view(rows),
        lambda: (h * 1).mul_(net.p(last)).div_(2.0),
        lambda: h * h.detach().mean(),
        lambda: -h,
        lambda: h * torch.sigmoid(net.p(last)),
    )[choice]()


def bent(net, h, choice):
    return (
        lambda: F.relu(h),
        lambda: F.leaky_relu_(h * 1, 0.3),
        lambda: h.clamp(-0.5, 0.7),
        lambda: F.hardtanh(h, -0.4, 0.6),
        lambda: h.abs() - 0.3,
        lambda: torch.maximum(h, net.c(h.shape[-1])),
        lambda: torch.where(h > 0.1, h, net.p(h.shape[-1])),
        lambda: F.softshrink(h, 0.1) + F.threshold(h, 0.2, 0.1),
    )[choice]()


def largest(net, h, choice):
    if h.ndim < 3:
        return None
    return (
        lambda: h.amax(-1),
        lambda: h.max(1)[0],
        lambda: h.sort(-1).values,
        lambda: h.topk(2, -1)[0] if h.shape[-1] > 1 else None,
        lambda: F.max_pool2d(h, 3, 1, 1) if h.ndim == 4 else None,
        lambda: torch.maximum(h, 0.5 * h.flip(-1)),
        lambda: F.adaptive_max_pool2d(h, 2) if h.ndim == 4 else None,
        lambda: F.prelu(h, net.p(1)),
    )[choice]()


def dropped(net, h, choice):
    if h.ndim < 2:
        return None
    return (
        lambda: F.dropout(h, 0.3),
        lambda: F.dropout(h, 0.5, training=False),
        lambda: F.alpha_dropout(h, 0.2, True),
        lambda: F.dropout2d(h, 0.3) if h.ndim == 4 else None,
    )[choice % 4]()


def moved(net, h, choice):
    if h.ndim < 3:
        return None
    return (
        lambda: h.transpose(1, -1),
        lambda: h.flatten(1),
        lambda: h.flatten(0, 1).mul(net.p(h.shape[-1])).unflatten(0, h.shape[:2]),
        lambda: (
            (h.transpose(0, 1).reshape(-1, *h.shape[2:]) + 0.5).view(h.shape[1], len(h), *h.shape[2:]).transpose(0, 1)
        ),
        lambda: h.movedim(0, -1).roll(1, 0).movedim(-1, 0),
        lambda: h.repeat(2, *[1] * (h.ndim - 1)).view(2, *h.shape).sum(0),
        lambda: h.repeat_interleave(2, 0).view(len(h), 2 * h.shape[1], *h.shape[2:]),
        lambda: torch.stack([*h.unbind(1)][::-1], 1),
    )[choice]()


def picked(net, h, choice):
    if h.ndim < 3 or h.shape[1] < 2:
        return None
    return (
        lambda: h[:, 1:],
        lambda: h[:, [0, 1, 0]],
        lambda: h[torch.arange(len(h)), Y[: len(h)] % h.shape[1]],
        lambda: h.gather(1, (Y[: len(h)] % h.shape[1]).view(-1, *[1] * (h.ndim - 1)).expand(-1, 1, *h.shape[2:])),
        lambda: torch.cat([h[:, :1], net.p(1, 1, *h.shape[2:]).expand(len(h), -1, *[-1] * (h.ndim - 2))], 1),
        lambda: torch.cat([*h.chunk(2, 1)][::-1], 1),
        lambda: h[..., ::2],
        lambda: torch.cat([net.c(*h.shape), h], -1),
    )[choice]()


def summed(net, h, choice):
    if h.ndim < 3:
        return None
    return (
        lambda: h.mean(-1),
        lambda: h.sum(1, keepdim=True),
        lambda: h.cumsum(-1),
        lambda: h - h.mean(-1, keepdim=True),
    )[choice % 4]()


def resampled(net, h, choice):
    if h.ndim != 4 or min(h.shape[2:]) < 2:
        return None
    return (
        lambda: F.avg_pool2d(h, 2),
        lambda: F.interpolate(h, size=5, mode="bilinear"),
        lambda: F.interpolate(h, scale_factor=2),
        lambda: F.pad(h, (1, 0, 0, 1), value=0.3),
        lambda: F.pad(h, (1, 1, 1, 1), "reflect"),
        lambda: F.unfold(h, 2),
        lambda: F.adaptive_avg_pool2d(h, 3),
        lambda: F.conv2d(h.flatten(0, 1)[:, None], net.c(1, 1, 2, 2)).unflatten(0, h.shape[:2])[:, :, 0],
    )[choice]()


def parted(net, h, choice):
    """Take the samples apart and put them together again."""
    n, rest = len(h), h.shape[1:]
    order = net.c(n).argsort()
    mask = net.c(n) > 0

    def into_a_buffer():
        made, added = net.c(*h.shape), net.p(*rest)
        for i, row in enumerate(h):
            made[i] = row * (i + 1) + added
        return made

    def each():
        added = net.p(*rest)
        return torch.stack([row * (i + 1) + added for i, row in enumerate(h)][::-1])

    def over_some():
        made = h * 1.5
        made[mask] = F.leaky_relu(h[mask] + net.p(*rest), 0.3)
        return made

    def twice_in_any_order():
        rows = torch.cat([h, h * 2])
        to = torch.arange(n).repeat(2)
        mixed = net.c(2 * n).argsort()
        return net.p(n, *rest).index_add(0, to[mixed], rows[mixed])

    return (
        lambda: h[order],
        each,
        into_a_buffer,
        lambda: torch.cat([h[: n // 2] * net.p(*rest), h[n // 2 :] + net.p(*rest)]),
        over_some,
        lambda: (torch.cat([net.c(2, *rest), h]) * net.p(*rest) + 1)[2:],
        twice_in_any_order,
        lambda: h.flip(0).index_copy(0, order, h * net.p(*rest)),
    )[choice]()


def cast(net, h, choice):
    return h.float().to(torch.float64) if choice < 4 else h.type_as(net.p(1))


def residual(net, h, choice):
    return h + F.linear(F.relu(h), net.p(h.shape[-1], h.shape[-1])) if h.ndim > 1 else None


def mixed(net, h, choice):
    """A step that is not affine or that mixes samples."""
    return (
        lambda: torch.tanh(h),
        lambda: h - h.mean(0),
        lambda: h + 0.5 * h.flip(0),
        lambda: h * F.softplus(h),
        lambda: F.layer_norm(h, h.shape[1:]) if h.ndim > 1 and h[0].numel() > 2 else None,
        lambda: h.softmax(-1),
        lambda: h + h[torch.arange(len(h)).roll(1)],
        lambda: (
            h.sigmoid_() if h.ndim > 9 else h + (h.flatten(1) @ h.flatten(1).T).mean(1).view(-1, *[1] * (h.ndim - 1))
        ),
    )[choice]()


AFFINE = {
    f.__name__: f
    for f in (
        conv,
        strided,
        linear,
        product,
        added,
        scaled,
        bent,
        largest,
        dropped,
        moved,
        picked,
        summed,
        resampled,
        parted,
    )
} | {"cast": cast, "residual": residual}
OPERATIONS = AFFINE | {"mixed": mixed}


def one_logit(net, h):
    return F.linear(h.reshape(len(h), -1), net.p(1, h[0].numel()), net.p(1))


def flat_logit(net, h):
    return one_logit(net, h)[:, 0]


def row_of_classes(net, h):
    scores = F.linear(h.reshape(len(h), -1), net.p(3, h[0].numel()), net.p(3))
    return scores[torch.arange(len(h)), Y[: len(h)]]


def projection(net, h):
    h = h.reshape(len(h), -1)
    return one_logit(net, h) + (h * net.p(3, h.shape[1])[Y[: len(h)]]).sum(1, keepdim=True)


def patch_logits(net, h):
    return F.linear(h.reshape(len(h), -1), net.p(4, h[0].numel()), net.p(4)).view(len(h), 1, 2, 2)


def two_scales(net, h):
    return [patch_logits(net, h), patch_logits(net, 0.5 * h)]


ENDINGS = {f.__name__: f for f in (one_logit, flat_logit, row_of_classes, projection, patch_logits, two_scales)}


def each(output):
    return [output] if isinstance(output, torch.Tensor) else output


LOSSES = {
    "softplus": lambda output: sum(F.softplus(-o).mean() for o in each(output)),
    "mean": lambda output: sum(o.mean() for o in each(output)),
    "uneven": lambda output: sum((o.flatten() * torch.linspace(-1, 2, o.numel()).to(o)).sum() for o in each(output)),
    "relativistic": lambda output: sum((o - o.mean()).square().sum() for o in each(output)),
}


def by_pytorch(model, x, loss):
    x = x.detach().requires_grad_()
    output = model(x)
    (g,) = torch.autograd.grad(sum(o.sum() for o in each(output)), x, create_graph=True)
    return loss(output) + 1.5 * g.square().flatten(1).sum(1).mean()


def by_fastgan(model, x, loss):
    output, penalty = fastgan.logits_and_penalty(model, x, kind="r1", weight=3.0)
    return loss(output) + penalty


def gradients(model, make, *arguments):
    torch.manual_seed(3)
    model.zero_grad()
    make(model, *arguments).backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}


def check(steps, ending, loss, samples, size):
    x = torch.randn(samples, 2, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(3)
    model = Program(steps, ending, x.shape)
    want = gradients(copy.deepcopy(model), by_pytorch, x, LOSSES[loss])
    got = gradients(model, by_fastgan, x, LOSSES[loss])
    tolerance = 1e-4 if any(name == "cast" for name, _ in steps) else 1e-8
    scale = max(w.norm() for w in want.values())
    for name, w in want.items():
        error = (got[name] - w).norm() / max(w.norm(), 1e-3 * scale, 1e-6)
        assert error < tolerance, f"{name}: {error:.1e}"
    torch.manual_seed(3)
    said = fastgan.explain_penalty(model, x)
    if all(name != "mixed" for name, _ in steps):
        assert said.startswith("one pass"), said
    if (size == 6 or samples in (1, 6)) and not ALL:  # counting takes half of the time
        return
    if said == "one pass":
        spent = work(lambda: gradients(model, by_fastgan, x, LOSSES[loss])) / work(lambda: model(x))
        assert spent <= 4.05, f"{spent:.2f} forwards"
    elif said.startswith("one pass, where"):
        spent = work(lambda: gradients(model, by_fastgan, x, lambda output: sum(o.sum() for o in each(output))))
        assert spent <= 4.05 * work(lambda: model(x)), "of a loss with one gradient a sample"


STEP = st.tuples(st.sampled_from([*AFFINE, *AFFINE, *OPERATIONS]), st.integers(0, 7))


@settings(max_examples=EXAMPLES, deadline=None, print_blob=True)
@given(
    steps=st.lists(STEP, min_size=1, max_size=6),
    ending=st.sampled_from([*ENDINGS]),
    loss=st.sampled_from([*LOSSES]),
    samples=st.sampled_from([1, 2, 3, 4, 6]),
    size=st.sampled_from([4, 6]),
)
def test_a_random_discriminator_has_pytorchs_gradients_and_the_work_that_was_promised(
    steps, ending, loss, samples, size
):
    check(steps, ending, loss, samples, size)
