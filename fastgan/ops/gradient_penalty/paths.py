"""The nodes by which outputs depend on inputs."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge


def paths(outputs: Iterable[Tensor], *inputs: Tensor) -> set[Node]:
    """The nodes that a backward from ``outputs`` to ``inputs`` goes through, those of ``inputs`` included."""
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

    leading = {get_gradient_edge(x).node for x in inputs}
    front = list(leading)
    while front:
        for user in users.get(front.pop(), ()):
            if user not in leading:
                leading.add(user)
                front.append(user)
    return leading
