#pragma once

#include <cstdint>

#include "cpu/spectral_norm.h"

namespace fastgan {

// Sample g * groups + m is member g of group m (of size members).  In memory it is (outer, features, run).  The
// result's sample is (outer, features * run + features * tail): each statistic is repeated tail times after the values.
// Contiguous (N, C, *S): outer 1, run C / F * S, tail S.  channels_last: outer S, run C / F, tail 1.
struct MinibatchStddevShape {
  std::int64_t groups, size, outer, features, run, tail;
};

// slope, (groups, features), has the accumulation type.  A null result is not requested.
struct MinibatchStddevForward {
  const void* x;
  void* y;
};
struct MinibatchStddevBackward {
  const void *dy, *x;
  void *dx, *slope;
};
struct MinibatchStddevDoubleBackward {
  const void *h, *x, *slope;
  void *by_dy, *by_x;
};

#define FASTGAN_DECLARE(isa)                                                                                      \
  namespace isa {                                                                                                 \
  void minibatch_stddev_forward(Dtype, const MinibatchStddevForward&, const MinibatchStddevShape&, double eps,    \
                                int threads);                                                                     \
  void minibatch_stddev_backward(Dtype, const MinibatchStddevBackward&, const MinibatchStddevShape&, double eps,  \
                                 int threads);                                                                    \
  void minibatch_stddev_double_backward(Dtype, const MinibatchStddevDoubleBackward&, const MinibatchStddevShape&, \
                                        double eps, int threads);                                                 \
  }
FASTGAN_DECLARE(baseline)
FASTGAN_DECLARE(avx2)
FASTGAN_DECLARE(avx512)
#undef FASTGAN_DECLARE

}  // namespace fastgan
