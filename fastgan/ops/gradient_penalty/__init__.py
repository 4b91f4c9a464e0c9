"""Gradient penalties: a function of the discriminator's gradient at chosen points, exact, for any discriminator."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from fastgan.ops.gradient_penalty.eligibility import Tracer
from fastgan.ops.gradient_penalty.inputs import Inputs, check_inputs, differentiable, floating, named
from fastgan.ops.gradient_penalty.kinds import Kind, Number, Penalty
from fastgan.ops.gradient_penalty.let_go import may_let_go
from fastgan.ops.gradient_penalty.one_pass import one_pass
from fastgan.ops.gradient_penalty.outputs import Select, check_select, logits_of
from fastgan.ops.gradient_penalty.paths import paths
from fastgan.ops.gradient_penalty.points import points
from fastgan.ops.gradient_penalty.sharding import may_be_sharded, refuse_sharded, refuse_sharded_graph
from fastgan.ops.gradient_penalty.small import REASON, is_small
from fastgan.ops.gradient_penalty.zeros import leave_zeros
from fastgan.ops.library import untraced
from fastgan.ops.needed import leave_unread
from fastgan.ops.twice_differentiable import twice_differentiable, uncompiled

__all__ = ["explain_penalty", "gradient_penalty", "logits_and_penalty", "penalty_from_logits"]


@untraced
def gradient_penalty(
    discriminator: Callable[..., Any],
    real: Inputs,
    fake: Inputs | None = None,
    *,
    kind: Kind = "wgan-gp",
    weight: Number | None = None,
    select: Select | None = None,
    target: Number | None = None,
    dims: int | tuple[int, ...] | None = None,
    reduction: str = "mean",
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
        does not depend on, such as biases before ReLUs, get zeros where PyTorch gives zeros, and none elsewhere.

    Raises:
        ValueError: unknown kind; ``real`` and ``fake`` differ in shape; the logits do not depend on the input; several
            outputs differ in their number of channels, as logits and features do.
        TypeError: an input is not a floating tensor; ``weight`` is not a number; ``fake`` is missing for a kind that
            needs it.
        RuntimeError: gradients are off, or FSDP shards the discriminator.

    Sources: Gulrajani et al. 2017 (wgan-gp), Petzka et al. 2018 (wgan-lp), Mescheder et al. 2018 (r1, r2),
    Kodali et al. 2017 (dragan), Zhou et al. 2019 (max-gp), Thanh-Tung et al. 2019 (zero-centered).
    """
    penalty = Penalty(kind, weight, target, dims, reduction)
    check_select(select)
    refuse_sharded(discriminator)
    total: Tensor | None = None
    for point in points(kind, real, fake, generator):
        _require_grad_mode()
        given = differentiable(point)
        x = floating(given)
        small = _is_small(discriminator, x)
        with uncompiled if small else twice_differentiable():
            returned = discriminator(given, *args, **(kwargs or {}))
        part = _penalty(logits_of(returned, select, len(x[0])), x, penalty, ours=not small, plain=small)
        if not small:
            for tensor in x:
                leave_unread(tensor)
        total = part if total is None else total + part
    assert total is not None
    return total


@untraced
def penalty_from_logits(
    logits: Any,
    inputs: Inputs,
    *,
    kind: Kind = "r1",
    weight: Number | None = None,
    select: Select | None = None,
    target: Number | None = None,
    dims: int | tuple[int, ...] | None = None,
    reduction: str = "mean",
) -> Tensor:
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
    penalty = Penalty(kind, weight, target, dims, reduction)
    check_inputs("inputs", inputs)
    check_select(select)
    _require_grad_mode()
    for name, tensor in named("inputs", inputs):
        if tensor.is_floating_point() and not tensor.requires_grad:
            raise ValueError(
                f"{name} must require a gradient before the discriminator is called: {name}.requires_grad_()"
            )
    x = floating(inputs)
    return _penalty(logits_of(logits, select, len(x[0])), x, penalty)


