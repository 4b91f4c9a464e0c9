// Cuts the weights of a call into tiles, and groups the tiles into waves.
//
// A tile is a range of rows by a range of columns of one weight, and fits in a slot of shared memory.  Its columns are
// consecutive.  In memory (outer, rows, inner) they are part of one line or several whole lines.  A wave is a run of
// weights that fits in the slots of all blocks plus the part of L2 that reliably survives between its phases.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include "cuda/spectral_norm.h"

// The emulation in tests/cuda uses smaller blocks and smaller tiles.
#ifndef FASTGAN_SPECTRAL_NORM_BLOCK
#define FASTGAN_SPECTRAL_NORM_BLOCK 512, 32768, 512
#endif

namespace fastgan {
namespace cuda {
namespace spectral_norm {

struct Block {
  int threads, tile_bytes, tile_columns;
};
constexpr Block kBlock{FASTGAN_SPECTRAL_NORM_BLOCK};
constexpr int kThreads = kBlock.threads;
constexpr int kTileColumns = kBlock.tile_columns;
constexpr int kTileRows = 256;
constexpr int kLeastTileBytes = kBlock.tile_bytes / 8;
constexpr int kChunk = kThreads / 4;  // elements of s or t that a block sums at a time
static_assert(kTileColumns * 8 <= kLeastTileBytes, "a tile must hold a row");

// Kernel parameters are limited to 32,764 bytes since CUDA 12.1, and to 4,096 before.
#if CUDART_VERSION >= 12010
constexpr int kMaxLayers = 128;
#else
constexpr int kMaxLayers = 30;
#endif

struct Layer {
  const void* weight;
  void* output;
  void* u;
  void* v;
  void* saved;
  const void* grad;
  std::int64_t outer, rows, inner;
  std::int64_t scratch;  // offset of its elements: partials of s (column_tiles, rows) and t (row_tiles, columns), s, t
  int tile_rows, tile_outer, tile_inner;
  int row_tiles, column_tiles, inner_tiles, first_tile, first_chunk;  // inner_tiles: column tiles of a line
  int wave_end;  // for the first layer of a wave: one past its last layer
  bool vector;   // whether 16-byte accesses are aligned

