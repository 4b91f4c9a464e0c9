// Minibatch standard deviation.  For the G members x_g of a group, at each of the P values of a block of channels,
//     z_g = x_g - <x>        s = sqrt(<z^2> + eps)        <.> is the mean over the group
// and y = sum_P s / P, one number per group and block, appended to the values of every member.
//
// Backward.  As <z> = 0, ds/dx_g = z_g / (G s).  With r = 1 / s and the slope a = sum dy / (P G), summed over all
// places that y was written to,
//     dx_g = dy_g + a r z_g
//
// Double backward of L = sum H_g dx_g, with q = <H z>.  By dy it is H_g for the values, and for the places of y
//     dL/da / (P G) = sum_P r G q / (P G) = sum_P r q / P
// By x: <z> = 0, so that sum H_g z_g = sum (H_g - <H>) z_g, and dr/dx_g = -r^3 z_g / G, so that
//     by x_g = a r (H_g - <H> - r^2 q z_g)
//
// Bytes: forward reads x and writes x and y; backward reads dy and x and writes dx; double backward reads H and x and
// writes both results.  The moments are recomputed each time, from values that are in the L1 cache anyway: only x and
// the slopes are kept between the passes.
//
// A group is processed in lines: up to kLine values of each of its members, few enough to stay in that cache.  Sums use
// the accumulation type within a line and double beyond it, and are added in the order of the lines.
#include "cpu/minibatch_stddev.h"

#include <cmath>
#include <cstring>
#include <type_traits>

#include "common/dtype.h"
#include "common/workspace.h"

namespace fastgan {
namespace FASTGAN_ISA {
namespace {

constexpr std::int64_t kLine = 1024;       // values per member
constexpr std::int64_t kShortest = 64;     // fewer values per member in groups with many members
constexpr std::int64_t kLines = 1 << 13;   // values of all members: the size of an L1 cache
constexpr std::int64_t kTask = 1 << 15;    // values per task
constexpr std::int64_t kSerial = 1 << 15;  // fewer values run serially: waking threads would cost more than it saves

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
std::int64_t larger(std::int64_t a, std::int64_t b) { return a > b ? a : b; }

struct Line {
  std::int64_t group, feature;
  std::int64_t narrow, wide;  // where its first member's values begin in x, dx, H, and in y, dy, by_dy
  std::int64_t size;
};

struct Geometry : MinibatchStddevShape {
  std::int64_t samples, narrow, wide, narrow_row, wide_row;  // per sample and per row, without and with statistics
  std::int64_t line, per_run, lines, per_task, tasks;        // lines and tasks of one feature of one group

  explicit Geometry(const MinibatchStddevShape& s)
      : MinibatchStddevShape(s),
        samples(groups * size),
        narrow(outer * features * run),
        wide(outer * features * (run + tail)),
        narrow_row(features * run),
        wide_row(features * (run + tail)),
        line(smaller(larger(kLines / size, kShortest), kLine)),
        per_run(ceil_div(run, line)),
        lines(outer * per_run),
        per_task(larger(1, kTask / (smaller(line, run) * size))),
        tasks(ceil_div(lines, per_task)) {}

  std::int64_t slots() const { return groups * features; }
  double values() const { return static_cast<double>(outer * run); }  // P
  int threads(int available) const { return samples * narrow < kSerial ? 1 : available; }

  Line at(std::int64_t slot, std::int64_t index) const {
    const std::int64_t group = slot / features, feature = slot % features;
    const std::int64_t row = index / per_run, begin = index % per_run * line;
    const std::int64_t within = feature * run + begin;
    return {group, feature, group * narrow + row * narrow_row + within, group * wide + row * wide_row + within,
            smaller(line, run - begin)};
  }
};

// The values of a line: those of member g begin at data + g * stride.
template <class A>
struct Members {
  const A* data;
  std::int64_t stride;
  const A* operator[](std::int64_t g) const { return data + g * stride; }
};

template <class T>
struct Workspace {
  using A = typename Accumulate<T>::type;
  static constexpr bool converts = !std::is_same_v<T, A>;
  std::int64_t line, members;
  Buffer<A> buffer;

