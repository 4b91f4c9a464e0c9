#pragma once

#include <cstdint>

#include "common/spectral_norm.h"

namespace fastgan {

#define FASTGAN_DECLARE(isa)                                                                                   \
  namespace isa {                                                                                              \
  void spectral_norm_forward(Dtype, const SpectralNormLayer*, std::int64_t count, const SpectralNormOptions&); \
  void spectral_norm_backward(Dtype, const SpectralNormLayer*, std::int64_t count, int threads);               \
  }
FASTGAN_DECLARE(baseline)
FASTGAN_DECLARE(avx2)
FASTGAN_DECLARE(avx512)
#undef FASTGAN_DECLARE

}  // namespace fastgan
