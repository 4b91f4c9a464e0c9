"""A call of a torch function with arguments that depend on the input. The rules read it."""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from fastgan.ops.gradient_penalty.layout import Ineligible, Layout, MixesSamples, aligned, viewed
from fastgan.torch_private import FunctionalTensor, gradient_edge

if TYPE_CHECKING:
    from fastgan.ops.gradient_penalty.eligibility import Tracer

_PLAIN = (Tensor, torch.nn.Parameter, FunctionalTensor)  # the last one while torch.compile records a graph


class Constant(NamedTuple):
    """A constant that a function adds."""

    edge: GradientEdge  # of the result; it does not keep the node alive
    value: Tensor | float
    trailing: int  # the dimensions of the result that come after those of the value
    layout: Layout  # of the samples in the result


NESTED = (list, tuple, dict)


def is_plain(tensor: Tensor) -> bool:
    return type(tensor) in _PLAIN


def tensors(values: Any) -> list[Tensor]:
    """Return the tensors in nested lists, tuples and dicts."""
    if isinstance(values, Tensor):
        return [values]
    found: list[Tensor] = []
    for value in values.values() if isinstance(values, dict) else values if isinstance(values, NESTED) else ():
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, NESTED) and value:
            found += tensors(value)
    return found


def bind(change: Callable[[Any], Any], values: Any) -> Any:
    """Apply ``change`` to all tensors in nested lists, tuples and dicts."""
    if isinstance(values, Tensor):
        return change(values)
    if type(values) is dict:
        return dict(zip(values, bind(change, [*values.values()]), strict=True)) if values else values
    if type(values) is not tuple and type(values) is not list:
        return values
    new = [
        change(value) if isinstance(value, Tensor) else bind(change, value) if isinstance(value, NESTED) else value
        for value in values
    ]
    return tuple(new) if type(values) is tuple else new


class Call:
    """The argument of a rule. ``result`` is None until the function has run."""

    def __init__(
        self,
        tracer: Tracer,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        whole: Layout | None = None,
    ) -> None:
        self.tracer, self.func, self.args, self.kwargs = tracer, func, args, kwargs
        self.whole = whole  # the layout of all arguments if they belong to the same sample, and of the result
        self.samples = tracer.samples
        self.layout = tracer.layout  # the layout of the samples in an argument, or None for a constant
        self.result: Any = None
        self.version = args[0]._version if args and isinstance(args[0], Tensor) else 0  # before the call
        self.source: Any = None  # stored by the rule that runs before the function, for the one that runs after it
        self.constants: list[tuple[GradientEdge, Tensor | float, int]] = []

    def require_input(self, tensor: Any) -> Layout:
        """Return the layout of an argument that must depend on the input."""
        layout = self.layout(tensor)
        if layout is None:
            raise Ineligible("was given a constant for an argument that must depend on the input")
        return layout

    def require_constants(self, *values: Any) -> None:
        """Raise if any of these arguments depends on the input."""
        for tensor in tensors(values):
            if self.layout(tensor) is not None:
                raise Ineligible("multiplies or indexes a tensor that depends on the input by another that does")

    def add_constant(self, added: Tensor | float | None, trailing: int = 0) -> None:
        """Declare a constant that the function adds.

        Its shape, followed by ``trailing`` dimensions of size 1, broadcasts to that of the result. Infinite values
        (such as the padding before a maximum) count as zeros: a finite logit does not depend on them.
        """
        if isinstance(added, Tensor):
            self._append(added.nan_to_num(0, 0, 0), trailing)
        elif added is not None and not (isinstance(added, int | float) and (added == 0 or not isfinite(added))):
            self._append(added, trailing)

    def add_argument(self, added: Any, trailing: int = 0) -> None:
        """Declare an argument of the call as a constant that the function adds.

        Without a gradient it may be a buffer that the next forward modifies. PyTorch does not save it; add_constant
        copies it.
        """
        if isinstance(added, Tensor) and added.requires_grad:
            self._append(added, trailing)
        else:
            self.add_constant(added, trailing)

    def _append(self, added: Tensor | float, trailing: int) -> None:
        self.constants.append((gradient_edge(self.result), added, trailing))

    def evaluate_at_zero(self) -> Tensor:
        """Return the result of the call with zeros for all tensors that depend on the input."""

        def zeros(value: Any) -> Any:
            if self.layout(value) is None:
                return value
            return value.new_zeros(value.shape)

        result: Tensor = self.func(*bind(zeros, self.args), **bind(zeros, self.kwargs))
        return result

    def layout_of(self, input: Tensor) -> Layout:
        """Return the layout of an argument that must depend on the input, to derive that of the result."""
        layout = self.require_input(input)
        if self.whole is not None or layout.is_whole():
            raise MixesSamples  # the tracer catches this if it knows the layout: one sample cannot mix with others
        return layout

    def layout_before(self, input: Tensor, trailing: int) -> Layout:
        """Return the layout of an argument. Its samples must not lie along the last ``trailing`` dimensions."""
        layout = self.layout_of(input)
        if layout.dim >= input.ndim - trailing:
            raise MixesSamples
        return layout

    def broadcast_layout(self, *values: Any) -> Layout:
        """Return the layout of a result to which the arguments were broadcast."""
        parts = [(self.layout_of(value), value) for value in values if self.layout(value) is not None]
        return aligned(parts, self.result.shape)

    def layout_after_view(self, input: Tensor, view: Callable[[Tensor], Any]) -> Any:
        """Return the layouts of the results of a function that only returns views."""
        return viewed(self.layout_of(input), input.shape, view, self.samples)
