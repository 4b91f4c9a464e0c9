"""A call of a torch function on tensors that were made from the input, as its rule sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from fastgan.ops.gradient_penalty.layout import Layout, Mixed, Refused, aligned, viewed
from fastgan.torch_private import FunctionalTensor

if TYPE_CHECKING:
    from fastgan.ops.gradient_penalty.eligibility import Tracer

_PLAIN = (Tensor, torch.nn.Parameter, FunctionalTensor)  # the last while torch.compile makes a graph


def is_plain(tensor: Tensor) -> bool:
    return type(tensor) in _PLAIN


def tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from tensors(value)
    elif isinstance(values, dict):
        for value in values.values():
            yield from tensors(value)


def bind(change: Callable[[Any], Any], values: Any) -> Any:
    """The arguments, with every tensor among them changed."""
    if type(values) in (list, tuple):
        return type(values)(bind(change, value) for value in values)
    if type(values) is dict:
        return {key: bind(change, value) for key, value in values.items()}
    return change(values)


class Call:
    """What a rule is given: before the function runs without a result, and after it with one."""

    def __init__(self, tracer: Tracer, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.tracer, self.func, self.args, self.kwargs = tracer, func, args, kwargs
        self.samples = tracer.samples
        self.result: Any = None
        self.source: Any = None  # what the rule keeps from before for afterwards
        self.constants: list[tuple[GradientEdge, Tensor | float]] = []

    def layout(self, value: Any) -> Layout | None:
        """How the samples lie in this argument; None: it is a constant."""
        return self.tracer.layout(value)

    def needs(self, tensor: Any) -> Layout:
        """The layout of an argument that must be made from the input."""
        layout = self.layout(tensor)
        if layout is None:
            raise Refused("was given a constant where one pass knows what is made from the input")
        return layout

    def fixed(self, *values: Any) -> None:
        """Require that these arguments are constants."""
        if any(self.layout(tensor) is not None for tensor in tensors(values)):
            raise Refused("multiplies or indexes one thing made from the input by another")

    def constant(self, added: Tensor | float | None) -> None:
        """Say that this was added, of a shape that broadcasts to the result's."""
        if added is not None and not (isinstance(added, int | float) and added == 0):
            self.constants.append((get_gradient_edge(self.result), added))

    def at_zero(self) -> Tensor:
        """The result for zeros in place of what was made from the input."""

        def zeros(value: Any) -> Any:
            if self.layout(value) is None:
                return value
            return value.new_zeros(value.shape)

        result: Tensor = self.func(*bind(zeros, self.args), **bind(zeros, self.kwargs))
        return result

    def where(self, input: Tensor) -> Layout:
        """The layout of an argument that must be made from the input, for a rule that tells that of the result."""
        layout = self.needs(input)
        if self.samples == 1:
            raise Mixed  # the tracer knows that it cannot be
        return layout

    def above(self, input: Tensor, trailing: int) -> Layout:
        """The layout of the input, whose samples must not lie in these last dimensions."""
        layout = self.where(input)
        if layout.dim >= input.ndim - trailing:
            raise Mixed
        return layout

    def broadcast(self, *values: Any) -> Layout:
        """The layout of a result that the arguments were broadcast to."""
        parts = [(self.where(value), value) for value in values if self.layout(value) is not None]
        return aligned(parts, self.result.shape)

    def viewed(self, input: Tensor, view: Callable[[Tensor], Any]) -> Any:
        """The layouts of what a function that only makes views makes of the input."""
        return viewed(self.where(input), input.shape, view, self.samples)
