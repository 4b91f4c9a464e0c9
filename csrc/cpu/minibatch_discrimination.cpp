// Minibatch discrimination: o_ib = sum_j e_ijb, e_ijb = exp(-sum_c |m_ibc - m_jbc|), with first and second
// derivatives.
//
// For one b, with s_ijc = sign(m_ic - m_jc) and h the gradient of o:
//     dm_ic = -sum_j e_ij (h_i + h_j) s_ijc
// because e_ij = e_ji is part of o_i and of o_j.  The double backward differentiates L = sum_ic w_ic dm_ic.  Exchanging
// i and j,
//     L = -1/2 sum_ij e_ij (h_i + h_j) a_ij,      a_ij = sum_c s_ijc (w_ic - w_jc)
// e and a are symmetric, s is constant almost everywhere and de_ij/dm_ic = -e_ij s_ijc, so that
//     by h_i = -sum_j e_ij a_ij                   by m_ic = sum_j e_ij (h_i + h_j) a_ij s_ijc
// For j = i, s_ij = 0 and a_ij = 0, so only the forward must know whether a sample is compared with itself.
//
// A task has one b and one segment, whose samples it packs.  No whole tensor is copied, in any dtype or order.  A task
// compares kRows samples with a vector of others at a time, and adds the result to both, so it visits each pair once.
// If there are too few b for all threads, or only some rows are requested, a task has some rows and adds only to these,
// which computes each pair twice.  This choice depends only on the shape, and every sum has a fixed order, so any
// number of threads gives the same bits.
//
// Work: per pair and c, forward 3 operations (subtract, magnitude, add), backward 8, double backward 12; per pair about
// 20, mostly in exp, whose error is below 1 ulp (simd.h).  Memory: per thread 2 N C numbers, 3 N C in the double
// backward.
#include "cpu/minibatch_discrimination.h"

#include <vector>

#include "common/dtype.h"
#include "common/workspace.h"
#include "cpu/simd.h"

