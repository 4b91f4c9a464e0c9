"""Weights that a model's forward has normalized in advance, stored until each layer reads its own."""

from __future__ import annotations

import weakref
from functools import partial
from threading import get_ident
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastgan.ops.library import checkpointed_region


class Vectors(NamedTuple):
    """The u and v that a power iteration has updated, and their previous values."""

    u: Tensor
    v: Tensor
    before: Tensor  # the previous values for all weights of the call, concatenated
    u_at: int
    v_at: int

    def restore(self) -> None:
        with torch.no_grad():
            self.u.copy_(self.before[self.u_at : self.u_at + len(self.u)])
            self.v.copy_(self.before[self.v_at : self.v_at + len(self.v)])


class Ready(NamedTuple):
    """A normalized weight, and the conditions under which it may be read."""

    weight: Tensor
    original: Tensor
    version: int  # version of the original
    address: int  # address of the original's values; `original.data = ...` changes it without a new version
    training: bool
    thread: int  # thread of the forward; 0 inside a compiled graph
    region: object | None  # torch.utils.checkpoint region of the forward; another region reruns without this weight
    vectors: Vectors | None  # None: u and v have not changed

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
        """Return the weight. It is detached if a weight computed now would have no graph."""
        return self.weight.detach() if self.weight.requires_grad and not self._needs_graph() else self.weight

    def is_readable_here(self) -> bool:
        return self.thread == 0 or self.thread == get_ident()

    def _needs_graph(self) -> bool:
        return torch.is_grad_enabled() and self.original.requires_grad

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # a copy of a model with an interrupted forward has no prepared weights


def ready(
    weight: Tensor, original: Tensor, training: bool, thread: int, region: object | None, vectors: Vectors | None
) -> Ready:
    version, address = (0, 0) if thread == 0 else _state(original)
    return Ready(weight, original, version, address, training, thread, region, vectors)


def _state(original: Tensor) -> tuple[int, int]:
    return 0 if original.is_inference() else original._version, original.data_ptr()


def thread_and_region() -> tuple[int, object | None]:
    """Return the current thread and checkpoint region. A compiled graph removes its weights itself."""
    return (0, None) if torch.compiler.is_compiling() else (get_ident(), checkpointed_region())


def put(module: nn.Module, name: str, ready: Ready) -> None:
    """Store this weight for the next read of ``module.<name>``."""
    module.__dict__[_key(name)] = ready


def read(module: nn.Module, name: str, original: Tensor | None, training: bool) -> Tensor | None:
    """Return the stored weight for a read that happens now. None: the caller must compute the weight.

    A weight of a training forward serves a single read, because PyTorch updates u and v at each read. If it is not
    valid for this read, u and v are restored, and the caller iterates from the restored values.
    """
    stored = _look(module, name)
    if stored is not None and stored.vectors is not None:
        stored = _take(module, name)
    if stored is None:
        return None
    if stored.is_valid(original, training):
        return stored.given()
    if stored.vectors is not None:
        stored.vectors.restore()
    return None


def discard(module: nn.Module, name: str, *, any_thread: bool = False) -> bool:
    """Remove the weight stored by this thread, or by any thread.

    If a training weight was not read, restore u and v and return True.
    """
    if _look(module, name) is None:
        return False
    stored = _take(module, name)
    if stored is None:
        return False
    if not (any_thread or stored.is_readable_here()):
        put(module, name, stored)
        return False
    if stored.vectors is not None:
        stored.vectors.restore()
    return stored.vectors is not None


def _look(module: nn.Module, name: str) -> Ready | None:
    if torch.compiler.is_compiling():
        return getattr(module, _key(name), None)  # Dynamo before torch 2.12 cannot trace __dict__
    stored: Ready | None = module.__dict__.get(_key(name))
    return stored


def _take(module: nn.Module, name: str) -> Ready | None:
    if torch.compiler.is_compiling():
        stored = _look(module, name)
        setattr(module, _key(name), None)
        return stored
    taken: Ready | None = module.__dict__.pop(_key(name), None)  # only one of two threads gets it
    return taken


def _key(name: str) -> str:
    return f"_normalized_{name}"


def is_recomputing() -> bool:
    """Return whether backward is recomputing a forward (activation checkpointing). u and v must then not change."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def copyable(weight: Tensor) -> Tensor:
    """Make a tensor with a graph deep-copyable and picklable, and return it. The copies have no graph.

    PyTorch refuses to copy or pickle such a tensor, and any layer that holds one as an attribute.
    """
    if not torch.compiler.is_compiling() and weight.grad_fn is not None:
        itself = weakref.ref(weight)
        weight.__deepcopy__ = partial(_deepcopy, itself)  # type: ignore[method-assign]
        weight.__reduce_ex__ = partial(_reduce_ex, itself)  # type: ignore[method-assign]
    return weight


def _deepcopy(weight: weakref.ref[Tensor], memo: dict[int, Any]) -> Tensor:
    tensor = weight()
    assert tensor is not None  # the caller that copies it holds a reference
    copied: Tensor = memo.setdefault(id(tensor), tensor.detach().clone())
    return copied


def _reduce_ex(weight: weakref.ref[Tensor], protocol: int) -> Any:
    tensor = weight()
    assert tensor is not None
    return tensor.detach().__reduce_ex__(protocol)
