// linear, relu and leaky_relu of x + bias, times gain, clamped to +-clamp: piecewise linear.
//
//     y = s(x + b) (x + b)    s(u) = gain if u > 0, otherwise gain * negative_slope; 0 if |y| is clamped
//
// A derivative only needs to know the piece of each element: one bit, and a second one with a clamp.  With S the
// diagonal matrix of slopes, dx = S dy and db = sum dx.  For gradients H and k of these, by dy = S (H + k).
// So one operator, (g, k) -> (S (g + k), its sum over each channel), is every derivative and its own transpose.
//
// Bytes: forward one read, one write, 1/32 of each for the bits; a derivative the same, where autograd reads x or y.
#include <cmath>
#include <type_traits>

#include "common/dtype.h"
#include "cpu/bias_act.h"
#include "cpu/bias_act_lines.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace fastgan {
namespace FASTGAN_ISA {
namespace {

constexpr std::int64_t kSerial = 1 << 15;  // fewer elements run serially: waking threads would cost more than it saves
constexpr std::int64_t kWord = 32;

struct Bits {
  alignas(64) std::uint32_t of[kWord];
  constexpr Bits() : of() {
    for (int i = 0; i < kWord; ++i) of[i] = std::uint32_t{1} << i;
  }
};
constexpr Bits kBit;  // a table, because the baseline instruction set has no per-lane shift

template <class A>
struct Slopes {
  A above, below, clamp;

