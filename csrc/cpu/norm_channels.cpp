// Normalization with weights shared by many elements: GroupNorm, InstanceNorm, BatchNorm.  Notation and
// derivation are in norm.cpp.
//
// As w is constant within a channel, every sum of the three operators consists of sums over one channel of one
// sample, with d = x - mean in place of xh = r d:
//     forward           its mean and squares, merged by Chan's formula
//     backward          D = sum dy, DX = sum dy d
//     double backward   H = sum h, HX = sum h d, HD = sum h dy, D, DX
// <g> = sum_c w D / M, <g xh> = r sum_c w DX / M, <hw dy> = sum_c hw D / M and so on.  The derivatives by weight and
// bias need no pass of their own: dw = sum r DX, db = sum D, by w = sum r (HD - <H> D - <H xh> r DX) over the samples.
// The remaining work per element is linear, with coefficients of its channel:
//     y = scale d + b          dx = a dy + b d + c
//     by dy = a h + b d + c    by x = e h + f dy + g d + k
//
// Channels first: a tile has elements of one channel, and the coefficients are scalars.  Channels last: a tile has
// positions of up to kLine channels, and sums and coefficients are vectors next to the elements.
#include "cpu/norm.h"

#include <initializer_list>

#include "cpu/norm_lines.h"
#include "cpu/norm_tiles.h"

namespace fastgan {
namespace FASTGAN_ISA {
namespace {

// A coefficient of each channel: one for all elements of a line, or one per element.
template <class A, bool kBeside>
struct Number {
  const A* values;
  A value;
  explicit Number(const A* of_channel) : values(of_channel), value(*of_channel) {}
  A operator[]([[maybe_unused]] std::int64_t i) const {
    if constexpr (kBeside) return values[i];
    return value;
  }
};

template <class A>
struct Operator : Lines<A> {
  using Accumulator = A;
  const Walk walk, summed;     // the tiles to map, and the tiles to sum
  double* unsummed = nullptr;  // (results, samples, channels): what each adds to weight and bias

  Operator(Dtype dtype, const NormShape& shape) : Operator(dtype, shape, shape) {}
  Operator(Dtype dtype, const NormShape& shape, const NormShape& of_sums)
      : Lines<A>(dtype, shape), walk(shape), summed(of_sums) {}

  // body(row, first channel in the block, first channel of weight and bias) for each row of a block.
  template <class Body>
  void each_row(std::int64_t block, const Body& body) const {
    const NormShape& s = walk.shape;
    const std::int64_t rows = s.channels_last ? s.groups : 1;
    for (std::int64_t i = 0; i < rows; ++i) {
      const std::int64_t row = block * rows + i;
      body(row, i * s.of_row(), row % s.groups * s.of_row());
    }
  }

  static double affine(const void* values, double if_absent, std::int64_t channel) {
    return values == nullptr ? if_absent : static_cast<double>(static_cast<const A*>(values)[channel]);
  }

  void keep(int k, std::int64_t row, std::int64_t channel, double value) const {
    if (unsummed == nullptr) return;
    const NormShape& s = walk.shape;
    unsummed[(k * s.samples + row / s.groups) * s.channels + channel] = value;
  }

  template <class Of>
  void mean_of_rows(std::int64_t block, const void* mean, const Of& of) const {
    each_row(block, [&](std::int64_t row, std::int64_t first, std::int64_t) {
      fill(of.number(0) + first, walk.shape.of_row(), this->value_of(mean, row));
    });
  }

  template <class Of>
  void add(const Of& all, const Of& other, int sums) const {
    for (std::int64_t i = 0; i < sums * walk.channels; ++i) all.sums[i] += other.sums[i];
  }

  // The sums of a tile's lines in the accumulation type.
  template <int N, class Of>
  void add_lines(const Tile& tile, const Of& of, const A (*sums)[kLine]) const {
    for (int k = 0; k < N; ++k) {
      double* to = of.sum(k) + tile.channel;
#pragma omp simd
      for (std::int64_t i = 0; i < tile.size; ++i) to[i] += static_cast<double>(sums[k][i]);
    }
  }

  std::int64_t place(const Tile& tile, std::int64_t position) const { return tile.begin + position * walk.channels; }
};

template <class A>
struct Forward : Operator<A> {
  const NormForward& t;
  double eps;
  static constexpr int kSums = 3, kNumbers = 3;  // count, mean, squares; mean, scale, bias

  Forward(Dtype dtype, const NormShape& shape, const NormForward& tensors, double e)
      : Operator<A>(dtype, shape, rows_of(shape)), t(tensors), eps(e) {}

