"""Work and iterations of the CUDA kernels of spectral norm, counted by hand for a case of the table.

A block takes its tiles through the phases of a wave. In each phase, a thread takes part in every tile.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import ceil, log2

from tools.static_costs.by_hand import Part, text_of
from tools.static_costs.machine_code import Function
from tools.static_costs.model import L2_BYTES, SMS, Estimate

# Four weights of 1,024 x 8,192, whose tiles have 16 rows of 512 columns in float32: see csrc/cuda/spectral_norm_plan.h.
_WEIGHTS, _ROWS, _COLUMNS, _ITEM = 4, 1024, 8192, 4
_THREADS, _TILE_BYTES, _TILE_COLUMNS, _VECTOR = 512, 32768, 512, 4
_SLOTS = 6  # in the shared memory of a block
_TILE_ROWS = _TILE_BYTES // _ITEM // _TILE_COLUMNS
_SIZE = _WEIGHTS * _ROWS * _COLUMNS
# A wave fits in the slots and a third of L2: a weight here.
_WAVE = max(1, int((SMS * _SLOTS * _TILE_BYTES + L2_BYTES / 3) // (_SIZE // _WEIGHTS * _ITEM)))
_TILES = _SIZE // _WEIGHTS * _WAVE / (_TILE_ROWS * _TILE_COLUMNS) / SMS  # of a block in a wave
_KEPT = ceil(_TILES) if ceil(_TILES) <= _SLOTS else _SLOTS - 2

# A thread's iterations for a tile: by the text of a loop, or of a call that contains it.
_GROUPS = _TILE_ROWS * _TILE_COLUMNS / _VECTOR / _THREADS
_WARPS = _THREADS // 32
_SHARERS = _THREADS // (_TILE_COLUMNS // _VECTOR)  # threads that share the rows of a group of columns
_OF_TILE = {
    "for (int c = threadIdx.x % 32 * kWidth": _TILE_ROWS / _WARPS * _TILE_COLUMNS / (32 * _VECTOR),
    "for (int row = threadIdx.x / 32": _TILE_ROWS / _WARPS,
    "for (int row = thread;": _TILE_ROWS / _SHARERS,
    "for (int i = 0; i < threads": _SHARERS,
    "for (int c = threadIdx.x; c < tile.columns()": 1,
    "for (int i = first; i < count": _COLUMNS / _TILE_COLUMNS / 8,  # partials of s, eight at a time
    "i < padded": 1,
}


def _count(phases: int, operands: int, function: Function) -> tuple[int, int, int, Estimate]:
    """phases: passes over the tiles. operands: that move once."""
    waves = _WEIGHTS / _WAVE
    tiles = _TILES * waves
    copied = tiles * (1 + (phases - 1) * max(0, 1 - _KEPT / _TILES))  # those without a slot are copied in each phase
    parts = [Part(function.trace(), 1, "dram")]
    chains = {loop: [text_of(*line) for line in function.main[loop[1]].lines] for loop in function.loops}
    copies = [loop for loop, chain in chains.items() if _is_copy(chain)]
    for loop, chain in chains.items():
        if loop in copies:
            times = copied * _GROUPS / len(copies)
        elif any("each_group<1>" in text for text in chain):  # of weights whose rows are not aligned
            continue
        elif any("each_group<kWide<T>>" in text for text in chain):
            times = tiles * _GROUPS
        elif "while (first < last)" in chain[0]:
            times = 2 * phases * tiles * log2(_WEIGHTS) / sum("while (first < last)" in c[0] for c in chains.values())
        elif "i < mine" in chain[0]:
            times = phases * tiles / sum("i < mine" in c[0] for c in chains.values())
        else:
            times = tiles * next((count for text, count in _OF_TILE.items() if text in chain[0]), 0)
        if times:
            parts.append(Part(function.trace(loop), times, "dram" if loop not in copies else "l2"))
    estimate = Estimate(_SIZE, operands * _SIZE * _ITEM, 0, 0, parts, "~")
    return SMS, _SLOTS * _TILE_BYTES + 20 * 1024, _WARPS, estimate


def _is_copy(chain: list[str]) -> bool:
    wide = any("each_group<kWide<T>>" in text for text in chain)
    return wide and any("fetch(static_cast" in text for text in chain)


CASES: list[tuple[str, str, Callable[[Function], tuple[int, int, int, Estimate]]]] = [
    ("spectral_norm_forward_kernel", "SN rows f32", partial(_count, 3, 2)),
    ("spectral_norm_backward_kernel", "SN rows f32", partial(_count, 2, 3)),
]
