// One call of an operator on CUDA tensors, as a call on CPU tensors over the same memory, and its results back.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>

#include <utility>
#include <vector>

#include "memory.h"

namespace simulated {

class Translation {
 public:
  explicit Translation(const c10::OperatorHandle& op) : op_(op) {}

  // Arguments, CUDA to CPU. Raises where tensors are on two devices that the operator doesn't mix.
  c10::IValue inwards(const c10::IValue& value);
  // Results, CPU to CUDA.
  c10::IValue outwards(const c10::IValue& value);
  // Tensors that the operator resized, or gave another storage.
  void settle();

  c10::Device device{c10::kCUDA, -1};  // of the first CUDA tensor or argument "device"
  bool has_cuda_tensor = false;
  bool has_host_tensor = false;  // of one dimension or more
  std::vector<c10::Device> others;  // CUDA devices of further tensors
  std::vector<at::Tensor> host_tensors;
  std::vector<BlockPtr> blocks() const;  // of arguments and results

  // The CPU tensors that `value` holds, over memory of the device.
  static void each_tensor(const c10::IValue& value, const std::function<void(const at::Tensor&)>& visit);
  bool is_fresh(const at::Tensor& cpu_result) const;  // neither an argument nor over the memory of one

 private:
  struct Twins {
    c10::intrusive_ptr<c10::StorageImpl> cuda, cpu;
    void* data;
  };
  c10::Storage twin_of(const c10::Storage& cuda);
  c10::Storage cuda_of(const c10::Storage& cpu);
  at::Tensor tensor_inwards(const at::Tensor& t);
  at::Tensor tensor_outwards(const at::Tensor& t);
  c10::IValue convert(const c10::IValue& value, at::Tensor (Translation::*one)(const at::Tensor&));

  const c10::OperatorHandle& op_;
  std::vector<Twins> storages_;
  std::vector<std::pair<at::Tensor, at::Tensor>> tensors_;  // CUDA, CPU
  std::vector<std::pair<c10::StorageImpl*, c10::Storage>> made_;  // CPU, CUDA
};

}  // namespace simulated
