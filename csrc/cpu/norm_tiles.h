// Distributes a tensor that is normalized with one weight per channel over threads, for any operator that first sums
// over each channel of a sample and then maps its elements with coefficients of the channel.
//
// A block has whole rows: a group of channels of a sample or, if channels are last and adjacent, a sample.  Threads
// take ranges of blocks, each of which stays in its core's cache.  If there are few blocks, they take ranges of tiles
// instead.  The choice and the ranges depend only on the shape, and sums are added in a fixed order, so any number of
// threads gives the same bits.
#pragma once

#include "cpu/norm_lines.h"

namespace fastgan {
namespace FASTGAN_ISA {
namespace {

constexpr std::int64_t kTasks = 256;         // enough tasks for any machine
constexpr std::int64_t kFewBlocks = 16;      // with fewer blocks, their tiles are distributed instead
constexpr std::int64_t kRangesEach = 64;     // then: for all blocks together
constexpr std::int64_t kTile = 1 << 14;      // elements of a tile with channels last: the size of a core's cache
constexpr std::int64_t kPositions = 1 << 9;  // of such a tile: as many as a sum in single precision adds

// Channels first: consecutive elements of one channel.  Channels last: `count` positions of up to kLine channels
// each.
struct Tile {
  std::int64_t begin, size, count;  // size: elements of one position
  std::int64_t channel;             // the first one, within the block
};

struct Walk {
  const NormShape shape;
  std::int64_t blocks, channels, tiles;  // channels and tiles per block
  std::int64_t pieces, length;           // tiles per contiguous run, and elements or positions per tile

  explicit Walk(const NormShape& s) : shape(s) {
    if (s.channels_last) {
      blocks = s.samples;
      channels = s.channels;
      length = larger(1, smaller(kPositions, kTile / smaller(kLine, channels)));
      pieces = ceil_div(s.inner, length);
      tiles = pieces * ceil_div(channels, kLine);
    } else {
      blocks = s.rows();
      channels = s.of_row();
      pieces = ceil_div(s.inner, kLine);
      length = ceil_div(s.inner, pieces);
      tiles = channels * s.segments * pieces;
    }
  }

  Tile tile(std::int64_t block, std::int64_t index) const {
    const std::int64_t piece = index % pieces * length, of_piece = smaller(length, shape.inner - piece);
    const std::int64_t rest = index / pieces;
    if (shape.channels_last) {
      const std::int64_t channel = rest * kLine;
      return {(block * shape.inner + piece) * channels + channel, smaller(kLine, channels - channel), of_piece,
              channel};
    }
    const std::int64_t segment = rest % shape.segments, channel = rest / shape.segments;
    const std::int64_t sample = block / shape.groups, first = block % shape.groups * channels;
    const std::int64_t line = (sample * shape.segments + segment) * shape.channels + first + channel;
    return {line * shape.inner + piece, of_piece, 1, channel};
  }
};

template <class A>
struct Scratch {
  alignas(64) A data[3][kLine], out[2][kLine], sums[5][kLine];
};

// Sums and coefficients of the channels of a block, next to each other.
template <class Op>
struct OfChannels {
  using A = typename Op::Accumulator;
  std::int64_t channels;
  double* sums;
  A* numbers;

  double* sum(int k) const { return sums + k * channels; }
  A* number(int k) const { return numbers + k * channels; }
  void clear() const { fill(sums, Op::kSums * channels, 0.0); }
};

template <class Op>
class Storage {
 public:
  Storage(std::int64_t channels, std::int64_t sums, std::int64_t numbers)
      : channels_(channels), sums_(sums * Op::kSums * channels), numbers_(numbers * Op::kNumbers * channels) {}

  OfChannels<Op> at(std::int64_t sums, std::int64_t numbers) {
    return {channels_, sums_.data() + sums * Op::kSums * channels_,
            numbers_.data() + numbers * Op::kNumbers * channels_};
  }

 private:
  std::int64_t channels_;
  Buffer<double> sums_;
  Buffer<typename Op::Accumulator> numbers_;
};

template <class Op>
void run_by_blocks(const Op& op, int threads) {
  const Walk& w = op.walk;
  const std::int64_t tasks = smaller(w.blocks, kTasks);
  parallel_for(tasks, threads, [&](std::int64_t task) {
    Scratch<typename Op::Accumulator> scratch;
    Storage<Op> storage(w.channels, 1, 1);
    const OfChannels<Op> of = storage.at(0, 0);
    for (std::int64_t block = w.blocks * task / tasks; block < w.blocks * (task + 1) / tasks; ++block) {
      of.clear();
      op.start(block, of);
      for (std::int64_t i = 0; i < op.summed.tiles; ++i) op.sum(op.summed.tile(block, i), of, scratch);
      op.finish(block, of);
      for (std::int64_t i = 0; i < w.tiles; ++i) op.apply(w.tile(block, i), of, scratch);
    }
  });
}

template <class Op>
void run_by_tiles(const Op& op, int threads) {
  const Walk& w = op.walk;
  const std::int64_t ranges = smaller(w.tiles, ceil_div(kRangesEach, w.blocks));
  Storage<Op> storage(w.channels, w.blocks * ranges, w.blocks);
  const auto each_tile = [&](const Walk& walk, const auto& body) {
    parallel_for(w.blocks * ranges, threads, [&](std::int64_t task) {
      const std::int64_t block = task / ranges, range = task % ranges;
      const OfChannels<Op> of = storage.at(task, block);
      Scratch<typename Op::Accumulator> scratch;
      for (std::int64_t i = walk.tiles * range / ranges; i < walk.tiles * (range + 1) / ranges; ++i)
        body(walk.tile(block, i), of, scratch);
    });
  };

  for (std::int64_t task = 0; task < w.blocks * ranges; ++task) storage.at(task, 0).clear();
  for (std::int64_t block = 0; block < w.blocks; ++block) op.start(block, storage.at(block * ranges, block));
  each_tile(op.summed, [&](const Tile& tile, const auto& of, auto& scratch) { op.sum(tile, of, scratch); });
  for (std::int64_t block = 0; block < w.blocks; ++block) {
    const OfChannels<Op> all = storage.at(block * ranges, block);
    for (std::int64_t range = 1; range < ranges; ++range) op.merge(all, storage.at(block * ranges + range, block));
    op.finish(block, all);
  }
  each_tile(w, [&](const Tile& tile, const auto& of, auto& scratch) { op.apply(tile, of, scratch); });
}

template <class Op>
void run(const Op& op, int threads) {
  const Walk& w = op.walk;
  if (w.shape.size() < kSerial) threads = 1;
  if (w.blocks < kFewBlocks && w.tiles >= 8)
    run_by_tiles(op, threads);
  else
    run_by_blocks(op, threads);
}

}  // namespace
}  // namespace FASTGAN_ISA
}  // namespace fastgan
