#include "cpu/minibatch_discrimination.h"

#include "bindings/bindings.h"

namespace fastgan {
namespace {

// (samples, kernels, dims, first, rows, segments), then the addresses of order and ends.
using DiscriminationSizes = std::array<std::int64_t, 6>;

DiscriminationShape shape_of(const DiscriminationSizes& s, std::int64_t order, std::int64_t ends) {
  return {s[0],
          s[1],
          s[2],
          s[3],
          s[4],
          s[5],
          static_cast<const std::int64_t*>(pointer(order)),
          static_cast<const std::int64_t*>(pointer(ends))};
}

void forward(const std::string& dtype, const std::array<std::int64_t, 4>& a, const DiscriminationSizes& s,
             bool exclude_self, int threads, const std::string& isa) {
  const DiscriminationShape shape = shape_of(s, a[0], a[1]);
  const DiscriminationForward tensors{pointer(a[2]), pointer(a[3])};
  FASTGAN_DISPATCH(isa_of(isa),
                   minibatch_discrimination_forward(dtype_of(dtype), tensors, shape, exclude_self, threads))
}

void backward(const std::string& dtype, const std::array<std::int64_t, 5>& a, const DiscriminationSizes& s, int threads,
              const std::string& isa) {
  const DiscriminationShape shape = shape_of(s, a[0], a[1]);
  const DiscriminationBackward tensors{pointer(a[2]), pointer(a[3]), pointer(a[4])};
  FASTGAN_DISPATCH(isa_of(isa), minibatch_discrimination_backward(dtype_of(dtype), tensors, shape, threads))
}

void double_backward(const std::string& dtype, const std::array<std::int64_t, 7>& a, const DiscriminationSizes& s,
                     int threads, const std::string& isa) {
  const DiscriminationShape shape = shape_of(s, a[0], a[1]);
  const DiscriminationDoubleBackward tensors{pointer(a[2]), pointer(a[3]), pointer(a[4]), pointer(a[5]), pointer(a[6])};
  FASTGAN_DISPATCH(isa_of(isa), minibatch_discrimination_double_backward(dtype_of(dtype), tensors, shape, threads))
}

}  // namespace

void bind_minibatch_discrimination(py::module_& m) {
  m.def("minibatch_discrimination_forward", &forward, py::call_guard<py::gil_scoped_release>(), py::arg("dtype"),
        py::arg("tensors"), py::arg("sizes"), py::arg("exclude_self"), py::arg("threads"), py::arg("isa") = "best");
  m.def("minibatch_discrimination_backward", &backward, py::call_guard<py::gil_scoped_release>(), py::arg("dtype"),
        py::arg("tensors"), py::arg("sizes"), py::arg("threads"), py::arg("isa") = "best");
  m.def("minibatch_discrimination_double_backward", &double_backward, py::call_guard<py::gil_scoped_release>(),
        py::arg("dtype"), py::arg("tensors"), py::arg("sizes"), py::arg("threads"), py::arg("isa") = "best");
}

}  // namespace fastgan
