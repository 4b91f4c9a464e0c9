// Spectral normalization of many weights in one cooperative launch: W / sigma, sigma = u^T W v, after power iterations.
//
// A u-first iteration computes s = W v, t = W^T s, then u = s / |s|, v = t / |t|, and sigma = t.v with t scaled by
// 1 / |s|.  v-first swaps the two products.  W is cut into tiles (spectral_norm_plan.h).  A block loads its tiles into
// shared memory, where they stay through all phases.  A grid-wide barrier ends each phase:
//   1. partial s of each tile         2. s of the tile's rows, summed from the partials; partial t of the tile
//   3. sum s and t from the partials, and their squares per chunk      4. W / sigma, u, v, sigma
// Backward, with u and v constant: partial <G, W> of each tile | dW = G / sigma - (<G, W> / sigma^2) u v^T.
// Tiles without a slot in shared memory are read again, from L2.  A wave of weights goes through all phases before the
// next wave, and is no larger than the slots plus a third of L2.  There are no atomics; every sum has a fixed order.
//
// Bytes, for N elements of b bytes: forward reads N b and writes N b, backward reads 2 N b and writes N b.  Vectors and
// partials add 1/16 of N b (float32), which stays in L2.
// Expected on an H200 (4.3 TB/s copy measured, 132 multiprocessors, 227 KB of shared memory per block, 60 MB of L2;
// assumed: 5.5 TB/s from L2, 2.5 us per barrier including the fill and drain of the phase):
//   SNGAN-128, 75 MB in 2 waves:  forward floor 150 MB / 4.3 TB/s = 35 us; + 6 barriers, 15 us; + 44 MB without a
//     slot, read twice more from L2, 16 us: 66 us.  Backward floor 226 MB, 53 us; + 2 barriers, 5 us; + 44 MB of G
//     once more from L2, 8 us: 66 us.
//   116 MB in 3 waves:  forward floor 54 us; + 9 barriers, 23 us; + 68 MB twice, 25 us: 102 us, 53 % of the copy's
//     bandwidth.  Backward floor 81 us; + 3 barriers, 8 us; + 68 MB once, 12 us: 101 us.
// Therefore a measurement should look at barriers and slots first: one more slot per block saves 4 MB of rereads.
#include <cooperative_groups.h>
#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>

#include "common/cuda_block.cuh"
#include "common/cuda_host.h"
#include "cuda/spectral_norm.h"
#include "cuda/spectral_norm_plan.h"
#include "cuda/spectral_norm_tile.cuh"

namespace fastgan {
namespace cuda {
namespace spectral_norm {
namespace {

using device::Accumulate;
using device::block_sum;
using device::load;
using device::store;
using device::Vector;
using device::warp_sum;
using device::with_dtype;

// Shared memory of a block: small arrays, followed by the slots.
template <class T>
struct Shared {
  using A = typename Accumulate<T>::type;
  double warps[kThreads / 32];
  A parts[kThreads * kWide<T>];
  A by_column[kTileColumns];
  A by_row[kTileRows];
};
template <class T>
constexpr std::int64_t kSmallBytes = (sizeof(Shared<T>) + 15) / 16 * 16;

static_assert(kSmallBytes<double> + 2 * kBlock.tile_bytes <= 99 << 10 &&
                  kSmallBytes<__half> + 2 * kBlock.tile_bytes <= 99 << 10,
              "two slots must fit the 99 KB that a block has on sm_86, sm_89 and sm_120");

template <class A>
struct Scales {
  A s, t, sigma;  // u = s * s, v = t * t
};

// The scales if s is the first vector, from the squared norms of both.  The second product used the unscaled first
// vector.  This is a call, because double precision's division and root are long, and a layer takes them once.
template <class A>
__device__ __noinline__ Scales<A> scales_in_order(double first, double second, double eps) {
  const double s = 1 / fmax(sqrt(first), eps);
  const double norm = sqrt(second) * s;
  const double t = 1 / fmax(norm, eps);
  return {static_cast<A>(s), static_cast<A>(s * t), static_cast<A>(norm * norm * t)};
}

template <class T>
class Worker {
 public:
  using A = typename Accumulate<T>::type;
  static constexpr int kWidth = kWide<T>;

