// Upsampling by zeros, an FIR filter, downsampling: y[o] = sum_k f[k] z[o d + k - start], z[u i] = x[i], else z = 0.
//
// Only k with o d + k - start = 0 mod u meet an element of x, so no zero is multiplied.  Per output element a separable
// filter takes K_y W / (u_y W') vertical and K_x / u_x horizontal products; another one K_y K_x / (u_y u_x).  Bytes:
// one read of x and one write of y; x's rows come from the caches where several output rows need them.
//
// A row of y is a weighted sum of rows of x, which is filtered horizontally while it is in the L1 cache.  With
// U = u / gcd(u, d), D = d / gcd(u, d), the outputs o = U j + r of one r read the elements D (j + a) + q for constants
// a and q.  The row is split by q and the results are interleaved by r, so that every sum runs over contiguous
// elements.
#include "cpu/upfirdn2d.h"

#include <algorithm>
#include <vector>

#include "common/dtype.h"
#include "common/workspace.h"
#include "cpu/upfirdn2d_rows.h"

namespace fastgan {
namespace FASTGAN_ISA {
namespace {

constexpr Index kSerial = 1 << 14;  // fewer results run serially: waking threads would cost more than it saves
constexpr Index kTasks = 8;         // for each thread

template <class T>
void run(const T* x, T* y, const UpfirdnShape& s, const double* taps, int threads) {
  using A = typename Accumulate<T>::type;
  const Index count = s.separable ? s.taps[0] + s.taps[1] : s.taps[0] * s.taps[1];
  const std::vector<A> weights(taps, taps + count);
  const Columns columns(s);
  const Index rows = s.planes * s.out_height, size = rows * s.out_width * s.inner;
  ask_for_huge_pages(y, size * static_cast<Index>(sizeof(T)));
  const int used = size < kSerial ? 1 : threads;
  const Index tasks = used == 1 ? 1 : std::min<Index>(rows, kTasks * used);
  parallel_for(tasks, used, [&](Index task) {
    Rows<T, T> part(x, s, columns, weights);
    for (Index row = rows * task / tasks; row < rows * (task + 1) / tasks; ++row)
      part.run(row / s.out_height, row % s.out_height, y + row * s.out_width * s.inner);
  });
}

}  // namespace

void upfirdn2d(Dtype dtype, const void* x, void* y, const UpfirdnShape& shape, const double* taps, int threads) {
  with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    run(static_cast<const T*>(x), static_cast<T*>(y), shape, taps, threads);
  });
}

}  // namespace FASTGAN_ISA
}  // namespace fastgan
