"""Count the floating-point operations of the operators that run."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Count(TorchDispatchMode):
    """Count the operations inside this context. It can be entered again and continues to count."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        from torch.utils.flop_counter import flop_registry  # imports Triton

        self.total = 0
        self.is_on = False
        self._formulas: Any = flop_registry

    def __enter__(self) -> Any:
        self.is_on = True
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        self.is_on = False
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula: Any = self._formulas.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result


def is_counting_possible() -> bool:
    """Return whether no mode of the script intercepts operators."""
    return torch.utils._python_dispatch._get_current_dispatch_mode() is None
