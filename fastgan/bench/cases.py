"""The cases that are timed, declared once: `fastgan bench`, pytest-benchmark and the tests read CASES."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm
from torch.nn.utils import parametrizations

from fastgan import backends
from fastgan import nn as fnn

Run = Callable[[], Sequence[Tensor]]
Make = Callable[[], Run]
Shape = tuple[int, ...]

BASELINE = "torch"
OPTIONAL = ("torch.compile",)  # takes minutes to compile, and may fail: timed when asked for
BY_NAME = ("triton", "cuda")  # backends that compete on a GPU, where each is a variant


@dataclass(frozen=True)
class Case:
    """One computation in several variants, on equal inputs and from equal states.

    ``bytes`` and ``operations`` are the floor: what any implementation has to move through memory (each input read
    once, each result written once) and to compute. ``setup`` makes the variants, BASELINE first; each keeps its own
    state, so that after the same number of calls all give the same.
    """

    name: str
    op: str
    dtype: torch.dtype
    device_types: tuple[str, ...]
    bytes: int
    operations: int
    tolerance: float  # of a variant's error relative to BASELINE's result: twice what the tests allow either
    setup: Callable[[torch.device, torch.dtype], dict[str, Make]]


# Sources: the discriminator of SNGAN at 128 px; a small one for 64 px; the first and three convolutions more.
SNGAN128: tuple[Shape, ...] = (
    (64, 3, 3, 3),
    (64, 64, 3, 3),
    (128, 64, 3, 3),
    (128, 128, 3, 3),
    (256, 128, 3, 3),
    (256, 256, 3, 3),
    (512, 256, 3, 3),
    (512, 512, 3, 3),
    (1024, 512, 3, 3),
    (1024, 1024, 3, 3),
    (1, 1024),
)
SMALL: tuple[Shape, ...] = (
    (32, 3, 4, 4),
    (64, 32, 4, 4),
    (128, 64, 4, 4),
    (64, 128, 3, 3),
    (64, 64, 3, 3),
    (1, 4096),
)
LARGE: tuple[Shape, ...] = (*SNGAN128, (128, 128, 3, 3), (256, 256, 3, 3), (1024, 1024, 3, 3))


class _Layers(nn.Module):
    """Its forward asks for each layer's weight, as a discriminator's does."""

    def __init__(self, shapes: Sequence[Shape]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_layer(shape) for shape in shapes)

    def forward(self) -> list[Tensor]:
        return [layer.weight for layer in self.layers]  # type: ignore[misc]


def _layer(shape: Shape) -> nn.Module:
    outputs, inputs, *kernel = shape
    if kernel:
        return nn.Conv2d(inputs, outputs, tuple(kernel), bias=False)  # type: ignore[arg-type]
    return nn.Linear(inputs, outputs, bias=False)


def _spectral_norm(
    shapes: Sequence[Shape], *, backward: bool, device: torch.device, dtype: torch.dtype
) -> dict[str, Make]:
    grads = [torch.randn(shape, dtype=dtype, device=device) for shape in shapes]

    def variant(finish: Callable[[Any], Any], backend: str | None = None) -> Run:
        torch.manual_seed(0)  # the same weights, u and v for each
        with device:
            model = _Layers(shapes).to(dtype)
        for layer in model.layers:
            parametrizations.spectral_norm(layer)
        originals = [layer.parametrizations.weight.original for layer in model.layers]  # type: ignore[union-attr]
        model = finish(model)

        def run() -> Sequence[Tensor]:
            weights: list[Tensor] = model()
            return torch.autograd.grad(weights, originals, grads) if backward else weights  # type: ignore[arg-type]

        return run if backend is None else _on(backend, run)

    fuse = fnn.utils.fuse_spectral_norm
    variants: dict[str, Make] = {
        BASELINE: partial(variant, lambda model: model),
        "torch.compile": partial(variant, torch.compile),
        "reference": partial(variant, fuse, "reference"),
        "fastgan": partial(variant, fuse),
    }
    if device.type == "cuda":
        for backend in BY_NAME:
            if backends.why_not("spectral_norm", backend, device.type, dtype) is None:
                variants[backend] = partial(variant, fuse, backend)
    return variants


def _on(backend: str, run: Run) -> Run:
    def forced() -> Sequence[Tensor]:
        with backends.use_backend(backend):
            return run()

    return forced


def _spectral_norm_case(list_name: str, shapes: Sequence[Shape], device_types: tuple[str, ...], backward: bool) -> Case:
    dtype = torch.float32
    elements = sum(map(prod, shapes))
    rows, columns = sum(shape[0] for shape in shapes), sum(prod(shape[1:]) for shape in shapes)
    # Forward: W and v read, W / sigma, u and v written; two products, of which the last gives sigma, and a division.
    moved, operations = 2 * elements + rows + 2 * columns, 5 * elements
    if backward:
        # G / sigma - <G, W> / sigma^2 u v^T: G, W, u and v read, the result written.
        moved, operations = moved + 3 * elements + rows + columns, operations + 5 * elements
    return Case(
        name=f"spectral_norm/{list_name}/{'forward_backward' if backward else 'forward'}",
        op="spectral_norm",
        dtype=dtype,
        device_types=device_types,
        bytes=moved * dtype.itemsize,
        operations=operations,
        tolerance=2e-4 if backward else 2e-5,
        setup=lambda device, dtype: _spectral_norm(shapes, backward=backward, device=device, dtype=dtype),
    )


CASES: dict[str, Case] = {
    case.name: case
    for case in [
        _spectral_norm_case(list_name, shapes, device_types, backward)
        for list_name, shapes, device_types in (
            ("sngan128", SNGAN128, ("cpu", "cuda")),
            ("small", SMALL, ("cpu", "cuda")),
            ("large", LARGE, ("cuda",)),
        )
        for backward in (False, True)
    ]
}
SUITES: dict[str, tuple[str, ...]] = {"ops": tuple(CASES)}


def prepare(
    case: Case, device: torch.device, *, optional: bool = False
) -> tuple[dict[str, Run], dict[str, float], dict[str, str]]:
    """The variants of a case, their errors relative to BASELINE, and why others are left out.

    Raises:
        ArithmeticError: a variant's result is not BASELINE's. Nothing wrong is timed.
    """
    variants: dict[str, Run] = {}
    errors: dict[str, float] = {}
    left_out: dict[str, str] = {}
    expected: Sequence[Tensor] = ()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, make in case.setup(device, case.dtype).items():
            if name in OPTIONAL and not optional:
                continue
            try:
                run = make()
                run()
                result = run()  # the second depends on the state that the first left behind
            except Exception as error:
                if name not in OPTIONAL:
                    raise
                left_out[name] = f"{type(error).__name__}: {error}".partition("\n")[0]
                continue
            expected = expected or result
            variants[name], errors[name] = run, _error(result, expected)
            if not errors[name] <= case.tolerance:  # NaN is wrong too
                raise ArithmeticError(
                    f"{case.name}: {name} differs from {BASELINE} by {errors[name]:.1e}, tolerance {case.tolerance:.0e}"
                )
    for backend in BY_NAME:
        if device.type == "cuda" and backend not in variants:
            left_out[backend] = backends.why_not(case.op, backend, device.type, case.dtype) or "not declared"
    return variants, errors, left_out


@torch.no_grad()
def _error(result: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest error of a tensor, relative to its norm; NaN if there is one."""
    errors = [
        vector_norm(actual - wanted, dtype=torch.float64) / vector_norm(wanted, dtype=torch.float64)
        for actual, wanted in zip(result, expected, strict=True)
    ]
    return float(torch.stack(errors).max())
