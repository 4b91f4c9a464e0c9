// fastgan._native: the CPU kernels, as functions of addresses and sizes.  Knows nothing of torch: callers check
// shapes, keep the memory alive and pass contiguous data.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/isa.h"
#include "cpu/spectral_norm.h"

namespace py = pybind11;

namespace {

// (weight, output, u, v, saved, grad, outer, rows, inner)
using LayerRow = std::array<std::int64_t, 9>;

void* pointer(std::int64_t address) { return reinterpret_cast<void*>(address); }

std::vector<fastgan::SpectralNormLayer> layers_of(const std::vector<LayerRow>& rows) {
  std::vector<fastgan::SpectralNormLayer> layers;
  layers.reserve(rows.size());
  for (const LayerRow& r : rows)
    layers.push_back(
        {pointer(r[0]), pointer(r[1]), pointer(r[2]), pointer(r[3]), pointer(r[4]), pointer(r[5]), r[6], r[7], r[8]});
  return layers;
}

fastgan::Dtype dtype_of(const std::string& name) {
  if (name == "float32") return fastgan::Dtype::f32;
  if (name == "float64") return fastgan::Dtype::f64;
  if (name == "float16") return fastgan::Dtype::f16;
  if (name == "bfloat16") return fastgan::Dtype::bf16;
  throw std::invalid_argument("unknown dtype " + name);
}

fastgan::Isa isa_of(const std::string& name) {
  if (name == "best") return fastgan::best_isa();
  if (name == "baseline") return fastgan::Isa::baseline;
#ifdef FASTGAN_HAVE_AVX2
  if (name == "avx2" && fastgan::best_isa() >= fastgan::Isa::avx2) return fastgan::Isa::avx2;
#endif
#ifdef FASTGAN_HAVE_AVX512
  if (name == "avx512" && fastgan::best_isa() >= fastgan::Isa::avx512) return fastgan::Isa::avx512;
#endif
  throw std::invalid_argument("instruction set " + name + " is not in this build or not on this processor");
}

const char* name_of(fastgan::Isa isa) {
  return isa == fastgan::Isa::avx512 ? "avx512" : isa == fastgan::Isa::avx2 ? "avx2" : "baseline";
}

void spectral_norm_forward(const std::string& dtype, const std::vector<LayerRow>& rows, std::int64_t power_iterations,
                           double eps, bool v_first, int threads, const std::string& isa) {
  const auto layers = layers_of(rows);
  const auto count = static_cast<std::int64_t>(layers.size());
  const fastgan::SpectralNormOptions options{power_iterations, eps, v_first, threads};
  FASTGAN_DISPATCH(isa_of(isa), spectral_norm_forward(dtype_of(dtype), layers.data(), count, options))
}

void spectral_norm_backward(const std::string& dtype, const std::vector<LayerRow>& rows, int threads,
                            const std::string& isa) {
  const auto layers = layers_of(rows);
  const auto count = static_cast<std::int64_t>(layers.size());
  FASTGAN_DISPATCH(isa_of(isa), spectral_norm_backward(dtype_of(dtype), layers.data(), count, threads))
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.def("isa", [] { return name_of(fastgan::best_isa()); });
  m.def("spectral_norm_forward", &spectral_norm_forward, py::call_guard<py::gil_scoped_release>(), py::arg("dtype"),
        py::arg("layers"), py::arg("power_iterations"), py::arg("eps"), py::arg("v_first"), py::arg("threads"),
        py::arg("isa") = "best");
  m.def("spectral_norm_backward", &spectral_norm_backward, py::call_guard<py::gil_scoped_release>(), py::arg("dtype"),
        py::arg("layers"), py::arg("threads"), py::arg("isa") = "best");
}
