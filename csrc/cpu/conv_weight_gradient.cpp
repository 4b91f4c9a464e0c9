// The gradient of a convolution's weight.  With q = (sample, pixel of y) and l = (channel of x, tap of the kernel),
//
//   dw[m][l] = sum over q of dy[m][q] patch[q][l],     patch[q][l] the value of x that meets tap l at q
//
// The floor: two operations per q, m and l, and one write of dw, which dominates if there are few q.
//
// A tile of dw stays in registers: scalars of dy times lanes l.  Lines of lanes are packed, some positions at a time.
// With a 1x1 kernel, positions are the last dimension of x: squares are transposed, and dy is read in place.  Otherwise
// lines are copied, one kernel row at a time, from images with zeros around them.  dy is also packed by tiles, because
// its runs of pixels would be short.  Sums of at least kLeastSummed positions are added separately, then those sums are
// added, in the same order for any number of threads.
#include "cpu/conv_weight_gradient.h"

#include <algorithm>
#include <cstring>

#include "common/workspace.h"
#include "cpu/conv_tile.h"

namespace fastgan {
namespace FASTGAN_ISA {
namespace {

constexpr std::int64_t kPacked = 1 << 16;   // values that are packed together: they stay in a core's cache
constexpr std::int64_t kLeastSummed = 256;  // positions; with fewer, loading the sums so far takes as long
constexpr std::int64_t kMostSummed = 2048;  // positions; more would add too many numbers one by one

// dw as (rows, lanes): row m, lane l is at [m row_stride + l lane_stride].
struct Result {
  float* at;
  std::int64_t rows, lanes, row_stride, lane_stride;

  std::int64_t tiles() const { return over(rows, kTile); }
  std::int64_t blocks() const { return over(lanes, kBlock); }

  // Stores a tile of values, or adds it to the stored ones.
  void take(std::int64_t tile, std::int64_t block, bool first, const Vec<float> (&values)[kTile][kVectors]) const {
    float sums[kTile][kBlock];
    std::memcpy(sums, values, sizeof sums);
    const std::int64_t m = tile * kTile, l = block * kBlock, count = std::min<std::int64_t>(lanes - l, kBlock);
    for (std::int64_t i = 0; i < std::min<std::int64_t>(rows - m, kTile); ++i) {
      float* to = at + (m + i) * row_stride + l * lane_stride;
      if (lane_stride == 1)  // a separate case, so that it vectorizes
        put(sums[i], count, first, to, 1);
      else
        put(sums[i], count, first, to, lane_stride);
    }
  }

 private:
  static void put(const float* sums, std::int64_t count, bool first, float* to, std::int64_t stride) {
    if (first)
      for (std::int64_t l = 0; l < count; ++l) to[l * stride] = sums[l];
    else
      for (std::int64_t l = 0; l < count; ++l) to[l * stride] += sums[l];
  }
};

// pack(block, q, count, to) packs the lines of a block of lanes at count <= kSide positions from q;
// add(tile, begin, count, lines, values) adds the products of a tile's scalars at count positions from begin.
template <class Pack, class Add>
void sum_over_positions(std::int64_t positions, const Result& result, int threads, const Pack& pack, const Add& add) {
  const std::int64_t blocks = result.blocks(), tiles = result.tiles();
  const std::int64_t most = std::clamp(kPacked / result.lanes / kSide * kSide, kLeastSummed, kMostSummed);
  Buffer<float> packed(blocks * kBlock * std::min(most, positions));
  for (std::int64_t begin = 0; begin < positions; begin += most) {
    const std::int64_t count = std::min(most, positions - begin), squares = over(count, kSide);
    parallel_for(blocks * squares, threads, [&](std::int64_t task) {
      const std::int64_t block = task / squares, first = task % squares * kSide;
      pack(block, begin + first, std::min<std::int64_t>(count - first, kSide),
           &packed[(block * count + first) * kBlock]);
    });
    parallel_for(blocks * tiles, threads, [&](std::int64_t task) {
      const std::int64_t block = task / tiles, tile = task % tiles;
      Vec<float> values[kTile][kVectors] = {};
      add(tile, begin, count, &packed[block * count * kBlock], values);
      result.take(tile, block, begin == 0, values);
    });
  }
}

// 1x1 kernels: both operands are (sample, channel, pixel).
class OnePixel {
 public:
  OnePixel(const float* rows, const float* lanes, std::int64_t batch, std::int64_t pixels, const Result& result)
      : from_rows_(rows), from_lanes_(lanes), positions_(batch * pixels), pixels_(pixels), result_(result) {}

