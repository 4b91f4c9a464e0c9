// Building blocks of convolutions with many channels: a tile of sums in registers, and square transposes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "cpu/simd.h"

namespace fastgan {
namespace FASTGAN_ISA {
namespace {

constexpr int kSide = kLanes<float>;
constexpr int kVectors = 2, kBlock = kVectors * kSide;  // lanes in a row of a tile
constexpr int kTile = kVectorBytes == 64 ? 8 : 6;       // rows, limited by the registers

inline std::int64_t over(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Adds to row i of the tile, for k in [0, count), the scalar rows[i][k step] times line k of kBlock values.
inline void add_products(const float* const (&rows)[kTile], std::int64_t step, std::int64_t count, const float* lines,
                         Vec<float> (&tile)[kTile][kVectors]) {
  for (std::int64_t k = 0, at = 0; k < count; ++k, at += step) {
    Vec<float> line[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) line[v] = load_vector(lines + k * kBlock + v * kSide);
#pragma GCC unroll 16
    for (int i = 0; i < kTile; ++i) {
      const float value = rows[i][at];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) tile[i][v] += value * line[v];
    }
  }
}

// Takes two rows, one whose index has this bit set and one whose index has not.  Swaps the lanes of the former without
// the bit with the lanes of the latter with it.
template <int kBit, int... kLane>
void swap_halves(Vec<float>& low, Vec<float>& high, std::integer_sequence<int, kLane...>) {
  const Vec<float> a = low, b = high;
#if defined(__clang__)
  low = __builtin_shufflevector(a, b, (kLane & kBit ? kSide + (kLane ^ kBit) : kLane)...);
  high = __builtin_shufflevector(a, b, (kLane & kBit ? kSide + kLane : kLane | kBit)...);
#else
  using Lanes = Simd<float>::bits;
  low = __builtin_shuffle(a, b, Lanes{(kLane & kBit ? kSide + (kLane ^ kBit) : kLane)...});
  high = __builtin_shuffle(a, b, Lanes{(kLane & kBit ? kSide + kLane : kLane | kBit)...});
#endif
}

template <int kBit>
void turn(Vec<float> (&rows)[kSide]) {
  if constexpr (kBit > 0) {
#pragma GCC unroll 16
    for (int r = 0; r < kSide; ++r)
      if (!(r & kBit)) swap_halves<kBit>(rows[r], rows[r | kBit], std::make_integer_sequence<int, kSide>());
    turn<kBit / 2>(rows);
  }
}

// Transposes a square of kSide rows in registers: reads row r at from(r), writes column c of the first `columns` to
// to(c).
template <class From, class To>
void transpose_square(const From& from, const To& to, std::int64_t columns = kSide) {
  Vec<float> rows[kSide];
#pragma GCC unroll 16
  for (int r = 0; r < kSide; ++r) rows[r] = load_vector(from(r));
  turn<kSide / 2>(rows);
#pragma GCC unroll 16
  for (int c = 0; c < kSide; ++c)
    if (c < columns) store_vector(to(c), rows[c]);
}

inline void copy(const float* from, std::int64_t count, float* to) {
  std::int64_t i = 0;
  for (; i + kSide <= count; i += kSide) store_vector(to + i, load_vector(from + i));
  for (; i < count; ++i) to[i] = from[i];
}

// Calls body(sample, pixel, offset, count) for each run of positions in [begin, end) within one sample.
template <class Body>
void each_run(std::int64_t begin, std::int64_t end, std::int64_t pixels, const Body& body) {
  for (std::int64_t q = begin; q < end;) {
    const std::int64_t pixel = q % pixels, count = std::min(end - q, pixels - pixel);
    body(q / pixels, pixel, q - begin, count);
    q += count;
  }
}

}  // namespace
}  // namespace FASTGAN_ISA
}  // namespace fastgan
