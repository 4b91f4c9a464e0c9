"""Gradient penalties: a function of the discriminator's gradient at chosen points, exact, for any discriminator."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from fastgan.ops.gradient_penalty.eligibility import Tracer
from fastgan.ops.gradient_penalty.kinds import check_input, check_kind, check_weight, penalise, points
from fastgan.ops.gradient_penalty.let_go import may_let_go
from fastgan.ops.gradient_penalty.one_pass import one_pass
from fastgan.ops.gradient_penalty.paths import paths
from fastgan.ops.gradient_penalty.sharding import may_be_sharded, refuse_sharded, refuse_sharded_graph
from fastgan.ops.gradient_penalty.small import REASON, is_small
from fastgan.ops.library import untraced
from fastgan.ops.needed import leave_unread
from fastgan.ops.twice_differentiable import barely_rerouted, twice_differentiable

__all__ = ["explain_penalty", "gradient_penalty", "logits_and_penalty", "penalty_from_logits"]

Logits = Tensor | Sequence["Logits"]


@untraced
def gradient_penalty(
    discriminator: Callable[..., Any],
    real: Tensor,
    fake: Tensor | None = None,
    *,
    kind: str = "wgan-gp",
    weight: float | None = None,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """A penalty on the discriminator's gradient g = dD/dx, in one forward and one backward over the inputs.

    ============== ========================================== =======================================
    kind           at                                         penalty
    ============== ========================================== =======================================
    wgan-gp        alpha real + (1 - alpha) fake              weight * mean (|g| - 1)^2
    wgan-lp        alpha real + (1 - alpha) fake              weight * mean max(0, |g| - 1)^2
    max-gp         alpha real + (1 - alpha) fake              weight * max |g|^2
    zero-centered  alpha real + (1 - alpha) fake              weight * mean |g|^2
    dragan         real + alpha * 0.5 * std(real) * U(0, 1)   weight * mean (|g| - 1)^2
    r1             real                                       weight / 2 * mean |g|^2
    r2             fake                                       weight / 2 * mean |g|^2
    r1+r2          real and fake, in one pass                 the sum of both
    ============== ========================================== =======================================

    alpha ~ U(0, 1) per sample. Norms are over all dimensions of a sample and are computed in float32; the gradient of
    a norm of zero is zero. Convolutions, ReLUs and poolings inside D take four forwards' work for the penalty and its
    gradient where PyTorch takes six (see ``twice_differentiable``); everything else is PyTorch's. Where D is piecewise
    affine, what its forward kept is freed at once: a feature that D stashed there cannot be differentiated afterwards.
    A module so small that all this costs more than it saves on a CPU is left to PyTorch, unless ``use_backend`` says
    otherwise.

    Args:
        discriminator: called as ``discriminator(x, *args, **kwargs)``; returns logits of any shape, or a sequence of
            them (several scales), which are summed.
        real: (N, *S), floating.
        fake: (N, *S) likewise; not used by "r1" and "dragan". Neither is differentiated.
        weight: factor; None: 10.
        args, kwargs: further inputs of the discriminator, such as labels. "r1+r2" calls it on reals, then on fakes.
        generator: where alpha and the noise come from.

    Returns:
        () float32 (float64 for float64 inputs), differentiable once in the discriminator's parameters. Those that it
        does not depend on, such as biases before ReLUs, get no gradient where PyTorch may give them zeros.

    Raises:
        ValueError: unknown kind; ``real`` and ``fake`` differ in shape; the logits do not depend on the input; several
            outputs differ in their number of channels, as logits and features do.
        TypeError: an input is not a floating tensor; ``weight`` is not a number; ``fake`` is missing for a kind that
            needs it.
        RuntimeError: gradients are off, or FSDP shards the discriminator.

    Sources: Gulrajani et al. 2017 (wgan-gp), Petzka et al. 2018 (wgan-lp), Mescheder et al. 2018 (r1, r2),
    Kodali et al. 2017 (dragan), Zhou et al. 2019 (max-gp), Thanh-Tung et al. 2019 (zero-centered).
    """
    check_kind(kind)
    check_weight(weight)
    refuse_sharded(discriminator)
    total: Tensor | None = None
    for x in points(kind, real, fake, generator):
        x = x.detach().requires_grad_()
        _require_grad_mode()
        small = is_small(discriminator, x)
        with barely_rerouted(discriminator, x) if small else twice_differentiable():
            logits = discriminator(x, *args, **(kwargs or {}))
        penalty = _penalty(logits, x, kind, weight, ours=not small)
        if not small:
            leave_unread(x)
        total = penalty if total is None else total + penalty
    assert total is not None
    return total


@untraced
def penalty_from_logits(logits: Logits, inputs: Tensor, *, kind: str = "r1", weight: float | None = None) -> Tensor:
    """The penalty of ``gradient_penalty`` from logits that are there already, at the inputs that they came from.

        images.requires_grad_()
        with fastgan.twice_differentiable():
            logits = discriminator(images)
        loss = softplus(-logits).mean() + fastgan.penalty_from_logits(logits, images, kind="r1", weight=10)

    Args:
        logits: of any shape, or a sequence of them, of ``inputs``.
        inputs: (N, *S), floating, requiring a gradient when the logits were computed.
        kind: which function of the gradient; at what points, the caller has chosen.
        weight: factor; None: 10.

    Returns and raises as ``gradient_penalty``.
    """
    check_kind(kind)
    check_weight(weight)
    check_input("inputs", inputs)
    _require_grad_mode()
    if not inputs.requires_grad:
        raise ValueError("inputs must require a gradient before the discriminator is called: inputs.requires_grad_()")
    return _penalty(logits, inputs, kind, weight)


def _penalty(logits: Logits, inputs: Tensor, kind: str, weight: float | None, *, ours: bool = False) -> Tensor:
    """``ours``: nobody else has these logits, so that what their forward kept may be let go, if it is worth a look."""
    outputs = list(_flatten(logits))
    _check_scales(outputs)
    connected = [output for output in outputs if output.requires_grad]
    grad: Tensor | None = None
    if connected:
        keep = True
        if ours or may_be_sharded():
            path = paths(connected, inputs)
            refuse_sharded_graph(path)
            keep = not (ours and may_let_go(path, get_gradient_edge(inputs).node))
        ones = [torch.ones_like(output) for output in connected]
        (grad,) = torch.autograd.grad(connected, inputs, ones, retain_graph=keep, create_graph=True, allow_unused=True)
    if grad is None:
        raise ValueError("the discriminator's output does not depend on its input, or was detached from it")
    return penalise(kind, grad, 10.0 if weight is None else weight)


@untraced
def logits_and_penalty(
    discriminator: Callable[..., Any],
    inputs: Tensor,
    *,
    kind: str = "r1",
    weight: float | None = None,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> tuple[Any, Tensor]:
    """The discriminator's logits and the penalty at the same inputs, to be used in one loss with one backward.

    Where the discriminator is made of convolutions, linear layers, ReLUs, average poolings, sums and reshapes, with one
    logit a sample, loss and penalty together take four forwards' work instead of six; ``explain_penalty`` says whether.
    Elsewhere, and where D is small (see ``gradient_penalty``), it is ``penalty_from_logits``. The numbers are the same.
    In one pass, what the forward kept is freed at once, as by ``gradient_penalty``.

        logits, penalty = fastgan.logits_and_penalty(discriminator, real, kind="r1", weight=10)
        (softplus(-logits).mean() + penalty).backward()

    Args:
        discriminator: called as ``discriminator(inputs, *args, **kwargs)``.
        inputs: (N, *S), floating; not differentiated.
        kind: "r1", or any kind of ``gradient_penalty``, at the inputs as they are.
        weight: factor; None: 10.
        args, kwargs: further inputs of the discriminator.

    Returns:
        logits as the discriminator returned them, and the penalty (), each differentiable once in the parameters.

    Raises as ``gradient_penalty``. Source: see one_pass.py.
    """
    check_kind(kind)
    check_weight(weight)
    logits, x, tracer, reason = _traced(discriminator, inputs, args, kwargs)
    if tracer is not None and reason is None:
        return one_pass(logits, x, tracer, kind, 10.0 if weight is None else weight)
    penalty = penalty_from_logits(logits, x, kind=kind, weight=weight)
    if tracer is not None:
        leave_unread(x)
    return logits, penalty


@untraced
def explain_penalty(
    discriminator: Callable[..., Any],
    inputs: Tensor,
    *,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> str:
    """Run the discriminator once, and say whether ``logits_and_penalty`` takes one pass and, if not, why not."""
    reason = _traced(discriminator, inputs, args, kwargs)[3]
    return "one pass" if reason is None else f"general path: {reason}"


def _traced(
    discriminator: Callable[..., Any], inputs: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any] | None
) -> tuple[Any, Tensor, Tracer | None, str | None]:
    """The logits, the inputs that they came from, what was seen on the way and, if there is one, why not one pass."""
    check_input("inputs", inputs)
    refuse_sharded(discriminator)
    _require_grad_mode()
    x = inputs.detach().requires_grad_()
    if is_small(discriminator, x):
        with barely_rerouted(discriminator, x):
            return discriminator(x, *args, **(kwargs or {})), x, None, REASON
    with twice_differentiable(), Tracer(x) as tracer:
        logits = discriminator(x, *args, **(kwargs or {}))
    return logits, x, tracer, tracer.judge(logits)


def _check_scales(outputs: Sequence[Tensor]) -> None:
    """Several outputs are the logits of several scales; a head with classes, or features, must not be summed in."""
    if len({output.shape[1] if output.ndim > 1 else 1 for output in outputs}) > 1:
        shapes = ", ".join(str(tuple(output.shape)) for output in outputs)
        raise ValueError(
            f"the discriminator must return logits alone, got outputs of {shapes}, which differ in their channels:"
            " choose with discriminator=lambda x: D(x)[0], or join logits of several lengths in one tensor"
        )


def _flatten(logits: Any) -> Any:
    if isinstance(logits, Tensor):
        yield logits
    elif isinstance(logits, Sequence) and logits and not isinstance(logits, str):
        for part in logits:
            yield from _flatten(part)
    else:
        raise TypeError(f"the discriminator must return a tensor or a sequence of tensors, got {type(logits).__name__}")


def _require_grad_mode() -> None:
    if not torch.is_grad_enabled():
        raise RuntimeError("a gradient penalty needs gradients: call it outside torch.no_grad() and inference_mode()")
