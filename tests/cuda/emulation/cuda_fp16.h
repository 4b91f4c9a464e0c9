#pragma once

#ifndef FASTGAN_ISA
#define FASTGAN_ISA emulated
#endif
#include "common/dtype.h"

struct __half {
  std::uint16_t bits;
};
inline float __half2float(__half x) { return fastgan::FASTGAN_ISA::load(fastgan::FASTGAN_ISA::Half{x.bits}); }
inline __half __float2half_rn(float value) {
  fastgan::FASTGAN_ISA::Half half;
  fastgan::FASTGAN_ISA::store(half, value);
  return {half.bits};
}
