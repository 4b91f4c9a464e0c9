#pragma once

#include <cstdint>

#include "cpu/spectral_norm.h"

namespace fastgan {

// x is contiguous, (rows, channels, inner): a mean and a variance a row; channel c of row r has the affine index
// r % groups * channels + c.  LayerNorm: inner = groups = 1; GroupNorm: rows = batch * groups; InstanceNorm: GroupNorm
// with channels = 1.
struct NormShape {
  std::int64_t rows, channels, inner, groups;
};

// x, y and their derivatives are of one dtype; means, weights, biases and their derivatives of its accumulation type.
// An address that is null: an operand that is absent, or a result that is not wanted.
struct NormForward {
  const void *x, *weight, *bias;
  void *y, *mean, *rstd;
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

#define FASTGAN_DECLARE(isa)                                                                  \
  namespace isa {                                                                             \
  void norm_forward(Dtype, const NormForward&, const NormShape&, double eps, int threads);    \
  void norm_backward(Dtype, const NormBackward&, const NormShape&, int threads);              \
  void norm_double_backward(Dtype, const NormDoubleBackward&, const NormShape&, int threads); \
  }
FASTGAN_DECLARE(baseline)
FASTGAN_DECLARE(avx2)
FASTGAN_DECLARE(avx512)
#undef FASTGAN_DECLARE

}  // namespace fastgan
