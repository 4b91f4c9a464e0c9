// Minibatch discrimination: o_ib = sum_j e_ijb, e_ijb = exp(-sum_c |m_ibc - m_jbc|), and the first and second
// derivative.
//
// For one b, with s_ijc = sign(m_ic - m_jc) and h the gradient of o:
//     dm_ic = -sum_j e_ij (h_i + h_j) s_ijc
// as e_ij = e_ji is part of o_i and of o_j.  The double backward is of L = sum_ic w_ic dm_ic.  Exchanging i and j,
//     L = -1/2 sum_ij e_ij (h_i + h_j) a_ij,      a_ij = sum_c s_ijc (w_ic - w_jc)
// e and a are symmetric, s is constant almost everywhere and de_ij/dm_ic = -e_ij s_ijc, so that
//     by h_i = -sum_j e_ij a_ij                   by m_ic = sum_j e_ij (h_i + h_j) a_ij s_ijc
// s_ij = 0 and a_ij = 0 for j = i: only the forward asks whether a sample is compared with itself.
//
// A task has one b and one segment, whose samples it packs: no copy of a whole tensor is made, in any dtype or order.
// It compares kRows samples with a register of others at a time, and what it finds of a pair it gives to both: each
// pair is visited once.  Where b are too few to share out, or where only some rows are wanted, a task has some rows
// and gives to these alone, which takes each pair twice.  Which, depends on the shape alone, and every sum has one
// order: the same bits on any number of threads.
//
// Work: of a pair and c, forward 3 operations (subtract, magnitude, add), backward 8, double backward 12; of a pair
// about 20, most of them of exp, whose error is below 1 ulp (simd.h).  Memory: of a thread, 2 N C numbers, 3 N C in the
// double backward.
#include "cpu/minibatch_discrimination.h"

#include <type_traits>
#include <vector>

#include "common/dtype.h"
#include "common/workspace.h"
#include "cpu/simd.h"

namespace fastgan {
namespace FASTGAN_ISA {
namespace {

constexpr int kRows = 4;                                 // samples compared at once with a register of others
constexpr std::int64_t kFewKernels = 8;                  // below which rows are shared out
constexpr std::int64_t kTaskRows = 128;                  // then: a task's, so that packing all others is little
constexpr std::int64_t kSerial = std::int64_t{1} << 17;  // pairs times dims below which waking threads costs more

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
std::int64_t larger(std::int64_t a, std::int64_t b) { return a > b ? a : b; }

// Samples on the diagonal of the pairs that are compared without giving to both.
template <class A>
constexpr int kDiagonal = kLanes<A> > kRows ? kLanes<A> : kRows;

// The samples of a segment, and of which of them, by their place in it, the results are wanted.
struct Part {
  const std::int64_t* order;  // null: place i is sample i
  std::int64_t size, begin, end;
  bool whole;

  std::int64_t sample(std::int64_t place) const { return order == nullptr ? place : order[place]; }
};

std::vector<Part> parts_of(const DiscriminationShape& s) {
  std::vector<Part> parts;
  std::int64_t from = 0;
  for (std::int64_t k = 0; k < s.segments; ++k) {
    const std::int64_t to = s.ends == nullptr ? s.samples : s.ends[k];
    Part part{s.order == nullptr ? nullptr : s.order + from, to - from, 0, to - from, false};
    while (part.begin < part.end && part.sample(part.begin) < s.first) ++part.begin;
    while (part.begin < part.end && part.sample(part.end - 1) >= s.first + s.rows) --part.end;
    part.whole = part.end - part.begin == part.size && s.kernels >= kFewKernels;
    from = to;
    if (part.whole && part.size > 0) parts.push_back(part);
    if (part.whole) continue;
    for (std::int64_t begin = part.begin; begin < part.end; begin += kTaskRows)
      parts.push_back({part.order, part.size, begin, smaller(begin + kTaskRows, part.end), false});
  }
  return parts;
}

// A part of a tensor as registers of samples: `depth` of them a block, of kLanes samples.
template <class A>
class Packed {
 public:
  using V = Vec<A>;
  static constexpr int kWidth = kLanes<A>;

  Packed(std::int64_t blocks, std::int64_t depth) : depth_(depth), values_(blocks * depth) {}

