// What C++ asks of Python: the kernels that Triton's interpreter runs.
#pragma once
#include <cstdint>

namespace simulated {

void call_python(int64_t number);  // raises where the kernel did
void drop_python(int64_t number);

}  // namespace simulated
