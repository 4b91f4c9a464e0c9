"""Find the layers of a discriminator that have no second derivative, and raise an error with their names.

The first backward of a penalty reveals them. If PyTorch cannot differentiate a backward, it leaves a node in the graph
that raises. If autograd cannot see the backward of a custom autograd.Function, there is no graph at all, and the
gradient would silently be incomplete.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._pytree import tree_leaves

from fastgan.ops.gradient_penalty.paths import paths
from fastgan.ops.needed import mark_unused, node_of
from fastgan.torch_private import FunctionalTensor

_RAISING = {"NotImplemented", "Error", "CdistBackwardBackward0", "PdistBackwardBackward0", "DelayedErrorBackward"}
_CHECKPOINT = "CheckpointFunctionBackward"
_OPAQUE = (
    "is a custom autograd.Function whose backward autograd cannot see: write the backward with operations of PyTorch, "
    "or as a Function of its own"
)
_REENTRANT = (
    "is a reentrant checkpoint, which torch.autograd.grad does not support: call checkpoint with use_reentrant=False"
)
_ALTERNATIVE = 'gradient_penalty(kind="r1-finite-difference") needs first derivatives only'

_fine: set[frozenset[Any]] = set()  # the sets of node types in graphs that passed the check


class NoSecondDerivative(RuntimeError):
    def named(self, missing: list[str]) -> NoSecondDerivative:
        return NoSecondDerivative(missing) if missing else self

    def __init__(self, missing: Iterable[str]) -> None:
        lines = [*missing]
        if not all(_REENTRANT in line for line in lines):
            lines.append(_ALTERNATIVE)
        head, *rest = "a gradient penalty needs second derivatives, and these layers have none:", *lines
        super().__init__("\n  ".join([head, *rest]))


class Watch:
    """Check the first backward of a penalty if its graph has a set of node types that was not checked before."""

    def __init__(self, path: set[Node], inputs: Sequence[Tensor], every_node: bool = False) -> None:
        self.path = path - {node_of(x) for x in inputs}
        self._kind = frozenset(getattr(node, "_forward_cls", type(node).__name__) for node in path)
        self.missing: dict[Node, str] = {
            node: f"{type(node).__name__} {_REENTRANT}" for node in self.path if type(node).__name__ == _CHECKPOINT
        }
        self._is_new = every_node or bool(self.missing) or self._kind not in _fine
        customs = [node for node in self.path if _is_custom(node)] if self._is_new else []
        self._needs_factors = every_node or bool(customs)
        watched = self.path if every_node else customs
        self._handles = [node.register_hook(partial(self._look, node)) for node in watched] if self._is_new else []
        self._running: Node | None = None
        if every_node:
            self._handles += [node.register_prehook(partial(self._enter, node)) for node in watched]

    def refuse(self, grads: Iterable[Tensor | None] = ()) -> None:
        """Raise if a node has no second derivative. ``grads`` are the results of the first backward."""
        if not self._is_new:
            return
        raising = _raising((grad.grad_fn for grad in grads if grad is not None), self.path)
        if self.missing or raising:
            raise NoSecondDerivative(self.missing.values() or sorted(raising))
        _fine.add(self._kind)

    def factor(self, output: Tensor) -> Tensor:
        """Return ones. They require a gradient if the check needs to see whether a backward passes gradients on."""
        factor = torch.ones_like(output)
        if self._needs_factors:
            mark_unused(factor.requires_grad_())
        return factor

    def note_raised(self, error: RuntimeError) -> None:
        """Note the node whose backward raised ``error``."""
        if self._running is None:
            return
        reason = str(error).partition("\n")[0]
        self.missing[self._running] = f"{_name_of(self._running)}, whose backward cannot be differentiated: {reason}"

    def leave(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _enter(self, node: Node, by_outputs: Sequence[Tensor | None]) -> None:
        self._running = node

    def _look(self, node: Node, by_inputs: Sequence[Tensor | None], by_outputs: Sequence[Tensor | None]) -> None:
        self._running = None
        if not any(g is not None and g.requires_grad for g in by_outputs):
            return
        found = [g for g in by_inputs if g is not None]
        name = _name_of(node)
        if _is_custom(node) and any(not g.requires_grad and _may_count(g) for g in found):
            self.missing[node] = f"{name} {_OPAQUE}"
        ends = {g.grad_fn for g in by_outputs if g is not None} | self.path
        if raising := _raising((g.grad_fn for g in found), ends):
            self.missing[node] = f"{name}, whose backward has no derivative ({', '.join(sorted(raising))})"


@contextmanager
def watched(path: set[Node], inputs: Sequence[Tensor]) -> Iterator[Watch]:
    watch = Watch(path, inputs)
    if watch.missing:
        raise NoSecondDerivative(watch.missing.values())
    try:
        yield watch
    finally:
        watch.leave()


def _name_of(node: Node) -> str:
    return type(node).__name__.removesuffix("Backward")


def _may_count(grad: Tensor) -> bool:
    """Return whether a gradient may be nonzero. While torch.compile records a graph, values are unknown."""
    return isinstance(grad, FunctionalTensor) or bool(grad.any())


def _is_custom(node: Node) -> bool:
    function: Any = getattr(node, "_forward_cls", None)
    return function is not None and not function.__module__.startswith("fastgan.")


def _raising(starts: Iterable[Node | None], ends: Collection[Node | None]) -> set[str]:
    """Return the types of the nodes between ``starts`` and ``ends`` whose backward raises."""
    waiting, seen, found = list(starts), set(ends), set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        # A node "Error" without inputs is an input of a graph that torch.compile records.
        if type(node).__name__ in _RAISING and (node.next_functions or type(node).__name__ != "Error"):
            found.add(type(node).__name__)
        waiting.extend(following for following, _ in node.next_functions)
    return found


def _has_first_derivative(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> bool:
    try:
        torch.autograd.grad(outputs, inputs, [*map(torch.ones_like, outputs)], retain_graph=True, allow_unused=True)
    except RuntimeError:
        return False
    return True


class Layers:
    """Record which module created each node of a graph."""

    def __init__(self, discriminator: Any) -> None:
        modules = discriminator.named_modules() if isinstance(discriminator, nn.Module) else ()
        self._names = {module: name for name, module in modules}
        self._owners: dict[Node, nn.Module] = {}

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Run the forward inside this context."""
        ends: list[set[Node | None]] = []

        def before(module: nn.Module, args: Any) -> None:
            ends.append({t.grad_fn for t in tree_leaves(args) if isinstance(t, Tensor)})

        def after(module: nn.Module, args: Any, output: Any) -> None:
            waiting = [t.grad_fn for t in tree_leaves(output) if isinstance(t, Tensor)]
            stop = ends.pop()
            while waiting:
                node = waiting.pop()
                if node is not None and node not in stop and self._is_closer(module, node):
                    self._owners[node] = module
                    waiting.extend(following for following, _ in node.next_functions)

        handles = register_module_forward_pre_hook(before), register_module_forward_hook(after)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _is_closer(self, module: nn.Module, node: Node) -> bool:
        """Return whether to name a node by this module: the innermost, but a module without a path is no name."""
        owner = self._owners.get(node)
        return owner is None or (owner not in self._names and module in self._names)

    def missing(self, logits: Sequence[Tensor], inputs: tuple[Tensor, ...]) -> list[str]:
        """List the layers without a second derivative and the reasons, sorted by name."""
        outputs = [output for output in logits if output.requires_grad]
        if not outputs:
            return []
        watch = Watch(paths(outputs, *inputs), inputs, every_node=True)
        try:
            if not watch.missing:
                ones = [watch.factor(output) for output in outputs]
                torch.autograd.grad(outputs, inputs, ones, retain_graph=True, create_graph=True, allow_unused=True)
        except RuntimeError as error:
            watch.note_raised(error)
            if not _has_first_derivative(outputs, inputs):
                raise
        finally:
            watch.leave()
        return sorted({f"{self._name(node)}: {why}" for node, why in watch.missing.items()})

    def _name(self, node: Node) -> str:
        module = self._owners.get(node)
        if module is None:
            return "a function of the discriminator"
        kind = type(module).__name__
        name = self._names.get(module)
        return f"{name} ({kind})" if name else kind
