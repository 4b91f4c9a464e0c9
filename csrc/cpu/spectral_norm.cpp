// Spectral normalization of many weights: W / sigma, sigma = u^T W v, after power iterations on u and v.
//
// A u-first iteration is s = W v, u = s / |s|, t = W^T u, v = t / |t|, and then sigma = u^T W v = t.v.  Since u is s up
// to a scalar, t accumulates row by row while the row is still in the L1 cache.  This takes one read of W per power
// iteration, and one read and one write to scale; the textbook order reads W four times.
//
// Backward, with u and v constant: dW = G / sigma - (<G, W> / sigma^2) u v^T: one read of G and W for the inner
// product, one read of G and one write of dW.
//
// Bytes: forward 2 reads + 1 write of W, backward 3 reads + 1 write.  Layers are processed in batches that fit the last
// private cache, so that the second read comes from there.  Sums have a fixed order for any number of threads: a chunk
// of rows has its own partial sums, added in the order of the chunks.
#include "spectral_norm.h"

#include <cmath>
#include <type_traits>

#include "common/dtype.h"
#include "common/workspace.h"
#include "cpu/stream.h"

namespace fastgan {
namespace FASTGAN_ISA {
namespace {

constexpr std::int64_t kChunk = 32768;   // elements per task: large next to a barrier, small next to a core's cache
constexpr std::int64_t kLeastRows = 32;  // rows per chunk: its partial W^T u costs 1 / kLeastRows of a pass
constexpr std::int64_t kBatchBytes = 2 << 20;  // layers processed together: the size of a core's private cache
constexpr std::int64_t kSerial = 1 << 15;      // fewer elements run serially: waking threads costs more than it saves

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
std::int64_t larger(std::int64_t a, std::int64_t b) { return a > b ? a : b; }

template <class A, class T>
A dot(std::int64_t n, const T* a, const A* b) {
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t i = 0; i < n; ++i) sum += static_cast<A>(load(a[i])) * b[i];
  return sum;
}

template <class A, class T>
void axpy(std::int64_t n, A alpha, const T* x, A* y) {
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) y[i] += alpha * static_cast<A>(load(x[i]));
}

template <class A>
double sum_of_squares(std::int64_t n, const A* x) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t i = 0; i < n; ++i) sum += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  return sum;
}

// Four rows at a time, so that v and t are loaded once for four rows of W.
template <class A, class T>
void dot4(std::int64_t n, const T* w, std::int64_t stride, const A* v, A* s) {
  const T *w0 = w, *w1 = w + stride, *w2 = w + 2 * stride, *w3 = w + 3 * stride;
  A s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
  for (std::int64_t i = 0; i < n; ++i) {
    s0 += static_cast<A>(load(w0[i])) * v[i];
    s1 += static_cast<A>(load(w1[i])) * v[i];
    s2 += static_cast<A>(load(w2[i])) * v[i];
    s3 += static_cast<A>(load(w3[i])) * v[i];
  }
  s[0] = s0, s[1] = s1, s[2] = s2, s[3] = s3;
}

template <class A, class T>
void axpy4(std::int64_t n, const A* s, const T* w, std::int64_t stride, A* t) {
  const T *w0 = w, *w1 = w + stride, *w2 = w + 2 * stride, *w3 = w + 3 * stride;
  const A s0 = s[0], s1 = s[1], s2 = s[2], s3 = s[3];
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i)
    t[i] += s0 * static_cast<A>(load(w0[i])) + s1 * static_cast<A>(load(w1[i])) + s2 * static_cast<A>(load(w2[i])) +
            s3 * static_cast<A>(load(w3[i]));
}

// out[i] = value(i).  Bypasses the caches if `streamed`, for storage of the accumulation type.
template <class T, class Value>
void write(std::int64_t n, [[maybe_unused]] bool streamed, T* out, const Value& value) {
  using A = typename Accumulate<T>::type;
  if constexpr (std::is_same_v<T, A>) {
    if (streamed) {
      constexpr std::int64_t line = 512;
      alignas(64) A values[line];
      for (std::int64_t begin = 0; begin < n; begin += line) {
        const std::int64_t count = smaller(n - begin, line);
#pragma omp simd
        for (std::int64_t i = 0; i < count; ++i) values[i] = value(begin + i);
        stream(values, count, out + begin);
      }
      return;
    }
  }
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) store(out[i], value(i));
}

