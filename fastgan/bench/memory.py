"""Measures the peak memory of a computation: all memory, and memory saved for backward."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Return the peak memory of ``run()`` in bytes, minus the memory at its start.

    On CUDA this is the memory of PyTorch's allocator. Elsewhere it is the memory of tensors that operators return,
    until that memory is freed. Memory that an operator allocates and frees internally is not counted.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before: int = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        most: int = torch.cuda.max_memory_allocated(device)
        return most - before
    live = _LiveStorages()
    with live:
        run()
    return int(live.most)


def saved_bytes(run: Callable[[], object], apart: Iterable[Tensor] = ()) -> int:
    """Return the peak number of bytes that graphs save for backward during ``run()``. Shared memory counts once.

    ``apart``: tensors that are not counted, such as parameters, because they exist anyway.
    """
    counted = _Total()
    holders: Counter[int] = Counter()
    known = {_memory(tensor)[0] for tensor in apart}

    class Saved:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor.detach()
            self.address, self.bytes = _memory(tensor)
            holders[self.address] += 1
            if holders[self.address] == 1 and self.address not in known:
                counted.add(self.bytes)

        def __del__(self) -> None:
            holders[self.address] -= 1
            if holders[self.address] == 0 and self.address not in known:
                counted.add(-self.bytes)

    with saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        run()
    return counted.most


def _memory(tensor: Tensor) -> tuple[int, int]:
    """Return the address and the size in bytes."""
    if tensor._is_zerotensor():
        return 0, 0  # autograd's symbolic zeros have no storage
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


class _Total:
    def __init__(self) -> None:
        self.now = self.most = 0

    def add(self, change: int) -> None:
        self.now += change
        self.most = max(self.most, self.now)


class _LiveStorages(TorchDispatchMode):
    """Tracks the memory of tensors that operators return until it is freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._total = _Total()
        self._seen: dict[int, weakref.ref[Any]] = {}

    @property
    def most(self) -> int:
        return self._total.most

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {_memory(leaf)[0] for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._follow(leaf, given)
        return result

    def _follow(self, tensor: Tensor, given: set[int]) -> None:
        key, size = _memory(tensor)
        if key in given or key in self._seen or not size:
            return  # a view of existing memory

        def freed(_: Any) -> None:
            del self._seen[key]
            self._total.add(-size)

        self._seen[key] = weakref.ref(tensor.untyped_storage(), freed)
        self._total.add(size)
