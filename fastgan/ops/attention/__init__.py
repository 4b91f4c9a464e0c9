"""Scaled dot product attention in memory linear in the tokens, up to the second derivative."""

from __future__ import annotations

from math import sqrt
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgan import backends
from fastgan.ops.attention.autograd import DTYPES, attend
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
    """softmax(scale * query key^T + mask) value, differentiable twice without a matrix of all scores.

    As ``torch.nn.functional.scaled_dot_product_attention``, whose fused kernels have no second derivative and whose
    plain form keeps several (L, S) matrices a head for one. Here every order needs memory in proportion to L + S. The
    scores and all sums are float32 (float64 for float64); the same inputs give the same bits. Under autocast the
    operands are cast as PyTorch casts them.

    Args:
        query: (*, H, L, E), float16, bfloat16, float32 or float64; (L, E) too.
        key: (*, H, S, E), of the same dtype; (*, G, S, E) with ``enable_gqa``.
        value: (*, H, S, Ev) or (*, G, S, Ev), likewise. The dimensions before L and S are broadcast.
        attn_mask: broadcast to (*, H, L, S). Boolean: True takes part. Of the query's dtype or float32: added to the
            scores, and differentiated if it requires a gradient. A row that is masked throughout gives zeros.
        dropout_p: the part of the probabilities that is set to zero, whatever the mode of a module. All orders see
            one mask, which is drawn from a seed that PyTorch's generator gives: its values are not those of
            PyTorch's own dropout, and depend on the backend.
        is_causal: row i sees the first i + 1 keys; not together with ``attn_mask``.
        scale: None: 1 / sqrt(E).
        enable_gqa: H / G heads of the query share a head of key and value.
        backend: run on this backend instead of the fastest.

    Returns:
        (*, H, L, Ev), of the query's dtype.

    Raises:
        TypeError: something is not a tensor, or a dtype is not as above.
        ValueError: a shape, device or number is not as above.
        BackendUnavailable: the backend asked for cannot run here.

    Differentiable twice; a third derivative raises. While a graph is traced, and of tensors that are nested or on the
    meta device, PyTorch's own function runs. Sources: Vaswani et al., Attention Is All You Need (2017); Dao et al.,
    FlashAttention (2022), for the first two orders.
    """
    tensors = [t for t in (query, key, value, attn_mask) if t is not None]
    if _is_torchs(tensors):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    _check(query, key, value, attn_mask)
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p must be a probability, got {dropout_p}")
    if is_causal and attn_mask is not None:
        raise ValueError("attn_mask must be None with is_causal=True: put the causal part into the mask")
    query, key, value, attn_mask = _autocast(query, key, value, attn_mask)
    query, key, value, batch = _by_heads(query, key, value, enable_gqa)
    if attn_mask is not None:
        attn_mask = _mask_by_heads(attn_mask, (*batch, query.shape[2], key.shape[2]))
    width = query.shape[-1]
    options = Options(float(scale if scale is not None else 1 / sqrt(width or 1)), is_causal, float(dropout_p))
    chosen = backends.select("scaled_dot_product_attention", query.device, query.dtype, backend)
    if chosen == "reference" and not (backends.is_forced(backend) or backends.in_transform()):
        chosen = "blocks"  # pure PyTorch too, and without a matrix of all scores
    if not (query.numel() and key.numel() and value.numel()):
        chosen = "reference"  # nothing to compute
    result = attend(query, key, value, attn_mask, options, chosen)
    return result.reshape(*batch, *result.shape[2:])


def _is_torchs(tensors: list[Any]) -> bool:
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
    if not query.dtype == key.dtype == value.dtype and not is_autocast(query.device.type):
        raise TypeError(f"query, key and value must have one dtype, got {query.dtype}, {key.dtype} and {value.dtype}")
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(f"key must have the query's width, {query.shape[-1]}, got shape {tuple(key.shape)}")
    if value.shape[-2] != key.shape[-2]:
        raise ValueError(f"value must have as many tokens as key, {key.shape[-2]}, got shape {tuple(value.shape)}")
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise TypeError(f"attn_mask must be a tensor or None, got {type(mask).__name__}")
    if mask.dtype not in (torch.bool, torch.float32, query.dtype) and not is_autocast(query.device.type):
        raise TypeError(f"attn_mask must be bool, float32 or of the query's dtype, {query.dtype}, got {mask.dtype}")
    if mask.device != query.device:
        raise ValueError(f"attn_mask must be on the query's device, {query.device}, got {mask.device}")


def _autocast(*tensors: Tensor | None) -> list[Any]:
    """In the dtype of PyTorch's autocast, where it is on."""
    device_type = next(t for t in tensors if t is not None).device.type
    if not is_autocast(device_type):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device_type)
    cast = (torch.float32, torch.float16, torch.bfloat16)
    return [t.to(dtype) if t is not None and t.dtype in cast else t for t in tensors]


def _by_heads(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
    """query (B, H, L, E), key and value (B, G, S, .), and what was (B, H)."""
    shapes = [t.shape[:-2] for t in (query, key, value)]
    batches: list[tuple[int, ...]]
    if enable_gqa:
        heads = [int(shape[-1]) if shape else 1 for shape in shapes]
        if heads[1] != heads[2] or not heads[1] or heads[0] % heads[1]:
            raise ValueError(
                "with enable_gqa the heads of key and value must be equal and divide the query's, got"
                f" {heads[1]} and {heads[2]} for {heads[0]}"
            )
        outer = _broadcast(*(shape[:-1] for shape in shapes))
        batches = [(*outer, count) if shapes[0] else outer for count in heads]
    else:
        batches = [_broadcast(*shapes)] * 3
    folded = [_four(t.expand(*batch, *t.shape[-2:])) for t, batch in zip((query, key, value), batches, strict=True)]
    return folded[0], folded[1], folded[2], batches[0]


def _broadcast(*shapes: torch.Size) -> tuple[int, ...]:
    try:
        return tuple(torch.broadcast_shapes(*shapes))
    except RuntimeError:
        raise ValueError(
            f"query, key and value must have dimensions before the tokens that broadcast, got {[*map(tuple, shapes)]}"
        ) from None


def _four(t: Tensor) -> Tensor:
    return t[(None,) * (4 - t.ndim)] if t.ndim <= 4 else t.flatten(0, -4)


def _mask_by_heads(mask: Tensor, wanted: tuple[int, ...]) -> Tensor:
    """(B, H, L, S), where it is broadcast of size 1."""
    fits = mask.ndim <= len(wanted) and all(a in (1, b) for a, b in zip(mask.shape[::-1], wanted[::-1], strict=False))
    if not fits:
        raise ValueError(f"attn_mask must broadcast to {wanted}, got shape {tuple(mask.shape)}")
    if len(wanted) > 4 and any(size > 1 for size in mask.shape[:-3]):
        mask = mask.expand(*wanted[:-3], *mask.shape[-3:])
    return _four(mask)
