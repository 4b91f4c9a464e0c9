"""Compare a converted model with its original: values, first and second derivatives, and buffers.

An error inside a model never makes the comparison raise. If the original model has no result of some kind, for example
no second derivative, that kind is skipped and the reason is reported.
"""

from __future__ import annotations

import copy
import math
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastgan.convert.distance import distance, norm
from fastgan.convert.probe import outcome
from fastgan.convert.restore import revert
from fastgan.ops.attention.multi_head import dropout_draws
from fastgan.ops.twice_differentiable import twice_differentiable

# Largest allowed relative differences of a float32 model. They equal the tolerances for single ops.
_TOLERANCES = {"output": 1e-5, "gradient": 1e-4, "penalty": 1e-3, "state": 1e-5}
# If a difference exceeds these, it is compared with the original model's own sensitivity to rounding. Sums that cancel,
# such as the gradient of a bias before batch norm, and slopes that flip are inexact in every implementation.
_PERTURBATIONS, _FACTOR = 3, 8
_LEGEND = (
    f"sensitivity: {_FACTOR} times the change of the unconverted model's results when its inputs and parameters are "
    "perturbed by one rounding"
)

_DRAWS = "dropout in attention draws other random numbers than PyTorch on this device"

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Difference:
    """The largest relative difference of one kind: output, gradient, penalty (its gradient) or state (buffers).

    ``basis`` tells where ``allowed`` comes from: "tolerance" is the tolerance for single ops, and "sensitivity" is the
    unconverted model's own sensitivity to rounding.
    """

    kind: str
    error: float
    where: str
    allowed: float
    basis: str = "tolerance"


@dataclass(frozen=True)
class Verification:
    """The comparison of a converted model with the original, on the same inputs and from the same state.

    ``missing`` lists the kinds for which the unconverted model itself has no result, each with the reason. ``note``
    says why the models were compared in evaluation mode, if they were.
    """

    differences: list[Difference]
    missing: dict[str, str] = field(default_factory=dict)
    note: str = ""

    @property
    def equal(self) -> bool:
        """Whether all compared results differ by no more than allowed."""
        return all(d.error <= d.allowed for d in self.differences)

    def __str__(self) -> str:
        compared = [d for d in self.differences if d.kind not in self.missing]
        lines = [("kind", "difference", "allowed", "basis", "largest at")]
        lines += [(d.kind, f"{d.error:.1e}", f"{d.allowed:.0e}", d.basis, d.where) for d in compared]
        parts = [table(lines)] if compared else []
        if any(d.basis == "sensitivity" for d in compared):
            parts.append(_LEGEND)
        parts += [self.note] * bool(self.note)
        parts += [f"not compared: {kind}, {reason}" for kind, reason in self.missing.items()]
        verdict = "equal up to rounding" if self.equal else "NOT EQUAL"
        return "\n".join([*parts, verdict if compared else "nothing could be compared"])


