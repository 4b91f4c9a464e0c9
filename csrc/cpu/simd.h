// A vector of the compiled instruction set, with the functions for a sum of exp(-|x|) and its derivatives.
//
// These are vector types of GCC and Clang: they keep values in registers as written, on any architecture.
#pragma once

#include <cstdint>
#include <cstring>

namespace fastgan {
namespace FASTGAN_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class A>
struct Bits;
template <>
struct Bits<float> {
  using type = std::int32_t;
  static constexpr type sign = INT32_MIN;
};
template <>
struct Bits<double> {
  using type = std::int64_t;
  static constexpr type sign = INT64_MIN;
};

template <class A, int kBytes = kVectorBytes>
struct Simd {
  typedef A type __attribute__((vector_size(kBytes)));
  typedef typename Bits<A>::type bits __attribute__((vector_size(kBytes)));
};
template <class A>
using Vec = typename Simd<A>::type;
template <class A>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(A));

template <class A>
Vec<A> load_vector(const A* from) {
  Vec<A> x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

template <class A>
void store_vector(A* to, Vec<A> x) {
  std::memcpy(to, &x, sizeof x);
}

template <class A>
Vec<A> magnitude(Vec<A> x) {
  return reinterpret_cast<Vec<A>>(reinterpret_cast<typename Simd<A>::bits>(x) & ~Bits<A>::sign);
}

// x times the sign of s, where the sign of 0 is 0.
template <class A>
Vec<A> with_sign_of(Vec<A> s, Vec<A> x) {
  using B = typename Simd<A>::bits;
  const B flipped = reinterpret_cast<B>(x) ^ (reinterpret_cast<B>(s) & Bits<A>::sign);
  return s != A{0} ? reinterpret_cast<Vec<A>>(flipped) : Vec<A>{};
}

// Adds halves repeatedly: the same order of additions on every instruction set.
template <class A, int kBytes = kVectorBytes>
A lane_sum(typename Simd<A, kBytes>::type x) {
  if constexpr (kBytes == 2 * sizeof(A)) {
    return x[0] + x[1];
  } else {
    typename Simd<A, kBytes / 2>::type low, high;
    std::memcpy(&low, &x, kBytes / 2);
    std::memcpy(&high, reinterpret_cast<const char*>(&x) + kBytes / 2, kBytes / 2);
    return lane_sum<A, kBytes / 2>(low + high);
  }
}

// exp(-x) for x >= 0; 0 if that is below the smallest normal number; NaN for NaN.
//
// -x = n ln 2 + r, |r| <= ln 2 / 2; exp(r) is a polynomial 1 + r + r^2 q(r), minimax in the relative error: 3.1e-9 in
// float, 3.6e-18 in double.
template <class A>
struct Exp;
template <>
struct Exp<float> {
  static constexpr float log2e = 1.44269504f, ln2_high = 0.693145752f, ln2_low = 1.42860677e-6f;
  static constexpr float round = 0x1.8p23f, largest = 87.3365402f;
  static constexpr int mantissa = 23, bias = 127;
  static constexpr float q[] = {0.49999993447796487f, 0.16666520631709497f, 0.041668388045313997f,
                                0.0083687168797281399f, 0.0013814598646664034f};
};
template <>
struct Exp<double> {
  static constexpr double log2e = 1.4426950408889634, ln2_high = 0x1.62e42fee00000p-1, ln2_low = 0x1.a39ef35793c76p-33;
  static constexpr double round = 0x1.8p52, largest = 708.3964185322641;
  static constexpr int mantissa = 52, bias = 1023;
  static constexpr double q[] = {0.50000000000000106271,     0.16666666666666412523,   0.04166666666653015859,
                                 0.0083333333334944616641,   0.0013888888943630112946, 0.00019841269506578687653,
                                 0.000024801493098906550659, 2.7557586373840163694e-6, 2.7630248379211443975e-7,
                                 2.5000061602835666699e-8};
};

template <class A>
Vec<A> exp_of_minus(Vec<A> x) {
  using E = Exp<A>;
  using B = typename Simd<A>::bits;
  const Vec<A> shifted = E::round - x * E::log2e;  // its last bits are n
  const Vec<A> n = shifted - E::round;
  const Vec<A> r = (-x - n * E::ln2_high) - n * E::ln2_low;
  constexpr int degree = static_cast<int>(sizeof(E::q) / sizeof(A)) - 1;
  Vec<A> q = Vec<A>{} + E::q[degree];
#pragma GCC unroll 16
  for (int k = degree - 1; k >= 0; --k) q = q * r + E::q[k];
  const Vec<A> p = (q * r) * r + r + A{1};
  const B power = (reinterpret_cast<B>(shifted) + E::bias) << E::mantissa;
  return x > E::largest ? Vec<A>{} : p * reinterpret_cast<Vec<A>>(power);
}

}  // namespace
}  // namespace FASTGAN_ISA
}  // namespace fastgan
