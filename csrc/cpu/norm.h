#pragma once

#include <cstdint>

#include "common/dtype_tag.h"

namespace fastgan {

// x is contiguous, (samples, segments, channels, inner), or (samples, inner, channels) if `channels_last`.  The
// channels of a sample form `groups`.  A row, which has a mean and a variance, is a group over all segments and inner.
//     LayerNorm     (N, 1, M, 1), one group: one weight per element of the row
//     GroupNorm     (N, 1, C, inner)
//     InstanceNorm  (N, 1, C, inner), C groups
//     BatchNorm     (1, N, C, inner), C groups
struct NormShape {
  std::int64_t samples, segments, channels, inner, groups;
  bool channels_last;

  std::int64_t rows() const { return samples * groups; }
  std::int64_t of_row() const { return channels / groups; }
  std::int64_t positions() const { return segments * inner; }
  std::int64_t row_size() const { return of_row() * positions(); }
  std::int64_t size() const { return samples * channels * positions(); }
};

// x, y and their derivatives have one dtype; statistics, weights, biases and their derivatives have its accumulation
// type.  A null address is an absent operand, or a result that is not requested.
struct NormForward {
  const void *x, *weight, *bias;
  void *y, *mean, *rstd, *variance;  // the variance with Bessel's correction, as in running statistics
};
struct NormBackward {
  const void *dy, *x, *mean, *rstd, *weight;
  void *dx, *dweight, *dbias;
};
struct NormDoubleBackward {
  const void *h, *h_weight, *h_bias;  // gradients of dx, dweight, dbias
  const void *dy, *x, *mean, *rstd, *weight;
  void *by_dy, *by_x, *by_weight;
};

// norm_*: any shape.  channel_norm_*: more than one value per channel and sample; norm_* call them for such shapes.
#define FASTGAN_DECLARE(isa)                                                                          \
  namespace isa {                                                                                     \
  void norm_forward(Dtype, const NormForward&, const NormShape&, double eps, int threads);            \
  void norm_backward(Dtype, const NormBackward&, const NormShape&, int threads);                      \
  void norm_double_backward(Dtype, const NormDoubleBackward&, const NormShape&, int threads);         \
  void channel_norm_forward(Dtype, const NormForward&, const NormShape&, double eps, int threads);    \
  void channel_norm_backward(Dtype, const NormBackward&, const NormShape&, int threads);              \
  void channel_norm_double_backward(Dtype, const NormDoubleBackward&, const NormShape&, int threads); \
  }
FASTGAN_DECLARE(baseline)
FASTGAN_DECLARE(avx2)
FASTGAN_DECLARE(avx512)
#undef FASTGAN_DECLARE

}  // namespace fastgan