  V* block(std::int64_t b) { return values_.data() + b * depth_; }
  A at(std::int64_t place, std::int64_t c) { return block(place / kWidth)[c][place % kWidth]; }
  void add(std::int64_t place, std::int64_t c, A value) { block(place / kWidth)[c][place % kWidth] += value; }

  void clear(std::int64_t blocks) {
    for (std::int64_t i = 0; i < blocks * depth_; ++i) values_[i] = V{};
  }

  template <class T>
  void read(const T* from, const Part& part, std::int64_t stride, std::int64_t blocks) {
    for (std::int64_t place = 0; place < blocks * kWidth; ++place) {
      V* to = block(place / kWidth);
      const int lane = static_cast<int>(place % kWidth);
      const T* source = place < part.size ? from + part.sample(place) * stride : nullptr;
      for (std::int64_t c = 0; c < depth_; ++c)
        to[c][lane] = source == nullptr ? A{0} : static_cast<A>(load(source[c]));
    }
  }

  template <class T>
  void write(T* to, const Part& part, std::int64_t first, std::int64_t stride) {
    for (std::int64_t place = part.begin; place < part.end; ++place) {
      T* target = to + (part.sample(place) - first) * stride;
      for (std::int64_t c = 0; c < depth_; ++c) store(target[c], at(place, c));
    }
  }

 private:
  std::int64_t depth_;
  Buffer<V> values_;
};

// What one task computes with, for kRows samples from i on against block j; V[kRows] are of these samples.
template <class A>
class Worker {
 public:
  using V = Vec<A>;
  static constexpr int kWidth = kLanes<A>;

  Worker(std::int64_t most, std::int64_t dims, bool gradients, bool tangents)
      : dims_(dims),
        m_(blocks_of(most), dims),
        w_(tangents ? blocks_of(most) : 0, dims),
        h_(gradients ? blocks_of(most) : 0, 1),
        of_sample_(blocks_of(most), 1),
        of_dim_(gradients ? blocks_of(most) : 0, dims),
        row_sums_(gradients ? dims * kRows : 0) {}

  template <class T>
  void forward(const T* m, T* o, const Part& part, const DiscriminationShape& s, bool exclude_self) {
    start(m, part, s);
    of_sample_.clear(blocks_);
    each_tile(part, [&](std::int64_t i, const auto& tiles) {
      V sums[kRows] = {};
      tiles([&](std::int64_t j, auto both) {
        V e[kRows];
        compare(i, j, e);
        leave_out(part, i, j, exclude_self, e);
        for (int r = 0; r < kRows; ++r) sums[r] += e[r];
        if constexpr (both)
          for (int r = 0; r < kRows; ++r) *of_sample_.block(j) += e[r];
      });
      for (int r = 0; r < kRows; ++r) of_sample_.add(i + r, 0, lane_sum<A>(sums[r]));
    });
    of_sample_.write(o, part, s.first, s.kernels);
  }

  template <class T>
  void backward(const T* h, const T* m, T* dm, const Part& part, const DiscriminationShape& s) {
    start(m, part, s);
    h_.read(h, part, s.kernels, blocks_);
    of_dim_.clear(blocks_);
    each_tile(part, [&](std::int64_t i, const auto& tiles) {
      clear_row_sums();
      tiles([&](std::int64_t j, auto both) {
        V e[kRows];
        compare(i, j, e);
        leave_out(part, i, j, true, e);
        for (int r = 0; r < kRows; ++r) e[r] *= -(h_.at(i + r, 0) + *h_.block(j));
        spread<both>(i, j, e);
      });
      keep_row_sums(i);
    });
    of_dim_.write(dm, part, s.first, s.kernels * dims_);
  }

  template <class T>
  void double_backward(const T* w, const T* h, const T* m, T* by_h, T* by_m, const Part& part,
                       const DiscriminationShape& s) {
    start(m, part, s);
    w_.read(w, part, s.kernels * dims_, blocks_);
    h_.read(h, part, s.kernels, blocks_);
    of_sample_.clear(blocks_);
    of_dim_.clear(blocks_);
    each_tile(part, [&](std::int64_t i, const auto& tiles) {
      V sums[kRows] = {};
      clear_row_sums();
      tiles([&](std::int64_t j, auto both) {
        V e[kRows], a[kRows];
        compare_with_tangents(i, j, e, a);
        leave_out(part, i, j, true, e);
        for (int r = 0; r < kRows; ++r) {
          e[r] *= a[r];
          sums[r] -= e[r];
        }
        if constexpr (both)
          for (int r = 0; r < kRows; ++r) *of_sample_.block(j) -= e[r];
        if (by_m == nullptr) return;
        for (int r = 0; r < kRows; ++r) e[r] *= h_.at(i + r, 0) + *h_.block(j);
        spread<both>(i, j, e);
      });
      for (int r = 0; r < kRows; ++r) of_sample_.add(i + r, 0, lane_sum<A>(sums[r]));
      keep_row_sums(i);
    });
    if (by_h != nullptr) of_sample_.write(by_h, part, s.first, s.kernels);
    if (by_m != nullptr) of_dim_.write(by_m, part, s.first, s.kernels * dims_);
  }

