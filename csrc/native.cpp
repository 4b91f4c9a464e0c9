// fastgan._native: the CPU kernels as functions of addresses and sizes.  It does not depend on torch: callers check
// shapes, keep the memory alive and pass contiguous data.
#include "bindings/bindings.h"

#include <stdexcept>

namespace fastgan {

Isa isa_of(const std::string& name) {
  if (name == "best") return best_isa();
  if (name == "baseline") return Isa::baseline;
#ifdef FASTGAN_HAVE_AVX2
  if (name == "avx2" && best_isa() >= Isa::avx2) return Isa::avx2;
#endif
#ifdef FASTGAN_HAVE_AVX512
  if (name == "avx512" && best_isa() >= Isa::avx512) return Isa::avx512;
#endif
  throw std::invalid_argument("instruction set " + name + " is not in this build or not supported by this processor");
}

}  // namespace fastgan

namespace {

const char* name_of(fastgan::Isa isa) {
  return isa == fastgan::Isa::avx512 ? "avx512" : isa == fastgan::Isa::avx2 ? "avx2" : "baseline";
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.def("isa", [] { return name_of(fastgan::best_isa()); });
  m.def("is_intel", &fastgan::is_intel);
  fastgan::bind_minibatch_discrimination(m);
  fastgan::bind_minibatch_stddev(m);
  fastgan::bind_attention(m);
  fastgan::bind_avg_pool(m);
  fastgan::bind_conv(m);
  fastgan::bind_bias_act(m);
  fastgan::bind_modules(m);
  fastgan::bind_norm(m);
  fastgan::bind_spectral_norm(m);
  fastgan::bind_upfirdn2d(m);
}
