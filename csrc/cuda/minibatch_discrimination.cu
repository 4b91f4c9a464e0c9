// Minibatch discrimination: o_ib = sum_j exp(-sum_c |m_ibc - m_jbc|), with first and second derivatives.  Formulas and
// derivation are in cpu/minibatch_discrimination.cpp.
//
// m is (B, C, N), so that a tile of samples is contiguous.  A block has one b and kOwn samples i.  All other samples
// pass through shared memory, kOther samples and kDepth dims at a time.  A thread has 4 x 8 pairs in registers, or half
// as many for double or with tangents.  Per dim it needs 3 reads of 16 bytes from shared memory and, in the forward, 64
// operations.  Each pair is computed from both sides: updating both samples at once would need atomics or partial sums
// of N^2 B C / kOwn.  The sum of a gradient's dim is reduced over the 8 threads of a row by 4 shuffles and kept in
// shared memory.  With more than kDims dims, several blocks share the output, and each computes all distances.  Every
// sum has a fixed order.
//
// Operations for N^2 B pairs: forward 2 C (subtract; add the magnitude) and an exp, about 10; backward 2 C + 4 C;
// double backward 6 C + 4 C.  Bytes: each operand is read N / kOwn times, all but the first time from L2.
// Expected on an H200 (33 T lane-operations/s), N = 4096, B = 100, C = 16: the floor of the forward is
// N^2 B (2 C + 1) / 33 T = 1.7 ms; with 10 operations per exp and 11 % of instructions for reads, 2.4 ms.  N = 64 gives
// 100 blocks for 132 multiprocessors; Triton's smaller tiles should be faster there.
#include "cuda/minibatch_discrimination.h"

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <stdexcept>

#include "common/cuda_block.cuh"
#include "common/cuda_host.h"

namespace fastgan {
namespace cuda {
namespace minibatch_discrimination {
namespace {

using device::Accumulate;
using device::load;
using device::store;
using device::Vector;
using device::with_dtype;

constexpr int kThreads = 128;
constexpr int kLanes = 8;    // threads that share the same samples i
constexpr int kOwnEach = 4;  // samples i per thread
constexpr int kOwn = kThreads / kLanes * kOwnEach;
constexpr int kDepth = 16;
constexpr int kDims = 32;
// Samples j per thread and per tile, limited by registers; with tangents a pair needs two numbers.
template <class A, bool kSecond>
constexpr int kOtherEach = (kSecond ? 16 : 32) / static_cast<int>(sizeof(A));
template <class A, bool kSecond>
constexpr int kOther = kLanes * kOtherEach<A, kSecond>;

__device__ inline float exponential(float x) { return expf(x); }
__device__ inline double exponential(double x) { return exp(x); }
__device__ inline float magnitude(float x) { return fabsf(x); }
__device__ inline double magnitude(double x) { return fabs(x); }
__device__ inline float sign(float x) { return copysignf(1, x); }
__device__ inline double sign(double x) { return copysign(1.0, x); }

template <class A, bool kSecond>
struct Shared {
  std::int64_t own_segment[kOwn], other_segment[kOther<A, kSecond>];
  A own[kDepth][kOwn], other[kDepth][kOther<A, kSecond>];
  A own_w[kSecond ? kDepth : 1][kOwn], other_w[kSecond ? kDepth : 1][kOther<A, kSecond>];
  A own_h[kOwn], other_h[kOther<A, kSecond>];
  A sums[kDims][kOwn];
};
static_assert(sizeof(Shared<double, true>) <= 48 << 10, "a block has this much without opting in to more");

// Copies 16 bytes at a time; `from` must be aligned to that.
template <int kCount, class A>
__device__ void read(const A* from, A* to) {
  constexpr int kWidth = device::kWide<A>;
#pragma unroll
  for (int k = 0; k < kCount; k += kWidth) {
    const auto values = *reinterpret_cast<const Vector<A, kWidth>*>(from + k);
#pragma unroll
    for (int e = 0; e < kWidth; ++e) to[k + e] = values.at[e];
  }
}

template <class T, bool kSecond>
class Block {
 public:
  using A = typename Accumulate<T>::type;
  static constexpr int kEach = kOtherEach<A, kSecond>, kTile = kOther<A, kSecond>, kRun = kEach < 4 ? kEach : 4;

  __device__ Block(const Discrimination& t, unsigned char* memory)
      : t_(t),
        shared_(*reinterpret_cast<Shared<A, kSecond>*>(memory)),
        lane_(threadIdx.x % kLanes),
        group_(threadIdx.x / kLanes) {
    const std::int64_t tiles = (t.rows + kOwn - 1) / kOwn, index = blockIdx.x / tiles;
    row_ = blockIdx.x % tiles * kOwn;
    b_ = index % t.kernels;
    c_begin_ = index / t.kernels * kDims;
    c_end_ = t.dims < c_begin_ + kDims ? t.dims : c_begin_ + kDims;
  }

