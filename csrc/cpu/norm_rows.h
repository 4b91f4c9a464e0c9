// How the rows of a normalisation are shared out among threads, for any operator that sums over a row and then maps it.
//
// Threads take ranges of rows, or, where rows are few and long, ranges of lines of one row after another.  Which, and
// the ranges, depend on the shape alone, and partial sums are added in the order of the ranges: the same bits on any
// number of threads.
#pragma once

#include <cstdint>

#include "common/workspace.h"
#include "cpu/norm.h"

namespace fastgan {
namespace FASTGAN_ISA {
namespace {

constexpr std::int64_t kLine = 1024;       // elements: a dozen lines of float are what a nearest cache holds
constexpr std::int64_t kRanges = 256;      // tasks that are enough for any machine
constexpr std::int64_t kFewRanges = 32;    // under which long rows are shared out instead
constexpr std::int64_t kRangeRows = 16;    // rows a range: its partial dw costs 1 / kRangeRows of a pass
constexpr std::int64_t kBatch = 1 << 17;   // elements between two barriers where rows are shared out: a private cache
constexpr std::int64_t kSerial = 1 << 15;  // elements under which waking threads costs more than they bring

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
std::int64_t larger(std::int64_t a, std::int64_t b) { return a > b ? a : b; }

template <class A>
void fill(A* values, std::int64_t n, A value) {
  for (std::int64_t i = 0; i < n; ++i) values[i] = value;
}

struct Line {
  std::int64_t begin, size;   // in elements of the row
  std::int64_t first, units;  // the units that it consists of
  std::int64_t unit;          // elements of each
};

// A row as lines of whole units; a unit is a channel, or a part of one that is longer than a line.
struct Geometry {
  std::int64_t rows, channels, inner, groups;
  std::int64_t outer, row;   // rows of a group; elements of a row
  std::int64_t split, unit;  // units a channel, elements a unit; a channel's last may be shorter
  std::int64_t per_line, lines;

  explicit Geometry(const NormShape& s)
      : rows(s.rows),
        channels(s.channels),
        inner(s.inner),
        groups(s.groups),
        outer(rows / groups),
        row(channels * inner) {
    split = ceil_div(inner, kLine);
    unit = ceil_div(inner, split);
    per_line = split > 1 ? 1 : kLine / unit;
    lines = ceil_div(units(), per_line);
  }

  std::int64_t units() const { return channels * split; }

  Line line(std::int64_t index) const {
    const std::int64_t first = index * per_line, at = first % split * unit;
    if (split > 1) {
      const std::int64_t size = smaller(unit, inner - at);
      return {first / split * inner + at, size, first, 1, size};
    }
    const std::int64_t count = smaller(per_line, channels - first);
    return {first * inner, count * inner, first, count, inner};
  }
};

template <class A>
struct Scratch {
  alignas(64) A data[3][kLine], affine[3][kLine], out[2][kLine], products[kLine];
};

// The sums over rows of an operator, (ranges, kSums, groups, units), while they are partial.  Of one range whose units
// are channels nothing is partial: they are summed where they are wanted.
template <class Op>
class Slots {
 public:
  using A = typename Op::Accumulator;

  Slots(const Op& op, const Geometry& g, std::int64_t ranges)
      : op_(op),
        g_(g),
        ranges_(ranges),
        in_place_(ranges * g.split == 1),
        buffer_(wanted(op) && !in_place_ ? ranges * Op::kSums * g.groups * g.units() : 0) {}

  static bool wanted(const Op& op) {
    for (int k = 0; k < Op::kSums; ++k)
      if (op.gathered(k) != nullptr) return true;
    return false;
  }

  A* at(std::int64_t range, int k, std::int64_t group) {
    A* out = static_cast<A*>(op_.gathered(k));
    if (out == nullptr || in_place_) return out == nullptr ? nullptr : out + group * g_.units();
    return buffer_.data() + ((range * Op::kSums + k) * g_.groups + group) * g_.units();
  }

  void clear(std::int64_t range, std::int64_t group) {
    for (int k = 0; k < Op::kSums; ++k)
      if (A* slots = at(range, k, group)) fill(slots, g_.units(), A{0});
  }

