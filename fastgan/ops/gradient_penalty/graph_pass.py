"""The gradients of a penalty, and its derivative, from the graph that autograd recorded of PyTorch's own functions.

Small discriminators run PyTorch's functions, because each of fastgan's takes longer to call. If all of them are piecewise
affine, the derivative of a penalty still needs no double backward of autograd. Let delta be the gradient of the sum of
the logits at the result of a layer, and v = dP/dg, where g is the gradient at the input. The tangent v is pushed through
the linear part of each function, and a weight W whose layer has the tangent t as input gets the gradient t (*) delta. A
loss of the logits with c_i = dloss/dD(x_i) has the gradient c_i delta at the same place, because no function mixes
samples. So the layer with input a adds (t + c a) (*) delta for both. This costs four forwards, and no node of a graph
except one for the whole discriminator.

The forward is not changed, not even observed: the steps are read from the graph afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from fastgan import torch_private
from fastgan.ops.gradient_penalty.graph_steps import KINDS, Kind
from fastgan.ops.gradient_penalty.zeros import reached
from fastgan.torch_private import apply


class Step(NamedTuple):
    node: Any
    kind: Kind
    inputs: tuple[int, ...]  # numbers of the tensors that it reads; 0 is the input of the discriminator
    output: int
    weight: int | None  # the index of the parameter
    bias: int | None


class Graph:
    """The steps from the input to the logits, in the order in which they ran."""

    def __init__(self, logits: Tensor, x: Tensor) -> None:
        self.logits, self.x = logits, x
        self.steps: list[Step] = []
        self.parameters: list[Tensor] = []
        self._numbers: dict[int, int] = {}  # of the parameters
        self._computed: list[Node] = []  # nodes of weights that are not leaves
        self.deltas: list[Tensor | None] = []  # one for each step with parameters

    def read(self) -> bool:
        """Read the steps. Return whether all functions are known, and there is a parameter that requires a gradient."""
        source, end = get_gradient_edge(self.x).node, self.logits.grad_fn
        numbers: dict[Node, int] = {source: 0}
        samples = self.x.shape[0]
        waiting: list[Any] = [end]
        while waiting:
            node = waiting[-1]
            if node in numbers:
                waiting.pop()
                continue
            kind = KINDS.get(type(node).__name__)
            if kind is None:
                return False
            edges = node.next_functions
            before = [following for i in kind.data if (following := edges[i][0]) is not None]
            unread = [following for following in before if following not in numbers]
            if unread:
                waiting += unread
                continue
            if not before or not (kind.fits is None or kind.fits(node, samples)):
                return False
            weight = bias = None
            if kind.weight is not None:
                weight = self._weight(node, edges[kind.weight][0])
            if kind.bias is not None and (following := edges[kind.bias][0]) is not None:
                leaf = getattr(following, "variable", None)
                if leaf is None or leaf.ndim != 1 or leaf.shape[0] != torch_private.shape_of_result(node)[1]:
                    return False
                bias = self._number(leaf)
            numbers[node] = len(numbers)
            self.steps.append(Step(node, kind, tuple(numbers[each] for each in before), numbers[node], weight, bias))
            waiting.pop()
        return bool(self.parameters) and source not in reached(self._computed)

    def _weight(self, node: Any, following: Node | None) -> int | None:
        if following is None:
            return None
        weight: Tensor | None = getattr(following, "variable", None)
        if weight is None:
            weight = node._saved_weight if hasattr(node, "_saved_weight") else node._saved_mat2
            self._computed.append(following)
        return self._number(weight)

    def _number(self, parameter: Tensor) -> int:
        number = self._numbers.setdefault(id(parameter), len(self.parameters))
        if number == len(self.parameters):
            self.parameters.append(parameter)
        return number

    @property
    def single(self) -> bool:
        """Whether there is one logit per sample."""
        return self.logits.numel() == self.x.shape[0]

    def gradient(self) -> Tensor:
        """Compute the gradient of the sum of the logits at the input, and keep it at the result of each layer."""
        layers = [step for step in self.steps if step.weight is not None or step.bias is not None]
        ends = [self.x, *(GradientEdge(step.node, 0) for step in layers)]
        found = torch_private.gradients_without_graph(self.logits, ends)
        self.deltas = list(found[1:])
        gradient: Tensor = found[0]
        return gradient

    def differentiate(self, by_logits: Tensor | None, v: Tensor | None) -> list[Tensor | None]:
        """Return the gradients of the parameters by those of the logits and of the gradient at the input."""
        c = None if by_logits is None else _Factors(by_logits.reshape(-1))
        tangents: list[Tensor | None] = [v, *[None] * len(self.steps)]
        grads: list[Tensor | None] = [None] * len(self.parameters)
        deltas = iter(self.deltas)
        last = self.steps[-1].output
        for step in self.steps:
            node, kind, inputs, output, weight, bias = step
            t = tangents[inputs[0]]
            if len(inputs) > 1 and (other := tangents[inputs[1]]) is not None:
                t = other if t is None else t + other
            if weight is not None or bias is not None:
                delta = next(deltas)
                if delta is not None:
                    self._add(grads, step, t, c, delta)
            if t is not None and output != last:
                tangents[output] = kind.push(node, t)
        if c is None and v is not None:
            self._fill_zeros(grads)
        return grads

    def _add(self, grads: list[Tensor | None], step: Step, t: Tensor | None, c: _Factors | None, delta: Tensor) -> None:
        """Add the gradients of a layer."""
        kind = step.kind
        if step.weight is not None and kind.by_weight is not None:
            input = t
            if c is not None:
                a = getattr(step.node, kind.input)
                factors = c.like(a)
                input = a * factors if t is None else torch.addcmul(t, a, factors)
            if input is not None:
                _accumulate(grads, step.weight, kind.by_weight(step.node, input, delta))
        if step.bias is not None and c is not None:
            _accumulate(grads, step.bias, c.sum(delta))

    def _fill_zeros(self, grads: list[Tensor | None]) -> None:
        """Give zeros to the biases that get zeros from PyTorch's double backward (see zeros.py)."""
        zero = [False] * (len(self.steps) + 1)
        for step in reversed(self.steps):
            if step.bias is not None and zero[step.output] and grads[step.bias] is None:
                grads[step.bias] = torch.zeros_like(self.parameters[step.bias])
            if step.kind.sends_zeros or zero[step.output]:
                for number in step.inputs:
                    zero[number] = True

    def differentiate_again(
        self, by_logits: Tensor | None, v: Tensor | None, wanted: Sequence[Tensor]
    ) -> Sequence[Tensor | None]:
        """Return the same gradients, differentiable to any order, from PyTorch's own double backward."""
        ends: list[tuple[Tensor, Tensor]] = [] if by_logits is None else [(self.logits, by_logits)]
        if v is not None:
            ones = [torch.ones_like(self.logits)]
            (g,) = torch_private.differentiable_gradients([self.logits], [self.x], ones)
            if g is not None and g.requires_grad:
                ends.append((g, v))
        if not ends:
            return [None] * len(wanted)
        made, by = zip(*ends, strict=True)
        return torch_private.differentiable_gradients(made, wanted, by)


