include(CheckLanguage)
if(NOT CMAKE_CUDA_COMPILER)
  check_language(CUDA)
endif()

# Must come before enable_language, which would otherwise choose the compiler's default.
if(NOT CMAKE_CUDA_ARCHITECTURES AND NOT DEFINED ENV{CUDAARCHS})
  execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --list-gpu-arch OUTPUT_VARIABLE supported)
  foreach(arch 80 86 89 90 100 120)
    if(supported MATCHES "compute_${arch}[^0-9]")
      list(APPEND architectures ${arch}-real)
      set(newest ${arch})
    endif()
  endforeach()
  list(REMOVE_ITEM architectures ${newest}-real)
  set(CMAKE_CUDA_ARCHITECTURES ${architectures} ${newest} CACHE STRING "CUDA architectures")
endif()
enable_language(CUDA)
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)

file(GLOB kernels CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/cuda/*.cu)
pybind11_add_module(_native_cuda MODULE NO_EXTRAS native_cuda.cpp ${kernels})
# Static, so that the module imports without a driver and never conflicts with torch's copy of the runtime.
set_target_properties(_native_cuda PROPERTIES CUDA_RUNTIME_LIBRARY Static)
target_include_directories(_native_cuda PRIVATE ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
target_link_libraries(_native_cuda PRIVATE fastgan_flags)
target_compile_options(_native_cuda PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra>)
if(NOT APPLE)
  target_link_options(_native_cuda PRIVATE -s)
endif()

# A build for one architecture writes each kernel's registers, shared memory and spills to ptxas/<source>.txt. Those of
# several, which are compiled in parallel, would interleave their lines.
if(CMAKE_CUDA_ARCHITECTURES MATCHES "^[0-9]+[a-z]?(-real)?$")
  target_compile_options(_native_cuda PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-Xptxas=-v>)
  set_target_properties(
    _native_cuda PROPERTIES CUDA_COMPILER_LAUNCHER
                            "sh;${CMAKE_CURRENT_SOURCE_DIR}/cmake/ptxas-report.sh;${CMAKE_CURRENT_BINARY_DIR}/ptxas")
else()
  target_compile_options(_native_cuda PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:--threads=2>)
endif()

file(
  WRITE ${CMAKE_CURRENT_BINARY_DIR}/cuda.json
  "{\"nvcc\": \"${CMAKE_CUDA_COMPILER_VERSION}\", \"architectures\": \"${CMAKE_CUDA_ARCHITECTURES}\"}\n")
