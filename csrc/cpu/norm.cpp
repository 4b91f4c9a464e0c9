// LayerNorm, GroupNorm and InstanceNorm: y = w xh + b with xh = (x - mean) r, r = 1 / sqrt(var + eps), and the first
// and the second derivative.  mean and var are those of a row of M elements; <.> is the mean over the row.
//
// Backward, with g = w dy:
//     dx = r (g - <g> - xh <g xh>)        dw = sum dy xh        db = sum dy
//
// Double backward, of L = sum H dx + sum hw dw + sum hb db.  v -> v - <v> - xh <v xh> is symmetric, so with
// t = r (H - <H> - xh <H xh>), which is dx with H for g, sum H dx = sum t g, and
//     by dy = w t + hw xh + hb            by w = sum dy t
// For x, sum H dx = r M (<H g> - <H><g> - <H xh><g xh>) depends on x through xh and r.  By xh the derivative of L is
//     e = hw dy - r (H <g xh> + g <H xh>)
// and by r it is M c, c = <H g> - <H><g> - <H xh><g xh>.  As xh carries e to x like y = xh carries dy, and
// dr/dx = -r^2 xh / M,
//     by x = r (e - <e> - xh <e xh>) - r^2 c xh
//     <e> = <hw dy> - r (<H><g xh> + <g><H xh>)        <e xh> = <hw dy xh> - 2 r <H xh><g xh>
//
// Bytes: each of the three reads its operands once for the sums of a row and once, from the cache, for the results:
// forward 1 read + 1 write, backward 2 + 1, double backward 3 + 2 of the size of x.
//
// A row is worked on in lines of at most kLine elements, which stay in the nearest cache: half precision is converted
// there, and w of a channel is spread there, so that one loop serves every dtype and shape.  Sums are of the
// accumulation type within a line and double beyond it; the variance of a line is taken about its own mean, and lines
// are merged by Chan's formula, so that a large mean costs no digits.
#include "cpu/norm.h"

#include <cmath>
#include <type_traits>

#include "common/dtype.h"
#include "cpu/norm_rows.h"

namespace fastgan {
namespace FASTGAN_ISA {
namespace {

// Loops that both ways of sharing out rows call: inlined into each, they would take twice as long to compile.
#if defined(__GNUC__)
#define FASTGAN_ONE_COPY __attribute__((noinline))
#else
#define FASTGAN_ONE_COPY
#endif

// Stands for an operand that is absent.  Made at the first call: not before this instruction set was chosen.
template <class A>
const A* line_of(int value) {
  struct Lines {
    A values[2][kLine];
    Lines() {
      fill(values[0], kLine, A{0});
      fill(values[1], kLine, A{1});
    }
  };
  static const Lines lines;
  return lines.values[value];
}

template <class T>
FASTGAN_ONE_COPY const float* converted(const T* from, std::int64_t n, float* to) {
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) to[i] = load(from[i]);
  return to;
}

template <class T>
FASTGAN_ONE_COPY void put(const float* from, std::int64_t n, T* to) {
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) store(to[i], from[i]);
}

// What the three operators share: how a line's operands come in and its results go out.
template <class A>
struct Operator {
  using Accumulator = A;
  const Geometry& geometry;
  Dtype dtype;

  const A* read(const void* tensor, std::int64_t row, const Line& line, A* buffer) const {
    if (tensor == nullptr) return line_of<A>(0);
    const std::int64_t at = row * geometry.row + line.begin;
    if constexpr (std::is_same_v<A, float>) {
      if (dtype == Dtype::f16) return converted(static_cast<const Half*>(tensor) + at, line.size, buffer);
      if (dtype == Dtype::bf16) return converted(static_cast<const BFloat16*>(tensor) + at, line.size, buffer);
    }
    return static_cast<const A*>(tensor) + at;
  }

