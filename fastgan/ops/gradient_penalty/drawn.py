"""Random numbers from a generator that the caller passes, also inside a compiled graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastgan.ops.library import LIBRARY

# A graph cannot hold a generator. It holds the id of one, which this operator looks up. The tags stop the compiler from
# merging two draws with equal arguments, and from recording the draw in a CUDA graph.
_TAGS = [torch.Tag.nondeterministic_seeded]
if hasattr(torch.Tag, "cudagraph_unsafe"):
    _TAGS.append(torch.Tag.cudagraph_unsafe)
_SCHEMA = "uniform(int generator, SymInt[] size, ScalarType dtype, Device device) -> Tensor"
_generators: dict[int, torch.Generator] = {}


def uniform(size: Sequence[int], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw numbers in [0, 1) with the dtype and device of ``like``."""
    if generator is not None and torch.compiler.is_dynamo_compiling():
        number = _remember(id(generator))
        drawn: Tensor = torch.ops.fastgan.uniform(number, list(size), like.dtype, like.device)
        return drawn
    if generator is None:  # a generator, even None, refuses the symbolic size of a dynamic graph
        return torch.rand(size, dtype=like.dtype, device=like.device)
    return torch.rand(size, dtype=like.dtype, device=like.device, generator=generator)


def _remember(address: int) -> int:
    """Register a generator by its ``id`` while Dynamo traces. A graph that draws from it keeps it alive."""
    import ctypes

    generator = ctypes.cast(address, ctypes.py_object).value
    assert isinstance(generator, torch.Generator)
    _generators[address] = generator
    return address


_remember._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _uniform(generator: int, size: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.rand(size, dtype=dtype, device=device, generator=_generators[generator])


def _fake(generator: int, size: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(size, dtype=dtype, device=device)


_operators: Any = torch.ops.fastgan
if hasattr(_operators, "uniform"):  # an import that failed halfway has defined it: keep its generators
    _generators = _operators.uniform_generators
else:
    LIBRARY.define(_SCHEMA, tags=_TAGS)
    LIBRARY.impl("uniform", _uniform, "CompositeExplicitAutograd")
    torch.library.register_fake("fastgan::uniform", _fake, lib=LIBRARY)
    _operators.uniform_generators = _generators
