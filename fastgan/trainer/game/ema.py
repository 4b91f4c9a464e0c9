"""Exponential moving average of a module's weights."""

from __future__ import annotations

import copy

import torch
from torch import nn


class EMA:
    """average <- d * average + (1 - d) * weights, with d = min(decay, (1 + t) / (10 + t)) after t updates.

    The warm-up makes an early average forget the random initialization; a constant decay would remember it for
    1 / (1 - decay) steps. Floating-point buffers (batch norm's running statistics) are averaged like the weights that
    they belong to. Other buffers are copied.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        current = module.state_dict()
        for name, average in self.module.state_dict().items():
            if average.is_floating_point():
                average.lerp_(current[name], 1 - decay)
            else:
                average.copy_(current[name])
        self.updates += 1

    @torch.no_grad()
    def restart(self, module: nn.Module) -> None:
        """Start again from a module's weights."""
        self.module.load_state_dict(module.state_dict())
        self.updates = 0

    def state_dict(self) -> dict[str, object]:
        return {"module": self.module.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: dict[str, object]) -> None:
        self.module.load_state_dict(state["module"])  # type: ignore[arg-type]
        self.updates = int(state["updates"])  # type: ignore[call-overload]
