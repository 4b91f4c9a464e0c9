// Storage types and the types for sums over them.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/dtype_tag.h"

namespace fastgan {
namespace FASTGAN_ISA {

// float16 and bfloat16 as bits.  Conversions use integer arithmetic, so that they vectorize on any instruction set.
struct Half {
  std::uint16_t bits;
};
struct BFloat16 {
  std::uint16_t bits;
};

template <class T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};

inline float from_bits(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline std::uint32_t to_bits(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline double load(double x) { return x; }
inline float load(float x) { return x; }
inline float load(BFloat16 x) { return from_bits(std::uint32_t{x.bits} << 16); }
inline float load(Half x) {
  // Shift exponent and mantissa into place and rescale by 2^112: exact for normals, subnormals and zero.
  const std::uint32_t magnitude = x.bits & 0x7fffu;
  const std::uint32_t sign = (x.bits & 0x8000u) << 16;
  const std::uint32_t scaled = to_bits(from_bits(magnitude << 13) * 0x1p112f);
  const std::uint32_t infinite = magnitude >= 0x7c00u ? 0x7f800000u : 0u;
  return from_bits(sign | scaled | infinite);
}

inline void store(double& x, double value) { x = value; }
inline void store(float& x, float value) { x = value; }
inline void store(BFloat16& x, float value) {
  const std::uint32_t bits = to_bits(value);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  x.bits = static_cast<std::uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}
inline void store(Half& x, float value) {
  const std::uint32_t bits = to_bits(value);
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  // Normal halves: drop 13 bits of the mantissa, to nearest, ties to even.  Subnormals: a float addition rounds at the
  // weight of the last bit.
  const std::uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const std::uint32_t subnormal = to_bits(from_bits(magnitude) + 0.5f) - to_bits(0.5f);
  std::uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x47800000u ? 0x7c00u : half;
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  x.bits = static_cast<std::uint16_t>(sign | half);
}

// body(a value of the type that dtype names)
template <class Body>
void with_dtype(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::f64:
      return body(double());
    case Dtype::f32:
      return body(float());
    case Dtype::f16:
      return body(Half());
    case Dtype::bf16:
      return body(BFloat16());
  }
}

}  // namespace FASTGAN_ISA
}  // namespace fastgan
