// Block-level helpers: conversions, 16-byte vectors, sums in a fixed order, dynamic shared memory.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "common/dtype_tag.h"

// This is a macro, so that an emulation on the CPU can give each block its own memory.
#ifndef FASTGAN_DYNAMIC_SHARED
#define FASTGAN_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

namespace fastgan {
namespace device {

template <class T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};

__device__ inline float load(float x) { return x; }
__device__ inline double load(double x) { return x; }
__device__ inline float load(__half x) { return __half2float(x); }
__device__ inline float load(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline void store(float& x, float value) { x = value; }
__device__ inline void store(double& x, double value) { x = value; }
__device__ inline void store(__half& x, float value) { x = __float2half_rn(value); }
__device__ inline void store(__nv_bfloat16& x, float value) { x = __float2bfloat16_rn(value); }

// kWidth elements that are read and written together.
template <class T, int kWidth>
struct alignas(sizeof(T) * kWidth) Vector {
  T at[kWidth];
};
template <class T>
constexpr int kWide = 16 / static_cast<int>(sizeof(T));

template <class T>
__device__ T warp_sum(T x) {
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
  return x;
}

// Returns the sum over the block in every thread.  `memory` holds one T per warp.
template <class T, int kThreads>
__device__ T block_sum(T x, T* memory) {
  x = warp_sum(x);
  __syncthreads();  // some threads may still be reading the previous sum
  if (threadIdx.x % 32 == 0) memory[threadIdx.x / 32] = x;
  __syncthreads();
  T sum = 0;
  for (int w = 0; w < kThreads / 32; ++w) sum += memory[w];
  return sum;
}

// body(a value of the type that dtype names)
template <class Body>
void with_dtype(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::f64:
      return body(double());
    case Dtype::f32:
      return body(float());
    case Dtype::f16:
      return body(__half());
    case Dtype::bf16:
      return body(__nv_bfloat16());
  }
}

}  // namespace device
}  // namespace fastgan
