// Memory of the simulated devices. Fresh and released memory is all ones: NaN in every floating dtype, -1 in integers.
#include "memory.h"

#include <ATen/core/CachingHostAllocator.h>
#include <c10/core/impl/alloc_cpu.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <unordered_map>

#include "device.h"
#include "graphs.h"
#include "streams.h"

namespace simulated {
namespace {
using c10::DeviceIndex;

struct Counters {
  std::atomic<int64_t> bytes{0}, peak_bytes{0}, blocks{0};

  void add(int64_t size, int64_t count) {
    const int64_t now = bytes += size;
    blocks += count;
    int64_t peak = peak_bytes;
    while (now > peak && !peak_bytes.compare_exchange_weak(peak, now)) {
    }
  }
};
Counters counters[MAX_DEVICES];

std::mutex all_mutex;
std::unordered_map<Block*, std::weak_ptr<Block>> all;

BlockPtr make_block(int64_t bytes, c10::intrusive_ptr<c10::StorageImpl> keeps, void* data, DeviceIndex device) {
  auto block = std::make_shared<Block>(bytes, std::move(keeps), data, current_place(device));
  counters[device].add(bytes, 1);
  std::lock_guard<std::mutex> lock(all_mutex);
  all[block.get()] = block;
  if (block->in_graph) keep_in_graph(block);
  return block;
}

// Called when a storage is destroyed, possibly while this thread holds the GIL.
void release(void* context) {
  const std::unique_ptr<BlockPtr> holder(static_cast<BlockPtr*>(context));
  BlockPtr& block = *holder;
  counters[block->owner.device].add(-block->bytes, -1);
  if (block->in_graph) return;  // the pool of the graph keeps it, and replays write it
  if (deferred()) {
    release_in_order(block);
  } else if (block.use_count() > 1) {
    block->poison();  // a graph remembers the address
  }
}

struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = nullptr;
    TORCH_CHECK(!bytes || !posix_memalign(&data, 512, bytes), "CUDA out of memory (simulated)");
    if (bytes) std::memset(data, 0xFF, bytes);
    const DeviceIndex device = current_device();
    auto block = make_block(static_cast<int64_t>(bytes), {}, data, device);
    return {data, new BlockPtr(std::move(block)), &release, c10::Device(c10::kCUDA, device)};
  }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { default_copy_data(to, from, bytes); }
} allocator;

std::mutex pinned_mutex;
std::unordered_map<void*, size_t> pinned;

void free_pinned(void* data) {
  {
    std::lock_guard<std::mutex> lock(pinned_mutex);
    pinned.erase(data);
  }
  std::free(data);
}

struct PinnedAllocator final : at::HostAllocator {
  c10::DataPtr allocate(size_t bytes) override {
    if (is_capturing()) refuse_in_capture("page-locked memory is allocated");
    void* data = nullptr;
    TORCH_CHECK(!posix_memalign(&data, 64, bytes ? bytes : 1), "out of page-locked memory (simulated)");
    std::lock_guard<std::mutex> lock(pinned_mutex);
    pinned[data] = bytes;
    return {data, data, &free_pinned, c10::Device(c10::kCPU)};
  }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { default_copy_data(to, from, bytes); }
  bool record_event(void*, void*, c10::Stream) override { return true; }
  void empty_cache() override {}
  at::HostStats get_stats() override { return {}; }
  void reset_accumulated_stats() override {}
  void reset_peak_stats() override {}
} pinned_memory;
}  // namespace

Block::Block(int64_t bytes, c10::intrusive_ptr<c10::StorageImpl> keeps, void* data, Place owner)
    : bytes(bytes), keeps(std::move(keeps)), data(data), owner(owner), in_graph(is_capturing()) {}

Block::~Block() {
  {
    std::lock_guard<std::mutex> lock(all_mutex);
    all.erase(this);
  }
  if (!keeps) std::free(data);
}

void Block::poison() {
  if (data) std::memset(data, 0xFF, static_cast<size_t>(bytes));
}

c10::DataPtr device_pointer(c10::intrusive_ptr<c10::StorageImpl> keeps, DeviceIndex device) {
  void* data = keeps->data_ptr().get();
  const auto bytes = data ? static_cast<int64_t>(keeps->nbytes()) : 0;  // tensors of zeros may have no memory
  auto block = make_block(bytes, std::move(keeps), data, device);
  return {data, new BlockPtr(std::move(block)), &release, c10::Device(c10::kCUDA, device)};
}

BlockPtr block_of(const c10::StorageImpl& storage) {
  const c10::DataPtr& pointer = storage.data_ptr();
  return pointer.get_deleter() == &release ? *static_cast<BlockPtr*>(pointer.get_context()) : nullptr;
}

std::vector<BlockPtr> live_blocks() {
  std::vector<BlockPtr> found;
  std::lock_guard<std::mutex> lock(all_mutex);
  for (auto& [address, block] : all)
    if (auto held = block.lock()) found.push_back(std::move(held));
  return found;
}

bool is_pinned(const void* pointer) {
  std::lock_guard<std::mutex> lock(pinned_mutex);
  for (auto& [start, bytes] : pinned)
    if (pointer >= start && pointer < static_cast<char*>(start) + bytes) return true;
  return false;
}

c10::Allocator* device_allocator() { return &allocator; }
c10::Allocator* pinned_allocator() { return &pinned_memory; }

Statistics statistics(DeviceIndex device) {
  const Counters& c = counters[device];
  return {c.bytes, c.peak_bytes, c.blocks};
}

void reset_peak(DeviceIndex device) { counters[device].peak_bytes = counters[device].bytes.load(); }

void install_allocators() {
  c10::SetAllocator(c10::kCUDA, &allocator, 100);
  at::setHostAllocator(c10::kCUDA, &pinned_memory, 100);
}

}  // namespace simulated
