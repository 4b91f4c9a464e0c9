// silu, gelu, tanh, sigmoid and softplus of x + bias, times gain, clamped to +-clamp.  With u = x + b, p = gain f(u)
// and m = gain if |p| <= clamp, otherwise 0:
//
//     y = p, clamped      dx = m f'(u) dy      db = sum dx
//
// and for gradients H and k of dx and db, with G = H + k:
//
//     by dy = m f'(u) G   by x = m f''(u) dy G   by b = sum by x
//
// Bytes: forward one read and one write; backward two reads and one write; double backward three reads and two writes.
// Work: one exponential per element and about thirty multiplications and additions each.
#include <stdexcept>

#include "cpu/activations.h"
#include "cpu/bias_act.h"
#include "cpu/bias_act_lines.h"

namespace fastgan {
namespace FASTGAN_ISA {
namespace {

constexpr std::int64_t kSerial = 1 << 13;  // fewer elements run serially: waking threads would cost more than it saves

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

template <class A>
struct Lines {
  void (*forward)(const A* x, const A* bias, A* y, std::int64_t size, const Scale<A>&);
  void (*backward)(const A* dy, const A* x, const A* bias, A* dx, std::int64_t size, const Scale<A>&);
  void (*double_backward)(const A* h, const A* h_bias, const A* dy, const A* x, const A* bias, A* by_dy, A* by_x,
                          std::int64_t size, const Scale<A>&);
};

template <class A, class F>
void forward_line(const A* x, const A* bias, A* y, std::int64_t size, const Scale<A>& scale) {
#pragma omp simd
  for (std::int64_t i = 0; i < size; ++i) y[i] = scale.value(F::at(x[i] + bias[i]).f);
}

template <class A, class F>
void backward_line(const A* dy, const A* x, const A* bias, A* dx, std::int64_t size, const Scale<A>& scale) {
#pragma omp simd
  for (std::int64_t i = 0; i < size; ++i) {
    const At<A> at = F::at(x[i] + bias[i]);
    dx[i] = scale.slope(at.f) * at.first * dy[i];
  }
}

template <class A, class F>
void double_backward_line(const A* h, const A* h_bias, const A* dy, const A* x, const A* bias, A* by_dy, A* by_x,
                          std::int64_t size, const Scale<A>& scale) {
#pragma omp simd
  for (std::int64_t i = 0; i < size; ++i) {
    const At<A> at = F::at(x[i] + bias[i]);
    const A given = scale.slope(at.f) * (h[i] + h_bias[i]);
    by_dy[i] = at.first * given;
    by_x[i] = at.second * dy[i] * given;
  }
}

template <class A>
Lines<A> lines_of(Activation activation) {
  const auto of = [](auto f) {
    using F = decltype(f);
    return Lines<A>{forward_line<A, F>, backward_line<A, F>, double_backward_line<A, F>};
  };
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
      throw std::invalid_argument("this activation is piecewise linear");
  }
}

template <class A>
void forward(Dtype dtype, const SmoothForward& t, const BiasActShape& shape, const BiasActOptions& o, int threads) {
  const Scale<A> scale(o);
  const Lines<A> of = lines_of<A>(o.activation);
  over_lines<A>(shape, nullptr, kSerial, threads, [&](const Line& line, double*) {
    Operand<A> x, bias, y;
    of.forward(x.read(t.x, dtype, line), bias.spread(t.bias, shape, line), y.target(t.y, dtype, line), line.size,
               scale);
    y.write(t.y, dtype, line);
  });
}

template <class A>
void backward(Dtype dtype, const SmoothBackward& t, const BiasActShape& shape, const BiasActOptions& o, int threads) {
  const Scale<A> scale(o);
  const Lines<A> of = lines_of<A>(o.activation);
  over_lines<A>(shape, t.dbias, kSerial, threads, [&](const Line& line, double* sums) {
    Operand<A> dy, x, bias, dx;
    A* values = dx.target(t.dx, dtype, line);
    of.backward(dy.read(t.dy, dtype, line), x.read(t.x, dtype, line), bias.spread(t.bias, shape, line), values,
                line.size, scale);
    dx.write(t.dx, dtype, line);
    gather(values, shape, line, sums);
  });
}

template <class A>
void double_backward(Dtype dtype, const SmoothDoubleBackward& t, const BiasActShape& shape, const BiasActOptions& o,
                     int threads) {
  const Scale<A> scale(o);
  const Lines<A> of = lines_of<A>(o.activation);
  over_lines<A>(shape, t.by_bias, kSerial, threads, [&](const Line& line, double* sums) {
    Operand<A> h, h_bias, dy, x, bias, by_dy, by_x;
    A* values = by_x.target(t.by_x, dtype, line);
    of.double_backward(h.read(t.h, dtype, line), h_bias.spread(t.h_bias, shape, line), dy.read(t.dy, dtype, line),
                       x.read(t.x, dtype, line), bias.spread(t.bias, shape, line), by_dy.target(t.by_dy, dtype, line),
                       values, line.size, scale);
    by_dy.write(t.by_dy, dtype, line);
    by_x.write(t.by_x, dtype, line);
    gather(values, shape, line, sums);
  });
}

}  // namespace

void smooth_forward(Dtype dtype, const SmoothForward& tensors, const BiasActShape& shape, const BiasActOptions& options,
                    int threads) {
  if (tensors.y != tensors.x) ask_for_huge_pages(dtype, tensors.y, shape);
  (dtype == Dtype::f64 ? forward<double> : forward<float>)(dtype, tensors, shape, options, threads);
}

void smooth_backward(Dtype dtype, const SmoothBackward& tensors, const BiasActShape& shape,
                     const BiasActOptions& options, int threads) {
  ask_for_huge_pages(dtype, tensors.dx, shape);
  (dtype == Dtype::f64 ? backward<double> : backward<float>)(dtype, tensors, shape, options, threads);
}

void smooth_double_backward(Dtype dtype, const SmoothDoubleBackward& tensors, const BiasActShape& shape,
                            const BiasActOptions& options, int threads) {
  ask_for_huge_pages(dtype, tensors.by_dy, shape);
  ask_for_huge_pages(dtype, tensors.by_x, shape);
  (dtype == Dtype::f64 ? double_backward<double> : double_backward<float>)(dtype, tensors, shape, options, threads);
}

}  // namespace FASTGAN_ISA
}  // namespace fastgan