  // Where the results of a line are written, before they go through `write`.
  A* target(void* tensor, std::int64_t row, const Line& line, A* buffer) const {
    if (tensor == nullptr || dtype == Dtype::f16 || dtype == Dtype::bf16) return buffer;
    return static_cast<A*>(tensor) + row * geometry.row + line.begin;
  }

  void write(void* tensor, std::int64_t row, const Line& line, const A* values) const {
    if (tensor == nullptr) return;
    [[maybe_unused]] const std::int64_t at = row * geometry.row + line.begin;
    if constexpr (std::is_same_v<A, float>) {
      if (dtype == Dtype::f16) put(values, line.size, static_cast<Half*>(tensor) + at);
      if (dtype == Dtype::bf16) put(values, line.size, static_cast<BFloat16*>(tensor) + at);
    }
  }

  // A weight or bias, an element of the line each.
  const A* affine(const void* values, int if_absent, std::int64_t row, const Line& line, A* buffer) const {
    if (values == nullptr) return line_of<A>(if_absent);
    const A* of_row = static_cast<const A*>(values) + row % geometry.groups * geometry.channels;
    if (geometry.inner == 1) return of_row + line.first;
    for (std::int64_t u = 0; u < line.units; ++u)
      fill(buffer + u * line.unit, line.unit, of_row[(line.first + u) / geometry.split]);
    return buffer;
  }

  // Adds the sum of each unit to its slot.
  FASTGAN_ONE_COPY void gather(const A* products, const Line& line, A* slots) const {
    if (slots == nullptr) return;
    A* of_line = slots + line.first;
    if (geometry.inner == 1) {
#pragma omp simd
      for (std::int64_t i = 0; i < line.size; ++i) of_line[i] += products[i];
      return;
    }
    for (std::int64_t u = 0; u < line.units; ++u) {
      const A* of_unit = products + u * line.unit;
      A sum = 0;
#pragma omp simd reduction(+ : sum)
      for (std::int64_t i = 0; i < line.unit; ++i) sum += of_unit[i];
      of_line[u] += sum;
    }
  }

  static A at(const void* statistics, std::int64_t row) { return static_cast<const A*>(statistics)[row]; }
};

template <int N>
struct Sums {
  double of[N] = {};
  void add(const Sums& other) {
    for (int i = 0; i < N; ++i) of[i] += other.of[i];
  }
};

struct Moments {
  double count = 0, mean = 0, squares = 0;  // squares: of the distances from the mean
  void add(const Moments& other) {
    const double both = count + other.count, apart = other.mean - mean;
    mean += apart * (other.count / both);
    squares += other.squares + apart * apart * (count * other.count / both);
    count = both;
  }
};

template <class A>
struct Forward : Operator<A> {
  NormForward t;
  double eps;
  using Sum = Moments;
  struct Row {
    A mean, rstd;
  };

  FASTGAN_ONE_COPY Moments sum(std::int64_t row, const Line& line, Scratch<A>& scratch) const {
    const std::int64_t n = line.size;
    const A* x = this->read(t.x, row, line, scratch.data[0]);
    A total = 0, rest = 0, squares = 0;
#pragma omp simd reduction(+ : total)
    for (std::int64_t i = 0; i < n; ++i) total += x[i];
    const A near = total / static_cast<A>(n);
#pragma omp simd reduction(+ : rest, squares)
    for (std::int64_t i = 0; i < n; ++i) {
      const A apart = x[i] - near;
      rest += apart;
      squares += apart * apart;
    }
    const double count = static_cast<double>(n), off = static_cast<double>(rest) / count;
    return {count, static_cast<double>(near) + off, static_cast<double>(squares) - off * off * count};
  }

  Row finish(std::int64_t row, const Moments& sum) const {
    const double variance = sum.squares < 0 ? 0 : sum.squares / sum.count;
    const A mean = static_cast<A>(sum.mean), rstd = static_cast<A>(1 / std::sqrt(variance + eps));
    static_cast<A*>(t.mean)[row] = mean;
    static_cast<A*>(t.rstd)[row] = rstd;
    return {mean, rstd};
  }

