"""Which layers of a discriminator have no second derivative: an error with their names, not a lost gradient.

The first backward of a penalty shows it. Where PyTorch lacks the derivative of a backward, it leaves a node in the
graph that raises. A custom autograd.Function whose backward autograd cannot see leaves no graph at all.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._pytree import tree_leaves

from fastgan.ops.gradient_penalty.paths import paths
from fastgan.ops.needed import mark_unused
from fastgan.torch_private import FunctionalTensor

_RAISING = {"NotImplemented", "Error", "CdistBackwardBackward0", "PdistBackwardBackward0", "DelayedErrorBackward"}
_CHECKPOINT = "CheckpointFunctionBackward"
_OPAQUE = (
    "is a custom autograd.Function whose backward autograd cannot see: write it in operations of PyTorch, or as a "
    "Function of its own"
)
_REENTRANT = (
    "is a reentrant checkpoint, which no torch.autograd.grad can pass: call checkpoint with use_reentrant=False"
)
_CURE = 'gradient_penalty(kind="r1-finite-difference") needs first derivatives alone'

_fine: set[frozenset[Any]] = set()  # kinds of nodes, of graphs that were looked at


class NoSecondDerivative(RuntimeError):
    def named(self, lacks: list[str]) -> NoSecondDerivative:
        return NoSecondDerivative(lacks) if lacks else self

    def __init__(self, lacks: Iterable[str]) -> None:
        lines = "".join(f"\n  {lack}" for lack in lacks)
        super().__init__(f"a gradient penalty needs a second derivative, and these have none:{lines}\n{_CURE}")


class Watch:
    """Looks at the first backward of a penalty, where its graph has a kind of node that was not there before."""

    def __init__(self, path: set[Node], inputs: Sequence[Tensor], every_node: bool = False) -> None:
        self.path = path - {get_gradient_edge(x).node for x in inputs}
        self._kind = frozenset(getattr(node, "_forward_cls", type(node).__name__) for node in path)
        self.lacks: dict[Node, str] = {
            node: f"{type(node).__name__} {_REENTRANT}" for node in self.path if type(node).__name__ == _CHECKPOINT
        }
        self._is_new = every_node or bool(self.lacks) or self._kind not in _fine
        customs = [node for node in self.path if _is_custom(node)] if self._is_new else []
        self._needs_factors = every_node or bool(customs)
        watched = self.path if every_node else customs
        self._handles = [node.register_hook(partial(self._look, node)) for node in watched] if self._is_new else []

    def refuse(self, grads: Iterable[Tensor | None] = ()) -> None:
        """Raise where something lacks a second derivative; ``grads``: what the backward has returned."""
        if not self._is_new:
            return
        raising = _raising((grad.grad_fn for grad in grads if grad is not None), self.path)
        if self.lacks or raising:
            raise NoSecondDerivative(self.lacks.values() or sorted(raising))
        _fine.add(self._kind)

    def factor(self, output: Tensor) -> Tensor:
        """Ones. They require a gradient where a backward must show that it hands that on."""
        factor = torch.ones_like(output)
        if self._needs_factors:
            mark_unused(factor.requires_grad_())
        return factor

    def leave(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _look(self, node: Node, by_inputs: Sequence[Tensor | None], by_outputs: Sequence[Tensor | None]) -> None:
        if not any(g is not None and g.requires_grad for g in by_outputs):
            return
        found = [g for g in by_inputs if g is not None]
        name = type(node).__name__.removesuffix("Backward")
        if _is_custom(node) and any(not g.requires_grad and _may_count(g) for g in found):
            self.lacks[node] = f"{name} {_OPAQUE}"
        ends = {g.grad_fn for g in by_outputs if g is not None} | self.path
        if raising := _raising((g.grad_fn for g in found), ends):
            self.lacks[node] = f"{name}, of whose backward no derivative is known ({', '.join(sorted(raising))})"


@contextmanager
def watched(path: set[Node], inputs: Sequence[Tensor]) -> Iterator[Watch]:
    watch = Watch(path, inputs)
    if watch.lacks:
        raise NoSecondDerivative(watch.lacks.values())
    try:
        yield watch
    finally:
        watch.leave()


def _may_count(grad: Tensor) -> bool:
    """Whether this is not surely zero. Nobody knows while torch.compile records a graph."""
    return isinstance(grad, FunctionalTensor) or bool(grad.any())


def _is_custom(node: Node) -> bool:
    function: Any = getattr(node, "_forward_cls", None)
    return function is not None and not function.__module__.startswith("fastgan.")


def _raising(starts: Iterable[Node | None], ends: Collection[Node | None]) -> set[str]:
    """The kinds of nodes, between these, of which a backward raises."""
    waiting, seen, found = list(starts), set(ends), set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        # A node "Error" that leads nowhere stands for an input of a graph that torch.compile records.
        if type(node).__name__ in _RAISING and (node.next_functions or type(node).__name__ != "Error"):
            found.add(type(node).__name__)
        waiting.extend(following for following, _ in node.next_functions)
    return found


class Layers:
    """Which module made each node of a graph."""

    def __init__(self, discriminator: Any) -> None:
        modules = discriminator.named_modules() if isinstance(discriminator, nn.Module) else ()
        self._names = {module: name for name, module in modules}
        self._owners: dict[Node, nn.Module] = {}

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Around the forward."""
        ends: list[set[Node | None]] = []

        def before(module: nn.Module, args: Any) -> None:
            ends.append({t.grad_fn for t in tree_leaves(args) if isinstance(t, Tensor)})

        def after(module: nn.Module, args: Any, output: Any) -> None:
            waiting = [t.grad_fn for t in tree_leaves(output) if isinstance(t, Tensor)]
            stop = ends.pop()
            while waiting:
                node = waiting.pop()
                if node is not None and node not in stop and node not in self._owners:
                    self._owners[node] = module
                    waiting.extend(following for following, _ in node.next_functions)

        handles = register_module_forward_pre_hook(before), register_module_forward_hook(after)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def lacking(self, logits: Sequence[Tensor], inputs: tuple[Tensor, ...]) -> list[str]:
        """The layers without a second derivative, and why, in the order of their names."""
        outputs = [output for output in logits if output.requires_grad]
        if not outputs:
            return []
        watch = Watch(paths(outputs, *inputs), inputs, every_node=True)
        try:
            if not watch.lacks:
                ones = [watch.factor(output) for output in outputs]
                torch.autograd.grad(outputs, inputs, ones, retain_graph=True, create_graph=True, allow_unused=True)
        finally:
            watch.leave()
        return sorted({f"{self._name(node)}: {why}" for node, why in watch.lacks.items()})

    def _name(self, node: Node) -> str:
        module = self._owners.get(node)
        if module is None:
            return "a function of the discriminator"
        kind = type(module).__name__
        name = self._names.get(module)
        return f"{name} ({kind})" if name else kind
