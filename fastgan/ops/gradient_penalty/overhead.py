"""The size of a discriminator from which fastgan's functions take less time than PyTorch's, on each kind of device.

fastgan's functions do a third less work in a penalty, but each is a Python function, which takes longer to call.

On a CPU, the work and the calls take turns. The two constants were measured (docs/decisions.md).

On a GPU, the host calls and the device works at the same time, and a step takes as long as the slower of the two. A
penalty with PyTorch's functions takes six forwards of work. fastgan is faster if this work takes the device longer than
fastgan's calls take the host. The rate of the device follows from its properties and is not measured, so that a resumed
run makes the same choice.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastgan.ops.library import is_autocast
from fastgan.ops.work import CALL


class Threshold(NamedTuple):
    """fastgan's functions are used in a forward with at least ``least + layers * per_layer`` multiplications."""

    per_layer: int
    least: int


_ON_CPU = Threshold(per_layer=CALL, least=2**25)

HOST_SECONDS = 0.5e-3  # per layer and penalty, for all orders of derivative (fastgan bench --suite host)
_PYTORCHS_WORK = 12  # floating-point operations per multiplication of the forward: six forwards of two operations
_CLOCK = 1.7e9  # Hz
_EFFICIENCY = 0.25  # of the peak rate, in the convolutions of a discriminator
# Operations per clock and multiprocessor by compute capability: float32, TF32, half precision; from NVIDIA's tables of
# peak rates. Consumer GPUs have a quarter of the tensor cores' rate.
_RATES = {
    (7, 0): (128, 128, 1024),
    (7, 5): (128, 128, 1024),
    (8, 0): (128, 1024, 2048),
    (8, 6): (256, 256, 512),
    (8, 9): (256, 256, 512),
    (9, 0): (256, 2048, 4096),
    (10, 0): (256, 4096, 8192),
    (12, 0): (256, 256, 512),
}
_OTHERS = (9, 0)


def threshold(x: Tensor) -> Threshold:
    """Return the threshold for a discriminator with this input. The input must be on a CPU or a GPU."""
    return _on_gpu(x.device, _computed_in(x)) if x.is_cuda else _ON_CPU


def _on_gpu(device: torch.device, dtype: torch.dtype) -> Threshold:
    per_layer = int(HOST_SECONDS * rate(device, dtype) / _PYTORCHS_WORK)
    return Threshold(per_layer, per_layer)


def rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the operations per second that this GPU computes in a discriminator."""
    properties = torch.cuda.get_device_properties(device)
    full, tf32, half = _RATES.get((properties.major, properties.minor), _RATES[_OTHERS])
    if dtype.itemsize < 4:
        per_clock = half
    elif dtype == torch.float32:
        per_clock = tf32 if _allows_tf32() else full
    else:
        per_clock = full // 2
    return _EFFICIENCY * per_clock * _CLOCK * properties.multi_processor_count


def _computed_in(x: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype(x.device.type) if is_autocast(x.device.type) else x.dtype


def _allows_tf32() -> bool:
    """Return whether convolutions use TF32, which is PyTorch's default."""
    try:
        return torch.backends.cudnn.allow_tf32
    except RuntimeError:  # the newer settings are in use, one for each operator
        return True
