#include "cpu/spectral_norm.h"

#include "bindings/bindings.h"

namespace fastgan {
namespace {

void spectral_norm_forward(const std::string& dtype, const std::vector<LayerRow>& rows, std::int64_t power_iterations,
                           double eps, bool v_first, int threads, const std::string& isa) {
  const auto layers = layers_of(rows);
  const auto count = static_cast<std::int64_t>(layers.size());
  const SpectralNormOptions options{power_iterations, eps, v_first, threads};
  FASTGAN_DISPATCH(isa_of(isa), spectral_norm_forward(dtype_of(dtype), layers.data(), count, options))
}

void spectral_norm_backward(const std::string& dtype, const std::vector<LayerRow>& rows, int threads,
                            const std::string& isa) {
  const auto layers = layers_of(rows);
  const auto count = static_cast<std::int64_t>(layers.size());
  FASTGAN_DISPATCH(isa_of(isa), spectral_norm_backward(dtype_of(dtype), layers.data(), count, threads))
}

}  // namespace

void bind_spectral_norm(py::module_& m) {
  m.def("spectral_norm_forward", &spectral_norm_forward, py::call_guard<py::gil_scoped_release>(), py::arg("dtype"),
        py::arg("layers"), py::arg("power_iterations"), py::arg("eps"), py::arg("v_first"), py::arg("threads"),
        py::arg("isa") = "best");
  m.def("spectral_norm_backward", &spectral_norm_backward, py::call_guard<py::gil_scoped_release>(), py::arg("dtype"),
        py::arg("layers"), py::arg("threads"), py::arg("isa") = "best");
}

}  // namespace fastgan
