// Smooth activations at u: the value f, and its first and second derivatives.  Loops compute only the values they use.
#pragma once

#include "common/vector_math.h"

namespace fastgan {
namespace FASTGAN_ISA {
namespace {

template <class A>
struct At {
  A f, first, second;
};

// Everything is computed from e = exp(-|u|) <= 1, so that nothing overflows and both tails keep full precision.
template <class A>
struct Logistic {
  A e, value, slope;

  explicit Logistic(A u) {
    e = exp_minus(u < 0 ? u : -u).value;
    const A r = 1 / (1 + e);
    value = u < 0 ? e * r : r;
    slope = e * r * r;
  }
};

struct Sigmoid {
  template <class A>
  static At<A> at(A u) {
    const Logistic<A> s(u);
    return {s.value, s.slope, s.slope * (1 - 2 * s.value)};
  }
};

struct Silu {
  template <class A>
  static At<A> at(A u) {
    const Logistic<A> s(u);
    return {u * s.value, s.value + u * s.slope, s.slope * (2 + u * (1 - 2 * s.value))};
  }
};

struct Tanh {
  template <class A>
  static At<A> at(A u) {
    const Exponential<A> e = exp_minus(u < 0 ? 2 * u : -2 * u);
    const A r = 1 / (2 + e.minus_one);
    const A magnitude = -e.minus_one * r, f = u < 0 ? -magnitude : magnitude;
    const A first = 4 * e.value * r * r;
    return {f, first, -2 * f * first};
  }
};

// As torch.nn.functional.softplus: u itself above 20.
struct Softplus {
  template <class A>
  static At<A> at(A u) {
    const Logistic<A> s(u);
    const bool straight = u > 20;
    const A f = (u > 0 ? u : A{0}) + log1p_unit(s.e);
    return {straight ? u : f, straight ? A{1} : s.value, straight ? A{0} : s.slope};
  }
};

// u P(u) with P(u) = erfc(-u / sqrt(2)) / 2.
struct Gelu {
  template <class A>
  static At<A> at(A u) {
    constexpr A kSqrtHalf = A(0.70710678118654752440), kDensity = A(0.39894228040143267794);
    const A square = u * u;
    const A e = exp_minus(square * A(-0.5)).value;
    const A tail = e * A(0.5) * erfcx((u < 0 ? -u : u) * kSqrtHalf);
    const A p = u < 0 ? tail : 1 - tail;
    const A density = kDensity * e;
    return {u * p, p + u * density, density * (2 - square)};
  }
};

// u (1 + tanh(w / 2)) / 2 = u sigmoid(w) with w = 2 sqrt(2 / pi) (u + 0.044715 u^3).
struct GeluTanh {
  template <class A>
  static At<A> at(A u) {
    constexpr A kScale = A(1.59576912160573071176), kCubic = A(0.044715);
    const A cubic = kCubic * u * u;
    const Logistic<A> s(kScale * u * (1 + cubic));
    const A w1 = kScale * (1 + 3 * cubic), w2 = 6 * kScale * kCubic * u;
    const A first = s.slope * w1;
    return {u * s.value, s.value + u * first, 2 * first + u * (first * w1 * (1 - 2 * s.value) + s.slope * w2)};
  }
};

// Stores y = tanh(u) instead of u.  Gives the derivative by u, and the derivative of that by y.
struct TanhOfY {
  template <class A>
  static At<A> at(A y) {
    return {y, 1 - y * y, -2 * y};
  }
};

struct SigmoidOfY {
  template <class A>
  static At<A> at(A y) {
    return {y, y * (1 - y), 1 - 2 * y};
  }
};

}  // namespace
}  // namespace FASTGAN_ISA
}  // namespace fastgan
