// Each op has one source file, compiled once per instruction set. The best set of this processor is chosen at run time.
//
// FASTGAN_ISA is the namespace of each compilation.  Everything that a kernel file instantiates must be in it:
// with a symbol shared between compilations, the linker could put AVX-512 code under a baseline caller.
#pragma once

namespace fastgan {

enum class Isa { baseline, avx2, avx512 };

inline bool is_intel() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

inline Isa best_isa() {
#if defined(__x86_64__)
  static const Isa best = [] {
    __builtin_cpu_init();
#ifdef FASTGAN_HAVE_AVX512
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
      return Isa::avx512;
#endif
#ifdef FASTGAN_HAVE_AVX2
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
      return Isa::avx2;
#endif
    return Isa::baseline;
  }();
  return best;
#else
  return Isa::baseline;
#endif
}

}  // namespace fastgan

#ifdef FASTGAN_HAVE_AVX512
#define FASTGAN_CASE_AVX512(call) \
  case fastgan::Isa::avx512:      \
    return fastgan::avx512::call;
#else
#define FASTGAN_CASE_AVX512(call)
#endif
#ifdef FASTGAN_HAVE_AVX2
#define FASTGAN_CASE_AVX2(call) \
  case fastgan::Isa::avx2:      \
    return fastgan::avx2::call;
#else
#define FASTGAN_CASE_AVX2(call)
#endif

#ifndef FASTGAN_NARROWEST  // built for every processor, except with sanitizers
#define FASTGAN_NARROWEST baseline
#endif

#define FASTGAN_DISPATCH(isa, call)            \
  switch (isa) {                               \
    FASTGAN_CASE_AVX512(call)                  \
    FASTGAN_CASE_AVX2(call)                    \
    default:                                   \
      return fastgan::FASTGAN_NARROWEST::call; \
  }
