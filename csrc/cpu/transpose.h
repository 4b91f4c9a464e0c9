#pragma once

#include <cstdint>

#include "common/isa.h"

namespace fastgan {

// (batch, rows, columns) -> (batch, columns, rows), both contiguous.
#define FASTGAN_DECLARE(isa)                                                                                \
  namespace isa {                                                                                           \
  void transpose(const float* from, float* to, std::int64_t batch, std::int64_t rows, std::int64_t columns, \
                 int threads);                                                                              \
  }
FASTGAN_DECLARE(baseline)
FASTGAN_DECLARE(avx2)
FASTGAN_DECLARE(avx512)
#undef FASTGAN_DECLARE

}  // namespace fastgan