  __device__ void forward() {
    A sums[kOwnEach] = {};
    each_tile([&](std::int64_t j0) {
      A d[kOwnEach][kEach], a[kOwnEach][kEach];
      compare(j0, d, a);
      each_pair(limits_of(j0, t_.exclude_self), [&](int r, int k, bool compared) {
        if (compared) sums[r] += exponential(-d[r][k]);
      });
    });
    write_sample(t_.o, sum_of_lanes(sums));
  }

  // Without w, writes dm to by_m.
  __device__ void gradients() {
    for (int at = threadIdx.x; at < kDims * kOwn; at += kThreads) (&shared_.sums[0][0])[at] = 0;
    A sums[kOwnEach] = {};
    each_tile([&](std::int64_t j0) {
      A q[kOwnEach][kEach], a[kOwnEach][kEach];
      compare(j0, q, a);
      each_pair(limits_of(j0, true), [&](int r, int k, bool compared) {
        A e = compared ? -exponential(-q[r][k]) : A{0};
        const A both = shared_.own_h[own_at() + r] + shared_.other_h[other_at(k)];
        if (kSecond) {
          e *= a[r][k];
          sums[r] += e;
        }
        q[r][k] = (kSecond ? -e : e) * both;
      });
      if (t_.by_m != nullptr) spread(j0, q);
    });
    if (kSecond && t_.by_h != nullptr && c_begin_ == 0) write_sample(t_.by_h, sum_of_lanes(sums));
    if (t_.by_m != nullptr) write_dims();
  }

 private:
  const Discrimination& t_;
  Shared<A, kSecond>& shared_;
  int lane_, group_;
  std::int64_t row_, b_, c_begin_, c_end_;

  // Positions of this thread's samples in the tiles.  Neighboring threads read neighboring banks.
  __device__ int own_at() const { return group_ * kOwnEach; }
  __device__ int other_at(int k) const { return k / kRun * (kLanes * kRun) + lane_ * kRun + k % kRun; }

  template <class Body>
  __device__ void each_tile(const Body& body) {
    for (std::int64_t j0 = 0; j0 < t_.samples; j0 += kTile) {
      __syncthreads();
      fetch_sample_data(j0);
      body(j0);
    }
  }

  // Within a tile, 32 bits count: the number of its samples j, and the place that own sample 0 has or would have in it.
  struct Limits {
    int samples, self;
  };

  __device__ Limits limits_of(std::int64_t j0, bool exclude_self) const {
    const std::int64_t left = t_.samples - j0, self = t_.first + row_ - j0;
    const bool meet = exclude_self && -kOwn < self && self < kTile;
    return {left < kTile ? static_cast<int>(left) : kTile, meet ? static_cast<int>(self) : kTile};
  }

  __device__ bool compared(int r, int k, const Limits& limits) const {
    if (other_at(k) >= limits.samples || limits.self + own_at() + r == other_at(k)) return false;
    return t_.segments == nullptr || shared_.own_segment[own_at() + r] == shared_.other_segment[other_at(k)];
  }

  // body(r, k, compared).  Most tiles are whole, have no sample of this block and need no test of a pair.
  template <class Body>
  __device__ void each_pair(const Limits& limits, const Body& body) const {
    const bool all = limits.samples == kTile && limits.self == kTile && t_.segments == nullptr;
    if (all) {
#pragma unroll
      for (int r = 0; r < kOwnEach; ++r)
#pragma unroll
        for (int k = 0; k < kEach; ++k) body(r, k, true);
    } else {
#pragma unroll
      for (int r = 0; r < kOwnEach; ++r)
#pragma unroll
        for (int k = 0; k < kEach; ++k) body(r, k, compared(r, k, limits));
    }
  }

  // body(position in the tile, sample) for existing samples of a tile, and none(position) for the rest.
  template <class Body, class None>
  __device__ static void each_sample(int size, std::int64_t begin, std::int64_t end, const Body& body,
                                     const None& none) {
    for (int at = threadIdx.x; at < size; at += kThreads) {
      if (begin + at < end)
        body(at, begin + at);
      else
        none(at);
    }
  }