class _Results:
    """The results of one form of the model: tensors by kind and name, and the reason if a kind has none."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensors] = {kind: {} for kind in _TOLERANCES}
        self.missing: dict[str, str] = {}
        self.failed: set[str] = set()  # kinds that are missing because something raised

    def add(self, kind: str, stage: Callable[[], Tensors | str]) -> None:
        """Add the tensors that ``stage`` returns. If it returns a string, that is the reason why there are none."""
        found, failure = outcome(stage)
        if failure is not None:
            self.failed.add(kind)
        if failure is not None or isinstance(found, str):
            self.missing[kind] = failure or found
        else:
            self.tensors[kind].update(found)


def verify(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Verification:
    """Compare copies of the converted model and of the original."""
    if any(t.is_meta for t in (*model.parameters(), *model.buffers(), *tensors_in((args, kwargs)))):
        return _not_compared(dict.fromkeys(_TOLERANCES, "the model or its inputs are on the meta device"))
    with dropout_draws() as draws:
        verification = _verify(model, args, kwargs)
    if verification.equal or not draws:
        return verification
    # Only with the same dropout can the two agree. In evaluation mode, layers have none.
    with dropout_draws() as draws:
        verification = _verify(model, args, kwargs, evaluation=True)
    if draws and not verification.equal:
        return _not_compared(dict.fromkeys(_TOLERANCES, f"{_DRAWS}, in evaluation mode too"))
    return replace(verification, note=f"compared in evaluation mode: {_DRAWS}")


def _verify(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, evaluation: bool = False
) -> Verification:
    copies, failure = outcome(lambda: [_copied(model) for _ in range(3)])
    if failure is not None:
        return _not_compared(dict.fromkeys(_TOLERANCES, f"the model cannot be copied: {failure}"))
    converted, original, untouched = copies
    for unconverted in (original, untouched):
        revert(unconverted)
    for copied in copies if evaluation else ():
        copied.eval()
    expected = _results(original, args, kwargs, rerouted=False)
    actual = _results(converted, args, kwargs, rerouted=True)
    verification = _compared(actual, expected, [])
    if verification.equal:
        return verification
    perturbed = [
        _results(*_perturbed(untouched, args, kwargs, seed), rerouted=False) for seed in range(_PERTURBATIONS + 1)
    ]
    return _compared(actual, expected, perturbed)


def _not_compared(missing: dict[str, str]) -> Verification:
    return Verification([Difference(kind, 0.0, "-", allowed) for kind, allowed in _TOLERANCES.items()], missing)


def _compared(actual: _Results, expected: _Results, perturbed: list[_Results]) -> Verification:
    differences = []
    for kind in _TOLERANCES:
        if kind in actual.failed and kind not in expected.missing:
            raised = f"the converted model raised {actual.missing[kind]}"
            differences.append(Difference(kind, math.inf, raised, _TOLERANCES[kind]))
        else:
            others = [other.tensors[kind] for other in perturbed]
            differences.append(_largest(kind, actual.tensors[kind], expected.tensors[kind], others))
    return Verification(differences, expected.missing)


def _copied(model: nn.Module) -> nn.Module:
    """Make a deep copy. Tensors with a graph are detached, and attributes that cannot be copied are shared."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in tensors_in(vars(module), graphs=True):
            memo[id(value)] = value.detach().clone()
    copied, failure = outcome(lambda: copy.deepcopy(model, memo.copy()))
    if failure is None:
        return copied  # type: ignore[no-any-return]
    for module in model.modules():
        for name, value in vars(module).items():
            if name not in ("_modules", "_parameters", "_buffers"):
                _, failure = outcome(lambda value=value: copy.deepcopy(value, memo.copy()))  # type: ignore[misc]
                if failure is not None:
                    memo[id(value)] = value
    return copy.deepcopy(model, memo)


def _results(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, rerouted: bool) -> _Results:
    parameters: Tensors = {n: p for n, p in model.named_parameters() if p.requires_grad and _is_float(p)}
    results, ran = _Results(), list[Any]()

    def values() -> Tensors | str:
        ran.append(_called(model, _fresh(args), kwargs))
        tensors = list(tensors_in(ran))
        return _named(tensors) if tensors else "the model returns no tensors"

    def gradients() -> Tensors | str:
        loss = _sum(_floating(ran))
        return _gradients(loss, parameters) if loss is not None else "the model returns no floating-point tensors"

    def penalty() -> Tensors | str:
        first = pytree.tree_map(_differentiable, _fresh(args[:1]))
        inputs = [t for t in tensors_in(first) if t.requires_grad]
        if not inputs:
            return "the first input is not floating-point"
        with twice_differentiable() if rerouted else nullcontext():
            loss = _sum(_floating(_called(model, (*first, *_fresh(args[1:])), kwargs)))
        if loss is None or not loss.requires_grad:
            return "no output depends on the first input"
        grads = torch.autograd.grad(loss, inputs, create_graph=True, allow_unused=True)
        grads = tuple(g for g in grads if g is not None)
        if not grads:
            return "no output depends on the first input"
        results.tensors["gradient"] |= {f"first input {i}": g.detach() for i, g in enumerate(grads)}
        squares = torch.stack([_real(g).square().sum() for g in grads]).sum()
        return _gradients(squares / max(1, len(inputs[0]) if inputs[0].ndim else 1), parameters)

    with _reproducible(model, args), torch.enable_grad():
        results.add("output", values)
        if ran:
            results.add("gradient", gradients)
            results.add("penalty", penalty)
            results.add("state", lambda: {n: b.detach().clone() for n, b in model.named_buffers()})
        else:
            results.missing |= dict.fromkeys(("gradient", "penalty", "state"), "the model has no output")
    return results


@contextmanager
def _reproducible(model: nn.Module, args: tuple[Any, ...]) -> Iterator[None]:
    """Restore the random number generators of the process afterwards."""
    devices = {t.device for t in (*model.parameters(), *tensors_in(args)) if t.is_cuda}
    numpy: Any = sys.modules.get("numpy")
    states = random.getstate(), numpy.random.get_state() if numpy else None
    try:
        with torch.random.fork_rng(list(devices)):
            yield
    finally:
        random.setstate(states[0])
        if numpy:
            numpy.random.set_state(states[1])


