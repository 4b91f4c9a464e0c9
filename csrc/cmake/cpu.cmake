include(CheckCXXCompilerFlag)

add_library(cpu_flags INTERFACE)
target_link_libraries(cpu_flags INTERFACE fastgan_flags)
# Neither changes a result: errno and the exception flags are never read.
set(math_flags -fno-math-errno -fno-trapping-math)
target_compile_options(cpu_flags INTERFACE ${math_flags})

set(flags_avx2 -mavx2 -mfma -mf16c)
set(flags_avx512 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512)

set(isas baseline)
set(FASTGAN_ISAS avx2 avx512 CACHE STRING "What is built beside the baseline, where the compiler knows it")
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  foreach(isa ${FASTGAN_ISAS})
    list(JOIN flags_${isa} " " flags)
    check_cxx_compiler_flag("${flags}" FASTGAN_CXX_${isa})
    if(FASTGAN_CXX_${isa})
      list(APPEND isas ${isa})
      string(TOUPPER ${isa} name)
      target_compile_definitions(cpu_flags INTERFACE FASTGAN_HAVE_${name})
    endif()
  endforeach()
endif()

find_package(OpenMP COMPONENTS CXX)
if(OpenMP_CXX_FOUND)
  target_link_libraries(cpu_flags INTERFACE OpenMP::OpenMP_CXX)
  set(openmp ON)
else()
  # The pragmas are meant to vanish.
  target_compile_options(cpu_flags INTERFACE -Wno-unknown-pragmas)
  set(openmp OFF)
endif()

# For the kernels alone: the bindings are templates of others, and slow to compile so.
if(FASTGAN_SANITIZE)
  set(sanitizers -fsanitize=address,undefined -fno-sanitize-recover=all)
  set(sanitized ${sanitizers} -fno-omit-frame-pointer -g1)
  target_link_options(cpu_flags INTERFACE ${sanitizers})
endif()

file(GLOB ops CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/cpu/*.cpp)
# The linker keeps the first copy of an inline function that several objects hold, so the order here,
# narrowest set first, is what keeps AVX code out of the functions that every machine runs.
foreach(isa ${isas})
  add_library(cpu_${isa} OBJECT ${ops})
  target_link_libraries(cpu_${isa} PRIVATE cpu_flags)
  target_compile_definitions(cpu_${isa} PRIVATE FASTGAN_ISA=${isa})
  target_compile_options(cpu_${isa} PRIVATE ${flags_${isa}} ${sanitized})
  list(APPEND objects $<TARGET_OBJECTS:cpu_${isa}>)
endforeach()

file(GLOB bindings CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/bindings/*.cpp)
pybind11_add_module(_native MODULE NO_EXTRAS native.cpp ${bindings} ${objects})
# As one file: each alone takes almost as long, most of it in pybind11's headers.
set_target_properties(_native PROPERTIES UNITY_BUILD ON UNITY_BUILD_BATCH_SIZE 0)
target_link_libraries(_native PRIVATE cpu_flags)
if(NOT FASTGAN_SANITIZE AND NOT APPLE)
  target_link_options(_native PRIVATE -s)
endif()

string(TOUPPER ${CMAKE_BUILD_TYPE} build_type)
list(JOIN math_flags " " flags)
string(STRIP "${CMAKE_CXX_FLAGS} ${CMAKE_CXX_FLAGS_${build_type}} ${flags}" flags)
string(JOIN "\", \"" isa_list ${isas})
file(
  WRITE ${CMAKE_CURRENT_BINARY_DIR}/native.json
  "{\"compiler\": \"${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}\", \"flags\": \"${flags}\", \
\"openmp\": \"${openmp}\", \"isa\": [\"${isa_list}\"]}\n")
