"""Optimizers for two-player games. Plain gradient descent on both losses can cycle; these optimizers look ahead.

With gradient g_t, Adam's direction is a_t = m_t / (sqrt(v_t) + eps), where m_t and v_t are the bias-corrected means of
g and g^2 (Kingma & Ba 2015). Two time scales mean two learning rates (Heusel et al. 2017).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastgan.trainer.game.names import OptimizerName as OptimizerName


class _Directed(torch.optim.Optimizer):
    """Keeps Adam's moments. Subclasses decide how to use the direction."""

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, betas: tuple[float, float], eps: float = 1e-8
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    def _parameters(self) -> list[tuple[nn.Parameter, dict[str, Any]]]:
        return [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]

    def _direction(self, parameter: nn.Parameter, group: dict[str, Any]) -> Tensor:
        """Update the moments with the gradient, and return a_t."""
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
    """x <- x - 2 lr a_t + lr a_{t-1}, with a_0 = 0. It predicts that the gradient changes as it did in the last step.

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
    """y = x - lr a(g(x)), then x <- x - lr a(g(y)): a step from x with the gradient at y.

    ``extrapolate`` moves to y. ``step`` starts from the weights before ``extrapolate``, or from the current weights if
    it was not called. Both update the moments with their gradient.
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
