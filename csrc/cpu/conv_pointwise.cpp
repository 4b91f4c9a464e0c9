// Convolutions with 1x1 kernels: y from x, and dx from dy.  With q = (sample, pixel),
//
//   y[m][q] = b[m] + sum_c w[m][c] x[c][q]     dx[c][q] = sum_m w[m][c] dy[m][q]
//
// The floor: two operations per pixel, channel of x and channel of y; with few channels, one read of the source and one
// write of the target.
//
// A tile of sums stays in registers.  It multiplies weights, read as scalars in place, with vectors of positions q.
// Positions are packed, across samples if these are small.  Each sum is taken in the same order for any number of
// threads.
#include "cpu/conv_pointwise.h"

#include <algorithm>
#include <cstring>

#include "common/workspace.h"
#include "cpu/conv_tile.h"

namespace fastgan {
namespace FASTGAN_ISA {
namespace {

constexpr std::int64_t kPacked = 1 << 17;  // values that a task packs: they stay in a core's cache
constexpr std::int64_t kMostPanels = 16;   // panels of kBlock positions per task
constexpr std::int64_t kTasks = 4;         // tasks per thread, if there is enough work: a late thread then takes fewer

// The weight of target channel m and source channel c is at from[m target_stride + c source_stride].
struct Weight {
  const float* from;
  std::int64_t target_stride, source_stride;
};

// target[m][q] = bias[m] + sum over channels c of weight[m][c] source[c][q].
class Products {
 public:
  Products(std::int64_t batch, std::int64_t channels, std::int64_t targets, std::int64_t pixels)
      : channels_(channels), targets_(targets), pixels_(pixels), positions_(batch * pixels) {}

  void run(const float* source, const Weight& weight, const float* bias, float* target, int threads) const {
    const std::int64_t panels = over(positions_, kBlock), tiles = over(targets_, kTile);
    const std::int64_t most = std::clamp<std::int64_t>(kPacked / (channels_ * kBlock), 1, kMostPanels);
    const std::int64_t groups = std::min(std::max(over(panels, most), kTasks * threads), panels);
    const std::int64_t parts = std::min(over(threads, groups), tiles);  // parts of the target's channels
    const std::int64_t size = over(panels, groups) * channels_ * kBlock;
    Buffer<float> packed(threads * size);
    each_task(groups * parts, threads, [&](std::int64_t task, int thread) {
      const std::int64_t group = task / parts, part = task % parts;
      run_panels(panels * group / groups, panels * (group + 1) / groups, tiles * part / parts * kTile,
                 std::min(tiles * (part + 1) / parts * kTile, targets_), source, weight, bias, target,
                 packed.data() + thread * size);
    });
  }

 private:
  // Panels [begin, end) of the targets [first, last).
  void run_panels(std::int64_t begin, std::int64_t end, std::int64_t first, std::int64_t last, const float* source,
                  const Weight& weight, const float* bias, float* target, float* packed) const {
    const std::int64_t size = channels_ * kBlock;
    for (std::int64_t panel = begin; panel < end; ++panel) pack(panel, source, packed + (panel - begin) * size);
    for (std::int64_t m = first; m < last; m += kTile) {
      const std::int64_t count = std::min<std::int64_t>(kTile, last - m);
      const float* rows[kTile];
      Vec<float> biases[kTile];
      for (int i = 0; i < kTile; ++i) {
        const std::int64_t row = m + std::min<std::int64_t>(i, count - 1);  // duplicate rows are not stored
        rows[i] = weight.from + row * weight.target_stride;
        biases[i] = Vec<float>{} + (bias == nullptr ? 0.f : bias[row]);
      }
      for (std::int64_t panel = begin; panel < end; ++panel) {
        Vec<float> tile[kTile][kVectors];
#pragma GCC unroll 16
        for (int i = 0; i < kTile; ++i)
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) tile[i][v] = biases[i];
        add_products(rows, weight.source_stride, channels_, packed + (panel - begin) * size, tile);
        store(panel, m, count, tile, target);
      }
    }
  }

  template <class Body>
  void each_run_of(std::int64_t panel, const Body& body) const {
    each_run(panel * kBlock, std::min((panel + 1) * kBlock, positions_), pixels_, body);
  }

  // (channel, lane).  Sums in lanes beyond the last position are not stored.
  void pack(std::int64_t panel, const float* source, float* to) const {
    each_run_of(panel, [&](std::int64_t sample, std::int64_t pixel, std::int64_t lane, std::int64_t count) {
      const float* from = source + sample * channels_ * pixels_ + pixel;
      for (std::int64_t c = 0; c < channels_; ++c) copy(from + c * pixels_, count, to + c * kBlock + lane);
    });
  }

  void store(std::int64_t panel, std::int64_t m, std::int64_t rows, const Vec<float> (&tile)[kTile][kVectors],
             float* target) const {
    float sums[kTile][kBlock];
    std::memcpy(sums, tile, sizeof sums);
    each_run_of(panel, [&](std::int64_t sample, std::int64_t pixel, std::int64_t lane, std::int64_t count) {
      float* to = target + (sample * targets_ + m) * pixels_ + pixel;
      for (std::int64_t i = 0; i < rows; ++i) copy(sums[i] + lane, count, to + i * pixels_);
    });
  }

  const std::int64_t channels_, targets_, pixels_, positions_;
};

}  // namespace

void conv_pointwise_forward(const float* x, const float* weight, const float* bias, float* y, const PointwiseShape& s,
                            int threads) {
  ask_for_huge_pages(y, s.batch * s.out_channels * s.pixels * std::int64_t{sizeof(float)});
  Products(s.batch, s.in_channels, s.out_channels, s.pixels).run(x, {weight, s.in_channels, 1}, bias, y, threads);
}

void conv_pointwise_input_gradient(const float* dy, const float* weight, float* dx, const PointwiseShape& s,
                                   int threads) {
  ask_for_huge_pages(dx, s.batch * s.in_channels * s.pixels * std::int64_t{sizeof(float)});
  Products(s.batch, s.out_channels, s.in_channels, s.pixels).run(dy, {weight, 1, s.in_channels}, nullptr, dx, threads);
}

}  // namespace FASTGAN_ISA
}  // namespace fastgan