  // Includes those of idle lanes and rows.
  std::int64_t products() const { return result_.blocks() * kBlock * result_.tiles() * kTile; }

  void run(int threads) const {
    sum_over_positions(
        positions_, result_, threads,
        [&](std::int64_t block, std::int64_t q, std::int64_t count, float* to) { turn_block(block, q, count, to); },
        [&](std::int64_t tile, std::int64_t begin, std::int64_t count, const float* lines, auto& values) {
          each_run(begin, begin + count, pixels_,
                   [&](std::int64_t n, std::int64_t p, std::int64_t k, std::int64_t run) {
                     const float* rows[kTile];
                     for (int i = 0; i < kTile; ++i)
                       rows[i] =
                           from_rows_ + (n * result_.rows + std::min(tile * kTile + i, result_.rows - 1)) * pixels_ + p;
                     add_products(rows, 1, run, lines + k * kBlock, values);
                   });
        });
  }

 private:
  void turn_block(std::int64_t block, std::int64_t q, std::int64_t count, float* to) const {
    const std::int64_t lanes = result_.lanes, pixel = q % pixels_;
    for (std::int64_t half = 0, l = block * kBlock; half < kVectors; ++half, l += kSide, to += kSide) {
      if (count == kSide && pixel + kSide <= pixels_ && l + kSide <= lanes) {
        const float* from = from_lanes_ + (q / pixels_ * lanes + l) * pixels_ + pixel;
        transpose_square([&](int r) { return from + r * pixels_; }, [&](int k) { return to + k * kBlock; });
        continue;
      }
      each_run(q, q + count, pixels_, [&](std::int64_t n, std::int64_t p, std::int64_t k, std::int64_t run) {
        for (std::int64_t r = 0; r < kSide; ++r)
          for (std::int64_t j = 0; j < run; ++j)
            to[(k + j) * kBlock + r] = l + r < lanes ? from_lanes_[(n * lanes + l + r) * pixels_ + p + j] : 0;
      });
    }
  }

  const float *from_rows_, *from_lanes_;
  const std::int64_t positions_, pixels_;
  const Result result_;
};

// Kernels of any size.
class Patches {
 public:
  Patches(const float* dy, const float* x, float* dw, const ConvShape& s)
      : dy_(dy),
        x_(x),
        s_(s),
        pixels_(s.rows.out * s.columns.out),
        width_(s.columns.size + 2 * s.columns.padding),
        plane_((s.rows.size + 2 * s.rows.padding) * width_),
        result_{dw, s.out_channels, s.in_channels * s.rows.kernel * s.columns.kernel,
                s.in_channels * s.rows.kernel * s.columns.kernel, 1} {}

  void run(int threads) const {
    const std::int64_t positions = s_.batch * pixels_;
    Buffer<float> images(s_.batch * s_.in_channels * plane_ + kCopied);
    Buffer<float> scalars(result_.tiles() * positions * kTile);
    parallel_for(s_.batch * s_.in_channels, threads,
                 [&](std::int64_t image) { surround(image, &images[image * plane_]); });
    parallel_for(result_.tiles(), threads,
                 [&](std::int64_t tile) { turn_tile(tile, &scalars[tile * positions * kTile]); });
    sum_over_positions(
        positions, result_, threads,
        [&](std::int64_t block, std::int64_t q, std::int64_t count, float* to) {
          copy_block(block, q, count, images.data(), to);
        },
        [&](std::int64_t tile, std::int64_t begin, std::int64_t count, const float* lines, auto& values) {
          const float* rows[kTile];
          for (int i = 0; i < kTile; ++i) rows[i] = &scalars[(tile * positions + begin) * kTile + i];
          add_products(rows, kTile, count, lines, values);
        });
  }

