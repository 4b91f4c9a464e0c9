"""Find the graph nodes between outputs and inputs."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torch import Tensor
from torch.autograd.graph import Node

from fastgan.ops.needed import node_of


def paths(outputs: Iterable[Tensor], *inputs: Tensor) -> set[Node]:
    """Return the nodes that a backward from ``outputs`` to ``inputs`` visits, including those of ``inputs``."""
    return follow((output.grad_fn for output in outputs), {node_of(x) for x in inputs})[0]


def follow(
    starts: Iterable[Node | None], targets: set[Node], ends: Collection[Node] = ()
) -> tuple[set[Node], set[Node]]:
    """Return the nodes between ``starts`` and ``targets``, and all other leaves that the starts depend on.

    Args:
        starts: nodes; None entries are skipped.
        targets: the nodes at which the paths end.
        ends: nodes behind which the search stops.
    """
    users: dict[Node, list[Node]] = {}  # the reverse of the graph
    waiting = list(starts)
    seen: set[Node] = set()
    leaves: set[Node] = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in ends:
            continue
        following = node.next_functions
        if not following and node not in targets and hasattr(node, "variable"):
            leaves.add(node)
        for next_node, _ in following:
            if next_node is not None:
                users.setdefault(next_node, []).append(node)
                waiting.append(next_node)

    leading = set(targets)
    front = list(targets)
    while front:
        for user in users.get(front.pop(), ()):
            if user not in leading:
                leading.add(user)
                front.append(user)
    return leading, leaves
