#pragma once

#include <cstdint>

namespace fastgan {

// A convolution without groups from x (batch, in_channels, height, width) to y (batch, out_channels, ...).  For each of
// its two dimensions: the sizes of x, y and the kernel, and the stride, padding and dilation.
struct ConvDimension {
  std::int64_t size, out, kernel, stride, padding, dilation;
};
struct ConvShape {
  std::int64_t batch, in_channels, out_channels;
  ConvDimension rows, columns;
};

}  // namespace fastgan
