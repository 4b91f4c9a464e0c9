"""Whether a discriminator, as it just ran, is affine in its input around each sample, each sample by itself.

Every torch function that touches a tensor made from the input is looked up in a table of those that are piecewise
affine and keep samples apart; the first that is not there, or is called in a way that is not, is the reason. What
never passes through a torch function (a custom autograd.Function) is found afterwards in the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, resolve_name

from fastgan.ops.gradient_penalty.let_go import is_piecewise_affine

_PLAIN = (Tensor, torch.nn.Parameter)
# A rule takes the arguments of a call and says whether it is affine and per sample in its first argument.
Rule = Callable[..., bool]


class Tracer(TorchFunctionMode):
    """Follows what is made from ``inputs``, each (N, *S), while the discriminator runs."""

    def __init__(self, *inputs: Tensor) -> None:
        super().__init__()
        self.samples = len(inputs[0])
        self.reason: str | None = None
        # What each layer was given that requires a gradient, and the view of it that the layer read instead.
        self.parameters: list[tuple[Tensor, Tensor]] = []
        # Where a bias was added (before an activation in place), the bias, and the dimension that it runs along.
        self.biases: list[tuple[GradientEdge, Tensor, int]] = []
        self._inputs = inputs
        self._made = {id(x): ref(x) for x in inputs}  # weakly: an activation lives no longer than without us

    def __contains__(self, tensor: Any) -> bool:
        made = self._made.get(id(tensor))
        return made is not None and made() is tensor

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.reason is not None or func in _LOOKS:
            return func(*args, **kwargs)
        touching = [t for t in _tensors((args, kwargs)) if t in self]
        if not touching:
            return func(*args, **kwargs)
        with torch._C.DisableTorchFunction():  # the sizes are nobody's business
            sizes = [len(t) for t in _tensors(args) if t in self]
            rule = _RULES.get(func)
        result = self._layer(func, *args, **kwargs) if func in _LAYERS else func(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            if rule is None or not rule(self, *args, **kwargs) or any(size != self.samples for size in sizes):
                self.reason = f"{resolve_name(func) or func}, as it was called here"
            elif not torch.is_grad_enabled():
                self.reason = f"{resolve_name(func) or func}, called in torch.no_grad() or a custom autograd.Function"
            elif not isinstance(result, Tensor) or result.ndim == 0 or len(result) != self.samples:
                self.reason = f"{resolve_name(func) or func} does not keep the samples apart"
            else:
                self._made[id(result)] = ref(result)
        return result

    def _layer(
        self,
        func: Callable[..., Any],
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *rest: Any,
        **named: Any,
    ) -> Any:
        """The layer, reading its weight and bias through views of this graph alone.

        The pass differentiates as far as these. What lies behind is left to whoever called backward, who may reach it
        from elsewhere too and runs its hooks once.
        """
        with torch._C.DisableTorchFunction():
            weight, bias = self._view(weight), self._view(bias)
        result = func(input, weight, bias, *rest, **named)
        with torch._C.DisableTorchFunction():
            if bias is not None and result.requires_grad:
                self.biases.append((get_gradient_edge(result), bias, -1 if func is F.linear else 1))
        return result

    def _view(self, parameter: Any) -> Any:
        if type(parameter) not in _PLAIN or not parameter.requires_grad:
            return parameter
        view = parameter.view_as(parameter)
        self.parameters.append((parameter, view))
        return view

    def judge(self, outputs: list[Tensor], returned: Any) -> str | None:
        """Why one pass does not do, or None.

        Args:
            outputs: the logits.
            returned: everything that the discriminator returned.
        """
        if self.reason is not None:
            return self.reason
        logits = outputs[0]
        if returned is not logits or logits not in self:
            return "the output is not one tensor made by torch functions from the input"
        if logits.numel() != self.samples:
            return f"the output has {logits.numel() // self.samples} logits a sample"
        if not self.parameters:
            return "no weight or bias requires a gradient"
        made = (p for p, _ in self.parameters if p.grad_fn is not None)
        if any(leaf is x for parameter in made for leaf in leaves(parameter) for x in self._inputs):
            return "a weight is made from the input"
        nodes = _nodes(logits)
        variables = [node.variable for node in nodes if hasattr(node, "variable")]
        if any(all(variable is not x for x in self._inputs) for variable in variables):
            return "something beside its layers requires a gradient"
        strange = {
            name for node in nodes if (name := type(node).__name__) not in _NODES and not is_piecewise_affine(node)
        }
        return f"{', '.join(sorted(strange))} in its graph" if strange else None


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict):
        for value in values.values():
            yield from _tensors(value)
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)


def leaves(output: Tensor) -> list[Tensor]:
    """The tensors that require a gradient and that nothing made, of an output's graph."""
    found: list[Tensor] = []
    seen: set[Node] = set()
    waiting: list[Node | None] = [get_gradient_edge(output).node] if output.requires_grad else []
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        waiting.extend(following for following, _ in node.next_functions)
    return found