  // Its moments are those of a row: if that is contiguous, channels need no separate sums.
  static NormShape rows_of(NormShape shape) {
    if (shape.channels_last || shape.segments > 1) return shape;
    return {shape.samples, 1, shape.groups, shape.inner * shape.of_row(), shape.groups, false};
  }

  using Of = OfChannels<Forward>;

  void start(std::int64_t, const Of&) const {}

  FASTGAN_ONE_COPY void sum(const Tile& tile, const Of& of, Scratch<A>& scratch) const {
    if (!this->walk.shape.channels_last) {
      const A* x = this->read(t.x, tile.begin, tile.size, scratch.data[0]);
      return merge(of, tile.channel, moments_of(x, tile.size));
    }
    A *total = scratch.sums[0], *rest = scratch.sums[1], *squares = scratch.sums[2];
    for (int k = 0; k < 3; ++k) fill(scratch.sums[k], tile.size, A{0});
    for (std::int64_t p = 0; p < tile.count; ++p) {
      const A* x = this->read(t.x, this->place(tile, p), tile.size, scratch.data[0]);
#pragma omp simd
      for (std::int64_t i = 0; i < tile.size; ++i) total[i] += x[i];
    }
    const A count = static_cast<A>(tile.count);
    for (std::int64_t i = 0; i < tile.size; ++i) total[i] /= count;
    for (std::int64_t p = 0; p < tile.count; ++p) {
      const A* x = this->read(t.x, this->place(tile, p), tile.size, scratch.data[0]);
#pragma omp simd
      for (std::int64_t i = 0; i < tile.size; ++i) {
        const A apart = x[i] - total[i];
        rest[i] += apart;
        squares[i] += apart * apart;
      }
    }
    const double n = static_cast<double>(tile.count);
    for (std::int64_t i = 0; i < tile.size; ++i) {
      const double off = static_cast<double>(rest[i]) / n;
      const double own = static_cast<double>(squares[i]) - off * off * n;
      merge(of, tile.channel + i, {n, static_cast<double>(total[i]) + off, own});
    }
  }

  static Moments moments(const Of& of, std::int64_t c) { return {of.sum(0)[c], of.sum(1)[c], of.sum(2)[c]}; }

  static void merge(const Of& of, std::int64_t c, const Moments& other) {
    Moments all = moments(of, c);
    all.add(other);
    of.sum(0)[c] = all.count;
    of.sum(1)[c] = all.mean;
    of.sum(2)[c] = all.squares;
  }

  void merge(const Of& all, const Of& other) const {
    for (std::int64_t c = 0; c < this->walk.channels; ++c) merge(all, c, moments(other, c));
  }

  void finish(std::int64_t block, const Of& of) const {
    this->each_row(block, [&](std::int64_t row, std::int64_t first, std::int64_t affine) {
      const std::int64_t channels = this->walk.shape.of_row();
      Moments of_row;
      for (std::int64_t c = 0; c < this->summed.shape.of_row(); ++c) of_row.add(moments(of, first + c));
      const MeanAndRstd<A> s = statistics<A>(t, row, of_row, eps);
      for (std::int64_t c = 0; c < channels; ++c) {
        of.number(0)[first + c] = s.mean;
        of.number(1)[first + c] = static_cast<A>(static_cast<double>(s.rstd) * this->affine(t.weight, 1, affine + c));
        of.number(2)[first + c] = static_cast<A>(this->affine(t.bias, 0, affine + c));
      }
    });
  }

  void apply(const Tile& tile, const Of& of, Scratch<A>& scratch) const {
    this->walk.shape.channels_last ? map<true>(tile, of, scratch) : map<false>(tile, of, scratch);
  }

  template <bool kBeside>
  FASTGAN_ONE_COPY void map(const Tile& tile, const Of& of, Scratch<A>& scratch) const {
    using N = Number<A, kBeside>;
    const N mean(of.number(0) + tile.channel), scale(of.number(1) + tile.channel), bias(of.number(2) + tile.channel);
    for (std::int64_t p = 0; p < tile.count; ++p) {
      const std::int64_t at = this->place(tile, p);
      const A* x = this->read(t.x, at, tile.size, scratch.data[0]);
      A* y = this->target(t.y, at, scratch.out[0]);
#pragma omp simd
      for (std::int64_t i = 0; i < tile.size; ++i) y[i] = (x[i] - mean[i]) * scale[i] + bias[i];
      this->write(t.y, at, tile.size, y);
    }
  }
};

template <class A>
struct Backward : Operator<A> {
  const NormBackward& t;
  static constexpr int kSums = 2, kNumbers = 4;  // D, DX; mean, a, b, c
  static constexpr int kResults = 2;

