// A tile of a weight: its position, and how a block visits its elements.
#pragma once

#include <cstdint>

#include "common/cuda_block.cuh"
#include "cuda/spectral_norm_plan.h"

namespace fastgan {
namespace cuda {
namespace spectral_norm {
namespace {

using device::kWide;

struct Tile {
  int layer, index;  // index: among the tiles of its layer
  int column_tile, row_tile;
  std::int64_t row, column;  // first row and first column
  std::int64_t outer_index, inner_index;
  int rows, outer, inner;
  int stride;  // of a row in shared memory: number of columns, rounded up to a multiple of 16 bytes
  __device__ int columns() const { return outer * inner; }
};

__device__ int smaller(std::int64_t a, std::int64_t b) { return static_cast<int>(a < b ? a : b); }

__device__ Tile tile_at(const Arguments& arguments, int number, int wide) {
  int first = 0, last = arguments.count - 1;
  while (first < last) {
    const int middle = (first + last + 1) / 2;
    if (arguments.layers[middle].first_tile <= number)
      first = middle;
    else
      last = middle - 1;
  }
  const Layer& layer = arguments.layers[first];
  Tile tile;
  tile.layer = first;
  tile.index = number - layer.first_tile;
  tile.row_tile = tile.index / layer.column_tiles;
  tile.column_tile = tile.index % layer.column_tiles;
  tile.outer_index = std::int64_t{tile.column_tile / layer.inner_tiles} * layer.tile_outer;
  tile.inner_index = std::int64_t{tile.column_tile % layer.inner_tiles} * layer.tile_inner;
  tile.row = std::int64_t{tile.row_tile} * layer.tile_rows;
  tile.column = tile.outer_index * layer.inner + tile.inner_index;
  tile.rows = smaller(layer.tile_rows, layer.rows - tile.row);
  tile.outer = smaller(layer.tile_outer, layer.outer - tile.outer_index);
  tile.inner = smaller(layer.tile_inner, layer.inner - tile.inner_index);
  tile.stride = (tile.columns() + wide - 1) / wide * wide;
  return tile;
}

// The whole block calls visit(offset in the weight, row and column in the tile) for every kWidth elements.
template <int kWidth, class Visit>
__device__ void each_group(const Layer& layer, const Tile& tile, const Visit& visit) {
  const int line = tile.inner / kWidth, slab = line * tile.rows;
  int k = threadIdx.x % line, row = threadIdx.x / line % tile.rows, outer = threadIdx.x / slab;
  // Steps instead of divisions in the loop; each carries at most once.
  const int step_k = kThreads % line, step_row = kThreads / line % tile.rows, step_outer = kThreads / slab;
#pragma unroll(kWidth == 1 ? 1 : 4)
  for (int i = threadIdx.x; i < tile.outer * slab; i += kThreads) {
    const std::int64_t at = (tile.outer_index + outer) * layer.rows + tile.row + row;
    visit(at * layer.inner + tile.inner_index + k * kWidth, row, outer * tile.inner + k * kWidth);
    k += step_k;
    row += step_row;
    outer += step_outer;
    if (k >= line) k -= line, ++row;
    if (row >= tile.rows) row -= tile.rows, ++outer;
  }
}

// The same with a width for each case. The type of visit's last argument gives the width.
template <int kWidth>
struct Width {
  static constexpr int value = kWidth;
};
template <class T, class Visit>
__device__ void each_group_of(const Layer& layer, const Tile& tile, const Visit& visit) {
  if (layer.vector)
    each_group<kWide<T>>(layer, tile,
                         [&](std::int64_t at, int row, int column) { visit(at, row, column, Width<kWide<T>>{}); });
  else
    each_group<1>(layer, tile, [&](std::int64_t at, int row, int column) { visit(at, row, column, Width<1>{}); });
}

}  // namespace
}  // namespace spectral_norm
}  // namespace cuda
}  // namespace fastgan