  __device__ Worker(const Arguments& arguments, unsigned char* memory)
      : arguments_(arguments),
        shared_(*reinterpret_cast<Shared<T>*>(memory)),
        slots_(memory + kSmallBytes<T>),
        scratch_(static_cast<A*>(arguments.scratch)) {}

  __device__ void forward();
  __device__ void backward();

 private:
  const Arguments& arguments_;
  Shared<T>& shared_;
  unsigned char* slots_;
  A* scratch_;
  int begin_ = 0, end_ = 0;  // layers of this wave

  __device__ const Layer& layer(int l) const { return arguments_.layers[l]; }
  __device__ T* slot(int i) const { return reinterpret_cast<T*>(slots_ + std::int64_t{i} * arguments_.slot_bytes); }
  __device__ static void sync_grid() { cooperative_groups::this_grid().sync(); }

  // ---- tiles ----
  __device__ void fetch(const T* from, const Layer& layer, const Tile& tile, T* to) {
    each_group_of<T>(layer, tile, [&](std::int64_t at, int row, int column, auto width) {
      constexpr int kBytes = decltype(width)::value * static_cast<int>(sizeof(T));
      T* target = to + row * tile.stride + column;
      if constexpr (kBytes >= 4)
        __pipeline_memcpy_async(target, from + at, kBytes);
      else
        *target = from[at];
    });
    const int pad = tile.stride - tile.columns();
    for (int i = threadIdx.x; i < tile.rows * pad; i += kThreads)
      store(to[i / pad * tile.stride + tile.columns() + i % pad], 0);
  }

  // body(tile, its elements in shared memory) for each of this block's tiles of the wave.  Tiles in the first slots
  // stay there from phase to phase; if there are more tiles than slots, the rest alternate between the last two slots.
  template <class Body>
  __device__ void each_tile(const void* Layer::* source, bool first_phase, const Body& body) {
    const int first = layer(begin_).first_tile + blockIdx.x;
    const int last = layer(end_ - 1).first_tile + layer(end_ - 1).tiles();
    const int mine = first < last ? (last - first + gridDim.x - 1) / gridDim.x : 0;
    const int kept = mine <= arguments_.slots ? mine : arguments_.slots - 2;
    const auto place = [&](int i) { return slot(i < kept ? i : kept + (i - kept) % 2); };
    Tile tile = {};
    for (int next = 0; next <= mine; ++next) {
      const Tile current = tile;
      if (next < mine) tile = tile_at(arguments_, first + next * gridDim.x, kWidth);
      if (next < mine && (first_phase || next >= kept)) {
        const Layer& its = layer(tile.layer);
        fetch(static_cast<const T*>(its.*source), its, tile, place(next));
      }
      __pipeline_commit();
      if (next == 0) continue;
      __pipeline_wait_prior(1);
      __syncthreads();
      body(current, place(next - 1));
      __syncthreads();
    }
    __pipeline_wait_prior(0);
  }

  // body(layer, chunk, its first element, whether it is of t) for each of this block's chunks of the wave's vectors.
  template <class Body>
  __device__ void each_chunk(const Body& body) {
    const int base = layer(begin_).first_chunk;
    int l = begin_;
    for (int chunk = base + blockIdx.x;; chunk += gridDim.x) {
      while (l < end_ && chunk >= layer(l).first_chunk + layer(l).s_chunks() + layer(l).t_chunks()) ++l;
      if (l == end_) return;
      const int index = chunk - layer(l).first_chunk;
      const bool of_t = index >= layer(l).s_chunks();
      body(layer(l), chunk, std::int64_t{of_t ? index - layer(l).s_chunks() : index} * kChunk, of_t);
    }
  }