  Backward(Dtype dtype, const NormShape& shape, const NormBackward& tensors) : Operator<A>(dtype, shape), t(tensors) {}

  using Of = OfChannels<Backward>;

  void* result(int k) const { return k == 0 ? t.dweight : t.dbias; }
  void start(std::int64_t block, const Of& of) const { this->mean_of_rows(block, t.mean, of); }
  void merge(const Of& all, const Of& other) const { this->add(all, other, kSums); }

  FASTGAN_ONE_COPY void sum(const Tile& tile, const Of& of, Scratch<A>& scratch) const {
    if (!this->walk.shape.channels_last) {
      const A* x = this->read(t.x, tile.begin, tile.size, scratch.data[0]);
      const A* dy = this->read(t.dy, tile.begin, tile.size, scratch.data[1]);
      const A mean = of.number(0)[tile.channel];
      A sum = 0, sum_x = 0;
#pragma omp simd reduction(+ : sum, sum_x)
      for (std::int64_t i = 0; i < tile.size; ++i) {
        sum += dy[i];
        sum_x += dy[i] * (x[i] - mean);
      }
      of.sum(0)[tile.channel] += static_cast<double>(sum);
      of.sum(1)[tile.channel] += static_cast<double>(sum_x);
      return;
    }
    for (int k = 0; k < kSums; ++k) fill(scratch.sums[k], tile.size, A{0});
    A *sum = scratch.sums[0], *sum_x = scratch.sums[1];
    const A* mean = of.number(0) + tile.channel;
    for (std::int64_t p = 0; p < tile.count; ++p) {
      const std::int64_t at = this->place(tile, p);
      const A* x = this->read(t.x, at, tile.size, scratch.data[0]);
      const A* dy = this->read(t.dy, at, tile.size, scratch.data[1]);
#pragma omp simd
      for (std::int64_t i = 0; i < tile.size; ++i) {
        sum[i] += dy[i];
        sum_x[i] += dy[i] * (x[i] - mean[i]);
      }
    }
    this->template add_lines<kSums>(tile, of, scratch.sums);
  }

  void finish(std::int64_t block, const Of& of) const {
    this->each_row(block, [&](std::int64_t row, std::int64_t first, std::int64_t affine) {
      const std::int64_t channels = this->walk.shape.of_row();
      const double r = static_cast<double>(this->value_of(t.rstd, row));
      double g = 0, gx = 0;
      for (std::int64_t c = 0; c < channels; ++c) {
        const double w = this->affine(t.weight, 1, affine + c), dy = of.sum(0)[first + c],
                     dyx = r * of.sum(1)[first + c];
        g += w * dy;
        gx += w * dyx;
        this->keep(0, row, affine + c, dyx);
        this->keep(1, row, affine + c, dy);
      }
      const auto m = static_cast<double>(this->walk.shape.row_size());
      for (std::int64_t c = 0; c < channels; ++c) {
        of.number(1)[first + c] = static_cast<A>(r * this->affine(t.weight, 1, affine + c));
        of.number(2)[first + c] = static_cast<A>(-r * r * gx / m);
        of.number(3)[first + c] = static_cast<A>(-r * g / m);
      }
    });
  }

  void apply(const Tile& tile, const Of& of, Scratch<A>& scratch) const {
    if (t.dx == nullptr) return;
    this->walk.shape.channels_last ? map<true>(tile, of, scratch) : map<false>(tile, of, scratch);
  }

  template <bool kBeside>
  FASTGAN_ONE_COPY void map(const Tile& tile, const Of& of, Scratch<A>& scratch) const {
    using N = Number<A, kBeside>;
    const std::int64_t c = tile.channel;
    const N mean(of.number(0) + c), of_dy(of.number(1) + c), of_d(of.number(2) + c), of_one(of.number(3) + c);
    for (std::int64_t p = 0; p < tile.count; ++p) {
      const std::int64_t at = this->place(tile, p);
      const A* x = this->read(t.x, at, tile.size, scratch.data[0]);
      const A* dy = this->read(t.dy, at, tile.size, scratch.data[1]);
      A* dx = this->target(t.dx, at, scratch.out[0]);
#pragma omp simd
      for (std::int64_t i = 0; i < tile.size; ++i) dx[i] = of_dy[i] * dy[i] + of_d[i] * (x[i] - mean[i]) + of_one[i];
      this->write(t.dx, at, tile.size, dx);
    }
  }
};

template <class A>
struct DoubleBackward : Operator<A> {
  const NormDoubleBackward& t;
  static constexpr int kSums = 5, kNumbers = 8;  // H, HX, HD, D, DX; mean, then coefficients of by_dy and by_x
  static constexpr int kResults = 1;

