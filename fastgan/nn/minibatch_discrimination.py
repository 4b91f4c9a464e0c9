"""Minibatch discrimination as a layer: projection, op, and concatenation with the input."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastgan.ops.minibatch_discrimination import minibatch_discrimination
from fastgan.ops.minibatch_discrimination.ranks import Group


class MinibatchDiscrimination(nn.Module):
    """Append to each sample its closeness to the others: ``cat([x, o + bias], 1)``, with o computed from ``x T``.

    The input is (N, F), and the output is (N, F + B) with the dtype of the input. ``forward`` also takes ``segments``
    (N,), integers; only samples of the same segment are compared.

    The parameter ``T`` (in_features, num_kernels, kernel_dim) has the name and shape of the common PyTorch
    implementations, so their state_dict can be loaded. ``weight_scale=True, bias=True`` gives the layer of the paper,
    except that the columns of T start with a norm of about 1, not exactly 1.

    Order of derivative: any. See ``fastgan.ops.minibatch_discrimination``.

    Source: Salimans et al., Improved Techniques for Training GANs (2016).

    ```python
    import torch
    import fastgan

    layer = fastgan.nn.MinibatchDiscrimination(512, 100, 5)
    y = layer(torch.randn(16, 512))  # (16, 612)
    ```

    Args:
        in_features: F, the number of features of the input.
        num_kernels: B, the number of appended features.
        kernel_dim: C, the dimension in which samples are compared.
        exclude_self: do not compare a sample with itself.
        bias: add a parameter ``bias`` (B,), which starts at -1 as in the paper.
        weight_scale: replace T by ``T exp(log_weight_scale) / norm(T)``, where the norm of each column is taken over F
            and the parameter ``log_weight_scale`` (B, C) starts at 0.
        process_group: compare with the samples of all ranks of this group, see
            ``fastgan.ops.minibatch_discrimination``.

    Raises:
        ValueError: a size is below 1, or an input is not (N, F).
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