// What one pass over W computes.
enum class Pass {
  rows,     // s = W v
  columns,  // t = W^T u
  both,     // s = W v and t = W^T s
};

// One layer during the computation.  outer == 1: a chunk is a range of rows; s is complete, and each chunk has a
// partial t.  outer > 1: a chunk is a range of outer; t is complete, and s is partial.
template <class T>
struct Layer {
  using A = typename Accumulate<T>::type;
  const SpectralNormLayer* at;
  std::int64_t chunk_length, chunks, line, first_chunk, first_element;
  A *s, *t, *partials;  // partials: (chunks, columns) or (chunks, rows)
  bool streamed;        // whether the outputs of all layers exceed the caches

  bool by_rows() const { return at->outer == 1; }
  std::int64_t partial_length() const { return by_rows() ? at->columns() : at->rows; }
  const T* weight() const { return static_cast<const T*>(at->weight); }
  A* sigma() const { return static_cast<A*>(at->saved); }
  A* u() const { return sigma() + 1; }
  A* v() const { return u() + at->rows; }

  Layer(const SpectralNormLayer* layer, bool stream) : at(layer), streamed(stream) {
    const std::int64_t lines = by_rows() ? at->rows : at->outer;
    line = at->size() / lines;
    chunk_length = by_rows() ? larger(kChunk / line, kLeastRows) : larger(kChunk / line, 1);
    chunk_length = smaller(chunk_length, lines);
    chunks = ceil_div(lines, chunk_length);
  }

  std::int64_t begin_of(std::int64_t chunk) const { return smaller(chunk * chunk_length * line, at->size()); }

  void pass(Pass kind, std::int64_t chunk) const {
    const std::int64_t begin = chunk * chunk_length;
    if (by_rows())
      pass_rows(kind, chunk, begin, smaller(begin + chunk_length, at->rows));
    else
      pass_outer(kind, chunk, begin, smaller(begin + chunk_length, at->outer));
  }

  void pass_rows(Pass kind, std::int64_t chunk, std::int64_t begin, std::int64_t end) const {
    const std::int64_t n = at->columns();
    const A* coefficients = kind == Pass::columns ? u() : s;
    A* partial = partials + chunk * n;
    if (kind != Pass::rows)
      for (std::int64_t i = 0; i < n; ++i) partial[i] = 0;
    std::int64_t r = begin;
    for (; r + 4 <= end; r += 4) {
      const T* w = weight() + r * n;
      if (kind != Pass::columns) dot4(n, w, n, v(), s + r);
      if (kind != Pass::rows) axpy4(n, coefficients + r, w, n, partial);
    }
    for (; r < end; ++r) {
      const T* w = weight() + r * n;
      if (kind != Pass::columns) s[r] = dot(n, w, v());
      if (kind != Pass::rows) axpy(n, coefficients[r], w, partial);
    }
  }

  void pass_outer(Pass kind, std::int64_t chunk, std::int64_t begin, std::int64_t end) const {
    const std::int64_t rows = at->rows, inner = at->inner;
    A* partial = partials + chunk * rows;
    if (kind == Pass::rows)
      for (std::int64_t r = 0; r < rows; ++r) partial[r] = 0;
    for (std::int64_t a = begin; a < end; ++a) {
      const T* slab = weight() + a * rows * inner;
      const A* v_a = v() + a * inner;
      A* t_a = t + a * inner;
      if (inner == 1) {  // the transpose of a matrix: lines are columns
        if (kind == Pass::rows)
          axpy(rows, v_a[0], slab, partial);
        else
          t_a[0] = dot(rows, slab, static_cast<const A*>(u()));
        continue;
      }
      if (kind == Pass::rows) {
        for (std::int64_t r = 0; r < rows; ++r) partial[r] += dot(inner, slab + r * inner, v_a);
      } else {
        for (std::int64_t k = 0; k < inner; ++k) t_a[k] = 0;
        for (std::int64_t r = 0; r < rows; ++r) axpy(inner, u()[r], slab + r * inner, t_a);
      }
    }
  }

