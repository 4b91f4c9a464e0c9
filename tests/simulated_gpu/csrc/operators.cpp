// Every operator on CUDA tensors: the rules of a GPU are checked, then the CPU's kernel runs over the same memory.
#include <ATen/ATen.h>
#include <ATen/ExpandUtils.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <cstring>
#include <string>
#include <unordered_map>
#include <unordered_set>

#include "device.h"
#include "graphs.h"
#include "python.h"
#include "streams.h"
#include "translation.h"

namespace simulated {
namespace {
using at::Tensor;
using c10::DispatchKey;
using c10::DispatchKeySet;
using c10::IValue;
using torch::jit::Stack;
using Names = std::unordered_set<std::string>;

const Names TAKES_HOST_TENSORS = {
    "aten::copy_", "aten::_copy_from", "aten::_copy_from_and_resize", "aten::index", "aten::index_put_",
    "aten::_index_put_impl_", "aten::_unsafe_index", "aten::set_", "aten::is_set_to", "aten::_foreach_copy_",
    "aten::_unsafe_masked_index", "aten::_unsafe_index_put",
};
const Names WAITS = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select", "aten::_unique2",
    "aten::unique_dim", "aten::unique_consecutive", "aten::bincount", "aten::is_nonzero",
};
const Names NO_LAUNCH = {"aten::empty", "aten::empty_strided", "aten::set_", "aten::is_set_to"};
const Names MOVES = {"aten::resize_", "aten::resize_as_", "aten::_copy_from_and_resize"};  // their own storage
const Names WRITES_UNSAID = {"aten::native_batch_norm", "aten::_native_batch_norm_legit"};  // running statistics

struct Traits {
  bool launches = true;
  bool waits = false;
  bool moves = false;
  bool allocates = false;
  std::vector<bool> writes;  // an argument
};

Traits traits_of(const c10::OperatorHandle& op) {
  const auto& schema = op.schema();
  Traits traits;
  bool any_write = false;
  for (const auto& argument : schema.arguments()) {
    const auto* alias = argument.alias_info();
    traits.writes.push_back((alias && alias->isWrite()) || WRITES_UNSAID.count(schema.name()));
    any_write |= traits.writes.back();
  }
  bool all_views = !schema.returns().empty();
  for (const auto& result : schema.returns()) all_views &= result.alias_info() != nullptr;
  traits.allocates = schema.name().rfind("aten::empty", 0) == 0;
  traits.launches = !(all_views && !any_write) && !NO_LAUNCH.count(schema.name());
  traits.waits = WAITS.count(schema.name());
  traits.moves = MOVES.count(schema.name());
  return traits;
}

const Traits& cached_traits(const c10::OperatorHandle& op) {
  thread_local std::unordered_map<c10::OperatorName, Traits> known;
  auto found = known.find(op.operator_name());
  if (found == known.end()) found = known.emplace(op.operator_name(), traits_of(op)).first;
  return found->second;
}

void run_on_cpu(const c10::OperatorHandle& op, Stack* stack) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  const c10::impl::ExcludeDispatchKeyGuard plain(
      c10::autocast_dispatch_keyset | c10::functorch_batched_ks | c10::python_ks |
      DispatchKeySet({DispatchKey::FuncTorchDynamicLayerFrontMode, DispatchKey::PythonTLSSnapshot}));
  op.redispatchBoxed(DispatchKeySet(DispatchKey::CPU), stack);
}

void copy_results(const IValue& recorded, const IValue& now) {
  if (recorded.isTensor()) {
    Tensor to = recorded.toTensor(), from = now.toTensor();
    if (to.defined() && !to.is_same(from) && to.data_ptr() != from.data_ptr()) to.copy_(from);
  } else if (recorded.isTensorList()) {
    auto to = recorded.toTensorVector(), from = now.toTensorVector();
    for (size_t i = 0; i < to.size(); ++i) copy_results(to[i], from[i]);
  }
}

