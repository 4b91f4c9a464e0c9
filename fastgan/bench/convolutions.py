"""Counts the convolutions of a step: those that an eager run calls, or those in the graphs of a compiled run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastgan.bench.case import OPTIONAL, Run

aten = torch.ops.aten


def convolutions(name: str, run: Run) -> int | None:
    """Return the convolutions of one call, or None if only a part of them is compiled.

    Each gradient of an input or a weight is one. A compiled run must have run before.
    """
    graphs: Graphs | None = getattr(run, "graphs", None)
    if graphs is not None:
        return graphs.convolutions
    if name in OPTIONAL:
        return None
    counter = _Counter()
    with counter:
        run()
    return counter.total


class Graphs:
    """Compiles with Inductor and counts the convolutions in all graphs, forward and backward."""

    def __init__(self) -> None:
        self.convolutions = 0

    def compile(self, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        compiled: Callable[..., Any] = torch.compile(function, backend=self._backend, **options)
        return compiled

    def _backend(self, graph: Any, inputs: Any) -> Any:
        from torch._functorch import config
        from torch._inductor.compile_fx import compile_fx, compile_fx_inner

        def count(module: Any, *args: Any, **kwargs: Any) -> Any:
            self.convolutions += sum(_of(node.target, node.args) for node in module.graph.nodes)
            return compile_fx_inner(module, *args, **kwargs)

        with config.patch(enable_autograd_cache=False):  # a graph from the cache would not be counted
            return compile_fx(graph, inputs, inner_compile=count)


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.total += _of(func, args)
        return func(*args, **(kwargs or {}))


def _of(function: Any, args: Any) -> int:
    packet = getattr(function, "_overloadpacket", None)
    if packet is aten.convolution_backward:
        return sum(args[-1][:2])
    return int(packet is aten.convolution)
