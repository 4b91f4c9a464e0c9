#pragma once

#include <cstdint>

#include "common/dtype_tag.h"

namespace fastgan {

// Blocks of scores, (rows, columns) and contiguous, and the results that replace them (see attention.cpp).
struct AttentionBlock {
  void* scores;   // in: scores less the log-sum-exp of their row; out: P
  void* apart;    // in: dP - delta; out: dS
  void* tangent;  // in: T; out: dS2, if it is given
  void* values;   // in: R; out: dS2, if T is absent
  void* moved;    // out: P (T - tau).  It may be the memory of R
  std::int64_t rows, columns;
};

#define FASTGAN_DECLARE(isa)                                             \
  namespace isa {                                                        \
  void attention_block(Dtype, const AttentionBlock& block, int threads); \
  }
FASTGAN_DECLARE(baseline)
FASTGAN_DECLARE(avx2)
FASTGAN_DECLARE(avx512)
#undef FASTGAN_DECLARE

}  // namespace fastgan