  FASTGAN_ONE_COPY void apply(std::int64_t row, const Line& line, const Row& s, A* const*, Scratch<A>& scratch) const {
    const A* x = this->read(t.x, row, line, scratch.data[0]);
    const A* w = this->affine(t.weight, 1, row, line, scratch.affine[0]);
    const A* b = this->affine(t.bias, 0, row, line, scratch.affine[1]);
    A* y = this->target(t.y, row, line, scratch.out[0]);
#pragma omp simd
    for (std::int64_t i = 0; i < line.size; ++i) y[i] = (x[i] - s.mean) * s.rstd * w[i] + b[i];
    this->write(t.y, row, line, y);
  }

  static constexpr int kSums = 1;  // of which none is wanted: an array has an element at least
  void* gathered(int) const { return nullptr; }
};

template <class A>
struct Backward : Operator<A> {
  NormBackward t;
  using Sum = Sums<2>;
  struct Row {
    A mean, rstd, g, gx;
  };

  FASTGAN_ONE_COPY Sum sum(std::int64_t row, const Line& line, Scratch<A>& scratch) const {
    const A* x = this->read(t.x, row, line, scratch.data[0]);
    const A* dy = this->read(t.dy, row, line, scratch.data[1]);
    const A* w = this->affine(t.weight, 1, row, line, scratch.affine[0]);
    const A mean = this->at(t.mean, row), rstd = this->at(t.rstd, row);
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
    const auto n = static_cast<double>(this->geometry.row);
    return {this->at(t.mean, row), this->at(t.rstd, row), static_cast<A>(sum.of[0] / n), static_cast<A>(sum.of[1] / n)};
  }

  FASTGAN_ONE_COPY void apply(std::int64_t row, const Line& line, const Row& s, A* const* slots,
                              Scratch<A>& scratch) const {
    const A* x = this->read(t.x, row, line, scratch.data[0]);
    const A* dy = this->read(t.dy, row, line, scratch.data[1]);
    const A* w = this->affine(t.weight, 1, row, line, scratch.affine[0]);
    A* dx = this->target(t.dx, row, line, scratch.out[0]);
    A* products = scratch.products;
#pragma omp simd
    for (std::int64_t i = 0; i < line.size; ++i) {
      const A xh = (x[i] - s.mean) * s.rstd;
      dx[i] = s.rstd * (w[i] * dy[i] - s.g - xh * s.gx);
      products[i] = dy[i] * xh;
    }
    this->write(t.dx, row, line, dx);
    this->gather(products, line, slots[0]);
    this->gather(dy, line, slots[1]);
  }

  static constexpr int kSums = 2;
  void* gathered(int which) const { return which == 0 ? t.dweight : t.dbias; }
};

template <class A>
struct DoubleBackward : Operator<A> {
  NormDoubleBackward t;
  using Sum = Sums<7>;
  struct Row {
    A mean, rstd, h, hx;          // means of H and H xh
    A of_h, of_g, of_xh, of_one;  // by x as a combination of H, g, xh and 1
  };

  FASTGAN_ONE_COPY Sum sum(std::int64_t row, const Line& line, Scratch<A>& scratch) const {
    const A* x = this->read(t.x, row, line, scratch.data[0]);
    const A* dy = this->read(t.dy, row, line, scratch.data[1]);
    const A* h = this->read(t.h, row, line, scratch.data[2]);
    const A* w = this->affine(t.weight, 1, row, line, scratch.affine[0]);
    const A* hw = this->affine(t.h_weight, 0, row, line, scratch.affine[1]);
    const A mean = this->at(t.mean, row), rstd = this->at(t.rstd, row);
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
    for (int i = 0; i < 7; ++i) m[i] = sum.of[i] / static_cast<double>(this->geometry.row);
    const double h = m[0], hx = m[1], g = m[2], gx = m[3];
    const double r = static_cast<double>(this->at(t.rstd, row));
    const double c = m[4] - h * g - hx * gx;
    const double e = m[5] - r * (h * gx + g * hx), ex = m[6] - 2 * r * hx * gx;
    return {this->at(t.mean, row),
            this->at(t.rstd, row),
            static_cast<A>(h),
            static_cast<A>(hx),
            static_cast<A>(-r * r * gx),
            static_cast<A>(-r * r * hx),
            static_cast<A>(-r * ex - r * r * c),
            static_cast<A>(-r * e)};
  }