  DoubleBackward(Dtype dtype, const NormShape& shape, const NormDoubleBackward& tensors)
      : Operator<A>(dtype, shape), t(tensors) {}

  using Of = OfChannels<DoubleBackward>;

  void* result(int) const { return t.by_weight; }
  void start(std::int64_t block, const Of& of) const { this->mean_of_rows(block, t.mean, of); }
  void merge(const Of& all, const Of& other) const { this->add(all, other, kSums); }

  FASTGAN_ONE_COPY void sum(const Tile& tile, const Of& of, Scratch<A>& scratch) const {
    if (!this->walk.shape.channels_last) {
      const A* x = this->read(t.x, tile.begin, tile.size, scratch.data[0]);
      const A* dy = this->read(t.dy, tile.begin, tile.size, scratch.data[1]);
      const A* h = this->read(t.h, tile.begin, tile.size, scratch.data[2]);
      const A mean = of.number(0)[tile.channel];
      A s0 = 0, s1 = 0, s2 = 0, s3 = 0, s4 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3, s4)
      for (std::int64_t i = 0; i < tile.size; ++i) {
        const A d = x[i] - mean;
        s0 += h[i];
        s1 += h[i] * d;
        s2 += h[i] * dy[i];
        s3 += dy[i];
        s4 += dy[i] * d;
      }
      const A sums[kSums] = {s0, s1, s2, s3, s4};
      for (int k = 0; k < kSums; ++k) of.sum(k)[tile.channel] += static_cast<double>(sums[k]);
      return;
    }
    A(*s)[kLine] = scratch.sums;
    for (int k = 0; k < kSums; ++k) fill(s[k], tile.size, A{0});
    const A* mean = of.number(0) + tile.channel;
    for (std::int64_t p = 0; p < tile.count; ++p) {
      const std::int64_t at = this->place(tile, p);
      const A* x = this->read(t.x, at, tile.size, scratch.data[0]);
      const A* dy = this->read(t.dy, at, tile.size, scratch.data[1]);
      const A* h = this->read(t.h, at, tile.size, scratch.data[2]);
#pragma omp simd
      for (std::int64_t i = 0; i < tile.size; ++i) {
        const A d = x[i] - mean[i];
        s[0][i] += h[i];
        s[1][i] += h[i] * d;
        s[2][i] += h[i] * dy[i];
        s[3][i] += dy[i];
        s[4][i] += dy[i] * d;
      }
    }
    this->template add_lines<kSums>(tile, of, s);
  }

  void finish(std::int64_t block, const Of& of) const {
    this->each_row(block, [&](std::int64_t row, std::int64_t first, std::int64_t affine) {
      const std::int64_t channels = this->walk.shape.of_row();
      const double r = static_cast<double>(this->value_of(t.rstd, row));
      double h = 0, hx = 0, hg = 0, g = 0, gx = 0, k = 0, kx = 0;
      for (std::int64_t c = 0; c < channels; ++c) {
        const double w = this->affine(t.weight, 1, affine + c), hw = this->affine(t.h_weight, 0, affine + c);
        const double dy = of.sum(3)[first + c], dyx = r * of.sum(4)[first + c];
        h += of.sum(0)[first + c];
        hx += r * of.sum(1)[first + c];
        hg += w * of.sum(2)[first + c];
        g += w * dy;
        gx += w * dyx;
        k += hw * dy;
        kx += hw * dyx;
      }
      const auto m = static_cast<double>(this->walk.shape.row_size());
      for (double* mean : {&h, &hx, &hg, &g, &gx, &k, &kx}) *mean /= m;
      const double e = k - r * (h * gx + g * hx), ex = kx - 2 * r * hx * gx, both = hg - h * g - hx * gx;
      for (std::int64_t c = 0; c < channels; ++c) {
        const double w = this->affine(t.weight, 1, affine + c), hw = this->affine(t.h_weight, 0, affine + c);
        const double hb = this->affine(t.h_bias, 0, affine + c);
        const double numbers[] = {w * r,       r * (hw - w * r * hx), hb - w * r * h,
                                  -r * r * gx, r * (hw - r * hx * w), -r * r * (ex + r * both),
                                  -r * e};
        for (int i = 0; i < 7; ++i) of.number(1 + i)[first + c] = static_cast<A>(numbers[i]);
        this->keep(0, row, affine + c,
                   r * (of.sum(2)[first + c] - h * of.sum(3)[first + c] - hx * r * of.sum(4)[first + c]));
      }
    });
  }

