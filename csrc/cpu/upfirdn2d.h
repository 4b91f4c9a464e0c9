#pragma once

#include <cstdint>

#include "common/dtype_tag.h"

namespace fastgan {

// planes of (height, width, inner) elements: (N C, H, W, 1), or (N, H, W, C) in channels_last.  start: the zeros before
// the first element, negative where elements are cropped.  Each pair is (y, x).
struct UpfirdnShape {
  std::int64_t planes, inner, height, width, out_height, out_width;
  std::int64_t up[2], down[2], start[2], taps[2];
  bool separable;
};

// taps: the vertical ones, then the horizontal ones; or the (y, x) taps of a filter that is not separable.
#define FASTGAN_DECLARE(isa)                                                                           \
  namespace isa {                                                                                      \
  void upfirdn2d(Dtype, const void* x, void* y, const UpfirdnShape&, const double* taps, int threads); \
  }
FASTGAN_DECLARE(baseline)
FASTGAN_DECLARE(avx2)
FASTGAN_DECLARE(avx512)
#undef FASTGAN_DECLARE

}  // namespace fastgan
