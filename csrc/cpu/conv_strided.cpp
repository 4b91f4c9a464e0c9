// Strided convolutions between many channels: y from x, and dx from dy.
//
// Both are sums of the same form.  With a target (y or dx) whose pixels are split into phases, and a source (x or dy),
//
//   target[phases i + p][m] = sum over taps k of phase p, and channels c, of W[k][c, m] source[step i + ahead(k)][c]
//
// in each dimension.  For y there is one phase, step is the stride and ahead(k) = k dilation - padding.  For dx there
// are as many phases as the stride, step is 1, and a tap belongs to the phase p for which
//
//   ahead(k) = (p + padding - k dilation) / stride
//
// is an integer.  So nothing is multiplied with the zeros that a stride inserts between the values of dy.
//
// The floor: 2 kh kw operations per element of y and channel of x; nothing else grows with both numbers of channels.
// Sources are packed with channels last and zeros around them, weights in blocks of lanes of m.  A tile of positions
// times such a block stays in registers: each weight is a vector lane, and each source value a scalar for all lanes.
// Each sum is taken in the same order for any number of threads.
#include "cpu/conv_strided.h"

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "common/workspace.h"
#include "cpu/conv_tile.h"

namespace fastgan {
namespace FASTGAN_ISA {
namespace {

// A tile has kTile positions of a target and kBlock of its channels.
constexpr std::int64_t kPositions = 256;  // per task: enough to read its weights from memory only once

struct Tap {
  std::int64_t kernel, ahead;
};

// One dimension of the sums above.
struct Axis {
  std::int64_t source, target, kernel, step, phases;
  std::vector<std::vector<Tap>> taps;  // for each phase
  std::int64_t first = 0, last = 0;    // the smallest and the largest `ahead`, and 0
  std::int64_t groups;                 // number of values of i

  static Axis forward(const ConvDimension& d) {
    Axis axis{d.size, d.out, d.kernel, d.stride, 1};
    for (std::int64_t k = 0; k < d.kernel; ++k) axis.taps[0].push_back({k, k * d.dilation - d.padding});
    return axis.measured();
  }

  static Axis backward(const ConvDimension& d) {
    Axis axis{d.out, d.size, d.kernel, 1, d.stride};
    for (std::int64_t p = 0; p < d.stride; ++p)
      for (std::int64_t k = 0; k < d.kernel; ++k) {
        const std::int64_t ahead = p + d.padding - k * d.dilation;
        if (ahead % d.stride == 0) axis.taps[static_cast<std::size_t>(p)].push_back({k, ahead / d.stride});
      }
    return axis.measured();
  }

  // Number of source values, including the zeros around it, that `count` consecutive values of i may read.
  std::int64_t span(std::int64_t count) const { return (count - 1) * step + 1 + last - first; }

 private:
  Axis(std::int64_t source, std::int64_t target, std::int64_t kernel, std::int64_t step, std::int64_t phases)
      : source(source),
        target(target),
        kernel(kernel),
        step(step),
        phases(phases),
        taps(static_cast<std::size_t>(phases)),
        groups(over(target, phases)) {}

  Axis measured() {
    for (const auto& of_phase : taps)
      for (const Tap& tap : of_phase) {
        first = std::min(first, tap.ahead);
        last = std::max(last, tap.ahead);
      }
    return *this;
  }
};

// The sums over all channels, in tasks of a few groups of rows (values of i along the first dimension).
class Strided {
 public:
  Strided(std::int64_t batch, std::int64_t source_channels, std::int64_t target_channels, Axis rows, Axis columns)
      : rows_(std::move(rows)),
        columns_(std::move(columns)),
        channels_(source_channels),
        targets_(target_channels),
        blocks_(over(target_channels, kBlock)),
        line_(std::max(columns_.span(columns_.groups), columns_.source - columns_.first) * source_channels),
        groups_(batch * rows_.groups) {}

  // The weight of target channel m, source channel c and tap t is at from[m target_stride + c source_stride + t].
  void run(const float* source, const float* from, std::int64_t target_stride, std::int64_t source_stride,
           const float* bias, float* target, int threads) {
    const std::int64_t taps = rows_.kernel * columns_.kernel;
    const float* end = from + targets_ * channels_ * taps;
    Buffer<float> weight(blocks_ * taps * channels_ * kBlock);
    parallel_for(blocks_ * channels_, threads, [&](std::int64_t task) {
      const std::int64_t block = task / channels_, c = task % channels_;
      pack_weight(from + block * kBlock * target_stride + c * source_stride, end, target_stride, left(block),
                  &weight[(block * taps * channels_ + c) * kBlock]);
    });
    const std::int64_t per = std::max<std::int64_t>(kPositions / columns_.groups, 1), wanted = over(groups_, per);
    const std::int64_t tasks = std::min(over(wanted, threads) * threads, groups_), most = over(groups_, tasks);
    const std::int64_t samples = over(most - 1, rows_.groups) + 1;  // samples that a task may have groups of
    const std::int64_t packed = (most * rows_.step + samples * rows_.span(1)) * line_;
    const std::int64_t size = packed + columns_.phases * over(most * columns_.groups, kTile) * kTile * kBlock;
    Buffer<float> scratch(threads * size);
    each_task(tasks, threads, [&](std::int64_t task, int thread) {
      float* own = scratch.data() + thread * size;
      run_groups(groups_ * task / tasks, groups_ * (task + 1) / tasks, source, weight.data(), bias, target, own,
                 own + packed);
    });
  }