class _Factors:
    """One factor for each sample, (N,)."""

    def __init__(self, factors: Tensor) -> None:
        self._views = {1: factors}

    def like(self, tensor: Tensor) -> Tensor:
        """(N, 1, ..) with as many dimensions as the tensor."""
        view = self._views.get(tensor.ndim)
        if view is None:
            view = self._views[tensor.ndim] = self._views[1].view(-1, *[1] * (tensor.ndim - 1))
        return view

    def sum(self, delta: Tensor) -> Tensor:
        """(N, C, *S) -> (C,): the sum of factor times delta."""
        if delta.ndim == 2:
            return torch.mv(delta.t(), self._views[1])
        return (delta * self.like(delta)).sum([0, *range(2, delta.ndim)])


def _accumulate(grads: list[Tensor | None], index: int, grad: Tensor) -> None:
    before = grads[index]
    grads[index] = grad if before is None else before + grad


class _Penalized(torch.autograd.Function):
    """The gradient at the input, and the logits if they are wanted, as functions of the parameters."""

    @staticmethod
    def forward(ctx: Any, graph: Graph, with_logits: bool, *parameters: Tensor) -> Any:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*parameters)  # PyTorch then finds parameters that were modified in place
        ctx.graph = graph
        return (graph.gradient(), graph.logits.clone()) if with_logits else graph.gradient()

    @staticmethod
    def backward(ctx: Any, v: Tensor | None, by_logits: Tensor | None = None) -> tuple[Tensor | None, ...]:
        parameters, graph = ctx.saved_tensors, cast(Graph, ctx.graph)
        if torch.is_grad_enabled():
            return None, None, *graph.differentiate_again(by_logits, v, parameters)
        return None, None, *graph.differentiate(by_logits, v)


def read_graph(logits: Sequence[Tensor], inputs: Sequence[Tensor], hooks: int) -> Graph | None:
    """Return the steps of a forward that ran PyTorch's functions, or None if they do not allow this pass.

    Args:
        logits: the logits.
        inputs: the inputs, private leaves.
        hooks: ``torch_private.count_hooks()`` before the forward. A graph does not show the hooks on its tensors.
    """
    if len(logits) != 1 or len(inputs) != 1 or hooks != torch_private.count_hooks():
        return None
    output, x = logits[0], inputs[0]
    if type(output) is not Tensor or not output.requires_grad or not x.numel():
        return None
    graph = Graph(output, x)
    return graph if graph.read() else None


def gradient_of(graph: Graph) -> Tensor:
    """Return the gradient at the input (N, *S), as a function of the parameters."""
    result: Tensor = apply(_Penalized, graph, False, *graph.parameters)
    return result


def gradient_and_logits_of(graph: Graph) -> tuple[Tensor, Tensor]:
    """Return the gradient at the input (N, *S), and the logits, as functions of the parameters.

    There must be one logit per sample.
    """
    results: tuple[Tensor, Tensor] = apply(_Penalized, graph, True, *graph.parameters)
    return results