  FASTGAN_ONE_COPY void apply(std::int64_t row, const Line& line, const Row& s, A* const* slots,
                              Scratch<A>& scratch) const {
    const A* x = this->read(t.x, row, line, scratch.data[0]);
    const A* dy = this->read(t.dy, row, line, scratch.data[1]);
    const A* h = this->read(t.h, row, line, scratch.data[2]);
    const A* w = this->affine(t.weight, 1, row, line, scratch.affine[0]);
    const A* hw = this->affine(t.h_weight, 0, row, line, scratch.affine[1]);
    const A* hb = this->affine(t.h_bias, 0, row, line, scratch.affine[2]);
    A* by_dy = this->target(t.by_dy, row, line, scratch.out[0]);
    A* by_x = this->target(t.by_x, row, line, scratch.out[1]);
    A* products = scratch.products;
#pragma omp simd
    for (std::int64_t i = 0; i < line.size; ++i) {
      const A xh = (x[i] - s.mean) * s.rstd;
      const A of_h = s.rstd * (h[i] - s.h - xh * s.hx);
      by_dy[i] = w[i] * of_h + hw[i] * xh + hb[i];
      by_x[i] = s.of_h * h[i] + (s.of_g * w[i] + s.rstd * hw[i]) * dy[i] + s.of_xh * xh + s.of_one;
      products[i] = dy[i] * of_h;
    }
    this->write(t.by_dy, row, line, by_dy);
    this->write(t.by_x, row, line, by_x);
    this->gather(products, line, slots[0]);
  }

  static constexpr int kSums = 1;
  void* gathered(int) const { return t.by_weight; }
};

void ask_for_huge_pages(Dtype dtype, void* tensor, const NormShape& shape) {
  const std::int64_t item = dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2;
  if (tensor != nullptr) FASTGAN_ISA::ask_for_huge_pages(tensor, shape.rows * shape.channels * shape.inner * item);
}

}  // namespace

void norm_forward(Dtype dtype, const NormForward& tensors, const NormShape& shape, double eps, int threads) {
  const Geometry geometry(shape);
  ask_for_huge_pages(dtype, tensors.y, shape);
  if (dtype == Dtype::f64)
    run(Forward<double>{{geometry, dtype}, tensors, eps}, threads);
  else
    run(Forward<float>{{geometry, dtype}, tensors, eps}, threads);
}

void norm_backward(Dtype dtype, const NormBackward& tensors, const NormShape& shape, int threads) {
  const Geometry geometry(shape);
  ask_for_huge_pages(dtype, tensors.dx, shape);
  if (dtype == Dtype::f64)
    run(Backward<double>{{geometry, dtype}, tensors}, threads);
  else
    run(Backward<float>{{geometry, dtype}, tensors}, threads);
}

void norm_double_backward(Dtype dtype, const NormDoubleBackward& tensors, const NormShape& shape, int threads) {
  const Geometry geometry(shape);
  ask_for_huge_pages(dtype, tensors.by_dy, shape);
  ask_for_huge_pages(dtype, tensors.by_x, shape);
  if (dtype == Dtype::f64)
    run(DoubleBackward<double>{{geometry, dtype}, tensors}, threads);
  else
    run(DoubleBackward<float>{{geometry, dtype}, tensors}, threads);
}

}  // namespace FASTGAN_ISA
}  // namespace fastgan
