"""What a conversion did, module by module, and a comparison of the model with what it was."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastgan.convert.restore import revert
from fastgan.ops.twice_differentiable import twice_differentiable

# Largest relative differences of a float32 model, by order of derivative; what an op is held to.
_TOLERANCES = {"output": 1e-5, "gradient": 1e-4, "penalty": 1e-3, "state": 1e-5}
# Beside these, what the unconverted model makes of inputs and parameters that differ by a rounding: sums that cancel,
# as the gradient of a bias before batch norm, and slopes that turn have no more digits in any implementation.
_MOVED, _TIMES = 3, 8


@dataclass(frozen=True)
class Row:
    """One module: what it was replaced by, or None and why not."""

    path: str
    module: str
    replaced_by: str | None
    reason: str


@dataclass(frozen=True)
class Difference:
    """The largest relative difference of one kind: output, gradient, penalty (its gradient) or state (buffers)."""

    kind: str
    error: float
    where: str
    allowed: float


@dataclass(frozen=True)
class Verification:
    """The converted model against what it was, on the same inputs and from the same state."""

    differences: list[Difference]

    @property
    def equal(self) -> bool:
        return all(d.error <= d.allowed for d in self.differences)

    def __str__(self) -> str:
        lines = [("of", "difference", "allowed", "largest at")]
        lines += [(d.kind, f"{d.error:.1e}", f"{d.allowed:.0e}", d.where) for d in self.differences]
        return f"{_table(lines)}\n{'equal up to rounding' if self.equal else 'NOT EQUAL'}"


@dataclass
class Report:
    """The modules of a converted model. Prints as a table; ``verify`` compares with the model as it was."""

    model: nn.Module = field(repr=False)
    rows: list[Row]

    @property
    def replaced(self) -> list[Row]:
        return [row for row in self.rows if row.replaced_by is not None]

    @property
    def left_alone(self) -> list[Row]:
        return [row for row in self.rows if row.replaced_by is None]

    def __str__(self) -> str:
        lines = [("module", "class", "replaced by", "")]
        lines += [(row.path or "(model)", row.module, row.replaced_by or "-", row.reason) for row in self.rows]
        return f"{_table(lines)}\n{len(self.replaced)} replaced, {len(self.left_alone)} left alone"

    def verify(self, sample_inputs: Tensor | Sequence[Any]) -> Verification:
        """Run the model and what it was, forward, backward and through a penalty on the first input's gradient.

        Works on copies: parameters, buffers and random numbers of the model and the process stay as they are.

        Args:
            sample_inputs: the input of the model, or a sequence of its positional inputs, the first a tensor.

        Raises:
            TypeError: the first input is not a tensor, or nothing that the model returns is.
        """
        inputs = (sample_inputs,) if isinstance(sample_inputs, Tensor) else tuple(sample_inputs)
        if not inputs or not isinstance(inputs[0], Tensor):
            got = type(inputs[0]).__name__ if inputs else "none"
            raise TypeError(f"sample_inputs must be a tensor or begin with one, got {got}")
        converted, original = copy.deepcopy(self.model), copy.deepcopy(self.model)
        revert(original)
        untouched = copy.deepcopy(original)
        expected = _results(original, inputs, rerouted=False)
        actual = _results(converted, inputs, rerouted=True)
        verification = Verification([_largest(kind, actual[kind], expected[kind]) for kind in expected])
        if verification.equal:
            return verification
        nearby = [_results(*_moved(untouched, inputs, seed), rerouted=False) for seed in range(_MOVED)]
        return Verification([_largest(k, actual[k], expected[k], *(other[k] for other in nearby)) for k in expected])


def _results(model: nn.Module, inputs: tuple[Any, ...], *, rerouted: bool) -> dict[str, dict[str, Tensor]]:
    parameters: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    first, *rest = inputs
    devices = [first.device] if first.is_cuda else []
    results: dict[str, dict[str, Tensor]] = {}
    with torch.random.fork_rng(devices), torch.enable_grad():
        torch.manual_seed(0)
        outputs = list(_tensors(model(first, *rest)))
        if not outputs:
            raise TypeError("the model must return floating-point tensors to be compared")
        results["output"] = {f"output {i}": t.detach() for i, t in enumerate(outputs)}
        results["gradient"] = _gradients(_sum(outputs), parameters)
        if first.is_floating_point():
            x = first.detach().clone().requires_grad_()
            with twice_differentiable() if rerouted else nullcontext():
                outputs = list(_tensors(model(x, *rest)))
            (grad,) = torch.autograd.grad(_sum(outputs), x, create_graph=True, allow_unused=True)
            results["penalty"] = {} if grad is None else _gradients(grad.float().square().sum() / len(x), parameters)
    results["state"] = {name: buffer.detach() for name, buffer in model.named_buffers() if buffer.is_floating_point()}
    return results


def _moved(model: nn.Module, inputs: tuple[Any, ...], seed: int) -> tuple[nn.Module, tuple[Any, ...]]:
    """A copy of the model, and the inputs, up to one rounding away."""
    generators: dict[torch.device, torch.Generator] = {}

    def move(t: Tensor) -> Tensor:
        generator = generators.setdefault(t.device, torch.Generator(t.device).manual_seed(seed))
        signs = torch.randint(0, 2, t.shape, generator=generator, device=t.device) * 2 - 1
        return t + t * signs * torch.finfo(t.dtype).eps

    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            if parameter.requires_grad:
                parameter.copy_(move(parameter))
        first, *rest = inputs
        return copied, (move(first) if first.is_floating_point() else first, *rest)


def _sum(outputs: Sequence[Tensor]) -> Tensor:
    return torch.stack([t.float().square().sum() / len(outputs) for t in outputs]).sum()


def _gradients(loss: Tensor, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    if not loss.requires_grad or not parameters:
        return {}
    grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    # As an optimizer sees it, no gradient is a gradient of zero.
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(parameters.items(), grads, strict=True)}


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        if values.is_floating_point():
            yield values
    elif isinstance(values, dict):
        for value in values.values():
            yield from _tensors(value)
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)


def _largest(
    kind: str, actual: dict[str, Tensor], expected: dict[str, Tensor], *nearby: dict[str, Tensor]
) -> Difference:
    norms = {name: float(t.double().norm()) for name, t in expected.items()}
    least = 1e-6 * max(norms.values(), default=0.0)  # beside the largest, such a tensor is rounding
    rounding = max((torch.finfo(t.dtype).eps for t in expected.values()), default=0.0)
    tolerance = max(_TOLERANCES[kind], 4 * rounding)
    worst = Difference(kind, 0.0, "-", tolerance)
    for name, wanted in expected.items():
        scale = max(norms[name], least) or 1.0
        error, *moves = (float((other[name].double() - wanted.double()).norm()) / scale for other in (actual, *nearby))
        error = math.inf if math.isnan(error) else error
        allowed = max([tolerance, *(_TIMES * move for move in moves if math.isfinite(move))])
        if error * worst.allowed > worst.error * allowed:
            worst = Difference(kind, error, name, allowed)
    return worst


def _table(lines: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([padded[0], "-" * max(map(len, padded)), *padded[1:]])
