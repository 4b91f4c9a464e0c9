"""Grids of the Triton kernels for sizes that do not fit into the memory of a test."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")
tl = pytest.importorskip("triton.language")

from fastgan.ops.bias_act.triton_activations import _columns  # noqa: E402
from fastgan.ops.norm import triton_kernels as norm  # noqa: E402
from fastgan.ops.norm.layout import Layout  # noqa: E402
from tests.harness import BACKENDS, device_of  # noqa: E402

_LONGEST = 65535  # of a grid's second axis on NVIDIA; the first has 2^31 - 1


@triton.jit
def _ranges(ranges_ptr, outer):
    _c, begin, end, _column = _columns(outer, 1, tl.int64, 1)
    tl.store(ranges_ptr + 2 * tl.program_id(1), begin)
    tl.store(ranges_ptr + 2 * tl.program_id(1) + 1, end)


@pytest.mark.parametrize("backend", BACKENDS[2:3])
def test_parts_of_more_positions_than_32_bits_count_are_whole(backend):
    outer, parts = 33_554_432, 512  # channels_last: 32 images of 1024 x 1024
    ranges = torch.zeros(parts, 2, dtype=torch.int64, device=device_of(backend))
    _ranges[(1, parts)](ranges, outer)
    assert ranges[0, 0] == 0
    assert ranges[-1, 1] == outer
    assert torch.equal(ranges[1:, 0], ranges[:-1, 1])


@pytest.mark.parametrize(
    "layout",
    [
        Layout(1, 1, 64, 32 * 1024 * 1024, 64, True),  # a batch norm over many positions
        Layout(100_000, 1, 64, 16, 8, True),  # many samples
        Layout(1, 100_000, 64, 64, 64),
        Layout(1, 16, 4_000_000, 64, 4_000_000),
    ],
)
def test_every_grid_of_channels_can_be_launched(layout):
    x = torch.empty(0)
    for every in (False, True):
        grid = norm._tiles(x, layout, norm._tile(x, layout), every=every)
        assert len(grid) == 2
        assert grid[0] < 2**31
        assert 1 <= grid[1] <= _LONGEST


@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize(
    ("segments", "channels", "inner"), [(1000, 3, 7), (37, 1, 70_001), (129, 5, 2049), (1, 2, 10_000_019), (4097, 1, 1)]
)
def test_every_program_of_channels_has_a_tile(segments, channels, inner, every):
    """A part without positions would divide by their count."""
    layout = Layout(1, segments, channels, inner, channels)
    x = torch.empty(0)
    tile = norm._tile(x, layout)
    _tiles, parts = norm._tiles(x, layout, tile, every=every)
    count = triton.cdiv(segments, tile["TILE_S"]) * triton.cdiv(inner, tile["TILE_Q"])
    each = triton.cdiv(count, parts)
    assert (parts - 1) * each < count <= parts * each


@pytest.mark.parametrize("rows", [1, 7, 256, 257])
@pytest.mark.parametrize("size", [1, 4096, 16_385, 262_144, 10_000_019])
def test_programs_share_rows_only_if_these_are_long_and_few(rows, size):
    parts = norm._row_parts(Layout(rows, 1, size, 1, 1))
    blocks = triton.cdiv(size, norm._LONG_BLOCK)
    assert (parts - 1) * triton.cdiv(blocks, parts) < blocks
    assert (parts > 1) == (rows <= 256 and size > 3 * norm._LONG_BLOCK)
