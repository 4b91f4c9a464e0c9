"""Find out whether a discriminator has stored results of its forward, for a loss on features for example.

The first backward of a penalty frees the forward unless somebody may still differentiate it. A result that a module, a
hook or a closure has stored has a Python reference. All others are referred to only by the graph.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable
from typing import Any
from weakref import ref

from torch import Tensor

from fastgan import torch_private
from fastgan.ops.gradient_penalty.paths import follow
from fastgan.ops.needed import node_of


def is_any_stored(results: Iterable[ref[Tensor]], box: list[Any], inputs: tuple[Tensor, ...]) -> bool:
    """Return whether the forward has stored a result that depends on the inputs.

    Args:
        results: the results of the forward's calls.
        box: a list with the output of the discriminator. Nothing else that belongs to fastgan may refer to this output.
        inputs: the inputs of the forward.
    """
    known = _references_from(box)
    if known is None:
        return True
    with torch_private.DisableTorchFunction():
        stored = [result() for result in results if torch_private.count_references(result) > known.get(id(result()), 0)]
        ends = [tensor.grad_fn for tensor in stored if tensor is not None]
    if not any(ends):
        return False
    targets = {node_of(x) for x in inputs}
    return len(follow(ends, targets)[0]) > len(targets)


def _references_from(box: list[Any]) -> Counter[int] | None:
    """Return how often the output refers to each tensor, or None if a list of them has been stored."""
    known: Counter[int] = Counter()
    waiting: list[Any] = [box]
    while waiting:
        holder = waiting.pop()
        for key in holder if isinstance(holder, dict) else range(len(holder)):
            if isinstance(holder[key], Tensor):
                known[id(holder[key])] += 1
            elif type(holder[key]) in (list, tuple, dict):
                if sys.getrefcount(holder[key]) > _ONCE:
                    return None
                waiting.append(holder[key])
    return known


def _references_of_a_list() -> int:
    holder: list[Any] = [[]]
    return sys.getrefcount(holder[0])


_ONCE = _references_of_a_list()
