// Upsampling, leaky ReLU with gain and clamp, downsampling: y = D act(U (x + bias)), plane by plane.
//
// A thread keeps one upsampled plane, so the upsampled image never goes to memory: bytes are one read of x, one write
// of y and a bit or two for each upsampled element.  With S the slopes, the backward is U^T S D^T, the same steps with
// the transposes of the two filters and the slopes read from the bits; so is the backward of that.
#include "cpu/filtered_lrelu.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "common/dtype.h"
#include "common/workspace.h"
#include "cpu/upfirdn2d_rows.h"

namespace fastgan {
namespace FASTGAN_ISA {
namespace {

// The lowest bits of eight bytes, as one byte.
std::uint8_t pack(const std::uint8_t* flags) {
  std::uint8_t byte = 0;
  for (int j = 0; j < 8; ++j) byte = static_cast<std::uint8_t>(byte | (flags[j] << j));
  return byte;
}

template <class A>
class Row {
 public:
  Row(Index width, const LreluOptions& options)
      : width_(width),
        bytes_((width + 7) / 8),
        slope_(static_cast<A>(options.slope)),
        gain_(static_cast<A>(options.gain)),
        clamp_(static_cast<A>(options.clamp)),
        positive_(8 * bytes_),
        inside_(8 * bytes_) {
    std::fill(positive_.data(), positive_.data() + 8 * bytes_, std::uint8_t{0});
    std::fill(inside_.data(), inside_.data() + 8 * bytes_, std::uint8_t{0});
  }

  // u = act(u), and the bits if they are kept.
  void apply(A* __restrict u, std::uint8_t* signs, std::uint8_t* inside) {
    std::uint8_t* __restrict positive = positive_.data();
    std::uint8_t* __restrict within = inside_.data();
    const A slope = slope_, gain = gain_, clamp = clamp_;
#pragma omp simd
    for (Index i = 0; i < width_; ++i) {
      const bool above = u[i] > A{0};
      const A v = gain * (above ? u[i] : slope * u[i]);
      const bool high = v > clamp, low = v < -clamp;
      positive[i] = above;
      within[i] = !(high || low);
      u[i] = high ? clamp : low ? -clamp : v;
    }
    for (Index b = 0; signs && b < bytes_; ++b) signs[b] = pack(positive + 8 * b);
    for (Index b = 0; inside && b < bytes_; ++b) inside[b] = pack(within + 8 * b);
  }

  // u = S u
  void multiply(A* __restrict u, const std::uint8_t* signs, const std::uint8_t* inside) const {
    const A down = gain_ * slope_, gain = gain_;
    for (Index b = 0; b < bytes_; ++b) {
      const unsigned sign = signs[b], kept = inside ? inside[b] : 0xffu;
      const Index count = std::min<Index>(8, width_ - 8 * b);
      for (Index j = 0; j < count; ++j) {
        const A factor = (sign >> j) & 1u ? gain : down;
        u[8 * b + j] = (kept >> j) & 1u ? u[8 * b + j] * factor : A{0};
      }
    }
  }

  Index bytes() const { return bytes_; }

 private:
  Index width_, bytes_;
  A slope_, gain_, clamp_;
  Buffer<std::uint8_t> positive_, inside_;
};

template <class A>
std::vector<A> weights_of(const UpfirdnShape& s, const double* taps) {
  return std::vector<A>(taps, taps + (s.separable ? s.taps[0] + s.taps[1] : s.taps[0] * s.taps[1]));
}

template <class T>
void run(const T* x, const LreluBias& bias, T* y, const LreluMasks& masks, const LreluOptions& options,
         const UpfirdnShape& first, const double* first_taps, const UpfirdnShape& second, const double* second_taps,
         int threads) {
  using A = typename Accumulate<T>::type;
  const A* const biases = static_cast<const A*>(bias.values);
  const std::vector<A> up_weights = weights_of<A>(first, first_taps), down_weights = weights_of<A>(second, second_taps);
  const Columns up_columns(first), down_columns(second);
  const Index height = first.out_height, width = first.out_width;
  const Index tasks = std::max<Index>(1, std::min<Index>(first.planes, threads));
  parallel_for(tasks, threads, [&](Index task) {
    Buffer<A> plane(height * width);
    Row<A> row(width, options);
    Rows<T, A> up(x, first, up_columns, up_weights);
    Rows<A, T> down(plane.data(), second, down_columns, down_weights);
    for (Index p = first.planes * task / tasks; p < first.planes * (task + 1) / tasks; ++p) {
      const A shift = biases ? biases[p % bias.channels] : A{0};
      for (Index o = 0; o < height; ++o) {
        A* u = plane.data() + o * width;
        const Index bits = (p * height + o) * row.bytes();
        std::uint8_t* signs = masks.signs ? masks.signs + bits : nullptr;
        std::uint8_t* inside = masks.inside ? masks.inside + bits : nullptr;
        up.run(p, o, u, shift);
        masks.read ? row.multiply(u, signs, inside) : row.apply(u, signs, inside);
      }
      for (Index o = 0; o < second.out_height; ++o) down.run(0, o, y + (p * second.out_height + o) * second.out_width);
    }
  });
}

}  // namespace

void filtered_lrelu(Dtype dtype, const void* x, const LreluBias& bias, void* y, const LreluMasks& masks,
                    const LreluOptions& options, const UpfirdnShape& first, const double* first_taps,
                    const UpfirdnShape& second, const double* second_taps, int threads) {
  with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    run(static_cast<const T*>(x), bias, static_cast<T*>(y), masks, options, first, first_taps, second, second_taps,
        threads);
  });
}

}  // namespace FASTGAN_ISA
}  // namespace fastgan
