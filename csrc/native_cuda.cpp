// fastgan._native_cuda: the CUDA kernels as functions of addresses, sizes and streams.  It does not depend on torch:
// callers check shapes, keep the memory alive and pass contiguous data on one device.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <vector>

#include "common/binding.h"
#include "cuda/minibatch_discrimination.h"
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

using fastgan::cuda::Discrimination;

// (samples, kernels, dims, first, rows); then the addresses, beginning with that of the segments.
using DiscriminationSizes = std::array<std::int64_t, 5>;

Discrimination discrimination_of(const DiscriminationSizes& s, std::int64_t segments, std::int64_t m) {
  Discrimination t = {};
  t.segments = static_cast<const std::int64_t*>(fastgan::pointer(segments));
  t.m = fastgan::pointer(m);
  t.samples = s[0], t.kernels = s[1], t.dims = s[2], t.first = s[3], t.rows = s[4];
  return t;
}

void minibatch_discrimination_forward(const std::string& dtype, const std::array<std::int64_t, 3>& a,
                                      const DiscriminationSizes& s, bool exclude_self, std::int64_t stream) {
  Discrimination t = discrimination_of(s, a[0], a[1]);
  t.o = fastgan::pointer(a[2]), t.exclude_self = exclude_self;
  fastgan::cuda::minibatch_discrimination_forward(fastgan::dtype_of(dtype), t, fastgan::pointer(stream));
}

void minibatch_discrimination_backward(const std::string& dtype, const std::array<std::int64_t, 4>& a,
                                       const DiscriminationSizes& s, std::int64_t stream) {
  Discrimination t = discrimination_of(s, a[0], a[2]);
  t.h = fastgan::pointer(a[1]), t.by_m = fastgan::pointer(a[3]);
  fastgan::cuda::minibatch_discrimination_backward(fastgan::dtype_of(dtype), t, fastgan::pointer(stream));
}

void minibatch_discrimination_double_backward(const std::string& dtype, const std::array<std::int64_t, 6>& a,
                                              const DiscriminationSizes& s, std::int64_t stream) {
  Discrimination t = discrimination_of(s, a[0], a[3]);
  t.w = fastgan::pointer(a[1]), t.h = fastgan::pointer(a[2]);
  t.by_h = fastgan::pointer(a[4]), t.by_m = fastgan::pointer(a[5]);
  fastgan::cuda::minibatch_discrimination_double_backward(fastgan::dtype_of(dtype), t, fastgan::pointer(stream));
}

}  // namespace

PYBIND11_MODULE(_native_cuda, m) {
  m.def("minibatch_discrimination_forward", &minibatch_discrimination_forward, py::call_guard<py::gil_scoped_release>(),
        py::arg("dtype"), py::arg("tensors"), py::arg("sizes"), py::arg("exclude_self"), py::arg("stream"));
  m.def("minibatch_discrimination_backward", &minibatch_discrimination_backward,
        py::call_guard<py::gil_scoped_release>(), py::arg("dtype"), py::arg("tensors"), py::arg("sizes"),
        py::arg("stream"));
  m.def("minibatch_discrimination_double_backward", &minibatch_discrimination_double_backward,
        py::call_guard<py::gil_scoped_release>(), py::arg("dtype"), py::arg("tensors"), py::arg("sizes"),
        py::arg("stream"));
  m.def("spectral_norm_forward", &spectral_norm_forward, py::call_guard<py::gil_scoped_release>(), py::arg("dtype"),
        py::arg("layers"), py::arg("power_iterations"), py::arg("eps"), py::arg("v_first"), py::arg("stream"));
  m.def("spectral_norm_backward", &spectral_norm_backward, py::call_guard<py::gil_scoped_release>(), py::arg("dtype"),
        py::arg("layers"), py::arg("stream"));
}
