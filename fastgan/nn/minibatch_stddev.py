"""Minibatch standard deviation as a layer of a discriminator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

from fastgan import ops
from fastgan.ops.minibatch_stddev import check_settings

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class MinibatchStdDev(nn.Module):
    """Append ``num_channels`` channels that show how much the samples of a group differ.

    The input is (N, C, *S), and the output is (N, C + num_channels, *S) with the dtype of the input. The layer has no
    parameters and no buffers. See ``fastgan.ops.minibatch_stddev`` for the definition.

    Order of derivative: any.

    Source: Karras et al., Progressive Growing of GANs (2018). The groups are from Karras et al., StyleGAN (2019).

    ```python
    import torch
    import fastgan

    layer = fastgan.nn.MinibatchStdDev(group_size=4)
    y = layer(torch.randn(8, 32, 4, 4))  # (8, 33, 4, 4)
    ```

    Args:
        group_size: number of samples in a group. None: the whole batch.
        num_channels: number of appended channels.
        eps: added to the variance, greater than 0.
        remainder: ``"error"`` or ``"largest-divisor"``, see ``fastgan.ops.minibatch_stddev``.
        process_group: form groups over the batches of all ranks of this group.

    Raises:
        ValueError: a setting is invalid.
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