def _penalty(
    logits: Sequence[Tensor], inputs: tuple[Tensor, ...], penalty: Penalty, *, ours: bool = False, plain: bool = False
) -> Tensor:
    """``ours``: nobody else has these logits, so that what their forward kept may be let go, if it is worth a look.

    ``plain``: the forward was PyTorch's own.
    """
    connected = [output for output in logits if output.requires_grad]
    grads: Sequence[Tensor | None] = ()
    path: set[Node] = set()
    if connected:
        keep = True
        if not plain or may_be_sharded():
            path = paths(connected, *inputs)
            refuse_sharded_graph(path)
            keep = not (ours and may_let_go(path, *(get_gradient_edge(x).node for x in inputs)))
        ones = [torch.ones_like(output) for output in connected]
        grads = torch.autograd.grad(connected, inputs, ones, retain_graph=keep, create_graph=True, allow_unused=True)
    found = [grad for grad in grads if grad is not None]
    if not found:
        raise ValueError("the discriminator's output does not depend on its input, or was detached from it")
    return leave_zeros(penalty(found), path, inputs)


@untraced
def logits_and_penalty(
    discriminator: Callable[..., Any],
    inputs: Inputs,
    *,
    kind: Kind = "r1",
    weight: Number | None = None,
    select: Select | None = None,
    target: Number | None = None,
    dims: int | tuple[int, ...] | None = None,
    reduction: str = "mean",
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> tuple[Any, Tensor]:
    """The discriminator's logits and the penalty at the same inputs, to be used in one loss with one backward.

    Where the discriminator is piecewise affine and keeps the samples apart, loss and penalty together take four
    forwards' work instead of six. Convolutions, products with weights, ReLUs, clamps, poolings, dropout, sums, masks,
    slices and reshapes are; batch statistics, normalizations of the input, smooth activations and attention are not.
    ``explain_penalty`` says whether one pass does. Of several logits a sample (patches, scales), it does where a loss
    has the same gradient in all of them. Elsewhere, and where D is small (see ``gradient_penalty``), it is
    ``penalty_from_logits``. The numbers are the same. In one pass, what the forward kept is freed at once, as by
    ``gradient_penalty``, unless more than one logit a sample was returned.

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
    penalty = Penalty(kind, weight, target, dims, reduction)
    returned, logits, x, tracer, reason = _forward(discriminator, inputs, select, args, kwargs)
    if tracer is not None and reason is None:
        returned, norms = one_pass(returned, logits, x, tracer, penalty.norms)
        return returned, penalty.of_norms(norms)
    value = _penalty(logits, x, penalty, plain=tracer is None)
    if tracer is not None:
        for tensor in x:
            leave_unread(tensor)
    return returned, value


@untraced
def explain_penalty(
    discriminator: Callable[..., Any],
    inputs: Inputs,
    *,
    select: Select | None = None,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> str:
    """Run the discriminator once, and say whether ``logits_and_penalty`` takes one pass and, if not, why not.

    Returns:
        "one pass" where loss and penalty take four forwards' work whatever the loss, followed by a condition where that
        depends on the loss; or "general path" with the reason: the operation, and the file and line of its call.
    """
    forward = _forward(discriminator, inputs, select, args, kwargs)
    if forward.tracer is None or forward.reason is not None:
        return f"general path: {forward.reason}"
    remark = forward.tracer.remark()
    return "one pass" if remark is None else f"one pass, {remark}"


class _Forward(NamedTuple):
    """What a discriminator returned, the logits among it, and the inputs that they came from."""

    returned: Any
    logits: list[Tensor]
    inputs: tuple[Tensor, ...]
    tracer: Tracer | None  # None: the discriminator is left to PyTorch
    reason: str | None  # why one pass does not do


def _forward(
    discriminator: Callable[..., Any],
    inputs: Inputs,
    select: Select | None,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
) -> _Forward:
    check_inputs("inputs", inputs)
    check_select(select)
    refuse_sharded(discriminator)
    _require_grad_mode()
    given = differentiable(inputs)
    x = floating(given)
    if _is_small(discriminator, x):
        with uncompiled:
            returned = discriminator(given, *args, **(kwargs or {}))
        return _Forward(returned, logits_of(returned, select, len(x[0])), x, None, REASON)
    with twice_differentiable(), Tracer(*x) as tracer:
        returned = discriminator(given, *args, **(kwargs or {}))
    logits = logits_of(returned, select, len(x[0]))
    return _Forward(returned, logits, x, tracer, tracer.judge(logits, returned))


def _is_small(discriminator: Callable[..., Any], inputs: tuple[Tensor, ...]) -> bool:
    return all(is_small(discriminator, x) for x in inputs)


def _require_grad_mode() -> None:
    if not torch.is_grad_enabled():
        raise RuntimeError("a gradient penalty needs gradients: call it outside torch.no_grad() and inference_mode()")
