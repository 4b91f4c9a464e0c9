"""Time that the host spends per layer of a penalty, by part, with layers so small that their kernels cost nothing."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fastgan.bench.case import OPTIONAL, Make, Run
from fastgan.bench.steps import batches
from fastgan.ops.bias_act.small import rectify
from fastgan.ops.conv import conv2d
from fastgan.ops.gradient_penalty.eligibility import Tracer
from fastgan.ops.gradient_penalty.small import at_any_size
from fastgan.ops.needed import needed
from fastgan.ops.twice_differentiable import Reroute

Call = Callable[[], object]
MICRO = 1e6


def force_fastgan(makes: Mapping[str, Make]) -> dict[str, Make]:
    """Let fastgan run these steps with its own functions, although they are so small that PyTorch's are faster."""

    def wrapped(make: Make) -> Make:
        def made() -> Run:
            with at_any_size():
                run = make()

            def at_one_size() -> Any:
                with at_any_size():
                    return run()

            return at_one_size

        return made

    return {name: wrapped(make) for name, make in makes.items()}


def per_layer(
    make: Callable[[int], Callable[[], torch.nn.Module]],
    depths: tuple[int, int],
    shape: tuple[int, ...],
    objective: str,
    device: torch.device,
    dtype: torch.dtype,
    rounds: int = 40,
) -> dict[str, float]:
    """Return the microseconds that one more layer costs a step: the difference between two depths."""
    calls: dict[tuple[str, int], Call] = {}
    for depth in depths:
        for name, variant in force_fastgan(batches(make(depth), shape, objective, device, dtype)).items():
            if name not in OPTIONAL:
                calls[name, depth] = variant()
    lowest = lowest_times(calls, rounds, repeats=1)
    shallow, deep = depths
    return {
        name: (lowest[name, deep] - lowest[name, shallow]) / (deep - shallow)
        for name in dict.fromkeys(name for name, _ in calls)
    }


def lowest_times(calls: Mapping[Any, Call], rounds: int, repeats: int) -> dict[Any, float]:
    """Return the lowest time of each call in microseconds. They alternate, so a disturbance affects all of them."""
    for call in calls.values():
        for _ in range(3):
            call()
    lowest = dict.fromkeys(calls, float("inf"))
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, call in calls.items():
                started = time.perf_counter()
                for _ in range(repeats):
                    call()
                lowest[name] = min(lowest[name], MICRO * (time.perf_counter() - started) / repeats)
    finally:
        if collecting:
            gc.enable()
    return lowest


class _Nothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class _Saving(_Nothing):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, x)
        ctx.kept = None
        return x.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        _ = ctx.saved_tensors, ctx.kept
        return grad


class _AsksEngine(_Nothing):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        needed(ctx)
        return grad


class _PassThrough(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def parts(device: torch.device, dtype: torch.dtype, rounds: int = 40) -> dict[str, float]:
    """Return the microseconds of each part of a rerouted layer. Differences of two times; each backward counts once.

    - a mode: a Python mode that passes the call on
    - rerouting: the mode that selects fastgan's function, in addition to that
    - tracing: the trace for one pass, in addition to a mode
    - a Function: ``apply`` of an autograd.Function that does nothing, and its backward
    - its context: saving two tensors and an attribute, and reading them
    - the engine's question: whether a gradient is needed
    - a convolution, an activation: fastgan's functions of one pixel; PyTorch's are listed with ", PyTorch"
    """
    x = torch.randn(2, 8, 1, 1, dtype=dtype, device=device, requires_grad=True)
    weight = torch.randn(8, 8, 3, 3, dtype=dtype, device=device, requires_grad=True)
    bias = torch.randn(8, dtype=dtype, device=device, requires_grad=True)
    ones = torch.ones_like(x)
    modes: dict[str, AbstractContextManager[Any]] = {
        "passing": _PassThrough(),
        "rerouting": Reroute({}),
        "tracing": Tracer(x),
    }

    def activation() -> Tensor:
        return F.leaky_relu(x, 0.2)

    def within(mode: AbstractContextManager[Any], call: Call) -> Call:
        def inside() -> None:
            with mode:
                call()

        return inside

    def twice() -> None:
        activation()
        activation()

    def both(function: Any) -> Call:
        return lambda: torch.autograd.grad(function.apply(x.view_as(x)), x, ones)

    calls: dict[str, Call] = {
        "a convolution, PyTorch": lambda: F.conv2d(x, weight, bias, (1, 1), (1, 1)),
        "a convolution": lambda: conv2d(x, weight, bias, (1, 1), (1, 1)),
        "an activation, PyTorch": activation,
        "an activation": lambda: rectify(x, 0.2, False),
        "nothing": lambda: None,
        "a backward": lambda: torch.autograd.grad(x.view_as(x), x, ones),
        "Function": both(_Nothing),
        "saving": both(_Saving),
        "asking": both(_AsksEngine),
        **{f"{name}, once": within(mode, activation) for name, mode in modes.items()},
        **{f"{name}, twice": within(mode, twice) for name, mode in modes.items()},
    }
    lowest = lowest_times(calls, rounds, repeats=20)  # so that code and data are in the caches
    plain = lowest["an activation, PyTorch"] - lowest["nothing"]
    passing, rerouting, tracing = (lowest[f"{name}, twice"] - lowest[f"{name}, once"] - plain for name in modes)
    return {
        "a mode": passing,
        "rerouting": rerouting - passing,
        "tracing": tracing - passing,
        "a Function": lowest["Function"] - lowest["a backward"],
        "its context": lowest["saving"] - lowest["Function"],
        "the engine's question": lowest["asking"] - lowest["Function"],
        **{name: lowest[name] for name in lowest if name.startswith(("a convolution", "an activation"))},
    }
