// Normalization: y = w xh + b with xh = (x - mean) r, r = 1 / sqrt(var + eps), with first and second derivatives.
// mean and var are those of a row of M elements (see norm.h); <.> is the mean over the row.
//
// Backward, with g = w dy:
//     dx = r (g - <g> - xh <g xh>)        dw = sum dy xh        db = sum dy
//
// Double backward of L = sum H dx + sum hw dw + sum hb db.  v -> v - <v> - xh <v xh> is symmetric, so with
// t = r (H - <H> - xh <H xh>), which is dx with H in place of g, sum H dx = sum t g, and
//     by dy = w t + hw xh + hb            by w = sum dy t
// For x, sum H dx = r M (<H g> - <H><g> - <H xh><g xh>) depends on x through xh and r.  By xh the derivative of L is
//     e = hw dy - r (H <g xh> + g <H xh>)
// and by r it is M c, c = <H g> - <H><g> - <H xh><g xh>.  As xh carries e to x in the same way as y = xh carries dy,
// and dr/dx = -r^2 xh / M,
//     by x = r (e - <e> - xh <e xh>) - r^2 c xh
//     <e> = <hw dy> - r (<H><g xh> + <g><H xh>)        <e xh> = <hw dy xh> - 2 r <H xh><g xh>
//
// Bytes: each pass reads its operands once for the sums of a row and once for the results, from the cache if a row
// fits: forward 1 read + 1 write, backward 2 + 1, double backward 3 + 2 times the size of x. Large results bypass the
// caches (stream.h), because a plain write also reads.
//
// This file handles rows with one weight and bias per element (LayerNorm, GroupNorm of vectors).  norm_channels.cpp
// handles weights shared by many elements, and computes sums per channel.
//
// A row is processed in lines of at most kLine elements, which stay in the L1 cache.  Half precision is converted
// there, so that one loop serves every dtype.  Sums use the accumulation type within a line and double beyond it.  The
// variance of a line is relative to its own mean, and lines are merged by Chan's formula.
#include "cpu/norm.h"

#include "cpu/norm_lines.h"
#include "cpu/norm_rows.h"

namespace fastgan {
namespace FASTGAN_ISA {
namespace {

// Common to the three operators: the elements of a line of a row, and its weights.
template <class A>
struct Operator : Lines<A> {
  using Accumulator = A;
  const NormShape& shape;

  Operator(Dtype dtype, const NormShape& s) : Lines<A>(dtype, s), shape(s) {}

  Line line(std::int64_t index) const {
    const std::int64_t begin = index * kLine;
    return {begin, smaller(kLine, shape.of_row() - begin)};
  }

  std::int64_t place(std::int64_t row, const Line& line) const { return row * shape.of_row() + line.begin; }

  const A* affine(const void* values, int if_absent, std::int64_t row, const Line& line) const {
    if (values == nullptr) return line_of<A>(if_absent);
    return static_cast<const A*>(values) + place(row % shape.groups, line);
  }

  static void gather(const A* products, const Line& line, A* slots) {
    if (slots == nullptr) return;
    A* of_line = slots + line.begin;
#pragma omp simd
    for (std::int64_t i = 0; i < line.size; ++i) of_line[i] += products[i];
  }
};

template <int N>
struct Sums {
  double of[N] = {};
  void add(const Sums& other) {
    for (int i = 0; i < N; ++i) of[i] += other.of[i];
  }
};

template <class A>
struct Forward : Operator<A> {
  const NormForward& t;
  double eps;
  using Sum = Moments;
  using Row = MeanAndRstd<A>;

  Forward(Dtype dtype, const NormShape& s, const NormForward& tensors, double e)
      : Operator<A>(dtype, s), t(tensors), eps(e) {}

  FASTGAN_ONE_COPY Moments sum(std::int64_t row, const Line& line, Scratch<A>& scratch) const {
    return moments_of(this->read(t.x, this->place(row, line), line.size, scratch.data[0]), line.size);
  }

  Row finish(std::int64_t row, const Moments& sum) const { return statistics<A>(t, row, sum, eps); }

  FASTGAN_ONE_COPY void apply(std::int64_t row, const Line& line, const Row& s, A* const*, Scratch<A>& scratch) const {
    const std::int64_t at = this->place(row, line);
    const A* x = this->read(t.x, at, line.size, scratch.data[0]);
    const A* w = this->affine(t.weight, 1, row, line);
    const A* b = this->affine(t.bias, 0, row, line);
    A* y = this->target(t.y, at, scratch.out[0]);
#pragma omp simd
    for (std::int64_t i = 0; i < line.size; ++i) y[i] = (x[i] - s.mean) * s.rstd * w[i] + b[i];
    this->write(t.y, at, line.size, y);
  }

