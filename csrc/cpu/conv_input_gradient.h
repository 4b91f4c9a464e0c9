#pragma once

#include <cstdint>

#include "common/isa.h"

namespace fastgan {

// A convolution without groups of x (batch, in_channels, height, width) to y (batch, out_channels, ...): along each of
// its two dimensions the sizes of x, y and the kernel, and the step, the zeros in front and the dilation of the kernel.
struct ConvDimension {
  std::int64_t size, out, kernel, stride, padding, dilation;
};
struct ConvShape {
  std::int64_t batch, in_channels, out_channels;
  ConvDimension rows, columns;
};

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
