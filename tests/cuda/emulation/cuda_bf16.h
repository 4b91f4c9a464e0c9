#pragma once

#ifndef FASTGAN_ISA
#define FASTGAN_ISA emulated
#endif
#include "common/dtype.h"

struct __nv_bfloat16 {
  std::uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 x) {
  return fastgan::FASTGAN_ISA::load(fastgan::FASTGAN_ISA::BFloat16{x.bits});
}
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  fastgan::FASTGAN_ISA::BFloat16 bfloat16;
  fastgan::FASTGAN_ISA::store(bfloat16, value);
  return {bfloat16.bits};
}