struct OperatorLaunch final : Recorded {
  explicit OperatorLaunch(const c10::OperatorHandle& op) : op(op) {}
  void run() override {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    Stack stack = arguments;
    run_on_cpu(op, &stack);
    for (size_t i = 0; i < results.size(); ++i) copy_results(results[i], stack[i]);
  }
  bool draws() const override {
    for (auto& argument : arguments)
      if (argument.isGenerator() && argument.toGenerator().defined()) return true;
    return false;
  }
  const c10::OperatorHandle op;
  Stack arguments, results;
};

[[noreturn]] void two_devices(const c10::Device& a, const c10::Device& b, const std::string& name) {
  TORCH_CHECK(
      false, "Expected all tensors to be on the same device, but found at least two devices, ", a, " and ", b,
      "! (simulated: ", name, ")");
}

bool selects_by_mask(const c10::FunctionSchema& schema, const Stack& arguments) {
  bool mask = false;
  if (schema.name().rfind("aten::index", 0) != 0) return false;
  for (size_t i = 1; i < arguments.size(); ++i)
    if (arguments[i].isList())
      Translation::each_tensor(arguments[i], [&](const Tensor& t) {
        mask |= t.is_cuda() && (t.scalar_type() == c10::kBool || t.scalar_type() == c10::kByte);
      });
  return mask;
}

void check_arguments(const Translation& call, const c10::FunctionSchema& schema, const Stack& arguments) {
  const auto& name = schema.name();
  if (!call.others.empty() && name != "aten::copy_") two_devices(call.device, call.others[0], name);
  if (call.has_host_tensor && call.has_cuda_tensor && !TAKES_HOST_TENSORS.count(name))
    two_devices(call.device, c10::Device(c10::kCPU), name);
  for (size_t i = 0; i < arguments.size(); ++i)
    TORCH_CHECK(
        schema.arguments()[i].name() != "pin_memory" || !arguments[i].isBool() || !arguments[i].toBool(),
        "Only dense CPU tensors can be pinned (simulated: ", name, ")");
}

// Random numbers of the device come from the CPU generator inside the device's.
void replace_generators(const Translation& call, const c10::FunctionSchema& schema, Stack& arguments) {
  static const bool lenient = std::getenv("SIMULATED_GPU_CPU_GENERATORS") != nullptr;
  for (size_t i = 0; i < arguments.size(); ++i) {
    IValue& value = arguments[i];
    if (value.isGenerator() && value.toGenerator().defined()) {
      const auto generator = value.toGenerator();
      TORCH_CHECK(
          generator.device().is_cuda() || lenient,
          "Expected a 'cuda' device type for generator but found 'cpu' (simulated: ", schema.name(), ")");
      if (generator.device().is_cuda()) value = inner_generator(generator);
    } else if (value.isNone() && schema.arguments()[i].type()->str().rfind("Generator", 0) == 0) {
      value = inner_generator(default_generator(call.device.index()));
    }
  }
}

struct Copy {
  bool involves_host, waits;
};

// A copy from or to the host waits for the stream, unless it is told not to and the memory of the host is page-locked;
// the driver takes the contents of pageable memory with it when a copy to the device is launched.
Copy kind_of_copy(const Translation& call, Stack& arguments) {
  if (call.host_tensors.empty()) return {false, false};
  const bool blocking = !arguments[2].toBool();
  const Tensor host = call.host_tensors[0];
  const bool pageable = !is_pinned(host.storage().data());
  const bool to_host = host.is_same(arguments[0].toTensor());
  if (is_capturing() && pageable) refuse_in_capture("a copy from or to pageable memory");
  if (!blocking && pageable && !to_host) arguments[1] = host.clone();
  return {true, blocking || (pageable && to_host)};
}

using Saved = std::vector<std::pair<Tensor, std::vector<char>>>;

Saved save_written(const Traits& traits, const Stack& arguments) {
  Saved saved;
  for (size_t i = 0; i < arguments.size(); ++i)
    if (traits.writes[i])
      Translation::each_tensor(arguments[i], [&](const Tensor& t) {
        const auto* data = static_cast<const char*>(t.storage().data());
        saved.emplace_back(t, std::vector<char>(data, data ? data + t.storage().nbytes() : data));
      });
  return saved;
}

