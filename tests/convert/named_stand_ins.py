"""Layers under the names, arguments and tensors that code bases give them, written from what these compute."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class SN:
    """BigGAN's: u0 and sv0. An iteration whose result is not stored starts from the stored vector."""

    def __init__(self, num_svs, num_itrs, num_outputs, transpose=False, eps=1e-12):
        self.num_svs, self.num_itrs, self.transpose, self.eps = num_svs, num_itrs, transpose, eps
        for i in range(num_svs):
            self.register_buffer(f"u{i}", torch.randn(1, num_outputs))
            self.register_buffer(f"sv{i}", torch.ones(1))

    @property
    def u(self):
        return [getattr(self, f"u{i}") for i in range(self.num_svs)]

    @property
    def sv(self):
        return [getattr(self, f"sv{i}") for i in range(self.num_svs)]

    def W_(self):  # noqa: N802
        matrix = self.weight.view(self.weight.size(0), -1)
        matrix = matrix.t() if self.transpose else matrix
        for _ in range(self.num_itrs):
            with torch.no_grad():
                v = F.normalize(self.u[0] @ matrix, eps=self.eps)
                u = F.normalize(v @ matrix.t(), eps=self.eps)
                if self.training:
                    self.u[0][:] = u
            sigma = (v @ matrix.t() @ u.t()).squeeze()
        if self.training:
            with torch.no_grad():
                self.sv[0][:] = sigma
        return self.weight / sigma


class SNConv2d(nn.Conv2d, SN):
    def __init__(self, inputs, outputs, kernel, num_svs=1, num_itrs=1, eps=1e-12):
        nn.Conv2d.__init__(self, inputs, outputs, kernel, padding=1)
        SN.__init__(self, num_svs, num_itrs, outputs, eps=eps)

    def forward(self, x):
        return F.conv2d(x, self.W_(), self.bias, self.stride, self.padding)


class SNLinear(nn.Linear, SN):
    def __init__(self, inputs, outputs, num_svs=1, num_itrs=1, eps=1e-12, transpose=False):
        nn.Linear.__init__(self, inputs, outputs)
        SN.__init__(self, num_svs, num_itrs, inputs if transpose else outputs, transpose, eps)

    def forward(self, x):
        return F.linear(x, self.W_(), self.bias)


class SNEmbedding(nn.Embedding, SN):
    def __init__(self, count, width, num_svs=1, num_itrs=1, eps=1e-12):
        nn.Embedding.__init__(self, count, width)
        SN.__init__(self, num_svs, num_itrs, count, eps=eps)

    def forward(self, x):
        return F.embedding(x, self.W_())


class SpectralNorm:
    """mimicry's: sn_u and sn_sigma."""

    def __init__(self, n_dim, num_iters=1, eps=1e-12):
        self.num_iters, self.eps = num_iters, eps
        self.register_buffer("sn_u", torch.randn(1, n_dim))
        self.register_buffer("sn_sigma", torch.ones(1))

    def sn_weights(self):
        matrix, u = self.weight.view(self.weight.shape[0], -1), self.sn_u
        with torch.no_grad():
            for _ in range(self.num_iters):
                v = F.normalize(u @ matrix, eps=self.eps)
                u = F.normalize(v @ matrix.t(), eps=self.eps)
        sigma = u @ (matrix @ v.t())
        if self.training:
            with torch.no_grad():
                self.sn_sigma[:] = sigma
                self.sn_u[:] = u
        return self.weight / sigma


class MimicryConv(nn.Conv2d, SpectralNorm):
    def __init__(self, inputs, outputs, kernel, num_iters=1):
        nn.Conv2d.__init__(self, inputs, outputs, kernel, padding=1)
        SpectralNorm.__init__(self, outputs, num_iters)

    def forward(self, x):
        return F.conv2d(x, self.sn_weights(), self.bias, self.stride, self.padding)