def _called(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the model's output, with the same random numbers at each call."""
    torch.manual_seed(0)
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    return model(*args, **_fresh(kwargs))


def _fresh(values: Any) -> Any:
    """Copy the tensors, because a model may write into its input."""
    return pytree.tree_map(lambda v: v.detach().clone() if isinstance(v, Tensor) else v, values)


def _differentiable(value: Any) -> Any:
    return value.requires_grad_() if isinstance(value, Tensor) and _is_float(value) else value


def _perturbed(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], seed: int
) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """Return a copy of the model and the inputs, perturbed by up to one rounding. With seed 0 they are unchanged."""
    generators: dict[torch.device, torch.Generator] = {}

    def perturb(t: Any) -> Any:
        if not isinstance(t, Tensor) or not t.is_floating_point() or seed == 0:
            return t
        generator = generators.setdefault(t.device, torch.Generator(t.device).manual_seed(seed))
        signs = torch.randint(0, 2, t.shape, generator=generator, device=t.device) * 2 - 1
        return t + t * signs * torch.finfo(t.dtype).eps

    copied = _copied(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            if parameter.requires_grad:
                parameter.copy_(perturb(parameter))
        return copied, pytree.tree_map(perturb, _fresh(args)), pytree.tree_map(perturb, _fresh(kwargs))


def _gradients(loss: Tensor, parameters: Tensors) -> Tensors | str:
    if not parameters:
        return "no parameter requires a gradient"
    if not loss.requires_grad:
        return "the result depends on nothing that requires a gradient"
    grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    # A missing gradient counts as zero, because an optimizer treats them alike.
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(parameters.items(), grads, strict=True)}


def _sum(outputs: Sequence[Tensor]) -> Tensor | None:
    outputs = [t for t in outputs if t.requires_grad] or outputs
    return torch.stack([_real(t).square().sum() / len(outputs) for t in outputs]).sum() if outputs else None


def _real(tensor: Tensor) -> Tensor:
    """View the tensor as real, in a precision in which its squares can be summed."""
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return real if real.dtype == torch.float64 else real.float()


def _is_float(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _floating(values: Any) -> list[Tensor]:
    return [t for t in tensors_in(values) if _is_float(t)]


def _named(tensors: Sequence[Tensor]) -> Tensors:
    return {f"output {i}": t.detach().clone() for i, t in enumerate(tensors)}


def tensors_in(values: Any, *, graphs: bool = False) -> Iterator[Tensor]:
    """Yield every tensor in nested containers and data classes. With ``graphs``, only tensors with a graph."""
    if isinstance(values, Tensor):
        if not graphs or values.grad_fn is not None:
            yield values
    elif isinstance(values, Mapping):
        for value in values.values():
            yield from tensors_in(value, graphs=graphs)
    elif isinstance(values, list | tuple):
        for value in values:
            yield from tensors_in(value, graphs=graphs)
    elif is_dataclass(values) and not isinstance(values, type | nn.Module):
        for item in fields(values):
            yield from tensors_in(getattr(values, item.name, None), graphs=graphs)


def _largest(kind: str, actual: Tensors, expected: Tensors, perturbed: list[Tensors]) -> Difference:
    norms = {name: norm(t) for name, t in expected.items()}
    least = 1e-6 * max(norms.values(), default=0.0)  # compared with the largest tensor, a smaller one is rounding noise
    rounding = max((torch.finfo(t.dtype).eps for t in expected.values() if _is_float(t)), default=0.0)
    tolerance = max(_TOLERANCES[kind], 4 * rounding)
    worst = Difference(kind, 0.0, "-", tolerance)
    for name, wanted in expected.items():
        scale = max(norms[name], least) or 1.0
        error, *moves = (distance(other.get(name), wanted) / scale for other in (actual, *perturbed))
        sensitivity = max((_FACTOR * move for move in moves if math.isfinite(move)), default=0.0)
        basis = "sensitivity" if sensitivity > tolerance else "tolerance"
        allowed = max(tolerance, sensitivity)
        if error * worst.allowed > worst.error * allowed:
            worst = Difference(kind, error, name, allowed, basis)
    return worst


def table(lines: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([padded[0], "-" * max(map(len, padded)), *padded[1:]])