  static constexpr int kSums = 1;  // unused: an array needs at least one element
  void* gathered(int) const { return nullptr; }
};

template <class A>
struct Backward : Operator<A> {
  const NormBackward& t;
  using Sum = Sums<2>;
  struct Row {
    A mean, rstd, g, gx;
  };

  Backward(Dtype dtype, const NormShape& s, const NormBackward& tensors) : Operator<A>(dtype, s), t(tensors) {}

  FASTGAN_ONE_COPY Sum sum(std::int64_t row, const Line& line, Scratch<A>& scratch) const {
    const std::int64_t at = this->place(row, line);
    const A* x = this->read(t.x, at, line.size, scratch.data[0]);
    const A* dy = this->read(t.dy, at, line.size, scratch.data[1]);
    const A* w = this->affine(t.weight, 1, row, line);
    const A mean = this->value_of(t.mean, row), rstd = this->value_of(t.rstd, row);
    A sum_g = 0, sum_gx = 0;
#pragma omp simd reduction(+ : sum_g, sum_gx)
    for (std::int64_t i = 0; i < line.size; ++i) {
      const A g = w[i] * dy[i];
      sum_g += g;
      sum_gx += g * ((x[i] - mean) * rstd);
    }
    return {{static_cast<double>(sum_g), static_cast<double>(sum_gx)}};
  }

  Row finish(std::int64_t row, const Sum& sum) const {
    const auto n = static_cast<double>(this->shape.row_size());
    return {this->value_of(t.mean, row), this->value_of(t.rstd, row), static_cast<A>(sum.of[0] / n),
            static_cast<A>(sum.of[1] / n)};
  }

  FASTGAN_ONE_COPY void apply(std::int64_t row, const Line& line, const Row& s, A* const* slots,
                              Scratch<A>& scratch) const {
    const std::int64_t at = this->place(row, line);
    const A* x = this->read(t.x, at, line.size, scratch.data[0]);
    const A* dy = this->read(t.dy, at, line.size, scratch.data[1]);
    const A* w = this->affine(t.weight, 1, row, line);
    A* dx = this->target(t.dx, at, scratch.out[0]);
    A* products = scratch.products;
#pragma omp simd
    for (std::int64_t i = 0; i < line.size; ++i) {
      const A xh = (x[i] - s.mean) * s.rstd;
      dx[i] = s.rstd * (w[i] * dy[i] - s.g - xh * s.gx);
      products[i] = dy[i] * xh;
    }
    this->write(t.dx, at, line.size, dx);
    this->gather(products, line, slots[0]);
    this->gather(dy, line, slots[1]);
  }

  static constexpr int kSums = 2;
  void* gathered(int which) const { return which == 0 ? t.dweight : t.dbias; }
};

template <class A>
struct DoubleBackward : Operator<A> {
  const NormDoubleBackward& t;
  using Sum = Sums<7>;
  struct Row {
    A mean, rstd, h, hx;          // means of H and H xh
    A of_h, of_g, of_xh, of_one;  // coefficients of by x for H, g, xh and 1
  };

  DoubleBackward(Dtype dtype, const NormShape& s, const NormDoubleBackward& tensors)
      : Operator<A>(dtype, s), t(tensors) {}

  FASTGAN_ONE_COPY Sum sum(std::int64_t row, const Line& line, Scratch<A>& scratch) const {
    const std::int64_t at = this->place(row, line);
    const A* x = this->read(t.x, at, line.size, scratch.data[0]);
    const A* dy = this->read(t.dy, at, line.size, scratch.data[1]);
    const A* h = this->read(t.h, at, line.size, scratch.data[2]);
    const A* w = this->affine(t.weight, 1, row, line);
    const A* hw = this->affine(t.h_weight, 0, row, line);
    const A mean = this->value_of(t.mean, row), rstd = this->value_of(t.rstd, row);
    A s0 = 0, s1 = 0, s2 = 0, s3 = 0, s4 = 0, s5 = 0, s6 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3, s4, s5, s6)
    for (std::int64_t i = 0; i < line.size; ++i) {
      const A xh = (x[i] - mean) * rstd, g = w[i] * dy[i], k = hw[i] * dy[i];
      s0 += h[i];
      s1 += h[i] * xh;
      s2 += g;
      s3 += g * xh;
      s4 += h[i] * g;
      s5 += k;
      s6 += k * xh;
    }
    Sum sum;
    const A of[7] = {s0, s1, s2, s3, s4, s5, s6};
    for (int i = 0; i < 7; ++i) sum.of[i] = static_cast<double>(of[i]);
    return sum;
  }

