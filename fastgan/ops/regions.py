"""Regions of a torch.compile graph in which fastgan reroutes functions.

Dynamo builds a graph of torch functions. AOTAutograd then runs the graph on tensors that record each operator. Two
functions in the graph begin and end a region. Between them, torch function modes are active, as in an eager penalty,
and the record holds the operators that these modes call. The backend "eager" makes no record, so the modes are active
at each step.

Dynamo also runs each function of the graph once on fake tensors to get the shapes of the results. This is called a
rehearsal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from threading import local
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from fastgan import backends, torch_private
from fastgan.ops.changed_inputs import change_copies

P = ParamSpec("P")
R = TypeVar("R")

_OLDEST = (2, 11)  # the oldest PyTorch with which this is tested; with older ones, the graph breaks
_FASTGAN_FILES = tuple(str(Path(__file__).parents[1] / folder) for folder in ("ops", "nn"))
_in_graph: list[Callable[..., Any]] = []


def in_graph(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: a call of the function becomes one node of Dynamo's graph."""
    _in_graph.append(function)
    return function


def is_entered(*, whole: bool = False) -> bool:
    """Return whether the current call becomes a region of Dynamo's graph.

    Args:
        whole: require that there is one graph only (``fullgraph=True``).
    """
    return torch.compiler.is_dynamo_compiling() and _may_enter(whole)


def _may_enter(whole: bool) -> bool:
    """Return whether a region can be entered, while Dynamo traces. No graph may end inside a region.

    If Dynamo cannot trace a discriminator, it ends the graph before the call in the user's compiled function. Later it
    traces the called function separately. A graph that starts there could end inside the discriminator.
    """
    allow_in_graph, config, translator = torch_private.dynamo()
    if tuple(map(int, torch.__version__.split(".")[:2])) < _OLDEST or torch.compiler.is_exporting():
        return False
    end_all()
    while _in_graph:  # at the first use, because this imports the compiler
        allow_in_graph(_in_graph.pop())
    root: Any = translator.current_tx().output.root_tx
    if root.one_graph or whole:
        may = bool(root.one_graph)
    else:
        in_fastgan = root.f_code.co_filename.startswith(_FASTGAN_FILES)
        may = not (in_fastgan or getattr(config, "nested_graph_breaks", False))
    if may:
        torch_private.keep_graph_whole()
        torch_private.finish_graph(change_copies)
    return may


_may_enter._dynamo_marked_constant = True  # type: ignore[attr-defined]


def traceable(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: torch.compile traces the function if a region is possible, and otherwise breaks the graph there."""
    apart: Callable[P, R] = torch_private.apart_from_dynamo(function)  # imports the compiler when called

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.compiler.is_dynamo_compiling():
            if _open.regions:
                end_all()
            return function(*args, **kwargs)
        return (function if is_entered() else apart)(*args, **kwargs)

    return call


class _Region(NamedTuple):
    modes: list[TorchFunctionMode]
    is_lowered: bool
    grad_mode: bool


class _Open(local):
    def __init__(self) -> None:
        self.regions: list[_Region] = []


_open = _Open()


def begin(modes: Sequence[TorchFunctionMode], grad_mode: bool = True) -> None:
    """Enter the modes, the outermost first, and set the grad mode. A record may start without gradients."""
    lowered = is_recorded()
    _open.regions.append(_Region(list(modes), lowered, torch.is_grad_enabled()))
    backends.set_lowered(int(lowered))
    torch.set_grad_enabled(grad_mode)
    for mode in modes:
        mode.__enter__()


def end() -> list[TorchFunctionMode]:
    """End the region that was entered last and return its modes."""
    region = _open.regions.pop()
    for mode in reversed(region.modes):
        if any(mode is other for other in _get_current_function_mode_stack()):
            mode.__exit__(None, None, None)
    backends.set_lowered(-int(region.is_lowered))
    torch.set_grad_enabled(region.grad_mode)
    return region.modes


def end_all() -> None:
    """End regions that an error left open. This is called after errors and at places where no region can be open."""
    while _open.regions:
        end()


@contextmanager
def lowering() -> Iterator[bool]:
    """Inside this context, choose operations as in a region. Yield whether they are recorded."""
    lowered = is_recorded()
    backends.set_lowered(int(lowered))
    try:
        yield lowered
    finally:
        backends.set_lowered(-int(lowered))


def is_recorded() -> bool:
    """Return whether AOTAutograd records the current run of the graph."""
    return any(type(mode).__name__ in _RECORDERS for mode in torch_private.dispatch_modes())


def is_rehearsal() -> bool:
    """Return whether a function of the graph runs only for the shapes of its results."""
    modes = [type(mode).__name__ for mode in torch_private.dispatch_modes()]
    return "FakeTensorMode" in modes and not _RECORDERS.intersection(modes)


_RECORDERS = frozenset(("FunctionalTensorMode", "ProxyTorchDispatchMode"))
