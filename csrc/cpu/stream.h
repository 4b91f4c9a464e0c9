// Stores that bypass the caches, for results too large to stay in them until they are read.  A plain store first reads
// the line that it overwrites, and evicts data that the kernel is about to read.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/dtype_tag.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace fastgan {
namespace FASTGAN_ISA {
namespace {

// On cores with a 2 MB private cache, two threads copy 8 MB equally fast either way, and copy 16 MB faster when they
// bypass the caches, including the reads of the next copy.
constexpr std::int64_t kStreamed = std::int64_t{16} << 20;  // bytes

#if defined(__AVX512F__)
constexpr std::uintptr_t kStreamBytes = 64;
inline void stream_vector(const char* from, char* to) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_loadu_si512(from));
}
#elif defined(__AVX__)
constexpr std::uintptr_t kStreamBytes = 32;
inline void stream_vector(const char* from, char* to) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
#elif defined(__SSE2__)
constexpr std::uintptr_t kStreamBytes = 16;
inline void stream_vector(const char* from, char* to) {
  _mm_stream_si128(reinterpret_cast<__m128i*>(to), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
#else
constexpr std::uintptr_t kStreamBytes = 16;
inline void stream_vector(const char* from, char* to) { std::memcpy(to, from, kStreamBytes); }
#endif

inline bool is_streamed([[maybe_unused]] std::int64_t bytes) {
#if defined(__SSE2__)
  return bytes >= kStreamed;
#else
  return false;
#endif
}
// Half-precision results are converted as they are stored, through the caches.
inline bool is_streamed(Dtype dtype, std::int64_t elements) {
  return (dtype == Dtype::f32 && is_streamed(elements * 4)) || (dtype == Dtype::f64 && is_streamed(elements * 8));
}

// The n values of a line in the L1 cache.  `parallel_for` and `each_thread` make them visible to other threads.
template <class A>
void stream(const A* values, std::int64_t n, A* to) {
  const char* from = reinterpret_cast<const char*>(values);
  char* at = reinterpret_cast<char*>(to);
  std::size_t left = sizeof(A) * static_cast<std::size_t>(n);
#if defined(__SSE2__)
  const std::size_t skewed = (kStreamBytes - reinterpret_cast<std::uintptr_t>(at) % kStreamBytes) % kStreamBytes;
  const std::size_t head = skewed < left ? skewed : left;
  std::memcpy(at, from, head);
  for (at += head, from += head, left -= head; left >= kStreamBytes;
       at += kStreamBytes, from += kStreamBytes, left -= kStreamBytes)
    stream_vector(from, at);
#endif
  std::memcpy(at, from, left);
}

}  // namespace
}  // namespace FASTGAN_ISA
}  // namespace fastgan
