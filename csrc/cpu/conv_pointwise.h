#pragma once

#include "common/isa.h"
#include "cpu/conv_shape.h"

namespace fastgan {

// A convolution with a 1x1 kernel, from x (batch, in_channels, pixels) to y (batch, out_channels, pixels).
struct PointwiseShape {
  std::int64_t batch, in_channels, out_channels, pixels;
};

// Computes y from x, the weight (out_channels, in_channels) and the bias, or null; and dx from dy and the weight.  All
// tensors are contiguous.
#define FASTGAN_DECLARE(isa)                                                                                       \
  namespace isa {                                                                                                  \
  void conv_pointwise_forward(const float* x, const float* weight, const float* bias, float* y,                    \
                              const PointwiseShape& shape, int threads);                                           \
  void conv_pointwise_input_gradient(const float* dy, const float* weight, float* dx, const PointwiseShape& shape, \
                                     int threads);                                                                 \
  }
FASTGAN_DECLARE(baseline)
FASTGAN_DECLARE(avx2)
FASTGAN_DECLARE(avx512)
#undef FASTGAN_DECLARE

}  // namespace fastgan
