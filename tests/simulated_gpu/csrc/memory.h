// Memory of the simulated devices: blocks of the host's memory, each the property of a device and a stream.
#pragma once
#include <c10/core/Allocator.h>
#include <c10/core/Device.h>
#include <c10/core/StorageImpl.h>
#include <c10/util/intrusive_ptr.h>

#include <memory>
#include <mutex>
#include <set>
#include <vector>

namespace simulated {

// A stream of a device; the default stream has the number 0.
struct Place {
  c10::DeviceIndex device = 0;
  int64_t stream = 0;
  bool operator<(const Place& other) const {
    return std::tie(device, stream) < std::tie(other.device, other.stream);
  }
  bool operator==(const Place& other) const { return device == other.device && stream == other.stream; }
};

// One allocation. A storage holds it, and so does everything that was launched and hasn't run: its memory goes back to
// the host when the last of them lets go. `released` says that the storage is gone: on a GPU, the allocator may then
// give the memory to anybody, so its contents are poison from then on.
struct Block {
  Block(int64_t bytes, c10::intrusive_ptr<c10::StorageImpl> keeps, void* data, Place owner);
  ~Block();
  Block(const Block&) = delete;
  void poison();

  const int64_t bytes;
  const c10::intrusive_ptr<c10::StorageImpl> keeps;  // the CPU storage whose memory this is; null: `data` is ours
  void* const data;
  const Place owner;  // where it was allocated
  const bool in_graph;  // allocated while a graph was captured: it stays in the graph's pool
  std::mutex mutex;
  std::set<Place> recorded;  // by record_stream: the memory isn't reused before these have got there
  uint64_t released = 0;  // the position in the owner's queue, in deferred mode
};
using BlockPtr = std::shared_ptr<Block>;

// A pointer of a CUDA storage to the memory of `keeps`.
c10::DataPtr device_pointer(c10::intrusive_ptr<c10::StorageImpl> keeps, c10::DeviceIndex device);
// The block under a CUDA storage; null for memory that isn't the simulation's.
BlockPtr block_of(const c10::StorageImpl& storage);
// All blocks that are in use; what was captured is undone by writing their contents back.
std::vector<BlockPtr> live_blocks();

bool is_pinned(const void* pointer);
c10::Allocator* device_allocator();
c10::Allocator* pinned_allocator();

struct Statistics {
  int64_t bytes, peak_bytes, blocks;
};
Statistics statistics(c10::DeviceIndex device);
void reset_peak(c10::DeviceIndex device);
void install_allocators();

}  // namespace simulated
