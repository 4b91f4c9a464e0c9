#pragma once

#include "common/isa.h"
#include "cpu/conv_shape.h"

namespace fastgan {

// Computes dw (out_channels, in_channels, rows, columns) from dy and x.  All tensors are contiguous.  For 1x1 kernels,
// and outputs with few pixels.
#define FASTGAN_DECLARE(isa)                                                                                  \
  namespace isa {                                                                                             \
  void conv_weight_gradient(const float* dy, const float* x, float* dw, const ConvShape& shape, int threads); \
  }
FASTGAN_DECLARE(baseline)
FASTGAN_DECLARE(avx2)
FASTGAN_DECLARE(avx512)
#undef FASTGAN_DECLARE

}  // namespace fastgan
