"""Layer, group, instance and batch normalization, with fused kernels up to the second derivative."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from fastgan import backends
from fastgan.ops.library import is_traced, symbolic
from fastgan.ops.norm import of_batches, reference
from fastgan.ops.norm.autograd import normalize, statistics_of
from fastgan.ops.norm.checks import DTYPES, HALF, check_affine, check_channels, check_input, check_running
from fastgan.ops.norm.evaluation import normalized, scale_and_shift
from fastgan.ops.norm.layout import Layout, channels_last, of_batch, of_channels

__all__ = ["batch_norm", "group_norm", "instance_norm", "layer_norm"]

_LEAST = 4096  # elements on a CPU; below this number a kernel call costs more than it saves


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
    """Normalize over the last dimensions: (x - mean) / sqrt(var + eps) * weight + bias, with the biased variance.

    The definition is that of ``torch.nn.functional.layer_norm``. Sums are accumulated in float32 (float64 for float64
    input), and the same inputs give the same bits. The result is channels_last if the input is, and contiguous
    otherwise. An input that is neither is copied first.

    Order of derivative: any. PyTorch's own layer norm, which runs for small inputs on a CPU and with
    ``use_backend("reference")``, is correct up to the second order; its higher derivatives are wrong.

    Source: Ba et al., Layer Normalization (2016).

    ```python
    import torch
    import fastgan

    y = fastgan.ops.layer_norm(torch.randn(8, 16, 64), 64)
    ```

    Args:
        input: (*, *normalized_shape); float16, bfloat16, float32 or float64.
        normalized_shape: the last dimensions of the input.
        weight: tensor of shape normalized_shape, or None. It has the dtype of the input, or float32 if the input is in
            half precision.
        bias: tensor of shape normalized_shape, or None, with the same dtypes as ``weight``.
        eps: added to the variance.
        backend: name of the backend to use. None: the fastest one.

    Returns:
        A tensor with the shape and dtype of the input.

    Raises:
        TypeError: an argument is not a tensor, or has an unsupported dtype.
        ValueError: a shape or device does not fit.
        BackendUnavailable: the requested backend cannot run here.
    """
    check_input(input)
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    if not shape or tuple(input.shape[-len(shape) :]) != shape:
        raise ValueError(
            f"normalized_shape must be the input's last dimensions, got {shape} for an input {tuple(input.shape)}"
        )
    check_affine("weight", weight, input, shape, "normalized_shape")
    check_affine("bias", bias, input, shape, "normalized_shape")
    input, weight, bias = _autocast(input, weight, bias)
    chosen = _select("layer_norm", input, backend)
    if chosen == "reference":
        return reference.layer_norm(input, shape, weight, bias, eps)
    size = prod(shape)
    layout = Layout(input.numel() // size, 1, size, 1, 1)
    if len(shape) == input.ndim - 1 and channels_last(input):  # the order of values within a row does not matter
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

    The definition is that of ``torch.nn.functional.group_norm``. Precision, reproducibility and strides are those of
    `layer_norm`.

    Order of derivative: any.

    Source: Wu and He, Group Normalization (2018).

    ```python
    import torch
    import fastgan

    y = fastgan.ops.group_norm(torch.randn(8, 32, 16, 16), 4)
    ```

    Args:
        input: (N, C, *); float16, bfloat16, float32 or float64.
        num_groups: number of groups, a divisor of C.
        weight: (C,), or None. It has the dtype of the input, or float32 if the input is in half precision.
        bias: (C,), or None, with the same dtypes as ``weight``.
        eps: added to the variance.
        backend: name of the backend to use. None: the fastest one.

    Returns:
        A tensor with the shape and dtype of the input.

    Raises:
        TypeError: an argument is not a tensor, or has an unsupported dtype.
        ValueError: a shape, device or number does not fit, or the batch has a single value per group.
        BackendUnavailable: the requested backend cannot run here.
    """
    check_channels(input, weight, bias)
    batch, channels = input.shape[:2]
    if not isinstance(num_groups, int) or num_groups < 1 or channels % num_groups:
        raise ValueError(f"num_groups must divide the input's {channels} channels, got {num_groups!r}")
    inner = prod(input.shape[2:])
    if batch * channels // num_groups * inner == 1:
        raise ValueError(f"input must have more than one value per group, got {tuple(input.shape)}")
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

    The definition is that of ``torch.nn.functional.instance_norm``. With ``use_input_stats=False`` it equals
    `batch_norm` in evaluation. PyTorch's function itself runs if running statistics are renewed. Precision,
    reproducibility and strides are those of `layer_norm`.

    Order of derivative: any. Where PyTorch's own instance norm runs, also for small inputs on a CPU, derivatives are
    correct up to the second order; PyTorch's higher derivatives are wrong.

    Source: Ulyanov et al., Instance Normalization (2016).

    ```python
    import torch
    import fastgan

    y = fastgan.ops.instance_norm(torch.randn(8, 32, 16, 16))
    ```

    Args:
        input: (N, C, *); float16, bfloat16, float32 or float64.
        running_mean: (C,), or None.
        running_var: (C,), or None.
        weight: (C,), or None. It has the dtype of the input, or float32 if the input is in half precision.
        bias: (C,), or None, with the same dtypes as ``weight``.
        use_input_stats: normalize with the statistics of the input. False: with the running statistics.
        momentum: momentum of the running statistics.
        eps: added to the variance.
        backend: name of the backend to use. None: the fastest one.

    Returns:
        A tensor with the shape and dtype of the input.

    Raises:
        TypeError: an argument is not a tensor, or has an unsupported dtype.
        ValueError: a shape or device does not fit, or a channel has a single value.
        BackendUnavailable: the requested backend cannot run here.
    """
    check_channels(input, weight, bias)
    if use_input_stats and prod(input.shape[2:]) == 1:
        raise ValueError(f"input must have more than one value per channel, got {tuple(input.shape)}")
    if running_mean is not None and running_var is not None and not use_input_stats:
        return batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps, backend=backend)
    running = running_mean is not None or running_var is not None or not use_input_stats
    chosen = "reference" if running else _select("instance_norm", input, backend)
    if chosen == "reference":
        if backends.is_lowered() and not running and input.numel():
            return of_batches.instance_norm(input, weight, bias, eps)
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

    The definition is that of ``torch.nn.functional.batch_norm``. In training, the running statistics move by
    ``momentum`` toward the mean and the unbiased variance of the batch. In evaluation (``training=False``) the
    function uses the running statistics and is affine in its input. Precision, reproducibility and strides are those of
    `layer_norm`.

    Order of derivative: any. Where PyTorch's own batch norm runs, as for small inputs in training on a CPU, derivatives
    are correct up to the second order; PyTorch's higher derivatives are wrong.

    Source: Ioffe and Szegedy, Batch Normalization (2015).

    ```python
    import torch
    import fastgan

    y = fastgan.ops.batch_norm(torch.randn(8, 32, 16, 16), None, None, training=True)
    ```

    Args:
        input: (N, C, *); float16, bfloat16, float32 or float64. Training needs more than one value per channel.
        running_mean: (C,), or None. It is updated in place in training.
        running_var: (C,), or None. It is updated in place in training.
        weight: (C,), or None. It has the dtype of the input, or float32 if the input is in half precision.
        bias: (C,), or None, with the same dtypes as ``weight``.
        training: normalize with the statistics of the batch.
        momentum: weight of the batch in the update of the running statistics, a number as in ``torch.nn.functional``.
        eps: added to the variance.
        backend: name of the backend to use. None: the fastest one.

    Returns:
        A tensor with the shape and dtype of the input.

    Raises:
        TypeError: an argument is not a tensor, or has an unsupported dtype.
        ValueError: a shape, device or number does not fit.
        BackendUnavailable: the requested backend cannot run here.
    """
    check_channels(input, weight, bias)
    check_running(input, running_mean, running_var)
    if training and input.numel() == input.shape[1]:
        raise ValueError(f"input must have more than one value per channel, got {tuple(input.shape)}")
    if training and eps <= 0:
        raise ValueError(f"eps must be positive in training, got {eps}")
    only_one = (running_mean is None) != (running_var is None)  # PyTorch rejects this
    chosen = _select("batch_norm", input, backend, allow_tiny=only_one) if training else "reference"
    if chosen == "reference":
        if not training and torch.is_grad_enabled() and not is_traced():
            if running_mean is not None and running_var is not None and _may_be_affine(input):
                scale, shift = scale_and_shift(running_mean, running_var, weight, bias, eps)
                return normalized(input, scale, shift)
            # PyTorch's graph would save the buffers themselves, and later calls in training overwrite these.
            running_mean, running_var = _copy(running_mean), _copy(running_var)
        if training and not only_one and backends.is_lowered() and input.numel():
            return of_batches.batch_norm(input, running_mean, running_var, weight, bias, momentum, eps)
        return reference.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    layout = of_batch(input)
    statistics = statistics_of(input, layout, 2 if running_var is None else 3)
    result = normalize(input, weight, bias, layout, eps, chosen, statistics)
    for values, i in ((running_mean, 0), (running_var, 2)):
        if values is not None:
            _update_running(values, statistics[i], momentum)
    return result


