"""Spectral normalization of many weights in one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastgan.ops.spectral_norm.autograd import normalize
from fastgan.ops.spectral_norm.layout import vector_shapes

__all__ = ["fits", "normalize", "spectral_norm"]

_PLAIN = frozenset({Tensor, torch.nn.Parameter})
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def spectral_norm(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    *,
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    update: bool = True,
    dims: Sequence[int] | None = None,
    v_first: bool = False,
    backend: str | None = None,
) -> list[Tensor]:
    """Divide each weight by its spectral norm, estimated by power iteration, all weights together.

    A power iteration is u = W v / max(|W v|, eps), v = W^T u / max(|W^T u|, eps); the result is W / (u^T W v). u and v
    are renewed in place, are constants for the gradient, and are copied for backward, so that several forwards before
    one backward are right. Sums are kept in float32 (float64 for float64 weights); the same inputs give the same bits.

    Args:
        weights: tensors (rows, columns), one dtype (float16, bfloat16, float32, float64) and one device.
        us: left singular vectors, (rows,) each, dtype and device of the weights; contiguous.
        vs: right singular vectors, (columns,) each; likewise.
        n_power_iterations: iterations of this call, at least 1.
        eps: least norm that is divided by.
        update: False uses the stored u and v as they are (evaluation).
        dims: for weights of any number of dimensions, the one that counts as rows of each; columns are the others,
            flattened in their order. None: every weight is (rows, columns).
        v_first: renew v before u, as ``torch.nn.utils.spectral_norm`` does.
        backend: run on this backend instead of the fastest.

    Returns:
        The normalized weights, in the shapes and strides of ``weights``.

    Raises:
        TypeError: something is not a tensor, or a dtype is not floating or not the same throughout.
        ValueError: a shape, device, stride or number is not as above; u and v are then unchanged.
        BackendUnavailable: the backend asked for cannot run here.

    Differentiable twice in the weights; a third derivative raises. Source: Miyato et al., Spectral Normalization for
    Generative Adversarial Networks (2018), in the form of ``torch.nn.utils.parametrizations.spectral_norm``.
    """
    for name, tensors in (("weights", weights), ("us", us), ("vs", vs)):
        if isinstance(tensors, Tensor) or not isinstance(tensors, Sequence):
            raise TypeError(f"{name} must be a list of tensors, got {type(tensors).__name__}")
    if not isinstance(n_power_iterations, int) or n_power_iterations < 1:
        raise ValueError(f"n_power_iterations must be an integer of at least 1, got {n_power_iterations!r}")
    if not eps > 0:
        raise ValueError(f"eps must be positive, got {eps!r}")
    if not len(weights) == len(us) == len(vs) == (len(weights) if dims is None else len(dims)):
        lengths = f"{len(weights)} weights, {len(us)} us, {len(vs)} vs" + (f", {len(dims)} dims" if dims else "")
        raise ValueError(f"weights, us, vs (and dims) must be of one length, got {lengths}")
    if not weights:
        return []
    rows_at = [0] * len(weights) if dims is None else list(dims)
    if not fits(weights, us, vs, rows_at) or (dims is None and any(w.ndim != 2 for w in weights)):
        for i, (weight, u, v, dim) in enumerate(zip(weights, us, vs, rows_at, strict=True)):
            _check_weight(f"weights[{i}]", weight, weights[0], dim, two_dimensional=dims is None)
            rows = weight.shape[dim]
            _check_vector(f"us[{i}]", u, weight, rows, "rows")
            _check_vector(f"vs[{i}]", v, weight, weight.numel() // rows, "columns")
        rows_at = [dim % weight.ndim for weight, dim in zip(weights, rows_at, strict=True)]
    return normalize(weights, us, vs, rows_at, n_power_iterations if update else 0, eps, v_first, backend)


def fits(weights: Sequence[Tensor], us: Sequence[Tensor], vs: Sequence[Tensor], dims: Sequence[int]) -> bool:
    """Whether all is as it mostly is, plain tensors that fit together, so that `normalize` may be called.

    Said once and fast; `spectral_norm` looks at what is not one thing at a time.
    """
    tensors = [*weights, *us, *vs]
    if not _PLAIN.issuperset(map(type, tensors)):
        return False
    first = weights[0]
    return (
        first.dtype in _DTYPES
        and {t.dtype for t in tensors} == {first.dtype}
        and {t.device for t in tensors} == {first.device}
        and first.device.type != "meta"
        and tuple([t.shape for t in tensors[len(weights) :]]) == vector_shapes(weights, dims)
        and all(map(Tensor.is_contiguous, us))
        and all(map(Tensor.is_contiguous, vs))
    )


def _check_weight(name: str, weight: Tensor, first: Tensor, dim: int, *, two_dimensional: bool) -> None:
    if not isinstance(weight, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(weight).__name__}")
    if weight.dtype not in _DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {weight.dtype}")
    if weight.dtype != first.dtype:
        raise TypeError(f"{name} must have the dtype of weights[0], {first.dtype}, got {weight.dtype}")
    if two_dimensional and weight.ndim != 2:
        raise ValueError(f"{name} must be (rows, columns), got shape {tuple(weight.shape)}; see dims")
    if weight.ndim < 2 or not -weight.ndim <= dim < weight.ndim:
        raise ValueError(f"{name} must have two dimensions or more, one of them {dim}, got {tuple(weight.shape)}")
    if weight.numel() == 0:
        raise ValueError(f"{name} must not be empty, got shape {tuple(weight.shape)}")
    if weight.device != first.device:
        raise ValueError(f"{name} must be on the device of weights[0], {first.device}, got {weight.device}")


def _check_vector(name: str, vector: Tensor, weight: Tensor, length: int, what: str) -> None:
    if not isinstance(vector, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(vector).__name__}")
    if vector.dtype != weight.dtype:
        raise TypeError(f"{name} must have its weight's dtype, {weight.dtype}, got {vector.dtype}")
    if vector.shape != (length,):
        raise ValueError(f"{name} must have shape ({length},), the weight's {what}, got {tuple(vector.shape)}")
    if vector.device != weight.device:
        raise ValueError(f"{name} must be on its weight's device, {weight.device}, got {vector.device}")
    if not vector.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got stride {vector.stride()}")
