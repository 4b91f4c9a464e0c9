"""Random small discriminators: the pass through autograd's graph has PyTorch's gradients, also zeros and None.

FASTGAN_FUZZ=5000 in the environment tries 5000 discriminators.
"""

from __future__ import annotations

import copy
import os

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastgan.ops.gradient_penalty import graph_pass
from tests.hypothesis_if_there import given, settings, st
from tests.ops.test_graph_pass import assert_equal_gradients, by_fastgan, by_hand, passes

pytestmark = pytest.mark.small
EXAMPLES = int(os.environ.get("FASTGAN_FUZZ", "40"))


class Program(nn.Module):
    """Steps on features (N, C, H, W) or (N, F). It makes its parameters as it runs."""

    def __init__(self, steps, shape):
        super().__init__()
        self.steps, self.made = steps, nn.ParameterDict()
        self(torch.zeros(shape, dtype=torch.float64))

    def p(self, *shape):
        """A parameter with this shape. Every other step shares it with the steps before."""
        key = f"{shape}{'' if self.at % 2 else self.at}".replace(".", "")
        if key not in self.made:
            values = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(self.made)))
            self.made[key] = nn.Parameter(values / max(1, values[0].numel() if values.ndim > 1 else 1) ** 0.5)
        return self.made[key]

    def forward(self, x):
        h, before = x, x
        for at, (name, choice) in enumerate(self.steps):
            self.at = at
            changed = OPERATIONS[name](self, h, before, choice)
            if changed is not None and changed.numel() <= 4000:
                h, before = changed, h
        self.at = len(self.steps)
        h = h.reshape(len(h), -1)
        return F.linear(h, self.p(1, h.shape[1]), self.p(1))


def conv(net, h, before, choice):
    if h.ndim != 4:
        return None
    out, c = (2, 4, h.shape[1])[choice % 3], h.shape[1]
    return (
        lambda: F.conv2d(h, net.p(out, c, 3, 3), net.p(out), padding=1),
        lambda: F.conv2d(h, net.p(out, c, 3, 3) * 0.7, padding=1),
        lambda: F.conv2d(h, net.p(out, c, 2, 2), net.p(out), 2, 1),
        lambda: F.conv_transpose2d(h, net.p(c, out, 2, 2), net.p(out), 2),
    )[choice % 4]()


def product(net, h, before, choice):
    if h.ndim != 2:
        return None
    return (
        lambda: F.linear(h, net.p(5, h.shape[1]), net.p(5)),
        lambda: h @ net.p(h.shape[1], 5),
        lambda: F.linear(h, net.p(h.shape[1], h.shape[1])),
        lambda: F.linear(h, net.p(h.shape[1], 3).t().tanh(), net.p(3)),
    )[choice % 4]()


def bent(net, h, before, choice):
    return (
        lambda: F.relu(h),
        lambda: F.leaky_relu(h, 0.2),
        lambda: F.relu_(h * 1.5),
        lambda: F.leaky_relu_(h + 0.25, 0.3),
    )[choice % 4]()


def pooled(net, h, before, choice):
    if h.ndim != 4 or min(h.shape[2:]) < 3:
        return None
    return (
        lambda: F.avg_pool2d(h, 2),
        lambda: F.max_pool2d(h, 3, 1, 1),
        lambda: h.mean((2, 3), keepdim=True),
        lambda: h.sum(-1),
    )[choice % 4]()


def scaled(net, h, before, choice):
    return (
        lambda: h * 0.5,
        lambda: h * torch.linspace(-1, 1, h.shape[-1], dtype=h.dtype),
        lambda: -h / 3 + 1,
        lambda: h * (h.detach() > 0.1) + h.detach(),
        lambda: torch.arange(h.shape[-1]) * h,
        lambda: h / torch.arange(1, 1 + h.shape[-1]),
    )[choice % 6]()


def shaped(net, h, before, choice):
    return (
        lambda: h.flatten(1),
        lambda: h.unsqueeze(1).squeeze(1).clone(),
        lambda: h.view(len(h), 1, -1).squeeze(1),
        lambda: (h * 2).unsqueeze_(1).squeeze_(1),
    )[choice % 4]()


def summed(net, h, before, choice):
    if before.shape != h.shape:
        return h + h
    return (lambda: h + before, lambda: (h * 1).add_(before), lambda: before + 2 * h + before)[choice % 3]()


def refused(net, h, before, choice):
    return (
        lambda: torch.tanh(h),
        lambda: h - h.mean(0),
        lambda: h + net.p(h.shape[-1]),
        lambda: h * net.p(1),
        lambda: h * h.detach() * h,
        lambda: h + h.flip(0),
        lambda: h.transpose(0, 1).contiguous().view(h.shape) if h.shape[0] == h.shape[1] else None,
        lambda: torch.add(h, h, alpha=0.5),
    )[choice]()


AFFINE = {f.__name__: f for f in (conv, product, bent, pooled, scaled, shaped, summed)}
OPERATIONS = AFFINE | {"refused": refused}
STEP = st.tuples(st.sampled_from([*AFFINE, *AFFINE, *OPERATIONS]), st.integers(0, 7))


@settings(max_examples=EXAMPLES, deadline=None, print_blob=True)
@given(steps=st.lists(STEP, min_size=1, max_size=7), samples=st.sampled_from([1, 2, 4]), flat=st.booleans())
def test_a_random_small_discriminator_has_pytorchs_gradients(steps, samples, flat):
    torch.manual_seed(0)
    x = torch.randn(samples, *([4] if flat else [2, 5, 5]), dtype=torch.float64)
    net = Program(steps, x.shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph_pass, "_LEAST_CONVOLVED", 0)
        patch.setattr(graph_pass, "_LEAST", 0)
        for loss in (False, True):
            twin = copy.deepcopy(net)
            net.zero_grad()
            total = by_fastgan(net, x, loss)
            assert passes(total) or any(name == "refused" for name, _ in steps), "the graph was not read"
            total.backward()
            by_hand(twin, x, loss).backward()
            assert_equal_gradients(net, twin, tolerance=1e-8)