class ConvOfAProject(MimicryConv):
    """A subclass with an activation of its own."""

    def forward(self, x):
        return F.relu(super().forward(x))


class SpectralNorm2d(nn.Module):
    """torchgan's: a wrapper with w_bar, u and v, whose forward does everything."""

    def __init__(self, module, name="weight", power_iterations=1):
        super().__init__()
        self.module, self.name, self.power_iterations = module, name, power_iterations
        weight = module._parameters.pop(name)
        rows = weight.shape[0]
        for vector, size in (("u", rows), ("v", weight.numel() // rows)):
            setattr(self, vector, nn.Parameter(self.normalize(torch.randn(size)), requires_grad=False))
        self.w_bar = nn.Parameter(weight.data)

    def normalize(self, x, eps=1e-12):
        return x / (x.norm() + eps)

    def forward(self, *args):
        matrix = self.w_bar.view(len(self.w_bar), -1)
        for _ in range(self.power_iterations):
            self.v.data = self.normalize(matrix.t().mv(self.u))
            self.u.data = self.normalize(matrix.mv(self.v))
        sigma = self.u.dot(matrix.mv(self.v))
        setattr(self.module, self.name, self.w_bar / sigma)
        return self.module.forward(*args)


class MinibatchDiscrimination1d(nn.Module):
    """torchgan's."""

    def __init__(self, in_features, out_features, intermediate_features=16):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.intermediate_features = intermediate_features
        self.T = nn.Parameter(torch.randn(in_features, out_features, intermediate_features))

    def forward(self, x):
        m = (x @ self.T.view(self.in_features, -1)).view(1, -1, self.out_features, self.intermediate_features)
        distances = (m - m.permute(1, 0, 2, 3)).abs().sum(3)
        return torch.cat([x, torch.exp(-distances).sum(0) - 1], 1)


class MinibatchStdLayer(nn.Module):
    """StyleGAN2-ADA's and StyleGAN3's."""

    def __init__(self, group_size, num_channels=1):
        super().__init__()
        self.group_size, self.num_channels = group_size, num_channels

    def forward(self, x):
        n, c, h, w = x.shape
        size = n if self.group_size is None else min(self.group_size, n)
        parts = self.num_channels
        y = x.reshape(size, -1, parts, c // parts, h, w)
        y = ((y - y.mean(0)).square().mean(0) + 1e-8).sqrt().mean([2, 3, 4])
        return torch.cat([x, y.reshape(-1, parts, 1, 1).repeat(size, 1, h, w)], 1)


class StddevLayer(nn.Module):
    """The layer with num_new_features, which is found by its results."""

    def __init__(self, group_size=4, num_new_features=1):
        super().__init__()
        self.group_size, self.num_new_features = group_size, num_new_features

    def forward(self, x):
        n, c, h, w = x.shape
        size, parts = min(self.group_size, n), self.num_new_features
        y = x.reshape(size, -1, parts, c // parts, h, w)
        y = (((y - y.mean(0, keepdim=True)) ** 2).mean(0, keepdim=True) + 1e-8) ** 0.5
        y = y.mean([3, 4, 5], keepdim=True).squeeze(3)
        return torch.cat([x, y.expand(size, -1, -1, h, w).reshape(n, parts, h, w)], 1)


class Head(nn.Module):
    """A discriminator that computes the statistic in its own forward, as rosinality's does."""

    def __init__(self):
        super().__init__()
        self.stddev_group, self.stddev_feat = 4, 1
        self.final_conv = nn.Conv2d(4, 2, 3)

    def forward(self, x):
        n, c, h, w = x.shape
        size = min(n, self.stddev_group)
        y = x.view(size, -1, self.stddev_feat, c // self.stddev_feat, h, w)
        y = (y.var(0, unbiased=False) + 1e-8).sqrt().mean([2, 3, 4], keepdim=True).squeeze(2)
        return self.final_conv(torch.cat([x, y.repeat(size, 1, h, w)], 1))
