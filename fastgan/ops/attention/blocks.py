"""Attention up to the second derivative with PyTorch's matrix products, on blocks of rows of the scores.

    P = softmax(s Q K^T + mask)    D: the factors of dropout, or 1    O = (D P) V

    backward, with g the gradient of O:
      dP = D (g V^T)    delta = rowsum(g O)    dS = P (dP - delta)
      dQ = s dS K    dK = s dS^T Q    dV = (D P)^T g    dmask = dS
    double backward, with GQ, GK, GV and GM the gradients of these four:
      T = s (GQ K^T + Q GK^T) + GM    tau = rowsum(P T)    R = D (g GV^T)
      M = (dP - delta) (T - tau) + R    mu = rowsum(P M)    dS2 = P (M - mu)
      by g: D P (T - tau) V + D P GV    by Q: s (dS GK + dS2 K)    by K: s (dS^T GQ + dS2^T Q)
      by V: (D P (T - tau))^T g    by mask: dS2

P, D, dP, T, R, M, dS and dS2 are (L, S), and products of two of them are elementwise. A block holds some rows of some
heads in reused buffers, which stay in the cache. P is recomputed from the scores and the log-sum-exp of each row. The
matrix product subtracts the log-sum-exp: Q gets an extra column -lse / s, and K a column of ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import inf

import torch
from torch import Tensor

from fastgan.ops.attention import native_kernels
from fastgan.ops.attention.layout import Heads, Options, is_far, partition
from fastgan.ops.library import accumulation_dtype


class Block:
    """Rows of the scores of some heads. They may attend to the first ``columns`` keys."""

    def __init__(self, call: Blocks, heads: Heads, rows: slice, columns: int) -> None:
        self.call, self.heads, self.rows, self.columns = call, heads, rows, columns

    def product(self, name: str, left: Tensor, right: Tensor) -> Tensor:
        """Compute left right^T in the named buffer, with left (heads, rows, E) and right (heads, S, E)."""
        right = right[:, : self.columns]
        return torch.bmm(left, right.mT, out=self.call.buffer(name, len(left), left.shape[1], self.columns))

    def masked(self, scores: Tensor) -> Tensor:
        """Apply the masks to the scores in place. Masked scores are -inf."""
        mask = self.call.mask
        if self.call.options.is_causal and self.columns > self.rows.start + 1:
            kept = torch.ones(scores.shape[1:], dtype=torch.bool, device=scores.device).tril_(self.rows.start)
            scores.masked_fill_(kept.logical_not_(), -inf)
        if mask is not None:
            mask = self.heads.of_mask(mask, self.rows, self.columns)
            whole = self.heads.by_sample(scores)
            _ = whole.masked_fill_(mask.logical_not(), -inf) if mask.dtype == torch.bool else whole.add_(mask)
        return scores

    def dropout(self, like: Tensor) -> Tensor | None:
        """Return D, or None without dropout."""
        generator = self.call.generator
        if generator is None:
            return None
        generator.manual_seed(self.call.next_seed())
        keep = 1 - self.call.options.dropout_p
        return self.buffer("D", like).bernoulli_(keep, generator=generator).mul_(1 / keep if keep else 0)

    def buffer(self, name: str, like: Tensor) -> Tensor:
        return self.call.buffer(name, *like.shape)

    def add_to_mask(self, target: Tensor | None, values: Tensor | None) -> None:
        """Add the values to the gradient of the mask, summed over broadcast dimensions."""
        if target is not None and values is not None:
            target = self.heads.of_mask(target, self.rows, self.columns)
            target += self.heads.by_sample(values).sum_to_size(target.shape)


class Blocks:
    """All blocks of a call and their shared buffers."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        mask: Tensor | None,
        seed: Tensor | None,
        options: Options,
        is_native: bool = False,
    ) -> None:
        self.dtype, self.is_native = accumulation_dtype(q.dtype), is_native
        # All orders must draw the same dropout, whatever the number of threads is by then.
        self.parts, self.most = partition(q, k, torch.get_num_threads() if seed is None and q.is_cpu else 2)
        self.length, self.keys = q.shape[2], k.shape[2]
        self.device, self.mask, self.options = q.device, mask, options
        self.has_added_mask = mask is not None and mask.is_floating_point()
        self.generator = None if seed is None else torch.Generator(q.device)
        self._seed = 0 if seed is None else int(seed)
        self._buffers: dict[str, Tensor] = {}

    def of(self, heads: Heads) -> Iterator[Block]:
        for first in range(0, self.length, self.most):
            last = min(first + self.most, self.length)
            yield Block(self, heads, slice(first, last), min(self.keys, last) if self.options.is_causal else self.keys)

    def next_seed(self) -> int:
        self._seed += 1
        return self._seed

    def buffer(self, name: str, heads: int, rows: int, columns: int) -> Tensor:
        size = heads * rows * columns
        if name not in self._buffers or self._buffers[name].numel() < size:
            self._buffers[name] = torch.empty(size, dtype=self.dtype, device=self.device)
        return self._buffers[name][:size].view(heads, rows, columns)

    def derive(
        self,
        scores: Tensor,
        apart: Tensor,
        tangent: Tensor | None = None,
        values: Tensor | None = None,
        moved: Tensor | None = None,
    ) -> None:
        (native_kernels.derive if self.is_native else derive)(scores, apart, tangent, values, moved)

    def zeros(self, like: Tensor) -> Tensor:
        return torch.zeros(like.shape, dtype=self.dtype, device=self.device)


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, seed: Tensor | None, o: Tensor, lse: Tensor, options: Options
) -> None:
    """Write o (B, H, L, Ev) and lse (B, H, L). Both are 0 for a row without keys."""
    blocks = Blocks(q, k, mask, seed, options)
    for heads in blocks.parts:
        queries = heads.queries(q, blocks.dtype) * options.scale
        keys, values = heads.keys(k, blocks.dtype), heads.keys(v, blocks.dtype)
        for block in blocks.of(heads):
            scores = block.masked(block.product("P", queries[:, block.rows], keys))
            largest = scores.amax(-1, keepdim=True)
            largest.masked_fill_(largest == -inf, 0)
            p = scores.sub_(largest).exp_()
            sums = p.sum(-1, keepdim=True)
            nothing = sums == 0
            heads.put_queries(lse, (sums.log() + largest).masked_fill_(nothing, 0).squeeze(-1), block.rows)
            p.div_(sums.masked_fill_(nothing, 1))
            factors = block.dropout(p)
            if factors is not None:
                p *= factors
            heads.put_queries(o, p @ values[:, : block.columns], block.rows)