  __device__ void fetch_sample_data(std::int64_t j0) {
    const std::int64_t i0 = t_.first + row_, i_end = t_.first + t_.rows;
    if (t_.segments != nullptr) {
      each_sample(
          kOwn, i0, i_end, [&](int at, std::int64_t i) { shared_.own_segment[at] = t_.segments[i]; },
          [&](int at) { shared_.own_segment[at] = 0; });
      each_sample(
          kTile, j0, t_.samples, [&](int at, std::int64_t j) { shared_.other_segment[at] = t_.segments[j]; },
          [&](int at) { shared_.other_segment[at] = 0; });
    }
    if (t_.h == nullptr) return;
    const T* h = static_cast<const T*>(t_.h) + b_ * t_.samples;
    each_sample(
        kOwn, i0, i_end, [&](int at, std::int64_t i) { shared_.own_h[at] = load(h[i]); },
        [&](int at) { shared_.own_h[at] = 0; });
    each_sample(
        kTile, j0, t_.samples, [&](int at, std::int64_t j) { shared_.other_h[at] = load(h[j]); },
        [&](int at) { shared_.other_h[at] = 0; });
  }

  // The loads of a thread are independent and unrolled, so that they wait for memory together.
  template <int kSize>
  __device__ void fetch(const void* tensor, A (*to)[kSize], std::int64_t c0, std::int64_t begin, std::int64_t end) {
    static_assert(kThreads % kSize == 0, "a thread copies one sample's dims");
    constexpr int kStep = kThreads / kSize;
    const int place = threadIdx.x % kSize, first = threadIdx.x / kSize;
    const int depth = static_cast<int>(t_.dims - c0 < kDepth ? t_.dims - c0 : kDepth);
    const int left = begin + place < end ? depth - first : 0;
    const T* from = static_cast<const T*>(tensor) + (b_ * t_.dims + c0 + first) * t_.samples + begin + place;
    const std::int64_t step = kStep * t_.samples;
#pragma unroll
    for (int k = 0; k < kDepth / kStep; ++k, from += step)
      to[first + k * kStep][place] = k * kStep < left ? static_cast<A>(load(*from)) : A{0};
  }

  // Loads kDepth dims of both tiles.
  __device__ void fetch_dims(std::int64_t c0, std::int64_t j0) {
    const std::int64_t i0 = t_.first + row_, i_end = t_.first + t_.rows;
    __syncthreads();
    fetch(t_.m, shared_.own, c0, i0, i_end);
    fetch(t_.m, shared_.other, c0, j0, t_.samples);
    if (kSecond) {
      fetch(t_.w, shared_.own_w, c0, i0, i_end);
      fetch(t_.w, shared_.other_w, c0, j0, t_.samples);
    }
    __syncthreads();
  }

  __device__ void read_others(const A* from, A* to) const {
#pragma unroll
    for (int k = 0; k < kEach; k += kRun) read<kRun>(from + other_at(k), to + k);
  }

  // d: distances of this thread's pairs; a: those of their tangents.
  __device__ void compare(std::int64_t j0, A (*d)[kEach], A (*a)[kEach]) {
#pragma unroll
    for (int r = 0; r < kOwnEach; ++r)
#pragma unroll
      for (int k = 0; k < kEach; ++k) d[r][k] = a[r][k] = 0;
    for (std::int64_t c0 = 0; c0 < t_.dims; c0 += kDepth) {
      fetch_dims(c0, j0);
      const int depth = static_cast<int>(t_.dims - c0 < kDepth ? t_.dims - c0 : kDepth);
      for (int c = 0; c < depth; ++c) {
        A own[kOwnEach], other[kEach], own_w[kOwnEach], other_w[kEach];
        read<kOwnEach>(shared_.own[c] + own_at(), own);
        read_others(shared_.other[c], other);
        if (kSecond) {
          read<kOwnEach>(shared_.own_w[c] + own_at(), own_w);
          read_others(shared_.other_w[c], other_w);
        }
#pragma unroll
        for (int r = 0; r < kOwnEach; ++r)
#pragma unroll
          for (int k = 0; k < kEach; ++k) {
            const A apart = own[r] - other[k];
            d[r][k] += magnitude(apart);
            if (kSecond && apart != 0) a[r][k] += sign(apart) * (own_w[r] - other_w[k]);
          }
      }
    }
  }

  // Adds q sign(m_i - m_j), summed over the tile, to the sums of this block's dims.
  __device__ void spread(std::int64_t j0, A (*q)[kEach]) {
    for (std::int64_t c0 = c_begin_; c0 < c_end_; c0 += kDepth) {
      if (t_.dims > kDepth) fetch_dims(c0, j0);  // otherwise they are already loaded
      const int depth = static_cast<int>(c_end_ - c0 < kDepth ? c_end_ - c0 : kDepth);
      for (int c = 0; c < depth; ++c) {
        A own[kOwnEach], other[kEach], given[kOwnEach] = {};
        read<kOwnEach>(shared_.own[c] + own_at(), own);
        read_others(shared_.other[c], other);
#pragma unroll
        for (int r = 0; r < kOwnEach; ++r)
#pragma unroll
          for (int k = 0; k < kEach; ++k) {
            const A apart = own[r] - other[k];
            if (apart != 0) given[r] += sign(apart) * q[r][k];
          }
        const A sum = sum_of_lanes(given);
        if (lane_ % 2 == 0) shared_.sums[c0 - c_begin_ + c][own_at() + lane_ / 2] += sum;
      }
    }
  }