  void add_partials(A* sum) const {
    const std::int64_t n = partial_length();
    for (std::int64_t i = 0; i < n; ++i) sum[i] = partials[i];
    for (std::int64_t c = 1; c < chunks; ++c) axpy(n, A{1}, partials + c * n, sum);
  }

  static void normalize(std::int64_t n, const A* x, double norm, double eps, A* out) {
    const A scale = static_cast<A>(1 / (norm > eps ? norm : eps));
#pragma omp simd
    for (std::int64_t i = 0; i < n; ++i) out[i] = x[i] * scale;
  }

  // After a pass: update u, v or both from s and t, and compute sigma from the newest of them.
  void finish(Pass kind, double eps, bool iterate) const {
    const std::int64_t rows = at->rows, columns = at->columns();
    if (kind == Pass::both) {
      const double norm = std::sqrt(sum_of_squares(rows, s));
      normalize(rows, s, norm, eps, u());
      add_partials(t);
      normalize(columns, t, norm, eps, t);
    } else if (kind == Pass::rows) {
      if (!by_rows()) add_partials(s);
      if (iterate) normalize(rows, s, std::sqrt(sum_of_squares(rows, s)), eps, u());
      *sigma() = dot(rows, s, u());
      return;
    } else if (by_rows()) {
      add_partials(t);
    }
    normalize(columns, t, std::sqrt(sum_of_squares(columns, t)), eps, v());
    *sigma() = dot(columns, t, v());
  }

  void scale(std::int64_t chunk) const {
    const std::int64_t begin = begin_of(chunk), end = begin_of(chunk + 1);
    const A scale = 1 / *sigma();
    const T* w = weight() + begin;
    write(end - begin, streamed, static_cast<T*>(at->output) + begin,
          [&](std::int64_t i) { return static_cast<A>(load(w[i])) * scale; });
  }

  void read_state() const {
    for (std::int64_t r = 0; r < at->rows; ++r) u()[r] = load(static_cast<const T*>(at->u)[r]);
    for (std::int64_t c = 0; c < at->columns(); ++c) v()[c] = load(static_cast<const T*>(at->v)[c]);
  }
  void write_state() const {
    for (std::int64_t r = 0; r < at->rows; ++r) store(static_cast<T*>(at->u)[r], u()[r]);
    for (std::int64_t c = 0; c < at->columns(); ++c) store(static_cast<T*>(at->v)[c], v()[c]);
  }

  // Backward: <G, W> of a chunk, then the gradient of that chunk.
  double inner_product(std::int64_t chunk) const {
    const std::int64_t begin = begin_of(chunk), end = begin_of(chunk + 1);
    const T *g = static_cast<const T*>(at->grad), *w = weight();
    A sum = 0;
#pragma omp simd reduction(+ : sum)
    for (std::int64_t i = begin; i < end; ++i) sum += static_cast<A>(load(g[i])) * static_cast<A>(load(w[i]));
    return static_cast<double>(sum);
  }

  void grad_weight(std::int64_t chunk, double product) const {
    const std::int64_t rows = at->rows, inner = at->inner;
    const T* g = static_cast<const T*>(at->grad);
    T* out = static_cast<T*>(at->output);
    const A scale = 1 / *sigma();
    const A rank_one = static_cast<A>(-product) * scale * scale;
    const std::int64_t begin = chunk * chunk_length;
    const std::int64_t end = smaller(begin + chunk_length, by_rows() ? rows : at->outer);
    if (inner == 1 && !by_rows()) {
      for (std::int64_t a = begin; a < end; ++a)
        grad_line(rows, g + a * rows, scale, rank_one * v()[a], u(), out + a * rows);
      return;
    }
    const std::int64_t first = by_rows() ? begin : begin * rows, last = by_rows() ? end : end * rows;
    for (std::int64_t i = first; i < last; ++i)
      grad_line(inner, g + i * inner, scale, rank_one * u()[i % rows], v() + i / rows * inner, out + i * inner);
  }

