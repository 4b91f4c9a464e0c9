// Matrices transposed, as images between channels first and channels last.
//
// The floor: each value read once and written once.  Squares of as many rows as a vector has lanes are turned in
// registers, so that what is read and what is written are whole vectors.  Rows are taken by bands of a cache line's
// values: then the reads are a few lines in their order, and each line of the result is written at once and whole.
#include "cpu/transpose.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "common/workspace.h"
#include "cpu/simd.h"
#include "cpu/stream.h"

namespace fastgan {
namespace FASTGAN_ISA {
namespace {

constexpr int kSide = kLanes<float>;
constexpr std::int64_t kLine = 64, kBand = kLine / std::int64_t{sizeof(float)};  // of a cache, in bytes and in values
constexpr std::int64_t kSerial = 1 << 15;  // elements under which waking threads costs more than it brings

// Elements from which the result goes past the caches.  Earlier than elsewhere: the lines that are written one after
// another lie a row of the result apart, often a power of two, and fight for the same places.
constexpr std::int64_t kLeastStreamed = 1 << 21;

// Of two rows of which one has this bit set in its number and the other has not: swaps the lanes of the one that have
// it not with those of the other that have it.
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

template <bool kStreamed>
void store_line(const Vec<float>& line, float* to) {
  if constexpr (kStreamed)
    stream_vector(reinterpret_cast<const char*>(&line), reinterpret_cast<char*>(to));
  else
    std::memcpy(to, &line, sizeof line);
}

template <bool kStreamed>
void transpose_square(const float* from, std::int64_t from_stride, float* to, std::int64_t to_stride) {
  Vec<float> rows[kSide];
#pragma GCC unroll 16
  for (int r = 0; r < kSide; ++r) std::memcpy(&rows[r], from + r * from_stride, sizeof rows[r]);
  turn<kSide / 2>(rows);
#pragma GCC unroll 16
  for (int r = 0; r < kSide; ++r) store_line<kStreamed>(rows[r], to + r * to_stride);
}

template <bool kStreamed>
void run(const float* from, float* to, std::int64_t batch, std::int64_t rows, std::int64_t columns, int threads) {
  const std::int64_t size = rows * columns, bands = (rows + kBand - 1) / kBand;
  parallel_for(batch * bands, threads, [&](std::int64_t task) {
    const std::int64_t first = task % bands * kBand, height = std::min(kBand, rows - first);
    const float* band = from + task / bands * size + first * columns;
    float* target = to + task / bands * size + first;
    std::int64_t c = 0;
    if (height == kBand)
      for (; c + kSide <= columns; c += kSide)
        for (std::int64_t r = 0; r < kBand; r += kSide)
          transpose_square<kStreamed>(band + r * columns + c, columns, target + c * rows + r, rows);
    for (; c < columns; ++c)
      for (std::int64_t r = 0; r < height; ++r) target[c * rows + r] = band[r * columns + c];
  });
}

}  // namespace

void transpose(const float* from, float* to, std::int64_t batch, std::int64_t rows, std::int64_t columns, int threads) {
  const std::int64_t elements = batch * rows * columns;
  ask_for_huge_pages(to, elements * std::int64_t{sizeof(float)});
  if (elements < kSerial) threads = 1;
  // Past the caches a line must be written at once: in halves, others begun in between, it takes ten times as long.
  constexpr bool whole = kSide == kBand;
  const bool aligned = rows % kBand == 0 && reinterpret_cast<std::uintptr_t>(to) % kLine == 0;
  if (whole && aligned && elements >= kLeastStreamed)
    run<whole>(from, to, batch, rows, columns, threads);
  else
    run<false>(from, to, batch, rows, columns, threads);
}

}  // namespace FASTGAN_ISA
}  // namespace fastgan
