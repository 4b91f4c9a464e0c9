// linear, relu and leaky_relu of x + bias, times gain, cut off at +-clamp: linear in pieces.
//
//     y = s(x + b) (x + b)    s(u) = gain where u > 0, gain * negative_slope elsewhere, 0 where |y| is cut off
//
// All that a derivative needs is which piece an element is in: one bit, and a second where there is a clamp.  With S
// the diagonal matrix of the slopes, dx = S dy and db = sum dx; for the gradients H and k of these, by dy = S (H + k).
// So one operator, (g, k) -> (S (g + k), its sum over each channel), is every derivative, and its own transpose.
//
// Bytes: forward one read, one write, 1/32 of each for the bits; a derivative the same, where autograd reads x or y.
#include <cmath>
#include <type_traits>

#include "common/dtype.h"
#include "cpu/bias_act.h"
#include "cpu/bias_act_lines.h"

namespace fastgan {
namespace FASTGAN_ISA {
namespace {

constexpr std::int64_t kSerial = 1 << 15;  // elements under which waking threads costs more than they bring
constexpr std::int64_t kWord = 32;

struct Bits {
  alignas(64) std::uint32_t of[kWord];
  constexpr Bits() : of() {
    for (int i = 0; i < kWord; ++i) of[i] = std::uint32_t{1} << i;
  }
};
constexpr Bits kBit;  // a table: the smallest instruction set has no shift by lane

template <class A>
struct Slopes {
  A above, below, clamp;

  explicit Slopes(const BiasActOptions& o)
      : above(static_cast<A>(o.gain)),
        below(static_cast<A>(o.activation == Activation::linear ? o.gain : o.gain * o.negative_slope)),
        clamp(static_cast<A>(o.clamp)) {}
};

// word(first, count) for the words of a line, of which all but the last are whole: count is a constant there.
template <class Word>
inline void each_word(std::int64_t size, const Word& word) {
  std::int64_t i = 0;
  for (; i + kWord <= size; i += kWord) word(i, std::integral_constant<int, kWord>());
  if (i < size) word(i, static_cast<int>(size - i));
}

// kRelu: not a slope of 0, of which infinity makes NaN.
template <bool kRelu, bool kClamp, bool kBias, class A>
void forward_line(const A* x, const A* bias, A* y, std::int64_t size, const Slopes<A>& s, std::uint32_t* signs,
                  std::uint32_t* inside) {
  each_word(size, [&](std::int64_t first, auto count) {
    std::uint32_t above = 0, kept = 0;
#pragma omp simd reduction(| : above, kept)
    for (int i = 0; i < count; ++i) {
      const A u = kBias ? x[first + i] + bias[first + i] : x[first + i];
      const bool below = u <= 0;
      A value = below ? (kRelu ? A{0} : u * s.below) : u * s.above;
      above |= below ? 0 : kBit.of[i];
      if constexpr (kClamp) {
        kept |= value >= -s.clamp && value <= s.clamp ? kBit.of[i] : 0;
        value = value > s.clamp ? s.clamp : value;
        value = value < -s.clamp ? -s.clamp : value;
      }
      y[first + i] = value;
    }
    if (signs != nullptr) signs[first / kWord] = above;
    if (inside != nullptr) inside[first / kWord] = kept;
  });
}

template <bool kRelu, bool kClamp, bool kBias, class A>
void apply_line(const A* g, const A* bias, const std::uint32_t* signs, const std::uint32_t* inside, A* out,
                std::int64_t size, const Slopes<A>& s) {
  each_word(size, [&](std::int64_t first, auto count) {
    const std::uint32_t above = signs == nullptr ? ~std::uint32_t{0} : signs[first / kWord];
    const std::uint32_t kept = kClamp ? inside[first / kWord] : 0;
#pragma omp simd
    for (int i = 0; i < count; ++i) {
      const A given = kBias ? g[first + i] + bias[first + i] : g[first + i];
      A value = (above & kBit.of[i]) != 0 ? given * s.above : (kRelu ? A{0} : given * s.below);
      if constexpr (kClamp) value = (kept & kBit.of[i]) != 0 ? value : A{0};
      out[first + i] = value;
    }
  });
}

// Calls f with the three as constants.
template <class F>
void with_constants(bool relu, bool clamp, bool bias, const F& f) {
  const auto third = [&](auto r, auto c) { bias ? f(r, c, std::true_type()) : f(r, c, std::false_type()); };
  const auto second = [&](auto r) { clamp ? third(r, std::true_type()) : third(r, std::false_type()); };
  relu ? second(std::true_type()) : second(std::false_type());
}

template <class A>
void forward(Dtype dtype, const PiecewiseForward& t, const BiasActShape& shape, const BiasActOptions& options,
             int threads) {
  const Slopes<A> slopes(options);
  const bool relu = options.activation == Activation::relu, clamp = options.clamp < HUGE_VAL;
  with_constants(relu, clamp, t.bias != nullptr, [&](auto relu, auto clamp, auto bias) {
    over_lines<A>(shape, nullptr, kSerial, threads, [&](const Line& line, double*) {
      Operand<A> x, b, y;
      const A* given = x.read(t.x, dtype, line);
      const A* spread = bias ? b.spread(t.bias, shape, line) : nullptr;
      const std::int64_t word = line.begin / kWord;
      forward_line<relu, clamp, bias>(given, spread, y.target(t.y, dtype, line), line.size, slopes,
                                      t.signs == nullptr ? nullptr : t.signs + word,
                                      t.inside == nullptr ? nullptr : t.inside + word);
      y.write(t.y, dtype, line);
    });
  });
}

template <class A>
void apply(Dtype dtype, const PiecewiseApply& t, const BiasActShape& shape, const BiasActOptions& options,
           int threads) {
  const Slopes<A> slopes(options);
  const bool relu = options.activation == Activation::relu;
  with_constants(relu, t.inside != nullptr, t.bias != nullptr, [&](auto relu, auto clamp, auto bias) {
    over_lines<A>(shape, t.sums, kSerial, threads, [&](const Line& line, double* sums) {
      Operand<A> g, b, out;
      const A* given = g.read(t.g, dtype, line);
      const A* spread = bias ? b.spread(t.bias, shape, line) : nullptr;
      const std::int64_t word = line.begin / kWord;
      A* values = out.target(t.out, dtype, line);
      apply_line<relu, clamp, bias>(given, spread, t.signs == nullptr ? nullptr : t.signs + word,
                                    clamp ? t.inside + word : nullptr, values, line.size, slopes);
      out.write(t.out, dtype, line);
      gather(values, shape, line, sums);
    });
  });
}

}  // namespace

void piecewise_forward(Dtype dtype, const PiecewiseForward& tensors, const BiasActShape& shape,
                       const BiasActOptions& options, int threads) {
  if (tensors.y != tensors.x) ask_for_huge_pages(dtype, tensors.y, shape);
  (dtype == Dtype::f64 ? forward<double> : forward<float>)(dtype, tensors, shape, options, threads);
}

void piecewise_apply(Dtype dtype, const PiecewiseApply& tensors, const BiasActShape& shape,
                     const BiasActOptions& options, int threads) {
  ask_for_huge_pages(dtype, tensors.out, shape);
  (dtype == Dtype::f64 ? apply<double> : apply<float>)(dtype, tensors, shape, options, threads);
}

}  // namespace FASTGAN_ISA
}  // namespace fastgan
