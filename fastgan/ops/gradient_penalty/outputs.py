"""Select the logits among the outputs of a discriminator. Summing any other output would give a wrong penalty."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

Select = int | str | Sequence[int | str] | Callable[[Any], Any]

_HOW_TO_SELECT = (
    "select the logits with select=: an index or key, a tuple of them (select=(0, 1) sums both), or a function "
    "(select=lambda output: output[0])"
)


def logits_of(returned: Any, select: Select | None, samples: int) -> list[Tensor]:
    """Return the logits in the output of a discriminator. Each must have one row per sample.

    Without ``select``, the output must be one tensor, or several that can only be logits of several scales or periods.
    The same applies to a list that an index or a key selects. The result of a function is used without this check.
    """
    plain = isinstance(returned, Tensor) and select is None
    if plain and returned.ndim and returned.shape[0] == samples and not returned.is_complex():
        return [returned]  # the common case
    if select is None:
        logits = _only_logits(returned, samples)
    elif callable(select):
        logits = _chosen(select(returned), returned)
    else:
        keys = select if isinstance(select, tuple | list) else (select,)
        logits = [tensor for key in keys for tensor in _only_logits(_part(returned, key), samples)]
    if _has_duplicates(logits):
        raise ValueError(f"select={select!r} selects the same output twice, from {_shapes(returned)}")
    for tensor in logits:
        if tensor.ndim == 0 or len(tensor) != samples:
            raise ValueError(
                f"the logits must have one row for each of the {samples} inputs, got {_shapes(returned)}: "
                f"{_HOW_TO_SELECT}. A function may also reshape them: select=lambda logits: logits.view(N, -1). If the "
                "discriminator packs several samples into one, pass packed inputs with one pack per row"
            )
        if tensor.is_complex():
            raise TypeError(
                f"the logits must be real, got {tensor.dtype}: select a real tensor, for example with "
                "select=lambda logits: logits.real"
            )
    return logits


def groups_of(returned: Any, select: Select | None) -> tuple[int, ...]:
    """Return the number of logits in each selected output. A function selects single logits: return ()."""
    if callable(select):
        return ()
    if select is None:
        return (len(_tensors(returned)),)
    keys = select if isinstance(select, tuple | list) else (select,)
    return tuple(len(_tensors(_part(returned, key))) for key in keys)


def refuse_dependent(logits: Sequence[Tensor], groups: Sequence[int]) -> None:
    """Raise if an output contains tensors computed from one another. ``logits_of`` cannot check this in a trace."""
    if torch.compiler.is_dynamo_compiling():
        return
    start = 0
    for size in groups:
        group = logits[start : start + size]
        if size > 1 and _depend_on_each_other(group):
            raise ValueError(f"one of the outputs {_shapes(list(group))} is computed from another: {_HOW_TO_SELECT}")
        start += size


def check_select(select: Any) -> None:
    keys = select if isinstance(select, tuple | list) else (select,)
    if select is None or callable(select) or (keys and all(_is_key(key) for key in keys)):
        return
    raise TypeError(f"select must be an index, a key, a tuple of them or a function, got {select!r}")


def _is_key(key: Any) -> bool:
    return isinstance(key, int | str) and not isinstance(key, bool)


def _only_logits(output: Any, samples: int) -> list[Tensor]:
    """Return the tensors of an output if all of them can only be logits."""
    if isinstance(output, Tensor):
        return [output]
    if not isinstance(output, tuple | list | Mapping) or not output:
        raise TypeError(
            f"the discriminator must return a tensor or a sequence of tensors, got {_shapes(output)}: {_HOW_TO_SELECT}"
        )
    if isinstance(output, Mapping) or not all(isinstance(part, Tensor) for part in output):
        raise ValueError(f"the discriminator must return only logits, got {_shapes(output)}: {_HOW_TO_SELECT}")
    logits = list(output)
    rows = all(tensor.ndim > 0 and len(tensor) == samples for tensor in logits)
    if len(logits) > 1 and not (rows and _are_scales(logits)):
        raise ValueError(
            f"the discriminator returned several outputs, {_shapes(output)}, that may not be logits of several "
            f"scales, (N, 1, H, W) each, or periods, (N, L) each, of N={samples} samples: {_HOW_TO_SELECT}"
        )
    return logits


def _chosen(chosen: Any, returned: Any) -> list[Tensor]:
    """Return the tensors that a function has selected."""
    logits = list(chosen) if isinstance(chosen, tuple | list) else [chosen]
    if not logits or not all(isinstance(tensor, Tensor) for tensor in logits):
        raise ValueError(
            f"select must return a tensor or a flat list of them, got {_shapes(chosen)} from {_shapes(returned)}: for "
            "example, select=lambda output: [scale[-1] for scale in output]"
        )
    return logits


def _part(returned: Any, key: Any) -> Any:
    """Return one output. The output must be a collection, because indexing a tensor would select a sample."""
    if not isinstance(returned, tuple | list | Mapping):
        raise ValueError(
            f"select={key!r} selects among several outputs, but the discriminator returned one, "
            f"{_shapes(returned)}: leave select out"
        )
    if isinstance(key, str) and key in getattr(returned, "_fields", ()):  # a named tuple
        return getattr(returned, key)
    try:
        return returned[key]
    except (LookupError, TypeError):
        raise ValueError(f"the discriminator returned no output {key!r}, got {_shapes(returned)}") from None


def _tensors(output: Any) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else list(output)


def _has_duplicates(tensors: Sequence[Tensor]) -> bool:
    return any(tensor is other for i, tensor in enumerate(tensors) for other in tensors[:i])


def _are_scales(logits: Sequence[Tensor]) -> bool:
    """Return whether these can only be logits of several scales or periods.

    A tensor (N, 1) beside others is ambiguous: a class head with one attribute has the same shape.
    """
    first = logits[0]
    if any(tensor.ndim != first.ndim or tensor.shape[1:].numel() < 2 for tensor in logits) or _depend_on_each_other(
        logits
    ):
        return False
    if first.ndim == 2:
        return len({tensor.shape[1] for tensor in logits}) > 1
    return all(tensor.ndim > 2 and tensor.shape[1] == 1 for tensor in logits)


def _depend_on_each_other(logits: Sequence[Tensor]) -> bool:
    """Return whether one tensor was computed from another, such as logits from features."""
    if _has_duplicates(logits):
        return True
    if torch.compiler.is_dynamo_compiling():
        return False  # there is no graph yet; see refuse_dependent
    ends = {tensor.grad_fn for tensor in logits if tensor.grad_fn is not None}
    waiting: list[Node | None] = [following for end in ends for following, _ in end.next_functions]
    seen: set[Node] = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if node in ends:
            return True
        seen.add(node)
        for following, _ in node.next_functions:  # a generator would take longer
            waiting.append(following)
    return False


def _shapes(value: Any) -> str:
    if isinstance(value, Tensor):
        return str(tuple(value.shape))
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {_shapes(part)}" for key, part in value.items()) + "}"
    if isinstance(value, tuple | list):
        return "[" + ", ".join(map(_shapes, value)) + "]"
    return type(value).__name__
