#include "cpu/conv_input_gradient.h"
#include "cpu/conv_pointwise.h"
#include "cpu/conv_row_weight_gradient.h"
#include "cpu/conv_strided.h"
#include "cpu/conv_weight_gradient.h"

#include "bindings/bindings.h"

namespace fastgan {
namespace {

// Sizes of x, y and the kernel, then stride, padding and dilation, for rows and for columns.
using Dimensions = std::array<std::array<std::int64_t, 6>, 2>;

ConvDimension dimension_of(const std::array<std::int64_t, 6>& d) { return {d[0], d[1], d[2], d[3], d[4], d[5]}; }

void conv_input_gradient(std::int64_t dy, std::int64_t weight, std::int64_t dx, std::int64_t batch,
                         std::int64_t in_channels, std::int64_t out_channels, const Dimensions& dimensions, int threads,
                         const std::string& isa) {
  const ConvShape shape{batch, in_channels, out_channels, dimension_of(dimensions[0]), dimension_of(dimensions[1])};
  FASTGAN_DISPATCH(isa_of(isa), conv_input_gradient(static_cast<const float*>(pointer(dy)),
                                                    static_cast<const float*>(pointer(weight)),
                                                    static_cast<float*>(pointer(dx)), shape, threads))
}

void conv_strided_forward(std::int64_t x, std::int64_t weight, std::int64_t bias, std::int64_t y, std::int64_t batch,
                          std::int64_t in_channels, std::int64_t out_channels, const Dimensions& dimensions,
                          int threads, const std::string& isa) {
  const ConvShape shape{batch, in_channels, out_channels, dimension_of(dimensions[0]), dimension_of(dimensions[1])};
  FASTGAN_DISPATCH(
      isa_of(isa),
      conv_strided_forward(static_cast<const float*>(pointer(x)), static_cast<const float*>(pointer(weight)),
                           static_cast<const float*>(pointer(bias)), static_cast<float*>(pointer(y)), shape, threads))
}

void conv_strided_input_gradient(std::int64_t dy, std::int64_t weight, std::int64_t dx, std::int64_t batch,
                                 std::int64_t in_channels, std::int64_t out_channels, const Dimensions& dimensions,
                                 int threads, const std::string& isa) {
  const ConvShape shape{batch, in_channels, out_channels, dimension_of(dimensions[0]), dimension_of(dimensions[1])};
  FASTGAN_DISPATCH(isa_of(isa), conv_strided_input_gradient(static_cast<const float*>(pointer(dy)),
                                                            static_cast<const float*>(pointer(weight)),
                                                            static_cast<float*>(pointer(dx)), shape, threads))
}

void conv_pointwise_forward(std::int64_t x, std::int64_t weight, std::int64_t bias, std::int64_t y, std::int64_t batch,
                            std::int64_t in_channels, std::int64_t out_channels, std::int64_t pixels, int threads,
                            const std::string& isa) {
  const PointwiseShape shape{batch, in_channels, out_channels, pixels};
  FASTGAN_DISPATCH(
      isa_of(isa),
      conv_pointwise_forward(static_cast<const float*>(pointer(x)), static_cast<const float*>(pointer(weight)),
                             static_cast<const float*>(pointer(bias)), static_cast<float*>(pointer(y)), shape, threads))
}

void conv_pointwise_input_gradient(std::int64_t dy, std::int64_t weight, std::int64_t dx, std::int64_t batch,
                                   std::int64_t in_channels, std::int64_t out_channels, std::int64_t pixels,
                                   int threads, const std::string& isa) {
  const PointwiseShape shape{batch, in_channels, out_channels, pixels};
  FASTGAN_DISPATCH(isa_of(isa), conv_pointwise_input_gradient(static_cast<const float*>(pointer(dy)),
                                                              static_cast<const float*>(pointer(weight)),
                                                              static_cast<float*>(pointer(dx)), shape, threads))
}

void conv_weight_gradient(std::int64_t dy, std::int64_t x, std::int64_t dw, std::int64_t batch,
                          std::int64_t in_channels, std::int64_t out_channels, const Dimensions& dimensions,
                          int threads, const std::string& isa) {
  const ConvShape shape{batch, in_channels, out_channels, dimension_of(dimensions[0]), dimension_of(dimensions[1])};
  FASTGAN_DISPATCH(isa_of(isa),
                   conv_weight_gradient(static_cast<const float*>(pointer(dy)), static_cast<const float*>(pointer(x)),
                                        static_cast<float*>(pointer(dw)), shape, threads))
}

void conv_row_weight_gradient(std::int64_t dy, std::int64_t x, std::int64_t dw, std::int64_t batch, std::int64_t groups,
                              std::int64_t in_channels, std::int64_t out_channels,
                              const std::array<std::int64_t, 6>& row, int threads, const std::string& isa) {
  const ConvRowShape shape{batch, groups, in_channels, out_channels, dimension_of(row)};
  FASTGAN_DISPATCH(isa_of(isa), conv_row_weight_gradient(static_cast<const float*>(pointer(dy)),
                                                         static_cast<const float*>(pointer(x)),
                                                         static_cast<float*>(pointer(dw)), shape, threads))
}

}  // namespace

void bind_conv(py::module_& m) {
  m.def("conv_input_gradient", &conv_input_gradient, py::call_guard<py::gil_scoped_release>(), py::arg("dy"),
        py::arg("weight"), py::arg("dx"), py::arg("batch"), py::arg("in_channels"), py::arg("out_channels"),
        py::arg("dimensions"), py::arg("threads"), py::arg("isa") = "best");
  m.def("conv_strided_forward", &conv_strided_forward, py::call_guard<py::gil_scoped_release>(), py::arg("x"),
        py::arg("weight"), py::arg("bias"), py::arg("y"), py::arg("batch"), py::arg("in_channels"),
        py::arg("out_channels"), py::arg("dimensions"), py::arg("threads"), py::arg("isa") = "best");
  m.def("conv_strided_input_gradient", &conv_strided_input_gradient, py::call_guard<py::gil_scoped_release>(),
        py::arg("dy"), py::arg("weight"), py::arg("dx"), py::arg("batch"), py::arg("in_channels"),
        py::arg("out_channels"), py::arg("dimensions"), py::arg("threads"), py::arg("isa") = "best");
  m.def("conv_pointwise_forward", &conv_pointwise_forward, py::call_guard<py::gil_scoped_release>(), py::arg("x"),
        py::arg("weight"), py::arg("bias"), py::arg("y"), py::arg("batch"), py::arg("in_channels"),
        py::arg("out_channels"), py::arg("pixels"), py::arg("threads"), py::arg("isa") = "best");
  m.def("conv_pointwise_input_gradient", &conv_pointwise_input_gradient, py::call_guard<py::gil_scoped_release>(),
        py::arg("dy"), py::arg("weight"), py::arg("dx"), py::arg("batch"), py::arg("in_channels"),
        py::arg("out_channels"), py::arg("pixels"), py::arg("threads"), py::arg("isa") = "best");
  m.def("conv_weight_gradient", &conv_weight_gradient, py::call_guard<py::gil_scoped_release>(), py::arg("dy"),
        py::arg("x"), py::arg("dw"), py::arg("batch"), py::arg("in_channels"), py::arg("out_channels"),
        py::arg("dimensions"), py::arg("threads"), py::arg("isa") = "best");
  m.def("conv_row_weight_gradient", &conv_row_weight_gradient, py::call_guard<py::gil_scoped_release>(), py::arg("dy"),
        py::arg("x"), py::arg("dw"), py::arg("batch"), py::arg("groups"), py::arg("in_channels"),
        py::arg("out_channels"), py::arg("row"), py::arg("threads"), py::arg("isa") = "best");
}

}  // namespace fastgan
