#pragma once

#include "common/isa.h"
#include "cpu/conv_shape.h"

namespace fastgan {

// A 1d convolution from x (batch, groups x in_channels, length) to y (batch, groups x out_channels, ...).
struct ConvRowShape {
  std::int64_t batch, groups, in_channels, out_channels;  // channels of one group
  ConvDimension row;
};

// Computes dw (groups x out_channels, in_channels, kernel) from dy and x.  All tensors are contiguous.  For wide
// kernels.
#define FASTGAN_DECLARE(isa)                                                                                         \
  namespace isa {                                                                                                    \
  void conv_row_weight_gradient(const float* dy, const float* x, float* dw, const ConvRowShape& shape, int threads); \
  }
FASTGAN_DECLARE(baseline)
FASTGAN_DECLARE(avx2)
FASTGAN_DECLARE(avx512)
#undef FASTGAN_DECLARE

}  // namespace fastgan
