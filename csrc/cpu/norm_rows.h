// Distributes the rows of a normalization with one weight per element over threads.
//
// Threads take ranges of rows.  If rows are few and long, they take ranges of lines of one row after another instead.
// The choice and the ranges depend only on the shape, and partial sums are added in the order of the ranges, so any
// number of threads gives the same bits.
#pragma once

#include "cpu/norm_lines.h"

namespace fastgan {
namespace FASTGAN_ISA {
namespace {

constexpr std::int64_t kRanges = 256;     // enough tasks for any machine
constexpr std::int64_t kFewRanges = 32;   // with fewer ranges, long rows are split instead
constexpr std::int64_t kRangeRows = 16;   // rows per range: its partial dw costs 1 / kRangeRows of a pass
constexpr std::int64_t kBatch = 1 << 17;  // elements between two barriers if rows are split: a private cache

struct Line {
  std::int64_t begin, size;  // in elements of the row
};

template <class A>
struct Scratch {
  alignas(64) A data[3][kLine], out[2][kLine], products[kLine];
};

// An operator's sums over the rows of a group, one per element: partial sums (ranges, kSums, elements of a sample).
// With one range nothing is partial, and sums go directly to their destination.
template <class Op>
class Slots {
 public:
  using A = typename Op::Accumulator;

  Slots(const Op& op, std::int64_t ranges)
      : op_(op), ranges_(ranges), buffer_(wanted(op) && ranges > 1 ? ranges * Op::kSums * op.shape.channels : 0) {}

  static bool wanted(const Op& op) {
    for (int k = 0; k < Op::kSums; ++k)
      if (op.gathered(k) != nullptr) return true;
    return false;
  }

  A* at(std::int64_t range, int k, std::int64_t group) {
    A* out = static_cast<A*>(op_.gathered(k));
    if (out == nullptr) return nullptr;
    if (ranges_ > 1) out = buffer_.data() + (range * Op::kSums + k) * op_.shape.channels;
    return out + group * op_.shape.of_row();
  }

  void clear(std::int64_t range, std::int64_t group) {
    for (int k = 0; k < Op::kSums; ++k)
      if (A* slots = at(range, k, group)) fill(slots, op_.shape.of_row(), A{0});
  }

  void add_up(int threads) {
    if (ranges_ == 1) return;
    const std::int64_t size = op_.shape.channels;
    for (int k = 0; k < Op::kSums; ++k) {
      A* out = static_cast<A*>(op_.gathered(k));
      if (out == nullptr) continue;
      parallel_for(ceil_div(size, kLine), threads, [&](std::int64_t block) {
        for (std::int64_t i = block * kLine; i < smaller(size, (block + 1) * kLine); ++i) {
          double sum = 0;
          for (std::int64_t range = 0; range < ranges_; ++range) sum += static_cast<double>(at(range, k, 0)[i]);
          out[i] = static_cast<A>(sum);
        }
      });
    }
  }

 private:
  const Op& op_;
  std::int64_t ranges_;
  Buffer<A> buffer_;
};

// A task has a range of the rows of a group, and keeps each row in its core's cache.
template <class Op>
void run_by_rows(const Op& op, std::int64_t ranges, std::int64_t lines, int threads) {
  using A = typename Op::Accumulator;
  const NormShape& s = op.shape;
  Slots<Op> slots(op, ranges);
  parallel_for(ranges * s.groups, threads, [&](std::int64_t task) {
    const std::int64_t range = task / s.groups, group = task % s.groups;
    Scratch<A> scratch;
    A* mine[Op::kSums];
    for (int k = 0; k < Op::kSums; ++k) mine[k] = slots.at(range, k, group);
    slots.clear(range, group);
    for (std::int64_t n = s.samples * range / ranges; n < s.samples * (range + 1) / ranges; ++n) {
      const std::int64_t row = n * s.groups + group;
      typename Op::Sum sum;
      for (std::int64_t l = 0; l < lines; ++l) sum.add(op.sum(row, op.line(l), scratch));
      const auto of_row = op.finish(row, sum);
      for (std::int64_t l = 0; l < lines; ++l) op.apply(row, op.line(l), of_row, mine, scratch);
    }
  });
  slots.add_up(threads);
}

// A task has a range of lines, and processes one batch of rows after another.  Long rows are split, and the sums over
// rows, which are as long as a row, need no copies.
template <class Op>
void run_by_lines(const Op& op, std::int64_t lines, int threads) {
  using A = typename Op::Accumulator;
  const NormShape& s = op.shape;
  const std::int64_t ranges = smaller(lines, kRanges / 4), batch = larger(1, kBatch / s.of_row());
  Slots<Op> slots(op, 1);
  Buffer<typename Op::Sum> sums(batch * ranges);
  Buffer<typename Op::Row> of_rows(batch);
  for (std::int64_t group = 0; group < s.groups; ++group) slots.clear(0, group);
  const auto each_line = [&](std::int64_t range, const auto& body) {
    for (std::int64_t l = lines * range / ranges; l < lines * (range + 1) / ranges; ++l) body(op.line(l));
  };

  for (std::int64_t begin = 0; begin < s.rows(); begin += batch) {
    const std::int64_t count = smaller(batch, s.rows() - begin);
    parallel_for(ranges, threads, [&](std::int64_t range) {
      Scratch<A> scratch;
      for (std::int64_t i = 0; i < count; ++i) {
        typename Op::Sum sum;
        each_line(range, [&](const Line& line) { sum.add(op.sum(begin + i, line, scratch)); });
        sums[i * ranges + range] = sum;
      }
    });
    for (std::int64_t i = 0; i < count; ++i) {
      typename Op::Sum sum;
      for (std::int64_t range = 0; range < ranges; ++range) sum.add(sums[i * ranges + range]);
      of_rows[i] = op.finish(begin + i, sum);
    }
    parallel_for(ranges, threads, [&](std::int64_t range) {
      Scratch<A> scratch;
      for (std::int64_t i = 0; i < count; ++i) {
        A* mine[Op::kSums];
        for (int k = 0; k < Op::kSums; ++k) mine[k] = slots.at(0, k, (begin + i) % s.groups);
        each_line(range, [&](const Line& line) { op.apply(begin + i, line, of_rows[i], mine, scratch); });
      }
    });
  }
  slots.add_up(threads);
}

template <class Op>
void run(const Op& op, int threads) {
  const NormShape& s = op.shape;
  if (s.size() < kSerial) threads = 1;
  const std::int64_t lines = ceil_div(s.of_row(), kLine);
  const std::int64_t rows_each = Slots<Op>::wanted(op) ? kRangeRows : 1;
  const std::int64_t ranges = smaller(ceil_div(s.samples, rows_each), ceil_div(kRanges, s.groups));
  if (ranges * s.groups < kFewRanges && lines >= 8)
    run_by_lines(op, lines, threads);
  else
    run_by_rows(op, ranges, lines, threads);
}

}  // namespace
}  // namespace FASTGAN_ISA
}  // namespace fastgan
