// Scratch memory and a parallel loop, in the namespace of the instruction set (see isa.h).
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __linux__
#include <sys/mman.h>
#endif
#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace fastgan {
namespace FASTGAN_ISA {

// Uninitialized memory, aligned to a cache line.
template <class T>
class Buffer {
 public:
  explicit Buffer(std::int64_t size)
      : data_(static_cast<T*>(::operator new(sizeof(T) * static_cast<std::size_t>(size), std::align_val_t{64}))) {}
  ~Buffer() { ::operator delete(data_, std::align_val_t{64}); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T& operator[](std::int64_t i) { return data_[i]; }
  T* data() { return data_; }

 private:
  T* data_;
};

// A large output is often newly mapped memory. Page faults on its 4 KB pages cost as much as the kernel.
inline void ask_for_huge_pages(void* begin, std::int64_t bytes) {
#ifdef __linux__
  constexpr std::uintptr_t page = std::uintptr_t{2} << 20;
  const std::uintptr_t first = (reinterpret_cast<std::uintptr_t>(begin) + page - 1) / page * page;
  const std::uintptr_t last =
      (reinterpret_cast<std::uintptr_t>(begin) + static_cast<std::uintptr_t>(bytes)) / page * page;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // a hint: may fail
#else
  (void)begin, (void)bytes;
#endif
}

// A barrier does not wait for stores that bypass the caches (cpu/stream.h).
inline void finish_streams() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// body(i) for i in [0, n).  The static schedule gives a thread the same indices in every loop over the same n, so that
// data from one phase is still in its core's cache in the next.
template <class Body>
void parallel_for(std::int64_t n, int threads, const Body& body) {
#ifdef _OPENMP
  if (threads > 1 && n > 1) {
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static) nowait
      for (std::int64_t i = 0; i < n; ++i) body(i);
      finish_streams();
    }
    return;
  }
#endif
  (void)threads;
  for (std::int64_t i = 0; i < n; ++i) body(i);
  finish_streams();
}

// body(thread, threads) once in each thread, with at most the given number of threads.
template <class Body>
void each_thread(int threads, const Body& body) {
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    {
      body(omp_get_thread_num(), omp_get_num_threads());
      finish_streams();
    }
    return;
  }
#endif
  (void)threads;
  body(0, 1);
  finish_streams();
}

// body(i, thread) for i in [0, n), thread in [0, threads).  The next free thread takes the next index.
template <class Body>
void each_task(std::int64_t n, int threads, const Body& body) {
#ifdef _OPENMP
  if (threads > 1 && n > 1) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (std::int64_t i = 0; i < n; ++i) body(i, omp_get_thread_num());
    return;
  }
#endif
  (void)threads;
  for (std::int64_t i = 0; i < n; ++i) body(i, 0);
}

}  // namespace FASTGAN_ISA
}  // namespace fastgan
