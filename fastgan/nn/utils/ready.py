"""Weights that a model's forward has normalized for its layers, kept until each layer reads its own."""

from __future__ import annotations

import weakref
from functools import partial
from threading import get_ident
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastgan.ops.library import checkpointed_region


class Vectors(NamedTuple):
    """The u and v that a power iteration has renewed, and the values they had before it."""

    u: Tensor
    v: Tensor
    before: Tensor  # those of all weights of the call, one after the other
    u_at: int
    v_at: int

    def restore(self) -> None:
        with torch.no_grad():
            self.u.copy_(self.before[self.u_at : self.u_at + len(self.u)])
            self.v.copy_(self.before[self.v_at : self.v_at + len(self.v)])


class Ready(NamedTuple):
    """A normalized weight, and what must still hold when it is read."""

    weight: Tensor
    original: Tensor
    version: int  # of the original
    address: int  # of the original's values, which `original.data = ...` changes without a new version
    training: bool
    thread: int  # whose forward it is; 0: of a graph that is compiled
    region: object | None  # of torch.utils.checkpoint that it was made in: another one is run again without it
    vectors: Vectors | None  # None: u and v are as they were

    def is_valid(self, original: Tensor | None, training: bool) -> bool:
        if self.original is not original or self.training != training:
            return False
        if self._needs_graph() and not self.weight.requires_grad:
            return False
        return self.thread == 0 or (
            self.thread == get_ident()
            and (self.version, self.address) == _state(original)
            and self.region is checkpointed_region()
        )

    def given(self) -> Tensor:
        """The weight, without its graph where a weight computed now would have none."""
        return self.weight.detach() if self.weight.requires_grad and not self._needs_graph() else self.weight

    def is_mine(self) -> bool:
        return self.thread == 0 or self.thread == get_ident()

    def _needs_graph(self) -> bool:
        return torch.is_grad_enabled() and self.original.requires_grad

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # in a copy of a model whose forward was broken off


def ready(
    weight: Tensor, original: Tensor, training: bool, thread: int, region: object | None, vectors: Vectors | None
) -> Ready:
    version, address = (0, 0) if thread == 0 else _state(original)
    return Ready(weight, original, version, address, training, thread, region, vectors)


def _state(original: Tensor) -> tuple[int, int]:
    return 0 if original.is_inference() else original._version, original.data_ptr()


def thread_and_region() -> tuple[int, object | None]:
    """Those of now; a graph that is compiled takes its weights away itself."""
    return (0, None) if torch.compiler.is_compiling() else (get_ident(), checkpointed_region())


def put(module: nn.Module, name: str, ready: Ready) -> None:
    """Keep this weight for the next read of ``module.<name>``."""
    module.__dict__[_key(name)] = ready


def read(module: nn.Module, name: str, original: Tensor | None, training: bool) -> Tensor | None:
    """The weight kept for a read that happens now; None: it is to be computed.

    A training forward's weight serves one read, as PyTorch renews u and v at each. If it does not fit this read, u and
    v get their former values, and the reader iterates from those.
    """
    there: Ready | None = module.__dict__.get(_key(name))
    if there is not None and there.vectors is not None:
        there = module.__dict__.pop(_key(name), None)  # of two threads, one gets it
    if there is None:
        return None
    if there.is_valid(original, training):
        return there.given()
    if there.vectors is not None:
        there.vectors.restore()
    return None


def discard(module: nn.Module, name: str, *, of_all: bool = False) -> bool:
    """Remove what this thread keeps, or any thread. Whether u and v were renewed for nobody; they then are restored."""
    there: Ready | None = module.__dict__.pop(_key(name), None)
    if there is None:
        return False
    if not (of_all or there.is_mine()):
        put(module, name, there)
        return False
    if there.vectors is not None:
        there.vectors.restore()
    return there.vectors is not None


def _key(name: str) -> str:
    return f"_normalized_{name}"


def is_recomputing() -> bool:
    """Whether backward is recomputing a forward (activation checkpointing): then u and v stay those of that forward."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def copyable(weight: Tensor) -> Tensor:
    """The same tensor, which may have a graph and can be deep-copied and pickled nevertheless: without the graph.

    PyTorch refuses both, and a layer that keeps such a tensor as an attribute with them.
    """
    if not torch.compiler.is_compiling() and weight.grad_fn is not None:
        itself = weakref.ref(weight)
        weight.__deepcopy__ = partial(_deepcopy, itself)  # type: ignore[method-assign]
        weight.__reduce_ex__ = partial(_reduce_ex, itself)  # type: ignore[method-assign]
    return weight


def _deepcopy(weight: weakref.ref[Tensor], memo: dict[int, Any]) -> Tensor:
    there = weight()
    assert there is not None  # whoever copies it holds it
    copied: Tensor = memo.setdefault(id(there), there.detach().clone())
    return copied


def _reduce_ex(weight: weakref.ref[Tensor], protocol: int) -> Any:
    there = weight()
    assert there is not None
    return there.detach().__reduce_ex__(protocol)
