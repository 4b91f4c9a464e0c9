// The gradient of a convolution's input where that has few channels, as images have.
//
// Vendor libraries keep a register's lanes full by channels, of which three leave most idle.  Here the lanes are the
// columns of dy.  A row h of dx is made of the rows oh of dy under which a row k of the kernel met it:
//
//   product (ci, l)[ow] = sum over (k, oh), co of W[co, ci, k, l] dy[co, oh, ow]     a matrix product
//   dx[ci, h, stride ow + dilation l - padding] += product (ci, l)[ow]               a few shifted sums
//
// The floor: dy read once, and 2 kh kw / stride^2 operations for each element of dx and channel of dy.  Rows of dy are
// packed, so that the channels of one, which lie a plane apart in memory, do not fight for the same lines of the cache.
// Sums are taken in the same order whatever the number of threads.
#include "cpu/conv_input_gradient.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "common/workspace.h"
#include "cpu/simd.h"

namespace fastgan {
namespace FASTGAN_ISA {
namespace {

constexpr std::int64_t kSerial = 1 << 20;  // operations under which waking threads costs more than it brings
constexpr std::int64_t kTasks = 64;        // rows of dy that two tasks share are packed by both

std::int64_t over(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

Vec<float> load_vector(const float* from) {
  Vec<float> x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

void store_vector(float* to, Vec<float> x) { std::memcpy(to, &x, sizeof x); }

// The rows of one product that are kept in registers, times kVectors vectors of columns.
template <int kRows, int kVectors>
class InputGradient {
 public:
  InputGradient(const float* dy, const float* weight, float* dx, const ConvShape& shape)
      : s_(shape),
        dy_(dy),
        dx_(dx),
        products_(s_.in_channels * s_.columns.kernel),
        groups_(over(products_, kRows)),
        blocks_(over(s_.columns.out, kColumns)),
        // Rows of dy that meet one row of dx: consecutive but for a remainder, so that `oh % slots_` tells them apart.
        slots_((s_.rows.kernel - 1) * s_.rows.dilation / s_.rows.stride + 1),
        weight_(s_.rows.kernel * groups_ * s_.out_channels * kRows) {
    // (row of the kernel, group, out_channel, product of the group), zeros after the last product
    const std::int64_t taps = s_.columns.kernel;
    for (std::int64_t i = 0; i < s_.rows.kernel * groups_ * s_.out_channels * kRows; ++i) {
      const std::int64_t r = i % kRows, co = i / kRows % s_.out_channels;
      const std::int64_t group = i / (kRows * s_.out_channels) % groups_, k = i / (kRows * s_.out_channels * groups_);
      const std::int64_t product = group * kRows + r, ci = product / taps, l = product % taps;
      weight_[i] = product < products_ ? weight[((co * s_.in_channels + ci) * s_.rows.kernel + k) * taps + l] : 0;
    }
  }

  // Rows of dx, of all samples.
  void run(std::int64_t begin, std::int64_t end) {
    Buffer<float> packed(slots_ * blocks_ * s_.out_channels * kColumns);
    Buffer<float> products(groups_ * kRows * blocks_ * kColumns);
    const std::int64_t phase = over(s_.columns.size, s_.columns.stride);  // of each column modulo the stride
    std::vector<float> phases(static_cast<std::size_t>(phase * s_.columns.stride));
    std::vector<std::int64_t> held(static_cast<std::size_t>(slots_), -1);  // which row of dy a slot holds
    std::vector<Meeting> meetings;
    for (std::int64_t row = begin; row < end; ++row) {
      const std::int64_t n = row / s_.rows.size, h = row % s_.rows.size;
      meetings.clear();
      for (std::int64_t k = 0; k < s_.rows.kernel; ++k) {
        const std::int64_t at = h + s_.rows.padding - k * s_.rows.dilation, oh = at / s_.rows.stride;
        if (at < 0 || at % s_.rows.stride != 0 || oh >= s_.rows.out) continue;
        const std::int64_t slot = oh % slots_, size = blocks_ * s_.out_channels * kColumns;
        std::int64_t& holds = held[static_cast<std::size_t>(slot)];
        if (holds != n * s_.rows.out + oh) pack(n, oh, packed.data() + slot * size);
        holds = n * s_.rows.out + oh;
        meetings.push_back({packed.data() + slot * size, &weight_[k * groups_ * s_.out_channels * kRows]});
      }
      for (std::int64_t block = 0; block < blocks_; ++block)
        for (std::int64_t group = 0; group < groups_; ++group)
          multiply(meetings, block, group, products.data() + (group * kRows * blocks_ + block) * kColumns);
      for (std::int64_t ci = 0; ci < s_.in_channels; ++ci)
        spread(products.data() + ci * s_.columns.kernel * blocks_ * kColumns, phases.data(), phase,
               dx_ + ((n * s_.in_channels + ci) * s_.rows.size + h) * s_.columns.size);
    }
  }

 private:
  static constexpr std::int64_t kColumns = kVectors * kLanes<float>;
  struct Meeting {
    const float* packed;  // (block, out_channel, column)
    const float* weight;  // (group, out_channel, product)
  };

  // A row of dy as (block, out_channel, column), zeros after the last column.
  void pack(std::int64_t n, std::int64_t oh, float* packed) const {
    const std::int64_t width = s_.columns.out, plane = s_.rows.out * width;
    for (std::int64_t co = 0; co < s_.out_channels; ++co) {
      const float* row = dy_ + (n * s_.out_channels + co) * plane + oh * width;
      // The next row, which lies in another page than this channel's neighbours: no hardware sees that coming.
      for (std::int64_t ow = 0; ow < width; ow += 16) __builtin_prefetch(row + width + ow, 0, 2);
      for (std::int64_t first = 0; first < width; first += kColumns) {
        float* target = packed + (first * s_.out_channels) + co * kColumns;
        const std::int64_t size = std::min(kColumns, width - first);
        std::memcpy(target, row + first, static_cast<std::size_t>(size) * sizeof(float));
        std::fill(target + size, target + kColumns, 0.0f);
      }
    }
  }

  void multiply(const std::vector<Meeting>& meetings, std::int64_t block, std::int64_t group, float* products) const {
    Vec<float> sums[kRows][kVectors] = {};
    for (const Meeting& meeting : meetings) {
      const float* x = meeting.packed + block * s_.out_channels * kColumns;
      const float* w = meeting.weight + group * s_.out_channels * kRows;
      for (std::int64_t co = 0; co < s_.out_channels; ++co, x += kColumns, w += kRows) {
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) {
          const Vec<float> columns = load_vector(x + v * kLanes<float>);
#pragma GCC unroll 8
          for (int r = 0; r < kRows; ++r) sums[r][v] += w[r] * columns;
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v)
        store_vector(products + r * blocks_ * kColumns + v * kLanes<float>, sums[r][v]);
  }

  // Columns that are equal modulo the stride lie side by side in `phases`, and so each product is added in one piece.
  void spread(const float* products, float* phases, std::int64_t phase, float* dx) const {
    const ConvDimension& d = s_.columns;
    if (d.stride == 1) phases = dx;
    std::fill(phases, phases + phase * d.stride, 0.0f);
    for (std::int64_t l = 0; l < d.kernel; ++l, products += blocks_ * kColumns) {
      const std::int64_t shift = l * d.dilation - d.padding;
      const std::int64_t of = (shift % d.stride + d.stride) % d.stride, ahead = (shift - of) / d.stride;
      const std::int64_t begin = std::max<std::int64_t>(0, -ahead);
      const std::int64_t end = std::min(d.out, over(d.size - of, d.stride) - ahead);
      float* target = phases + of * phase + ahead;
#pragma omp simd
      for (std::int64_t ow = begin; ow < end; ++ow) target[ow] += products[ow];
    }
    if (d.stride == 1) return;
    for (std::int64_t w = 0, at = 0; w < d.size; ++at)
      for (std::int64_t of = 0; of < d.stride && w < d.size; ++of, ++w) dx[w] = phases[of * phase + at];
  }

  const ConvShape s_;
  const float* const dy_;
  float* const dx_;
  const std::int64_t products_, groups_, blocks_, slots_;
  Buffer<float> weight_;
};

template <int kRows, int kVectors>
void run(const float* dy, const float* weight, float* dx, const ConvShape& s, int threads) {
  InputGradient<kRows, kVectors> gradient(dy, weight, dx, s);
  const std::int64_t rows = s.batch * s.rows.size, tasks = std::min(rows, kTasks);
  const std::int64_t operations =
      rows * s.columns.out * s.out_channels * s.in_channels * s.columns.kernel * s.rows.kernel / s.rows.stride;
  parallel_for(tasks, operations < kSerial ? 1 : threads,
               [&](std::int64_t task) { gradient.run(rows * task / tasks, rows * (task + 1) / tasks); });
}

}  // namespace

void conv_input_gradient(const float* dy, const float* weight, float* dx, const ConvShape& s, int threads) {
  ask_for_huge_pages(dx, s.batch * s.in_channels * s.rows.size * s.columns.size * std::int64_t{sizeof(float)});
  const std::int64_t products = s.in_channels * s.columns.kernel, rows = over(products, over(products, 6));
  const auto of_rows = [&](auto vectors) {
    constexpr int kVectors = decltype(vectors)::value;
    if (rows <= 3) return run<3, kVectors>(dy, weight, dx, s, threads);
    if (rows == 4) return run<4, kVectors>(dy, weight, dx, s, threads);
    if (rows == 5) return run<5, kVectors>(dy, weight, dx, s, threads);
    return run<6, kVectors>(dy, weight, dx, s, threads);
  };
  if (s.columns.out <= kLanes<float>) return of_rows(std::integral_constant<int, 1>());
  return of_rows(std::integral_constant<int, 2>());
}

}  // namespace FASTGAN_ISA
}  // namespace fastgan
