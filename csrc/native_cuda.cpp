// fastgan._native_cuda: the CUDA kernels, as functions of addresses, sizes and streams.  Knows nothing of torch:
// callers check shapes, keep the memory alive and pass contiguous data on one device.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/spectral_norm.h"

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

void spectral_norm_forward(const std::string& dtype, const std::vector<LayerRow>& rows, std::int64_t power_iterations,
                           double eps, bool v_first, std::int64_t stream) {
  const auto layers = layers_of(rows);
  const fastgan::SpectralNormOptions options{power_iterations, eps, v_first, 0};
  fastgan::cuda::spectral_norm_forward(dtype_of(dtype), layers.data(), static_cast<std::int64_t>(layers.size()),
                                       options, pointer(stream));
}

void spectral_norm_backward(const std::string& dtype, const std::vector<LayerRow>& rows, std::int64_t stream) {
  const auto layers = layers_of(rows);
  fastgan::cuda::spectral_norm_backward(dtype_of(dtype), layers.data(), static_cast<std::int64_t>(layers.size()),
                                        pointer(stream));
}

}  // namespace

PYBIND11_MODULE(_native_cuda, m) {
  m.def("spectral_norm_forward", &spectral_norm_forward, py::call_guard<py::gil_scoped_release>(), py::arg("dtype"),
        py::arg("layers"), py::arg("power_iterations"), py::arg("eps"), py::arg("v_first"), py::arg("stream"));
  m.def("spectral_norm_backward", &spectral_norm_backward, py::call_guard<py::gil_scoped_release>(), py::arg("dtype"),
        py::arg("layers"), py::arg("stream"));
}
