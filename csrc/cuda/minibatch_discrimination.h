#pragma once

#include <cstdint>

#include "common/spectral_norm.h"

namespace fastgan {
namespace cuda {

// Contiguous tensors of one dtype: m and w (kernels, dims, samples), h (kernels, samples), o and by_h (rows, kernels),
// by_m (rows, kernels, dims).  The results are for `rows` samples from `first`.  Null: no segments, or no such result.
struct Discrimination {
  const std::int64_t* segments;
  const void *w, *h, *m;
  void *o, *by_h, *by_m;  // without w, by_m receives dm
  std::int64_t samples, kernels, dims, first, rows;
  bool exclude_self;  // leave a sample's own term out of o
};

// `stream` is a cudaStream_t.
void minibatch_discrimination_forward(Dtype, const Discrimination&, void* stream);
void minibatch_discrimination_backward(Dtype, const Discrimination&, void* stream);
void minibatch_discrimination_double_backward(Dtype, const Discrimination&, void* stream);

}  // namespace cuda
}  // namespace fastgan
