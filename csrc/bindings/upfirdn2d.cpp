#include "cpu/upfirdn2d.h"

#include "bindings/bindings.h"

namespace fastgan {
namespace {

// planes, inner, height, width, height and width of the result; then (y, x) of up, down, start and the numbers of taps.
using UpfirdnSizes = std::array<std::int64_t, 14>;

void upfirdn2d(const std::string& dtype, std::int64_t x, std::int64_t y, const UpfirdnSizes& s, bool separable,
               const std::vector<double>& taps, int threads, const std::string& isa) {
  const UpfirdnShape shape{s[0],         s[1],         s[2],           s[3],           s[4],     s[5],
                           {s[6], s[7]}, {s[8], s[9]}, {s[10], s[11]}, {s[12], s[13]}, separable};
  const std::int64_t count = separable ? s[12] + s[13] : s[12] * s[13];
  if (static_cast<std::int64_t>(taps.size()) != count) throw std::invalid_argument("the taps do not fit their number");
  FASTGAN_DISPATCH(isa_of(isa), upfirdn2d(dtype_of(dtype), pointer(x), pointer(y), shape, taps.data(), threads))
}

}  // namespace

void bind_upfirdn2d(py::module_& m) {
  m.def("upfirdn2d", &upfirdn2d, py::call_guard<py::gil_scoped_release>(), py::arg("dtype"), py::arg("from"),
        py::arg("to"), py::arg("sizes"), py::arg("separable"), py::arg("taps"), py::arg("threads"),
        py::arg("isa") = "best");
}

}  // namespace fastgan
