#include "cpu/upfirdn2d.h"

#include "bindings/bindings.h"
#include "cpu/filtered_lrelu.h"

namespace fastgan {
namespace {

// planes, inner, height, width, height and width of the result; then (y, x) of up, down, start and the numbers of taps.
using UpfirdnSizes = std::array<std::int64_t, 14>;

UpfirdnShape upfirdn_shape(const UpfirdnSizes& s, bool separable, const std::vector<double>& taps) {
  const std::int64_t count = separable ? s[12] + s[13] : s[12] * s[13];
  if (static_cast<std::int64_t>(taps.size()) != count) throw std::invalid_argument("the taps do not fit their number");
  return {s[0], s[1], s[2], s[3], s[4], s[5], {s[6], s[7]}, {s[8], s[9]}, {s[10], s[11]}, {s[12], s[13]}, separable};
}

void upfirdn2d(const std::string& dtype, std::int64_t x, std::int64_t y, const UpfirdnSizes& sizes, bool separable,
               const std::vector<double>& taps, int threads, const std::string& isa) {
  const UpfirdnShape shape = upfirdn_shape(sizes, separable, taps);
  FASTGAN_DISPATCH(isa_of(isa), upfirdn2d(dtype_of(dtype), pointer(x), pointer(y), shape, taps.data(), threads))
}

void filtered_lrelu(const std::string& dtype, std::int64_t x, std::int64_t bias, std::int64_t channels, std::int64_t y,
                    std::int64_t signs, std::int64_t inside, bool read, const UpfirdnSizes& sizes, bool separable,
                    const std::vector<double>& taps, const UpfirdnSizes& second_sizes, bool second_separable,
                    const std::vector<double>& second_taps, double slope, double gain, double clamp, int threads,
                    const std::string& isa) {
  const UpfirdnShape first = upfirdn_shape(sizes, separable, taps);
  const UpfirdnShape second = upfirdn_shape(second_sizes, second_separable, second_taps);
  const LreluMasks masks{static_cast<std::uint8_t*>(pointer(signs)), static_cast<std::uint8_t*>(pointer(inside)), read};
  const LreluOptions options{slope, gain, clamp};
  FASTGAN_DISPATCH(isa_of(isa), filtered_lrelu(dtype_of(dtype), pointer(x), {pointer(bias), channels}, pointer(y),
                                               masks, options, first, taps.data(), second, second_taps.data(), threads))
}

}  // namespace

void bind_upfirdn2d(py::module_& m) {
  m.def("upfirdn2d", &upfirdn2d, py::call_guard<py::gil_scoped_release>(), py::arg("dtype"), py::arg("from"),
        py::arg("to"), py::arg("sizes"), py::arg("separable"), py::arg("taps"), py::arg("threads"),
        py::arg("isa") = "best");
  m.def("filtered_lrelu", &filtered_lrelu, py::call_guard<py::gil_scoped_release>(), py::arg("dtype"), py::arg("from"),
        py::arg("bias"), py::arg("channels"), py::arg("to"), py::arg("signs"), py::arg("inside"), py::arg("read"),
        py::arg("sizes"), py::arg("separable"), py::arg("taps"), py::arg("second_sizes"), py::arg("second_separable"),
        py::arg("second_taps"), py::arg("slope"), py::arg("gain"), py::arg("clamp"), py::arg("threads"),
        py::arg("isa") = "best");
}

}  // namespace fastgan