  Row finish(std::int64_t row, const Sum& sum) const {
    double m[7];
    for (int i = 0; i < 7; ++i) m[i] = sum.of[i] / static_cast<double>(this->shape.row_size());
    const double h = m[0], hx = m[1], g = m[2], gx = m[3];
    const double r = static_cast<double>(this->value_of(t.rstd, row));
    const double c = m[4] - h * g - hx * gx;
    const double e = m[5] - r * (h * gx + g * hx), ex = m[6] - 2 * r * hx * gx;
    return {this->value_of(t.mean, row),
            this->value_of(t.rstd, row),
            static_cast<A>(h),
            static_cast<A>(hx),
            static_cast<A>(-r * r * gx),
            static_cast<A>(-r * r * hx),
            static_cast<A>(-r * ex - r * r * c),
            static_cast<A>(-r * e)};
  }

  FASTGAN_ONE_COPY void apply(std::int64_t row, const Line& line, const Row& s, A* const* slots,
                              Scratch<A>& scratch) const {
    const std::int64_t at = this->place(row, line);
    const A* x = this->read(t.x, at, line.size, scratch.data[0]);
    const A* dy = this->read(t.dy, at, line.size, scratch.data[1]);
    const A* h = this->read(t.h, at, line.size, scratch.data[2]);
    const A* w = this->affine(t.weight, 1, row, line);
    const A* hw = this->affine(t.h_weight, 0, row, line);
    const A* hb = this->affine(t.h_bias, 0, row, line);
    A* by_dy = this->target(t.by_dy, at, scratch.out[0]);
    A* by_x = this->target(t.by_x, at, scratch.out[1]);
    A* products = scratch.products;
#pragma omp simd
    for (std::int64_t i = 0; i < line.size; ++i) {
      const A xh = (x[i] - s.mean) * s.rstd;
      const A of_h = s.rstd * (h[i] - s.h - xh * s.hx);
      by_dy[i] = w[i] * of_h + hw[i] * xh + hb[i];
      by_x[i] = s.of_h * h[i] + (s.of_g * w[i] + s.rstd * hw[i]) * dy[i] + s.of_xh * xh + s.of_one;
      products[i] = dy[i] * of_h;
    }
    this->write(t.by_dy, at, line.size, by_dy);
    this->write(t.by_x, at, line.size, by_x);
    this->gather(products, line, slots[0]);
  }

  static constexpr int kSums = 1;
  void* gathered(int) const { return t.by_weight; }
};

}  // namespace

void norm_forward(Dtype dtype, const NormForward& tensors, const NormShape& shape, double eps, int threads) {
  if (shape.positions() > 1) return channel_norm_forward(dtype, tensors, shape, eps, threads);
  ask_for_huge_pages(dtype, tensors.y, shape);
  if (dtype == Dtype::f64)
    run(Forward<double>(dtype, shape, tensors, eps), threads);
  else
    run(Forward<float>(dtype, shape, tensors, eps), threads);
}

void norm_backward(Dtype dtype, const NormBackward& tensors, const NormShape& shape, int threads) {
  if (shape.positions() > 1) return channel_norm_backward(dtype, tensors, shape, threads);
  ask_for_huge_pages(dtype, tensors.dx, shape);
  if (dtype == Dtype::f64)
    run(Backward<double>(dtype, shape, tensors), threads);
  else
    run(Backward<float>(dtype, shape, tensors), threads);
}

void norm_double_backward(Dtype dtype, const NormDoubleBackward& tensors, const NormShape& shape, int threads) {
  if (shape.positions() > 1) return channel_norm_double_backward(dtype, tensors, shape, threads);
  ask_for_huge_pages(dtype, tensors.by_dy, shape);
  ask_for_huge_pages(dtype, tensors.by_x, shape);
  if (dtype == Dtype::f64)
    run(DoubleBackward<double>(dtype, shape, tensors), threads);
  else
    run(DoubleBackward<float>(dtype, shape, tensors), threads);
}

}  // namespace FASTGAN_ISA
}  // namespace fastgan