  void add_up(int threads) {
    if (in_place_) return;
    const std::int64_t size = g_.groups * g_.channels;
    for (int k = 0; k < Op::kSums; ++k) {
      A* out = static_cast<A*>(op_.gathered(k));
      if (out == nullptr) continue;
      parallel_for(ceil_div(size, kLine), threads, [&](std::int64_t block) {
        for (std::int64_t i = block * kLine; i < smaller(size, (block + 1) * kLine); ++i) {
          double sum = 0;
          for (std::int64_t range = 0; range < ranges_; ++range)
            for (std::int64_t s = 0; s < g_.split; ++s) sum += static_cast<double>(at(range, k, 0)[i * g_.split + s]);
          out[i] = static_cast<A>(sum);
        }
      });
    }
  }

 private:
  const Op& op_;
  const Geometry& g_;
  std::int64_t ranges_;
  bool in_place_;
  Buffer<A> buffer_;
};

// A task has a range of the rows of a group, and keeps each row in its core's cache.
template <class Op>
void run_by_rows(const Op& op, const Geometry& g, std::int64_t ranges, int threads) {
  using A = typename Op::Accumulator;
  Slots<Op> slots(op, g, ranges);
  parallel_for(ranges * g.groups, threads, [&](std::int64_t task) {
    const std::int64_t range = task / g.groups, group = task % g.groups;
    Scratch<A> scratch;
    A* mine[Op::kSums];
    for (int k = 0; k < Op::kSums; ++k) mine[k] = slots.at(range, k, group);
    slots.clear(range, group);
    for (std::int64_t n = g.outer * range / ranges; n < g.outer * (range + 1) / ranges; ++n) {
      const std::int64_t row = n * g.groups + group;
      typename Op::Sum sum;
      for (std::int64_t l = 0; l < g.lines; ++l) sum.add(op.sum(row, g.line(l), scratch));
      const auto of_row = op.finish(row, sum);
      for (std::int64_t l = 0; l < g.lines; ++l) op.apply(row, g.line(l), of_row, mine, scratch);
    }
  });
  slots.add_up(threads);
}

// A task has a range of lines, of one batch of rows after another: long rows are shared out, and the sums over rows,
// as long as a row if inner is 1, need no copies.
template <class Op>
void run_by_lines(const Op& op, const Geometry& g, int threads) {
  using A = typename Op::Accumulator;
  const std::int64_t ranges = smaller(g.lines, kRanges / 4), batch = larger(1, kBatch / g.row);
  Slots<Op> slots(op, g, 1);
  Buffer<typename Op::Sum> sums(batch * ranges);
  Buffer<typename Op::Row> of_rows(batch);
  for (std::int64_t group = 0; group < g.groups; ++group) slots.clear(0, group);
  const auto each_line = [&](std::int64_t range, const auto& body) {
    for (std::int64_t l = g.lines * range / ranges; l < g.lines * (range + 1) / ranges; ++l) body(g.line(l));
  };

  for (std::int64_t begin = 0; begin < g.rows; begin += batch) {
    const std::int64_t count = smaller(batch, g.rows - begin);
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
        for (int k = 0; k < Op::kSums; ++k) mine[k] = slots.at(0, k, (begin + i) % g.groups);
        each_line(range, [&](const Line& line) { op.apply(begin + i, line, of_rows[i], mine, scratch); });
      }
    });
  }
  slots.add_up(threads);
}

template <class Op>
void run(const Op& op, int threads) {
  const Geometry& g = op.geometry;
  if (g.rows * g.row < kSerial) threads = 1;
  const std::int64_t rows_each = Slots<Op>::wanted(op) ? ceil_div(kRangeRows, g.inner) : 1;
  const std::int64_t ranges = smaller(ceil_div(g.outer, rows_each), ceil_div(kRanges, g.groups));
  if (ranges * g.groups < kFewRanges && g.lines >= 8)
    run_by_lines(op, g, threads);
  else
    run_by_rows(op, g, ranges, threads);
}

}  // namespace
}  // namespace FASTGAN_ISA
}  // namespace fastgan
