#pragma once

#include <cstdint>

#include "common/spectral_norm.h"

namespace fastgan {

// m is contiguous, (samples, kernels, dims).  What is written is of `rows` samples from `first` on; what is read is of
// all.  order: the samples of each segment one after another, in ascending order, ends: where in it each of `segments`
// ends; both null: one segment of all samples.
struct DiscriminationShape {
  std::int64_t samples, kernels, dims, first, rows, segments;
  const std::int64_t *order, *ends;
};

// All of one dtype.  A result that is null is not wanted.
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
