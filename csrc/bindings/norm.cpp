#include "cpu/norm.h"

#include "bindings/bindings.h"

namespace fastgan {
namespace {

// The fields of NormShape in order.  Addresses are in the order of the structs' fields.
using Sizes = std::array<std::int64_t, 6>;

NormShape norm_shape_of(const Sizes& s) { return {s[0], s[1], s[2], s[3], s[4], s[5] != 0}; }

void norm_forward(const std::string& dtype, const std::array<std::int64_t, 7>& a, const Sizes& sizes, double eps,
                  int threads, const std::string& isa) {
  const NormForward tensors{pointer(a[0]), pointer(a[1]), pointer(a[2]), pointer(a[3]),
                            pointer(a[4]), pointer(a[5]), pointer(a[6])};
  FASTGAN_DISPATCH(isa_of(isa), norm_forward(dtype_of(dtype), tensors, norm_shape_of(sizes), eps, threads))
}

void norm_backward(const std::string& dtype, const std::array<std::int64_t, 8>& a, const Sizes& sizes, int threads,
                   const std::string& isa) {
  const NormBackward tensors{pointer(a[0]), pointer(a[1]), pointer(a[2]), pointer(a[3]),
                             pointer(a[4]), pointer(a[5]), pointer(a[6]), pointer(a[7])};
  FASTGAN_DISPATCH(isa_of(isa), norm_backward(dtype_of(dtype), tensors, norm_shape_of(sizes), threads))
}

void norm_double_backward(const std::string& dtype, const std::array<std::int64_t, 11>& a, const Sizes& sizes,
                          int threads, const std::string& isa) {
  const NormDoubleBackward tensors{pointer(a[0]), pointer(a[1]), pointer(a[2]), pointer(a[3]),
                                   pointer(a[4]), pointer(a[5]), pointer(a[6]), pointer(a[7]),
                                   pointer(a[8]), pointer(a[9]), pointer(a[10])};
  FASTGAN_DISPATCH(isa_of(isa), norm_double_backward(dtype_of(dtype), tensors, norm_shape_of(sizes), threads))
}

}  // namespace

void bind_norm(py::module_& m) {
  m.def("norm_forward", &norm_forward, py::call_guard<py::gil_scoped_release>(), py::arg("dtype"), py::arg("tensors"),
        py::arg("shape"), py::arg("eps"), py::arg("threads"), py::arg("isa") = "best");
  m.def("norm_backward", &norm_backward, py::call_guard<py::gil_scoped_release>(), py::arg("dtype"), py::arg("tensors"),
        py::arg("shape"), py::arg("threads"), py::arg("isa") = "best");
  m.def("norm_double_backward", &norm_double_backward, py::call_guard<py::gil_scoped_release>(), py::arg("dtype"),
        py::arg("tensors"), py::arg("shape"), py::arg("threads"), py::arg("isa") = "best");
}

}  // namespace fastgan
