"""The inputs of a discriminator: a tensor, or a tuple, list or dict of tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

Inputs = Tensor | Sequence[Tensor] | Mapping[Any, Tensor]


def named(name: str, inputs: Inputs) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor with its name for error messages."""
    if isinstance(inputs, Tensor):
        yield name, inputs
    elif isinstance(inputs, Mapping):
        yield from ((f"{name}[{key!r}]", tensor) for key, tensor in inputs.items())
    else:
        yield from ((f"{name}[{i}]", tensor) for i, tensor in enumerate(inputs))


def floating(inputs: Inputs) -> tuple[Tensor, ...]:
    """Return the tensors that are differentiated."""
    if isinstance(inputs, Tensor):
        return (inputs,)
    return tuple(tensor for _, tensor in named("", inputs) if tensor.is_floating_point())


def replaced(inputs: Inputs, by: Callable[[Tensor], Tensor]) -> Inputs:
    """Return the same structure with each floating-point tensor replaced by ``by(tensor)``."""
    if isinstance(inputs, Tensor):
        return by(inputs)
    new = [by(tensor) if tensor.is_floating_point() else tensor for _, tensor in named("", inputs)]
    if isinstance(inputs, Mapping):
        if type(inputs) is dict:
            return dict(zip(inputs, new, strict=True))
        mapping: Any = copy.copy(inputs)
        for key, tensor in zip(inputs, new, strict=True):
            mapping[key] = tensor
        return mapping  # type: ignore[no-any-return]
    make: Any = getattr(type(inputs), "_make", type(inputs))  # for named tuples
    return make(new)  # type: ignore[no-any-return]


def differentiable(inputs: Inputs) -> tuple[Inputs, tuple[Tensor, ...]]:
    """Detach the inputs. Return them, and the floating-point tensors among them, which then require a gradient."""
    if isinstance(inputs, Tensor):
        x = _leaf(inputs)
        return x, (x,)
    given = replaced(inputs, _leaf)
    return given, floating(given)


def _leaf(tensor: Tensor) -> Tensor:
    x = tensor.clone() if tensor.is_inference() else tensor.detach()
    return x.requires_grad_()


def check_inputs(name: str, inputs: Any) -> None:
    """Raise unless all floating-point tensors have one row per sample."""
    if isinstance(inputs, Tensor):
        if not inputs.is_floating_point():
            raise TypeError(f"{name} must be floating-point, got {inputs.dtype}")
        _check_rows(name, inputs)
        return
    if not isinstance(inputs, tuple | list | Mapping):
        raise TypeError(f"{name} must be a tensor, or a tuple, list or dict of tensors, got {type(inputs).__name__}")
    for part, tensor in named(name, inputs):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{part} must be a tensor, got {type(tensor).__name__}")
        if tensor.is_floating_point():
            _check_rows(part, tensor)
    each = floating(inputs)
    if not each:
        raise TypeError(f"{name} must hold a floating-point tensor, got none")
    if len({len(tensor) for tensor in each}) > 1:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in each)
        raise ValueError(f"the floating-point tensors of {name} must have one row per sample, got shapes {shapes}")


def _check_rows(part: str, tensor: Tensor) -> None:
    if tensor.ndim == 0 or tensor.numel() == 0:
        raise ValueError(f"{part} must be (N, ...) and not empty, got shape {tuple(tensor.shape)}")


def check_same_form(real: Inputs, fake: Inputs) -> None:
    """Raise unless ``fake`` has the structure, shapes and devices of ``real``."""
    if isinstance(real, Tensor) and isinstance(fake, Tensor):
        _check_alike("real", real, "fake", fake)
        return
    of_real, of_fake = dict(named("", real)), dict(named("", fake))
    if list(of_real) != list(of_fake):
        wanted, got = (
            ", ".join(name + part for part in parts) for name, parts in (("real", of_real), ("fake", of_fake))
        )
        raise ValueError(f"fake must hold the same tensors as real, {wanted}, got {got}")
    for part, tensor in of_real.items():
        _check_alike(f"real{part}", tensor, f"fake{part}", of_fake[part])


def _check_alike(of: str, real: Tensor, part: str, fake: Tensor) -> None:
    if fake.shape != real.shape:
        raise ValueError(f"{part} must have the shape of {of}, {tuple(real.shape)}, got {tuple(fake.shape)}")
    if fake.device != real.device:
        raise ValueError(f"{part} must be on the device of {of}, {real.device}, got {fake.device}")
    if fake.is_floating_point() != real.is_floating_point():
        raise TypeError(f"{part} and {of} must both be floating-point or both not, got {fake.dtype} and {real.dtype}")
