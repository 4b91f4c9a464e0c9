#include "cpu/bias_act.h"

#include "bindings/bindings.h"

namespace fastgan {
namespace {

// Addresses are in the order of the structs' fields.  Then (outer, channels, inner), the activation and its parameters.
using BiasActSizes = std::array<std::int64_t, 3>;
using BiasActNumbers = std::tuple<std::string, double, double, double>;

Activation activation_of(const std::string& name) {
  constexpr const char* names[] = {"linear", "relu",    "leaky_relu", "silu",      "gelu",        "gelu_tanh",
                                   "tanh",   "sigmoid", "softplus",   "tanh_of_y", "sigmoid_of_y"};
  int index = 0;
  for (const char* candidate : names) {
    if (name == candidate) return static_cast<Activation>(index);
    ++index;
  }
  throw std::invalid_argument("unknown activation " + name);
}

BiasActShape shape_of(const BiasActSizes& s) { return {s[0], s[1], s[2]}; }

BiasActOptions options_of(const BiasActNumbers& numbers) {
  const auto& [name, negative_slope, gain, clamp] = numbers;
  return {activation_of(name), negative_slope, gain, clamp};
}

std::uint32_t* words(std::int64_t address) { return static_cast<std::uint32_t*>(pointer(address)); }

void piecewise_forward(const std::string& dtype, const std::array<std::int64_t, 5>& a, const BiasActSizes& s,
                       const BiasActNumbers& numbers, int threads, const std::string& isa) {
  const PiecewiseForward tensors{pointer(a[0]), pointer(a[1]), pointer(a[2]), words(a[3]), words(a[4])};
  FASTGAN_DISPATCH(isa_of(isa), piecewise_forward(dtype_of(dtype), tensors, shape_of(s), options_of(numbers), threads))
}

void piecewise_apply(const std::string& dtype, const std::array<std::int64_t, 6>& a, const BiasActSizes& s,
                     const BiasActNumbers& numbers, int threads, const std::string& isa) {
  const PiecewiseApply tensors{pointer(a[0]), pointer(a[1]), words(a[2]), words(a[3]), pointer(a[4]), pointer(a[5])};
  FASTGAN_DISPATCH(isa_of(isa), piecewise_apply(dtype_of(dtype), tensors, shape_of(s), options_of(numbers), threads))
}

void smooth_forward(const std::string& dtype, const std::array<std::int64_t, 3>& a, const BiasActSizes& s,
                    const BiasActNumbers& numbers, int threads, const std::string& isa) {
  const SmoothForward tensors{pointer(a[0]), pointer(a[1]), pointer(a[2])};
  FASTGAN_DISPATCH(isa_of(isa), smooth_forward(dtype_of(dtype), tensors, shape_of(s), options_of(numbers), threads))
}

void smooth_backward(const std::string& dtype, const std::array<std::int64_t, 5>& a, const BiasActSizes& s,
                     const BiasActNumbers& numbers, int threads, const std::string& isa) {
  const SmoothBackward tensors{pointer(a[0]), pointer(a[1]), pointer(a[2]), pointer(a[3]), pointer(a[4])};
  FASTGAN_DISPATCH(isa_of(isa), smooth_backward(dtype_of(dtype), tensors, shape_of(s), options_of(numbers), threads))
}

void smooth_double_backward(const std::string& dtype, const std::array<std::int64_t, 8>& a, const BiasActSizes& s,
                            const BiasActNumbers& numbers, int threads, const std::string& isa) {
  const SmoothDoubleBackward tensors{pointer(a[0]), pointer(a[1]), pointer(a[2]), pointer(a[3]),
                                     pointer(a[4]), pointer(a[5]), pointer(a[6]), pointer(a[7])};
  FASTGAN_DISPATCH(isa_of(isa),
                   smooth_double_backward(dtype_of(dtype), tensors, shape_of(s), options_of(numbers), threads))
}

}  // namespace

void bind_bias_act(py::module_& m) {
  const auto define = [&](const char* name, auto function) {
    m.def(name, function, py::call_guard<py::gil_scoped_release>(), py::arg("dtype"), py::arg("tensors"),
          py::arg("shape"), py::arg("options"), py::arg("threads"), py::arg("isa") = "best");
  };
  define("piecewise_forward", &piecewise_forward);
  define("piecewise_apply", &piecewise_apply);
  define("smooth_forward", &smooth_forward);
  define("smooth_backward", &smooth_backward);
  define("smooth_double_backward", &smooth_double_backward);
}

}  // namespace fastgan
