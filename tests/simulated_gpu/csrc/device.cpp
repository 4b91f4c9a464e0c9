// Devices, their current streams and their generators, as PyTorch's core asks for them.
#include "device.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/util/Exception.h>

#include <pthread.h>

#include <atomic>
#include <cstdlib>
#include <string>

#include "graphs.h"
#include "streams.h"

namespace simulated {
namespace {
using c10::Device;
using c10::DeviceIndex;

thread_local DeviceIndex device_now = 0;
thread_local int64_t stream_now[MAX_DEVICES] = {};
std::atomic<int64_t> next_stream{1};
std::atomic<int> sync_mode{0};
std::atomic<bool> hand_out_default{false};
std::atomic<bool> bad_fork{false};

struct CudaGenerator final : c10::GeneratorImpl {
  explicit CudaGenerator(DeviceIndex device)
      : GeneratorImpl(Device(c10::kCUDA, device), c10::DispatchKeySet(c10::DispatchKey::CUDA)),
        inner(at::detail::createCPUGenerator(c10::default_rng_seed_val)) {}
  void set_current_seed(uint64_t seed) override { inner.set_current_seed(seed); }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override { return 0; }
  uint64_t current_seed() const override { return inner.current_seed(); }
  uint64_t seed() override { return inner.seed(); }
  void set_state(const c10::TensorImpl& state) override { inner.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return inner.unsafeGetGeneratorImpl()->get_state(); }
  CudaGenerator* clone_impl() const override {
    auto* copy = new CudaGenerator(device().index());
    copy->inner = inner.clone();
    return copy;
  }
  at::Generator inner;
};

DeviceIndex index_of(Device device) { return device.index() < 0 ? device_now : device.index(); }
Place place_of(const c10::Stream& s) { return {index_of(s.device()), s.id()}; }
c10::Stream stream_of(Place place) {
  return c10::Stream(c10::Stream::UNSAFE, Device(c10::kCUDA, place.device), place.stream);
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::kCUDA; }
  Device exchangeDevice(Device device) const override {
    const Device before = getDevice();
    setDevice(device);
    return before;
  }
  Device getDevice() const override { return {c10::kCUDA, device_now}; }
  void setDevice(Device device) const override { set_current_device(device.index()); }
  void uncheckedSetDevice(Device device) const noexcept override {
    if (device.index() >= 0) device_now = device.index();
  }
  DeviceIndex deviceCount() const noexcept override { return static_cast<DeviceIndex>(device_count()); }

  c10::Stream getStream(Device device) const override { return stream_of(current_place(device.index())); }
  c10::Stream getDefaultStream(Device device) const override { return stream_of({index_of(device), 0}); }
  c10::Stream getNewStream(Device device, int) const override { return stream_of({index_of(device), next_stream++}); }
  c10::Stream getStreamFromGlobalPool(Device device, bool) const override { return getNewStream(device, 0); }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    const auto before = getStream(stream.device());
    set_current_stream(place_of(stream));
    return before;
  }
  void* getStreamNativeHandle(const c10::Stream stream) const override { return reinterpret_cast<void*>(stream.id()); }
  bool queryStream(const c10::Stream& stream) const override { return advance(place_of(stream)); }
  void synchronizeStream(const c10::Stream& stream) const override {
    if (is_capturing(place_of(stream))) refuse_in_capture("the host waits for the stream");
    finish(place_of(stream));
  }
  void synchronizeDevice(DeviceIndex device) const override {
    if (is_capturing()) refuse_in_capture("the host waits for the device");
    finish_device(device < 0 ? device_now : device);
  }
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}

  void record(void** event, const c10::Stream& stream, DeviceIndex, c10::EventFlag) const override {
    if (!*event) *event = new Event;
    record_event(*static_cast<Event*>(*event), place_of(stream));
  }
  void block(void* event, const c10::Stream& stream) const override {
    if (event) wait_for_event(*static_cast<Event*>(event), place_of(stream));
  }
  bool queryEvent(void* event) const override { return !event || advance(*static_cast<Event*>(event)); }
  void synchronizeEvent(void* event) const override {
    if (event) finish(*static_cast<Event*>(event));
  }
  void destroyEvent(void* event, DeviceIndex) const noexcept override { delete static_cast<Event*>(event); }
  double elapsedTime(void*, void*, DeviceIndex) const override {
    TORCH_CHECK(false, "the simulated GPU shows no timing");
  }
} guard;

