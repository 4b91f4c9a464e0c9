"""Report whether a discriminator takes one pass, without computing a penalty."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastgan.ops.gradient_penalty.forward import run_forward
from fastgan.ops.gradient_penalty.inputs import Inputs
from fastgan.ops.gradient_penalty.missing_derivatives import Layers
from fastgan.ops.gradient_penalty.outputs import Select
from fastgan.ops.gradient_penalty.sharding import gathering
from fastgan.ops.library import untraced


@untraced
def explain_penalty(
    discriminator: Callable[..., Any],
    inputs: Inputs,
    *,
    select: Select | None = None,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> str:
    """Report whether ``logits_and_penalty`` takes one pass, or which operation of the discriminator prevents it.

    The discriminator is called once. In training mode, BatchNorm updates its running statistics, as in any forward.

    Args:
        discriminator, inputs, select, args, kwargs: as for ``logits_and_penalty``.

    Returns:
        "one pass" if the loss and the penalty cost as much as four forwards, followed by a condition if this depends on
        the loss. "general path" with the operation that prevents one pass, and the file and line of its call. Or
        "no penalty" with all layers that have no second derivative.

    Raises:
        ValueError, TypeError, RuntimeError: as in ``logits_and_penalty``.

    ```python
    import torch
    import fastgan

    discriminator = torch.nn.Sequential(
        torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)
    )
    print(fastgan.explain_penalty(discriminator, torch.randn(4, 8)))
    ```
    """
    layers = Layers(discriminator)
    with gathering(discriminator):
        with layers.watched():
            forward = run_forward(discriminator, inputs, select, args, kwargs)
        missing = layers.missing(forward.logits, forward.inputs)
    if missing:
        return f"no penalty: {len(missing)} without a second derivative: {'; '.join(missing)}"
    if forward.graph is not None:
        return "one pass"
    if forward.tracer is None or forward.obstacle is not None:
        return f"general path: {forward.obstacle}"
    conditions = forward.tracer.conditions()
    return "one pass" if conditions is None else f"one pass, {conditions}"