 private:
  std::int64_t left(std::int64_t block) const { return std::min<std::int64_t>(targets_ - block * kBlock, kBlock); }

  // The taps of one source channel and `count` target channels, `stride` apart: (tap, channel, lane).  Vectors may read
  // beyond the taps, up to `end`.
  void pack_weight(const float* from, const float* end, std::int64_t stride, std::int64_t count, float* to) const {
    const std::int64_t taps = rows_.kernel * columns_.kernel, tap_stride = channels_ * kBlock;
    for (std::int64_t m = 0; m < kBlock; m += kSide)
      for (std::int64_t t = 0; t < taps; t += kSide) {
        const float* square = from + m * stride + t;
        const std::int64_t columns = std::min<std::int64_t>(taps - t, kSide);
        if (m + kSide <= count && end - square >= (kSide - 1) * stride + kSide)
          transpose_square([&](int r) { return square + r * stride; },
                           [&](int c) { return to + (t + c) * tap_stride + m; }, columns);
        else
          for (std::int64_t c = 0; c < columns; ++c)
            for (std::int64_t r = 0; r < kSide; ++r)
              to[(t + c) * tap_stride + m + r] = m + r < count ? square[r * stride + c] : 0;
      }
  }

  // The targets of groups [begin, end) of rows, over all samples.
  void run_groups(std::int64_t begin, std::int64_t end, const float* source, const float* weight, const float* bias,
                  float* target, float* packed, float* sums) const {
    const std::int64_t width = columns_.groups, positions = (end - begin) * width, tiles = over(positions, kTile);
    std::vector<std::int64_t> at(static_cast<std::size_t>(tiles * kTile));  // where a position's first tap is packed
    std::vector<std::int64_t> row(at.size());                               // of the source, before `ahead` is added
    float* part = packed;
    std::int64_t i = 0;
    for (std::int64_t group = begin; group < end;) {
      const std::int64_t sample = group / rows_.groups, base = group - sample * rows_.groups;
      const std::int64_t count = std::min(end - group, rows_.groups - base);
      for (std::int64_t g = 0; g < count; ++g)
        for (std::int64_t j = 0; j < width; ++j, ++i) {
          at[i] =
              part - packed + (g * rows_.step - rows_.first) * line_ + (j * columns_.step - columns_.first) * channels_;
          row[i] = (base + g) * rows_.step;
        }
      pack(source, sample, base * rows_.step + rows_.first, rows_.span(count), part);
      part += rows_.span(count) * line_;
      group += count;
    }
    for (; i < tiles * kTile; ++i) at[i] = at[positions - 1], row[i] = row[positions - 1];

    const std::int64_t phase_size = tiles * kTile * kBlock;
    for (std::int64_t block = 0; block < blocks_; ++block)
      for (std::int64_t p = 0; p < rows_.phases; ++p) {
        for (std::int64_t q = 0; q < columns_.phases; ++q) {
          float* phase = sums + q * phase_size;
          begin_sums(block, bias, tiles * kTile, phase);
          for (const Tap& tap : rows_.taps[p]) {
            const float* lines = weight + (block * rows_.kernel + tap.kernel) * columns_.kernel * channels_ * kBlock;
            for (std::int64_t tile = 0; tile < tiles; ++tile)
              if (meets(&row[tile * kTile], tap.ahead))
                multiply(packed + tap.ahead * line_, &at[tile * kTile], columns_.taps[q], lines,
                         phase + tile * kTile * kBlock);
          }
        }
        for (std::int64_t group = begin; group < end; ++group) {
          const std::int64_t sample = group / rows_.groups, h = group % rows_.groups * rows_.phases + p;
          if (h < rows_.target)
            store(sums + (group - begin) * width * kBlock, phase_size, left(block),
                  target + ((sample * targets_ + block * kBlock) * rows_.target + h) * columns_.target);
        }
      }
  }