def _may_be_affine(input: Tensor) -> bool:
    return input.requires_grad and input.dtype in DTYPES and input.numel() > 0 and not backends.in_transform()


def _update_running(running: Tensor, of_batch: Tensor, momentum: float) -> None:
    """Update a running statistic in place without a new version, as PyTorch's own kernels do.

    In training, PyTorch's batch_norm saves the running statistics for backward and never reads them. If an update
    increased the version of the buffer, the backward of all earlier calls would raise.
    """
    uncounted = running if torch.compiler.is_compiling() else running.data
    uncounted.lerp_(of_batch.to(running.dtype), momentum)


def _copy(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.clone()


def _last(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.movedim(0, -1)


def _select(op: str, input: Tensor, backend: str | None, *, allow_tiny: bool = False) -> str:
    chosen = backends.select(op, input.device, input.dtype, backend)
    # Sizes come last: in a compiled graph, a comparison with a number would be a guard.
    tiny = chosen == "cpu" and not (allow_tiny or backends.is_forced(backend)) and input.numel() < _LEAST
    return "reference" if tiny or not input.numel() else chosen


def _autocast(input: Tensor, *affine: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Cast to float32 where PyTorch's autocast does so for layer_norm and group_norm, which is on CUDA only."""
    weight, bias = affine
    if input.is_cuda and torch.is_autocast_enabled("cuda"):
        weight, bias = (t.float() if t is not None and t.dtype in HALF else t for t in affine)
        input = input.float() if input.dtype in HALF else input
    return input, weight, bias