  void grad_line(std::int64_t n, const T* g, A scale, A factor, const A* x, T* out) const {
    write(n, streamed && by_rows(), out,
          [&](std::int64_t i) { return static_cast<A>(load(g[i])) * scale + factor * x[i]; });
  }
};

// Layers that are processed together, with all phases in one parallel region.
template <class T>
class Batch {
 public:
  // The work of one thread in each phase: consecutive layers and chunks, about as many elements as every other thread.
  // It is the same in every phase, so that data stays in the core's cache from one phase to the next.
  class Share {
   public:
    template <class Body>
    void each_layer(const Body& body) const {
      for (std::int64_t l = 0; l < batch_.count_; ++l)
        if (is_mine(batch_.layers_[l], 0)) body(batch_.layers_[l]);
      wait();
    }
    // Alternate the direction: the caches still hold the end of the previous pass.
    template <class Body>
    void each_chunk(const Body& body) {
      for (std::int64_t i = 0; i < batch_.count_; ++i) {
        const Layer<T>& layer = batch_.layers_[fro_ ? batch_.count_ - 1 - i : i];
        for (std::int64_t k = 0; k < layer.chunks; ++k) {
          const std::int64_t chunk = fro_ ? layer.chunks - 1 - k : k;
          if (is_mine(layer, chunk)) body(layer, chunk, layer.first_chunk + chunk);
        }
      }
      fro_ = !fro_;
      wait();
    }

   private:
    friend class Batch;
    Share(const Batch& batch, std::int64_t thread, std::int64_t threads)
        : batch_(batch), thread_(thread), threads_(threads) {}

    // Whether the middle of the chunk is in this thread's equal part of all elements.
    bool is_mine(const Layer<T>& layer, std::int64_t chunk) const {
      const std::int64_t twice = 2 * layer.first_element + layer.begin_of(chunk) + layer.begin_of(chunk + 1);
      return twice * threads_ / (2 * batch_.size_) == thread_;
    }
    // Waits until every thread has finished the phase.
    static void wait() {
#ifdef _OPENMP
#pragma omp barrier
#endif
    }

    const Batch& batch_;
    std::int64_t thread_, threads_;
    bool fro_ = false;
  };

  Batch(Layer<T>* layers, std::int64_t count, int threads) : layers_(layers), count_(count) {
    for (std::int64_t l = 0; l < count; ++l) {
      layers[l].first_chunk = chunks_;
      layers[l].first_element = size_;
      chunks_ += layers[l].chunks;
      size_ += layers[l].at->size();
    }
    threads_ = size_ < kSerial ? 1 : threads;
  }

  std::int64_t chunks() const { return chunks_; }

  // body(share) in each thread.
  template <class Body>
  void run(const Body& body) const {
    each_thread(threads_, [&](int thread, int threads) {
      Share share(*this, thread, threads);
      body(share);
    });
  }

 private:
  Layer<T>* layers_;
  std::int64_t count_, chunks_ = 0, size_ = 0;
  int threads_;
};

// Calls body(batch) for runs of consecutive layers of at most kBatchBytes, or one layer that is larger.
template <class T, class Body>
void each_batch(const SpectralNormLayer* layers, std::int64_t count, int threads, const Body& body) {
  Buffer<Layer<T>> work(count);
  std::int64_t elements = 0;
  for (std::int64_t l = 0; l < count; ++l) elements += layers[l].size();
  const bool streamed = is_streamed(elements * static_cast<std::int64_t>(sizeof(T)));
  for (std::int64_t l = 0; l < count; ++l) ::new (&work[l]) Layer<T>(layers + l, streamed);
  for (std::int64_t begin = 0; begin < count;) {
    std::int64_t bytes = 0, end = begin;
    do bytes += layers[end++].size() * static_cast<std::int64_t>(sizeof(T));
    while (end < count && bytes + layers[end].size() * static_cast<std::int64_t>(sizeof(T)) <= kBatchBytes);
    for (std::int64_t l = begin; l < end; ++l)
      ask_for_huge_pages(layers[l].output, layers[l].size() * static_cast<std::int64_t>(sizeof(T)));
    body(work.data() + begin, end - begin, Batch<T>(work.data() + begin, end - begin, threads));
    begin = end;
  }
}

