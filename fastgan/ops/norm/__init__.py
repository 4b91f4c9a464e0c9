"""Layer, group, instance and batch normalization, fused up to the second derivative."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from fastgan import backends
from fastgan.ops.library import is_traced, symbolic
from fastgan.ops.norm import reference
from fastgan.ops.norm.autograd import normalize, statistics_of
from fastgan.ops.norm.evaluation import normalized, scale_and_shift
from fastgan.ops.norm.layout import Layout, channels_last, of_batch, of_channels

__all__ = ["batch_norm", "group_norm", "instance_norm", "layer_norm"]

_LEAST = 4096  # elements on a CPU, under which calling a kernel costs more than it brings
_HALF = (torch.float16, torch.bfloat16)
_DTYPES = (torch.float32, torch.float64, *_HALF)


@symbolic
def layer_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    backend: str | None = None,
) -> Tensor:
    """Normalize over the last dimensions: (x - mean) / sqrt(var + eps) * weight + bias, var without correction.

    As ``torch.nn.functional.layer_norm``. Sums are kept in float32 (float64 for float64 input); the same inputs give
    the same bits. The result of a channels_last input is channels_last, of any other contiguous; an input that is
    neither is copied first.

    Args:
        input: (*, *normalized_shape), float16, bfloat16, float32 or float64.
        normalized_shape: the last dimensions of the input.
        weight: shape normalized_shape, of the input's dtype, or float32 with an input in half precision.
        bias: likewise.
        eps: added to the variance.
        backend: run on this backend instead of the fastest.

    Raises:
        TypeError: something is not a tensor, or a dtype is not as above.
        ValueError: a shape or device is not as above.
        BackendUnavailable: the backend asked for cannot run here.

    Differentiable to any order; twice where PyTorch's own runs, whose further derivatives are wrong.

    Source: Ba et al., Layer Normalization (2016).
    """
    _check_input(input)
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    if not shape or tuple(input.shape[-len(shape) :]) != shape:
        raise ValueError(f"normalized_shape must be the input's last dimensions, got {shape} of {tuple(input.shape)}")
    _check_affine("weight", weight, input, shape, "normalized_shape")
    _check_affine("bias", bias, input, shape, "normalized_shape")
    input, weight, bias = _autocast(input, weight, bias)
    chosen = _select("layer_norm", input, backend)
    if chosen == "reference":
        return reference.layer_norm(input, shape, weight, bias, eps)
    size = prod(shape)
    layout = Layout(input.numel() // size, 1, size, 1, 1)
    if len(shape) == input.ndim - 1 and channels_last(input):  # the order of a row's values is all the same to it
        input, weight, bias = input.movedim(1, -1), _last(weight), _last(bias)
        return normalize(input, weight, bias, layout, eps, chosen).movedim(-1, 1)
    return normalize(input, weight, bias, layout, eps, chosen)


@symbolic
def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    backend: str | None = None,
) -> Tensor:
    """Normalize each group of consecutive channels of each sample: (x - mean) / sqrt(var + eps) * weight + bias.

    As ``torch.nn.functional.group_norm``; sums, bits and strides as ``layer_norm``.

    Args:
        input: (N, C, *), float16, bfloat16, float32 or float64.
        num_groups: a divisor of C.
        weight: (C,), of the input's dtype, or float32 with an input in half precision.
        bias: likewise.
        eps: added to the variance.
        backend: run on this backend instead of the fastest.

    Raises:
        TypeError: something is not a tensor, or a dtype is not as above.
        ValueError: a shape, device or number is not as above, or a group has one value.
        BackendUnavailable: the backend asked for cannot run here.

    Differentiable to any order. Source: Wu and He, Group Normalization (2018).
    """
    _check_channels(input, weight, bias)
    batch, channels = input.shape[:2]
    if not isinstance(num_groups, int) or num_groups < 1 or channels % num_groups:
        raise ValueError(f"num_groups must divide the input's {channels} channels, got {num_groups!r}")
    inner = prod(input.shape[2:])
    if batch * channels // num_groups * inner == 1:
        raise ValueError(f"input must have more than one value a group, got {tuple(input.shape)}")
    input, weight, bias = _autocast(input, weight, bias)
    chosen = _select("group_norm", input, backend)
    if chosen == "reference":
        return reference.group_norm(input, num_groups, weight, bias, eps)
    return normalize(input, weight, bias, of_channels(input, num_groups), eps, chosen)


@symbolic
def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    backend: str | None = None,
) -> Tensor:
    """Normalize each channel of each sample: (x - mean) / sqrt(var + eps) * weight + bias.

    As ``torch.nn.functional.instance_norm``, which runs where there are running statistics or
    ``use_input_stats=False``; sums, bits and strides as ``layer_norm``.

    Args:
        input: (N, C, *), float16, bfloat16, float32 or float64.
        running_mean: (C,) or None.
        running_var: (C,) or None.
        weight: (C,), of the input's dtype, or float32 with an input in half precision.
        bias: likewise.
        use_input_stats: False normalizes with the running statistics.
        momentum: of the running statistics.
        eps: added to the variance.
        backend: run on this backend instead of the fastest.

    Raises:
        TypeError: something is not a tensor, or a dtype is not as above.
        ValueError: a shape or device is not as above, or a channel has one value.
        BackendUnavailable: the backend asked for cannot run here.

    Differentiable to any order; twice where PyTorch's own runs, whose further derivatives are wrong.

    Source: Ulyanov et al., Instance Normalization (2016).
    """
    _check_channels(input, weight, bias)
    if use_input_stats and prod(input.shape[2:]) == 1:
        raise ValueError(f"input must have more than one value a channel, got {tuple(input.shape)}")
    running = running_mean is not None or running_var is not None or not use_input_stats
    chosen = "reference" if running else _select("instance_norm", input, backend)
    if chosen == "reference":
        return reference.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    return normalize(input, weight, bias, of_channels(input, input.shape[1]), eps, chosen)


@symbolic
def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    backend: str | None = None,
) -> Tensor:
    """Normalize each channel over all samples: (x - mean) / sqrt(var + eps) * weight + bias.

    As ``torch.nn.functional.batch_norm``, which runs where ``training`` is False: there the running statistics are
    used, and it is affine. In training these move by ``momentum`` towards the mean and the variance (with Bessel's
    correction) of the batch. Sums, bits and strides as ``layer_norm``.

    Args:
        input: (N, C, *), float16, bfloat16, float32 or float64, more than one value a channel in training.
        running_mean: (C,) or None; updated in place in training.
        running_var: (C,) or None; likewise.
        weight: (C,), of the input's dtype, or float32 with an input in half precision.
        bias: likewise.
        training: normalize with the statistics of the batch.
        momentum: the part of the running statistics that is renewed, a number as in ``torch.nn.functional``.
        eps: added to the variance.
        backend: run on this backend instead of the fastest.

    Raises:
        TypeError: something is not a tensor, or a dtype is not as above.
        ValueError: a shape, device or number is not as above.
        BackendUnavailable: the backend asked for cannot run here.

    Differentiable to any order; twice where PyTorch's own runs, whose further derivatives are wrong.

    Source: Ioffe and Szegedy, Batch Normalization (2015).
    """
    _check_channels(input, weight, bias)
    for name, values in (("running_mean", running_mean), ("running_var", running_var)):
        if values is not None and not isinstance(values, Tensor):
            raise TypeError(f"{name} must be a tensor or None, got {type(values).__name__}")
        if values is not None and values.shape != input.shape[1:2]:
            wanted, came = tuple(input.shape[1:2]), tuple(values.shape)
            raise ValueError(f"{name} must have shape {wanted}, the channels, or be None, got {came}")
    if training and input.numel() == input.shape[1]:
        raise ValueError(f"input must have more than one value a channel, got {tuple(input.shape)}")
    if training and eps <= 0:
        raise ValueError(f"eps must be positive in training, got {eps}")
    one_alone = (running_mean is None) != (running_var is None)  # which PyTorch's own refuses
    chosen = _select("batch_norm", input, backend, tiny_too=one_alone) if training else "reference"
    if chosen == "reference":
        if not training and torch.is_grad_enabled() and not is_traced():
            if running_mean is not None and running_var is not None and _may_be_affine(input):
                scale, shift = scale_and_shift(running_mean, running_var, weight, bias, eps)
                return normalized(input, scale, shift)
            # PyTorch's graph would keep the buffers themselves, which later calls in training overwrite.
            running_mean, running_var = _copy(running_mean), _copy(running_var)
        return reference.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    layout = of_batch(input)
    statistics = statistics_of(input, layout, 2 if running_var is None else 3)
    result = normalize(input, weight, bias, layout, eps, chosen, statistics)
    for values, i in ((running_mean, 0), (running_var, 2)):
        if values is not None:
            _renew(values, statistics[i], momentum)
    return result


def _may_be_affine(input: Tensor) -> bool:
    return input.requires_grad and input.dtype in _DTYPES and input.numel() > 0 and not backends.in_transform()


def _renew(running: Tensor, of_batch: Tensor, momentum: float) -> None:
    """Move a running statistic in place, as PyTorch's own kernels do: graphs that saved it stay valid.

    PyTorch's batch_norm saves the running statistics of a call in training and never reads them again. An operation
    that counts as a change of the buffer makes the backward of all earlier calls raise.
    """
    uncounted = running if torch.compiler.is_compiling() else running.data
    uncounted.lerp_(of_batch.to(running.dtype), momentum)


def _copy(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.clone()


def _last(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.movedim(0, -1)


def _select(op: str, input: Tensor, backend: str | None, *, tiny_too: bool = False) -> str:
    chosen = backends.select(op, input.device, input.dtype, backend)
    tiny = input.numel() < _LEAST and chosen == "cpu" and not (tiny_too or backends.is_forced(backend))
    return "reference" if tiny or not input.numel() else chosen


def _autocast(input: Tensor, *affine: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """float32 for layer_norm and group_norm where PyTorch's autocast says so: on CUDA only."""
    weight, bias = affine
    if input.is_cuda and torch.is_autocast_enabled("cuda"):
        weight, bias = (t.float() if t is not None and t.dtype in _HALF else t for t in affine)
        input = input.float() if input.dtype in _HALF else input
    return input, weight, bias


def _check_input(input: Tensor) -> None:
    if not isinstance(input, Tensor):
        raise TypeError(f"input must be a tensor, got {type(input).__name__}")
    if input.dtype not in _DTYPES:
        raise TypeError(f"input must be float16, bfloat16, float32 or float64, got {input.dtype}")


def _check_channels(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    _check_input(input)
    if input.ndim < 2:
        raise ValueError(f"input must be (N, C, *), got shape {tuple(input.shape)}")
    _check_affine("weight", weight, input, (input.shape[1],), "the channels")
    _check_affine("bias", bias, input, (input.shape[1],), "the channels")


def _check_affine(name: str, values: Tensor | None, input: Tensor, shape: tuple[int, ...], what: str) -> None:
    if values is None:
        return
    if not isinstance(values, Tensor):
        raise TypeError(f"{name} must be a tensor or None, got {type(values).__name__}")
    if values.dtype != input.dtype and not (values.dtype == torch.float32 and input.dtype in _HALF):
        raise TypeError(f"{name} must have the input's dtype, {input.dtype}, or float32 for half, got {values.dtype}")
    if values.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, {what}, got {tuple(values.shape)}")
    if values.device != input.device:
        raise ValueError(f"{name} must be on the input's device, {input.device}, got {values.device}")
