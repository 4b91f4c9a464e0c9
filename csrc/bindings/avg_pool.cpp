#include "cpu/avg_pool.h"

#include "bindings/bindings.h"

namespace fastgan {
namespace {

// planes, then depth, height and width of the pooled tensor, and of a window.
using PoolSizes = std::array<std::int64_t, 7>;

PoolShape shape_of(const PoolSizes& s) { return {s[0], s[1], s[2], s[3], s[4], s[5], s[6]}; }

void avg_pool(const std::string& dtype, std::int64_t x, std::int64_t y, const PoolSizes& shape, double divisor,
              int threads, const std::string& isa) {
  FASTGAN_DISPATCH(isa_of(isa), avg_pool(dtype_of(dtype), pointer(x), pointer(y), shape_of(shape), divisor, threads))
}

void avg_pool_transpose(const std::string& dtype, std::int64_t y, std::int64_t x, const PoolSizes& shape,
                        double divisor, int threads, const std::string& isa) {
  FASTGAN_DISPATCH(isa_of(isa),
                   avg_pool_transpose(dtype_of(dtype), pointer(y), pointer(x), shape_of(shape), divisor, threads))
}

}  // namespace

void bind_avg_pool(py::module_& m) {
  const auto define = [&](const char* name, auto function) {
    m.def(name, function, py::call_guard<py::gil_scoped_release>(), py::arg("dtype"), py::arg("from"), py::arg("to"),
          py::arg("shape"), py::arg("divisor"), py::arg("threads"), py::arg("isa") = "best");
  };
  define("avg_pool", &avg_pool);
  define("avg_pool_transpose", &avg_pool_transpose);
}

}  // namespace fastgan
