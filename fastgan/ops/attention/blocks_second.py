"""Attention's double backward on blocks of rows of the scores. The formulas are in blocks.py."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgan.ops.attention.blocks import Block, Blocks, Operands, add_product
from fastgan.ops.attention.layout import Heads, Options


class _Second:
    """The gradients of the backward's results for some heads, and the double backward's results from them."""

    def __init__(
        self,
        blocks: Blocks,
        heads: Heads,
        x: Operands,
        gq: Tensor | None,
        gk: Tensor | None,
        gv: Tensor | None,
        gmask: Tensor | None,
    ) -> None:
        self._x, self._scale, self._gmask = x, blocks.options.scale, gmask
        self.gq = None if gq is None else heads.queries(gq, blocks.dtype)
        self.gk = None if gk is None else heads.keys(gk, blocks.dtype)
        self.gv = None if gv is None else heads.keys(gv, blocks.dtype)
        left = [t for t, other in ((self.gq, gq), (x.q, gk)) if t is not None and other is not None]
        right = [t for t, other in ((x.k, gq), (self.gk, gk)) if t is not None and other is not None]
        # s (GQ K^T + Q GK^T) as one product
        self._left = torch.cat(left, -1).mul_(self._scale) if left else None
        self._right = torch.cat(right, -1) if right else None

    def of(
        self, block: Block, scores: Tensor, factors: Tensor | None, apart: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return D P (T - tau) and dS2, or None for zeros. The scores become D P, and dP - delta becomes dS."""
        t, r = self._tangent(block, scores), None
        if self.gv is not None:
            r = block.product("R", self._x.g[:, block.rows], self.gv)
            if factors is not None:
                r *= factors
        moved = None
        if t is not None:
            moved = r if r is not None and block.call.is_native else block.buffer("PT", scores)
        block.call.derive(scores, apart, t, r, moved)
        if factors is not None:
            scores *= factors
            if moved is not None:
                moved *= factors
        return moved, r if t is None else t

    def _tangent(self, block: Block, like: Tensor) -> Tensor | None:
        t: Tensor | None = None
        if self._left is not None and self._right is not None:
            t = block.product("T", self._left[:, block.rows], self._right)
        if self._gmask is not None:
            t = block.buffer("T", like).zero_() if t is None else t
            by_sample = block.heads.by_sample(t)
            by_sample += block.heads.of_mask(self._gmask, block.rows, block.columns)
        return t

    def by_g(self, weighted: Tensor, of_tangent: Tensor | None, columns: int) -> Tensor | None:
        result = None if of_tangent is None else of_tangent @ self._x.v[:, :columns]
        return _plus(result, weighted, None if self.gv is None else self.gv[:, :columns])

    def by_q(self, d_scores: Tensor, ds2: Tensor | None, columns: int) -> Tensor | None:
        result = None if ds2 is None else ds2 @ self._x.k[:, :columns]
        result = _plus(result, d_scores, None if self.gk is None else self.gk[:, :columns])
        return None if result is None else result.mul_(self._scale)

    def add_by_k(self, total: Tensor, d_scores: Tensor, ds2: Tensor | None, rows: slice) -> None:
        if self.gq is not None:
            add_product(total, d_scores, self.gq[:, rows], self._scale)
        if ds2 is not None:
            add_product(total, ds2, self._x.q[:, rows], self._scale)


def _plus(total: Tensor | None, left: Tensor, right: Tensor | None) -> Tensor | None:
    if right is None:
        return total
    return left @ right if total is None else torch.baddbmm(total, left, right, out=total)


def double_backward(
    gq: Tensor | None,
    gk: Tensor | None,
    gv: Tensor | None,
    gmask: Tensor | None,
    g: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    o: Tensor,
    lse: Tensor,
    seed: Tensor | None,
    by_g: Tensor | None,
    by_q: Tensor | None,
    by_k: Tensor | None,
    by_v: Tensor | None,
    by_mask: Tensor | None,
    options: Options,
    is_native: bool,
) -> None:
    """Run the double backward. gq, gk, gv and gmask are the gradients of the backward's results, None for zeros."""
    blocks = Blocks(q, k, mask, seed, options, is_native)
    into_mask = None if by_mask is None else blocks.zeros(by_mask)
    for heads in blocks.parts:
        x = Operands(blocks, heads, g, q, k, v, o, lse)
        second = _Second(blocks, heads, x, gq, gk, gv, gmask)
        into_k, into_v = blocks.zeros(x.k), blocks.zeros(x.v)
        for block in blocks.of(heads):
            rows, columns = block.rows, block.columns
            weighted, factors, d_scores = x.of(block)
            p_t, ds2 = second.of(block, weighted, factors, d_scores)
            if by_g is not None:
                heads.put_queries(by_g, second.by_g(weighted, p_t, columns), rows)
            if by_q is not None:
                heads.put_queries(by_q, second.by_q(d_scores, ds2, columns), rows)
            if by_k is not None:
                second.add_by_k(into_k, d_scores, ds2, rows)
            if by_v is not None and p_t is not None:
                add_product(into_v, p_t, x.g[:, rows])
            block.add_to_mask(into_mask, ds2)
        for target, values in ((by_k, into_k), (by_v, into_v)):
            if target is not None:
                heads.put_keys(target, values)
    if by_mask is not None and into_mask is not None:
        by_mask.copy_(into_mask)