  explicit Workspace(const Geometry& g)
      : line(g.line), members(converts ? g.size * g.line : 0), buffer(5 * g.line + 2 * members) {}

  A* vector(int index) { return buffer.data() + index * line; }

  // For half precision, returns a copy in single precision: one of two buffers.
  Members<A> read(int copy, const T* first, std::int64_t stride, std::int64_t size, std::int64_t n) {
    if constexpr (converts) {
      A* to = vector(5) + copy * members;
      for (std::int64_t g = 0; g < size; ++g) {
        const T* from = first + g * stride;
        A* row = to + g * line;
#pragma omp simd
        for (std::int64_t i = 0; i < n; ++i) row[i] = load(from[i]);
      }
      return {to, line};
    } else {
      return {first, stride};
    }
  }
};

template <class A>
void mean_of(const Members<A>& x, std::int64_t size, std::int64_t n, A* mean) {
  std::memcpy(mean, x[0], sizeof(A) * static_cast<std::size_t>(n));
  for (std::int64_t g = 1; g < size; ++g) {
    const A* of = x[g];
#pragma omp simd
    for (std::int64_t i = 0; i < n; ++i) mean[i] += of[i];
  }
  const A count = static_cast<A>(size);
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) mean[i] /= count;
}

// <x>, and <z^2> + eps
template <class A>
void moments_of(const Members<A>& x, std::int64_t size, std::int64_t n, A eps, A* mean, A* variance) {
  mean_of(x, size, n, mean);
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) variance[i] = 0;
  for (std::int64_t g = 0; g < size; ++g) {
    const A* of = x[g];
#pragma omp simd
    for (std::int64_t i = 0; i < n; ++i) {
      const A z = of[i] - mean[i];
      variance[i] += z * z;
    }
  }
  const A count = static_cast<A>(size);
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) variance[i] = variance[i] / count + eps;
}

// body(line, workspace) for every line.  Returns the sums of its results, one per group and feature.
template <class T, class Body>
void sum_over_lines(const Geometry& g, int threads, double* sums, const Body& body) {
  Buffer<double> partial(g.slots() * g.tasks);
  parallel_for(g.slots() * g.tasks, threads, [&](std::int64_t task) {
    const std::int64_t slot = task / g.tasks, first = task % g.tasks * g.per_task;
    Workspace<T> workspace(g);
    double sum = 0;
    for (std::int64_t l = first; l < smaller(first + g.per_task, g.lines); ++l) sum += body(g.at(slot, l), workspace);
    partial[task] = sum;
  });
  for (std::int64_t slot = 0; slot < g.slots(); ++slot) {
    sums[slot] = 0;
    for (std::int64_t task = 0; task < g.tasks; ++task) sums[slot] += partial[slot * g.tasks + task];
  }
}

// Writes factor * sums after the values of every member.
template <class T>
void append(const Geometry& g, int threads, const double* sums, double factor, T* to) {
  using A = typename Accumulate<T>::type;
  parallel_for(g.samples, threads, [&](std::int64_t n) {
    for (std::int64_t row = 0; row < g.outer; ++row) {
      T* tails = to + n * g.wide + row * g.wide_row + g.narrow_row;
      for (std::int64_t f = 0; f < g.features; ++f) {
        T value;
        store(value, static_cast<A>(sums[n % g.groups * g.features + f] * factor));
        for (std::int64_t i = 0; i < g.tail; ++i) tails[f * g.tail + i] = value;
      }
    }
  });
}

template <class T>
void copy(const T* from, std::int64_t from_stride, T* to, std::int64_t to_stride, std::int64_t size, std::int64_t n) {
  for (std::int64_t g = 0; g < size; ++g)
    std::memcpy(to + g * to_stride, from + g * from_stride, sizeof(T) * static_cast<std::size_t>(n));
}

