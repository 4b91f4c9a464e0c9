// The gradient of a convolution's input if that has few channels, as images do.
//
// Vendor libraries fill vector lanes with channels; three channels leave most lanes idle.  Here the lanes are columns
// of dy.  A row h of dx depends on the rows oh of dy that meet it through a row k of the kernel:
//
//   product (ci, l)[ow] = sum over (k, oh), co of W[co, ci, k, l] dy[co, oh, ow]     a matrix product
//   dx[ci, h, stride ow + dilation l - padding] += product (ci, l)[ow]               a few shifted sums
//
// Columns of dx that are equal modulo the stride are sums of the same products, each shifted by its own number of
// columns.  Products have zeros between them, so that all sums use whole vectors.
//
// The floor: one read of dy, and 2 kh kw / stride^2 operations per element of dx and channel of dy.  Rows of dy are
// packed: their channels are a plane apart in memory, and would compete for the same cache lines.  Sums are taken in
// the same order for any number of threads.
#include "cpu/conv_input_gradient.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "common/workspace.h"
#include "cpu/simd.h"

namespace fastgan {
namespace FASTGAN_ISA {
namespace {

constexpr std::int64_t kSerial = 1 << 20;  // fewer operations run serially: waking threads costs more than it saves
constexpr std::int64_t kTasks = 64;        // rows of dy that two tasks share are packed twice

std::int64_t over(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// The rows of one product that stay in registers, times kVectors vectors of columns.
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
        // Rows of dy that meet one row of dx are consecutive except for a remainder, so `oh % slots_` is unique.
        slots_((s_.rows.kernel - 1) * s_.rows.dilation / s_.rows.stride + 1),
        phase_(over(over(s_.columns.size, s_.columns.stride), kLanes<float>) * kLanes<float>),
        weight_(s_.rows.kernel * groups_ * s_.out_channels * kRows) {
    const ConvDimension& d = s_.columns;
    for (std::int64_t l = 0; l < d.kernel; ++l) {
      const std::int64_t shift = l * d.dilation - d.padding, of = (shift % d.stride + d.stride) % d.stride;
      taps_.push_back({of, (shift - of) / d.stride});
      gap_ = std::max({gap_, taps_.back().ahead, phase_ - taps_.back().ahead - blocks_ * kColumns});
    }
    // (row of the kernel, group, out_channel, product of the group), with zeros after the last product
    const std::int64_t taps = s_.columns.kernel;
    for (std::int64_t i = 0; i < s_.rows.kernel * groups_ * s_.out_channels * kRows; ++i) {
      const std::int64_t r = i % kRows, co = i / kRows % s_.out_channels;
      const std::int64_t group = i / (kRows * s_.out_channels) % groups_, k = i / (kRows * s_.out_channels * groups_);
      const std::int64_t product = group * kRows + r, ci = product / taps, l = product % taps;
      weight_[i] = product < products_ ? weight[((co * s_.in_channels + ci) * s_.rows.kernel + k) * taps + l] : 0;
    }
  }

  // Rows of dx, over all samples.
  void run(std::int64_t begin, std::int64_t end) {
    Buffer<float> packed(slots_ * blocks_ * s_.out_channels * kColumns);
    const std::int64_t length = blocks_ * kColumns + gap_;
    std::vector<float> products(static_cast<std::size_t>(gap_ + groups_ * kRows * length));  // the gaps hold zeros
    Buffer<float> phases(phase_ * s_.columns.stride);
    std::vector<std::int64_t> held(static_cast<std::size_t>(slots_), -1);  // the row of dy in each slot
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
          multiply(meetings, block, group, products.data() + gap_ + group * kRows * length + block * kColumns, length);
      for (std::int64_t ci = 0; ci < s_.in_channels; ++ci)
        sum_up(products.data() + gap_ + ci * s_.columns.kernel * length, length, phases.data(),
               dx_ + ((n * s_.in_channels + ci) * s_.rows.size + h) * s_.columns.size);
    }
  }

 private:
  static constexpr std::int64_t kColumns = kVectors * kLanes<float>;
  struct Meeting {
    const float* packed;  // (block, out_channel, column)
    const float* weight;  // (group, out_channel, product)
  };
  struct Tap {
    std::int64_t phase, ahead;  // column ow of its product contributes to column stride (ow + ahead) + phase of dx
  };

  // A row of dy as (block, out_channel, column), with zeros after the last column.
  void pack(std::int64_t n, std::int64_t oh, float* packed) const {
    const std::int64_t width = s_.columns.out, plane = s_.rows.out * width;
    for (std::int64_t co = 0; co < s_.out_channels; ++co) {
      const float* row = dy_ + (n * s_.out_channels + co) * plane + oh * width;
      // Prefetch the next row.  It is in another page than its neighbors in this channel: hardware cannot predict it.
      for (std::int64_t ow = 0; ow < width; ow += 16) __builtin_prefetch(row + width + ow, 0, 2);
      for (std::int64_t first = 0; first < width; first += kColumns) {
        float* target = packed + first * s_.out_channels + co * kColumns;
        if (width - first >= kColumns) {
#pragma GCC unroll 2
          for (int v = 0; v < kVectors; ++v)
            store_vector(target + v * kLanes<float>, load_vector(row + first + v * kLanes<float>));
        } else {
          for (std::int64_t i = 0; i < kColumns; ++i) target[i] = first + i < width ? row[first + i] : 0;
        }
      }
    }
  }

  void multiply(const std::vector<Meeting>& meetings, std::int64_t block, std::int64_t group, float* products,
                std::int64_t length) const {
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
      for (int v = 0; v < kVectors; ++v) store_vector(products + r * length + v * kLanes<float>, sums[r][v]);
  }

  // Computes a row of dx from the products of its channel.
  void sum_up(const float* products, std::int64_t length, float* phases, float* dx) const {
    const std::int64_t stride = s_.columns.stride;
    for (std::int64_t of = 0; of < stride; ++of)
      for (std::int64_t at = 0; at < phase_; at += kLanes<float>) {
        Vec<float> sum = {};
        for (std::size_t l = 0; l < taps_.size(); ++l)
          if (taps_[l].phase == of)
            sum += load_vector(products + static_cast<std::int64_t>(l) * length + at - taps_[l].ahead);
        store_vector(phases + of * phase_ + at, sum);
      }
    if (stride == 1)
      std::copy(phases, phases + s_.columns.size, dx);
    else if (stride == 2)
      interleave(phases, 2, dx);
    else
      interleave(phases, stride, dx);
  }

  void interleave(const float* phases, std::int64_t stride, float* dx) const {
    std::int64_t w = 0, at = 0;
    for (; w + stride <= s_.columns.size; w += stride, ++at)
      for (std::int64_t of = 0; of < stride; ++of) dx[w + of] = phases[of * phase_ + at];
    for (std::int64_t of = 0; w < s_.columns.size; ++of, ++w) dx[w] = phases[of * phase_ + at];
  }

  const ConvShape s_;
  const float* const dy_;
  float* const dx_;
  const std::int64_t products_, groups_, blocks_, slots_;
  const std::int64_t phase_;  // columns of dx that are equal modulo the stride, in whole vectors
  std::vector<Tap> taps_;
  std::int64_t gap_ = 0;  // between two products
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