  explicit Slopes(const BiasActOptions& o)
      : above(static_cast<A>(o.gain)),
        below(static_cast<A>(o.activation == Activation::linear ? o.gain : o.gain * o.negative_slope)),
        clamp(static_cast<A>(o.clamp)) {}
};

// word(first, count) for the words of a line.  All but the last are complete, and there count is a constant.
template <class Word>
inline void each_word(std::int64_t size, const Word& word) {
  std::int64_t i = 0;
  for (; i + kWord <= size; i += kWord) word(i, std::integral_constant<int, kWord>());
  if (i < size) word(i, static_cast<int>(size - i));
}

// Bit i: not u[i] <= 0, so that NaN counts as above.  Compilers turn the loop into a reduction that doubles the cost of
// the activation, but processors have an instruction for it.
template <class A>
inline std::uint32_t where_above(const A* u, int count) {
  std::uint32_t above = 0;
#pragma omp simd reduction(| : above)
  for (int i = 0; i < count; ++i) above |= u[i] <= 0 ? 0 : kBit.of[i];
  return above;
}

#if defined(__AVX512F__)
inline std::uint32_t where_above(const float* u, std::integral_constant<int, kWord>) {
  const auto half = [](const float* values) {
    return std::uint32_t{_mm512_cmp_ps_mask(_mm512_loadu_ps(values), _mm512_setzero_ps(), _CMP_NLE_UQ)};
  };
  return half(u) | half(u + 16) << 16;
}
#elif defined(__AVX2__)
inline std::uint32_t where_above(const float* u, std::integral_constant<int, kWord>) {
  std::uint32_t above = 0;
  for (int i = 0; i < kWord; i += 8) {
    const __m256 mask = _mm256_cmp_ps(_mm256_loadu_ps(u + i), _mm256_setzero_ps(), _CMP_NLE_UQ);
    above |= static_cast<std::uint32_t>(_mm256_movemask_ps(mask)) << i;
  }
  return above;
}
#endif

template <class A>
void put_signs(const A* u, std::int64_t size, std::uint32_t* signs) {
  each_word(size, [&](std::int64_t first, auto count) { signs[first / kWord] = where_above(u + first, count); });
}

// Clamps the values, and records which ones did not change.
template <class A>
void cut_off(A* y, std::int64_t size, A clamp, std::uint32_t* inside) {
  each_word(size, [&](std::int64_t first, auto count) {
    std::uint32_t kept = 0;
#pragma omp simd reduction(| : kept)
    for (int i = 0; i < count; ++i) kept |= y[first + i] >= -clamp && y[first + i] <= clamp ? kBit.of[i] : 0;
    if (inside != nullptr) inside[first / kWord] = kept;
  });
#pragma omp simd
  for (std::int64_t i = 0; i < size; ++i) {
    const A value = y[i] > clamp ? clamp : y[i];
    y[i] = value < -clamp ? -clamp : value;
  }
}

// kRelu: zero directly instead of multiplying by a slope of 0, which turns infinity into NaN.  y may be x.
//
// Two separate loops over a line in the L1 cache.  Storing bits between values would interleave both on their way to
// the next cache, and take half as much time again.
template <bool kRelu, class A>
void forward_line(const A* x, const A* bias, A* y, std::int64_t size, Slopes<A> s, std::uint32_t* signs,
                  std::uint32_t* inside) {
  if (bias != nullptr) {
#pragma omp simd
    for (std::int64_t i = 0; i < size; ++i) y[i] = x[i] + bias[i];
    x = y;
  }
  if (signs != nullptr) put_signs(x, size, signs);
#pragma omp simd
  for (std::int64_t i = 0; i < size; ++i) y[i] = x[i] <= 0 ? (kRelu ? A{0} : x[i] * s.below) : x[i] * s.above;
  if (s.clamp < HUGE_VAL) cut_off(y, size, s.clamp, inside);
}

template <bool kRelu, bool kClamp, bool kBias, class A>
void apply_line(const A* g, const A* bias, const std::uint32_t* signs, const std::uint32_t* inside, A* out,
                std::int64_t size, Slopes<A> s) {
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

template <class A>
using ApplyLine = void (*)(const A* g, const A* bias, const std::uint32_t* signs, const std::uint32_t* inside, A* out,
                           std::int64_t size, Slopes<A>);

// select(relu, clamp, bias) with all three as constants.
template <class Select>
auto with_constants(bool relu, bool clamp, bool bias, const Select& select) {
  const auto third = [&](auto r, auto c) {
    return bias ? select(r, c, std::true_type()) : select(r, c, std::false_type());
  };
  const auto second = [&](auto r) { return clamp ? third(r, std::true_type()) : third(r, std::false_type()); };
  return relu ? second(std::true_type()) : second(std::false_type());
}

template <class A>
void forward(Dtype dtype, const PiecewiseForward& t, const BiasActShape& shape, const BiasActOptions& options,
             int threads) {
  const Slopes<A> slopes(options);
  const auto run_line = options.activation == Activation::relu ? forward_line<true, A> : forward_line<false, A>;
  over_lines<A>(shape, nullptr, kSerial, threads, [&](const Line& line, double*) {
    Operand<A> x, bias, y;
    const std::int64_t word = line.begin / kWord;
    run_line(x.read(t.x, dtype, line), t.bias == nullptr ? nullptr : bias.spread(t.bias, shape, line),
             y.target(t.y, dtype, line), line.size, slopes, t.signs == nullptr ? nullptr : t.signs + word,
             t.inside == nullptr ? nullptr : t.inside + word);
    y.write(t.y, dtype, line);
  });
}

template <class A>
void apply(Dtype dtype, const PiecewiseApply& t, const BiasActShape& shape, const BiasActOptions& options,
           int threads) {
  const Slopes<A> slopes(options);
  const bool relu = options.activation == Activation::relu, clamp = t.inside != nullptr;
  const auto run_line = with_constants(relu, clamp, t.bias != nullptr, [](auto relu, auto clamp, auto bias) {
    return static_cast<ApplyLine<A>>(apply_line<relu, clamp, bias, A>);
  });
  over_lines<A>(shape, t.sums, kSerial, threads, [&](const Line& line, double* sums) {
    Operand<A> g, bias, out;
    const std::int64_t word = line.begin / kWord;
    A* values = out.target(t.out, dtype, line);
    run_line(g.read(t.g, dtype, line), bias.spread(t.bias, shape, line), t.signs == nullptr ? nullptr : t.signs + word,
             t.inside == nullptr ? nullptr : t.inside + word, values, line.size, slopes);
    out.write(t.out, dtype, line);
    gather(values, shape, line, sums);
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
