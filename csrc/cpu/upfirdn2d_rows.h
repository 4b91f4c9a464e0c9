// A row of upfirdn2d's result, from rows of its input.  upfirdn2d.cpp says how.
#pragma once

#include <algorithm>
#include <numeric>
#include <vector>

#include "common/dtype.h"
#include "common/workspace.h"
#include "cpu/upfirdn2d.h"

namespace fastgan {
namespace FASTGAN_ISA {
namespace {

using Index = std::int64_t;

Index floor_div(Index a, Index b) { return a / b - (a % b != 0 && (a < 0) != (b < 0)); }
Index modulo(Index a, Index b) { return a - floor_div(a, b) * b; }

template <int N, bool kAdd, class S, class A>
void add_up(const S* const* from, const A* weights, A* __restrict out, Index size) {
  const S* s[N];
  A w[N];
  for (int n = 0; n < N; ++n) s[n] = from[n], w[n] = weights[n];
#pragma omp simd
  for (Index i = 0; i < size; ++i) {
    A sum = kAdd ? out[i] : A{0};
    for (int n = 0; n < N; ++n) sum += w[n] * load(s[n][i]);
    out[i] = sum;
  }
}

// out = (add ? out : 0) + sum of weights[n] * from[n], four at a time.
template <class S, class A>
void weighted_sum(const S* const* from, const A* weights, Index count, A* out, Index size, bool add) {
  if (count == 0 && !add) std::fill(out, out + size, A{0});
  while (count > 0) {
    switch (std::min<Index>(count, 4)) {
      case 1:
        add ? add_up<1, true>(from, weights, out, size) : add_up<1, false>(from, weights, out, size);
        break;
      case 2:
        add ? add_up<2, true>(from, weights, out, size) : add_up<2, false>(from, weights, out, size);
        break;
      case 3:
        add ? add_up<3, true>(from, weights, out, size) : add_up<3, false>(from, weights, out, size);
        break;
      default:
        add ? add_up<4, true>(from, weights, out, size) : add_up<4, false>(from, weights, out, size);
    }
    from += 4, weights += 4, count -= 4, add = true;
  }
}

// Where the horizontal taps read: the same in every row.
struct Columns {
  struct Tap {
    Index k, part, shift;
  };
  Index up, down, first, length;       // U, D; index of each part's first element, and the number of its elements
  std::vector<std::vector<Tap>> taps;  // of each r
  std::vector<Index> counts;           // outputs of each r

  explicit Columns(const UpfirdnShape& s) {
    const Index u = s.up[1], d = s.down[1], common = std::gcd(u, d);
    up = u / common, down = d / common, first = 0;
    Index last = -1;
    bool any = false;
    for (Index r = 0; r < up; ++r) {
      counts.push_back(std::max<Index>(0, (s.out_width - r + up - 1) / up));
      taps.emplace_back();
      for (Index k = 0; k < s.taps[1] && counts[r] > 0; ++k) {
        const Index position = r * d + k - s.start[1];
        if (modulo(position, u) != 0) continue;
        const Index c = floor_div(position, u), q = modulo(c, down), a = floor_div(c, down);
        taps[r].push_back({k, q, a});
        first = any ? std::min(first, a) : a;
        last = any ? std::max(last, a + counts[r] - 1) : a + counts[r] - 1;
        any = true;
      }
    }
    length = last - first + 1;
  }
};

// S: type of the input's elements.  T: of the result's.
template <class S, class T>
class Rows {
  using A = typename Accumulate<S>::type;

 public:
  Rows(const S* x, const UpfirdnShape& s, const Columns& columns, const std::vector<A>& taps)
      : x_(x),
        s_(s),
        c_(columns),
        taps_(taps),
        row_(s.width * s.inner),
        parts_(c_.down * c_.length * s.inner),
        sums_(c_.up * c_.counts[0] * s.inner) {
    std::fill(parts_.data(), parts_.data() + c_.down * c_.length * s.inner, A{0});
  }

  // Row o of the result's plane.  The bias is added to each element of the input, not to the zeros around and between.
  void run(Index plane, Index o, T* to, A bias = A{0}) {
    bias_ = bias;
    sources_.clear(), weights_.clear(), lines_.clear();
    for (Index k = 0; k < s_.taps[0]; ++k) {
      const Index position = o * s_.down[0] + k - s_.start[0];
      if (modulo(position, s_.up[0]) != 0) continue;
      const Index i = floor_div(position, s_.up[0]);
      if (i < 0 || i >= s_.height) continue;
      sources_.push_back(x_ + (plane * s_.height + i) * s_.width * s_.inner);
      weights_.push_back(s_.separable ? taps_[k] : A{1});
      lines_.push_back(k);
    }
    const Index lines = static_cast<Index>(sources_.size());
    if (s_.separable) {
      split(0, lines);
      filter(taps_.data() + s_.taps[0], false);
    } else {
      if (lines == 0) std::fill(sums_.data(), sums_.data() + c_.up * c_.counts[0] * s_.inner, A{0});
      for (Index n = 0; n < lines; ++n) {
        split(n, 1);
        filter(taps_.data() + lines_[n] * s_.taps[1], n > 0);
      }
    }
    write(to);
  }

