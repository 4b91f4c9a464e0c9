#include "cpu/minibatch_stddev.h"

#include "bindings/bindings.h"

namespace fastgan {
namespace {

// The fields of MinibatchStddevShape.  Addresses are in the order of the structs' fields.
using StddevSizes = std::array<std::int64_t, 6>;

MinibatchStddevShape shape_of(const StddevSizes& s) { return {s[0], s[1], s[2], s[3], s[4], s[5]}; }

void minibatch_stddev_forward(const std::string& dtype, const std::array<std::int64_t, 2>& a, const StddevSizes& s,
                              double eps, int threads, const std::string& isa) {
  const MinibatchStddevForward tensors{pointer(a[0]), pointer(a[1])};
  FASTGAN_DISPATCH(isa_of(isa), minibatch_stddev_forward(dtype_of(dtype), tensors, shape_of(s), eps, threads))
}

void minibatch_stddev_backward(const std::string& dtype, const std::array<std::int64_t, 4>& a, const StddevSizes& s,
                               double eps, int threads, const std::string& isa) {
  const MinibatchStddevBackward tensors{pointer(a[0]), pointer(a[1]), pointer(a[2]), pointer(a[3])};
  FASTGAN_DISPATCH(isa_of(isa), minibatch_stddev_backward(dtype_of(dtype), tensors, shape_of(s), eps, threads))
}

void minibatch_stddev_double_backward(const std::string& dtype, const std::array<std::int64_t, 5>& a,
                                      const StddevSizes& s, double eps, int threads, const std::string& isa) {
  const MinibatchStddevDoubleBackward tensors{pointer(a[0]), pointer(a[1]), pointer(a[2]), pointer(a[3]),
                                              pointer(a[4])};
  FASTGAN_DISPATCH(isa_of(isa), minibatch_stddev_double_backward(dtype_of(dtype), tensors, shape_of(s), eps, threads))
}

}  // namespace

void bind_minibatch_stddev(py::module_& m) {
  m.def("minibatch_stddev_forward", &minibatch_stddev_forward, py::call_guard<py::gil_scoped_release>(),
        py::arg("dtype"), py::arg("tensors"), py::arg("shape"), py::arg("eps"), py::arg("threads"),
        py::arg("isa") = "best");
  m.def("minibatch_stddev_backward", &minibatch_stddev_backward, py::call_guard<py::gil_scoped_release>(),
        py::arg("dtype"), py::arg("tensors"), py::arg("shape"), py::arg("eps"), py::arg("threads"),
        py::arg("isa") = "best");
  m.def("minibatch_stddev_double_backward", &minibatch_stddev_double_backward, py::call_guard<py::gil_scoped_release>(),
        py::arg("dtype"), py::arg("tensors"), py::arg("shape"), py::arg("eps"), py::arg("threads"),
        py::arg("isa") = "best");
}

}  // namespace fastgan