  // ---- products with a tile ----
  // s = tile . by_column: one warp per row.
  __device__ void multiply_rows(const Tile& tile, const T* w, A* parts) {
    for (int row = threadIdx.x / 32; row < tile.rows; row += kThreads / 32) {
      A sum = 0;
      for (int c = threadIdx.x % 32 * kWidth; c < tile.stride; c += 32 * kWidth) {
        const auto values = *reinterpret_cast<const Vector<T, kWidth>*>(w + row * tile.stride + c);
        for (int e = 0; e < kWidth; ++e) sum += static_cast<A>(load(values.at[e])) * shared_.by_column[c + e];
      }
      sum = warp_sum(sum);
      if (threadIdx.x % 32 == 0) parts[row] = sum;
    }
  }

  // t = by_row . tile: one thread per group of columns; spare threads share a group's rows.
  __device__ void multiply_columns(const Tile& tile, const T* w, A* parts) {
    const int groups = tile.stride / kWidth, threads = smaller(kThreads / groups, 32);
    const int group = threadIdx.x % groups, thread = threadIdx.x / groups;
    if (thread < threads) {
      A sums[kWidth] = {};
      for (int row = thread; row < tile.rows; row += threads) {
        const auto values = *reinterpret_cast<const Vector<T, kWidth>*>(w + row * tile.stride + group * kWidth);
        for (int e = 0; e < kWidth; ++e) sums[e] += static_cast<A>(load(values.at[e])) * shared_.by_row[row];
      }
      for (int e = 0; e < kWidth; ++e) shared_.parts[thread * tile.stride + group * kWidth + e] = sums[e];
    }
    __syncthreads();
    for (int c = threadIdx.x; c < tile.columns(); c += kThreads) {
      A sum = 0;
      for (int i = 0; i < threads; ++i) sum += shared_.parts[i * tile.stride + c];
      parts[c] = sum;
    }
  }

  __device__ static A sum_of_parts(const A* parts, int count, std::int64_t length, int first, int step) {
    A sum = 0;
#pragma unroll 8
    for (int i = first; i < count; i += step) sum += parts[i * length];
    return sum;
  }

  // ---- scales ----
  __device__ double sum_over(const double* values, int count) {
    double sum = 0;
    for (int i = threadIdx.x; i < count; i += kThreads) sum += values[i];
    return block_sum<double, kThreads>(sum, shared_.warps);
  }

  // Scales of a layer after s and t are summed.
  __device__ Scales<A> scales_of(const Layer& layer) {
    const double* sums = arguments_.sums + layer.first_chunk;
    const double of_s = sum_over(sums, layer.s_chunks());
    if (arguments_.power_iterations == 0) return {1, 1, static_cast<A>(of_s)};
    const double of_t = sum_over(sums + layer.s_chunks(), layer.t_chunks());
    const Scales<A> scales =
        scales_in_order<A>(arguments_.v_first ? of_t : of_s, arguments_.v_first ? of_s : of_t, arguments_.eps);
    return arguments_.v_first ? Scales<A>{scales.t, scales.s, scales.sigma} : scales;
  }

  // ---- phases ----
  // Fills by_column (for t: by_row) with value(i) of the tile's columns (rows), and with zeros up to the stride.
  template <class Value>
  __device__ void fill(A* to, int count, int padded, const Value& value) {
    for (int i = threadIdx.x; i < padded; i += kThreads) to[i] = i < count ? value(i) : A{0};
    __syncthreads();
  }

  enum class Input { stored, summed, parts };

