#pragma once

#include <cstdint>

#include "cpu/upfirdn2d.h"

namespace fastgan {

// Rows of bits, each row of the upsampled image in whole bytes.  signs: u > 0.  inside: not clamped; may be null.
struct LreluMasks {
  std::uint8_t* signs;
  std::uint8_t* inside;
  bool read;  // multiply by the slopes that these bits tell, instead of applying the function and writing them
};

struct LreluOptions {
  double slope, gain, clamp;
};

// A bias for each channel, in the type in which sums of the input's type are accumulated.  values may be null.
struct LreluBias {
  const void* values;
  std::int64_t channels;
};

// y = second(act(first(x + bias))), act(u) = clamp(gain * (u > 0 ? u : slope * u)).  Both shapes have inner 1.
#define FASTGAN_DECLARE(isa)                                                                                   \
  namespace isa {                                                                                              \
  void filtered_lrelu(Dtype, const void* x, const LreluBias&, void* y, const LreluMasks&, const LreluOptions&, \
                      const UpfirdnShape& first, const double* first_taps, const UpfirdnShape& second,         \
                      const double* second_taps, int threads);                                                 \
  }
FASTGAN_DECLARE(baseline)
FASTGAN_DECLARE(avx2)
FASTGAN_DECLARE(avx512)
#undef FASTGAN_DECLARE

}  // namespace fastgan
