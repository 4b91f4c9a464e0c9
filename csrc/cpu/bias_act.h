#pragma once

#include <cstdint>

#include "cpu/spectral_norm.h"

namespace fastgan {

// Elements in memory order, (outer, channels, inner).  A bias has one value per channel.
struct BiasActShape {
  std::int64_t outer, channels, inner;

  std::int64_t size() const { return outer * channels * inner; }
};

// The last two take their function's result as x: it determines the derivatives.
enum class Activation {
  linear,
  relu,
  leaky_relu,
  silu,
  gelu,
  gelu_tanh,
  tanh,
  sigmoid,
  softplus,
  tanh_of_y,
  sigmoid_of_y
};

// y = gain act(x + bias), clamped to [-clamp, clamp], which may be infinite.
struct BiasActOptions {
  Activation activation;
  double negative_slope, gain, clamp;
};

// Tensors have one dtype; biases and their gradients have its accumulation type.  Null: absent, or not requested.
// signs, inside: one bit per element in words of 32, first element lowest: x + bias > 0; not clamped.
struct PiecewiseForward {
  const void *x, *bias;
  void* y;
  std::uint32_t *signs, *inside;
};
// out = (g + bias) times the slope of each element; sums = out summed per channel.
struct PiecewiseApply {
  const void *g, *bias;
  const std::uint32_t *signs, *inside;
  void *out, *sums;
};
struct SmoothForward {
  const void *x, *bias;
  void* y;
};
struct SmoothBackward {
  const void *dy, *x, *bias;
  void *dx, *dbias;
};
struct SmoothDoubleBackward {
  const void *h, *h_bias;  // gradients of dx, dbias
  const void *dy, *x, *bias;
  void *by_dy, *by_x, *by_bias;
};

#define FASTGAN_DECLARE(isa)                                                                                       \
  namespace isa {                                                                                                  \
  void piecewise_forward(Dtype, const PiecewiseForward&, const BiasActShape&, const BiasActOptions&, int threads); \
  void piecewise_apply(Dtype, const PiecewiseApply&, const BiasActShape&, const BiasActOptions&, int threads);     \
  void smooth_forward(Dtype, const SmoothForward&, const BiasActShape&, const BiasActOptions&, int threads);       \
  void smooth_backward(Dtype, const SmoothBackward&, const BiasActShape&, const BiasActOptions&, int threads);     \
  void smooth_double_backward(Dtype, const SmoothDoubleBackward&, const BiasActShape&, const BiasActOptions&,      \
                              int threads);                                                                        \
  }
FASTGAN_DECLARE(baseline)
FASTGAN_DECLARE(avx2)
FASTGAN_DECLARE(avx512)
#undef FASTGAN_DECLARE

}  // namespace fastgan