  // Partial s = W v, or t = W^T u, of each tile.
  __device__ void multiply(bool of_t, Input input, bool first_phase) {
    int scaled = -1;
    A scale = 1;
    each_tile(&Layer::weight, first_phase, [&](const Tile& tile, const T* w) {
      const Layer& its = layer(tile.layer);
      if (input == Input::summed && tile.layer != scaled) {
        const Scales<A> scales = scales_of(its);
        scale = of_t ? scales.s : scales.t;
        scaled = tile.layer;
      }
      const std::int64_t base = of_t ? tile.row : tile.column, length = of_t ? its.rows : its.columns();
      const T* stored = static_cast<const T*>(of_t ? its.u : its.v) + base;
      const A* summed = scratch_ + (of_t ? its.s() : its.t()) + base;
      const A* parts = scratch_ + (of_t ? its.scratch : its.t_parts()) + base;
      const int count = of_t ? its.column_tiles : its.row_tiles;
      fill(of_t ? shared_.by_row : shared_.by_column, of_t ? tile.rows : tile.columns(), of_t ? tile.rows : tile.stride,
           [&](int i) -> A {
             if (input == Input::stored) return static_cast<A>(load(stored[i]));
             if (input == Input::summed) return summed[i] * scale;
             return sum_of_parts(parts + i, count, length, 0, 1);
           });
      if (of_t)
        multiply_columns(tile, w, scratch_ + its.t_parts() + tile.row_tile * its.columns() + tile.column);
      else
        multiply_rows(tile, w, scratch_ + its.scratch + tile.column_tile * its.rows + tile.row);
    });
  }

  // Sums s and t from their partials, and each chunk's contribution to their norms (without iterations: to u.s).
  __device__ void sum_up(bool iterate) {
    each_chunk([&](const Layer& its, int chunk, std::int64_t first, bool of_t) {
      if (!iterate && of_t) return;
      const int lane = threadIdx.x % kChunk, group = threadIdx.x / kChunk;
      const std::int64_t length = of_t ? its.columns() : its.rows, i = first + lane;
      const A* parts = scratch_ + (of_t ? its.t_parts() : its.scratch) + i;
      const int count = of_t ? its.row_tiles : its.column_tiles;
      __syncthreads();
      shared_.parts[threadIdx.x] = i < length ? sum_of_parts(parts, count, length, group, kThreads / kChunk) : A{0};
      __syncthreads();
      A sum = 0;
      if (group == 0 && i < length) {
        for (int g = 0; g < kThreads / kChunk; ++g) sum += shared_.parts[g * kChunk + lane];
        scratch_[(of_t ? its.t() : its.s()) + i] = sum;
      }
      double other = sum;
      if (!iterate && i < length) other = static_cast<double>(load(static_cast<const T*>(its.u)[i]));
      const double total = block_sum<double, kThreads>(static_cast<double>(sum) * other, shared_.warps);
      if (threadIdx.x == 0) arguments_.sums[chunk] = total;
    });
  }

  __device__ void divide() {
    int scaled = -1;
    A scale = 1;
    each_tile(&Layer::weight, false, [&](const Tile& tile, const T* w) {
      const Layer& its = layer(tile.layer);
      if (tile.layer != scaled) scale = 1 / scales_of(its).sigma;
      scaled = tile.layer;
      T* output = static_cast<T*>(its.output);
      each_group_of<T>(its, tile, [&](std::int64_t at, int row, int column, auto width) {
        using Group = Vector<T, decltype(width)::value>;
        Group values = *reinterpret_cast<const Group*>(w + row * tile.stride + column);
        for (T& value : values.at) store(value, static_cast<A>(load(value)) * scale);
        *reinterpret_cast<Group*>(output + at) = values;
      });
    });
  }

