// CUDA errors as exceptions, a scope for the current device, and stream-ordered scratch memory.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>

namespace fastgan {

inline void check_cuda(cudaError_t status, const char* call) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // clear the error, so that the next call does not report it again
  throw std::runtime_error(std::string(call) + ": " + cudaGetErrorName(status) + ": " + cudaGetErrorString(status));
}
#define FASTGAN_CUDA(call) ::fastgan::check_cuda(call, #call)

// Makes the device of `address` current for its lifetime, because a default stream belongs to no device.
class DeviceOf {
 public:
  explicit DeviceOf(const void* address) {
    cudaPointerAttributes attributes;
    FASTGAN_CUDA(cudaPointerGetAttributes(&attributes, address));
    if (attributes.type != cudaMemoryTypeDevice && attributes.type != cudaMemoryTypeManaged)
      throw std::runtime_error("the address is not on a CUDA device");
    device_ = attributes.device;
    FASTGAN_CUDA(cudaGetDevice(&before_));
    if (device_ != before_) FASTGAN_CUDA(cudaSetDevice(device_));
  }
  ~DeviceOf() {
    if (device_ != before_) cudaSetDevice(before_);
  }
  DeviceOf(const DeviceOf&) = delete;
  DeviceOf& operator=(const DeviceOf&) = delete;

  int index() const { return device_; }
  int attribute(cudaDeviceAttr which) const {
    int value = 0;
    FASTGAN_CUDA(cudaDeviceGetAttribute(&value, which, device_));
    return value;
  }

 private:
  int device_ = 0, before_ = 0;
};

// Uninitialized device memory, freed in stream order.  It has its own pool, which keeps freed memory: the default pool
// would return memory to the driver at every synchronization.
class Scratch {
 public:
  Scratch(const DeviceOf& device, std::size_t bytes, cudaStream_t stream) : stream_(stream) {
    FASTGAN_CUDA(cudaMallocFromPoolAsync(&data_, bytes, pool(device.index()), stream));
  }
  ~Scratch() { cudaFreeAsync(data_, stream_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  void* data() const { return data_; }

 private:
  static cudaMemPool_t pool(int device) {
    static std::mutex mutex;
    static std::map<int, cudaMemPool_t> pools;
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = pools.find(device);
    if (found != pools.end()) return found->second;
    cudaMemPoolProps properties = {};
    properties.allocType = cudaMemAllocationTypePinned;
    properties.location.type = cudaMemLocationTypeDevice;
    properties.location.id = device;
    cudaMemPool_t made;
    FASTGAN_CUDA(cudaMemPoolCreate(&made, &properties));
    std::uint64_t keep = UINT64_MAX;
    FASTGAN_CUDA(cudaMemPoolSetAttribute(made, cudaMemPoolAttrReleaseThreshold, &keep));
    return pools[device] = made;
  }

  void* data_ = nullptr;
  cudaStream_t stream_;
};

}  // namespace fastgan
