"""Parts of a graph that torch.compile makes, in which fastgan's reroutes hold while the graph is recorded.

Dynamo makes a graph of torch functions. AOTAutograd then runs it on tensors that record every operator. A region begins
and ends by two functions in that graph. What runs between them is under torch function modes, as an eager penalty is;
the record holds what the modes made of it. The backend "eager" makes no record: there each step runs under the modes.

Dynamo itself runs every function of the graph once, on fake tensors, to know the shapes of the results: a rehearsal.
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

P = ParamSpec("P")
R = TypeVar("R")

_OLDEST = (2, 11)  # the oldest PyTorch that this is tested with; with older ones the graph breaks
_OURS = tuple(str(Path(__file__).parents[1] / room) for room in ("ops", "nn"))
_in_graph: list[Callable[..., Any]] = []


def in_graph(function: Callable[P, R]) -> Callable[P, R]:
    """The function, whose call is one node of a graph that Dynamo makes."""
    _in_graph.append(function)
    return function


def is_entered(*, whole: bool = False) -> bool:
    """Whether what is called now becomes a region of the graph that Dynamo makes.

    Args:
        whole: only if all is one graph (``fullgraph=True``).
    """
    return torch.compiler.is_dynamo_compiling() and _may_enter(whole)


def _may_enter(whole: bool) -> bool:
    """Called while Dynamo traces: whether no graph can end inside of a region.

    If Dynamo cannot trace a discriminator, it ends the graph before the call that led there, in the function that it
    was given. Later it tries what that call runs, by itself. There a graph could end inside of the discriminator.
    """
    allow_in_graph, config, translator = torch_private.dynamo()
    if tuple(map(int, torch.__version__.split(".")[:2])) < _OLDEST or torch.compiler.is_exporting():
        return False
    _end_all()
    while _in_graph:  # at first use: this imports the compiler
        allow_in_graph(_in_graph.pop())
    root: Any = translator.current_tx().output.root_tx
    if root.one_graph or whole:
        return bool(root.one_graph)
    return not (root.f_code.co_filename.startswith(_OURS) or getattr(config, "nested_graph_breaks", False))


_may_enter._dynamo_marked_constant = True  # type: ignore[attr-defined]


def compilable(function: Callable[P, R]) -> Callable[P, R]:
    """The function, which torch.compile traces where a region can be in its graph, and breaks its graph around."""
    apart: Callable[P, R] = torch_private.apart_from_dynamo(function)  # imports the compiler when called

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.compiler.is_compiling():
            if _open.regions:
                _end_all()
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


def begin(modes: Sequence[TorchFunctionMode]) -> None:
    """Enter the modes, the outermost first, with gradients on."""
    lowered = is_recorded()
    _open.regions.append(_Region(list(modes), lowered, torch.is_grad_enabled()))
    backends.set_lowered(int(lowered))
    torch.set_grad_enabled(True)
    for mode in modes:
        mode.__enter__()


def end() -> list[TorchFunctionMode]:
    """Leave what was entered last. The modes that it had."""
    region = _open.regions.pop()
    for mode in reversed(region.modes):
        if any(mode is other for other in _get_current_function_mode_stack()):
            mode.__exit__(None, None, None)
    backends.set_lowered(-int(region.is_lowered))
    torch.set_grad_enabled(region.grad_mode)
    return region.modes


def _end_all() -> None:
    """End the regions that an error has left. Called where none can be open."""
    while _open.regions:
        end()


@contextmanager
def lowering() -> Iterator[bool]:
    """Inside, operations are chosen as in a region. Whether they are recorded."""
    lowered = is_recorded()
    backends.set_lowered(int(lowered))
    try:
        yield lowered
    finally:
        backends.set_lowered(-int(lowered))


def is_recorded() -> bool:
    """Whether AOTAutograd records the graph that runs now."""
    return any(type(mode).__name__ in _RECORDERS for mode in torch_private.dispatch_modes())


def is_rehearsal() -> bool:
    """Whether a function of the graph runs for the shapes of its results alone."""
    modes = [type(mode).__name__ for mode in torch_private.dispatch_modes()]
    return "FakeTensorMode" in modes and not _RECORDERS.intersection(modes)


_RECORDERS = frozenset(("FunctionalTensorMode", "ProxyTorchDispatchMode"))
