"""Benchmarks a user's discriminator: its steps in PyTorch, and after conversion with fastgan's penalties."""

from __future__ import annotations

import copy
import importlib
import os
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parameter import is_lazy

import fastgan
from fastgan.bench.case import COUNTS, Case, Make
from fastgan.bench.command import BATCH as BATCH
from fastgan.bench.steps import NEGLIGIBLE, OBJECTIVES, PRECISIONS, d_step

STEPS = {  # name -> objective
    "no penalty": "d-step/non-saturating",
    "R1": "d-step/r1",
    "WGAN-GP": "d-step/wgan-gp",
}


class _Conditioned(nn.Module):
    """A discriminator with fixed inputs after the first."""

    def __init__(self, model: nn.Module, rest: Sequence[Any]) -> None:
        super().__init__()
        self.model, self.rest = model, rest

    def forward(self, x: Tensor) -> Any:
        return self.model(x, *self.rest)


def load(spec: str, shape: Sequence[int] | None, batch: int | None, device: torch.device) -> tuple[nn.Module, Tensor]:
    """Load the discriminator of "module:name", called with one tensor, and a batch for it. Dropout is off.

    The name is that of a module, of a class, or of a function that returns a module or (module, example_input).

    Raises:
        ValueError: the name does not exist; it is or returns neither a module nor a module and its inputs; the input is
            missing or given twice; the model rejects the input, or returns no tensor that depends on it.
    """
    built = _built(spec)
    model, example = built if isinstance(built, tuple) and len(built) == 2 else (built, None)
    if not isinstance(model, nn.Module):
        raise ValueError(f"{spec} must return a torch.nn.Module or (module, example_input), got {type(model).__name__}")
    inputs = tuple(example) if isinstance(example, tuple | list) else (example,) if example is not None else ()
    if not inputs and shape is None:
        raise ValueError(f"{spec} returns no example input: pass the shape of one sample, such as --input 3,64,64")
    if inputs and (shape is not None or batch is not None):
        raise ValueError(f"{spec} returns an example input: leave out --input and --batch")
    if inputs and not isinstance(inputs[0], Tensor):
        raise ValueError(f"the example input of {spec} must start with a tensor, got {type(inputs[0]).__name__}")
    model = model.to(device).train()
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.eval()  # runs with different random numbers cannot be compared
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    if dtype is None:
        raise ValueError(f"{spec} returns a model without floating-point parameters: there is nothing to train")
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(f"{spec} returns a model with only frozen parameters: there is nothing to train")
    if shape is not None:
        inputs = (
            torch.randn(batch or BATCH, *shape, generator=torch.Generator().manual_seed(0), device="cpu").to(dtype),
        )
    first, *rest = (value.to(device) if isinstance(value, Tensor) else value for value in inputs)
    if rest:
        model = _Conditioned(model, rest)
    _try(spec, model, first)
    return model, first.detach()


def _built(spec: str) -> Any:
    """Return an instance or a pair unchanged. Call a class or a function without arguments."""
    found = _attribute(spec)
    if isinstance(found, nn.Module | tuple):
        return found
    try:
        return found()
    except Exception as error:  # user code can raise anything
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        hint = ": name a function without arguments that returns the model" if isinstance(error, TypeError) else ""
        raise ValueError(f"--model {spec} failed when called without arguments ({reason}){hint}") from error


def _attribute(spec: str) -> Any:
    module_name, colon, name = spec.partition(":")
    if not (module_name and colon and name):
        raise ValueError(f"--model must be MODULE:NAME, such as my_module:build, got {spec!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # an installed command does not search the current folder
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ValueError(f"--model {spec}: no module {error.name!r} in this folder or on PYTHONPATH") from None
    except Exception as error:  # user code can raise anything
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ValueError(f"--model {spec}: {module_name} cannot be imported ({reason})") from error
    found = getattr(module, name, None)
    if not (callable(found) or isinstance(found, tuple)):
        raise ValueError(f"--model {spec}: {module_name} has no module, class or function {name!r}")
    return found


def _try(spec: str, model: nn.Module, x: Tensor) -> None:
    shape = tuple(x.shape)
    lazy = any(is_lazy(p) for p in model.parameters())
    model, x = model if lazy else copy.deepcopy(model), x.detach()  # the first forward creates lazy parameters
    try:
        logits = model(x.requires_grad_())
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ValueError(f"the model of {spec} does not accept an input of shape {shape}: {reason}") from None
    if not isinstance(logits, Tensor):
        raise ValueError(f"the model of {spec} must return a tensor of logits, got {type(logits).__name__}")
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
    gradients = torch.autograd.grad(logits.sum(), leaves, allow_unused=True) if logits.requires_grad else [None]
    if gradients[0] is None:
        raise ValueError(f"the output of the model of {spec} does not depend on its input")
    if all(g is None for g in gradients[1:]):
        raise ValueError(f"the output of the model of {spec} depends on no trainable parameter")


def cases(model: nn.Module, real: Tensor) -> list[Case]:
    """Return discriminator steps without a penalty, with R1 and with WGAN-GP, on ``real`` and on noise like it."""
    noise = torch.randn(real.shape, generator=torch.Generator().manual_seed(1), device="cpu").to(real)
    fake = noise * real.std() + real.mean()
    shape = "x".join(map(str, real.shape))

    def setup(objective: str, device: torch.device, dtype: torch.dtype) -> dict[str, Make]:
        return d_step(lambda: copy.deepcopy(model), real, fake, OBJECTIVES[objective])

    return [
        Case(
            name=f"{title}, {shape}",
            op=None,
            dtype=real.dtype,
            device_types=(real.device.type,),
            bytes=None,
            operations=None,
            tolerance=PRECISIONS["float32"],
            setup=partial(setup, objective),
            suite="model",
            counted=COUNTS,
            family=title,
            sizes={"batch": len(real)},
            negligible=NEGLIGIBLE,
        )
        for title, objective in STEPS.items()
    ]


def explain(model: nn.Module, real: Tensor) -> str:
    """Report what ``fastgan.convert`` does to the model, the resulting error, and whether a penalty takes one pass."""
    converted = copy.deepcopy(model)
    report = fastgan.convert(converted)
    dropped = sum(isinstance(module, _DropoutNd) and module.p > 0 for module in model.modules())
    lines = [str(report), "", str(report.verify(real)), "", f"R1: {fastgan.explain_penalty(converted, real)}"]
    if dropped:
        lines.append(f"{dropped} dropout layers are off: runs with different random numbers cannot be compared")
    return "\n".join(lines)
