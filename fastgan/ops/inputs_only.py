"""Asking a graph for the gradient of its inputs alone, so that no parameter's is computed on the way.

``ctx.needs_input_grad`` says that every gradient is needed even in ``autograd.grad(y, x)``, and a backward on a GPU
runs in a thread of its own. Who asks therefore marks the nodes of that very graph, and no other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge


def markable(ctx: Any) -> None:
    """In the forward of a Function: its node may be told to leave out all gradients but its first input's.

    A convolution that then finds a bias in ``bias_for_term`` leaves <grad_i, bias> of each sample in ``bias_term``.
    """
    ctx.inputs_only = False
    ctx.bias_for_term = ctx.bias_term = None


def needed(ctx: Any) -> tuple[bool, ...]:
    """In the backward of a `markable` Function: ``ctx.needs_input_grad``, less what nobody asks for now."""
    wanted: tuple[bool, ...] = ctx.needs_input_grad
    return (wanted[0], *(False for _ in wanted[1:])) if ctx.inputs_only else wanted


@contextmanager
def inputs_only(outputs: Iterable[Tensor], inputs: Tensor) -> Iterator[set[Node]]:
    """Inside, a backward from these outputs leaves out the gradients of what is not made from ``inputs``.

    Gives the nodes that the backward goes through: those that lead from the outputs to ``inputs``, its own included.
    """
    nodes, path = _paths(outputs, get_gradient_edge(inputs).node)
    # Markable, and only the first input leads to the inputs.
    marked: list[Any] = [
        node
        for node in nodes
        if hasattr(node, "inputs_only") and not any(following in path for following, _ in node.next_functions[1:])
    ]
    try:
        for node in marked:
            node.inputs_only = True
        yield path
    finally:
        for node in marked:
            node.inputs_only = False


def _paths(outputs: Iterable[Tensor], target: Node) -> tuple[set[Node], set[Node]]:
    """All nodes of a graph, and those of them that lead to ``target``."""
    users: dict[Node, list[Node]] = {}  # the reverse of the graph
    waiting = [output.grad_fn for output in outputs]
    seen: set[Node] = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for following, _ in node.next_functions:
            if following is not None:
                users.setdefault(following, []).append(node)
                waiting.append(following)

    leading = {target}
    front = [target]
    while front:
        for user in users.get(front.pop(), ()):
            if user not in leading:
                leading.add(user)
                front.append(user)
    return seen, leading
