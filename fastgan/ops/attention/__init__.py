"""Scaled dot product attention with memory linear in the number of tokens, up to the second derivative."""

from __future__ import annotations

from math import sqrt
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgan import backends
from fastgan.ops.attention import layout
from fastgan.ops.attention.autograd import DTYPES, attend, fits_triton
from fastgan.ops.attention.layout import Options
from fastgan.ops.library import is_autocast, is_traced

__all__ = ["scaled_dot_product_attention"]


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    backend: str | None = None,
) -> Tensor:
    """Compute softmax(scale * query key^T + mask) value, twice differentiable without storing the matrix of scores.

    The definition is that of ``torch.nn.functional.scaled_dot_product_attention``. PyTorch's fused kernels have no
    second derivative, and its unfused form keeps several (L, S) matrices per head for it. Here every order needs memory
    proportional to L + S, apart from calls on a CPU with at most 2**19 scores in all, which are faster in plain
    operations. Scores and sums are computed in float32 (float64 for float64 input), and the same inputs give the same
    bits. Under autocast, the operands are cast as in PyTorch. PyTorch's own function runs under a tracer, and for
    nested tensors and tensors on the meta device.

    Order of derivative: two. A third derivative raises RuntimeError, unless the call ran in plain operations;
    ``use_backend("reference")`` has every order.

    Source: Vaswani et al., Attention Is All You Need (2017); Dao et al., FlashAttention (2022), for the first two
    orders.

    ```python
    import torch
    import fastgan

    query, key, value = (torch.randn(2, 4, 16, 8) for _ in range(3))
    y = fastgan.ops.scaled_dot_product_attention(query, key, value)  # (2, 4, 16, 8)
    ```

    Args:
        query: (*, H, L, E) or (L, E); float16, bfloat16, float32 or float64.
        key: (*, H, S, E), or (*, G, S, E) with ``enable_gqa``; dtype of the query.
        value: (*, H, S, Ev), or (*, G, S, Ev) with ``enable_gqa``; dtype of the query. The dimensions before L and S
            are broadcast.
        attn_mask: a mask that broadcasts to (*, H, L, S), or None. In a boolean mask, True means that a key takes part.
            A mask of the query's dtype or float32 is added to the scores, and it is differentiated if it requires a
            gradient. A row whose keys are all masked gives zeros.
        dropout_p: the probability with which an attention weight is set to zero, also in evaluation mode. All orders
            use the same dropout mask. It is drawn from a seed of PyTorch's generator, differs from the mask of
            PyTorch's own dropout, and depends on the backend and the size.
        is_causal: row i attends to the first i + 1 keys. It cannot be combined with ``attn_mask``.
        scale: factor of the scores. None: 1 / sqrt(E).
        enable_gqa: H / G heads of the query share a head of key and value.
        backend: name of the backend to use. None: the fastest one.

    Returns:
        (*, H, L, Ev), dtype of the query.

    Raises:
        TypeError: an argument is not a tensor, or the dtypes are unsupported or differ.
        ValueError: a shape, device or number does not fit.
        BackendUnavailable: the requested backend cannot run here.
    """
    tensors = [t for t in (query, key, value, attn_mask) if t is not None]
    if _needs_pytorch(tensors):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    _check(query, key, value, attn_mask)
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p must be a probability, got {dropout_p}")
    if is_causal and attn_mask is not None:
        raise ValueError(
            "attn_mask must be None with is_causal=True, got a tensor: include the causal part in the mask"
        )
    query, key, value, attn_mask = _autocast(query, key, value, attn_mask)
    _check_dtypes(query, key, value, attn_mask)
    query, key, value, batch = _by_heads(query, key, value, enable_gqa)
    if attn_mask is not None:
        attn_mask = _mask_by_heads(attn_mask, (*batch, query.shape[2], key.shape[2]))
    width = query.shape[-1]
    options = Options(float(scale if scale is not None else 1 / sqrt(width or 1)), is_causal, float(dropout_p))
    chosen = backends.select("scaled_dot_product_attention", query.device, query.dtype, backend)
    if chosen == "reference" and not (backends.is_forced(backend) or backends.in_transform()):
        chosen = "blocks"  # also pure PyTorch, but without a matrix of all scores
    if chosen == "triton" and not fits_triton(query, value):
        if backends.is_forced(backend):
            widths = query.shape[-1], value.shape[-1]
            raise backends.BackendUnavailable(
                f"scaled_dot_product_attention: backend 'triton' cannot run heads of widths {widths} here: they are "
                "wider than 256 or do not fit into shared memory"
            )
        chosen = "blocks"
    if not (query.numel() and key.numel() and value.numel()):
        chosen = "reference"  # nothing to compute
    if chosen in ("cpu", "blocks") and _has_few_scores(query, key) and not backends.is_forced(backend):
        operands = query, key, value, attn_mask
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands):
            chosen = "reference"
    result = attend(query, key, value, attn_mask, options, chosen)
    return result if len(batch) == 2 else result.reshape(*batch, *result.shape[2:])


