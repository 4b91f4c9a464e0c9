// How an element-wise function with a bias traverses memory: in lines that stay in the L1 cache.  There, half precision
// is converted and the bias of each channel is expanded, so that one loop serves every dtype and shape.
//
// Sums over a channel use the accumulation type within a line and double beyond it.  Tasks are ranges of lines that
// depend only on the shape, and their sums are added in order, so any number of threads gives the same bits.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/dtype.h"
#include "common/workspace.h"
#include "cpu/bias_act.h"

namespace fastgan {
namespace FASTGAN_ISA {
namespace {

constexpr std::int64_t kLine = 1024;    // elements; a multiple of a word's 32
constexpr std::int64_t kTasks = 256;    // enough tasks for any machine
constexpr std::int64_t kTaskLines = 4;  // with fewer lines, the cost of starting a task is visible

std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
std::int64_t larger(std::int64_t a, std::int64_t b) { return a > b ? a : b; }

// Called for every line.  Inlining would take long to compile and run no faster.
#if defined(__GNUC__)
#define FASTGAN_ONE_COPY __attribute__((noinline))
#else
#define FASTGAN_ONE_COPY
#endif

struct Line {
  std::int64_t begin, size;
};

// Stands for an absent operand.  Created at the first call, so that no code runs before the instruction set is chosen.
template <class A>
const A* zeros() {
  static const A values[kLine] = {};
  return values;
}

template <class T>
const float* converted(const T* from, std::int64_t n, float* to) {
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) to[i] = load(from[i]);
  return to;
}

template <class T>
void put(const float* from, std::int64_t n, T* to) {
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) store(to[i], from[i]);
}

template <class A>
struct Operand {
  alignas(64) A buffer[kLine];

  FASTGAN_ONE_COPY const A* read(const void* tensor, Dtype dtype, const Line& line) {
    if (tensor == nullptr) return zeros<A>();
    if constexpr (std::is_same_v<A, float>) {
      if (dtype == Dtype::f16) return converted(static_cast<const Half*>(tensor) + line.begin, line.size, buffer);
      if (dtype == Dtype::bf16) return converted(static_cast<const BFloat16*>(tensor) + line.begin, line.size, buffer);
    }
    return static_cast<const A*>(tensor) + line.begin;
  }

  // The bias as one element per element of the line.
  FASTGAN_ONE_COPY const A* spread(const void* bias, const BiasActShape& shape, const Line& line) {
    if (bias == nullptr) return zeros<A>();
    const A* values = static_cast<const A*>(bias);
    if (shape.inner == 1) {
      std::int64_t c = line.begin % shape.channels;
      if (c + line.size <= shape.channels) return values + c;
      for (std::int64_t i = 0; i < line.size; c = 0) {
        const std::int64_t end = smaller(line.size, i + shape.channels - c);
        for (; i < end; ++i) buffer[i] = values[c++];
      }
      return buffer;
    }
    std::int64_t c = line.begin / shape.inner % shape.channels, left = shape.inner - line.begin % shape.inner;
    for (std::int64_t i = 0; i < line.size; left = shape.inner) {
      const std::int64_t end = smaller(line.size, i + left);
      for (; i < end; ++i) buffer[i] = values[c];
      c = c + 1 == shape.channels ? 0 : c + 1;
    }
    return buffer;
  }

  // Buffer for the values of a line, before `write` stores them.
  A* target(void* tensor, Dtype dtype, const Line& line) {
    if (tensor == nullptr || dtype == Dtype::f16 || dtype == Dtype::bf16) return buffer;
    return static_cast<A*>(tensor) + line.begin;
  }

  FASTGAN_ONE_COPY void write(void* tensor, Dtype dtype, const Line& line) const {
    if (tensor == nullptr) return;
    if constexpr (std::is_same_v<A, float>) {
      if (dtype == Dtype::f16) put(buffer, line.size, static_cast<Half*>(tensor) + line.begin);
      if (dtype == Dtype::bf16) put(buffer, line.size, static_cast<BFloat16*>(tensor) + line.begin);
    }
  }
};

// Adds the values of a line to the sums of their channels.
template <class A>
FASTGAN_ONE_COPY void gather(const A* values, const BiasActShape& shape, const Line& line, double* sums) {
  if (sums == nullptr) return;
  if (shape.inner == 1) {
    std::int64_t c = line.begin % shape.channels;
    for (std::int64_t i = 0; i < line.size; c = 0) {
      const std::int64_t count = smaller(line.size - i, shape.channels - c);
#pragma omp simd
      for (std::int64_t k = 0; k < count; ++k) sums[c + k] += static_cast<double>(values[i + k]);
      i += count;
    }
    return;
  }
  std::int64_t c = line.begin / shape.inner % shape.channels, left = shape.inner - line.begin % shape.inner;
  for (std::int64_t i = 0; i < line.size; left = shape.inner) {
    const std::int64_t count = smaller(line.size - i, left);
    A sum = 0;
#pragma omp simd reduction(+ : sum)
    for (std::int64_t k = 0; k < count; ++k) sum += values[i + k];
    sums[c] += static_cast<double>(sum);
    c = c + 1 == shape.channels ? 0 : c + 1;
    i += count;
  }
}

// body(line, sums of this task or null) for every line.  sums_of (channels), if not null, receives the bodies' sums.
template <class A, class Body>
void over_lines(const BiasActShape& shape, void* sums_of, std::int64_t serial, int threads, const Body& body) {
  const std::int64_t size = shape.size(), lines = (size + kLine - 1) / kLine;
  std::int64_t tasks = smaller(kTasks, (lines + kTaskLines - 1) / kTaskLines);
  // The sums of a task cost at most a sixteenth of its elements.
  if (sums_of != nullptr) tasks = larger(1, smaller(tasks, size / (16 * shape.channels)));
  Buffer<double> sums(sums_of == nullptr ? 0 : tasks * shape.channels);
  parallel_for(tasks, size < serial ? 1 : threads, [&](std::int64_t task) {
    double* mine = sums_of == nullptr ? nullptr : sums.data() + task * shape.channels;
    for (std::int64_t c = 0; mine != nullptr && c < shape.channels; ++c) mine[c] = 0;
    for (std::int64_t l = lines * task / tasks; l < lines * (task + 1) / tasks; ++l)
      body(Line{l * kLine, smaller(kLine, size - l * kLine)}, mine);
  });
  for (std::int64_t c = 0; sums_of != nullptr && c < shape.channels; ++c) {
    double sum = 0;
    for (std::int64_t task = 0; task < tasks; ++task) sum += sums[task * shape.channels + c];
    static_cast<A*>(sums_of)[c] = static_cast<A>(sum);
  }
}

inline void ask_for_huge_pages(Dtype dtype, void* tensor, const BiasActShape& shape) {
  const std::int64_t item = dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2;
  if (tensor != nullptr) FASTGAN_ISA::ask_for_huge_pages(tensor, shape.size() * item);
}

}  // namespace
}  // namespace FASTGAN_ISA
}  // namespace fastgan
