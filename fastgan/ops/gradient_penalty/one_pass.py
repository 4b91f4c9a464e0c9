"""Loss and gradient penalty of the same batch in one pass of four forwards' work, where PyTorch takes six.

For a discriminator that is affine around each sample, with g_i = dD(x_i)/dx and delta_i the gradient at each layer's
output, D(x_i) = <g_i, x_i> + sum over layers <delta_i, b>. So for a loss with c_i = dloss/dD(x_i), the parameters'
gradient of sum_i c_i D(x_i), the right side's, comes out of the same differentiation of g and delta that the penalty
needs: one combined tangent, v_i + c_i x_i at the input and c_i b at each bias, one weight gradient a layer, and the
backward of the forward itself is never run.

The idea that a locally linear network needs less for a norm penalty is Etmann's (A Closer Look at Double
Backpropagation, 2019, arXiv 1906.06637); tangents through piecewise-affine networks, Balestriero and Baraniuk (2021,
arXiv 2104.00219). Taking the loss along in the penalty's own pass is fastgan's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from fastgan.ops.gradient_penalty.eligibility import Tracer
from fastgan.ops.gradient_penalty.kinds import penalise
from fastgan.ops.gradient_penalty.let_go import may_let_go
from fastgan.ops.gradient_penalty.paths import paths
from fastgan.ops.gradient_penalty.sharding import refuse_sharded_graph
from fastgan.ops.library import is_autocast, last_order, untraced


def one_pass(logits: Tensor, inputs: Tensor, tracer: Tracer, kind: str, weight: float) -> tuple[Tensor, Tensor]:
    """logits and penalty, whose backward is the one pass. ``tracer`` has judged the forward that made ``logits``."""
    convolutions: list[tuple[Any, Tensor]] = [
        (edge.node, bias) for edge, bias, _ in tracer.biases if hasattr(edge.node, "bias_for_term")
    ]
    others = [(edge, bias, dim) for edge, bias, dim in tracer.biases if not hasattr(edge.node, "bias_for_term")]
    for node, bias in convolutions:
        node.bias_for_term = bias
    path = paths([logits], inputs)
    refuse_sharded_graph(path)
    grad, *deltas = torch.autograd.grad(
        [logits],
        [inputs, *(edge for edge, _, _ in others)],  # type: ignore[arg-type]
        [torch.ones_like(logits)],
        retain_graph=not may_let_go(path, get_gradient_edge(inputs).node),
        create_graph=True,
        allow_unused=True,
    )
    if grad is None:
        raise ValueError("the discriminator's output does not depend on its input, or was detached from it")
    terms = [(grad * inputs.detach()).reshape(len(grad), -1).sum(1, dtype=_sum_dtype(grad))]  # (N,) each
    terms += [node.bias_term for node, _ in convolutions if node.bias_term is not None]
    for delta, (_, bias, dim) in zip(deltas, others, strict=True):
        if delta is not None:
            terms.append(_bias_term(delta, bias, dim))
    affine = torch.stack(terms).sum(0)
    penalty = penalise(kind, grad, weight)
    parameters, views = zip(*tracer.parameters, strict=True)
    results: tuple[Tensor, Tensor] = _OnePass.apply(  # type: ignore[no-untyped-call]
        _Graph(affine, penalty, views), logits.detach(), penalty.detach(), *parameters
    )
    return results


def _bias_term(delta: Tensor, bias: Tensor, dim: int) -> Tensor:
    """<delta_i, bias> of each sample (N,), the bias along ``dim``."""
    if delta.ndim == 2 and delta.dtype == bias.dtype and not is_autocast(delta.device.type):
        return torch.mv(delta, bias)  # of a linear layer: one operator for three, and in its derivative
    delta = delta.movedim(dim, -1).reshape(len(delta), -1, len(bias))
    return (delta.sum(1, dtype=_sum_dtype(delta)) * bias).sum(1)


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


class _Graph:
    """The tensors that the backward differentiates; held apart from autograd's own inputs and outputs."""

    def __init__(self, affine: Tensor, penalty: Tensor, views: tuple[Tensor, ...]) -> None:
        self.affine, self.penalty, self.views = affine, penalty, views


class _OnePass(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, graph: _Graph, logits: Tensor, penalty: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*parameters)
        ctx.graph = graph
        return logits.clone(), penalty.clone()

    @staticmethod
    @untraced
    def backward(ctx: Any, by_logits: Tensor | None, by_penalty: Tensor | None) -> tuple[Tensor | None, ...]:
        parameters = ctx.saved_tensors
        wanted = [view for view, needed in zip(ctx.graph.views, ctx.needs_input_grad[3:], strict=True) if needed]
        outputs, factors = [], []
        if by_logits is not None and ctx.graph.affine.requires_grad:
            outputs.append(ctx.graph.affine)
            factors.append(by_logits.detach().reshape(-1).to(ctx.graph.affine.dtype))  # c (N,)
        if by_penalty is not None and ctx.graph.penalty.requires_grad:  # biases alone do not change it
            outputs.append(ctx.graph.penalty)
            factors.append(by_penalty.detach())
        keep = torch._C._autograd._get_current_graph_task_keep_graph()  # as whoever called backward said
        found = iter(
            torch.autograd.grad(outputs, wanted, factors, retain_graph=keep, allow_unused=True) if outputs else ()
        )
        grads = [next(found, None) if needed else None for needed in ctx.needs_input_grad[3:]]
        if torch.is_grad_enabled():
            message = "logits_and_penalty: its gradient cannot be differentiated again; use gradient_penalty"
            grads = last_order(message, grads, [by_logits, by_penalty, *parameters])
        return None, None, None, *grads