def _has_few_scores(query: Tensor, key: Tensor) -> bool:
    return query.is_cpu and query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2] <= layout.FEW


def _needs_pytorch(tensors: list[Any]) -> bool:
    if is_traced():
        return True
    plain = all(isinstance(t, Tensor) for t in tensors)
    return plain and any(t.is_nested or t.device.type == "meta" or t.layout != torch.strided for t in tensors)


def _check(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
        if tensor.ndim < 2:
            raise ValueError(f"{name} must be (*, tokens, width), got shape {tuple(tensor.shape)}")
        if tensor.device != query.device:
            raise ValueError(f"{name} must be on the query's device, {query.device}, got {tensor.device}")
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(f"key must have the query's width, {query.shape[-1]}, got shape {tuple(key.shape)}")
    if value.shape[-2] != key.shape[-2]:
        raise ValueError(f"value must have as many tokens as key, {key.shape[-2]}, got shape {tuple(value.shape)}")
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise TypeError(f"attn_mask must be a tensor or None, got {type(mask).__name__}")
    if mask.device != query.device:
        raise ValueError(f"attn_mask must be on the query's device, {query.device}, got {mask.device}")


def _check_dtypes(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
    """Check the dtypes after autocast, which leaves float64 as it is."""
    if not query.dtype == key.dtype == value.dtype:
        raise TypeError(
            f"query, key and value must have the same dtype, got {query.dtype}, {key.dtype} and {value.dtype}"
        )
    if mask is not None and mask.dtype not in (torch.bool, torch.float32, query.dtype):
        raise TypeError(f"attn_mask must be bool, float32 or of the query's dtype, {query.dtype}, got {mask.dtype}")


def _autocast(*tensors: Tensor | None) -> list[Any]:
    """Cast the tensors to the dtype of PyTorch's autocast, if it is on."""
    device_type = next(t for t in tensors if t is not None).device.type
    if not is_autocast(device_type):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device_type)
    cast = (torch.float32, torch.float16, torch.bfloat16)
    return [t.to(dtype) if t is not None and t.dtype in cast else t for t in tensors]


def _by_heads(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
    """Return query (B, H, L, E), key and value (B, G, S, .), and the original batch dimensions of the query."""
    shapes = [t.shape[:-2] for t in (query, key, value)]
    batches: list[tuple[int, ...]]
    if enable_gqa:
        heads = [int(shape[-1]) if shape else 1 for shape in shapes]
        if heads[1] != heads[2] or not heads[1] or heads[0] % heads[1]:
            raise ValueError(
                "with enable_gqa, key and value must have the same number of heads, a divisor of the query's, got"
                f" {heads[1]} and {heads[2]} for a query with {heads[0]}"
            )
        outer = _broadcast(*(shape[:-1] for shape in shapes))
        batches = [(*outer, count) if shapes[0] else outer for count in heads]
    else:
        batches = [_broadcast(*shapes)] * 3
    folded = [
        _as_4d(t if t.shape[:-2] == batch else t.expand(*batch, *t.shape[-2:]))
        for t, batch in zip((query, key, value), batches, strict=True)
    ]
    return folded[0], folded[1], folded[2], batches[0]


def _broadcast(*shapes: torch.Size) -> tuple[int, ...]:
    if all(shape == shapes[0] for shape in shapes):
        return tuple(shapes[0])  # the usual case: broadcast_shapes takes longer than a small kernel
    try:
        return tuple(torch.broadcast_shapes(*shapes))
    except RuntimeError:
        raise ValueError(
            f"the batch dimensions of query, key and value must broadcast, got {[*map(tuple, shapes)]}"
        ) from None


def _as_4d(t: Tensor) -> Tensor:
    return t[(None,) * (4 - t.ndim)] if t.ndim <= 4 else t.flatten(0, -4)


def _mask_by_heads(mask: Tensor, wanted: tuple[int, ...]) -> Tensor:
    """Return the mask as (B, H, L, S). Broadcast dimensions have size 1."""
    fits = mask.ndim <= len(wanted) and all(a in (1, b) for a, b in zip(mask.shape[::-1], wanted[::-1], strict=False))
    if not fits:
        raise ValueError(f"attn_mask must broadcast to {wanted}, got shape {tuple(mask.shape)}")
    if len(wanted) > 4 and any(size > 1 for size in mask.shape[:-3]):
        mask = mask.expand(*wanted[:-3], *mask.shape[-3:])
    return _as_4d(mask)
