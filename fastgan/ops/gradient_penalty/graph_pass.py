"""Penalties of small discriminators, from the graph that autograd has recorded of PyTorch's own functions.

Small discriminators run PyTorch's functions, because each of fastgan's takes longer to call. If all of them are
piecewise affine, the derivative of a penalty needs no double backward of autograd. Let delta be the gradient of the sum
of the logits at the result of a layer, and v = dP/dg, where g is the gradient at the input. The tangent v is pushed
through the linear part of each function. The weight of a layer whose input has the tangent t gets the gradient
t (*) delta. A loss with c_i = dloss/dD(x_i) has the gradient c_i delta at the same place, because no function mixes
samples. So a layer with the input a adds (t + c a) (*) delta for loss and penalty together. This costs four forwards,
as in one_pass.py, and only one node of autograd for the whole discriminator.

The forward runs as usual. The steps are read from its graph afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from fastgan import torch_private
from fastgan.ops.gradient_penalty.graph_steps import KINDS, Kind
from fastgan.ops.gradient_penalty.sharding import may_be_sharded
from fastgan.ops.gradient_penalty.zeros import reached
from fastgan.torch_private import apply

# The least number of samples times weights, with and without convolutions (measured on a Xeon).
_LEAST_CONVOLVED, _LEAST = 2**12, 2**21


def pays_in_one_pass(weights: Sequence[Tensor], samples: int) -> bool:
    """Return whether one pass with these weights is faster than PyTorch's double backward.

    There, the zeros of activations flow back through all layers. That takes long in convolutions, and in products of
    large matrices.
    """
    least = _LEAST_CONVOLVED if any(weight.ndim > 2 for weight in weights) else _LEAST
    return samples * sum(weight.numel() for weight in weights) >= least


class Step(NamedTuple):
    node: Any
    kind: Kind
    inputs: tuple[int, ...]  # numbers of the tensors that it reads; 0 is the input of the discriminator
    output: int
    weight: int | None  # the index of the parameter
    bias: int | None


class Graph:
    """The steps from the input to the logits, in the order in which they ran."""

    def __init__(self, logits: Tensor, x: Tensor, views: Mapping[Node, Tensor]) -> None:
        self.logits, self.x = logits, x
        self._views = views
        self.steps: list[Step] = []
        self.parameters: list[Tensor] = []
        self._numbers: dict[int, int] = {}  # of the parameters
        self.weights: dict[int, None] = {}  # the indices of those that are weights
        self._computed: list[Node] = []  # nodes of weights that are not leaves
        self.deltas: list[Tensor | None] = []  # one for each step with parameters

    def read(self) -> bool:
        """Read the steps. Return whether all functions are known and the pass is faster than PyTorch's."""
        source = get_gradient_edge(self.x).node
        numbers: dict[Any, int] = {source: 0}
        # Nodes that were not visited, and visited ones with their arguments, which must be read before them.
        waiting: list[Any] = [self.logits.grad_fn]
        while waiting:
            entry = waiting.pop()
            if type(entry) is tuple:
                node, kind, edges, before = entry
                step = self._step(node, kind, edges, tuple([numbers[each] for each in before]), len(numbers))
                if step is None:
                    return False
                self.steps.append(step)
                numbers[node] = step.output
            elif entry not in numbers:
                kind = KINDS.get(type(entry).__name__)
                if kind is None:
                    return False
                edges = entry.next_functions
                if len(kind.data) == 1:
                    first = edges[kind.data[0]][0]
                    before = () if first is None else (first,)
                else:
                    before = tuple([following for following, _ in edges if following is not None])
                if not before:
                    return False
                waiting.append((entry, kind, edges, before))
                waiting += before
        if id(self.x) in self._numbers or source in reached(self._computed):
            return False  # a weight depends on the input
        return pays_in_one_pass([self.parameters[i] for i in self.weights], self.x.shape[0])

    def _step(self, node: Any, kind: Kind, edges: Any, inputs: tuple[int, ...], output: int) -> Step | None:
        """Return the step of a node, or None if it is not piecewise affine or mixes samples."""
        if kind.fits is not None and not kind.fits(node, self.x.shape[0]):
            return None
        if kind.weight is None:
            return Step(node, kind, inputs, output, None, None)
        if torch_private.has_saving_hook(node, kind.weights):  # checkpoints would rerun their forward at each read
            return None
        weight = bias = None
        following = edges[kind.weight][0]
        if following is not None:
            parameter = self._parameter(following)
            if parameter is None:
                parameter = getattr(node, kind.weights)
                self._computed.append(following)
            weight = self._number(parameter)
            self.weights[weight] = None
        if kind.bias is not None and (following := edges[kind.bias][0]) is not None:
            parameter = self._parameter(following)
            if parameter is None or [*parameter.shape] != torch_private.shape_of_result(node)[1:2]:
                return None
            bias = self._number(parameter)
        return Step(node, kind, inputs, output, weight, bias)

    def _parameter(self, node: Any) -> Tensor | None:
        parameter: Tensor | None = getattr(node, "variable", None)
        return self._views.get(node) if parameter is None else parameter

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
            for i in self.biases_with_zeros():
                if grads[i] is None:
                    grads[i] = torch.zeros_like(self.parameters[i])
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

    def biases_with_zeros(self) -> set[int]:
        """Return the biases that get zeros from PyTorch's double backward of a penalty (see zeros.py)."""
        found: set[int] = set()
        below = [False] * (len(self.steps) + 1)  # whether zeros reach a tensor
        for step in reversed(self.steps):
            if step.bias is not None and below[step.output]:
                found.add(step.bias)
            if step.kind.sends_zeros or below[step.output]:
                for number in step.inputs:
                    below[number] = True
        return found

    def differentiate_again(
        self, by_logits: Tensor | None, v: Tensor | None, wanted: Sequence[Tensor]
    ) -> Sequence[Tensor | None]:
        """Return the same gradients, differentiable to any order, from PyTorch's own double backward."""
        ends: list[tuple[Tensor, Tensor]] = [] if by_logits is None else [(self.logits, by_logits)]
        if v is not None:
            ones = [torch.ones_like(self.logits)]
            (g,) = torch_private.gradients([self.logits], [self.x], ones)
            if g is not None and g.requires_grad:
                ends.append((g, v))
        if not ends:
            return [None] * len(wanted)
        made, by = zip(*ends, strict=True)
        return torch_private.gradients(made, wanted, by)


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
    """The gradient at the input, and the logits if they are wanted, as functions of the parameters with these indices.

    The weights come first. They are saved, as in PyTorch's own graph, so that it is an error to modify them.
    """

    @staticmethod
    def forward(ctx: Any, graph: Graph, indices: Sequence[int], with_logits: bool, *parameters: Tensor) -> Any:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*parameters[: len(graph.weights)])
        ctx.graph, ctx.indices = graph, indices
        return (graph.gradient(), graph.logits.clone()) if with_logits else graph.gradient()

    @staticmethod
    def backward(ctx: Any, v: Tensor | None, by_logits: Tensor | None = None) -> tuple[Tensor | None, ...]:
        _, graph = ctx.saved_tensors, cast(Graph, ctx.graph)
        if torch.is_grad_enabled():
            wanted = [graph.parameters[i] for i in ctx.indices]
            return None, None, None, *graph.differentiate_again(by_logits, v, wanted)
        grads = graph.differentiate(by_logits, v)
        return None, None, None, *(grads[i] for i in ctx.indices)


