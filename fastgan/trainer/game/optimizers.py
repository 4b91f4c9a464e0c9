"""Optimizers for games. Two players who each descend their own loss may circle each other; these look ahead.

With g_t the gradient, Adam's direction is a_t = m_t / (sqrt(v_t) + eps), m_t and v_t the bias-corrected means of g and
g^2 (Kingma & Ba 2015). Two time scales are two learning rates (Heusel et al. 2017).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

OptimizerName = Literal["adam", "optimistic-adam", "extra-adam"]


class _Directed(torch.optim.Optimizer):
    """Keeps Adam's moments, and leaves to its heirs what to do with the direction."""

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, betas: tuple[float, float], eps: float = 1e-8
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    def _parameters(self) -> list[tuple[nn.Parameter, dict[str, Any]]]:
        return [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]

    def _direction(self, parameter: nn.Parameter, group: dict[str, Any]) -> Tensor:
        """Take the gradient into the moments, and return a_t."""
        state = self.state[parameter]
        if "step" not in state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        assert parameter.grad is not None
        beta1, beta2 = group["betas"]
        state["step"] += 1
        state["exp_avg"].lerp_(parameter.grad, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(parameter.grad, parameter.grad, value=1 - beta2)
        root = (state["exp_avg_sq"] / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
        direction: Tensor = (state["exp_avg"] / (1 - beta1 ** state["step"])).div_(root)
        return direction


class OptimisticAdam(_Directed):
    """x <- x - 2 lr a_t + lr a_{t-1}, with a_0 = 0: the next gradient is guessed to change as the last did.

    Source: Daskalakis et al., Training GANs with Optimism (2018), algorithm 1.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for parameter, group in self._parameters():
            direction = self._direction(parameter, group)
            parameter.add_(direction, alpha=-2 * group["lr"])
            state = self.state[parameter]
            if "direction" in state:
                parameter.add_(state["direction"], alpha=group["lr"])
            state["direction"] = direction


class ExtraAdam(_Directed):
    """y = x - lr a(g(x)), then x <- x - lr a(g(y)): the step is taken from x with the gradient found ahead.

    ``extrapolate`` goes to y, ``step`` goes on from where ``extrapolate`` started, or from x itself where it was not
    called. Both take their gradient into the moments.
    Source: Gidel et al., A Variational Inequality Perspective on GANs (2019), algorithm 4.
    """

    @torch.no_grad()
    def extrapolate(self) -> None:
        for parameter, group in self._parameters():
            direction = self._direction(parameter, group)
            self.state[parameter]["start"] = parameter.clone()
            parameter.add_(direction, alpha=-group["lr"])

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for parameter, group in self._parameters():
            direction = self._direction(parameter, group)
            start = self.state[parameter].pop("start", None)
            if start is not None:
                parameter.copy_(start)
            parameter.add_(direction, alpha=-group["lr"])


def make_optimizer(
    name: OptimizerName, params: Iterable[nn.Parameter], lr: float, betas: tuple[float, float]
) -> torch.optim.Optimizer:
    if name == "adam":
        return torch.optim.Adam(params, lr, betas, fused=True)
    return {"optimistic-adam": OptimisticAdam, "extra-adam": ExtraAdam}[name](params, lr, betas)
