"""A penalty from logits that the caller has computed."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastgan.ops.gradient_penalty import compiled
from fastgan.ops.gradient_penalty.forward import require_grad_mode
from fastgan.ops.gradient_penalty.general import general_penalty
from fastgan.ops.gradient_penalty.inputs import Inputs, check_inputs, floating, named
from fastgan.ops.gradient_penalty.kinds import Dims, Kind, Number, penalty_of
from fastgan.ops.gradient_penalty.outputs import Select, check_select, logits_of
from fastgan.ops.regions import is_entered, traceable


@traceable
def penalty_from_logits(
    logits: Any,
    inputs: Inputs,
    *,
    kind: Kind = "r1",
    weight: Number | None = None,
    select: Select | None = None,
    target: Number | None = None,
    dims: Dims | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Compute a gradient penalty from logits that are already computed.

    Call the discriminator inside ``twice_differentiable``, so that its second derivative costs less.

    Args:
        logits: the output of the discriminator for ``inputs``.
        inputs: (N, *S), floating-point; or a tuple, list or dict of tensors. The floating-point tensors must require a
            gradient before the discriminator is called.
        kind, weight, select, target, dims, reduction: as for ``gradient_penalty``. The gradient is always taken at
            ``inputs``; the kind only selects the function of its norms.

    Returns:
        The penalty, as returned by ``gradient_penalty``. It can be differentiated once, also with respect to
        ``inputs``.

    Raises:
        ValueError: an input does not require a gradient; also as in ``gradient_penalty``.
        TypeError, RuntimeError: as in ``gradient_penalty``.

    ```python
    import torch
    import fastgan

    discriminator = torch.nn.Sequential(
        torch.nn.Flatten(),
        torch.nn.Linear(192, 64),
        torch.nn.ReLU(),
        torch.nn.Linear(64, 1),
    )
    images = torch.randn(4, 3, 8, 8).requires_grad_()
    with fastgan.twice_differentiable():
        logits = discriminator(images)
    loss = torch.nn.functional.softplus(-logits).mean()
    (loss + fastgan.penalty_from_logits(logits, images, kind="r1", weight=10)).backward()
    ```
    """
    penalty = penalty_of(kind, weight, target, dims, reduction)
    if penalty.is_approximate:
        raise ValueError(f"kind {kind!r} calls the discriminator: use logits_and_penalty")
    check_inputs("inputs", inputs)
    check_select(select)
    require_grad_mode()
    for name, tensor in named("inputs", inputs):
        if tensor.is_floating_point() and not tensor.requires_grad:
            raise ValueError(
                f"{name} must require a gradient before the discriminator is called: {name}.requires_grad_()"
            )
    x = floating(inputs)
    if is_entered():
        return penalty(compiled.gradients_of(logits, x, select))
    return general_penalty(logits_of(logits, select, x[0].shape[0]), x, penalty)