  // Rows [first, first + count) of a sample as (row, column, channel), with zeros around it.
  void pack(const float* source, std::int64_t sample, std::int64_t first, std::int64_t count, float* to) const {
    std::fill(to, to + count * line_, 0.f);
    const std::int64_t begin = std::max<std::int64_t>(first, 0), end = std::min(first + count, rows_.source);
    if (begin >= end) return;
    const std::int64_t width = columns_.source, plane = rows_.source * width, pixels = (end - begin) * width;
    const float* from = source + sample * channels_ * plane + begin * width;
    std::vector<float*> at(static_cast<std::size_t>(pixels));
    for (std::int64_t i = 0; i < pixels; ++i)
      at[i] = to + (begin - first + i / width) * line_ + (i % width - columns_.first) * channels_;
    std::int64_t c = 0;
    for (; c + kSide <= channels_; c += kSide) {
      std::int64_t i = 0;
      for (; i + kSide <= pixels; i += kSide)
        transpose_square([&](int r) { return from + (c + r) * plane + i; }, [&](int k) { return at[i + k] + c; });
      for (; i < pixels; ++i)
        for (int r = 0; r < kSide; ++r) at[i][c + r] = from[(c + r) * plane + i];
    }
    for (; c < channels_; ++c)
      for (std::int64_t i = 0; i < pixels; ++i) at[i][c] = from[c * plane + i];
  }

  void begin_sums(std::int64_t block, const float* bias, std::int64_t positions, float* sums) const {
    Vec<float> values[kVectors] = {};
    if (bias != nullptr)
      std::memcpy(values, bias + block * kBlock, sizeof(float) * static_cast<std::size_t>(left(block)));
    for (std::int64_t i = 0; i < positions; ++i)
      for (int v = 0; v < kVectors; ++v) store_vector(sums + i * kBlock + v * kSide, values[v]);
  }

  // Whether any position of a tile meets a row of the source under this tap, rather than the zeros around it.
  bool meets(const std::int64_t* row, std::int64_t ahead) const {
    for (int i = 0; i < kTile; ++i)
      if (row[i] + ahead >= 0 && row[i] + ahead < rows_.source) return true;
    return false;
  }

  // A row of taps of one tile: each source channel times its line of weights.
  void multiply(const float* source, const std::int64_t* at, const std::vector<Tap>& taps, const float* weight,
                float* sums) const {
    Vec<float> total[kTile][kVectors];
#pragma GCC unroll 16
    for (int i = 0; i < kTile; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) total[i][v] = load_vector(sums + i * kBlock + v * kSide);
    for (const Tap& tap : taps) {
      const float* lines = weight + tap.kernel * channels_ * kBlock;
      const float* x[kTile];
#pragma GCC unroll 16
      for (int i = 0; i < kTile; ++i) x[i] = source + at[i] + tap.ahead * channels_;
      add_products(x, 1, channels_, lines, total);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kTile; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) store_vector(sums + i * kBlock + v * kSide, total[i][v]);
  }

  // Stores a row of `count` channels of the target, from the sums of its positions.
  void store(const float* sums, std::int64_t phase_size, std::int64_t count, float* to) const {
    const std::int64_t width = columns_.target, plane = rows_.target * width, phases = columns_.phases;
    const auto at = [&](std::int64_t w) { return sums + w % phases * phase_size + w / phases * kBlock; };
    std::int64_t w = 0;
    if (count == kBlock)
      for (; w + kSide <= width; w += kSide)
        for (std::int64_t m = 0; m < kBlock; m += kSide)
          transpose_square([&](int r) { return at(w + r) + m; }, [&](int c) { return to + (m + c) * plane + w; });
    for (; w < width; ++w)
      for (std::int64_t m = 0; m < count; ++m) to[m * plane + w] = at(w)[m];
  }

  const Axis rows_, columns_;
  const std::int64_t channels_, targets_, blocks_;
  const std::int64_t line_;    // of a packed row of the source, in elements
  const std::int64_t groups_;  // groups of rows, over all samples
};

}  // namespace

void conv_strided_forward(const float* x, const float* weight, const float* bias, float* y, const ConvShape& s,
                          int threads) {
  const std::int64_t taps = s.rows.kernel * s.columns.kernel;
  ask_for_huge_pages(y, s.batch * s.out_channels * s.rows.out * s.columns.out * std::int64_t{sizeof(float)});
  Strided(s.batch, s.in_channels, s.out_channels, Axis::forward(s.rows), Axis::forward(s.columns))
      .run(x, weight, s.in_channels * taps, taps, bias, y, threads);
}

void conv_strided_input_gradient(const float* dy, const float* weight, float* dx, const ConvShape& s, int threads) {
  const std::int64_t taps = s.rows.kernel * s.columns.kernel;
  ask_for_huge_pages(dx, s.batch * s.in_channels * s.rows.size * s.columns.size * std::int64_t{sizeof(float)});
  Strided(s.batch, s.out_channels, s.in_channels, Axis::backward(s.rows), Axis::backward(s.columns))
      .run(dy, weight, taps, s.in_channels * taps, nullptr, dx, threads);
}

}  // namespace FASTGAN_ISA
}  // namespace fastgan
