// Tells a kernel the dtype of the tensors behind its addresses.
#pragma once

namespace fastgan {

enum class Dtype { f32, f64, f16, bf16 };

}  // namespace fastgan
