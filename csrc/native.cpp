// fastgan._native: the CPU kernels, as functions of addresses and sizes.  Knows nothing of torch: callers check
// shapes, keep the memory alive and pass contiguous data.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/binding.h"
#include "common/isa.h"
#include "cpu/norm.h"
#include "cpu/spectral_norm.h"

namespace py = pybind11;

namespace {

using fastgan::dtype_of;
using fastgan::LayerRow;
using fastgan::layers_of;
using fastgan::pointer;

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

// (rows, channels, inner, groups), as NormShape; addresses in the order of the fields of the structs.
using NormSizes = std::array<std::int64_t, 4>;

void norm_forward(const std::string& dtype, const std::array<std::int64_t, 6>& a, const NormSizes& s, double eps,
                  int threads, const std::string& isa) {
  const fastgan::NormForward tensors{pointer(a[0]), pointer(a[1]), pointer(a[2]),
                                     pointer(a[3]), pointer(a[4]), pointer(a[5])};
  const fastgan::NormShape shape{s[0], s[1], s[2], s[3]};
  FASTGAN_DISPATCH(isa_of(isa), norm_forward(dtype_of(dtype), tensors, shape, eps, threads))
}

void norm_backward(const std::string& dtype, const std::array<std::int64_t, 8>& a, const NormSizes& s, int threads,
                   const std::string& isa) {
  const fastgan::NormBackward tensors{pointer(a[0]), pointer(a[1]), pointer(a[2]), pointer(a[3]),
                                      pointer(a[4]), pointer(a[5]), pointer(a[6]), pointer(a[7])};
  const fastgan::NormShape shape{s[0], s[1], s[2], s[3]};
  FASTGAN_DISPATCH(isa_of(isa), norm_backward(dtype_of(dtype), tensors, shape, threads))
}

void norm_double_backward(const std::string& dtype, const std::array<std::int64_t, 11>& a, const NormSizes& s,
                          int threads, const std::string& isa) {
  const fastgan::NormDoubleBackward tensors{pointer(a[0]), pointer(a[1]), pointer(a[2]), pointer(a[3]),
                                            pointer(a[4]), pointer(a[5]), pointer(a[6]), pointer(a[7]),
                                            pointer(a[8]), pointer(a[9]), pointer(a[10])};
  const fastgan::NormShape shape{s[0], s[1], s[2], s[3]};
  FASTGAN_DISPATCH(isa_of(isa), norm_double_backward(dtype_of(dtype), tensors, shape, threads))
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.def("isa", [] { return name_of(fastgan::best_isa()); });
  m.def("spectral_norm_forward", &spectral_norm_forward, py::call_guard<py::gil_scoped_release>(), py::arg("dtype"),
        py::arg("layers"), py::arg("power_iterations"), py::arg("eps"), py::arg("v_first"), py::arg("threads"),
        py::arg("isa") = "best");
  m.def("spectral_norm_backward", &spectral_norm_backward, py::call_guard<py::gil_scoped_release>(), py::arg("dtype"),
        py::arg("layers"), py::arg("threads"), py::arg("isa") = "best");
  m.def("norm_forward", &norm_forward, py::call_guard<py::gil_scoped_release>(), py::arg("dtype"), py::arg("tensors"),
        py::arg("shape"), py::arg("eps"), py::arg("threads"), py::arg("isa") = "best");
  m.def("norm_backward", &norm_backward, py::call_guard<py::gil_scoped_release>(), py::arg("dtype"), py::arg("tensors"),
        py::arg("shape"), py::arg("threads"), py::arg("isa") = "best");
  m.def("norm_double_backward", &norm_double_backward, py::call_guard<py::gil_scoped_release>(), py::arg("dtype"),
        py::arg("tensors"), py::arg("shape"), py::arg("threads"), py::arg("isa") = "best");
}
