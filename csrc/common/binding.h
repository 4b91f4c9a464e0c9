// Conversions from Python's arguments to the kernels' types.  Only the two modules' own files include this.
#pragma once

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/dtype_tag.h"
#include "common/spectral_norm.h"

namespace fastgan {

inline void* pointer(std::int64_t address) { return reinterpret_cast<void*>(address); }

inline Dtype dtype_of(const std::string& name) {
  if (name == "float32") return Dtype::f32;
  if (name == "float64") return Dtype::f64;
  if (name == "float16") return Dtype::f16;
  if (name == "bfloat16") return Dtype::bf16;
  throw std::invalid_argument("unknown dtype " + name);
}

// (weight, output, u, v, saved, grad, outer, rows, inner)
using LayerRow = std::array<std::int64_t, 9>;

inline std::vector<SpectralNormLayer> layers_of(const std::vector<LayerRow>& rows) {
  std::vector<SpectralNormLayer> layers;
  layers.reserve(rows.size());
  for (const LayerRow& r : rows)
    layers.push_back(
        {pointer(r[0]), pointer(r[1]), pointer(r[2]), pointer(r[3]), pointer(r[4]), pointer(r[5]), r[6], r[7], r[8]});
  return layers;
}

}  // namespace fastgan
