// The gradient of a 1d convolution's weight.  Within a group, with l = (channel of x, tap k of the kernel),
//
//   dw[m][l] = sum over samples and positions j of dy[m][j] x[channel][stride j + dilation k - padding]
//
// The floor: two operations per m, l, sample and position.  Other kernels fill vector lanes with channels or taps, of
// which a group may have few.  Here the lanes are positions: a tile of dw stays in registers, one vector of sums per
// element, and each vector of dy and x that is loaded serves a row or a column of the tile.  Every stride-th value of a
// row of x is copied into a row of its own, a phase, so that a tap reads consecutive values of one phase.
//
// Vectors of sums are added up every kMostSummed positions, in the same order for any number of threads.
#include "cpu/conv_row_weight_gradient.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "common/workspace.h"
#include "cpu/simd.h"

namespace fastgan {
namespace FASTGAN_ISA {
namespace {

constexpr std::int64_t kSide = kLanes<float>;
constexpr std::int64_t kRun = 512;          // positions of a tile's rows of dy that stay in the first cache
constexpr std::int64_t kMostSummed = 2048;  // positions; more would add too many numbers one by one
constexpr std::int64_t kTiles = 16;         // tiles that a task computes

std::int64_t over(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
std::int64_t floor_of(std::int64_t a, std::int64_t b) { return a >= 0 ? a / b : -over(-a, b); }

// kRows channels of dy times kTaps elements l.
template <int kRows, int kTaps>
class RowWeightGradient {
 public:
  RowWeightGradient(const float* dy, const float* x, float* dw, const ConvRowShape& s)
      : dy_(dy), x_(x), dw_(dw), s_(s), taps_(s.in_channels * s.row.kernel) {
    const ConvDimension& d = s.row;
    first_ = floor_of(-d.padding, d.stride);
    const std::int64_t last = floor_of((d.kernel - 1) * d.dilation - d.padding, d.stride);
    length_ = over(d.out, kSide) * kSide + last - first_;
    for (std::int64_t l = 0; l < taps_; ++l) {
      const std::int64_t from = l % d.kernel * d.dilation - d.padding, ahead = floor_of(from, d.stride);
      const std::int64_t phase = l / d.kernel * d.stride + from - ahead * d.stride;
      offsets_.push_back(phase * length_ + ahead - first_);
    }
  }

  void run(int threads) const {
    const std::int64_t channels = s_.groups * s_.in_channels, image = s_.row.stride * length_;
    Buffer<float> phases(s_.batch * channels * image);
    parallel_for(s_.batch * channels, threads,
                 [&](std::int64_t c) { split(x_ + c * s_.row.size, &phases[c * image]); });
    const std::int64_t blocks = over(taps_, kTiles * kTaps), tiles = over(s_.out_channels, kRows) * blocks;
    parallel_for(s_.groups * tiles, threads, [&](std::int64_t task) {
      const std::int64_t tile = task % tiles;
      sum(phases.data(), task / tiles, tile / blocks * kRows, tile % blocks * kTiles * kTaps);
    });
  }

 private:
  using Tile = Vec<float>[kRows][kTaps];

  // A row of x as (phase, position), with zeros around it.
  void split(const float* row, float* to) const {
    const std::int64_t stride = s_.row.stride;
    std::fill(to, to + stride * length_, 0.f);
    for (std::int64_t phase = 0; phase < stride; ++phase, to += length_) {
      const std::int64_t begin = std::max<std::int64_t>(0, -first_);
      const std::int64_t end = std::min(length_, over(s_.row.size - phase, stride) - first_);
      const float* from = row + (begin + first_) * stride + phase;
      for (std::int64_t j = begin; j < end; ++j, from += stride) to[j] = *from;
    }
  }

  // Rows of dw from m, elements from l.
  void sum(const float* phases, std::int64_t group, std::int64_t m, std::int64_t l) const {
    const std::int64_t out = s_.row.out, whole = out / kSide * kSide;
    const std::int64_t rows = std::min<std::int64_t>(kRows, s_.out_channels - m);
    const std::int64_t taps = std::min(kTiles * kTaps, taps_ - l), tiles = over(taps, kTaps);
    Tile sums[kTiles] = {};
    float totals[kTiles][kRows][kTaps] = {};
    std::int64_t summed = 0;
    for (std::int64_t n = 0; n < s_.batch; ++n) {
      const float* x = phases + (n * s_.groups + group) * s_.in_channels * s_.row.stride * length_;
      const float* dy[kRows];
      for (std::int64_t r = 0; r < kRows; ++r)
        dy[r] = dy_ + ((n * s_.groups + group) * s_.out_channels + m + std::min(r, rows - 1)) * out;
      for (std::int64_t begin = 0; begin < out; begin += kRun) {
        const std::int64_t end = std::min(begin + kRun, whole), rest = out - whole;
        float tails[kRows][kSide] = {};
        const bool tail = rest > 0 && begin + kRun >= out;
        for (int r = 0; tail && r < kRows; ++r) std::memcpy(tails[r], dy[r] + whole, sizeof(float) * rest);
        for (std::int64_t t = 0; t < tiles; ++t) {
          const float* lines[kTaps];
          for (std::int64_t k = 0; k < kTaps; ++k) lines[k] = x + offsets_[l + std::min(t * kTaps + k, taps - 1)];
          add(dy, lines, begin, end, sums[t]);
          if (tail) add_tail(tails, lines, whole, rest, sums[t]);
        }
        summed += kRun;
        if (summed >= kMostSummed || (n + 1 == s_.batch && begin + kRun >= out)) {
          for (std::int64_t t = 0; t < tiles; ++t) add_up(sums[t], totals[t]);
          summed = 0;
        }
      }
    }
    for (std::int64_t r = 0; r < rows; ++r)
      for (std::int64_t k = 0; k < taps; ++k)
        dw_[(group * s_.out_channels + m + r) * taps_ + l + k] = totals[k / kTaps][r][k % kTaps];
  }

  static void add(const float* const (&dy)[kRows], const float* const (&x)[kTaps], std::int64_t begin, std::int64_t end,
                  Tile& sums) {
    Tile tile;
    std::memcpy(tile, sums, sizeof tile);
    for (std::int64_t j = begin; j < end; j += kSide) {
      Vec<float> rows[kRows];
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) rows[r] = load_vector(dy[r] + j);
#pragma GCC unroll 16
      for (int k = 0; k < kTaps; ++k) {
        const Vec<float> value = load_vector(x[k] + j);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) tile[r][k] += rows[r] * value;
      }
    }
    std::memcpy(sums, tile, sizeof tile);
  }

