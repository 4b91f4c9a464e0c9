// exp, log1p and erfc without branches or tables, so that loops over them vectorize on any instruction set.
//
// Maximum relative errors over the given domains, compared with double (for float) and with 60 digits (for double), in
// units of the last place: exp_minus 2, expm1 of it 3, log1p 2, erfcx 4.  Polynomials are Chebyshev fits, each with a
// truncation error below half a unit of the last place.  NaN in gives NaN out.
#pragma once

#include <cstddef>

#include "common/dtype.h"

namespace fastgan {
namespace FASTGAN_ISA {

inline double from_bits(std::uint64_t bits) {
  double value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline std::uint64_t to_bits(double value) {
  std::uint64_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// c[0] + c[1] x + ...  It has no loop, because an inner loop would prevent vectorization of the outer one.
template <std::size_t kFirst = 0, class A, std::size_t kCount>
inline A polynomial(const A (&c)[kCount], A x) {
  if constexpr (kFirst + 1 == kCount)
    return c[kFirst];
  else
    return c[kFirst] + x * polynomial<kFirst + 1>(c, x);
}

template <class A>
struct Constants;

template <>
struct Constants<float> {
  static constexpr float kLowest = -87.3f;  // below, exp is subnormal and is taken as 0
  static constexpr float kLog2e = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  // Adding this to n leaves n + 127 in the last bits; a shift then moves it to the exponent.
  static constexpr float kShift = 12582912.0f + 127.0f;
  static constexpr int kMantissa = 23;
  static constexpr float kExp[] = {0.5f, 0.166665734f, 0.0416665501f, 0.00836377387f, 0.00139269266f};
  static constexpr float kLog1p[] = {0.666666673f, 0.399997063f, 0.28592358f, 0.217065758f, 0.232243292f};
  static constexpr float kErfcxPole = 2.0f;
  static constexpr float kErfcx[] = {1.02158271f,      -0.687160625f,  0.279471892f,   -0.0364434982f,
                                     -0.0215066218f,   0.00648746614f, 0.00306769409f, -0.000862080043f,
                                     -0.000609438173f, 7.35287233e-5f, 8.85768293e-5f};
};

template <>
struct Constants<double> {
  static constexpr double kLowest = -708.0;
  static constexpr double kLog2e = 1.4426950408889634, kLn2High = 0.69314718036912382, kLn2Low = 1.9082149292705877e-10;
  static constexpr double kShift = 6755399441055744.0 + 1023.0;
  static constexpr int kMantissa = 52;
  static constexpr double kExp[] = {0.5,
                                    0.166666666666666714,
                                    0.0416666666666666701,
                                    0.0083333333333255447,
                                    0.00138888888888833267,
                                    0.000198412698768643549,
                                    0.0000248015873270071867,
                                    2.75572528335169097e-6,
                                    2.75572718102197996e-7,
                                    2.51062747335732947e-8,
                                    2.09154422977801152e-9};
  static constexpr double kLog1p[] = {0.666666666666666667,  0.400000000000000155, 0.285714285714219433,
                                      0.222222222233319868,  0.181818180860056555, 0.153846202538041624,
                                      0.133331769491381785,  0.117679977672410362, 0.104803992343652741,
                                      0.0994202489655473463, 0.063341108517702454, 0.152312626194289848};
  static constexpr double kErfcxPole = 3.0;
  static constexpr double kErfcx[] = {
      1.07400690708833968,       -0.88339445316988365,     0.590228357104108486,    -0.310467261900566669,
      0.11952776128697859,       -0.026827234624480615,    -0.00121241662151477977, 0.00303406200119598244,
      -0.000548309745247753327,  -0.000276777848200965945, 0.000107561782500020734, 0.0000303981905221208025,
      -0.0000174716057523023307, -4.74939103213214079e-6,  2.76781122552728064e-6,  9.99437936108101322e-7,
      -4.11759759189375936e-7,   -2.3454670002624263e-7,   5.00132018429123704e-8,  5.16681476189845404e-8,
      -3.59136111716109528e-9,   -8.88784489151694737e-9,  1.11591238992503841e-11, 8.4478527843229508e-10};
};

template <class A>
struct Exponential {
  A value, minus_one;
};

// exp(x) and exp(x) - 1 for x <= 0: x = n ln 2 + r, |r| <= ln 2 / 2.
template <class A>
inline Exponential<A> exp_minus(A x) {
  using C = Constants<A>;
  const A shifted = x * C::kLog2e + C::kShift;
  const A n = shifted - C::kShift;
  const A scale = from_bits(to_bits(shifted) << C::kMantissa);
  const A r = (x - n * C::kLn2High) - n * C::kLn2Low;
  const A scaled = scale * (r + r * r * polynomial(C::kExp, r));
  const bool none = x < C::kLowest;
  return {none ? A{0} : scale + scaled, none ? A{-1} : (scale - 1) + scaled};
}

// log(1 + w) for w in [0, 1]: 2 atanh(s), s = w / (2 + w) <= 1/3.
template <class A>
inline A log1p_unit(A w) {
  const A s = w / (2 + w);
  const A z = s * s;
  return s * (2 + z * polynomial(Constants<A>::kLog1p, z));
}

// exp(z^2) erfc(z) for z >= 0, a rational function of z through t = (z - k) / (z + k).  Beyond 40 it returns its value
// at 40, which the factor exp(-z^2) turns into zero.
template <class A>
inline A erfcx(A z) {
  constexpr A k = Constants<A>::kErfcxPole;
  const A near = z < 40 ? z : A{40};
  const A reciprocal = 1 / (near + k);
  return reciprocal * polynomial(Constants<A>::kErfcx, (near - k) * reciprocal);
}

}  // namespace FASTGAN_ISA
}  // namespace fastgan
