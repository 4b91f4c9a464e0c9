"""The loss and the gradient penalty of a batch in one pass that costs as much as four forwards; PyTorch needs six.

Let D be affine around each sample. Let g_i = dD(x_i)/dx, and let delta_i be the gradient at a place where a constant k
(a bias, a position table, a padding) is added. Then

    D(x_i) = <g_i, x_i> + sum over constants <delta_i, k>.

The penalty differentiates g with respect to the parameters. A loss with c_i = dloss/dD(x_i) needs the parameter
gradient of sum_i c_i D(x_i), which the right side gives in the same differentiation. The combined tangent is
v_i + c_i x_i at the input, where v is the tangent of the penalty, and c_i k at each constant. Each layer computes one
weight gradient. The backward of the forward itself never runs.

If there are several logits per sample (patches, scales), g_i is the gradient of their sum. If a loss has different
gradients for the logits of a sample, its own backward runs through the forward, which is kept for this purpose.

References: Etmann, A Closer Look at Double Backpropagation, 2019 (arXiv 1906.06637), shows that norm penalties of
locally linear networks need less work. Balestriero and Baraniuk, 2021 (arXiv 2104.00219), compute tangents through
piecewise-affine networks. Computing the loss in the pass of the penalty is fastgan's contribution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fastgan import backends, torch_private
from fastgan.ops.gradient_penalty.call import Constant
from fastgan.ops.gradient_penalty.eligibility import Tracer
from fastgan.ops.gradient_penalty.layout import Layout, rows, sums
from fastgan.ops.gradient_penalty.sharding import refuse_sharded_graph
from fastgan.ops.gradient_penalty.zeros import reached_by_zeros
from fastgan.ops.library import last_order, untraced, without_autocast
from fastgan.torch_private import FunctionalTensor


def one_pass(
    returned: Any,
    outputs: Sequence[Tensor],
    inputs: tuple[Tensor, ...],
    tracer: Tracer,
    penalty: Callable[[tuple[Tensor, ...]], Tensor],
    weights: Sequence[Tensor] | None = None,
) -> tuple[Any, Tensor]:
    """Return the output of the discriminator, with logits that the pass differentiates, and the penalty.

    Args:
        returned: the output of the discriminator.
        outputs: the logits in it.
        inputs: the inputs of the forward, each (N, *S).
        tracer: the trace of this forward. It found no obstacle.
        penalty: a function of the gradients (N, *S).
        weights: factors of the elements of each output, if the sum of the logits is their weighted sum.
    """
    if weights is None:
        outputs = [output for output in outputs if output.requires_grad]
    else:
        tracer.single = False
    refuse_sharded_graph(tracer.path)
    grads, affine = _differentiate(outputs, inputs, tracer, weights)
    graph = _Graph(outputs, grads, affine, tracer, weights)
    parameters = [parameter for parameter, _ in tracer.parameters]
    results: tuple[Tensor, ...] = _OnePass.apply(graph, *parameters)  # type: ignore[no-untyped-call]
    if not tracer.single:
        graph.outputs = outputs
    logits = dict(zip(map(id, outputs), results, strict=False))
    if isinstance(returned, Tensor):
        returned = logits.get(id(returned), returned)
    else:
        returned = tree_map(lambda part: logits.get(id(part), part), returned)
    return returned, penalty(results[len(outputs) :])


def _differentiate(
    outputs: Sequence[Tensor], inputs: tuple[Tensor, ...], tracer: Tracer, weights: Sequence[Tensor] | None = None
) -> tuple[list[Tensor], Callable[[], Tensor]]:
    """Return the gradients of the sum of the logits, and a function that returns D(x) computed from them, (N,).

    D(x) sums over all logits. If there are several per sample, most losses do not use it, so it is computed when the
    function is called.
    """
    late = not tracer.single and not backends.is_lowered()
    fused: list[Constant] = []
    others: list[Constant] = []
    for constant in tracer.constants:
        if constant.edge.node in tracer.path:  # otherwise no logit depends on it, and its node may be gone
            (fused if not late and _sums_itself(constant) else others).append(constant)
    for constant in fused:
        constant.edge.node.bias_for_term = constant.value  # type: ignore[attr-defined]
    found = torch_private.gradients(
        outputs,
        [*inputs, *[constant.edge for constant in others]],
        [torch.ones_like(output) for output in outputs] if weights is None else weights,
        # Otherwise this call frees the activations of the forward.
        retain_graph=tracer.attached or tracer.sends_zeros or not tracer.single or backends.is_lowered(),
    )
    grads = [grad for grad in found[: len(inputs)] if grad is not None]
    if not grads:
        raise ValueError("the discriminator's output does not depend on its input, or was detached from it")
    sums_of_fused = []
    for constant in fused:
        node: Any = constant.edge.node
        if node.bias_term is not None:
            sums_of_fused.append((node.bias_term, constant.layout))
        node.bias_for_term = node.bias_term = None
    points = [(grad, x.detach()) for grad, x in zip(found, inputs, strict=False) if grad is not None]
    added = [
        (delta, constant) for delta, constant in zip(found[len(inputs) :], others, strict=True) if delta is not None
    ]
    samples = tracer.samples
    values = [x for _, x in points] + [constant.value for _, constant in added]
    versions = [(value, value._version) for value in values if isinstance(value, Tensor)]

    def affine() -> Tensor:
        if any(tensor._version != version for tensor, version in versions):
            raise RuntimeError(
                "an input of the discriminator or a tensor that it adds, such as a bias, was modified in place between "
                "logits_and_penalty and the backward"
            )
        with torch.enable_grad(), without_autocast(grads[0].device.type):
            terms = [sums(grad * x, Layout(0), samples) for grad, x in points]
            terms += [sums(term, layout, samples) for term, layout in sums_of_fused]
            terms += [_term(delta, constant, samples) for delta, constant in added]
            return torch.stack(terms).sum(0)

    if late:
        return grads, affine
    value = affine()
    return grads, lambda: value


def _sums_itself(constant: Constant) -> bool:
    """Return whether this is the bias of a convolution whose backward computes <delta, bias> itself."""
    return hasattr(constant.edge.node, "bias_for_term") and constant.layout.dim == 0


def _term(delta: Tensor, constant: Constant, samples: int) -> Tensor:
    """Return <delta_i, constant> for each sample, (N,)."""
    _, value, trailing, layout = constant
    is_complex = delta.is_complex()
    if is_complex:
        value = torch.as_tensor(value, dtype=delta.dtype, device=delta.device)
    if not isinstance(value, Tensor):
        return sums(delta, layout, samples) * value
    of_linear = delta.ndim == 2 and layout == Layout(0) and (samples, *value.shape) == delta.shape
    if of_linear and delta.dtype == value.dtype and not is_complex:
        return torch.mv(delta, value)  # one operator instead of three, also in the derivative
    value = value.reshape((1,) * (delta.ndim - value.ndim - trailing) + value.shape + (1,) * trailing)
    if is_complex:
        delta, value = (torch.view_as_real(z.resolve_conj()) for z in (delta, value))
    once = [d for d in range(delta.ndim) if value.shape[d] == 1 and delta.shape[d] != 1 and d != layout.dim]
    if once:
        delta = delta.sum(once, keepdim=True, dtype=torch.promote_types(delta.dtype, torch.float32))
    return sums(delta * value, layout, samples)


class _Graph:
    """The tensors that the backward differentiates. They are not inputs or outputs of the autograd.Function."""

    def __init__(
        self,
        outputs: Sequence[Tensor],
        grads: Sequence[Tensor],
        affine: Callable[[], Tensor],
        tracer: Tracer,
        weights: Sequence[Tensor] | None = None,
    ) -> None:
        self.grads, self.affine = grads, affine
        self.views = [view for _, view in tracer.parameters]
        self.samples = tracer.samples
        self.layouts = [layout for output in outputs if (layout := tracer.layout(output)) is not None]
        self.values = [output.detach() for output in outputs]
        self.path, self.attached = tracer.path, tracer.attached
        self.weights = weights
        # The logits with the graph of their forward, if a loss may need it.
        self.outputs: Sequence[Tensor] | None = None

    def zeros(self) -> list[bool]:
        """Return for each view whether PyTorch returns zeros if a penalty does not depend on it."""
        below = reached_by_zeros(self.path)
        return [view.grad_fn in below for view in self.views]

    def shared(self, factors: Sequence[Tensor | None]) -> Tensor | None:
        """Return the gradient that all logits of a sample share, (N,), or None if they differ."""
        if self.outputs is None:
            assert factors[0] is not None
            return sums(factors[0], self.layouts[0], self.samples)
        if any(factor is None for factor in factors):
            return None
        if self.weights is not None:
            return self._shared_of_weighted([factor for factor in factors if factor is not None], self.weights)
        parts = [
            _one_row(factor, layout, self.samples)
            for factor, layout in zip(factors, self.layouts, strict=True)
            if factor is not None
        ]
        first = parts[0][:, :1]
        certain = len(parts) == 1 and first.shape == parts[0].shape
        if not certain:
            if not _is_readable(first):
                return None
            if not all(torch.equal(part, first.expand_as(part)) for part in parts):
                return None
        return first[:, 0]

    def _shared_of_weighted(self, factors: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor | None:
        """Return c, (N,), if each factor is c times the weights, and these are alike in all samples."""
        if not _is_readable(factors[0]):
            return None
        quotients = []
        for factor, weight, layout in zip(factors, weights, self.layouts, strict=True):
            of_samples, parts = rows(weight, layout, self.samples), rows(factor, layout, self.samples)
            used = of_samples[0] != 0
            if not torch.equal(of_samples, of_samples[:1].expand_as(of_samples)) or parts[:, ~used].any():
                return None
            quotients.append(parts[:, used] / of_samples[:, used])
        quotient = torch.cat(quotients, 1)
        c = quotient[:, :1]
        rounding = 4 * torch.finfo(c.dtype).eps
        return c[:, 0] if quotient.numel() and torch.allclose(quotient, c, rounding, 0) else None


def _is_readable(tensor: Tensor) -> bool:
    """Return whether values may be read. They may not be while a graph is recorded."""
    capturing = tensor.is_cuda and torch.cuda.is_current_stream_capturing()
    return not capturing and not isinstance(tensor, FunctionalTensor)


def _one_row(factor: Tensor, layout: Layout, samples: int) -> Tensor:
    """Return the values of each sample, (N, M). If the strides show that all are equal, return them once, (N, 1)."""
    same = all(step == 0 or d == layout.dim for d, step in enumerate(factor.stride()) if factor.shape[d] > 1)
    if same and layout == Layout(layout.dim):
        for d in range(factor.ndim):
            if d != layout.dim or samples == 1:
                factor = factor.narrow(d, 0, 1)
    return rows(factor, layout, samples)


class _OnePass(torch.autograd.Function):
    """Return the logits and the gradients with respect to the inputs, as functions of the parameters."""

    @staticmethod
    def forward(ctx: Any, graph: _Graph, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*parameters)
        ctx.graph = graph
        return *(value.clone() for value in graph.values), *(grad.detach() for grad in graph.grads)

    @staticmethod
    @untraced
    def backward(ctx: Any, *factors: Tensor | None) -> tuple[Tensor | None, ...]:
        parameters, graph = ctx.saved_tensors, ctx.graph
        wanted = [view for view, needed in zip(graph.views, ctx.needs_input_grad[1:], strict=True) if needed]
        detached = [None if factor is None else factor.detach() for factor in factors]
        by_logits, by_grads = detached[: len(graph.values)], detached[len(graph.values) :]
        pairs = list(zip(graph.grads, by_grads, strict=True))
        if any(factor is not None for factor in by_logits):
            shared = graph.shared(by_logits)  # c (N,)
            if shared is None:
                pairs += zip(graph.outputs, by_logits, strict=True)
            else:
                affine = graph.affine()
                pairs.append((affine, shared.to(affine.dtype)))
        pairs = [(tensor, factor) for tensor, factor in pairs if factor is not None and tensor.requires_grad]
        # The retain_graph of the running backward, which may still have to pass the graph of other outputs.
        keep = torch_private.keeps_graph() or graph.attached
        found: Any = ()
        if pairs and wanted:
            tensors, by = zip(*pairs, strict=True)
            found = torch_private.gradients(tensors, wanted, by, create_graph=False, retain_graph=keep)
        rest = iter(found)
        grads = [next(rest, None) if needed else None for needed in ctx.needs_input_grad[1:]]
        missing = [grad is None and needed for grad, needed in zip(grads, ctx.needs_input_grad[1:], strict=True)]
        if any(missing) and any(factor is not None for factor in by_grads):
            as_pytorch = zip(grads, missing, graph.zeros(), parameters, strict=True)
            grads = [torch.zeros_like(p) if absent and zero else grad for grad, absent, zero, p in as_pytorch]
        if torch.is_grad_enabled():
            message = "logits_and_penalty: its gradient cannot be differentiated again; use gradient_penalty"
            grads = last_order(message, grads, [*factors, *parameters])
        return None, *grads
