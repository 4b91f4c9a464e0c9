// What attention's derivatives compute between two matrix products, on a block of scores (see ops/attention/blocks.py).
// With S the scores less the log-sum-exp of their row:
//
//     P = exp(S)    dS = P (dP - delta)
//     tau = rowsum(P T)    M = (dP - delta) (T - tau) + R    mu = rowsum(P M)    dS2 = P (M - mu)
//
// T and R may be absent, which means zeros.  A row is read three times, from the L1 cache as a rule.  Work: one
// exponential an element.  Bytes: each operand once, each result once.
#include "cpu/attention.h"

#include "common/workspace.h"
#include "cpu/simd.h"

namespace fastgan {
namespace FASTGAN_ISA {
namespace {

constexpr std::int64_t kSerial = 1 << 13;  // fewer elements run serially: waking threads would cost more than it saves

// Elements [at, at + size) of a row, or zeros if it is absent or ended.
template <class A>
Vec<A> load_part(const A* row, std::int64_t at, std::int64_t size) {
  if (row == nullptr) return Vec<A>{};
  if (size >= kLanes<A>) return load_vector(row + at);
  Vec<A> x = {};
  std::memcpy(&x, row + at, static_cast<std::size_t>(size) * sizeof(A));
  return x;
}

template <class A>
void store_part(A* row, std::int64_t at, std::int64_t size, Vec<A> x) {
  std::memcpy(row + at, &x, size >= kLanes<A> ? sizeof x : static_cast<std::size_t>(size) * sizeof(A));
}

// body(first element, elements that are left) for each vector of a row
template <class A, class Body>
void each_vector(std::int64_t columns, const Body& body) {
  std::int64_t i = 0;
  for (; i + kLanes<A> <= columns; i += kLanes<A>) body(i, std::int64_t{kLanes<A>});
  if (i < columns) body(i, columns - i);
}

template <class A>
void run_row(A* p, A* apart, A* tangent, A* values, A* moved, std::int64_t columns) {
  Vec<A> dots = {};
  each_vector<A>(columns, [&](std::int64_t i, std::int64_t left) {
    const Vec<A> at = exp_of_minus<A>(-load_part(p, i, left));
    store_part(p, i, left, at);
    if (tangent != nullptr)
      dots += at * load_part(tangent, i, left);
    else if (values == nullptr)
      store_part(apart, i, left, at * load_part(apart, i, left));
  });
  if (tangent == nullptr && values == nullptr) return;
  const A tau = lane_sum<A>(dots);
  A* const result = tangent != nullptr ? tangent : values;
  Vec<A> sums = {};
  each_vector<A>(columns, [&](std::int64_t i, std::int64_t left) {
    const Vec<A> at = load_part(p, i, left), a = load_part(apart, i, left), r = load_part(values, i, left);
    Vec<A> m = r;
    if (tangent != nullptr) {
      const Vec<A> t = load_part(tangent, i, left) - tau;
      m += a * t;
      if (moved != nullptr) store_part(moved, i, left, at * t);
    }
    sums += at * m;
    store_part(apart, i, left, at * a);
    store_part(result, i, left, m);
  });
  const A mu = lane_sum<A>(sums);
  each_vector<A>(columns, [&](std::int64_t i, std::int64_t left) {
    store_part(result, i, left, load_part(p, i, left) * (load_part(result, i, left) - mu));
  });
}

template <class A>
void run(const AttentionBlock& b, int threads) {
  const auto row_of = [&](void* block, std::int64_t row) {
    return block == nullptr ? nullptr : static_cast<A*>(block) + row * b.columns;
  };
  parallel_for(b.rows, b.rows * b.columns < kSerial ? 1 : threads, [&](std::int64_t row) {
    run_row(row_of(b.scores, row), row_of(b.apart, row), row_of(b.tangent, row), row_of(b.values, row),
            row_of(b.moved, row), b.columns);
  });
}

}  // namespace

void attention_block(Dtype dtype, const AttentionBlock& block, int threads) {
  dtype == Dtype::f64 ? run<double>(block, threads) : run<float>(block, threads);
}

}  // namespace FASTGAN_ISA
}  // namespace fastgan
