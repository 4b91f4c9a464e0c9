#include "cpu/transpose.h"

#include "bindings/bindings.h"

namespace fastgan {
namespace {

void transpose(std::int64_t from, std::int64_t to, std::int64_t batch, std::int64_t rows, std::int64_t columns,
               int threads, const std::string& isa) {
  FASTGAN_DISPATCH(isa_of(isa), transpose(static_cast<const float*>(pointer(from)), static_cast<float*>(pointer(to)),
                                          batch, rows, columns, threads))
}

}  // namespace

void bind_transpose(py::module_& m) {
  m.def("transpose", &transpose, py::call_guard<py::gil_scoped_release>(), py::arg("from"), py::arg("to"),
        py::arg("batch"), py::arg("rows"), py::arg("columns"), py::arg("threads"), py::arg("isa") = "best");
}

}  // namespace fastgan
