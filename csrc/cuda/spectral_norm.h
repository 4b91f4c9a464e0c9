#pragma once

#include <cstdint>

#include "common/spectral_norm.h"

namespace fastgan {
namespace cuda {

// `stream` is a cudaStream_t.  The threads field of the options is ignored.
void spectral_norm_forward(Dtype, const SpectralNormLayer*, std::int64_t count, const SpectralNormOptions&,
                           void* stream);
void spectral_norm_backward(Dtype, const SpectralNormLayer*, std::int64_t count, void* stream);

}  // namespace cuda
}  // namespace fastgan
