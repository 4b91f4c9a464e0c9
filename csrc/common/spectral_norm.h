// What both native modules are told of a weight.
#pragma once

#include <cstdint>

#include "common/dtype_tag.h"

namespace fastgan {

// One weight, contiguous, seen as (outer, rows, inner): matrix row r, column outer_index * inner + inner_index.
// `saved` holds sigma, then u (rows), then v (outer * inner), in the accumulation type.
struct SpectralNormLayer {
  const void* weight;
  void* output;  // weight / sigma going forward, the weight's gradient going backward
  void* u;
  void* v;
  void* saved;
  const void* grad;  // of output; backward only
  std::int64_t outer, rows, inner;

  std::int64_t columns() const { return outer * inner; }
  std::int64_t size() const { return outer * rows * inner; }
};

// Which vector a power iteration renews first: v-first is the old torch hook, u-first the parametrization.
struct SpectralNormOptions {
  std::int64_t power_iterations;  // 0: sigma from the stored u and v, which stay as they are
  double eps;
  bool v_first;
  int threads;
};

}  // namespace fastgan