def read_graph(
    logits: Sequence[Tensor], inputs: Sequence[Tensor], hooks: int, views: Mapping[Node, Tensor] | None = None
) -> Graph | None:
    """Return the steps of a forward that ran PyTorch's functions, or None if they do not allow this pass.

    Args:
        logits: the logits.
        inputs: the inputs, private leaves.
        hooks: ``torch_private.count_hooks()`` before the forward. A graph does not show the hooks on its tensors.
        views: leaves that the forward used through a view, by the node of the view.
    """
    if len(logits) != 1 or len(inputs) != 1 or hooks != torch_private.count_hooks():
        return None
    output, x = logits[0], inputs[0]
    if type(output) is not Tensor or not output.requires_grad or not x.numel() or may_be_sharded():
        return None
    if output.dtype != x.dtype:  # a constant or a sum of another dtype, which tangents do not take on
        return None
    graph = Graph(output, x, views or {})
    return graph if graph.read() else None


def gradient_of(graph: Graph) -> Tensor:
    """Return the gradient at the input (N, *S), as a function of the parameters on which a penalty of it depends."""
    indices = [*graph.weights, *sorted(graph.biases_with_zeros().difference(graph.weights))]
    result: Tensor = apply(_Penalized, graph, indices, False, *(graph.parameters[i] for i in indices))
    return result


def gradient_and_logits_of(graph: Graph) -> tuple[Tensor, Tensor]:
    """Return the gradient at the input (N, *S), and the logits, as functions of the parameters.

    There must be one logit per sample.
    """
    indices = [*graph.weights, *(i for i in range(len(graph.parameters)) if i not in graph.weights)]
    results: tuple[Tensor, Tensor] = apply(_Penalized, graph, indices, True, *(graph.parameters[i] for i in indices))
    return results
