"""Gradient penalties: a function of the discriminator's gradient at chosen points, exact, for any discriminator."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgan.ops.gradient_penalty import compiled
from fastgan.ops.gradient_penalty.behind import Call, call_of
from fastgan.ops.gradient_penalty.differences import finite_difference
from fastgan.ops.gradient_penalty.eligibility import Tracer
from fastgan.ops.gradient_penalty.general import gradients, plain_gradients
from fastgan.ops.gradient_penalty.inputs import Inputs, check_inputs, differentiable, floating, named, replaced
from fastgan.ops.gradient_penalty.kinds import Dims, Kind, Number, Penalty, penalty_of
from fastgan.ops.gradient_penalty.lacks import Layers, NoSecondDerivative
from fastgan.ops.gradient_penalty.one_pass import one_pass
from fastgan.ops.gradient_penalty.outputs import Select, check_select, logits_of
from fastgan.ops.gradient_penalty.points import points
from fastgan.ops.gradient_penalty.sharding import gathering
from fastgan.ops.gradient_penalty.small import (
    REASON,
    Size,
    forget,
    is_left_to_pytorch,
    leave_to_pytorch,
    remember,
    size_of,
    was_small,
)
from fastgan.ops.gradient_penalty.zeros import leave_zeros
from fastgan.ops.library import untraced
from fastgan.ops.needed import mark_unused
from fastgan.ops.regions import compilable, is_entered
from fastgan.ops.twice_differentiable import Rerouting, twice_differentiable, uncompiled

__all__ = ["explain_penalty", "gradient_penalty", "logits_and_penalty", "penalty_from_logits"]


@compilable
def gradient_penalty(
    discriminator: Callable[..., Any],
    real: Inputs,
    fake: Inputs | None = None,
    *,
    kind: Kind = "wgan-gp",
    weight: Number | None = None,
    select: Select | None = None,
    target: Number | None = None,
    dims: Dims | None = None,
    reduction: str = "mean",
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """A penalty on the gradient g = dD(x)/dx of the discriminator's logits, at points made from real and fake.

    | kind             | at                                        | penalty                                    |
    |------------------|-------------------------------------------|--------------------------------------------|
    | "wgan-gp"        | alpha real + (1 - alpha) fake             | weight * mean (norm - target)^2            |
    | "wgan-lp"        | alpha real + (1 - alpha) fake             | weight * mean max(0, norm - target)^2      |
    | "max-gp"         | alpha real + (1 - alpha) fake             | weight * max norm^2                        |
    | "zero-centered"  | alpha real + (1 - alpha) fake             | weight * mean norm^2                       |
    | "dragan"         | real + alpha * 0.5 * std(real) * U(0, 1)  | weight * mean (norm - target)^2            |
    | "r1"             | real                                      | weight / 2 * mean norm^2                   |
    | "r2"             | fake                                      | weight / 2 * mean norm^2                   |
    | "r1+r2"          | real and fake                             | the sum of both                            |
    | "r1-finite-difference" | real                                | as "r1"; its gradient is approximate       |
    | a function f     | as "wgan-gp"; real, if there is no fake   | weight * mean f(norm)                      |

    "r1-finite-difference" is R1 whose gradient is approximated without a double backward, for models that are too large
    for one or have layers without a second derivative. Its value is exact. Its gradient is that of
    (sum D(x + e u) - sum D(x - e u)) / (2 e), with u = dP/dg held fixed and e so that x moves by the cube root of its
    precision, relative to its norm (0.005 in float32). Its bias is of the order e^2 where D is smooth; where D is
    piecewise affine, it comes from the units that change sides between the two points. It costs a forward and a
    backward to the inputs, then two forwards and their backward: 8 forwards' work where an exact penalty takes 4 to 6.
    The two forwards use the same random numbers and, of a module, the same buffers as the first.

    alpha ~ U(0, 1), one for each sample; norm is |g| over all dimensions of a sample, and the mean is over samples.
    Norms are computed in float32 or better, under autocast too. The gradient of a norm of zero is zero.

    Penalty and gradient take the work of four forwards where PyTorch takes six, if D is piecewise affine (see
    ``twice_differentiable``). What such a forward saved is freed at once, so a feature that D kept elsewhere cannot be
    differentiated afterwards. On a CPU, a module that is too small to gain runs PyTorch's own functions, unless
    ``use_backend`` chooses another backend.

    Args:
        discriminator: called as ``discriminator(x, *args, **kwargs)``. It returns logits: one tensor (N, ...), or a
            tuple or list of tensors that can only be logits of several scales, (N, 1, H, W) each, or of several
            periods, (N, L) each, with other lengths. These are summed. For any other output, see ``select``.
        real: (N, *S), floating; or a tuple, list or dict of tensors, which the discriminator gets in the same form.
            All floating ones, (N, ...) each, are differentiated, and |g| is one norm over all of them. Others, such as
            labels, are passed through; interpolates take those of ``real``.
        fake: the same form and shapes. "r1" and "dragan" do not use it.
        kind: one of the table, or a function of the norms (N,) that returns a penalty for each, (N,).
        weight: factor, a number or a tensor of shape (); None: 10.
        select: which outputs are logits: an index or a key, several of them in a tuple (they are summed), or a function
            of what the discriminator returned, which returns a tensor or several.
        target: what the norm is compared with, for "wgan-gp", "wgan-lp" and "dragan": a number, or a tensor that fits
            the norms; None: 1.
        dims: the dimensions of the input that the norm is over, an integer or several, without 0; None: all but 0. The
            mean is then over the dimensions that remain, too.
        reduction: "mean"; "sum"; or "none", for the penalty of each sample, (N,), or of all that ``dims`` leaves.
        args, kwargs: further arguments of the discriminator, such as labels.
        generator: draws alpha and the noise.

    Returns:
        The penalty, () unless ``reduction="none"``, float32, or float64 for float64 inputs. It is differentiable once
        in the discriminator's parameters, and in whatever ``weight``, ``target`` and a function ``kind`` are made from.
        Parameters that it does not depend on, such as biases before ReLUs, get zeros where PyTorch gives zeros, and
        none elsewhere. ``real`` and ``fake`` get no gradient.

    Raises:
        ValueError: an unknown kind or reduction; real and fake differ in form or shape; an output that need not be a
            logit; logits without a row for each sample; logits that do not depend on the input; a target for a kind
            without one; dims that are not in the input, or name the samples.
        TypeError: an argument has a wrong type; an input is not floating; ``fake`` is missing for a kind that needs it.
        RuntimeError: gradients are off, or FSDP1 or tensor parallelism shards the discriminator.

    Sources: Gulrajani et al. 2017 (wgan-gp), Petzka et al. 2018 (wgan-lp), Mescheder et al. 2018 (r1, r2),
    Kodali et al. 2017 (dragan), Zhou et al. 2019 (max-gp), Thanh-Tung et al. 2019 (zero-centered). The calls that equal
    other code bases' penalties are in docs/conventions.md.
    """
    penalty = penalty_of(kind, weight, target, dims, reduction)
    check_select(select)
    total: Tensor | None = None
    for point in points(kind, real, fake, generator):
        _require_grad_mode()
        if is_entered():
            _refuse_approximate(penalty)
            part = penalty(compiled.gradients_at(discriminator, point, select, args, kwargs))
            total = part if total is None else total + part
            continue
        if penalty.is_approximate:
            with gathering(discriminator):
                return finite_difference(discriminator, point, penalty, select, args, kwargs or {}, keep=False)[1]
        given = differentiable(point)
        x = floating(given)
        call = call_of(discriminator, x, args, kwargs)
        if is_left_to_pytorch(call, x):
            with uncompiled:
                returned = discriminator(given, *args, **(kwargs or {}))
            part = penalty(plain_gradients(logits_of(returned, select, x[0].shape[0]), x))
            total = part if total is None else total + part
            continue
        with gathering(discriminator), _naming(discriminator, given, select, args, kwargs):
            with Rerouting(size_of(discriminator, x).after) as rerouting:
                returned = discriminator(given, *args, **(kwargs or {}))
            small = rerouting.never_began
            part = _penalty(logits_of(returned, select, x[0].shape[0]), x, penalty, ours=not small)
        if small and call is not None and rerouting.is_pytorchs:
            leave_to_pytorch(call)
        if not small:
            for tensor in x:
                mark_unused(tensor)
        total = part if total is None else total + part
    assert total is not None
    return total


@compilable
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
    """The penalty of ``gradient_penalty`` from logits that were computed already, at the inputs that they came from.

        images.requires_grad_()
        with fastgan.twice_differentiable():
            logits = discriminator(images)
        loss = softplus(-logits).mean() + fastgan.penalty_from_logits(logits, images, kind="r1", weight=10)

    Args:
        logits: what the discriminator returned for ``inputs``.
        inputs: (N, *S), floating; or a tuple, list or dict of tensors. The floating ones must have required a gradient
            when the logits were computed.
        kind, weight, select, target, dims, reduction: see ``gradient_penalty``. The kind is a function of the norms
            alone; the points are the inputs as they are.

    Returns:
        The penalty, as ``gradient_penalty`` returns it. It is differentiable once, in the inputs too.

    Raises:
        ValueError: an input does not require a gradient; otherwise as ``gradient_penalty``.
        TypeError, RuntimeError: as ``gradient_penalty``.
    """
    penalty = penalty_of(kind, weight, target, dims, reduction)
    if penalty.is_approximate:
        raise ValueError(f"kind {kind!r} calls the discriminator: use logits_and_penalty")
    check_inputs("inputs", inputs)
    check_select(select)
    _require_grad_mode()
    for name, tensor in named("inputs", inputs):
        if tensor.is_floating_point() and not tensor.requires_grad:
            raise ValueError(
                f"{name} must require a gradient before the discriminator is called: {name}.requires_grad_()"
            )
    x = floating(inputs)
    if is_entered():
        return penalty(compiled.gradients_of(logits, x, select))
    return _penalty(logits_of(logits, select, x[0].shape[0]), x, penalty)


def _penalty(logits: Sequence[Tensor], inputs: tuple[Tensor, ...], penalty: Penalty, *, ours: bool = False) -> Tensor:
    """The penalty of the gradients of the logits' sum.

    Args:
        ours: nobody else has these logits, so what their forward saved may be freed.
    """
    grads, path = gradients(logits, inputs, ours=ours)
    value = penalty([grad for grad in grads if grad is not None])
    return leave_zeros(value, path, inputs) if path else value


def gradients_of_logits(
    discriminator: Callable[..., Any],
    inputs: Inputs,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    create_graph: bool,
) -> tuple[Tensor, list[Tensor]]:
    """The logits, one tensor, and the gradients of their sum in the inputs, which keep their own graph."""
    check_inputs("inputs", inputs)
    given = replaced(inputs, lambda x: x.view_as(x) if x.requires_grad else x.detach().requires_grad_())
    x = floating(given)
    with gathering(discriminator):
        with twice_differentiable():
            returned = discriminator(given, *args, **kwargs)
        if not isinstance(returned, Tensor):
            raise TypeError(f"the discriminator must return one tensor of logits, got {type(returned).__name__}")
        grads, _ = gradients(logits_of(returned, None, x[0].shape[0]), x, create_graph=create_graph)
    return returned, [grad for grad in grads if grad is not None]


@compilable
def logits_and_penalty(
    discriminator: Callable[..., Any],
    inputs: Inputs,
    *,
    kind: Kind = "r1",
    weight: Number | None = None,
    select: Select | None = None,
    target: Number | None = None,
    dims: Dims | None = None,
    reduction: str = "mean",
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> tuple[Any, Tensor]:
    """What the discriminator returns, and the penalty at the same inputs, for one loss with one backward.

        logits, penalty = fastgan.logits_and_penalty(discriminator, real, kind="r1", weight=10)
        (softplus(-logits).mean() + penalty).backward()

    Where the discriminator is piecewise affine and keeps the samples apart, loss and penalty together take the work of
    four forwards instead of six. Convolutions, products with weights, ReLUs, clamps, poolings, dropout, sums, masks,
    slices and reshapes are such operations. Batch statistics, normalizations of the input, smooth activations and
    attention are not. With several logits a sample (patches, scales), the loss must also have the same gradient in all
    of them. ``explain_penalty`` says whether one pass is possible. Elsewhere, and where D is small (see
    ``gradient_penalty``), the result is that of ``penalty_from_logits``. The numbers are the same. One pass frees what
    the forward saved at once, unless more than one logit a sample was returned.

    Args:
        discriminator: called as ``discriminator(inputs, *args, **kwargs)``; see ``gradient_penalty``.
        inputs: (N, *S), floating; or a tuple, list or dict of tensors, which the discriminator gets in the same form.
            They get no gradient.
        kind, weight, select, target, dims, reduction: see ``gradient_penalty``. The kind is a function of the norms
            alone; the points are the inputs as they are.
        args, kwargs: further arguments of the discriminator.

    Returns:
        Everything that the discriminator returned, and the penalty as ``gradient_penalty`` returns it. Both are
        differentiable once in the parameters.

    Raises:
        ValueError, TypeError, RuntimeError: as ``gradient_penalty``.

    The source of the one pass is one_pass.py.
    """
    penalty = penalty_of(kind, weight, target, dims, reduction)
    if is_entered():
        _refuse_approximate(penalty)
        _check_call(inputs, select)
        returned, grads = compiled.outputs_and_gradients(discriminator, inputs, select, args, kwargs)
        return returned, penalty(grads)
    with gathering(discriminator):
        if penalty.is_approximate:
            check_inputs("inputs", inputs)
            check_select(select)
            _require_grad_mode()
            return finite_difference(discriminator, inputs, penalty, select, args, kwargs or {}, keep=True)
        returned, logits, x, tracer, reason, plain = _forward(discriminator, inputs, select, args, kwargs)
        if plain:
            return returned, penalty(plain_gradients(logits, x))
        if tracer is not None and reason is None:
            return one_pass(returned, logits, x, tracer, penalty)
        with _naming(discriminator, inputs, select, args, kwargs):
            value = _penalty(logits, x, penalty)
    if tracer is not None:
        for tensor in x:
            mark_unused(tensor)
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
    """Whether ``logits_and_penalty`` takes one pass for this discriminator and, if not, why not.

    The discriminator runs once. BatchNorm in training renews its running statistics, as in any forward.

    Args:
        discriminator, inputs, select, args, kwargs: as for ``logits_and_penalty``.

    Returns:
        "one pass" where loss and penalty take four forwards' work whatever the loss, followed by a condition where that
        depends on the loss; or "general path" with the reason: the operation, and the file and line of its call; or
        "no penalty" with every layer that has no second derivative, by its path in the model.

    Raises:
        ValueError, TypeError, RuntimeError: as ``logits_and_penalty``.
    """
    layers = Layers(discriminator)
    with gathering(discriminator):
        with layers.watched():
            forward = _forward(discriminator, inputs, select, args, kwargs)
        lacks = layers.lacking(forward.logits, forward.inputs)
    if lacks:
        return f"no penalty: {len(lacks)} without a second derivative: {'; '.join(lacks)}"
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
    reason: str | None  # why one pass is not possible
    plain: bool = False  # PyTorch's own functions ran, and have every derivative


def _forward(
    discriminator: Callable[..., Any],
    inputs: Inputs,
    select: Select | None,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
) -> _Forward:
    _check_call(inputs, select)
    given = differentiable(inputs)
    x = floating(given)

    def call() -> Any:
        return discriminator(given, *args, **(kwargs or {}))

    known = call_of(discriminator, x, args, kwargs)
    if is_left_to_pytorch(known, x):
        with uncompiled:
            returned = call()
        return _Forward(returned, logits_of(returned, select, x[0].shape[0]), x, None, REASON, plain=True)
    size = size_of(discriminator, x)
    if size is not Size.LARGE:
        return _maybe_small(discriminator, call, known, size, select, x)
    with Rerouting(), Tracer(*x) as tracer:
        returned = call()
    logits = logits_of(returned, select, x[0].shape[0])
    return _Forward(returned, logits, x, tracer, tracer.judge(logits, returned))


def _check_call(inputs: Inputs, select: Select | None) -> None:
    check_inputs("inputs", inputs)
    check_select(select)
    _require_grad_mode()


def _refuse_approximate(penalty: Penalty) -> None:
    if penalty.is_approximate:
        raise ValueError(
            f"kind {penalty.kind!r} cannot be compiled: use kind 'r1' inside torch.compile, or call the penalty in a "
            "function decorated with torch.compiler.disable"
        )


@contextmanager
def _naming(
    discriminator: Callable[..., Any],
    inputs: Inputs,
    select: Select | None,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
) -> Iterator[None]:
    """Inside, an error about second derivatives gets the names of the layers, which a second forward finds."""
    try:
        yield
    except NoSecondDerivative as error:
        layers = Layers(discriminator)
        with layers.watched():
            forward = _forward(discriminator, inputs, select, args, kwargs)
        forget(call_of(discriminator, floating(inputs), args, kwargs))
        raise error.named(layers.lacking(forward.logits, forward.inputs)) from None


def _maybe_small(
    discriminator: Callable[..., Any],
    call: Callable[[], Any],
    known: Call | None,
    size: Size,
    select: Select | None,
    x: tuple[Tensor, ...],
) -> _Forward:
    """A forward whose work is counted while it runs, unless it is surely small."""
    seen = size is Size.SMALL or was_small(discriminator, x)
    tracer = None if seen else Tracer(*x)
    with Rerouting(size.after) as rerouting, tracer or nullcontext():
        returned = call()
    logits = logits_of(returned, select, x[0].shape[0])
    small = rerouting.never_began
    if small and known is not None and rerouting.is_pytorchs:
        leave_to_pytorch(known)
    elif size is Size.UNKNOWN and small != seen:
        remember(discriminator, x, small)
    if small:
        return _Forward(returned, logits, x, None, REASON)
    if tracer is None:
        return _Forward(returned, logits, x, None, "the forward was a small one when it ran before")
    return _Forward(returned, logits, x, tracer, tracer.judge(logits, returned, late=True))


def _require_grad_mode() -> None:
    if not torch.is_grad_enabled():
        raise RuntimeError("a gradient penalty needs gradients: call it outside torch.no_grad() and inference_mode()")