def derive(scores: Tensor, apart: Tensor, tangent: Tensor | None, values: Tensor | None, moved: Tensor | None) -> None:
    """Compute everything between two matrix products of a block, in place.

    ``scores``, less the log-sum-exp of their row, become P, and ``apart``, dP - delta, becomes dS. ``tangent``, T,
    becomes dS2, and so does ``values``, R, if T is None. ``moved`` receives P (T - tau).
    """
    p = scores.exp_()
    if tangent is not None:
        tangent -= torch.linalg.vecdot(p, tangent).unsqueeze(-1)
        if moved is not None:
            torch.mul(p, tangent, out=moved)
        _ = tangent.mul_(apart) if values is None else torch.addcmul(values, tangent, apart, out=tangent)
    apart *= p
    m = values if tangent is None else tangent
    if m is not None:
        m.sub_(torch.linalg.vecdot(p, m).unsqueeze(-1)).mul_(p)


class Operands:
    """The operands of some heads that both backward orders read.

    ``of`` computes the scores of a block, less the log-sum-exp, and dP - delta.
    """

    def __init__(
        self,
        blocks: Blocks,
        heads: Heads,
        g: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        o: Tensor,
        lse: Tensor,
    ) -> None:
        self.g, self.q = heads.queries(g, blocks.dtype), heads.queries(q, blocks.dtype)
        self.k, self.v = heads.keys(k, blocks.dtype), heads.keys(v, blocks.dtype)
        ones = self.k.new_ones(*self.k.shape[:2], 1)
        self._k1 = torch.cat([self.k, ones], -1)
        self._v1 = torch.cat([self.v, ones], -1)
        self._o, self._lse = heads.queries(o, blocks.dtype), heads.queries(lse, blocks.dtype).unsqueeze(-1)
        self._scale = blocks.options.scale
        # Without a GPU's wait for the answer
        self._is_far = is_far(self._lse) if q.is_cpu else blocks.has_added_mask

    def of(self, block: Block) -> tuple[Tensor, Tensor | None, Tensor]:
        rows = block.rows
        left = self.q[:, rows] * self._scale
        if self._is_far:  # the log-sum-exp is too large to be a term of a sum in the product
            scores = block.masked(block.product("P", left, self.k))
            for norm in (torch.amax, torch.logsumexp):  # the maximum first, because its size hides the logarithm
                of_rows = norm(scores, -1, keepdim=True)
                scores -= of_rows.masked_fill_(of_rows == -inf, 0)
        else:
            left = torch.cat([left, -self._lse[:, rows]], -1)
            scores = block.masked(block.product("P", left, self._k1))
        factors = block.dropout(scores)
        g = self.g[:, rows]
        delta = torch.linalg.vecdot(g, self._o[:, rows]).unsqueeze(-1)
        if factors is None:
            return scores, None, block.product("dP", torch.cat([g, -delta], -1), self._v1)
        return scores, factors, block.product("dP", g, self.v).mul_(factors).sub_(delta)


def add_product(total: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> None:
    """Add scale left^T right to total[:, :columns]."""
    total = total[:, : left.shape[2]]
    torch.baddbmm(total, left.mT, right, alpha=scale, out=total)


def backward(
    g: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    o: Tensor,
    lse: Tensor,
    seed: Tensor | None,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dmask: Tensor | None,
    options: Options,
    is_native: bool,
) -> None:
    blocks = Blocks(q, k, mask, seed, options, is_native)
    into_mask = None if dmask is None else blocks.zeros(dmask)
    for heads in blocks.parts:
        x = Operands(blocks, heads, g, q, k, v, o, lse)
        by_k, by_v = blocks.zeros(x.k), blocks.zeros(x.v)
        for block in blocks.of(heads):
            rows, columns = block.rows, block.columns
            p, factors, d_scores = x.of(block)
            blocks.derive(p, d_scores)
            if dv is not None:
                add_product(by_v, p if factors is None else p.mul_(factors), x.g[:, rows])
            if dk is not None:
                add_product(by_k, d_scores, x.q[:, rows], options.scale)
            if dq is not None:
                heads.put_queries(dq, (d_scores @ x.k[:, :columns]).mul_(options.scale), rows)
            block.add_to_mask(into_mask, d_scores)
        for target, values in ((dk, by_k), (dv, by_v)):
            if target is not None:
                heads.put_keys(target, values)
    if dmask is not None and into_mask is not None:
        dmask.copy_(into_mask)