 private:
  // parts[q][j] = row[j D + q], where the row is the weighted sum of these sources.
  void split(Index source, Index count) {
    const S* const* from = sources_.data() + source;
    const Index last = c_.first + c_.length, inner = s_.inner;
    if (c_.down == 1) {
      const Index begin = std::max<Index>(0, c_.first), end = std::min(s_.width, last);
      if (begin >= end) return;
      moved_.assign(from, from + count);
      for (const S*& pointer : moved_) pointer += begin * inner;
      A* to = parts_.data() + (begin - c_.first) * inner;
      row_of(moved_.data(), source, count, to, (end - begin) * inner);
      return;
    }
    row_of(from, source, count, row_.data(), s_.width * inner);
    const Index d = c_.down;
    for (Index q = 0; q < d; ++q) {
      const Index begin = std::max<Index>(0, c_.first), end = std::min((s_.width - q + d - 1) / d, last);
      A* __restrict to = parts_.data() + (q * c_.length + begin - c_.first) * inner;
      const A* __restrict row = row_.data() + (begin * d + q) * inner;
      if (inner == 1 && d == 2) {
#pragma omp simd
        for (Index j = 0; j < end - begin; ++j) to[j] = row[2 * j];
      } else if (inner == 1) {
        for (Index j = 0; j < end - begin; ++j) to[j] = row[j * d];
      } else {
        for (Index j = 0; j < end - begin; ++j) std::copy_n(row + j * d * inner, inner, to + j * inner);
      }
    }
  }

  // to = the weighted sum of these sources
  void row_of(const S* const* from, Index source, Index count, A* __restrict to, Index size) {
    const A* weights = weights_.data() + source;
    weighted_sum(from, weights, count, to, size, false);
    if (bias_ == A{0}) return;
    const A bias = bias_ * std::accumulate(weights, weights + count, A{0});
#pragma omp simd
    for (Index i = 0; i < size; ++i) to[i] += bias;
  }

  // sums[r][j] = (add ? sums[r][j] : 0) + sum of taps[k] * parts[q][j + a].
  void filter(const A* taps, bool add) {
    for (Index r = 0; r < c_.up; ++r) {
      parts_of_.clear(), factors_.clear();
      for (const Columns::Tap& tap : c_.taps[r]) {
        parts_of_.push_back(parts_.data() + (tap.part * c_.length + tap.shift - c_.first) * s_.inner);
        factors_.push_back(taps[tap.k]);
      }
      A* to = sums_.data() + r * c_.counts[0] * s_.inner;
      const Index count = static_cast<Index>(factors_.size());
      weighted_sum(parts_of_.data(), factors_.data(), count, to, c_.counts[r] * s_.inner, add);
    }
  }

  void write(T* __restrict to) {
    const A* __restrict sums = sums_.data();
    const Index inner = s_.inner, u = c_.up, step = c_.counts[0] * inner;
    if (u == 1) {
#pragma omp simd
      for (Index j = 0; j < step; ++j) store(to[j], sums[j]);
    } else if (u == 2 && inner == 1) {
#pragma omp simd
      for (Index j = 0; j < c_.counts[1]; ++j) {
        store(to[2 * j], sums[j]);
        store(to[2 * j + 1], sums[step + j]);
      }
      if (c_.counts[1] < c_.counts[0]) store(to[2 * c_.counts[1]], sums[c_.counts[1]]);
    } else {
      for (Index r = 0; r < u; ++r)
        for (Index j = 0; j < c_.counts[r]; ++j)
          for (Index i = 0; i < inner; ++i) store(to[(j * u + r) * inner + i], sums[r * step + j * inner + i]);
    }
  }

  const S* x_;
  const UpfirdnShape& s_;
  const Columns& c_;
  const std::vector<A>& taps_;
  A bias_ = A{0};
  Buffer<A> row_, parts_, sums_;
  std::vector<const S*> sources_, moved_;
  std::vector<A> weights_, factors_;
  std::vector<const A*> parts_of_;
  std::vector<Index> lines_;
};

}  // namespace
}  // namespace FASTGAN_ISA
}  // namespace fastgan
