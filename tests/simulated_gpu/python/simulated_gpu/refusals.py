"""Calls that the simulation cannot represent raise an error that names the limitation."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any


class NotSimulated(RuntimeError):
    """The simulated GPU can't show this; the message says what to do."""


def hide() -> None:
    """Hide the modules in SIMULATED_GPU_HIDES, for a rehearsal of a machine that lacks them."""
    for name in filter(None, os.environ.get("SIMULATED_GPU_HIDES", "").split(",")):
        sys.modules[name] = None  # type: ignore[assignment]  # neither imported nor found


def check_import(name: str) -> None:
    """Modules of native CUDA kernels, named in SIMULATED_GPU_REFUSES with commas between them."""
    if name in os.environ.get("SIMULATED_GPU_REFUSES", "").split(","):
        raise ImportError(f"{name}: the simulated GPU runs no native CUDA kernels; test them on a GPU", name=name)


def timing() -> NotSimulated:
    """The error of a question for times."""
    return NotSimulated(
        "the simulated GPU shows no timing: measure on a GPU. For a rehearsal, SIMULATED_GPU_HOST_TIMES=1 gives the "
        "host's times instead"
    )


def _refuse_nccl(distributed: Any) -> None:
    start = distributed.init_process_group

    def init_process_group(backend: str | None = None, *args: Any, **kwargs: Any) -> Any:
        if backend is not None and "nccl" in str(backend).lower():
            raise NotSimulated("the simulated GPU has no NCCL; use the backend 'gloo' with CPU tensors, or a GPU")
        return start(backend, *args, **kwargs)

    distributed.init_process_group = init_process_group


def _refuse_inductor(scheduler: Any) -> None:
    create = scheduler.Scheduler.create_backend

    def create_backend(self: Any, device: Any) -> Any:
        if device.type == "cuda":
            raise NotSimulated("the simulated GPU runs no compiled Triton kernels; run torch.compile on a GPU")
        return create(self, device)

    scheduler.Scheduler.create_backend = create_backend


def _refuse_data_parallel(distributed: Any) -> None:
    start = distributed.DistributedDataParallel.__init__

    def __init__(self: Any, module: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        if any(parameter.is_cuda for parameter in module.parameters()):
            raise NotSimulated("the simulated GPU has no NCCL: wrap a model on the CPU, or use GPUs")
        start(self, module, *args, **kwargs)

    distributed.DistributedDataParallel.__init__ = __init__


# Modules, and what changes them once they are imported.
PATCHES: dict[str, Callable[[Any], None]] = {
    "torch.distributed.distributed_c10d": _refuse_nccl,
    "torch.nn.parallel.distributed": _refuse_data_parallel,
    "torch._inductor.scheduler": _refuse_inductor,
}
