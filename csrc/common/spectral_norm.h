// The description of a weight that both native modules receive.
#pragma once

#include <cstdint>

#include "common/dtype_tag.h"

namespace fastgan {

// One contiguous weight as (outer, rows, inner): matrix row r, column outer_index * inner + inner_index.
// `saved` holds sigma, then u (rows), then v (outer * inner), in the accumulation type.
struct SpectralNormLayer {
  const void* weight;
  void* output;  // forward: weight / sigma; backward: the weight's gradient
  void* u;
  void* v;
  void* saved;
  const void* grad;  // gradient of output; backward only
  std::int64_t outer, rows, inner;

  std::int64_t columns() const { return outer * inner; }
  std::int64_t size() const { return outer * rows * inner; }
};

// Which vector a power iteration updates first: v-first as in the old torch hook, u-first as in the parametrization.
struct SpectralNormOptions {
  std::int64_t power_iterations;  // 0: compute sigma from the stored u and v, and leave them unchanged
  double eps;
  bool v_first;
  int threads;
};

}  // namespace fastgan