template <class T>
void forward(const SpectralNormLayer* layers, std::int64_t count, const SpectralNormOptions& options) {
  using A = typename Accumulate<T>::type;
  const bool iterate = options.power_iterations > 0;
  each_batch<T>(layers, count, options.threads, [&](Layer<T>* work, std::int64_t n, const Batch<T>& batch) {
    std::int64_t scratch = 0;
    for (std::int64_t l = 0; l < n; ++l)
      scratch += work[l].at->rows + work[l].at->columns() + work[l].chunks * work[l].partial_length();
    Buffer<A> buffer(scratch);
    A* next = buffer.data();
    for (std::int64_t l = 0; l < n; ++l) {
      work[l].s = next;
      work[l].t = next += work[l].at->rows;
      work[l].partials = next += work[l].at->columns();
      next += work[l].chunks * work[l].partial_length();
    }

    const auto every = [](const Layer<T>&) { return true; };
    const auto by_rows = [](const Layer<T>& layer) { return layer.by_rows(); };
    const auto by_outer = [](const Layer<T>& layer) { return !layer.by_rows(); };
    bool any_by_outer = false;
    for (std::int64_t l = 0; l < n; ++l) any_by_outer |= !work[l].by_rows();

    batch.run([&](auto& share) {
      const auto step = [&](Pass kind, auto&& wanted) {
        share.each_chunk([&](const Layer<T>& layer, std::int64_t chunk, std::int64_t) {
          if (wanted(layer)) layer.pass(kind, chunk);
        });
        share.each_layer([&](const Layer<T>& layer) {
          if (wanted(layer)) layer.finish(kind, options.eps, iterate);
        });
      };
      share.each_layer([](const Layer<T>& layer) { layer.read_state(); });
      if (!iterate) step(Pass::rows, every);
      for (std::int64_t i = 0; i < options.power_iterations; ++i) {
        if (options.v_first) {
          step(Pass::columns, every);
          step(Pass::rows, every);
        } else {
          step(Pass::both, by_rows);
          if (any_by_outer) {
            step(Pass::rows, by_outer);
            step(Pass::columns, by_outer);
          }
        }
      }
      share.each_chunk([&](const Layer<T>& layer, std::int64_t chunk, std::int64_t) {
        if (iterate && chunk == 0) layer.write_state();
        layer.scale(chunk);
      });
    });
  });
}

template <class T>
void backward(const SpectralNormLayer* layers, std::int64_t count, int threads) {
  each_batch<T>(layers, count, threads, [&](Layer<T>*, std::int64_t, const Batch<T>& batch) {
    Buffer<double> products(batch.chunks());
    batch.run([&](auto& share) {
      share.each_chunk(
          [&](const Layer<T>& layer, std::int64_t chunk, std::int64_t i) { products[i] = layer.inner_product(chunk); });
      share.each_chunk([&](const Layer<T>& layer, std::int64_t chunk, std::int64_t) {
        double product = 0;
        for (std::int64_t c = 0; c < layer.chunks; ++c) product += products[layer.first_chunk + c];
        layer.grad_weight(chunk, product);
      });
    });
  });
}

}  // namespace

void spectral_norm_forward(Dtype dtype, const SpectralNormLayer* layers, std::int64_t count,
                           const SpectralNormOptions& options) {
  with_dtype(dtype, [&](auto type) { forward<decltype(type)>(layers, count, options); });
}

void spectral_norm_backward(Dtype dtype, const SpectralNormLayer* layers, std::int64_t count, int threads) {
  with_dtype(dtype, [&](auto type) { backward<decltype(type)>(layers, count, threads); });
}

}  // namespace FASTGAN_ISA
}  // namespace fastgan
