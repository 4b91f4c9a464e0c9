"""Minibatch discrimination as a layer: a projection, the op, and its result beside the input."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastgan.ops.minibatch_discrimination import minibatch_discrimination
from fastgan.ops.minibatch_discrimination.ranks import Group


class MinibatchDiscrimination(nn.Module):
    """Appends to each sample how close it is to the others: ``cat([x, o + bias], 1)``, o of the activations ``x T``.

        discriminator = nn.Sequential(features, fnn.MinibatchDiscrimination(512, 100, 5), nn.Linear(512 + 100, 1))

    Its parameter ``T`` (in_features, num_kernels, kernel_dim) is that of the layers that are usual in PyTorch, whose
    state_dict it loads. ``weight_scale=True, bias=True`` is the layer of the paper. The columns of T start with a norm
    of about 1, where the paper's have it exactly.

    Args:
        in_features: F.
        num_kernels: B.
        kernel_dim: C.
        exclude_self: a sample is not compared with itself.
        bias: add ``bias`` (B,), which starts at -1 as in the paper.
        weight_scale: ``T exp(log_weight_scale) / norm(T)`` in place of T, with the norm over F of each column and
            ``log_weight_scale`` (B, C), which starts at 0.
        process_group: compare with the samples of all its ranks, see ``fastgan.ops.minibatch_discrimination``.

    Shape: (N, F) to (N, F + B). ``forward`` also takes ``segments`` (N,): samples are compared within theirs.

    Raises:
        ValueError: a size below 1, or an input that is not (N, F).

    Differentiable twice. Source: Salimans et al., Improved Techniques for Training GANs (2016).
    """

    def __init__(
        self,
        in_features: int,
        num_kernels: int,
        kernel_dim: int,
        *,
        exclude_self: bool = True,
        bias: bool = False,
        weight_scale: bool = False,
        process_group: Group | None = None,
    ) -> None:
        super().__init__()
        sizes = {"in_features": in_features, "num_kernels": num_kernels, "kernel_dim": kernel_dim}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        self.in_features, self.num_kernels, self.kernel_dim = in_features, num_kernels, kernel_dim
        self.exclude_self, self.process_group = exclude_self, process_group
        self.T = nn.Parameter(torch.empty(in_features, num_kernels, kernel_dim))
        self.bias = nn.Parameter(torch.empty(num_kernels)) if bias else None
        self.log_weight_scale = nn.Parameter(torch.empty(num_kernels, kernel_dim)) if weight_scale else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.T, std=self.in_features**-0.5)
        if self.bias is not None:
            nn.init.constant_(self.bias, -1.0)
        if self.log_weight_scale is not None:
            nn.init.zeros_(self.log_weight_scale)

    def forward(self, x: Tensor, segments: Tensor | None = None) -> Tensor:
        if isinstance(x, Tensor) and (x.ndim != 2 or x.shape[1] != self.in_features):
            raise ValueError(f"x must be (N, {self.in_features}), got shape {tuple(x.shape)}")
        T = self.T
        if self.log_weight_scale is not None:
            T = T * (self.log_weight_scale.exp() / T.norm(dim=0))
        activations = (x @ T.flatten(1)).view(-1, self.num_kernels, self.kernel_dim)  # (N, B, C)
        closeness = minibatch_discrimination(
            activations, exclude_self=self.exclude_self, segments=segments, process_group=self.process_group
        )
        if self.bias is not None:
            closeness = closeness + self.bias
        return torch.cat([x, closeness.to(x.dtype)], 1)  # (N, F + B)

    def extra_repr(self) -> str:
        options = f"exclude_self={self.exclude_self}, bias={self.bias is not None}"
        options += f", weight_scale={self.log_weight_scale is not None}"
        return f"{self.in_features}, {self.num_kernels}, {self.kernel_dim}, {options}"
