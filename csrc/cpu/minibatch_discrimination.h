#pragma once

#include <cstdint>

#include "common/spectral_norm.h"

namespace fastgan {

// m is contiguous, (samples, kernels, dims).  Results are for `rows` samples from `first`; operands cover all samples.
// order: the samples of each segment in ascending order, one segment after another.  ends: the end of each of
// `segments` segments in order.  Both null: one segment with all samples.
struct DiscriminationShape {
  std::int64_t samples, kernels, dims, first, rows, segments;
  const std::int64_t *order, *ends;
};

// All have one dtype.  A null result is not requested.
struct DiscriminationForward {
  const void* m;
  void* o;
};
struct DiscriminationBackward {
  const void *h, *m;  // h: gradient of o
  void* dm;
};
struct DiscriminationDoubleBackward {
  const void *w, *h, *m;  // w: gradient of dm
  void *by_h, *by_m;
};

#define FASTGAN_DECLARE(isa)                                                                               \
  namespace isa {                                                                                          \
  void minibatch_discrimination_forward(Dtype, const DiscriminationForward&, const DiscriminationShape&,   \
                                        bool exclude_self, int threads);                                   \
  void minibatch_discrimination_backward(Dtype, const DiscriminationBackward&, const DiscriminationShape&, \
                                         int threads);                                                     \
  void minibatch_discrimination_double_backward(Dtype, const DiscriminationDoubleBackward&,                \
                                                const DiscriminationShape&, int threads);                  \
  }
FASTGAN_DECLARE(baseline)
FASTGAN_DECLARE(avx2)
FASTGAN_DECLARE(avx512)
#undef FASTGAN_DECLARE

}  // namespace fastgan
