#pragma once

#include "common/isa.h"
#include "cpu/conv_shape.h"

namespace fastgan {

// Computes y from x, the weight (out_channels, in_channels, rows, columns) and the bias, or null; and dx from dy and
// the weight.  All tensors are contiguous.  For strided convolutions between many channels.
#define FASTGAN_DECLARE(isa)                                                                                          \
  namespace isa {                                                                                                     \
  void conv_strided_forward(const float* x, const float* weight, const float* bias, float* y, const ConvShape& shape, \
                            int threads);                                                                             \
  void conv_strided_input_gradient(const float* dy, const float* weight, float* dx, const ConvShape& shape,           \
                                   int threads);                                                                      \
  }
FASTGAN_DECLARE(baseline)
FASTGAN_DECLARE(avx2)
FASTGAN_DECLARE(avx512)
#undef FASTGAN_DECLARE

}  // namespace fastgan