 private:
  static constexpr std::int64_t kCopied = 4;  // values copied together, from one row of the kernel

  // An image with zeros around it.
  void surround(std::int64_t image, float* to) const {
    std::fill(to, to + plane_, 0.f);
    const float* from = x_ + image * s_.rows.size * s_.columns.size;
    for (std::int64_t h = 0; h < s_.rows.size; ++h)
      copy(from + h * s_.columns.size, s_.columns.size, to + (h + s_.rows.padding) * width_ + s_.columns.padding);
  }

  // (position, channel of the tile)
  void turn_tile(std::int64_t tile, float* to) const {
    for (std::int64_t i = 0; i < kTile; ++i) {
      const std::int64_t m = std::min(tile * kTile + i, s_.out_channels - 1);
      for (std::int64_t n = 0; n < s_.batch; ++n)
        for (std::int64_t p = 0; p < pixels_; ++p)
          to[(n * pixels_ + p) * kTile + i] = dy_[(n * s_.out_channels + m) * pixels_ + p];
    }
  }

  // (position, lane)
  void copy_block(std::int64_t block, std::int64_t q, std::int64_t count, const float* images, float* to) const {
    struct Part {
      std::int64_t lane, from, length;
    } parts[kBlock];
    const std::int64_t begin = block * kBlock, lanes = std::min<std::int64_t>(result_.lanes - begin, kBlock);
    const std::int64_t taps = s_.columns.dilation == 1 ? s_.columns.kernel : 1;  // taps that are adjacent
    int size = 0;
    for (std::int64_t lane = 0; lane < lanes;) {
      const std::int64_t l = begin + lane, column = l % s_.columns.kernel, row = l / s_.columns.kernel % s_.rows.kernel;
      const std::int64_t channel = l / (s_.columns.kernel * s_.rows.kernel);
      const std::int64_t length = std::min(lanes - lane, taps - column % taps);
      parts[size++] = {lane, channel * plane_ + row * s_.rows.dilation * width_ + column * s_.columns.dilation, length};
      lane += length;
    }
    for (std::int64_t k = 0; k < count; ++k, to += kBlock) {
      const std::int64_t n = (q + k) / pixels_, pixel = (q + k) % pixels_;
      const float* corner = images + n * s_.in_channels * plane_ + pixel / s_.columns.out * s_.rows.stride * width_ +
                            pixel % s_.columns.out * s_.columns.stride;
      for (int i = 0; i < size; ++i) {
        const Part& part = parts[i];
        const float* from = corner + part.from;
        float* at = to + part.lane;
        if (part.lane + kCopied <= kBlock && part.length <= kCopied)  // the next part overwrites the surplus
          std::memcpy(at, from, sizeof(float) * kCopied);
        else
          copy(from, part.length, at);
      }
      std::fill(to + lanes, to + kBlock, 0.f);
    }
  }

  const float *dy_, *x_;
  const ConvShape s_;
  const std::int64_t pixels_, width_, plane_;
  const Result result_;
};

}  // namespace

void conv_weight_gradient(const float* dy, const float* x, float* dw, const ConvShape& s, int threads) {
  const auto is_one_pixel = [](const ConvDimension& d) { return d.kernel == 1 && d.stride == 1 && d.padding == 0; };
  const std::int64_t pixels = s.rows.out * s.columns.out, m = s.out_channels, c = s.in_channels;
  if (!is_one_pixel(s.rows) || !is_one_pixel(s.columns) || pixels < kSide) return Patches(dy, x, dw, s).run(threads);
  const OnePixel by_rows(dy, x, s.batch, pixels, {dw, m, c, c, 1}), by_lanes(x, dy, s.batch, pixels, {dw, c, m, 1, c});
  (by_rows.products() <= by_lanes.products() ? by_rows : by_lanes).run(threads);
}

}  // namespace FASTGAN_ISA
}  // namespace fastgan
