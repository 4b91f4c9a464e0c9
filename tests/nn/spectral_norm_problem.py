"""Modules with spectral norm, and one training step of them."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import parametrizations

from fastgan.nn import utils
from tests.harness import assert_close

MODULES = {
    "linear": (lambda: nn.Linear(5, 7), (3, 5)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3), (2, 3, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (2, 2, 4, 4, 4)),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(3, 4, 3), (2, 3, 9)),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(3, 5, 4, stride=2), (2, 3, 5, 5)),
    "conv_transpose3d": (lambda: nn.ConvTranspose3d(2, 3, 2), (2, 2, 3, 3, 3)),
    "embedding": (lambda: nn.Embedding(11, 4), None),
}


class Double(nn.Module):
    def forward(self, weight):
        return 2 * weight


def inputs_of(shape):
    return torch.randn(shape) if shape else torch.randint(0, 11, (6,))


def pair(make, **options):
    """The same module normalized by PyTorch and by fastgan, from the same state."""
    expected = parametrizations.spectral_norm(make(), **options)
    actual = utils.spectral_norm(make(), **options)
    actual.load_state_dict(expected.state_dict())
    return expected, actual


def step(model, x):
    """Return output, gradients and state after one training step."""
    model.zero_grad()
    output = model(x)
    output.square().sum().backward()
    return [output, *(p.grad for p in model.parameters()), *(b.clone() for b in model.buffers())]


def assert_same(model, other, x, *, order=1):
    for a, b in zip(step(model, x), step(other, x), strict=True):
        assert_close(a, b.double(), order=order)


def discriminator(normalize):
    return nn.Sequential(
        normalize(nn.Conv2d(3, 8, 3, padding=1)),
        nn.LeakyReLU(0.2),
        normalize(nn.ConvTranspose2d(8, 4, 4, stride=2)),
        nn.LeakyReLU(0.2),
        nn.Flatten(),
        normalize(nn.Linear(4 * 18 * 18, 1)),
    )


IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
