#pragma once

#include <cstdint>

#include "cpu/spectral_norm.h"

namespace fastgan {

// Elements as they lie in memory, (outer, channels, inner); a bias has one value a channel.
struct BiasActShape {
  std::int64_t outer, channels, inner;

  std::int64_t size() const { return outer * channels * inner; }
};

// The last two take the result of their function as x: what the derivatives need is known from it.
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

// y = gain act(x + bias), cut off at -clamp and clamp, which may be infinite.
struct BiasActOptions {
  Activation activation;
  double negative_slope, gain, clamp;
};

// Tensors are of one dtype, biases and their gradients of its accumulation type; null: absent, or not wanted.
// signs, inside: a bit an element, of words of 32, the first element lowest: where x + bias > 0; where not cut off.
struct PiecewiseForward {
  const void *x, *bias;
  void* y;
  std::uint32_t *signs, *inside;
};
// out = (g + bias) times the slope of each element, sums = out summed for each channel.
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