template <class T>
void forward(const MinibatchStddevForward& t, const Geometry& g, double eps, int threads) {
  using A = typename Accumulate<T>::type;
  const T* x = static_cast<const T*>(t.x);
  T* y = static_cast<T*>(t.y);
  const std::int64_t step = g.groups * g.narrow, wide_step = g.groups * g.wide;  // from one member to the next
  ask_for_huge_pages(y, g.samples * g.wide * static_cast<std::int64_t>(sizeof(T)));
  Buffer<double> sums(g.slots());
  sum_over_lines<T>(g, threads, sums.data(), [&](const Line& line, Workspace<T>& workspace) {
    A *mean = workspace.vector(0), *variance = workspace.vector(1);
    const Members<A> values = workspace.read(0, x + line.narrow, step, g.size, line.size);
    moments_of(values, g.size, line.size, static_cast<A>(eps), mean, variance);
    A sum = 0;
#pragma omp simd reduction(+ : sum)
    for (std::int64_t i = 0; i < line.size; ++i) sum += std::sqrt(variance[i]);
    copy(x + line.narrow, step, y + line.wide, wide_step, g.size, line.size);
    return static_cast<double>(sum);
  });
  append(g, threads, sums.data(), 1 / g.values(), y);
}

// The sum over the places of a statistic, times 1 / (P G).
template <class T>
void slopes_of(const T* dy, const Geometry& g, int threads, typename Accumulate<T>::type* slope) {
  using A = typename Accumulate<T>::type;
  parallel_for(g.slots(), g.outer * g.tail * g.samples < kSerial ? 1 : threads, [&](std::int64_t slot) {
    const std::int64_t group = slot / g.features, f = slot % g.features;
    double sum = 0;
    for (std::int64_t n = group; n < g.samples; n += g.groups) {
      for (std::int64_t row = 0; row < g.outer; ++row) {
        const T* tail = dy + n * g.wide + row * g.wide_row + g.narrow_row + f * g.tail;
        for (std::int64_t i = 0; i < g.tail; ++i) sum += static_cast<double>(load(tail[i]));
      }
    }
    slope[slot] = static_cast<A>(sum / (g.values() * static_cast<double>(g.size)));
  });
}

template <class T>
void backward(const MinibatchStddevBackward& t, const Geometry& g, double eps, int threads) {
  using A = typename Accumulate<T>::type;
  const T *dy = static_cast<const T*>(t.dy), *x = static_cast<const T*>(t.x);
  T* dx = static_cast<T*>(t.dx);
  A* slope = static_cast<A*>(t.slope);
  const std::int64_t step = g.groups * g.narrow, wide_step = g.groups * g.wide;
  ask_for_huge_pages(dx, g.samples * g.narrow * static_cast<std::int64_t>(sizeof(T)));
  slopes_of(dy, g, threads, slope);
  Buffer<double> none(g.slots());
  sum_over_lines<T>(g, threads, none.data(), [&](const Line& line, Workspace<T>& workspace) {
    A *mean = workspace.vector(0), *factor = workspace.vector(1);
    const Members<A> values = workspace.read(0, x + line.narrow, step, g.size, line.size);
    moments_of(values, g.size, line.size, static_cast<A>(eps), mean, factor);
    const A a = slope[line.group * g.features + line.feature];
#pragma omp simd
    for (std::int64_t i = 0; i < line.size; ++i) factor[i] = a / std::sqrt(factor[i]);
    for (std::int64_t member = 0; member < g.size; ++member) {
      const A* of = values[member];
      const T* from = dy + line.wide + member * wide_step;
      T* to = dx + line.narrow + member * step;
#pragma omp simd
      for (std::int64_t i = 0; i < line.size; ++i) store(to[i], load(from[i]) + factor[i] * (of[i] - mean[i]));
    }
    return 0.0;
  });
}