  __device__ void write_vectors(bool iterate) {
    const Layer* scaled = nullptr;
    Scales<A> scales = {};
    each_chunk([&](const Layer& its, int chunk, std::int64_t first, bool of_t) {
      if (scaled != &its) scales = scales_of(its);
      scaled = &its;
      const std::int64_t i = first + threadIdx.x;
      A* saved = static_cast<A*>(its.saved);
      if (chunk == its.first_chunk && threadIdx.x == 0) saved[0] = scales.sigma;
      if (threadIdx.x >= kChunk || i >= (of_t ? its.columns() : its.rows)) return;
      T* stored = static_cast<T*>(of_t ? its.v : its.u) + i;
      A value = static_cast<A>(load(*stored));
      if (iterate) {
        value = scratch_[(of_t ? its.t() : its.s()) + i] * (of_t ? scales.t : scales.s);
        store(*stored, value);
      }
      saved[1 + (of_t ? its.rows : 0) + i] = value;
    });
  }
};

template <class T>
__device__ void Worker<T>::forward() {
  const bool iterate = arguments_.power_iterations > 0;
  const std::int64_t products = iterate ? 2 * arguments_.power_iterations : 1;
  for (begin_ = 0; begin_ < arguments_.count; begin_ = end_) {
    end_ = layer(begin_).wave_end;
    for (std::int64_t i = 0; i < products; ++i) {
      const bool second = i % 2 == 1, of_t = iterate && second != arguments_.v_first;
      multiply(of_t, i == 0 ? Input::stored : second ? Input::parts : Input::summed, i == 0);
      sync_grid();
      if (second || !iterate) {
        sum_up(iterate);
        sync_grid();
      }
    }
    divide();
    write_vectors(iterate);
  }
}

template <class T>
__device__ void Worker<T>::backward() {
  for (begin_ = 0; begin_ < arguments_.count; begin_ = end_) {
    end_ = layer(begin_).wave_end;
    each_tile(&Layer::grad, true, [&](const Tile& tile, const T* grad) {
      const Layer& its = layer(tile.layer);
      const T* weight = static_cast<const T*>(its.weight);
      A sum = 0;
      each_group_of<T>(its, tile, [&](std::int64_t at, int row, int column, auto width) {
        using Group = Vector<T, decltype(width)::value>;
        const Group w = *reinterpret_cast<const Group*>(weight + at);
        const Group g = *reinterpret_cast<const Group*>(grad + row * tile.stride + column);
        for (int e = 0; e < width.value; ++e) sum += static_cast<A>(load(w.at[e])) * static_cast<A>(load(g.at[e]));
      });
      const double total = block_sum<double, kThreads>(sum, shared_.warps);
      if (threadIdx.x == 0) arguments_.sums[its.first_tile + tile.index] = total;
    });
    sync_grid();
    int scaled = -1;
    A scale = 1, rank_one = 0;
    each_tile(&Layer::grad, false, [&](const Tile& tile, const T* grad) {
      const Layer& its = layer(tile.layer);
      const A* saved = static_cast<const A*>(its.saved);
      if (tile.layer != scaled) {
        const double product = sum_over(arguments_.sums + its.first_tile, its.tiles());
        scale = 1 / saved[0];
        rank_one = -static_cast<A>(product) * scale * scale;
        scaled = tile.layer;
      }
      const A* u = saved + 1 + tile.row;
      const A* v = saved + 1 + its.rows + tile.column;
      fill(shared_.by_row, tile.rows, tile.rows, [&](int i) { return rank_one * u[i]; });
      fill(shared_.by_column, tile.columns(), tile.columns(), [&](int i) { return v[i]; });
      T* output = static_cast<T*>(its.output);
      each_group_of<T>(its, tile, [&](std::int64_t at, int row, int column, auto width) {
        using Group = Vector<T, decltype(width)::value>;
        Group values = *reinterpret_cast<const Group*>(grad + row * tile.stride + column);
        for (int e = 0; e < width.value; ++e)
          store(values.at[e],
                static_cast<A>(load(values.at[e])) * scale + shared_.by_row[row] * shared_.by_column[column + e]);
        *reinterpret_cast<Group*>(output + at) = values;
      });
    });
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1) forward_kernel(const __grid_constant__ Arguments arguments) {
  FASTGAN_DYNAMIC_SHARED(memory);
  Worker<T>(arguments, memory).forward();
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1) backward_kernel(const __grid_constant__ Arguments arguments) {
  FASTGAN_DYNAMIC_SHARED(memory);
  Worker<T>(arguments, memory).backward();
}

// All blocks of a cooperative launch must be resident at the same time.  Returns how many are, and takes slots from
// `slot_bytes` while none is: other users of the device may hold shared memory.
template <class Kernel>
int resident_blocks(Kernel kernel, const DeviceOf& device, std::int64_t small_bytes, std::int64_t& slot_bytes) {
  for (;; slot_bytes -= kBlock.tile_bytes) {
    int per_multiprocessor = 0;
    FASTGAN_CUDA(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, kernel, kThreads,
                                                               static_cast<std::size_t>(small_bytes + slot_bytes)));
    if (per_multiprocessor > 0) return per_multiprocessor * device.attribute(cudaDevAttrMultiProcessorCount);
    if (slot_bytes < 3 * kBlock.tile_bytes)
      throw std::runtime_error("spectral_norm: a multiprocessor has no room for a block of the kernel");
  }
}

template <class T>
void launch(const SpectralNormLayer* layers, std::int64_t count, const SpectralNormOptions* options,
            cudaStream_t stream) {
  using A = typename Accumulate<T>::type;
  const bool backward = options == nullptr;
  const auto kernel = backward ? &backward_kernel<T> : &forward_kernel<T>;
  const DeviceOf device(layers[0].weight);
  const int shared_bytes_of_block = device.attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  // Set the maximum, not what this launch needs: another thread may set and launch in between.
  FASTGAN_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes_of_block));
  std::int64_t slot_bytes = shared_bytes_of_block - kSmallBytes<T>;
  const int resident = resident_blocks(kernel, device, kSmallBytes<T>, slot_bytes);
  const Machine machine{std::min(resident, device.attribute(cudaDevAttrMultiProcessorCount)), slot_bytes,
                        device.attribute(cudaDevAttrL2CacheSize)};
  for (std::int64_t first = 0; first < count; first += kMaxLayers) {
    const int now = static_cast<int>(std::min<std::int64_t>(count - first, kMaxLayers));
    Plan plan = make_plan(layers + first, now, sizeof(T), machine, backward);
    Arguments& arguments = plan.arguments;
    if (!backward) {
      arguments.power_iterations = options->power_iterations;
      arguments.eps = options->eps;
      arguments.v_first = options->v_first;
    }
    const std::int64_t sum_bytes = plan.sums * static_cast<std::int64_t>(sizeof(double));
    const std::int64_t vector_bytes = backward ? 0 : plan.scratch * static_cast<std::int64_t>(sizeof(A));
    const Scratch scratch(device, static_cast<std::size_t>(sum_bytes + vector_bytes), stream);
    arguments.sums = static_cast<double*>(scratch.data());
    arguments.scratch = arguments.sums + plan.sums;
    const int shared_bytes = static_cast<int>(kSmallBytes<T>) + arguments.slots * arguments.slot_bytes;
    void* parameters[] = {&arguments};
    FASTGAN_CUDA(cudaLaunchCooperativeKernel(kernel, dim3(static_cast<unsigned>(plan.blocks)), dim3(kThreads),
                                             parameters, static_cast<std::size_t>(shared_bytes), stream));
  }
}

void launch(Dtype dtype, const SpectralNormLayer* layers, std::int64_t count, const SpectralNormOptions* options,
            void* stream) {
  if (count == 0) return;
  const auto on = static_cast<cudaStream_t>(stream);
  with_dtype(dtype, [&](auto type) { launch<decltype(type)>(layers, count, options, on); });
}

}  // namespace
}  // namespace spectral_norm

void spectral_norm_forward(Dtype dtype, const SpectralNormLayer* layers, std::int64_t count,
                           const SpectralNormOptions& options, void* stream) {
  spectral_norm::launch(dtype, layers, count, &options, stream);
}

void spectral_norm_backward(Dtype dtype, const SpectralNormLayer* layers, std::int64_t count, void* stream) {
  spectral_norm::launch(dtype, layers, count, nullptr, stream);
}

}  // namespace cuda
}  // namespace fastgan