 private:
  static std::int64_t blocks_of(std::int64_t size) { return ceil_div(size, kDiagonal<A>) * (kDiagonal<A> / kWidth); }

  template <class T>
  void start(const T* m, const Part& part, const DiscriminationShape& s) {
    blocks_ = blocks_of(part.size);
    m_.read(m, part, s.kernels * dims_, blocks_);
  }

  // body(i, tiles) for the samples from i on, where tiles(f) calls f(block, whether both get what a pair gives).
  template <class Body>
  void each_tile(const Part& part, const Body& body) {
    for (std::int64_t i = part.begin / kRows * kRows; i < part.end; i += kRows)
      body(i, [&](const auto& f) {
        constexpr std::int64_t kAcross = kDiagonal<A> / kWidth;
        const std::int64_t diagonal = i / kDiagonal<A> * kAcross;
        const std::int64_t once = part.whole ? diagonal + kAcross : blocks_;
        for (std::int64_t j = part.whole ? diagonal : 0; j < once; ++j) f(j, std::false_type{});
        for (std::int64_t j = once; j < blocks_; ++j) f(j, std::true_type{});
      });
  }

  void compare(std::int64_t i, std::int64_t j, V* e) {
    const V *own = m_.block(i / kWidth), *other = m_.block(j);
    V d[kRows] = {};
    for (std::int64_t c = 0; c < dims_; ++c)
      for (int r = 0; r < kRows; ++r) d[r] += magnitude<A>(m_.at(i + r, c) - other[c]);
    for (int r = 0; r < kRows; ++r) e[r] = exp_of_minus<A>(d[r]);
  }

  void compare_with_tangents(std::int64_t i, std::int64_t j, V* e, V* a) {
    const V *other = m_.block(j), *other_w = w_.block(j);
    V d[kRows] = {}, t[kRows] = {};
    for (std::int64_t c = 0; c < dims_; ++c)
      for (int r = 0; r < kRows; ++r) {
        const V apart = m_.at(i + r, c) - other[c];
        d[r] += magnitude<A>(apart);
        t[r] += with_sign_of<A>(apart, w_.at(i + r, c) - other_w[c]);
      }
    for (int r = 0; r < kRows; ++r) {
      e[r] = exp_of_minus<A>(d[r]);
      a[r] = t[r];
    }
  }

  // Sets to 0 what is beyond the samples and, if it is to be left out, oneself.
  void leave_out(const Part& part, std::int64_t i, std::int64_t j, bool oneself, V* e) const {
    const std::int64_t from = j * kWidth;
    const bool diagonal = oneself && from < i + kRows && i < from + kWidth;
    if (!diagonal && i + kRows <= part.size && from + kWidth <= part.size) return;
    for (int r = 0; r < kRows; ++r)
      for (int lane = 0; lane < kWidth; ++lane)
        if (larger(i + r, from + lane) >= part.size || (oneself && i + r == from + lane)) e[r][lane] = 0;
  }

  // Adds q_r sign(m_i - m_j) to the dims of each sample, and takes it from those of the other.
  template <bool kBoth>
  void spread(std::int64_t i, std::int64_t j, const V* q) {
    const V* other = m_.block(j);
    V *of_other = of_dim_.block(j), *of_rows = row_sums_.data();
    for (std::int64_t c = 0; c < dims_; ++c) {
      V taken = of_other[c];
      for (int r = 0; r < kRows; ++r) {
        const V given = with_sign_of<A>(m_.at(i + r, c) - other[c], q[r]);
        of_rows[c * kRows + r] += given;
        taken -= given;
      }
      if (kBoth) of_other[c] = taken;
    }
  }