def _nodes(output: Tensor) -> set[Node]:
    """The nodes between an output and the leaves, except below the parameters' own computations."""
    found: set[Node] = set()
    waiting: list[Node | None] = [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in found:
            continue
        found.add(node)
        # Only the first input of these is made from the discriminator's input: the rules have seen to it.
        nexts: list[Node | None] = [following for following, _ in node.next_functions]
        name = type(node).__name__
        if name == "_ConvolutionBackward":
            nexts = nexts[:1]
        elif name == "AddmmBackward0":
            nexts = nexts[1:2]
        elif name == "MmBackward0":
            nexts = nexts[:1]
        waiting.extend(nexts)
    return found


def _layer(tracer: Tracer, input: Tensor, weight: Tensor, bias: Tensor | None = None, *rest: Any, **named: Any) -> bool:
    plain = type(weight) in _PLAIN and (bias is None or type(bias) in _PLAIN)
    one_bias = bias is None or (bias.ndim == 1 and bias not in tracer)  # a row of it a sample, linear would take
    return input in tracer and input.ndim > 1 and weight not in tracer and one_bias and plain


def _linear(tracer: Tracer, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    return _layer(tracer, input, weight, bias) and (bias is None or len(bias) == len(weight))


def _conv(n: int) -> Rule:
    def rule(tracer: Tracer, input: Tensor, *rest: Any, **named: Any) -> bool:
        return input.ndim == n + 2 and _layer(tracer, input, *rest, **named)

    return rule


def _first(tracer: Tracer, input: Any, *rest: Any, **named: Any) -> bool:
    return input in tracer and not any(t in tracer for t in _tensors((rest, named)))


def _pool(n: int) -> Rule:
    return lambda tracer, input, *rest, **named: input.ndim == n + 2 and _first(tracer, input, *rest, **named)


def _sum_of_both(tracer: Tracer, input: Any, other: Any = None, **named: Any) -> bool:
    return not named and input in tracer and other in tracer and input.shape == other.shape


def _factor(tracer: Tracer, input: Any, other: Any = None, **named: Any) -> bool:
    numbers = [x for x in (input, other) if isinstance(x, int | float)]
    return not named and len(numbers) == 1 and (input in tracer or other in tracer)


def _divisor(tracer: Tracer, input: Any, other: Any = None, **named: Any) -> bool:
    return not named and input in tracer and isinstance(other, int | float)


def _over_dims(tracer: Tracer, input: Tensor, dim: Any = None, keepdim: bool = False, **named: Any) -> bool:
    dims = [dim] if isinstance(dim, int) else list(dim or ())
    return input in tracer and bool(dims) and not named and all(d % input.ndim for d in dims)


def _shape(tracer: Tracer, input: Tensor, *rest: Any, **named: Any) -> bool:
    # Row-major order: with the first size kept (which the tracer checks), a sample stays one block.
    return input in tracer


def _pad(tracer: Tracer, input: Tensor, pad: Any, mode: str = "constant", value: Any = None) -> bool:
    return input in tracer and not value and len(pad) <= 2 * (input.ndim - 1)


def _cat(tracer: Tracer, tensors: Any, dim: int = 0, **named: Any) -> bool:
    return not named and all(t in tracer for t in tensors) and dim % tensors[0].ndim != 0


def _no_dropout(tracer: Tracer, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> bool:
    return input in tracer and not training


_LAYERS: dict[Any, Rule] = {
    F.linear: _linear,
    **{
        function: _conv(n)
        for n in (1, 2, 3)
        for name in (f"conv{n}d", f"conv_transpose{n}d")
        for function in {getattr(F, name), getattr(torch, name)}
    },
}
_RULES: dict[Any, Rule] = {
    **_LAYERS,
    **dict.fromkeys(
        (F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, F.leaky_relu, F.leaky_relu_), _first
    ),
    F.avg_pool1d: _pool(1),
    torch.avg_pool1d: _pool(1),
    F.avg_pool2d: _pool(2),
    F.avg_pool3d: _pool(3),
    F.adaptive_avg_pool2d: _pool(2),
    **dict.fromkeys((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__), _sum_of_both),
    **dict.fromkeys((torch.sub, Tensor.sub, Tensor.__sub__), _sum_of_both),
    **dict.fromkeys((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__), _factor),
    **dict.fromkeys((torch.div, Tensor.div, Tensor.__truediv__), _divisor),
    **dict.fromkeys((torch.neg, Tensor.neg, Tensor.__neg__), _first),
    **dict.fromkeys((torch.mean, Tensor.mean, torch.sum, Tensor.sum), _over_dims),
    **dict.fromkeys((torch.flatten, Tensor.flatten, torch.reshape, Tensor.reshape, Tensor.view), _shape),
    **dict.fromkeys((torch.squeeze, Tensor.squeeze, torch.unsqueeze, Tensor.unsqueeze, Tensor.unflatten), _shape),
    **dict.fromkeys((Tensor.contiguous, Tensor.clone, torch.clone), _first),
    F.pad: _pad,
    F.dropout: _no_dropout,
    torch.cat: _cat,
}
# What tells of a tensor and not of its values.
_LOOKS = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "requires_grad", "is_cuda")),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride, Tensor.is_contiguous, Tensor.__len__),
    Tensor.is_floating_point,
    torch.is_floating_point,
}
_NODES = {
    *("AddmmBackward0", "MmBackward0", "TBackward0"),
    *("AddBackward0", "SubBackward0", "MulBackward0", "DivBackward0", "NegBackward0", "MeanBackward1", "SumBackward1"),
    *("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "CloneBackward0", "ToCopyBackward0"),
    *("ConstantPadNdBackward0", "CatBackward0", "AdaptiveAvgPool2DBackward0", "AccumulateGrad"),
    *("SqueezeBackward0", "SqueezeBackward1", "UnsqueezeBackward0"),
}
