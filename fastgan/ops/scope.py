"""What the twice-differentiable ops of one forward share: whether its backward is asked for input gradients alone.

``ctx.needs_input_grad`` says that every gradient is needed even in ``autograd.grad(y, x)``, and a backward on a GPU
runs in a thread of its own. So the ops keep the scope that their forward ran in, and who asks for a gradient says so
to the scopes of that graph and of no other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor


class Scope:
    """One ``twice_differentiable()`` block."""

    inputs_only = False


_current: ContextVar[Scope | None] = ContextVar("fastgan_scope", default=None)


def current_scope() -> Scope | None:
    return _current.get()


@contextmanager
def new_scope() -> Iterator[Scope]:
    scope = Scope()
    token = _current.set(scope)
    try:
        yield scope
    finally:
        _current.reset(token)


def needed(ctx: Any) -> tuple[bool, ...]:
    """``ctx.needs_input_grad``, where only the first input counts while the scope is asked for inputs alone."""
    wanted: tuple[bool, ...] = ctx.needs_input_grad
    if ctx.scope is not None and ctx.scope.inputs_only:
        return wanted[0], *(False for _ in wanted[1:])
    return wanted


@contextmanager
def inputs_only(outputs: Iterable[Tensor]) -> Iterator[None]:
    """Inside, a backward from these outputs makes no gradients of parameters."""
    scopes = _scopes_of(outputs)
    try:
        for scope in scopes:
            scope.inputs_only = True
        yield
    finally:
        for scope in scopes:
            scope.inputs_only = False


def _scopes_of(outputs: Iterable[Tensor]) -> set[Scope]:
    found: set[Scope] = set()
    seen: set[Any] = set()
    nodes = [t.grad_fn for t in outputs]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        scope = getattr(node, "scope", None)
        if isinstance(scope, Scope):
            found.add(scope)
        nodes.extend(next_node for next_node, _ in node.next_functions)
    return found
