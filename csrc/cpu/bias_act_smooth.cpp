// silu, gelu, tanh, sigmoid and softplus of x + bias, times gain, cut off at +-clamp.  With u = x + b, p = gain f(u)
// and m = gain where |p| <= clamp, 0 elsewhere:
//
//     y = p, cut off      dx = m f'(u) dy      db = sum dx
//
// and for gradients H and k of dx and db, with G = H + k:
//
//     by dy = m f'(u) G   by x = m f''(u) dy G   by b = sum by x
//
// Bytes: forward one read and one write; backward two reads and one write; double backward three reads and two writes.
// Work: one exponential an element and about thirty multiplications and additions each.
#include <cmath>

#include "cpu/activations.h"
#include "cpu/bias_act.h"
#include "cpu/bias_act_lines.h"

namespace fastgan {
namespace FASTGAN_ISA {
namespace {

constexpr std::int64_t kSerial = 1 << 13;  // elements under which waking threads costs more than they bring

template <class A>
struct Scale {
  A gain, clamp;

  explicit Scale(const BiasActOptions& o) : gain(static_cast<A>(o.gain)), clamp(static_cast<A>(o.clamp)) {}

  A value(A f) const {
    const A p = gain * f;
    return p > clamp ? clamp : p < -clamp ? -clamp : p;
  }
  A slope(A f) const {
    const A p = gain * f;
    return p >= -clamp && p <= clamp ? gain : A{0};
  }
};

template <class A, class F>
void forward(Dtype dtype, const SmoothForward& t, const BiasActShape& shape, const BiasActOptions& o, int threads) {
  const Scale<A> scale(o);
  over_lines<A>(shape, nullptr, kSerial, threads, [&](const Line& line, double*) {
    Operand<A> xs, biases, ys;
    const A* x = xs.read(t.x, dtype, line);
    const A* bias = biases.spread(t.bias, shape, line);
    A* y = ys.target(t.y, dtype, line);
#pragma omp simd
    for (std::int64_t i = 0; i < line.size; ++i) y[i] = scale.value(F::at(x[i] + bias[i]).f);
    ys.write(t.y, dtype, line);
  });
}

template <class A, class F>
void backward(Dtype dtype, const SmoothBackward& t, const BiasActShape& shape, const BiasActOptions& o, int threads) {
  const Scale<A> scale(o);
  over_lines<A>(shape, t.dbias, kSerial, threads, [&](const Line& line, double* sums) {
    Operand<A> dys, xs, biases, dxs;
    const A* dy = dys.read(t.dy, dtype, line);
    const A* x = xs.read(t.x, dtype, line);
    const A* bias = biases.spread(t.bias, shape, line);
    A* dx = dxs.target(t.dx, dtype, line);
#pragma omp simd
    for (std::int64_t i = 0; i < line.size; ++i) {
      const At<A> at = F::at(x[i] + bias[i]);
      dx[i] = scale.slope(at.f) * at.first * dy[i];
    }
    dxs.write(t.dx, dtype, line);
    gather(dx, shape, line, sums);
  });
}

template <class A, class F>
void double_backward(Dtype dtype, const SmoothDoubleBackward& t, const BiasActShape& shape, const BiasActOptions& o,
                     int threads) {
  const Scale<A> scale(o);
  over_lines<A>(shape, t.by_bias, kSerial, threads, [&](const Line& line, double* sums) {
    Operand<A> hs, h_biases, dys, xs, biases, by_dys, by_xs;
    const A* h = hs.read(t.h, dtype, line);
    const A* h_bias = h_biases.spread(t.h_bias, shape, line);
    const A* dy = dys.read(t.dy, dtype, line);
    const A* x = xs.read(t.x, dtype, line);
    const A* bias = biases.spread(t.bias, shape, line);
    A* by_dy = by_dys.target(t.by_dy, dtype, line);
    A* by_x = by_xs.target(t.by_x, dtype, line);
#pragma omp simd
    for (std::int64_t i = 0; i < line.size; ++i) {
      const At<A> at = F::at(x[i] + bias[i]);
      const A given = scale.slope(at.f) * (h[i] + h_bias[i]);
      by_dy[i] = at.first * given;
      by_x[i] = at.second * dy[i] * given;
    }
    by_dys.write(t.by_dy, dtype, line);
    by_xs.write(t.by_x, dtype, line);
    gather(by_x, shape, line, sums);
  });
}

// Calls run(activation, accumulation type) with values that tell of types.
template <class Run>
void with_types(Dtype dtype, Activation activation, const Run& run) {
  const auto of = [&](auto f) { dtype == Dtype::f64 ? run(f, double{}) : run(f, float{}); };
  switch (activation) {
    case Activation::silu:
      return of(Silu{});
    case Activation::gelu:
      return of(Gelu{});
    case Activation::gelu_tanh:
      return of(GeluTanh{});
    case Activation::tanh:
      return of(Tanh{});
    case Activation::sigmoid:
      return of(Sigmoid{});
    case Activation::softplus:
      return of(Softplus{});
    case Activation::tanh_of_y:
      return of(TanhOfY{});
    case Activation::sigmoid_of_y:
      return of(SigmoidOfY{});
    default:
      return;  // linear in pieces: not of this file
  }
}

}  // namespace

void smooth_forward(Dtype dtype, const SmoothForward& tensors, const BiasActShape& shape, const BiasActOptions& options,
                    int threads) {
  if (tensors.y != tensors.x) ask_for_huge_pages(dtype, tensors.y, shape);
  with_types(dtype, options.activation, [&](auto f, auto accumulator) {
    forward<decltype(accumulator), decltype(f)>(dtype, tensors, shape, options, threads);
  });
}

void smooth_backward(Dtype dtype, const SmoothBackward& tensors, const BiasActShape& shape,
                     const BiasActOptions& options, int threads) {
  ask_for_huge_pages(dtype, tensors.dx, shape);
  with_types(dtype, options.activation, [&](auto f, auto accumulator) {
    backward<decltype(accumulator), decltype(f)>(dtype, tensors, shape, options, threads);
  });
}

void smooth_double_backward(Dtype dtype, const SmoothDoubleBackward& tensors, const BiasActShape& shape,
                            const BiasActOptions& options, int threads) {
  ask_for_huge_pages(dtype, tensors.by_dy, shape);
  ask_for_huge_pages(dtype, tensors.by_x, shape);
  with_types(dtype, options.activation, [&](auto f, auto accumulator) {
    double_backward<decltype(accumulator), decltype(f)>(dtype, tensors, shape, options, threads);
  });
}

}  // namespace FASTGAN_ISA
}  // namespace fastgan
