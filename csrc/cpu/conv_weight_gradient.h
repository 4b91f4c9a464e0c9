#pragma once

#include "common/isa.h"
#include "cpu/conv_shape.h"

namespace fastgan {

// dw (out_channels, in_channels, rows, columns) from dy and x.  All contiguous.  For kernels of one pixel, and outputs
// of few.
#define FASTGAN_DECLARE(isa)                                                                                  \
  namespace isa {                                                                                             \
  void conv_weight_gradient(const float* dy, const float* x, float* dw, const ConvShape& shape, int threads); \
  }
FASTGAN_DECLARE(baseline)
FASTGAN_DECLARE(avx2)
FASTGAN_DECLARE(avx512)
#undef FASTGAN_DECLARE

}  // namespace fastgan