  void clear_row_sums() {
    for (std::int64_t k = 0; k < dims_ * kRows; ++k) row_sums_[k] = V{};
  }
  void keep_row_sums(std::int64_t i) {
    for (std::int64_t c = 0; c < dims_; ++c)
      for (int r = 0; r < kRows; ++r) of_dim_.add(i + r, c, lane_sum<A>(row_sums_[c * kRows + r]));
  }

  std::int64_t dims_, blocks_ = 0;
  Packed<A> m_, w_, h_, of_sample_, of_dim_;
  Buffer<V> row_sums_;
};

// body(worker, part, b) for every task, with a worker a thread.
template <class A, class Body>
void run(const DiscriminationShape& s, bool gradients, bool tangents, int threads, const Body& body) {
  const std::vector<Part> parts = parts_of(s);
  const auto count = static_cast<std::int64_t>(parts.size()), tasks = s.kernels * count;
  std::int64_t most = 0, pairs = 0;
  for (const Part& part : parts) {
    most = larger(most, part.size);
    pairs += part.size * (part.end - part.begin);
  }
  if (pairs * s.kernels * s.dims < kSerial) threads = 1;
  const std::int64_t workers = smaller(threads, tasks);
  parallel_for(workers, threads, [&](std::int64_t w) {
    Worker<A> worker(most, s.dims, gradients, tangents);
    for (std::int64_t task = tasks * w / workers; task < tasks * (w + 1) / workers; ++task)
      body(worker, parts[static_cast<std::size_t>(task % count)], task / count);
  });
}

// f(T*) with the storage type.
template <class F>
void with_type(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::f32:
      return f(static_cast<float*>(nullptr));
    case Dtype::f64:
      return f(static_cast<double*>(nullptr));
    case Dtype::f16:
      return f(static_cast<Half*>(nullptr));
    case Dtype::bf16:
      return f(static_cast<BFloat16*>(nullptr));
  }
}

template <class T>
void ask_for_huge_pages(T* tensor, std::int64_t size) {
  if (tensor != nullptr)
    FASTGAN_ISA::ask_for_huge_pages(static_cast<void*>(tensor), size * static_cast<std::int64_t>(sizeof(T)));
}

}  // namespace

void minibatch_discrimination_forward(Dtype dtype, const DiscriminationForward& t, const DiscriminationShape& s,
                                      bool exclude_self, int threads) {
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = typename Accumulate<T>::type;
    const auto* m = static_cast<const T*>(t.m);
    auto* o = static_cast<T*>(t.o);
    run<A>(s, false, false, threads, [&](Worker<A>& worker, const Part& part, std::int64_t b) {
      worker.forward(m + b * s.dims, o + b, part, s, exclude_self);
    });
  });
}

void minibatch_discrimination_backward(Dtype dtype, const DiscriminationBackward& t, const DiscriminationShape& s,
                                       int threads) {
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = typename Accumulate<T>::type;
    const auto *h = static_cast<const T*>(t.h), *m = static_cast<const T*>(t.m);
    auto* dm = static_cast<T*>(t.dm);
    ask_for_huge_pages(dm, s.rows * s.kernels * s.dims);
    run<A>(s, true, false, threads, [&](Worker<A>& worker, const Part& part, std::int64_t b) {
      worker.backward(h + b, m + b * s.dims, dm + b * s.dims, part, s);
    });
  });
}

void minibatch_discrimination_double_backward(Dtype dtype, const DiscriminationDoubleBackward& t,
                                              const DiscriminationShape& s, int threads) {
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = typename Accumulate<T>::type;
    const auto *w = static_cast<const T*>(t.w), *h = static_cast<const T*>(t.h), *m = static_cast<const T*>(t.m);
    auto *by_h = static_cast<T*>(t.by_h), *by_m = static_cast<T*>(t.by_m);
    ask_for_huge_pages(by_m, s.rows * s.kernels * s.dims);
    run<A>(s, true, true, threads, [&](Worker<A>& worker, const Part& part, std::int64_t b) {
      worker.double_backward(w + b * s.dims, h + b, m + b * s.dims, by_h == nullptr ? by_h : by_h + b,
                             by_m == nullptr ? by_m : by_m + b * s.dims, part, s);
    });
  });
}

}  // namespace FASTGAN_ISA
}  // namespace fastgan
