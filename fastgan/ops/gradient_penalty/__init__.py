"""Gradient penalties: exact, and for any discriminator that PyTorch can differentiate twice.

The path of a call through the files of this folder:

    points, inputs          the points at which the gradient is taken, and the checks of the inputs
    small                   whether fastgan's functions or PyTorch's run (overhead, size, called_modules,
                            mentioned)
    repeated                repeats a call of a small discriminator
    forward                 calls any other discriminator, rerouted and traced
    outputs                 selects the logits in its output
    eligibility             whether the trace allows one pass, by rules (products, shapes, writes, fused, table, layout)
    one_pass                the gradients and the logits of a traced forward in one pass
    graph_pass              the same for a small discriminator, from autograd's graph (graph_steps)
    general                 the gradients of any other forward (paths, freeing)
    differences, compiled   the same by finite differences, and inside torch.compile (drawn)
    norms, kinds            the penalty as a function of the gradients
    zeros                   gives parameters the zero gradients that PyTorch gives them

missing_derivatives finds layers without a second derivative. sharding and shards gather the weights of FSDP2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastgan.ops.gradient_penalty import compiled, repeated
from fastgan.ops.gradient_penalty.called_modules import call_of
from fastgan.ops.gradient_penalty.differences import finite_difference
from fastgan.ops.gradient_penalty.explain import explain_penalty
from fastgan.ops.gradient_penalty.forward import (
    check_call,
    naming_layers,
    require_grad_mode,
    run_unknown,
)
from fastgan.ops.gradient_penalty.from_logits import penalty_from_logits
from fastgan.ops.gradient_penalty.general import general_penalty
from fastgan.ops.gradient_penalty.graph_pass import gradient_and_logits_of, gradient_of, read_graph
from fastgan.ops.gradient_penalty.inputs import Inputs, differentiable
from fastgan.ops.gradient_penalty.kinds import Dims, Kind, Number, Penalty, penalty_of
from fastgan.ops.gradient_penalty.one_pass import one_pass
from fastgan.ops.gradient_penalty.outputs import Select, check_select, logits_of
from fastgan.ops.gradient_penalty.points import check_points, points
from fastgan.ops.gradient_penalty.sharding import gathering
from fastgan.ops.gradient_penalty.small import leave_to_pytorch, left_to_pytorch, size_of
from fastgan.ops.gradient_penalty.stored import is_any_stored
from fastgan.ops.needed import mark_unused
from fastgan.ops.regions import is_entered, traceable
from fastgan.torch_private import count_hooks

__all__ = ["explain_penalty", "gradient_penalty", "logits_and_penalty", "penalty_from_logits"]


@traceable
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
    """Compute a gradient penalty of a discriminator.

    The penalty is a function of g = dD(x)/dx, the gradient of the logits with respect to the input. The kind selects
    the points x and the function:

    | kind             | point x                                   | penalty                                    |
    |------------------|-------------------------------------------|--------------------------------------------|
    | "wgan-gp"        | alpha real + (1 - alpha) fake             | weight * mean (norm - target)^2            |
    | "wgan-lp"        | alpha real + (1 - alpha) fake             | weight * mean max(0, norm - target)^2      |
    | "max-gp"         | alpha real + (1 - alpha) fake             | weight * max norm^2                        |
    | "zero-centered"  | alpha real + (1 - alpha) fake             | weight * mean norm^2                       |
    | "dragan"         | real + alpha * 0.5 * std(real) * U(0, 1)  | weight * mean (norm - target)^2            |
    | "r1"             | real                                      | weight / 2 * mean norm^2                   |
    | "r2"             | fake                                      | weight / 2 * mean norm^2                   |
    | "r1+r2"          | real and fake                             | "r1" + "r2"                                |
    | "r1-finite-difference" | real                                | as "r1", with an approximate gradient      |
    | a function f     | as "wgan-gp"; real if ``fake`` is None    | weight * mean f(norm)                      |

    alpha is uniform in [0, 1), with one value per sample. The norm is the L2 norm of g over all dimensions of a sample,
    and the mean runs over the samples. Norms are computed in float32 or float64, also under autocast. The gradient of
    the norm at g = 0 is zero.

    If D is piecewise affine, the penalty and its gradient cost as much as four forwards; PyTorch needs six (see
    ``twice_differentiable``). In this case, the call frees the activations of its forward early, unless D or a hook has
    stored results of the forward. Models that are too small to gain from fastgan's functions on their device run
    PyTorch's own, unless ``use_backend`` selects a backend. The penalty then costs four forwards if all of these are
    piecewise affine and known, and their graph is kept until the penalty is freed.

    "r1-finite-difference" needs no double backward. Use it for models that are too large for a double backward or have
    layers without a second derivative. The value is exact. The gradient is that of
    (sum D(x + e u) - sum D(x - e u)) / (2 e), where u = dP/dg is held constant. The step e moves x by eps^(1/3)
    relative to its norm, which is 0.005 in float32. The error is O(e^2) if D is smooth. If D is piecewise affine, the
    error comes from units that switch sides between the two points. The cost is that of eight forwards, compared with
    four to six for the exact penalty. All three forwards use the same random numbers and buffers.

    Args:
        discriminator: called as ``discriminator(x, *args, **kwargs)``. It returns the logits as one tensor (N, ...). It
            may also return a list or tuple with the logits of several scales, each (N, 1, H, W), or of several periods,
            each (N, L) with different L. These are summed. For all other outputs, pass ``select``.
        real: (N, *S), floating-point; or a tuple, list or dict of tensors, which the discriminator receives in the same
            form. All floating-point tensors, each (N, ...), are differentiated, and the norm is taken over all of them
            together. Other tensors, such as labels, are passed through. Interpolated inputs use those of ``real``.
        fake: the same form and shapes as ``real``. "r1" and "dragan" ignore it.
        kind: a name from the table, or a function that maps the norms (N,) to one penalty per sample (N,).
        weight: factor of the penalty, a number or a tensor of shape (). Default: 10.
        select: selects the logits among the outputs. An index or key; a tuple of them, whose logits are summed; or a
            function that receives the output and returns one tensor or a list of tensors.
        target: the norm at which "wgan-gp", "wgan-lp" and "dragan" are zero: a number, or a tensor that broadcasts to
            the norms. Default: 1.
        dims: the dimensions of the input over which the norm is taken, one integer or several, without 0. Default: all
            but 0. The mean also runs over the remaining dimensions.
        reduction: "mean", "sum" or "none". "none" returns one penalty per norm: (N,), or (N, ...) with ``dims``.
        args, kwargs: further arguments of the discriminator, such as labels.
        generator: the random number generator for alpha and the noise.

    Returns:
        The penalty, a tensor of shape () unless ``reduction="none"``. Its dtype is float32, or float64 for float64
        inputs. It can be differentiated once, with respect to the parameters of the discriminator and to everything
        that ``weight``, ``target`` and a function ``kind`` depend on. Parameters that the penalty does not depend on,
        such as biases before ReLUs, get the same gradient as in PyTorch: zeros or None. ``real`` and ``fake`` get no
        gradient.

    Raises:
        ValueError: the kind or reduction is unknown; ``real`` and ``fake`` differ in form or shape; the output is
            ambiguous; the logits do not have one row per sample, or do not depend on the input; the kind has no
            target; ``dims`` contains 0 or dimensions that the input does not have.
        TypeError: an argument has the wrong type; an input is not floating-point; the kind needs ``fake``.
        RuntimeError: gradients are disabled; the discriminator is sharded by FSDP1 or tensor parallelism; a layer has
            no second derivative.

    ```python
    import torch
    import fastgan

    discriminator = torch.nn.Sequential(
        torch.nn.Flatten(),
        torch.nn.Linear(768, 64),
        torch.nn.ReLU(),
        torch.nn.Linear(64, 1),
    )
    real, fake = torch.randn(4, 3, 16, 16), torch.randn(4, 3, 16, 16)
    penalty = fastgan.gradient_penalty(discriminator, real, fake, kind="wgan-gp", weight=10)
    (discriminator(fake).mean() - discriminator(real).mean() + penalty).backward()
    ```

    Sources: Gulrajani et al. 2017 (wgan-gp), Petzka et al. 2018 (wgan-lp), Mescheder et al. 2018 (r1, r2),
    Kodali et al. 2017 (dragan), Zhou et al. 2019 (max-gp), Thanh-Tung et al. 2019 (zero-centered). docs/conventions.md
    lists the calls that match the penalties of other code bases.
    """
    penalty = penalty_of(kind, weight, target, dims, reduction)
    if select is not None:
        check_select(select)
    if is_entered() or penalty.is_approximate:
        check_points(kind, real, fake)
        parts = [
            _traced_or_approximate(discriminator, point, penalty, select, args, kwargs)
            for point in points(kind, real, fake, generator)
        ]
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]
    if not torch.is_grad_enabled():
        require_grad_mode()
    call = call_of(discriminator, (kind if isinstance(kind, str) else None, real, fake), args, kwargs)
    read = left_to_pytorch(call)
    if read is None:
        check_points(kind, real, fake)
    total: Tensor | None = None
    readable = False
    for point in points(kind, real, fake, generator):
        if read is not None:
            part = repeated.outputs_and_penalty(discriminator, point, penalty, select, args, kwargs, read)[1]
        else:
            given, x = differentiable(point)
            hooks = count_hooks()
            with gathering(discriminator):
                with size_of(discriminator, x, call).rerouting(x) as rerouting:
                    box = [discriminator(given, *args, **(kwargs or {}))]
                small = rerouting.never_started
                private = not small and not is_any_stored(rerouting.results, box, x)
                returned = box.pop()
                logits = logits_of(returned, select, x[0].shape[0])
                graph = read_graph(logits, x, hooks) if small and rerouting.only_pytorch_ran else None
                readable = graph is not None
                if graph is not None:
                    part = penalty([gradient_of(graph)])
                else:
                    with naming_layers(discriminator, given, select, args, kwargs):
                        part = general_penalty(logits, x, penalty, private_graph=private)
            if not small:
                for tensor in x:
                    mark_unused(tensor)
            call = call if small and rerouting.only_pytorch_ran else None
        total = part if total is None else total + part
    if call is not None and read is None:
        leave_to_pytorch(call, x[0].shape[0], readable=readable)
    assert total is not None
    return total


def _traced_or_approximate(
    discriminator: Callable[..., Any],
    point: Inputs,
    penalty: Penalty,
    select: Select | None,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
) -> Tensor:
    """Compute the penalty at one point while torch.compile traces, or by finite differences."""
    require_grad_mode()
    if is_entered():
        penalty.check_compilable()
        return penalty(compiled.gradients_at(discriminator, point, select, args, kwargs))
    with gathering(discriminator):
        return finite_difference(discriminator, point, penalty, select, args, kwargs or {}, keep=False)[1]


@traceable
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
    """Call the discriminator and compute the gradient penalty at the same inputs.

    If the discriminator is piecewise affine and does not mix samples, the loss and the penalty take one pass, which
    costs as much as four forwards instead of six. Convolutions, products with weights, ReLU, clamp, pooling, dropout,
    sums, masks, slices, reshapes and Fourier transforms allow one pass. Batch statistics, layer and group
    normalization, smooth activations and attention do not. If there are several logits per sample (patches, scales),
    the loss must also have the same gradient for all logits of a sample. ``explain_penalty`` reports whether one pass
    is possible. Otherwise, the penalty is computed as in ``penalty_from_logits``. The results are the same up to
    rounding. One pass frees the activations of the forward early if there is one logit per sample, nothing else is
    returned or stored, and the model is not small (see ``gradient_penalty``). A loss may use features that the forward
    stores. But the gradient of the logits does not pass through such features in one pass: call ``retain_grad()`` or
    ``register_hook`` on them inside the forward, which then takes the general path.

    Args:
        discriminator: called as ``discriminator(inputs, *args, **kwargs)``; see ``gradient_penalty``.
        inputs: (N, *S), floating-point; or a tuple, list or dict of tensors, which the discriminator receives in the
            same form. They get no gradient.
        kind, weight, select, target, dims, reduction: as for ``gradient_penalty``. The gradient is always taken at
            ``inputs``; the kind only selects the function of its norms.
        args, kwargs: further arguments of the discriminator.

    Returns:
        The output of the discriminator, and the penalty as returned by ``gradient_penalty``. Both can be differentiated
        once with respect to the parameters.

    Raises:
        ValueError, TypeError, RuntimeError: as in ``gradient_penalty``.

    ```python
    import torch
    import fastgan

    discriminator = torch.nn.Sequential(
        torch.nn.Flatten(),
        torch.nn.Linear(192, 64),
        torch.nn.ReLU(),
        torch.nn.Linear(64, 1),
    )
    real = torch.randn(4, 3, 8, 8)
    logits, penalty = fastgan.logits_and_penalty(discriminator, real, kind="r1", weight=10)
    (torch.nn.functional.softplus(-logits).mean() + penalty).backward()
    ```

    docs/how_it_works.md explains the arithmetic.
    """
    penalty = penalty_of(kind, weight, target, dims, reduction)
    if is_entered():
        penalty.check_compilable()
        check_call(inputs, select)
        returned, grads = compiled.outputs_and_gradients(discriminator, inputs, select, args, kwargs)
        return returned, penalty(grads)
    if penalty.is_approximate:
        check_call(inputs, select)
        with gathering(discriminator):
            return finite_difference(discriminator, inputs, penalty, select, args, kwargs or {}, keep=True)
    if not torch.is_grad_enabled():
        require_grad_mode()
    known = call_of(discriminator, (inputs,), args, kwargs)
    read = left_to_pytorch(known)
    if read is not None:
        return repeated.outputs_and_penalty(discriminator, inputs, penalty, select, args, kwargs, read, both=True)
    with gathering(discriminator):
        forward = run_unknown(discriminator, inputs, select, args, kwargs, known)
        returned, logits, x, tracer, obstacle, graph, selection = forward
        if graph is not None:
            grad, returned = gradient_and_logits_of(graph)
            return returned, penalty([grad])
        if selection is not None and tracer is not None and obstacle is None:
            return one_pass(returned, selection.outputs, x, tracer, penalty, selection.weights)
        with naming_layers(discriminator, inputs, select, args, kwargs):
            value = general_penalty(logits, x, penalty)
    if tracer is not None:
        for tensor in x:
            mark_unused(tensor)
    return returned, value
