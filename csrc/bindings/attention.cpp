#include "cpu/attention.h"

#include "bindings/bindings.h"

namespace fastgan {
namespace {

// scores, dP - delta, T, R, P (T - tau); then rows and columns
void attention_block(const std::string& dtype, const std::array<std::int64_t, 5>& blocks,
                     const std::array<std::int64_t, 2>& sizes, int threads, const std::string& isa) {
  const AttentionBlock block{pointer(blocks[0]),
                             pointer(blocks[1]),
                             pointer(blocks[2]),
                             pointer(blocks[3]),
                             pointer(blocks[4]),
                             sizes[0],
                             sizes[1]};
  FASTGAN_DISPATCH(isa_of(isa), attention_block(dtype_of(dtype), block, threads))
}

}  // namespace

void bind_attention(py::module_& m) {
  m.def("attention_block", &attention_block, py::call_guard<py::gil_scoped_release>(), py::arg("dtype"),
        py::arg("blocks"), py::arg("sizes"), py::arg("threads"), py::arg("isa") = "best");
}

}  // namespace fastgan
