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

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from fastgan.ops.gradient_penalty.eligibility import Tracer
from fastgan.ops.gradient_penalty.let_go import may_let_go
from fastgan.ops.gradient_penalty.paths import paths
from fastgan.ops.gradient_penalty.sharding import refuse_sharded_graph
from fastgan.ops.gradient_penalty.zeros import reached_by_zeros
from fastgan.ops.library import last_order, untraced


def one_pass(
    returned: Any,
    outputs: list[Tensor],
    inputs: tuple[Tensor, ...],
    tracer: Tracer,
    penalty: Callable[[tuple[Tensor, ...]], Tensor],
) -> tuple[Any, Tensor]:
    """What the discriminator returned, and the penalty; their backward is the one pass.

    Args:
        returned: everything that the discriminator returned, which is the one tensor of ``outputs``.
        outputs: the logits, which ``tracer`` has judged.
        inputs: each (N, *S).
        penalty: of the gradients of ``inputs``, of those alone.
    """
    (logits,) = outputs
    convolutions: list[tuple[Any, Tensor]] = [
        (edge.node, bias) for edge, bias, _ in tracer.biases if hasattr(edge.node, "bias_for_term")
    ]
    others = [(edge, bias, dim) for edge, bias, dim in tracer.biases if not hasattr(edge.node, "bias_for_term")]
    for node, bias in convolutions:
        node.bias_for_term = bias
    path = paths([logits], *inputs)
    refuse_sharded_graph(path)
    found = torch.autograd.grad(
        [logits],
        [*inputs, *(edge for edge, _, _ in others)],  # type: ignore[arg-type]
        [torch.ones_like(logits)],
        retain_graph=not may_let_go(path, *(get_gradient_edge(x).node for x in inputs)),
        create_graph=True,
        allow_unused=True,
    )
    deltas = found[len(inputs) :]
    reached = [(grad, x) for grad, x in zip(found, inputs, strict=False) if grad is not None]
    if not reached:
        raise ValueError("the discriminator's output does not depend on its input, or was detached from it")
    terms = [(grad * x.detach()).reshape(len(grad), -1).sum(1, dtype=_sum_dtype(grad)) for grad, x in reached]  # (N,)
    terms += [node.bias_term for node, _ in convolutions if node.bias_term is not None]
    for delta, (_, bias, dim) in zip(deltas, others, strict=True):
        if delta is not None:
            terms.append(_bias_term(delta, bias, dim))
    affine = torch.stack(terms).sum(0)
    penalties = penalty(tuple(grad for grad, _ in reached))
    parameters, views = zip(*tracer.parameters, strict=True)
    below = reached_by_zeros(path)
    zeros = tuple(view.grad_fn in below for view in views)
    results: tuple[Tensor, Tensor] = _OnePass.apply(  # type: ignore[no-untyped-call]
        _Graph(affine, penalties, views, zeros), logits.detach(), penalties.detach(), *parameters
    )
    return results


def _bias_term(delta: Tensor, bias: Tensor, dim: int) -> Tensor:
    """<delta_i, bias> of each sample (N,), the bias along ``dim``."""
    if delta.ndim == 2 and delta.dtype == bias.dtype and not torch.is_autocast_enabled(delta.device.type):
        return torch.mv(delta, bias)  # of a linear layer: one operator for three, and in its derivative
    delta = delta.movedim(dim, -1).reshape(len(delta), -1, len(bias))
    return (delta.sum(1, dtype=_sum_dtype(delta)) * bias).sum(1)


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


class _Graph:
    """The tensors that the backward differentiates; held apart from autograd's own inputs and outputs.

    ``zeros``: of each view, whether PyTorch leaves zeros where the penalty does not depend on it.
    """

    def __init__(self, affine: Tensor, penalty: Tensor, views: tuple[Tensor, ...], zeros: tuple[bool, ...]) -> None:
        self.affine, self.penalty, self.views, self.zeros = affine, penalty, views, zeros


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
        if by_penalty is not None:
            as_pytorch = zip(grads, ctx.graph.zeros, ctx.needs_input_grad[3:], parameters, strict=True)
            grads = [torch.zeros_like(p) if g is None and zero and need else g for g, zero, need, p in as_pytorch]
        if torch.is_grad_enabled():
            message = "logits_and_penalty: its gradient cannot be differentiated again; use gradient_penalty"
            grads = last_order(message, grads, [by_logits, by_penalty, *parameters])
        return None, None, None, *grads
