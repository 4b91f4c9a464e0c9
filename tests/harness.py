"""The backends and dtypes with which every op is tested, and the tolerances."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory

import pytest
import torch
from torch import Tensor
from torch import distributed as dist

HAS_GPU = torch.cuda.is_available()

# The backends. Without a GPU, Triton's interpreter runs kernels on CPU tensors.
BACKENDS = [
    "reference",
    "cpu",
    pytest.param("triton", marks=pytest.mark.gpu if HAS_GPU else ()),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
# Dynamo of older versions cannot trace fused spectral norm and the Functions of the ops: docs/versions.md.
VERSION = tuple(map(int, torch.__version__.split(".")[:2]))
COMPILES = VERSION >= (2, 11)
needs_dynamo = pytest.mark.skipif(not COMPILES, reason="torch.compile before 2.11 cannot trace fastgan's operations")
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]

# Tolerances relative to the norm of the float64 result, by order of derivative (0: values).
_FLOAT32 = {0: 1e-5, 1: 1e-4, 2: 1e-3}
_FLOAT64 = 1e-11  # rounding of float64 sums in a different order


@contextmanager
def one_rank() -> Iterator[None]:
    """A process group of this process alone. Delete every DistributedDataParallel before leaving.

    A group's end joins its threads while it holds the interpreter's lock. If a thread waits for that lock, in order to
    free what a collective saved, both wait forever.
    """
    with TemporaryDirectory() as folder:
        dist.init_process_group("gloo", f"file://{folder}/store", rank=0, world_size=1)
        try:
            yield
        finally:
            time.sleep(0.1)  # without the lock, so that the threads become idle
            dist.destroy_process_group()


def backend_name(backend: object) -> str:
    """Return the name in an entry of BACKENDS, which may have marks."""
    return backend if isinstance(backend, str) else backend.values[0]  # type: ignore[attr-defined]


def device_of(backend: str) -> torch.device:
    return torch.device("cuda" if HAS_GPU and backend in ("triton", "cuda") else "cpu")


def relative_error(actual: Tensor, exact: Tensor) -> float:
    actual, exact = actual.detach().double().cpu(), exact.detach().double().cpu()
    assert actual.shape == exact.shape
    scale = exact.norm().item()
    return (actual - exact).norm().item() / (scale if scale > 0 else 1.0)


def assert_close(actual: Tensor, exact: Tensor, *, order: int, reference: Tensor | None = None) -> None:
    """Compare `actual` with the float64 result `exact`.

    In half precision, the error may be twice that of the PyTorch `reference` in the same dtype, or twice the rounding
    error of the exact result if that is larger.
    """
    error = relative_error(actual, exact)
    if actual.dtype == torch.float64:
        allowed = _FLOAT64
    elif actual.dtype == torch.float32:
        allowed = _FLOAT32[order]
    else:
        assert reference is not None
        assert reference.dtype == actual.dtype
        rounding = torch.finfo(actual.dtype).eps / 2
        allowed = 2 * max(relative_error(reference, exact), rounding)
    assert error <= allowed, f"relative error {error:.2e}, allowed {allowed:.2e}"  # NaN fails too
