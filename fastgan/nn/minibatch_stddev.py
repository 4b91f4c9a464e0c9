"""Minibatch standard deviation as a layer of a discriminator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

from fastgan import ops
from fastgan.ops.minibatch_stddev import check_settings

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class MinibatchStdDev(nn.Module):
    """Appends ``num_channels`` channels: how much the samples of a group differ. See ``fastgan.ops.minibatch_stddev``.

    Input (N, C, *S), output (N, C + num_channels, *S). Without parameters and buffers.

    Raises:
        ValueError: a setting is not as ``fastgan.ops.minibatch_stddev`` wants it.
    """

    def __init__(
        self,
        group_size: int | None = 4,
        num_channels: int = 1,
        *,
        eps: float = 1e-8,
        remainder: Literal["error", "largest-divisor"] = "error",
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        check_settings(group_size, num_channels, eps, remainder)
        self.group_size, self.num_channels, self.eps = group_size, num_channels, eps
        self.remainder, self.process_group = remainder, process_group

    def forward(self, x: Tensor) -> Tensor:
        return ops.minibatch_stddev(
            x,
            group_size=self.group_size,
            num_channels=self.num_channels,
            eps=self.eps,
            remainder=self.remainder,
            process_group=self.process_group,
        )

    def extra_repr(self) -> str:
        across = ", across ranks" if self.process_group is not None else ""
        settings = f"group_size={self.group_size}, num_channels={self.num_channels}, eps={self.eps}"
        return f"{settings}, remainder={self.remainder!r}{across}"
