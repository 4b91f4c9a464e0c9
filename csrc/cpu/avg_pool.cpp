// Average pooling with windows that tile the input, and its transpose.  Memory-bound: one read and one write.
//
// Both process a row of pooled elements, together with the kd kh input rows under it, one line at a time.  The window
// width is a compile-time constant if it is 2, the usual case: with a variable width the compiler cannot deinterleave
// lines.  Elements are added one by one, then divided, in PyTorch's order.  The results are the same bits, so the next
// layer sees the same signs.
#include "cpu/avg_pool.h"

#include <type_traits>

#include "common/dtype.h"
#include "common/workspace.h"

namespace fastgan {
namespace FASTGAN_ISA {
namespace {

constexpr std::int64_t kLine = 1024;       // pooled elements: a line of sums stays in the L1 cache
constexpr std::int64_t kSerial = 1 << 15;  // fewer elements run serially: waking threads would cost more than it saves
constexpr std::int64_t kTasks = 256;       // enough tasks for any machine

template <class T>
using Accumulator = typename Accumulate<T>::type;

// body(pooled element, first element of x under it) at the start of each line of each row of x.
template <class Body>
void each_line(const PoolShape& s, int threads, const Body& body) {
  const std::int64_t rows = s.pooled_rows(), tasks = rows < kTasks ? rows : kTasks;
  parallel_for(tasks, s.size() < kSerial ? 1 : threads, [&](std::int64_t task) {
    for (std::int64_t row = rows * task / tasks; row < rows * (task + 1) / tasks; ++row) {
      const std::int64_t h = row % s.height, slice = row / s.height;  // plane and depth
      const std::int64_t above = (slice * s.kd * s.height + h) * s.kh * s.width * s.kw;
      for (std::int64_t first = 0; first < s.width; first += kLine) {
        const std::int64_t size = s.width - first < kLine ? s.width - first : kLine;
        body(row * s.width + first, above + first * s.kw, size);
      }
    }
  });
}

// body(element of x) for the kd kh rows under a pooled row.
template <class Body>
void each_row_under(const PoolShape& s, std::int64_t first, const Body& body) {
  const std::int64_t row = s.width * s.kw, slice = s.height * s.kh * row;
  for (std::int64_t d = 0; d < s.kd; ++d)
    for (std::int64_t h = 0; h < s.kh; ++h) body(first + d * slice + h * row);
}

template <class T, class Width>
void pool(const T* x, T* y, const PoolShape& s, double divisor, Width kw, int threads) {
  using A = Accumulator<T>;
  const A over = static_cast<A>(divisor);
  each_line(s, threads, [&](std::int64_t pooled, std::int64_t under, std::int64_t size) {
    alignas(64) A sums[kLine];
    for (std::int64_t i = 0; i < size; ++i) sums[i] = 0;
    each_row_under(s, under, [&](std::int64_t at) {
      const T* row = x + at;
#pragma omp simd
      for (std::int64_t i = 0; i < size; ++i)
        for (std::int64_t k = 0; k < kw; ++k) sums[i] += load(row[i * kw + k]);
    });
#pragma omp simd
    for (std::int64_t i = 0; i < size; ++i) store(y[pooled + i], sums[i] / over);
  });
}

template <class T, class Width>
void transpose(const T* y, T* x, const PoolShape& s, double divisor, Width kw, int threads) {
  using A = Accumulator<T>;
  const A over = static_cast<A>(divisor);
  each_line(s, threads, [&](std::int64_t pooled, std::int64_t under, std::int64_t size) {
    each_row_under(s, under, [&](std::int64_t at) {
      T* row = x + at;
#pragma omp simd
      for (std::int64_t i = 0; i < size; ++i)
        for (std::int64_t k = 0; k < kw; ++k) store(row[i * kw + k], load(y[pooled + i]) / over);
    });
  });
}

// body(a value of the type that dtype names, window width)
template <class Body>
void dispatch(Dtype dtype, std::int64_t kw, const Body& body) {
  with_dtype(dtype,
             [&](auto type) { kw == 2 ? body(type, std::integral_constant<std::int64_t, 2>()) : body(type, kw); });
}

}  // namespace

void avg_pool(Dtype dtype, const void* x, void* y, const PoolShape& shape, double divisor, int threads) {
  dispatch(dtype, shape.kw, [&](auto type, auto kw) {
    using T = decltype(type);
    pool(static_cast<const T*>(x), static_cast<T*>(y), shape, divisor, kw, threads);
  });
}

void avg_pool_transpose(Dtype dtype, const void* y, void* x, const PoolShape& shape, double divisor, int threads) {
  dispatch(dtype, shape.kw, [&](auto type, auto kw) {
    using T = decltype(type);
    ask_for_huge_pages(x, shape.size() * static_cast<std::int64_t>(sizeof(T)));
    transpose(static_cast<const T*>(y), static_cast<T*>(x), shape, divisor, kw, threads);
  });
}

}  // namespace FASTGAN_ISA
}  // namespace fastgan