void write_back(const Saved& saved) {
  for (auto& [t, bytes] : saved)
    if (!bytes.empty() && t.storage().nbytes() >= bytes.size())
      std::memcpy(t.storage().mutable_data(), bytes.data(), bytes.size());
}

void poison(const Translation& call, const IValue& result) {
  Translation::each_tensor(result, [&](const Tensor& t) {
    if (call.is_fresh(t) && t.storage().data()) std::memset(t.storage().mutable_data(), 0xFF, t.storage().nbytes());
  });
}

// Numbers are drawn when a launch is, not when it runs.
void draw_ahead(Stack& arguments) {
  for (IValue& value : arguments)
    if (value.isGenerator() && value.toGenerator().defined()) value = value.toGenerator().clone();
}

// The kernel runs once for the shapes of its results, on whatever is in memory, and is undone; then it is queued. Where
// it can't run on what is there (an index out of range), the stream catches up first. Returns whether it was queued.
bool launch_later(const c10::OperatorHandle& op, const Traits& traits, Translation& call, Place place, Stack* stack) {
  const RunLock lock;
  auto launch = std::make_shared<OperatorLaunch>(op);
  launch->arguments = *stack;
  draw_ahead(launch->arguments);
  const Saved saved = save_written(traits, *stack);
  try {
    run_on_cpu(op, stack);
  } catch (const std::exception&) {
    write_back(saved);
    *stack = launch->arguments;
    finish(place);
    return false;
  }
  launch->results = *stack;
  write_back(saved);
  for (const IValue& result : *stack) poison(call, result);
  Stack results;
  for (const IValue& result : *stack) results.push_back(call.outwards(result));
  *stack = std::move(results);
  call.settle();
  submit(place, {[launch] { launch->run(); }, call.blocks(), {}});
  return true;
}

void copy_later(const c10::OperatorHandle& op, Translation& call, Place place, Stack* stack) {
  auto launch = std::make_shared<OperatorLaunch>(op);
  launch->arguments = *stack;
  Tensor self = (*stack)[0].toTensor();
  const Tensor source = (*stack)[1].toTensor();
  TORCH_CHECK(
      at::is_expandable_to(source.sizes(), self.sizes()), "The size of tensor a ", self.sizes(),
      " must match the size of tensor b ", source.sizes(), " (simulated: aten::copy_)");
  *stack = {call.outwards(self)};
  submit(place, {[launch] { launch->run(); }, call.blocks(), {}});
}

void run_now(const c10::OperatorHandle& op, const Traits& traits, Translation& call, Place place, Stack* stack) {
  std::shared_ptr<OperatorLaunch> launch;
  if (traits.launches && is_capturing()) {
    launch = std::make_shared<OperatorLaunch>(op);
    launch->arguments = *stack;
  }
  run_on_cpu(op, stack);
  if (launch) {
    launch->results = *stack;
    capture(launch, place);
  }
  for (IValue& result : *stack) {
    if (traits.allocates) poison(call, result);
    result = call.outwards(result);
  }
  call.settle();
}

Stack translated(Translation& call, const c10::FunctionSchema& schema, Stack arguments) {
  const bool copy = schema.name() == "aten::copy_";
  for (IValue& value : arguments) {
    if (value.isDevice() && value.toDevice().is_cuda()) {
      const auto index = value.toDevice().index();
      if (call.device.index() < 0) call.device = c10::Device(c10::kCUDA, index < 0 ? current_device() : index);
      value = c10::Device(c10::kCPU);
      continue;
    }
    // A number in a CPU tensor of no dimension goes with the launch.
    if (!copy && (is_capturing() || deferred()) && value.isTensor() && value.toTensor().defined() &&
        value.toTensor().is_cpu() && value.toTensor().dim() == 0)
      value = value.toTensor().clone();
    value = call.inwards(value);
  }
  if (call.device.index() < 0) call.device = c10::Device(c10::kCUDA, current_device());
  TORCH_CHECK(call.device.index() < device_count(), "CUDA error: invalid device ordinal (simulated): ", call.device);
  return arguments;
}

