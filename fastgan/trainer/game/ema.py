"""Exponential moving average of a module's weights."""

from __future__ import annotations

import copy

import torch
from torch import nn


class EMA:
    """average <- d * average + (1 - d) * weights. A warm-up makes an early average forget the random initialization.

    After t updates, d = min(decay, (1 + t) / (10 + t)). With `rampup`, d = min(decay, 0.5^(1 / (rampup (t + 1)))): the
    half-life of the average is at most this share of the updates so far, as in StyleGAN2 (Karras et al. 2020). For many
    updates, the first formula has a half-life of 0.077 t.

    Floating-point buffers (batch norm's running statistics) are averaged like the weights that they belong to. Other
    buffers are copied.
    """

    def __init__(self, module: nn.Module, decay: float, rampup: float | None = None) -> None:
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.decay, self.rampup = decay, rampup
        self.updates = 0

    def decay_now(self) -> float:
        """Return the decay of the next update."""
        t = self.updates
        warm_up = (1 + t) / (10 + t) if self.rampup is None else 0.5 ** (1 / (self.rampup * (t + 1)))
        return float(min(self.decay, warm_up))

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        decay = self.decay_now()
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
