"""Find the module calls that a call with create_graph=True penalizes, and those that cannot be rerouted."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, cast

from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge

from fastgan.launcher.roots import INNER, OUTPUT, Call
from fastgan.ops.gradient_penalty.paths import paths

GRADIENT = "fastgan: a gradient with a graph"

NESTED = "it is differentiated more than twice (a gradient of a gradient, with create_graph=True)"
IN_PARAMETERS = "it is differentiated with respect to its parameters with create_graph=True"
BATCHED = "its gradients are batched (is_grads_batched=True)"
HOOKED = "it has forward hooks of its own"
COMPILED = "it is compiled by torch.compile"
SCRIPTED = "it is compiled by torch.jit"


class Found(NamedTuple):
    calls: list[Call]
    reason: str | None  # why these calls are not rerouted


def tensors_in(given: Any) -> list[Tensor]:
    if isinstance(given, Tensor):
        return [given]
    values: Iterable[Any] = given.values() if isinstance(given, dict) else given if given is not None else ()
    return [value for value in values if isinstance(value, Tensor)]


def find(outputs: Any, inputs: Any, *, batched: bool = False) -> Found:
    """Return the calls of root modules between the outputs and the inputs."""
    points = [x for x in tensors_in(inputs) if x.requires_grad]
    ends = {get_gradient_edge(x).node for x in points}
    nested = False
    calls: list[Call] = []
    inner: dict[Node, Call] = {}
    waiting: list[Node | None] = [output.grad_fn for output in tensors_in(outputs)]
    seen: set[Node] = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen or node in ends:
            continue
        seen.add(node)
        metadata = cast(Any, node.metadata)
        call = metadata.get(OUTPUT)
        if call is not None and call not in calls:
            calls.append(call)
        if INNER in metadata:
            inner[node] = metadata[INNER]
        # A gradient depends on tensors that its forward saved. These are below the output of the root module.
        earlier = metadata.get(GRADIENT)
        if earlier is not None:
            nested = True
            calls += [call for call in earlier if call not in calls]
        waiting.extend(following for following, _ in node.next_functions)
    if nested:
        return Found(calls, NESTED)
    if any(isinstance(x, nn.Parameter) for x in points):
        return Found(calls, IN_PARAMETERS)
    if inner:
        between = paths(tensors_in(outputs), *points)
        # A call that takes a gradient as a keyword argument has marked calls inside.
        outer = [call for call in (*calls, *inner.values()) if call.takes_gradient]
        for node, call in inner.items():
            if node in between and call not in calls and not any(call.is_inside(other) for other in outer):
                calls.append(call)
    return Found(calls, BATCHED if batched else None)


def is_compiled(module: nn.Module) -> bool:
    return any(
        hasattr(part, "_orig_mod") or getattr(part, "_compiled_call_impl", None) is not None
        for part in module.modules()
    )
