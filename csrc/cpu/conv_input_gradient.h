#pragma once

#include "common/isa.h"
#include "cpu/conv_shape.h"

namespace fastgan {

// dx, contiguous, from dy and the weight (out_channels, in_channels, rows, columns), contiguous.  For few in_channels.
#define FASTGAN_DECLARE(isa)                                                                                      \
  namespace isa {                                                                                                 \
  void conv_input_gradient(const float* dy, const float* weight, float* dx, const ConvShape& shape, int threads); \
  }
FASTGAN_DECLARE(baseline)
FASTGAN_DECLARE(avx2)
FASTGAN_DECLARE(avx512)
#undef FASTGAN_DECLARE

}  // namespace fastgan
