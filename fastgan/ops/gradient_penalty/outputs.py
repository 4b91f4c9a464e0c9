"""Which of a discriminator's outputs are logits. Nothing else may be summed in: the penalty would be a wrong number."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node

Select = int | str | Sequence[int | str] | Callable[[Any], Any]

_CURE = (
    "choose the logits with select=: an index or a key, several that are summed (select=(0, 1)), or a function "
    "(select=lambda output: output[0])"
)


def logits_of(returned: Any, select: Select | None, samples: int) -> list[Tensor]:
    """The logits among what a discriminator returned, each with a row a sample.

    Without ``select``, that is one tensor, or several that can only be logits of several scales or periods.
    """
    if select is None:
        logits = _all_of(returned)
        if any(len(tensor) != samples if tensor.ndim else True for tensor in logits):
            raise ValueError(
                f"the discriminator must return a row of logits for each of its {samples} inputs, got "
                f"{_shapes(returned)}: {_CURE}. A function may reshape them, too: "
                "select=lambda logits: logits.view(N, -1). Where D packs several samples in one, give it packed "
                "inputs, one pack a row"
            )
        if len(logits) > 1 and not _are_scales(logits):
            raise ValueError(
                f"the discriminator returned several outputs, {_shapes(returned)}, that need not be logits of several "
                f"scales, (N, 1, H, W) each, or periods, (N, L) each: {_CURE}"
            )
        return logits
    logits = _selected(returned, select)
    for tensor in logits:
        if tensor.ndim == 0 or len(tensor) != samples:
            raise ValueError(
                f"select must choose logits with a row for each of the {samples} inputs, got shape "
                f"{tuple(tensor.shape)} from {_shapes(returned)}"
            )
    return logits


def check_select(select: Any) -> None:
    keys = select if isinstance(select, tuple | list) else (select,)
    if select is None or callable(select) or (keys and all(_is_key(key) for key in keys)):
        return
    raise TypeError(f"select must be an index, a key, a tuple of them or a function, got {select!r}")


def _is_key(key: Any) -> bool:
    return isinstance(key, int | str) and not isinstance(key, bool)


def _all_of(returned: Any) -> list[Tensor]:
    if isinstance(returned, Tensor):
        return [returned]
    if isinstance(returned, tuple | list) and returned and all(isinstance(part, Tensor) for part in returned):
        return list(returned)
    if isinstance(returned, tuple | list | Mapping) and returned:
        raise ValueError(f"the discriminator must return logits alone, got {_shapes(returned)}: {_CURE}")
    raise TypeError(f"the discriminator must return a tensor or a sequence of tensors, got {_shapes(returned)}")


def _selected(returned: Any, select: Select) -> list[Tensor]:
    if callable(select):
        chosen = select(returned)
        parts = list(chosen) if isinstance(chosen, tuple | list) else [chosen]
    else:
        keys = select if isinstance(select, tuple | list) else (select,)
        parts = [_part(returned, key) for key in keys]
    if not parts or not all(isinstance(part, Tensor) for part in parts):
        raise ValueError(
            f"select must choose a tensor, or several, got {_shapes(parts[0] if len(parts) == 1 else parts)} from "
            f"{_shapes(returned)}: a function reaches into what is nested, "
            "select=lambda output: [scale[-1] for scale in output]"
        )
    if len({id(part) for part in parts}) < len(parts):
        raise ValueError(f"select={select!r} chooses the same output twice, of {_shapes(returned)}")
    return parts


def _part(returned: Any, key: Any) -> Any:
    """One output. An index into a tensor would be a sample."""
    if not isinstance(returned, tuple | list | Mapping):
        raise ValueError(
            f"select={key!r} chooses among several outputs, but the discriminator returned one, "
            f"{_shapes(returned)}: leave select out"
        )
    try:
        return returned[key]
    except (LookupError, TypeError):
        raise ValueError(f"the discriminator returned no output {key!r}, but {_shapes(returned)}") from None


def _are_scales(logits: Sequence[Tensor]) -> bool:
    """Whether these can only be logits of several scales or periods.

    A single logit (N, 1) beside others is not surely one: a class head with one attribute has that shape too.
    """
    first = logits[0]
    if any(tensor.ndim != first.ndim or tensor.shape[1:].numel() < 2 for tensor in logits) or _one_made_of_another(
        logits
    ):
        return False
    if first.ndim == 2:
        return len({tensor.shape[1] for tensor in logits}) > 1
    return all(tensor.ndim > 2 and tensor.shape[1] == 1 for tensor in logits)


def _one_made_of_another(logits: Sequence[Tensor]) -> bool:
    """Whether one was computed from another, as logits are from features, and probabilities from logits."""
    ends = {tensor.grad_fn for tensor in logits if tensor.grad_fn is not None}
    if len({id(tensor) for tensor in logits}) < len(logits):
        return True
    waiting: list[Node | None] = [following for end in ends for following, _ in end.next_functions]
    seen: set[Node] = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if node in ends:
            return True
        seen.add(node)
        waiting.extend(following for following, _ in node.next_functions)
    return False


def _shapes(value: Any) -> str:
    if isinstance(value, Tensor):
        return str(tuple(value.shape))
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {_shapes(part)}" for key, part in value.items()) + "}"
    if isinstance(value, tuple | list):
        return "[" + ", ".join(map(_shapes, value)) + "]"
    return type(value).__name__