  __host__ __device__ std::int64_t columns() const { return outer * inner; }
  __host__ __device__ int tiles() const { return row_tiles * column_tiles; }
  __host__ __device__ int s_chunks() const { return static_cast<int>((rows + kChunk - 1) / kChunk); }
  __host__ __device__ int t_chunks() const { return static_cast<int>((columns() + kChunk - 1) / kChunk); }
  __host__ __device__ std::int64_t t_parts() const { return scratch + column_tiles * rows; }
  __host__ __device__ std::int64_t s() const { return t_parts() + row_tiles * columns(); }
  __host__ __device__ std::int64_t t() const { return s() + rows; }
  __host__ __device__ std::int64_t scratch_end() const { return t() + columns(); }
};

struct Arguments {
  Layer layers[kMaxLayers];
  int count, slots, slot_bytes;
  std::int64_t power_iterations;
  double eps;
  bool v_first;
  double* sums;   // sums of squares, one per chunk; backward: of G W, one per tile
  void* scratch;  // in the accumulation type
};
static_assert(sizeof(Arguments) <= (kMaxLayers > 30 ? 32764 : 4096), "arguments must fit a launch");
static_assert(std::is_trivially_copyable<Arguments>::value, "arguments must be copyable as bytes");

struct Machine {
  int multiprocessors;                  // that hold a block
  std::int64_t shared_bytes, l2_bytes;  // shared_bytes: for the slots of one block
};

struct Plan {
  Arguments arguments;
  int blocks;
  std::int64_t scratch, sums;  // elements
};

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

inline bool aligned(const SpectralNormLayer& layer, int wide, bool backward) {
  const auto at = [](const void* p) { return reinterpret_cast<std::uintptr_t>(p); };
  const auto address = at(layer.weight) | at(layer.output) | (backward ? at(layer.grad) : 0);
  return address % 16 == 0 && layer.inner % wide == 0;
}

inline void cut(Layer& to, int element_bytes, int tile_bytes) {
  const int wide = 16 / element_bytes;
  to.tile_inner = static_cast<int>(std::min<std::int64_t>(to.inner, kTileColumns));
  const std::int64_t lines = std::max<std::int64_t>(1, kTileColumns / to.inner);
  to.tile_outer = static_cast<int>(std::min(to.outer, lines));
  const std::int64_t stride = ceil_div(to.tile_outer * to.tile_inner, wide) * wide;
  to.tile_rows = static_cast<int>(std::min<std::int64_t>({to.rows, kTileRows, tile_bytes / (stride * element_bytes)}));
  const std::int64_t row_tiles = ceil_div(to.rows, to.tile_rows);
  const std::int64_t inner_tiles = ceil_div(to.inner, to.tile_inner);
  const std::int64_t column_tiles = ceil_div(to.outer, to.tile_outer) * inner_tiles;
  if (row_tiles * column_tiles > 1 << 30) throw std::invalid_argument("a weight is too large for one launch");
  to.row_tiles = static_cast<int>(row_tiles);
  to.column_tiles = static_cast<int>(column_tiles);
  to.inner_tiles = static_cast<int>(inner_tiles);
}

// A plan for layers [0, count), with count <= kMaxLayers.
inline Plan make_plan(const SpectralNormLayer* layers, int count, int element_bytes, const Machine& machine,
                      bool backward) {
  std::int64_t bytes = 0;
  for (int l = 0; l < count; ++l) bytes += layers[l].size() * element_bytes;
  // Use smaller tiles if larger ones would leave multiprocessors idle.
  int tile_bytes = kBlock.tile_bytes;
  while (tile_bytes > kLeastTileBytes && bytes < std::int64_t{tile_bytes} * machine.multiprocessors) tile_bytes /= 2;
  const std::int64_t slots = machine.shared_bytes / tile_bytes;
  if (slots < 2) throw std::runtime_error("the device has too little shared memory");
  const std::int64_t wave_bytes = machine.multiprocessors * slots * tile_bytes + machine.l2_bytes / 3;

  Plan plan = {};
  Arguments& arguments = plan.arguments;
  arguments.count = count;
  arguments.slot_bytes = tile_bytes;
  int tiles = 0, chunks = 0, wave = 0, wave_first_tile = 0, most_tiles = 0;
  std::int64_t filled = 0;
  for (int l = 0; l < count; ++l) {
    const SpectralNormLayer& from = layers[l];
    Layer& to = arguments.layers[l];
    to.weight = from.weight, to.output = from.output, to.grad = from.grad;
    to.u = from.u, to.v = from.v, to.saved = from.saved;
    to.outer = from.outer, to.rows = from.rows, to.inner = from.inner;
    to.vector = aligned(from, 16 / element_bytes, backward);
    cut(to, element_bytes, tile_bytes);
    to.scratch = plan.scratch;
    plan.scratch = to.scratch_end();
    to.first_tile = tiles;
    to.first_chunk = chunks;
    const std::int64_t size = from.size() * element_bytes;
    if (l > wave && filled + size > wave_bytes) wave = l, filled = 0, wave_first_tile = tiles;
    filled += size;
    tiles += to.tiles();
    chunks += to.s_chunks() + to.t_chunks();
    arguments.layers[wave].wave_end = l + 1;
    most_tiles = std::max(most_tiles, tiles - wave_first_tile);
  }
  plan.blocks = std::min(machine.multiprocessors, most_tiles);
  plan.sums = backward ? tiles : chunks;
  arguments.slots = static_cast<int>(std::max<std::int64_t>(2, std::min(slots, ceil_div(most_tiles, plan.blocks))));
  return plan;
}

}  // namespace spectral_norm
}  // namespace cuda
}  // namespace fastgan
