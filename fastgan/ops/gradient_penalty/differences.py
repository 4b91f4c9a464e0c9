"""A penalty whose gradient is a difference of two forwards, for models too large or too opaque for a double backward.

With g = d sum(D(x))/dx and u = dP/dg, held fixed, the gradient of P(g) in the parameters is that of sum <g, u>, the
derivative of sum(D) along u. A central difference takes its place:

    dP/dtheta = d/dtheta (sum D(x + e u) - sum D(x - e u)) / (2 e) + O(e^2).

The value of P is exact. One e serves the whole batch, so that this also holds where D mixes the samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastgan.ops.gradient_penalty.inputs import Inputs, differentiable, floating, replaced
from fastgan.ops.gradient_penalty.kinds import Penalty
from fastgan.ops.gradient_penalty.outputs import Select, logits_of


def finite_difference(
    discriminator: Callable[..., Any],
    inputs: Inputs,
    penalty: Penalty,
    select: Select | None,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    keep: bool,
) -> tuple[Any, Tensor]:
    """What the discriminator returns for the inputs, and the penalty.

    Args:
        keep: whether what was returned will be differentiated.
    """
    again = _Repetition(discriminator, floating(inputs))
    given = differentiable(inputs)
    x = floating(given)
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
    along = iter(torch.autograd.grad(penalty(leaves), leaves))  # u, of each input that has a gradient
    directions = [torch.zeros_like(t) if grad is None else next(along) for t, grad in zip(x, found, strict=True)]
    step = _step(x, directions)

    def total(sign: float) -> Tensor:
        moved = iter([t.detach() + sign * step.to(t.dtype) * u for t, u in zip(x, directions, strict=True)])
        with again():
            output = discriminator(replaced(inputs, lambda _: next(moved)), *args, **kwargs)
        return torch.stack([part.to(step.dtype).sum() for part in logits_of(output, select, len(x[0]))]).sum()

    value = penalty(grads)
    slope = ((total(1) - total(-1)) / (2 * step)).to(value.dtype)
    return returned, value + (slope - slope.detach())


def _step(inputs: Sequence[Tensor], directions: Sequence[Tensor]) -> Tensor:
    """e, of which rounding and curvature spoil the difference about alike: the cube root of the precision."""
    device = inputs[0].device.type
    dtypes = {t.dtype for t in inputs}
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtypes.add(torch.get_autocast_dtype(device))
    relative = max(torch.finfo(dtype).eps for dtype in dtypes) ** (1 / 3)
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    size, length = (
        torch.stack([torch.linalg.vector_norm(t.detach(), dtype=dtype) for t in each]).norm()
        for each in (inputs, directions)
    )
    size = torch.where(size > 0, size, sum(t.numel() for t in inputs) ** 0.5)
    return torch.where(length > 0, relative * size / length, 1.0)


class _Repetition:
    """Forwards with the random numbers and the buffers that the first one found, which leave nothing behind.

    Dropout with another mask, or a spectral norm that has gone on, would differ by more than the inputs do.
    """

    def __init__(self, discriminator: Any, inputs: Sequence[Tensor]) -> None:
        modules = discriminator.modules() if isinstance(discriminator, nn.Module) else ()
        self._buffers = [
            (module, name, buffer.detach().clone())
            for module in modules
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
