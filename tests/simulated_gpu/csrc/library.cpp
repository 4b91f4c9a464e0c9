// The whole library in one translation unit: PyTorch's headers, which are most of the work, are read once.
#include "device.cpp"
#include "graphs.cpp"
#include "memory.cpp"
#include "operators.cpp"
#include "python.cpp"
#include "recurrent.cpp"
#include "streams.cpp"
#include "translation.cpp"
