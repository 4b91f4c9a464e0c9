// The cells of recurrent layers. PyTorch has fused kernels for them on CUDA tensors alone, so there is no CPU kernel to
// run; these are their formulas, in operators that autograd differentiates.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

namespace simulated {
namespace {
using at::Tensor;
using Bias = std::optional<Tensor>;

Tensor with_bias(const Tensor& gates, const Bias& bias) {
  return bias && bias->defined() ? gates + *bias : gates;
}

std::tuple<Tensor, Tensor, Tensor> lstm_cell(
    const Tensor& input_gates, const Tensor& hidden_gates, const Tensor& cell, const Bias& input_bias,
    const Bias& hidden_bias) {
  const auto gates = (with_bias(input_gates, input_bias) + with_bias(hidden_gates, hidden_bias)).chunk(4, -1);
  const Tensor next = gates[1].sigmoid() * cell + gates[0].sigmoid() * gates[2].tanh();
  return {gates[3].sigmoid() * next.tanh(), next, gates[0].detach()};  // the last is a workspace
}

std::tuple<Tensor, Tensor> gru_cell(
    const Tensor& input_gates, const Tensor& hidden_gates, const Tensor& hidden, const Bias& input_bias,
    const Bias& hidden_bias) {
  const auto of_input = with_bias(input_gates, input_bias).chunk(3, -1);
  const auto of_hidden = with_bias(hidden_gates, hidden_bias).chunk(3, -1);
  const Tensor reset = (of_input[0] + of_hidden[0]).sigmoid();
  const Tensor update = (of_input[1] + of_hidden[1]).sigmoid();
  const Tensor next = (of_input[2] + reset * of_hidden[2]).tanh();
  return {next + update * (hidden - next), reset.detach()};
}
}  // namespace
}  // namespace simulated

TORCH_LIBRARY_IMPL(aten, AutogradCUDA, m) {
  m.impl("_thnn_fused_lstm_cell", &simulated::lstm_cell);
  m.impl("_thnn_fused_gru_cell", &simulated::gru_cell);
}

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("_thnn_fused_lstm_cell", &simulated::lstm_cell);
  m.impl("_thnn_fused_gru_cell", &simulated::gru_cell);
}
