// Common to the normalizations: loads a line of a tensor of any dtype into the L1 cache, stores it, and merges the mean
// and variance of lines.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "common/dtype.h"
#include "common/workspace.h"
#include "cpu/norm.h"
#include "cpu/stream.h"

namespace fastgan {
namespace FASTGAN_ISA {
namespace {

// Loops that are called from two places.  Inlining them into both would double the compile time.
#if defined(__GNUC__)
#define FASTGAN_ONE_COPY __attribute__((noinline))
#else
#define FASTGAN_ONE_COPY
#endif

constexpr std::int64_t kLine = 1024;       // elements: an L1 cache holds a dozen lines of float
constexpr std::int64_t kSerial = 1 << 15;  // fewer elements run serially: waking threads would cost more than it saves

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
inline std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
inline std::int64_t larger(std::int64_t a, std::int64_t b) { return a > b ? a : b; }

template <class A>
void fill(A* values, std::int64_t n, A value) {
  for (std::int64_t i = 0; i < n; ++i) values[i] = value;
}

// Stands for an absent operand.  Created at the first call, so that no code runs before the instruction set is chosen.
template <class A>
const A* line_of(int value) {
  struct Lines {
    A values[2][kLine];
    Lines() {
      fill(values[0], kLine, A{0});
      fill(values[1], kLine, A{1});
    }
  };
  static const Lines lines;
  return lines.values[value];
}

template <class T>
FASTGAN_ONE_COPY const float* converted(const T* from, std::int64_t n, float* to) {
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) to[i] = load(from[i]);
  return to;
}

template <class T>
FASTGAN_ONE_COPY void put(const float* from, std::int64_t n, T* to) {
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) store(to[i], from[i]);
}

// Lines of at most kLine elements of tensors of `dtype`, in their accumulation type.
template <class A>
struct Lines {
  Dtype dtype;
  bool streamed;

  Lines(Dtype d, const NormShape& shape) : dtype(d), streamed(is_streamed(d, shape.size())) {}

  // The n elements from `at`, in `buffer` if they need conversion.
  const A* read(const void* tensor, std::int64_t at, std::int64_t n, A* buffer) const {
    if (tensor == nullptr) return line_of<A>(0);
    if constexpr (std::is_same_v<A, float>) {
      if (dtype == Dtype::f16) return converted(static_cast<const Half*>(tensor) + at, n, buffer);
      if (dtype == Dtype::bf16) return converted(static_cast<const BFloat16*>(tensor) + at, n, buffer);
    }
    return static_cast<const A*>(tensor) + at;
  }

  // Buffer for results, before `write` stores them.
  A* target(void* tensor, std::int64_t at, A* buffer) const {
    if (tensor == nullptr || streamed || dtype == Dtype::f16 || dtype == Dtype::bf16) return buffer;
    return static_cast<A*>(tensor) + at;
  }

  void write(void* tensor, std::int64_t at, std::int64_t n, const A* values) const {
    if (tensor == nullptr) return;
    if (streamed) return stream(values, n, static_cast<A*>(tensor) + at);
    if constexpr (std::is_same_v<A, float>) {
      if (dtype == Dtype::f16) put(values, n, static_cast<Half*>(tensor) + at);
      if (dtype == Dtype::bf16) put(values, n, static_cast<BFloat16*>(tensor) + at);
    }
  }

  static A value_of(const void* values, std::int64_t index) { return static_cast<const A*>(values)[index]; }
};

struct Moments {
  double count = 0, mean = 0, squares = 0;  // squares: of the differences from the mean

  void add(const Moments& other) {
    if (other.count == 0) return;
    const double both = count + other.count, apart = other.mean - mean;
    mean += apart * (other.count / both);
    squares += other.squares + apart * apart * (count * other.count / both);
    count = both;
  }
};

// Moments of a line, relative to its own mean, so that a large mean costs no precision.
template <class A>
Moments moments_of(const A* x, std::int64_t n) {
  A total = 0, rest = 0, squares = 0;
#pragma omp simd reduction(+ : total)
  for (std::int64_t i = 0; i < n; ++i) total += x[i];
  const A near = total / static_cast<A>(n);
#pragma omp simd reduction(+ : rest, squares)
  for (std::int64_t i = 0; i < n; ++i) {
    const A apart = x[i] - near;
    rest += apart;
    squares += apart * apart;
  }
  const double count = static_cast<double>(n), off = static_cast<double>(rest) / count;
  return {count, static_cast<double>(near) + off, static_cast<double>(squares) - off * off * count};
}

template <class A>
struct MeanAndRstd {
  A mean, rstd;
};

// The statistics of a row's moments, also written to the caller's memory.
template <class A>
MeanAndRstd<A> statistics(const NormForward& t, std::int64_t row, const Moments& of_row, double eps) {
  const double squares = of_row.squares < 0 ? 0 : of_row.squares;
  const A mean = static_cast<A>(of_row.mean), rstd = static_cast<A>(1 / std::sqrt(squares / of_row.count + eps));
  static_cast<A*>(t.mean)[row] = mean;
  static_cast<A*>(t.rstd)[row] = rstd;
  if (t.variance != nullptr) static_cast<A*>(t.variance)[row] = static_cast<A>(squares / (of_row.count - 1));
  return {mean, rstd};
}

inline void ask_for_huge_pages(Dtype dtype, void* tensor, const NormShape& shape) {
  const std::int64_t item = dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2;
  if (tensor != nullptr) FASTGAN_ISA::ask_for_huge_pages(tensor, shape.size() * item);
}

}  // namespace
}  // namespace FASTGAN_ISA
}  // namespace fastgan