struct CUDAHooks final : at::CUDAHooksInterface {
  CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  const at::Generator& getDefaultGenerator(DeviceIndex device) const override { return default_generator(device); }
  at::Generator getNewGenerator(DeviceIndex device) const override {
    if (hand_out_default) return default_generator(device);
    return at::make_generator<CudaGenerator>(device < 0 ? device_now : device);
  }
  Device getDeviceFromPtr(void*) const override { return {c10::kCUDA, device_now}; }
  bool isPinnedPtr(const void* pointer) const override { return is_pinned(pointer); }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex current_device() const override { return device_now; }
  DeviceIndex deviceCount() const override { return static_cast<DeviceIndex>(device_count()); }
  void setCurrentDevice(DeviceIndex device) const override { set_current_device(device); }
  DeviceIndex getCurrentDevice() const override { return device_now; }
  DeviceIndex exchangeDevice(DeviceIndex device) const override {
    return guard.exchangeDevice({c10::kCUDA, device}).index();
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex device) const override { return exchangeDevice(device); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return pinned_allocator(); }
  c10::Allocator* getCUDADeviceAllocator() const override { return device_allocator(); }
  std::string showConfig() const override { return "a simulated GPU"; }
  int getNumGPUs() const override { return device_count(); }
  void deviceSynchronize(DeviceIndex device) const override { guard.synchronizeDevice(device); }
};
}  // namespace

int device_count() {
  static const int count = [] {
    const char* said = std::getenv("SIMULATED_GPU_DEVICES");
    const int n = said ? std::atoi(said) : 1;
    return n < 1 ? 1 : n > MAX_DEVICES ? MAX_DEVICES : n;
  }();
  return count;
}

void start() {
  static const int registered = pthread_atfork(nullptr, nullptr, [] { bad_fork = true; });
  TORCH_CHECK(!registered, "pthread_atfork failed");
}

bool is_in_bad_fork() { return bad_fork; }

bool deferred() {
  static const bool yes = std::getenv("SIMULATED_GPU_DEFERRED") && std::string(std::getenv("SIMULATED_GPU_DEFERRED")) != "0";
  return yes;
}

DeviceIndex current_device() { return device_now; }

void set_current_device(DeviceIndex device) {
  if (device < 0) return;
  TORCH_CHECK(device < device_count(), "CUDA error: invalid device ordinal (simulated)");
  device_now = device;
}

Place current_place(DeviceIndex device) {
  const DeviceIndex index = device < 0 ? device_now : device;
  return {index, stream_now[index]};
}

void set_current_stream(Place place) { stream_now[place.device] = place.stream; }

void set_sync_debug(int mode) { sync_mode = mode; }
int sync_debug() { return sync_mode; }

void host_waits(const char* what) {
  if (is_capturing(current_place())) refuse_in_capture(what);
  TORCH_CHECK(sync_mode < 2, "called a synchronizing CUDA operation (simulated: ", what, ")");
  if (sync_mode == 1) TORCH_WARN("called a synchronizing CUDA operation (simulated: ", what, ")");
}

const at::Generator& default_generator(DeviceIndex device) {
  static const std::vector<at::Generator> all = [] {
    std::vector<at::Generator> made;
    for (int i = 0; i < device_count(); ++i) made.push_back(at::make_generator<CudaGenerator>(static_cast<DeviceIndex>(i)));
    return made;
  }();
  return all.at(device < 0 ? device_now : device);
}

at::Generator& inner_generator(const at::Generator& cuda) {
  return static_cast<CudaGenerator*>(cuda.unsafeGetGeneratorImpl())->inner;
}

void hand_out_default_generators(bool yes) { hand_out_default = yes; }

void install_device() { c10::impl::device_guard_impl_registry[static_cast<size_t>(c10::kCUDA)].store(&guard); }

}  // namespace simulated

namespace at {
using simulated::CUDAHooks;
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, CUDAHooks)
}  // namespace at