  // Sums four numbers over the kLanes threads of a group; each thread gets number lane / 2.
  __device__ A sum_of_lanes(const A* x) const {
    static_assert(kOwnEach == 4 && kLanes == 8);
    const bool high = lane_ & 4, odd = lane_ & 2;
    A first = high ? x[2] : x[0], second = high ? x[3] : x[1];
    first += __shfl_xor_sync(0xffffffffu, high ? x[0] : x[2], 4);
    second += __shfl_xor_sync(0xffffffffu, high ? x[1] : x[3], 4);
    A sum = odd ? second : first;
    sum += __shfl_xor_sync(0xffffffffu, odd ? first : second, 2);
    return sum + __shfl_xor_sync(0xffffffffu, sum, 1);
  }

  __device__ void write_sample(void* tensor, A sum) const {
    const std::int64_t row = row_ + own_at() + lane_ / 2;
    if (lane_ % 2 == 0 && row < t_.rows) store(static_cast<T*>(tensor)[row * t_.kernels + b_], sum);
  }

  __device__ void write_dims() const {
    __syncthreads();
    const int width = static_cast<int>(c_end_ - c_begin_);
    for (int at = threadIdx.x; at < width * kOwn; at += kThreads) {
      const std::int64_t row = row_ + at / width;
      const int c = at % width;
      if (row < t_.rows)
        store(static_cast<T*>(t_.by_m)[(row * t_.kernels + b_) * t_.dims + c_begin_ + c], shared_.sums[c][at / width]);
    }
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads, 4) similarities_kernel(const __grid_constant__ Discrimination t) {
  FASTGAN_DYNAMIC_SHARED(memory);
  Block<T, false>(t, memory).forward();
}

template <class T>
__global__ void __launch_bounds__(kThreads, 4) gradients_kernel(const __grid_constant__ Discrimination t) {
  FASTGAN_DYNAMIC_SHARED(memory);
  Block<T, false>(t, memory).gradients();
}

template <class T>
__global__ void __launch_bounds__(kThreads, 4) second_gradients_kernel(const __grid_constant__ Discrimination t) {
  FASTGAN_DYNAMIC_SHARED(memory);
  Block<T, true>(t, memory).gradients();
}

enum class Order { forward, backward, double_backward };

template <class T>
void launch(Order order, const Discrimination& t, cudaStream_t stream) {
  using A = typename Accumulate<T>::type;
  const DeviceOf device(t.m);
  const std::int64_t tiles = (t.rows + kOwn - 1) / kOwn;
  const std::int64_t parts = t.by_m == nullptr ? 1 : (t.dims + kDims - 1) / kDims;
  const std::int64_t blocks = tiles * t.kernels * parts;
  if (blocks > INT32_MAX) throw std::invalid_argument("the problem needs more blocks than one launch supports");
  const auto kernel = order == Order::forward    ? similarities_kernel<T>
                      : order == Order::backward ? gradients_kernel<T>
                                                 : second_gradients_kernel<T>;
  const std::size_t bytes = order == Order::double_backward ? sizeof(Shared<A, true>) : sizeof(Shared<A, false>);
  Discrimination argument = t;
  void* parameters[] = {&argument};
  FASTGAN_CUDA(
      cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), parameters, bytes, stream));
}

void launch(Order order, Dtype dtype, const Discrimination& t, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  with_dtype(dtype, [&](auto type) { launch<decltype(type)>(order, t, on); });
}

}  // namespace
}  // namespace minibatch_discrimination

void minibatch_discrimination_forward(Dtype dtype, const Discrimination& t, void* stream) {
  minibatch_discrimination::launch(minibatch_discrimination::Order::forward, dtype, t, stream);
}

void minibatch_discrimination_backward(Dtype dtype, const Discrimination& t, void* stream) {
  minibatch_discrimination::launch(minibatch_discrimination::Order::backward, dtype, t, stream);
}

void minibatch_discrimination_double_backward(Dtype dtype, const Discrimination& t, void* stream) {
  minibatch_discrimination::launch(minibatch_discrimination::Order::double_backward, dtype, t, stream);
}

}  // namespace cuda
}  // namespace fastgan