namespace fastgan {
namespace FASTGAN_ISA {
namespace {

constexpr int kRows = 4;                 // samples compared at once with a vector of others
constexpr std::int64_t kFewKernels = 8;  // with fewer kernels, tasks share rows
constexpr std::int64_t kTaskRows = 128;  // rows per task then, so that packing all others is a small part
constexpr std::int64_t kSerial = std::int64_t{1} << 17;  // fewer pairs times dims run serially

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
std::int64_t larger(std::int64_t a, std::int64_t b) { return a > b ? a : b; }

// Samples on the diagonal, whose pairs are compared without adding to both.
template <class A>
constexpr int kDiagonal = kLanes<A> > kRows ? kLanes<A> : kRows;

// The samples of a segment, and the positions in it whose results are requested.
struct Part {
  const std::int64_t* order;  // null: position i is sample i
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

// A part of a tensor as vectors of samples: `depth` of them per block of kLanes samples.
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
  void read(const T* from, const Part& part, std::int64_t stride) {
    for (std::int64_t place = 0; place < ceil_div(part.size, kDiagonal<A>) * kDiagonal<A>; ++place) {
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

// The computation of one task, from packed operands to packed results.
template <class A>
class Worker {
 public:
  using V = Vec<A>;
  static constexpr int kWidth = kLanes<A>;

  Worker(std::int64_t most, std::int64_t dims, bool gradients, bool tangents)
      : m(blocks_of(most), dims),
        w(tangents ? blocks_of(most) : 0, dims),
        h(gradients ? blocks_of(most) : 0, 1),
        of_sample(blocks_of(most), 1),
        of_dim(gradients ? blocks_of(most) : 0, dims),
        dims_(dims),
        own_m_(dims * kRows),
        own_w_(tangents ? dims * kRows : 0),
        own_sums_(gradients ? dims * kRows : 0) {}

  static std::int64_t blocks_of(std::int64_t size) { return ceil_div(size, kDiagonal<A>) * (kDiagonal<A> / kWidth); }

  // of_sample: o
  void forward(const Part& part, bool exclude_self) {
    of_sample.clear(blocks_of(part.size));
    each_tile(part, [&](std::int64_t i, const auto& tiles) {
      V sums[kRows] = {};
      tiles([&](std::int64_t j, auto both) {
        V e[kRows];
        compare(j, e);
        leave_out(part, i, j, exclude_self, e);
        give<both>(j, e, sums);
      });
      keep(i, sums);
    });
  }

  // of_dim: dm
  void backward(const Part& part) {
    of_dim.clear(blocks_of(part.size));
    each_tile(part, [&](std::int64_t i, const auto& tiles) {
      clear_own_sums();
      tiles([&](std::int64_t j, auto both) {
        V e[kRows];
        compare(j, e);
        leave_out(part, i, j, true, e);
        for (int r = 0; r < kRows; ++r) e[r] *= -(h.at(i + r, 0) + *h.block(j));
        spread<both>(j, e);
      });
      keep_own_sums(i);
    });
  }

  // of_sample: by h; of_dim: by m, if requested
  void double_backward(const Part& part, bool by_m) {
    of_sample.clear(blocks_of(part.size));
    of_dim.clear(blocks_of(part.size));
    each_tile(part, [&](std::int64_t i, const auto& tiles) {
      own(w, i, own_w_.data());
      V sums[kRows] = {};
      clear_own_sums();
      tiles([&](std::int64_t j, auto both) {
        V e[kRows], a[kRows];
        compare_with_tangents(j, e, a);
        leave_out(part, i, j, true, e);
        for (int r = 0; r < kRows; ++r) e[r] *= -a[r];
        give<both>(j, e, sums);
        if (!by_m) return;
        for (int r = 0; r < kRows; ++r) e[r] *= -(h.at(i + r, 0) + *h.block(j));
        spread<both>(j, e);
      });
      keep(i, sums);
      keep_own_sums(i);
    });
  }

  Packed<A> m, w, h, of_sample, of_dim;

 private:
  // body(i, tiles) for kRows samples from i.  tiles(f) calls f(block, whether a pair adds to both samples).
  template <class Body>
  void each_tile(const Part& part, const Body& body) {
    constexpr std::int64_t kAcross = kDiagonal<A> / kWidth;
    const std::int64_t blocks = blocks_of(part.size);
    for (std::int64_t i = part.begin / kRows * kRows; i < part.end; i += kRows) {
      const std::int64_t diagonal = i / kDiagonal<A> * kAcross;
      const std::int64_t begin = part.whole ? diagonal : 0, once = part.whole ? diagonal + kAcross : blocks;
      own(m, i, own_m_.data());
      body(i, [&](const auto& f) {
        for (std::int64_t j = begin; j < once; ++j) f(j, std::false_type{});
        for (std::int64_t j = once; j < blocks; ++j) f(j, std::true_type{});
      });
    }
  }

  // Copies the numbers of the samples from i next to each other, so that they can be broadcast.
  void own(Packed<A>& from, std::int64_t i, A* to) const {
    for (std::int64_t c = 0; c < dims_; ++c)
      for (int r = 0; r < kRows; ++r) to[c * kRows + r] = from.at(i + r, c);
  }

  void compare(std::int64_t j, V* e) {
    const V* other = m.block(j);
    const A* mine = own_m_.data();
    V d0 = {}, d1 = {}, d2 = {}, d3 = {};
    for (std::int64_t c = 0; c < dims_; ++c, mine += kRows) {
      d0 += magnitude<A>(mine[0] - other[c]);
      d1 += magnitude<A>(mine[1] - other[c]);
      d2 += magnitude<A>(mine[2] - other[c]);
      d3 += magnitude<A>(mine[3] - other[c]);
    }
    e[0] = exp_of_minus<A>(d0), e[1] = exp_of_minus<A>(d1), e[2] = exp_of_minus<A>(d2), e[3] = exp_of_minus<A>(d3);
  }

  void compare_with_tangents(std::int64_t j, V* e, V* a) {
    const V *other = m.block(j), *other_w = w.block(j);
    const A *mine = own_m_.data(), *mine_w = own_w_.data();
    V d[kRows] = {}, t[kRows] = {};
    for (std::int64_t c = 0; c < dims_; ++c, mine += kRows, mine_w += kRows)
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const V apart = mine[r] - other[c];
        d[r] += magnitude<A>(apart);
        t[r] += with_sign_of<A>(apart, mine_w[r] - other_w[c]);
      }
    for (int r = 0; r < kRows; ++r) {
      e[r] = exp_of_minus<A>(d[r]);
      a[r] = t[r];
    }
  }

  // Sets entries beyond the samples to 0 and, if oneself is set, a sample's entry for itself.
  static void leave_out(const Part& part, std::int64_t i, std::int64_t j, bool oneself, V* e) {
    const std::int64_t from = j * kWidth;
    const bool diagonal = oneself && from < i + kRows && i < from + kWidth;
    if (!diagonal && i + kRows <= part.size && from + kWidth <= part.size) return;
    for (int r = 0; r < kRows; ++r)
      for (int lane = 0; lane < kWidth; ++lane)
        if (larger(i + r, from + lane) >= part.size || (oneself && i + r == from + lane)) e[r][lane] = 0;
  }

  // Adds e_r to the sums of the samples and to the sum of the other sample.
  template <bool kBoth>
  void give(std::int64_t j, const V* e, V* sums) {
    for (int r = 0; r < kRows; ++r) sums[r] += e[r];
    if (kBoth) *of_sample.block(j) += (e[0] + e[1]) + (e[2] + e[3]);
  }
  void keep(std::int64_t i, const V* sums) {
    for (int r = 0; r < kRows; ++r) of_sample.add(i + r, 0, lane_sum<A>(sums[r]));
  }

  // Adds q_r sign(m_i - m_j) to the dims of the samples, and subtracts it from those of the other sample.
  template <bool kBoth>
  void spread(std::int64_t j, const V* q) {
    const V* other = m.block(j);
    const A* mine = own_m_.data();
    V *of_other = of_dim.block(j), *of_own = own_sums_.data();
    const V q0 = q[0], q1 = q[1], q2 = q[2], q3 = q[3];
    for (std::int64_t c = 0; c < dims_; ++c, mine += kRows, of_own += kRows) {
      const V g0 = with_sign_of<A>(mine[0] - other[c], q0), g1 = with_sign_of<A>(mine[1] - other[c], q1);
      const V g2 = with_sign_of<A>(mine[2] - other[c], q2), g3 = with_sign_of<A>(mine[3] - other[c], q3);
      of_own[0] += g0, of_own[1] += g1, of_own[2] += g2, of_own[3] += g3;
      if (kBoth) of_other[c] -= (g0 + g1) + (g2 + g3);
    }
  }

  void clear_own_sums() {
    for (std::int64_t k = 0; k < dims_ * kRows; ++k) own_sums_[k] = V{};
  }
  void keep_own_sums(std::int64_t i) {
    for (std::int64_t c = 0; c < dims_; ++c)
      for (int r = 0; r < kRows; ++r) of_dim.add(i + r, c, lane_sum<A>(own_sums_[c * kRows + r]));
  }

  std::int64_t dims_;
  Buffer<A> own_m_, own_w_;
  Buffer<V> own_sums_;
};

// body(worker, part, b) for every task, with one worker per thread.
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

template <class T>
void ask_for_huge_pages(T* tensor, std::int64_t size) {
  if (tensor != nullptr)
    FASTGAN_ISA::ask_for_huge_pages(static_cast<void*>(tensor), size * static_cast<std::int64_t>(sizeof(T)));
}

}  // namespace

void minibatch_discrimination_forward(Dtype dtype, const DiscriminationForward& t, const DiscriminationShape& s,
                                      bool exclude_self, int threads) {
  with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    using A = typename Accumulate<T>::type;
    const auto* m = static_cast<const T*>(t.m);
    auto* o = static_cast<T*>(t.o);
    run<A>(s, false, false, threads, [&](Worker<A>& worker, const Part& part, std::int64_t b) {
      worker.m.read(m + b * s.dims, part, s.kernels * s.dims);
      worker.forward(part, exclude_self);
      worker.of_sample.write(o + b, part, s.first, s.kernels);
    });
  });
}

void minibatch_discrimination_backward(Dtype dtype, const DiscriminationBackward& t, const DiscriminationShape& s,
                                       int threads) {
  with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    using A = typename Accumulate<T>::type;
    const auto *h = static_cast<const T*>(t.h), *m = static_cast<const T*>(t.m);
    auto* dm = static_cast<T*>(t.dm);
    ask_for_huge_pages(dm, s.rows * s.kernels * s.dims);
    run<A>(s, true, false, threads, [&](Worker<A>& worker, const Part& part, std::int64_t b) {
      worker.m.read(m + b * s.dims, part, s.kernels * s.dims);
      worker.h.read(h + b, part, s.kernels);
      worker.backward(part);
      worker.of_dim.write(dm + b * s.dims, part, s.first, s.kernels * s.dims);
    });
  });
}

void minibatch_discrimination_double_backward(Dtype dtype, const DiscriminationDoubleBackward& t,
                                              const DiscriminationShape& s, int threads) {
  with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    using A = typename Accumulate<T>::type;
    const auto *w = static_cast<const T*>(t.w), *h = static_cast<const T*>(t.h), *m = static_cast<const T*>(t.m);
    auto *by_h = static_cast<T*>(t.by_h), *by_m = static_cast<T*>(t.by_m);
    ask_for_huge_pages(by_m, s.rows * s.kernels * s.dims);
    run<A>(s, true, true, threads, [&](Worker<A>& worker, const Part& part, std::int64_t b) {
      worker.m.read(m + b * s.dims, part, s.kernels * s.dims);
      worker.w.read(w + b * s.dims, part, s.kernels * s.dims);
      worker.h.read(h + b, part, s.kernels);
      worker.double_backward(part, by_m != nullptr);
      if (by_h != nullptr) worker.of_sample.write(by_h + b, part, s.first, s.kernels);
      if (by_m != nullptr) worker.of_dim.write(by_m + b * s.dims, part, s.first, s.kernels * s.dims);
    });
  });
}

}  // namespace FASTGAN_ISA
}  // namespace fastgan