void fallback(const c10::OperatorHandle& op, DispatchKeySet, Stack* stack) {
  TORCH_CHECK(
      !is_in_bad_fork(), "Cannot re-initialize CUDA in forked subprocess. To use CUDA with multiprocessing, you must use "
      "the 'spawn' start method (simulated)");
  const auto& schema = op.schema();
  const Traits& traits = cached_traits(op);
  const size_t first = stack->size() - schema.arguments().size();
  Stack given(stack->begin() + static_cast<std::ptrdiff_t>(first), stack->end());
  stack->resize(first);
  const bool by_mask = selects_by_mask(schema, given);

  Translation call(op);
  Stack own = translated(call, schema, std::move(given));
  check_arguments(call, schema, own);
  replace_generators(call, schema, own);
  const Place place = current_place(call.device.index());
  const bool copies = schema.name() == "aten::copy_";
  const Copy copy = copies ? kind_of_copy(call, own) : Copy{false, false};
  const bool waits = call.has_cuda_tensor && (traits.waits || by_mask || copy.waits ||
                                              (!copies && traits.launches && call.has_host_tensor));
  if (waits) host_waits(schema.name().c_str());
  const bool later = deferred() && !is_capturing() && traits.launches;
  if (later && call.others.size()) finish(current_place(call.others[0].index()));
  if (later && (waits || traits.moves || call.others.size())) {
    finish(place);
    run_now(op, traits, call, place, &own);
  } else if (later && copies) {
    copy_later(op, call, place, &own);
  } else if (!later || !launch_later(op, traits, call, place, &own)) {
    run_now(op, traits, call, place, &own);
  }
  for (IValue& result : own) stack->push_back(std::move(result));
}

void record_stream(Tensor& self, c10::Stream stream) {
  const auto block = block_of(*self.storage().unsafeGetStorageImpl());
  if (!block) return;
  std::lock_guard<std::mutex> lock(block->mutex);
  const Place place{stream.device_index(), stream.id()};
  if (!(place == block->owner)) block->recorded.insert(place);
}

struct PythonLaunch final : Recorded {
  explicit PythonLaunch(int64_t number) : number(number) {}
  ~PythonLaunch() override { drop_python(number); }
  void run() override { call_python(number); }
  const int64_t number;
};

// A CPU tensor over the memory of a CUDA tensor, which doesn't keep its storage alive.
Tensor borrow(const Tensor& t) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("simulated_gpu::borrow", "");
  Translation call(op);
  return call.inwards(t).toTensor();
}

void launch_python(int64_t number, const std::vector<Tensor>& tensors) {
  auto launch = std::make_shared<PythonLaunch>(number);
  const Place place = current_place();
  std::vector<BlockPtr> blocks;
  for (const Tensor& t : tensors)
    if (auto block = block_of(*t.storage().unsafeGetStorageImpl())) blocks.push_back(std::move(block));
  if (deferred() && !is_capturing()) {
    submit(place, {[launch] { launch->run(); }, std::move(blocks), {}});
    return;
  }
  if (is_capturing()) capture(launch, place);
  launch->run();
}

struct Install {
  Install() {
    install_allocators();
    install_device();
  }
} install;
}  // namespace
}  // namespace simulated

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&simulated::fallback>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  // Operators whose own composite kernel would look for a CUDA stub, or pick a CUDA-only operator.
  for (const char* name :
       {"copy_", "convolution", "convolution_backward", "native_group_norm", "native_group_norm_backward",
        "convolution_overrideable"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&simulated::fallback>());
  m.impl("record_stream", &simulated::record_stream);
}

TORCH_LIBRARY(simulated_gpu, m) {
  m.def("borrow(Tensor t) -> Tensor");
  m.def("launch(int number, Tensor[] tensors) -> ()");
  m.impl("borrow", torch::dispatch(c10::DispatchKey::CompositeExplicitAutograd, &simulated::borrow));
  m.impl("launch", torch::dispatch(c10::DispatchKey::CompositeExplicitAutograd, &simulated::launch_python));
}
