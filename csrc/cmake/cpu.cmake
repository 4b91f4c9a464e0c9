include(CheckCXXCompilerFlag)

add_library(cpu_flags INTERFACE)
target_link_libraries(cpu_flags INTERFACE fastgan_flags)
# These flags change no results: errno and the exception flags are never read.
set(math_flags -fno-math-errno -fno-trapping-math)
target_compile_options(cpu_flags INTERFACE ${math_flags})

set(flags_avx2 -mavx2 -mfma -mf16c)
set(flags_avx512 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512)

set(isas baseline)
set(FASTGAN_ISAS avx2 avx512 CACHE STRING "Instruction sets to build in addition to the baseline, if supported")
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

# With sanitizers, sources take long to compile, and those of all instruction sets are the same: no baseline.
list(LENGTH isas count)
if(FASTGAN_SANITIZE AND count GREATER 1)
  list(REMOVE_ITEM isas baseline)
  list(GET isas 0 narrowest)
  target_compile_definitions(cpu_flags INTERFACE FASTGAN_NARROWEST=${narrowest})
endif()

find_package(OpenMP COMPONENTS CXX)
if(OpenMP_CXX_FOUND)
  target_link_libraries(cpu_flags INTERFACE OpenMP::OpenMP_CXX)
  set(openmp ON)
else()
  # Without OpenMP the pragmas have no effect.
  target_compile_options(cpu_flags INTERFACE -Wno-unknown-pragmas)
  set(openmp OFF)
endif()

# Only for the kernels: the bindings consist of other libraries' templates, and compile slowly with sanitizers.
if(FASTGAN_SANITIZE)
  set(sanitizers -fsanitize=address,undefined -fno-sanitize-recover=all)
  set(sanitized ${sanitizers} -fno-omit-frame-pointer -g1)
  target_link_options(cpu_flags INTERFACE ${sanitizers})
endif()

file(GLOB ops CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/cpu/*.cpp)
# If several objects contain the same inline function, the linker keeps the first copy. The narrowest instruction set
# must therefore come first, to keep AVX code out of functions that run on every machine.
foreach(isa ${isas})
  add_library(cpu_${isa} OBJECT ${ops})
  target_link_libraries(cpu_${isa} PRIVATE cpu_flags)
  target_compile_definitions(cpu_${isa} PRIVATE FASTGAN_ISA=${isa})
  target_compile_options(cpu_${isa} PRIVATE ${flags_${isa}} ${sanitized})
  list(APPEND objects $<TARGET_OBJECTS:cpu_${isa}>)
endforeach()

file(GLOB bindings CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/bindings/*.cpp)
pybind11_add_module(_native MODULE NO_EXTRAS native.cpp ${bindings} ${objects})
# One unity file: each file alone takes almost as long, mostly for pybind11's headers.
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
