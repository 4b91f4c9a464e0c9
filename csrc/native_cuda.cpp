// fastgan._native_cuda: the CUDA kernels, as functions of addresses, sizes and streams.  Knows nothing of torch:
// callers check shapes, keep the memory alive and pass contiguous data on one device.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "common/binding.h"
#include "cuda/spectral_norm.h"

namespace py = pybind11;

namespace {

using fastgan::LayerRow;

void spectral_norm_forward(const std::string& dtype, const std::vector<LayerRow>& rows, std::int64_t power_iterations,
                           double eps, bool v_first, std::int64_t stream) {
  const auto layers = fastgan::layers_of(rows);
  const fastgan::SpectralNormOptions options{power_iterations, eps, v_first, 0};
  fastgan::cuda::spectral_norm_forward(fastgan::dtype_of(dtype), layers.data(),
                                       static_cast<std::int64_t>(layers.size()), options, fastgan::pointer(stream));
}

void spectral_norm_backward(const std::string& dtype, const std::vector<LayerRow>& rows, std::int64_t stream) {
  const auto layers = fastgan::layers_of(rows);
  fastgan::cuda::spectral_norm_backward(fastgan::dtype_of(dtype), layers.data(),
                                        static_cast<std::int64_t>(layers.size()), fastgan::pointer(stream));
}

}  // namespace

PYBIND11_MODULE(_native_cuda, m) {
  m.def("spectral_norm_forward", &spectral_norm_forward, py::call_guard<py::gil_scoped_release>(), py::arg("dtype"),
        py::arg("layers"), py::arg("power_iterations"), py::arg("eps"), py::arg("v_first"), py::arg("stream"));
  m.def("spectral_norm_backward", &spectral_norm_backward, py::call_guard<py::gil_scoped_release>(), py::arg("dtype"),
        py::arg("layers"), py::arg("stream"));
}
