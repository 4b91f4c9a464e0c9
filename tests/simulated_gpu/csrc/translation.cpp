#include "translation.h"

#include <c10/core/CPUAllocator.h>

#include "device.h"

namespace simulated {
namespace {
using at::Tensor;
using c10::DispatchKey;
using c10::IValue;
using c10::Storage;
using c10::StorageImpl;

Tensor tensor_over(Storage storage, DispatchKey key, const Tensor& like) {
  c10::DispatchKeySet keys(key);
  if (like._is_zerotensor()) keys = keys.add(DispatchKey::ZeroTensor);
  Tensor made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), keys, like.dtype());
  auto* impl = made.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  if (like.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
  if (like.is_conj()) made._set_conj(true);
  if (like.is_neg()) made._set_neg(true);
  return made;
}
}  // namespace

Storage Translation::twin_of(const Storage& cuda) {
  StorageImpl* impl = cuda.unsafeGetStorageImpl();
  for (auto& twins : storages_)
    if (twins.cuda.get() == impl) return Storage(twins.cpu);
  // The twin holds the block, not the storage: whether that is still in use is the program's affair.
  auto* holder = new BlockPtr(block_of(*impl));
  void* data = impl->mutable_data();
  c10::DataPtr pointer(
      data, holder, [](void* context) { delete static_cast<BlockPtr*>(context); }, c10::Device(c10::kCPU));
  auto cpu = c10::make_intrusive<StorageImpl>(
      StorageImpl::use_byte_size_t(), impl->nbytes(), std::move(pointer), c10::GetCPUAllocator(), true);
  storages_.push_back({c10::intrusive_ptr<StorageImpl>::reclaim_copy(impl), cpu, data});
  return Storage(cpu);
}

Storage Translation::cuda_of(const Storage& cpu) {
  StorageImpl* impl = cpu.unsafeGetStorageImpl();
  for (auto& twins : storages_)
    if (twins.cpu.get() == impl) return Storage(twins.cuda);
  for (auto& [known, cuda] : made_)
    if (known == impl) return cuda;
  auto keeps = c10::intrusive_ptr<StorageImpl>::reclaim_copy(impl);
  const auto bytes = keeps->nbytes();
  Storage cuda(c10::make_intrusive<StorageImpl>(
      StorageImpl::use_byte_size_t(), bytes, device_pointer(keeps, device.index()), device_allocator(), true));
  made_.emplace_back(impl, cuda);
  return cuda;
}

Tensor Translation::tensor_inwards(const Tensor& t) {
  if (!t.defined()) return t;
  if (!t.is_cuda()) {
    if (!t.is_cpu()) return t;
    has_host_tensor |= t.dim() > 0;
    host_tensors.push_back(t);
    return t;
  }
  has_cuda_tensor = true;
  if (device.index() < 0) device = t.device();
  if (device != t.device() && t.dim() > 0) others.push_back(t.device());
  for (auto& [cuda, cpu] : tensors_)
    if (cuda.is_same(t)) return cpu;
  TORCH_CHECK(
      t.layout() == c10::kStrided, "the simulated GPU has no ", t.layout(), " tensors (", op_.schema().name(), ")");
  Tensor cpu = tensor_over(twin_of(t.storage()), DispatchKey::CPU, t);
  tensors_.emplace_back(t, cpu);
  return cpu;
}

Tensor Translation::tensor_outwards(const Tensor& t) {
  if (!t.defined() || !t.is_cpu() || t.layout() != c10::kStrided) return t;
  for (auto& [cuda, cpu] : tensors_)
    if (cpu.is_same(t)) return cuda;
  for (auto& host : host_tensors)
    if (host.is_same(t)) return t;
  return tensor_over(cuda_of(t.storage()), DispatchKey::CUDA, t);
}

IValue Translation::convert(const IValue& value, Tensor (Translation::*one)(const Tensor&)) {
  if (value.isTensor()) return (this->*one)(value.toTensor());
  if (value.isTensorList()) {
    c10::List<Tensor> list;
    for (const Tensor& t : value.toTensorVector()) list.push_back((this->*one)(t));
    return list;
  }
  if (!value.isList()) return value;
  bool any = false;
  for (const IValue& element : value.toListRef()) any |= element.isTensor();
  if (!any) return value;
  auto copy = c10::impl::GenericList(value.toList().elementType());
  for (const IValue& element : value.toListRef())
    copy.push_back(element.isTensor() ? IValue((this->*one)(element.toTensor())) : element);
  return copy;
}

IValue Translation::inwards(const IValue& value) {
  if (value.isStorage() && value.toStorage().device().is_cuda()) {
    has_cuda_tensor = true;
    if (device.index() < 0) device = value.toStorage().device();
    return twin_of(value.toStorage());
  }
  return convert(value, &Translation::tensor_inwards);
}

IValue Translation::outwards(const IValue& value) { return convert(value, &Translation::tensor_outwards); }

void Translation::settle() {
  for (auto& twins : storages_) {
    if (twins.cpu->data_ptr().get() != twins.data)
      twins.cuda->set_data_ptr_noswap(device_pointer(twins.cpu, device.index()));
    if (twins.cuda->nbytes() != twins.cpu->nbytes()) twins.cuda->set_nbytes(twins.cpu->nbytes());
  }
  for (auto& [cuda, cpu] : tensors_) {
    auto* impl = cuda.unsafeGetTensorImpl();
    Storage storage = cuda_of(cpu.storage());
    if (storage.unsafeGetStorageImpl() != cuda.storage().unsafeGetStorageImpl())
      impl->set_storage_keep_dtype(storage);
    if (cuda.sizes() != cpu.sizes() || cuda.strides() != cpu.strides() || cuda.storage_offset() != cpu.storage_offset())
      impl->set_sizes_and_strides(cpu.sizes(), cpu.strides(), cpu.storage_offset());
  }
}

std::vector<BlockPtr> Translation::blocks() const {
  std::vector<BlockPtr> found;
  auto add = [&](const StorageImpl& storage) {
    if (auto block = block_of(storage)) found.push_back(std::move(block));
  };
  for (auto& twins : storages_) add(*twins.cuda);
  for (auto& [cpu, cuda] : made_) add(*cuda.unsafeGetStorageImpl());
  return found;
}

void Translation::each_tensor(const IValue& value, const std::function<void(const Tensor&)>& visit) {
  if (value.isTensor() && value.toTensor().defined()) {
    visit(value.toTensor());
  } else if (value.isList()) {
    for (const IValue& element : value.toListRef()) each_tensor(element, visit);
  }
}

bool Translation::is_fresh(const Tensor& t) const {
  if (!t.is_cpu() || !t.has_storage()) return false;
  for (auto& host : host_tensors)
    if (host.has_storage() && host.storage().is_alias_of(t.storage())) return false;
  for (auto& twins : storages_)
    if (twins.cpu.get() == t.storage().unsafeGetStorageImpl()) return false;
  return true;
}

}  // namespace simulated
