"""Counts the floating-point operations of convolutions and matrix products while a computation runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten


def count_flops(run: Callable[[], object]) -> int:
    """Count a multiplication and an addition as two. Backward passes count only the gradients that they compute."""
    counter = _Counter()
    with counter:
        run()
    return counter.total


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._overloadpacket is aten.convolution:
            self.total += _of_convolution(args[1], args[0] if args[6] else result)
        elif func._overloadpacket is aten.convolution_backward:
            grad, input, weight = args[:3]
            self.total += sum(args[-1][:2]) * _of_convolution(weight, input if args[7] else grad)
        else:
            self.total += self._by_registry(func, args, kwargs or {}, result)
        return result

    def _by_registry(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
        formula = flop_registry.get(func._overloadpacket)
        return 0 if formula is None else int(formula(*args, **kwargs, out_val=result))


def _of_convolution(weight: Tensor, outputs: Tensor) -> int:
    """The registry's formula ignores groups in the backward pass."""
    return 2 * outputs.numel() * weight[0].numel()
