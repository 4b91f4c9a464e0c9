"""Models in each style of code that convert recognizes."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as torch_hook

IMAGES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(3))


class MethodNorm:
    """Spectral norm that updates v first, then u. Evaluation iterates too, but does not store the result."""

    def set_up(self, u, sigma, iterations=1, eps=1e-12):
        self.names, self.iterations_, self.eps = (u, sigma), iterations, eps
        self.register_buffer(u, torch.randn(1, self.weight.shape[0]))
        self.register_buffer(sigma, torch.ones(1))

    def normalized(self):
        matrix, u = self.weight.flatten(1), getattr(self, self.names[0])
        with torch.no_grad():
            for _ in range(self.iterations_):
                v = F.normalize(u @ matrix, eps=self.eps)
                u = F.normalize(v @ matrix.t(), eps=self.eps)
        sigma = (v @ matrix.t() @ u.t()).squeeze()
        if self.training:
            with torch.no_grad():
                for name, value in zip(self.names, (u, sigma), strict=True):
                    getattr(self, name).copy_(value)
        return self.weight / sigma


class BigConv(nn.Conv2d, MethodNorm):
    """In BigGAN's style."""

    def __init__(self, *args, num_itrs=1, eps=1e-6):
        super().__init__(*args)
        self.num_itrs = num_itrs
        self.set_up("u0", "sv0", num_itrs, eps)

    def W_(self):  # noqa: N802
        return self.normalized()

    def forward(self, x):
        return F.conv2d(x, self.W_(), self.bias, self.stride, self.padding)


class BigLinear(nn.Linear, MethodNorm):
    def __init__(self, *args):
        super().__init__(*args)
        self.set_up("u0", "sv0", eps=1e-6)

    def W_(self):  # noqa: N802
        return self.normalized()

    def forward(self, x):
        return F.linear(x, self.W_(), self.bias)


class SnConv(nn.Conv2d, MethodNorm):
    """In the style of sn_u and sn_sigma."""

    def __init__(self, *args):
        super().__init__(*args)
        self.set_up("sn_u", "sn_sigma")

    def sn_weights(self):
        return self.normalized()

    def forward(self, x):
        return F.conv2d(x, self.sn_weights(), self.bias, self.stride, self.padding)


class SnLinear(nn.Linear, MethodNorm):
    """The same, with a property."""

    def __init__(self, *args):
        super().__init__(*args)
        self.set_up("sn_u", "sn_sigma")

    @property
    def sn_weight(self):
        return self.normalized()

    def forward(self, x):
        return F.linear(x, self.sn_weight, self.bias)


class BarNorm(nn.Module):
    """In the style of weight_bar: a wrapper, which iterates at each forward and adds eps to the norm."""

    def __init__(self, module, name="weight", power_iterations=1):
        super().__init__()
        self.module, self.name, self.power_iterations = module, name, power_iterations
        weight = module._parameters.pop(name)
        matrix = weight.detach().flatten(1)
        for suffix, size in (("_u", matrix.shape[0]), ("_v", matrix.shape[1])):
            vector = nn.Parameter(F.normalize(torch.randn(size), dim=0), requires_grad=False)
            module.register_parameter(name + suffix, vector)
        module.register_parameter(name + "_bar", nn.Parameter(weight.detach()))

    def _update_u_v(self):
        weight, u, v = (getattr(self.module, self.name + suffix) for suffix in ("_bar", "_u", "_v"))
        matrix = weight.flatten(1)
        for _ in range(self.power_iterations):
            for vector, product in ((v, lambda: matrix.detach().t() @ u), (u, lambda: matrix.detach() @ v)):
                values = product().detach()
                vector.data = values / (values.norm() + 1e-12)
        setattr(self.module, self.name, weight / u.dot(matrix @ v))

    def forward(self, x):
        self._update_u_v()
        return self.module(x)


class StridedStd(nn.Module):
    def __init__(self, group_size, num_channels=1):
        super().__init__()
        self.group_size, self.num_channels = group_size, num_channels

    def group(self, x, size):
        return x.reshape(size, -1, self.num_channels, x.shape[1] // self.num_channels, *x.shape[2:])

    def spread(self, y, size):
        return y.repeat(size, 1, 1, 1)

    def variance(self, y):
        return (y - y.mean(0)).square().mean(0)

    def forward(self, x):
        size = min(self.group_size or len(x), len(x))
        y = (self.variance(self.group(x, size)) + 1e-8).sqrt().mean([2, 3, 4], keepdim=True).squeeze(2)
        return torch.cat([x, self.spread(y, size).expand(-1, -1, *x.shape[2:])], 1)


class MinibatchStdLayer(StridedStd):
    pass


class ContiguousMinibatchStd(StridedStd):
    def group(self, x, size):
        return x.reshape(-1, size, self.num_channels, x.shape[1] // self.num_channels, *x.shape[2:]).transpose(0, 1)

    def spread(self, y, size):
        return y.repeat_interleave(size, 0)


class Discrimination(nn.Module):
    def __init__(self, in_features, kernels, dim, mean=False):
        super().__init__()
        self.T = nn.Parameter(torch.randn(in_features, kernels, dim) / in_features**0.5)
        self.mean = mean

    def closeness(self, distances):
        return torch.exp(-distances).sum(0) - 1

    def forward(self, x):
        m = (x @ self.T.flatten(1)).view(-1, *self.T.shape[1:])
        o = self.closeness((m[None] - m[:, None]).abs().sum(3))
        return torch.cat([x, o / (len(x) - 1) if self.mean else o], 1)


def discriminator(conv, linear, last=nn.Flatten):
    return nn.Sequential(conv(3, 6, 3), nn.LeakyReLU(0.2), conv(6, 4, 3), last(), linear(64, 1))


STYLES = {
    "parametrization": lambda: discriminator(
        lambda *a: parametrizations.spectral_norm(nn.Conv2d(*a)),
        lambda *a: parametrizations.spectral_norm(nn.Linear(*a)),
    ),
    "hook": lambda: discriminator(lambda *a: torch_hook(nn.Conv2d(*a)), lambda *a: torch_hook(nn.Linear(*a))),
    "u0, sv0": lambda: discriminator(BigConv, BigLinear),
    "sn_u, sn_sigma": lambda: discriminator(SnConv, SnLinear),
    "weight_bar": lambda: discriminator(lambda *a: BarNorm(nn.Conv2d(*a)), lambda *a: BarNorm(nn.Linear(*a))),
}
OTHERS = {
    "stddev": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), MinibatchStdLayer(4), nn.Flatten(), nn.Linear(180, 1)),
    "discrimination": lambda: nn.Sequential(nn.Flatten(), Discrimination(192, 5, 3), nn.Linear(197, 1)),
}
MODELS = {**STYLES, **OTHERS}