  // Values of x after the last position are left out: zero times infinity is not zero.
  static void add_tail(const float (&dy)[kRows][kSide], const float* const (&x)[kTaps], std::int64_t at,
                       std::int64_t count, Tile& sums) {
    for (int k = 0; k < kTaps; ++k) {
      float values[kSide] = {};
      std::memcpy(values, x[k] + at, sizeof(float) * count);
      for (int r = 0; r < kRows; ++r) sums[r][k] += load_vector(dy[r]) * load_vector(values);
    }
  }

  static void add_up(Tile& sums, float (&totals)[kRows][kTaps]) {
    for (int r = 0; r < kRows; ++r)
      for (int k = 0; k < kTaps; ++k) totals[r][k] += lane_sum<float, kVectorBytes>(sums[r][k]);
    std::memset(&sums, 0, sizeof sums);
  }

  const float *dy_, *x_;
  float* dw_;
  const ConvRowShape s_;
  const std::int64_t taps_;
  std::int64_t first_, length_;        // first position of a phase, and its number of positions
  std::vector<std::int64_t> offsets_;  // of each element l, in the phases of a group
};

}  // namespace

void conv_row_weight_gradient(const float* dy, const float* x, float* dw, const ConvRowShape& s, int threads) {
  if (s.out_channels == 1) return RowWeightGradient<1, 8>(dy, x, dw, s).run(threads);
  if (s.out_channels == 2) return RowWeightGradient<2, 5>(dy, x, dw, s).run(threads);
  // The sums fill the registers, of which AVX-512 has twice as many.
  constexpr int rows = kVectorBytes == 64 ? 4 : 3, taps = kVectorBytes == 64 ? 6 : 4;
  RowWeightGradient<rows, taps>(dy, x, dw, s).run(threads);
}

}  // namespace FASTGAN_ISA
}  // namespace fastgan