template <class T>
void double_backward(const MinibatchStddevDoubleBackward& t, const Geometry& g, double eps, int threads) {
  using A = typename Accumulate<T>::type;
  const T *h = static_cast<const T*>(t.h), *x = static_cast<const T*>(t.x);
  T *by_dy = static_cast<T*>(t.by_dy), *by_x = static_cast<T*>(t.by_x);
  const A* slope = static_cast<const A*>(t.slope);
  const std::int64_t step = g.groups * g.narrow, wide_step = g.groups * g.wide;
  const auto item = static_cast<std::int64_t>(sizeof(T));
  if (by_dy != nullptr) ask_for_huge_pages(by_dy, g.samples * g.wide * item);
  if (by_x != nullptr) ask_for_huge_pages(by_x, g.samples * g.narrow * item);
  Buffer<double> sums(g.slots());
  sum_over_lines<T>(g, threads, sums.data(), [&](const Line& line, Workspace<T>& workspace) {
    A *mean = workspace.vector(0), *r = workspace.vector(1), *q = workspace.vector(2), *h_mean = workspace.vector(3);
    const Members<A> values = workspace.read(0, x + line.narrow, step, g.size, line.size);
    const Members<A> grads = workspace.read(1, h + line.narrow, step, g.size, line.size);
    moments_of(values, g.size, line.size, static_cast<A>(eps), mean, r);
    mean_of(grads, g.size, line.size, h_mean);
#pragma omp simd
    for (std::int64_t i = 0; i < line.size; ++i) q[i] = 0;
    for (std::int64_t member = 0; member < g.size; ++member) {
      const A *of = values[member], *grad = grads[member];
#pragma omp simd
      for (std::int64_t i = 0; i < line.size; ++i) q[i] += (grad[i] - h_mean[i]) * (of[i] - mean[i]);
    }
    const A a = slope[line.group * g.features + line.feature], count = static_cast<A>(g.size);
    A sum = 0;
#pragma omp simd reduction(+ : sum)
    for (std::int64_t i = 0; i < line.size; ++i) {
      const A variance = r[i], mean_hz = q[i] / count;
      r[i] = 1 / std::sqrt(variance);
      sum += r[i] * mean_hz;
      q[i] = mean_hz / variance;
      r[i] *= a;
    }
    if (by_dy != nullptr) copy(h + line.narrow, step, by_dy + line.wide, wide_step, g.size, line.size);
    if (by_x != nullptr) {
      for (std::int64_t member = 0; member < g.size; ++member) {
        const A *of = values[member], *grad = grads[member];
        T* to = by_x + line.narrow + member * step;
#pragma omp simd
        for (std::int64_t i = 0; i < line.size; ++i)
          store(to[i], r[i] * (grad[i] - h_mean[i] - q[i] * (of[i] - mean[i])));
      }
    }
    return static_cast<double>(sum);
  });
  if (by_dy != nullptr) append(g, threads, sums.data(), 1 / g.values(), by_dy);
}

// body(a value of the type that dtype names, the geometry, the number of threads that it deserves)
template <class Body>
void dispatch(Dtype dtype, const MinibatchStddevShape& shape, int threads, const Body& body) {
  const Geometry geometry(shape);
  with_dtype(dtype, [&](auto type) { body(type, geometry, geometry.threads(threads)); });
}

}  // namespace

void minibatch_stddev_forward(Dtype dtype, const MinibatchStddevForward& tensors, const MinibatchStddevShape& shape,
                              double eps, int threads) {
  dispatch(dtype, shape, threads, [&](auto type, const Geometry& geometry, int used) {
    forward<decltype(type)>(tensors, geometry, eps, used);
  });
}

void minibatch_stddev_backward(Dtype dtype, const MinibatchStddevBackward& tensors, const MinibatchStddevShape& shape,
                               double eps, int threads) {
  dispatch(dtype, shape, threads, [&](auto type, const Geometry& geometry, int used) {
    backward<decltype(type)>(tensors, geometry, eps, used);
  });
}

void minibatch_stddev_double_backward(Dtype dtype, const MinibatchStddevDoubleBackward& tensors,
                                      const MinibatchStddevShape& shape, double eps, int threads) {
  dispatch(dtype, shape, threads, [&](auto type, const Geometry& geometry, int used) {
    double_backward<decltype(type)>(tensors, geometry, eps, used);
  });
}

}  // namespace FASTGAN_ISA
}  // namespace fastgan
