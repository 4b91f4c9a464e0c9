"""Work distribution of the Triton spectral norm kernels. Small tables assign a part of a weight to each program."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

BLOCK = 4096  # elements that a program holds at a time: eight 16-byte loads per thread in float32
SMALL_BLOCK = 1024  # block size for narrow accesses and for vectors
MAX_PARTS = 1024  # largest number of partial sums; each reader adds them up
_MAX_LENGTH = 2**31 - 1 - BLOCK  # rows or columns; their product may be larger
_ENOUGH_PROGRAMS = 2048  # several programs for each multiprocessor of a large GPU

# How a product reads W. ALONG and ACROSS: 16-byte aligned lines of memory, summed along or across the line. VECTORS:
# each row lies in short runs of whole 16-byte accesses, as in a transposed convolution's weight. RUNS: in other short
# runs; few rows a program, since a row is long. GENERAL: all other cases. The last two read single elements.
GENERAL, RUNS, ALONG, ACROSS, VECTORS = range(5)
_RUN = 8  # elements of a run that fill a sector of memory
# The parts of the result that a program of the last forward launch can write.
WEIGHT_PART, U_PART, V_PART = 0, 1, 2

# The columns of the table of weights, which has one row per weight.
FIELDS = (
    *("weight", "output", "u", "v", "saved", "grad"),  # addresses
    *("outer", "rows", "inner"),
    *("chunk", "chunks", "chunk_sums", "vector"),  # chunks of memory; whether 16-byte accesses are possible
    *("s_form", "s_span", "s_tiles", "s", "s_sums"),  # s = W v: outputs per tile, tiles, offsets in scratch
    *("t_form", "t_span", "t_tiles", "t", "t_sums"),  # t = W^T u
)
Addresses = tuple[int, int, int, int, int, int]
_NO_ADDRESSES: Addresses = (0, 0, 0, 0, 0, 0)


@dataclass(frozen=True, eq=False)
class Plan:
    """The table of weights without the addresses, and the (weight, tile) of each program of a launch."""

    rows: tuple[tuple[int, ...], ...]
    table: Tensor  # the same on the device, with addresses of 0
    s_tiles: Tensor
    t_tiles: Tensor
    parts: Tensor  # (weight, part, index)
    chunks: Tensor
    chunks_back: Tensor  # chunks in reverse order
    scratch: int  # elements
    chunk_sums: int  # the first elements of scratch; the backward needs no others
    streams: set[int] = field(default_factory=set)  # those that have used the tensors

    def use_on(self, stream: torch.cuda.Stream) -> None:
        """Let the stream read the tensors: their memory is not reused before the stream is done with it."""
        if stream.cuda_stream not in self.streams:
            self.streams.add(stream.cuda_stream)
            for tensor in (self.table, self.s_tiles, self.t_tiles, self.parts, self.chunks, self.chunks_back):
                tensor.record_stream(stream)


@lru_cache(maxsize=64)
def plan_of(
    matrices: tuple[tuple[int, int, int], ...], aligned: tuple[bool, ...], item: int, device: torch.device
) -> Plan:
    """Make the plan for weights (outer, rows, inner), ``item`` bytes per element, 16-byte ``aligned`` or not."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("spectral norm of new weights cannot be captured: run the step once before the capture")
    release()
    for outer, rows, inner in matrices:
        if max(rows, outer * inner) > _MAX_LENGTH:
            raise ValueError(
                f"a weight must have at most {_MAX_LENGTH} rows and as many columns, "
                f"got {rows} rows and {outer * inner} columns"
            )
    sizes = [outer * rows * inner for outer, rows, inner in matrices]
    vector = 16 // item
    blocks = max(1, min(8, sum(sizes) // (BLOCK * _ENOUGH_PROGRAMS)))
    chunk = [BLOCK * max(blocks, _ceil(size, BLOCK * MAX_PARTS)) for size in sizes]
    chunks = [_ceil(size, length) for size, length in zip(sizes, chunk, strict=True)]

    table: list[tuple[int, ...]] = []
    scratch = sum(chunks)
    tiles: dict[bool, list[tuple[int, int]]] = {False: [], True: []}
    for i, (outer, rows, inner) in enumerate(matrices):
        row = [
            outer,
            rows,
            inner,
            chunk[i],
            chunks[i],
            sum(chunks[:i]),
            aligned[i] and sizes[i] % vector == 0,
        ]
        for of_columns, length in ((False, rows), (True, outer * inner)):
            form = _form(matrices[i], of_columns, vector, aligned[i])
            block = outputs_per_step(form, of_columns, item)
            span = block * _ceil(length, block * MAX_PARTS)
            count = _ceil(length, span)
            row += [form, span, count, scratch, scratch + length]
            scratch += length + count
            tiles[of_columns] += [(i, j) for j in range(count)]
        table.append(tuple(map(int, row)))

    every_chunk = [(i, j) for i, count in enumerate(chunks) for j in range(count)]
    parts: list[tuple[int, ...]] = [(i, WEIGHT_PART, j) for i, j in every_chunk]
    for i, (outer, rows, inner) in enumerate(matrices):
        parts += [(i, U_PART, j) for j in range(_ceil(rows, SMALL_BLOCK))]
        parts += [(i, V_PART, j) for j in range(_ceil(outer * inner, SMALL_BLOCK))]

    # Every other launch reads the list in reverse, so that it finds in L2 what the previous launch read last.
    def table_of_tiles(entries: list[tuple[int, ...]]) -> Tensor:
        return torch.tensor(entries, device=device)

    return Plan(
        rows=tuple(table),
        table=table_of_tiles([_NO_ADDRESSES + row for row in table]),
        s_tiles=table_of_tiles([*tiles[False]]),
        t_tiles=table_of_tiles([*reversed(tiles[True])]),
        parts=table_of_tiles(parts),
        chunks=table_of_tiles([*every_chunk]),
        chunks_back=table_of_tiles([*reversed(every_chunk)]),
        scratch=scratch,
        chunk_sums=sum(chunks),
    )


def _form(matrix: tuple[int, int, int], of_columns: bool, vector: int, aligned: bool) -> int:
    outer, rows, inner = matrix
    line = inner if outer == 1 else rows
    if outer > 1 and aligned and inner % vector == 0:
        return VECTORS
    if outer > 1 and inner >= _RUN and not of_columns:
        return RUNS
    if not aligned or min(outer, inner) > 1 or line % vector:
        return GENERAL
    return ALONG if (outer == 1) != of_columns else ACROSS


def outputs_per_step(form: int, of_columns: bool, item: int) -> int:
    """Return how many elements of s or t a program computes at a time, each from its share of a block of W."""
    along_memory = 128 // item
    return {ALONG: 4, ACROSS: along_memory, VECTORS: along_memory if of_columns else 4, RUNS: 4, GENERAL: 32}[form]


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


# CUDA graphs read the tensors of these plans at each replay. Each plan is kept with the storages of the parameters that
# were captured with it, because a replay reads these too. Weights that are not parameters may be in the memory of the
# graph itself. Nothing reports when such a graph is freed, so their plans stay.
_captured: dict[Plan, dict[tuple[int, ...], tuple[StorageWeakRef, ...]]] = {}


def _keep(plan: Plan, weights: Sequence[Tensor]) -> None:
    """Keep a plan for a graph as long as the parameters exist that the graph reads."""
    release()
    storages: tuple[StorageWeakRef, ...] = ()
    if all(isinstance(w, torch.nn.Parameter) for w in weights):
        storages = tuple(StorageWeakRef(w.untyped_storage()) for w in weights)
    _captured.setdefault(plan, {})[tuple(s.cdata for s in storages)] = storages


def release() -> None:
    """Release the plans of graphs that cannot be replayed any more."""
    for plan, by_weights in list(_captured.items()):
        for key, storages in list(by_weights.items()):
            if any(storage.expired() for storage in storages):
                del by_weights[key]
        if not by_weights:
            del _captured[plan]


def table_of(
    plan: Plan, addresses: tuple[Addresses, ...], device: torch.device, weights: Sequence[Tensor] = ()
) -> Tensor:
    """Return the table of weights on the current device. A step with the same addresses as before uploads nothing."""
    if device.type != "cuda":
        return _table(plan.rows, addresses, device, 0)
    if torch.cuda.is_current_stream_capturing():
        _keep(plan, weights)
        return _written(plan, addresses)
    stream = torch.cuda.current_stream(device)
    plan.use_on(stream)
    return _table(plan.rows, addresses, device, stream.cuda_stream)


@lru_cache(maxsize=64)
def _table(
    rows: tuple[tuple[int, ...], ...], addresses: tuple[Addresses, ...], device: torch.device, stream: int
) -> Tensor:
    # The stream is part of the key, because the copy may not have finished on another stream.
    entries = torch.tensor([a + r for a, r in zip(addresses, rows, strict=True)], device="cpu")
    return entries.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else entries


def _written(plan: Plan, addresses: tuple[Addresses, ...]) -> Tensor:
    """Return a table that kernels fill. The graph stores the addresses as kernel arguments and needs no host memory."""
    table = plan.table.clone()
    numbers = [address for row in addresses for address in row]
    places = [place for row in table[:, : len(_NO_ADDRESSES)] for place in row.unbind()]
    given = [i for i, number in enumerate(numbers) if number]
    torch._foreach_add_([places[i] for i in given], [numbers[i] for i in given])
    return table