  void apply(const Tile& tile, const Of& of, Scratch<A>& scratch) const {
    if (t.by_dy == nullptr && t.by_x == nullptr) return;
    this->walk.shape.channels_last ? map<true>(tile, of, scratch) : map<false>(tile, of, scratch);
  }

  template <bool kBeside>
  FASTGAN_ONE_COPY void map(const Tile& tile, const Of& of, Scratch<A>& scratch) const {
    using N = Number<A, kBeside>;
    const std::int64_t c = tile.channel;
    const N mean(of.number(0) + c), by_dy_h(of.number(1) + c), by_dy_d(of.number(2) + c), by_dy_one(of.number(3) + c);
    const N by_x_h(of.number(4) + c), by_x_dy(of.number(5) + c), by_x_d(of.number(6) + c), by_x_one(of.number(7) + c);
    for (std::int64_t p = 0; p < tile.count; ++p) {
      const std::int64_t at = this->place(tile, p);
      const A* x = this->read(t.x, at, tile.size, scratch.data[0]);
      const A* dy = this->read(t.dy, at, tile.size, scratch.data[1]);
      const A* h = this->read(t.h, at, tile.size, scratch.data[2]);
      A* by_dy = this->target(t.by_dy, at, scratch.out[0]);
      A* by_x = this->target(t.by_x, at, scratch.out[1]);
#pragma omp simd
      for (std::int64_t i = 0; i < tile.size; ++i) {
        const A d = x[i] - mean[i];
        by_dy[i] = by_dy_h[i] * h[i] + by_dy_d[i] * d + by_dy_one[i];
        by_x[i] = by_x_h[i] * h[i] + by_x_dy[i] * dy[i] + by_x_d[i] * d + by_x_one[i];
      }
      this->write(t.by_dy, at, tile.size, by_dy);
      this->write(t.by_x, at, tile.size, by_x);
    }
  }
};

// Runs an operator with results by weight or bias: adds (samples, channels) over the samples.
template <class Op>
void run_and_sum(Op op, int threads) {
  using A = typename Op::Accumulator;
  const NormShape& s = op.walk.shape;
  bool wanted = false;
  for (int k = 0; k < Op::kResults; ++k) wanted = wanted || op.result(k) != nullptr;
  Buffer<double> unsummed(wanted ? Op::kResults * s.samples * s.channels : 0);
  if (wanted) op.unsummed = unsummed.data();
  run(op, threads);
  for (int k = 0; k < Op::kResults; ++k) {
    A* out = static_cast<A*>(op.result(k));
    for (std::int64_t c = 0; out != nullptr && c < s.channels; ++c) {
      double sum = 0;
      for (std::int64_t n = 0; n < s.samples; ++n) sum += unsummed[(k * s.samples + n) * s.channels + c];
      out[c] = static_cast<A>(sum);
    }
  }
}

}  // namespace

void channel_norm_forward(Dtype dtype, const NormForward& tensors, const NormShape& shape, double eps, int threads) {
  ask_for_huge_pages(dtype, tensors.y, shape);
  if (dtype == Dtype::f64)
    run(Forward<double>(dtype, shape, tensors, eps), threads);
  else
    run(Forward<float>(dtype, shape, tensors, eps), threads);
}

void channel_norm_backward(Dtype dtype, const NormBackward& tensors, const NormShape& shape, int threads) {
  ask_for_huge_pages(dtype, tensors.dx, shape);
  if (dtype == Dtype::f64)
    run_and_sum(Backward<double>(dtype, shape, tensors), threads);
  else
    run_and_sum(Backward<float>(dtype, shape, tensors), threads);
}

void channel_norm_double_backward(Dtype dtype, const NormDoubleBackward& tensors, const NormShape& shape, int threads) {
  ask_for_huge_pages(dtype, tensors.by_dy, shape);
  ask_for_huge_pages(dtype, tensors.by_x, shape);
  if (dtype == Dtype::f64)
    run_and_sum(DoubleBackward<double>(dtype, shape, tensors), threads);
  else
    run_and_sum(DoubleBackward<float>(dtype, shape, tensors), threads);
}

}  // namespace FASTGAN_ISA
}  // namespace fastgan
