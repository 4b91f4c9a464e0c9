#pragma once

#include <cstdint>

#include "common/dtype_tag.h"

namespace fastgan {

// Windows that tile a contiguous tensor: planes of (depth, height, width) pooled elements, (kd, kh, kw) inputs each.
struct PoolShape {
  std::int64_t planes, depth, height, width, kd, kh, kw;

  std::int64_t pooled_rows() const { return planes * depth * height; }
  std::int64_t window() const { return kd * kh * kw; }
  std::int64_t size() const { return pooled_rows() * width * window(); }
};

// avg_pool: y = sum of each window of x / divisor.  avg_pool_transpose: the transpose, from y to x.
#define FASTGAN_DECLARE(isa)                                                                             \
  namespace isa {                                                                                        \
  void avg_pool(Dtype, const void* x, void* y, const PoolShape&, double divisor, int threads);           \
  void avg_pool_transpose(Dtype, const void* y, void* x, const PoolShape&, double divisor, int threads); \
  }
FASTGAN_DECLARE(baseline)
FASTGAN_DECLARE(avx2)
FASTGAN_DECLARE(avx512)
#undef FASTGAN_DECLARE

}  // namespace fastgan
