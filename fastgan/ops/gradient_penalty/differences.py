"""A penalty whose gradient is approximated by a difference of two forwards instead of a double backward.

Let g = d sum(D(x))/dx, and let u = dP/dg be held constant. The gradient of P(g) with respect to the parameters is that
of <g, u>, the derivative of sum(D) along u. A central difference approximates it:

    dP/dtheta = d/dtheta (sum D(x + e u) - sum D(x - e u)) / (2 e) + O(e^2).

The value of P is exact. All samples share one e, so the formula also holds if D mixes samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from fastgan.ops.gradient_penalty.called_modules import called_modules, reachable_modules
from fastgan.ops.gradient_penalty.inputs import Inputs, differentiable, floating, replaced
from fastgan.ops.gradient_penalty.kinds import Penalty
from fastgan.ops.gradient_penalty.outputs import Select, logits_of
from fastgan.ops.gradient_penalty.sharding import dtypes_by_policy
from fastgan.ops.gradient_penalty.size import all_modules
from fastgan.ops.library import is_autocast


def finite_difference(
    discriminator: Callable[..., Any],
    inputs: Inputs,
    penalty: Penalty,
    select: Select | None,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    keep: bool,
) -> tuple[Any, Tensor]:
    """Return the output of the discriminator and the penalty.

    Args:
        keep: whether the caller may differentiate the output.
    """
    again = _Repetition(discriminator, floating(inputs))
    given, x = differentiable(inputs)
    returned = discriminator(given, *args, **kwargs)
    logits = [output for output in logits_of(returned, select, len(x[0])) if output.requires_grad]
    ones = [torch.ones_like(output) for output in logits]
    found: Sequence[Tensor | None] = (
        torch.autograd.grad(logits, x, ones, retain_graph=keep, allow_unused=True) if logits else [None]
    )
    if all(grad is None for grad in found):
        raise ValueError("the discriminator's output does not depend on its input, or was detached from it")
    grads = [grad.detach() for grad in found if grad is not None]
    leaves = [grad.clone().requires_grad_() for grad in grads]
    along = iter(torch.autograd.grad(penalty(leaves), leaves))  # u for each input that has a gradient
    directions = [torch.zeros_like(t) if grad is None else next(along) for t, grad in zip(x, found, strict=True)]
    step = _step(x, directions, _dtypes(discriminator, [*x, *logits]))

    def total(sign: float) -> Tensor:
        moved = iter([t.detach() + sign * step.to(t.dtype) * u for t, u in zip(x, directions, strict=True)])
        with again():
            output = discriminator(replaced(inputs, lambda _: next(moved)), *args, **kwargs)
        return torch.stack([part.to(step.dtype).sum() for part in logits_of(output, select, len(x[0]))]).sum()

    value = penalty(grads)
    slope = ((total(1) - total(-1)) / (2 * step)).to(value.dtype)
    return returned, value + (slope - slope.detach())


def _dtypes(discriminator: Any, tensors: Sequence[Tensor]) -> set[torch.dtype]:
    """Return the dtypes in which the forward may compute, given its inputs and logits."""
    device = tensors[0].device.type
    modules = all_modules(called_modules(discriminator) or ())
    parameters = [p for module in modules for p in module._parameters.values() if p is not None]
    dtypes = {t.dtype for t in (*tensors, *parameters) if t.is_floating_point()} | dtypes_by_policy(modules)
    return dtypes | {torch.get_autocast_dtype(device)} if is_autocast(device) else dtypes


def _step(inputs: Sequence[Tensor], directions: Sequence[Tensor], dtypes: set[torch.dtype]) -> Tensor:
    """Return e. A relative step of eps^(1/3) balances the errors of rounding and of curvature."""
    relative = max(torch.finfo(dtype).eps for dtype in dtypes) ** (1 / 3)
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in inputs) else torch.float32
    size, length = (
        torch.stack([torch.linalg.vector_norm(t.detach(), dtype=dtype) for t in each]).norm()
        for each in (inputs, directions)
    )
    size = torch.where(size > 0, size, sum(t.numel() for t in inputs) ** 0.5)
    return torch.where(length > 0, relative * size / length, 1.0)


class _Repetition:
    """Repeat a forward with the random numbers and buffers of the first one, and restore both afterwards.

    With another dropout mask or another step of the power iteration, the outputs would differ by far more than the
    small step of the inputs explains.
    """

    def __init__(self, discriminator: Any, inputs: Sequence[Tensor]) -> None:
        self._buffers = [
            (module, name, buffer.detach().clone())
            for module in reachable_modules(discriminator)
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        self._devices = sorted({t.device.index for t in inputs if t.is_cuda})
        self._states = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, self._devices)]

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(self._devices))
            torch.set_rng_state(self._states[0])
            for device, state in zip(self._devices, self._states[1:], strict=True):
                torch.cuda.set_rng_state(state, device)
            for module, name, buffer in self._buffers:
                # Never in place: the graph of another forward may hold the buffer.
                stack.callback(module._buffers.__setitem__, name, module._buffers[name])
                module._buffers[name] = buffer.clone()
            yield
