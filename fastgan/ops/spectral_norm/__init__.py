"""Spectral normalization of many weights in a single call."""

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
    """Divide each weight by its spectral norm, estimated by power iteration. One call handles all weights.

    A power iteration is u = W v / max(|W v|, eps), v = W^T u / max(|W^T u|, eps). The result is W / (u^T W v). u and v
    are updated in place and are constants for the gradient. The backward uses its own copies of them, so several
    forwards may precede a backward. Sums are accumulated in float32 (float64 for float64 weights), and the same inputs
    give the same bits.

    Order of derivative: two, in the weights. A third derivative raises RuntimeError; ``use_backend("reference")`` has
    every order.

    Source: Miyato et al., Spectral Normalization for Generative Adversarial Networks (2018), as implemented by
    ``torch.nn.utils.parametrizations.spectral_norm``.

    ```python
    import torch
    import fastgan

    weights = [torch.randn(64, 32), torch.randn(128, 64)]
    us, vs = [torch.randn(64), torch.randn(128)], [torch.randn(32), torch.randn(64)]
    normalized = fastgan.ops.spectral_norm(weights, us, vs)
    ```

    Args:
        weights: tensors (rows, columns) of the same dtype (float16, bfloat16, float32 or float64) and device.
        us: left singular vectors, (rows,) each, with the dtype and device of the weights; contiguous.
        vs: right singular vectors, (columns,) each, with the dtype and device of the weights; contiguous.
        n_power_iterations: number of power iterations in this call, at least 1.
        eps: lower bound of the norms in the divisions, greater than 0.
        update: run power iterations. False: use the given u and v unchanged (evaluation).
        dims: the dimension of each weight that forms the rows, for weights with two or more dimensions. The other
            dimensions, flattened in order, form the columns. None: every weight is (rows, columns).
        v_first: update v before u, as ``torch.nn.utils.spectral_norm`` does.
        backend: name of the backend to use. None: the fastest one.

    Returns:
        The normalized weights, with the shapes and strides of ``weights``.

    Raises:
        TypeError: an argument is not a tensor, or the dtypes are unsupported or differ.
        ValueError: a shape, device, stride or number does not fit. u and v are then unchanged.
        BackendUnavailable: the requested backend cannot run here.
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
        raise ValueError(f"weights, us, vs (and dims) must have the same length, got {lengths}")
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
    """Return whether all arguments are plain tensors that fit together, so that `normalize` may be called.

    This is one fast check for the common case. If it fails, `spectral_norm` checks each tensor and raises the error.
    """
    tensors = [*weights, *us, *vs]
    if not torch.compiler.is_compiling() and not _PLAIN.issuperset(map(type, tensors)):
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
        raise ValueError(f"{name} must be (rows, columns), got shape {tuple(weight.shape)}; pass dims for other shapes")
    if weight.ndim < 2 or not -weight.ndim <= dim < weight.ndim:
        raise ValueError(
            f"{name} must have at least two dimensions and a dimension {dim}, got shape {tuple(weight.shape)}"
        )
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
        raise ValueError(
            f"{name} must have shape ({length},), the number of {what} of its weight, got {tuple(vector.shape)}"
        )
    if vector.device != weight.device:
        raise ValueError(f"{name} must be on its weight's device, {weight.device}, got {vector.device}")
    if not vector.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got stride {vector.stride()}")
