#pragma once

#include "common/isa.h"
#include "cpu/conv_shape.h"

namespace fastgan {

// Computes dx from dy and the weight (out_channels, in_channels, rows, columns), for few in_channels.  All contiguous.
#define FASTGAN_DECLARE(isa)                                                                                      \
  namespace isa {                                                                                                 \
  void conv_input_gradient(const float* dy, const float* weight, float* dx, const ConvShape& shape, int threads); \
  }
FASTGAN_DECLARE(baseline)
FASTGAN_DECLARE(avx2)
FASTGAN_DECLARE(avx512)
#undef FASTGAN_DECLARE

}  // namespace fastgan
