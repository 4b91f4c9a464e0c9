"""Zero gradients where the functions that are replaced leave zeros, so that optimizers move the same parameters.

Without CUDA, those code bases run PyTorch's own activations. The double backward of a ReLU gives zeros to its input,
which reach all parameters before it. Their CUDA extensions leave None there, as fastgan's operations do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.graph import Node

from fastgan.ops.gradient_penalty.zeros import reached, with_zeros

_TASK = "fastgan: zeros are left below, in the backward of this number"


def fill_zero_grads(y: Tensor) -> Tensor:
    """Have a backward of y with create_graph=True leave zeros for the parameters before y."""
    if y.grad_fn is not None and y.device.type != "cuda":
        y.grad_fn.register_hook(_Hook(y.grad_fn))
    return y


class _Hook:
    def __init__(self, node: Node) -> None:
        self._following = tuple(following for following, _ in node.next_functions)
        self._metadata = cast(dict[str, Any], node.metadata)

    def __call__(self, grads: Sequence[Tensor | None], _: Any) -> tuple[Tensor | None, ...] | None:
        task = torch._C._current_graph_task_id()
        made = next((i for i, grad in enumerate(grads) if grad is not None), None)
        # What an activation closer to the output has reached includes everything that this one reaches.
        if not torch.is_grad_enabled() or made is None or self._metadata.get(_TASK) == task:
            return None
        leaves = []
        for node in reached(self._following):
            cast(Any, node.metadata)[_TASK] = task
            leaf = getattr(node, "variable", None)
            if leaf is not None:
                leaves.append(leaf)
        whole = with_zeros(cast(Tensor, grads[made]), leaves)
        return tuple(whole if i == made else grad for i, grad in enumerate(grads))
