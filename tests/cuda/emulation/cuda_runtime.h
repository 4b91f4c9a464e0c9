// The part of the CUDA runtime that csrc/ uses, over host memory.  The device is small, so that small weights already
// need several waves and more tiles than there are slots.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "grid.h"

#define CUDART_VERSION 13000
#define __host__
#define __device__
#define __global__
#define __noinline__
#define __grid_constant__
#define __launch_bounds__(...)

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorCooperativeLaunchTooLarge };
using cudaStream_t = struct cudaStream*;
enum cudaMemoryType { cudaMemoryTypeHost, cudaMemoryTypeDevice, cudaMemoryTypeManaged };
struct cudaPointerAttributes {
  cudaMemoryType type;
  int device;
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrL2CacheSize,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
using cudaMemPool_t = struct cudaMemPool*;
enum cudaMemAllocationType { cudaMemAllocationTypePinned };
enum cudaMemLocationType { cudaMemLocationTypeDevice };
struct cudaMemPoolProps {
  cudaMemAllocationType allocType;
  struct {
    cudaMemLocationType type;
    int id;
  } location;
};
enum cudaMemPoolAttr { cudaMemPoolAttrReleaseThreshold };

namespace emulation {
constexpr int kMultiprocessors = 3, kSharedBytes = 16 << 10, kL2Bytes = 12 << 10;
inline int allowed_shared_bytes = 0;
// Shared memory of a multiprocessor that this process can have.
inline std::size_t available_shared_bytes() {
  const char* said = std::getenv("FASTGAN_EMULATION_SHARED_BYTES");
  return said ? std::strtoul(said, nullptr, 10) : std::size_t{kSharedBytes};
}
}  // namespace emulation

inline const char* cudaGetErrorName(cudaError_t) { return "emulated"; }
inline const char* cudaGetErrorString(cudaError_t) { return "emulated error"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }

inline cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* to, const void* address) {
  *to = {address == nullptr ? cudaMemoryTypeHost : cudaMemoryTypeDevice, 0};
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  *value = which == cudaDevAttrMultiProcessorCount            ? emulation::kMultiprocessors
           : which == cudaDevAttrMaxSharedMemoryPerBlockOptin ? emulation::kSharedBytes
                                                              : emulation::kL2Bytes;
  return cudaSuccess;
}

inline cudaError_t cudaMemPoolCreate(cudaMemPool_t* pool, const cudaMemPoolProps*) {
  return *pool = nullptr, cudaSuccess;
}
inline cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr, void*) { return cudaSuccess; }
inline cudaError_t cudaMallocFromPoolAsync(void** to, std::size_t bytes, cudaMemPool_t, cudaStream_t) {
  *to = std::malloc(bytes);
  std::memset(*to, emulation::kPoison, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaFreeAsync(void* data, cudaStream_t) { return std::free(data), cudaSuccess; }

template <class Parameter>
cudaError_t cudaFuncSetAttribute(void (*)(Parameter), cudaFuncAttribute, int bytes) {
  emulation::allowed_shared_bytes = bytes;
  return bytes <= emulation::kSharedBytes ? cudaSuccess : cudaErrorInvalidValue;
}

template <class Parameter>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*)(Parameter), int,
                                                          std::size_t shared_bytes) {
  return *blocks = shared_bytes <= emulation::available_shared_bytes(), cudaSuccess;
}

template <class Parameter>
cudaError_t cudaLaunchCooperativeKernel(void (*kernel)(Parameter), dim3 blocks, dim3 threads, void** arguments,
                                        std::size_t shared_bytes, cudaStream_t) {
  if (blocks.x > emulation::kMultiprocessors) return cudaErrorCooperativeLaunchTooLarge;
  if (shared_bytes > emulation::available_shared_bytes()) return cudaErrorCooperativeLaunchTooLarge;
  if (shared_bytes > static_cast<std::size_t>(emulation::allowed_shared_bytes)) return cudaErrorInvalidValue;
  const auto& argument = *static_cast<const Parameter*>(arguments[0]);
  emulation::Grid(blocks.x, threads.x, shared_bytes, [&] { kernel(argument); }).run();
  return cudaSuccess;
}

// Blocks of a launch that is not cooperative know nothing of each other: one after another, in the order of the fibers.
template <class Parameter>
cudaError_t cudaLaunchKernel(void (*kernel)(Parameter), dim3 blocks, dim3 threads, void** arguments,
                             std::size_t shared_bytes, cudaStream_t) {
  if (shared_bytes > std::size_t{48} << 10) return cudaErrorInvalidValue;
  const auto& argument = *static_cast<const std::remove_const_t<Parameter>*>(arguments[0]);
  for (unsigned i = 0; i < blocks.x; ++i) {
    const unsigned block = emulation::reversed() ? blocks.x - 1 - i : i;
    emulation::Grid(1, threads.x, shared_bytes, [&] { kernel(argument); }, block, blocks.x).run();
  }
  return cudaSuccess;
}
