"""The launches of fastgan for a table of inputs, recorded and not executed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from tools.static_costs.cases import cases


class Launch(NamedTuple):
    case: str
    number: int  # of this kernel's launches in the case
    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: Any
    signature: dict[str, str]
    constants: dict[Any, Any]
    attributes: dict[Any, Any]

    @property
    def name(self) -> str:
        return f"{self.kernel.__module__.split('.')[-2]}.{self.kernel.__name__}"

    @property
    def key(self) -> tuple[Any, ...]:
        return self.name, self.grid, str((self.signature, self.constants, self.attributes))


@contextmanager
def recorder(target: GPUTarget, launches: list[Launch], case: list[str]) -> Iterator[None]:
    """Append launches to ``launches`` under the name in ``case[0]`` instead of executing them."""

    def record(self: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        backend = make_backend(target)
        bind = create_function_from_signature(self.signature, self.params, backend)
        bound, special, options = bind(*args, **kwargs)
        number = sum(launch.case == case[0] and launch.kernel is self for launch in launches)
        rest = self._pack_args(backend, kwargs, bound, special, options)
        launches.append(Launch(case[0], number, self, grid, bound, *rest))

    original = JITFunction.run
    JITFunction.run = record
    try:
        yield
    finally:
        JITFunction.run = original


def record_all(target: GPUTarget) -> list[Launch]:
    """Return each distinct launch of every case once."""
    launches: list[Launch] = []
    case = [""]
    with recorder(target, launches, case):
        for tag, dtype in (("f32", torch.float32), ("f16", torch.float16)):
            for name, launch in cases(dtype):
                case[0] = f"{name} {tag}"
                launch()
    return list({launch.key: launch for launch in reversed(launches)}.values())[::-1]
