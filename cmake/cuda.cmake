# The CUDA library libc2c_ext_cuda.so, and c2c_ext_emulated: the same sources as plain C++, whose
# kernels run on the CPU, for tests only (cmake --build BUILD --target c2c_ext_emulated).
# Sets C2C_CUDA: is the CUDA library built? What is missing is said before torch is looked for.
#
# nvcc is called by its own commands and not as CMake's language CUDA, so that a trial decides
# whether it can be used, and `auto` goes on without it.

if(POLICY CMP0116)
  cmake_policy(SET CMP0116 NEW)  # nvcc's depfiles name objects by their whole path
endif()
set(C2C_EXT_CUDA "auto" CACHE STRING "build the CUDA part: auto (if nvcc works), 1, 0")
set_property(CACHE C2C_EXT_CUDA PROPERTY STRINGS auto 1 0)
set(C2C_EXT_CUDA_ARCHITECTURES "80-real;90a-real;90-virtual" CACHE STRING
    "what nvcc compiles for, as CMAKE_CUDA_ARCHITECTURES has it; later GPUs run the virtual one")
if(NOT C2C_EXT_CUDA MATCHES "^(auto|0|1)$")
  message(FATAL_ERROR "C2C_EXT_CUDA must be auto, 1 or 0, got '${C2C_EXT_CUDA}'.")
endif()

set(C2C_OLDEST_CUDA "12.5")  # whose headers have what the Hopper path asks the driver for

set(c2c_cuda_kernels csrc/cuda/row_kernels.cu csrc/cuda/fused_gemm.cu csrc/cuda/hopper_gemm.cu
    csrc/cuda/train_kernels.cu csrc/cuda/train_cache_kernels.cu)
set(c2c_cuda_host csrc/cuda/fuse_cuda.cpp csrc/cuda/hopper_fuse.cpp csrc/cuda/fuse_train_cuda.cpp
    csrc/cuda/runtime.cpp csrc/checks.cpp csrc/train/check_call.cpp csrc/train/matrices.cpp)

# ---- the compiler ------------------------------------------------------------------------------
set(c2c_gencode)
foreach(entry IN LISTS C2C_EXT_CUDA_ARCHITECTURES)
  if(NOT entry MATCHES "^([0-9]+[af]?)(-real|-virtual)?$")
    message(FATAL_ERROR "C2C_EXT_CUDA_ARCHITECTURES must have entries like 80-real, 90a-real or "
                        "90-virtual, got '${entry}'.")
  endif()
  set(number "${CMAKE_MATCH_1}")
  set(kind "${CMAKE_MATCH_2}")
  if(NOT kind STREQUAL "-virtual")
    list(APPEND c2c_gencode "-gencode=arch=compute_${number},code=sm_${number}")
  endif()
  if(NOT kind STREQUAL "-real")
    list(APPEND c2c_gencode "-gencode=arch=compute_${number},code=compute_${number}")
  endif()
endforeach()
set(c2c_nvcc_flags -std=c++17 -O3 "-ccbin=${CMAKE_CXX_COMPILER}"
    -Xcompiler=-fPIC,-fvisibility=hidden,-Wall)

# Sets `reason` to why nvcc cannot be used, or to nothing, and C2C_CUDA_INCLUDE, C2C_CUDART.
function(c2c_try_nvcc reason)
  execute_process(COMMAND "${C2C_NVCC}" --version OUTPUT_VARIABLE said ERROR_VARIABLE said)
  string(REGEX MATCH "release ([0-9]+\\.[0-9]+)" said "${said}")
  if(NOT said)
    set(${reason} "it does not say of which CUDA it is" PARENT_SCOPE)
    return()
  endif()
  if(CMAKE_MATCH_1 VERSION_LESS C2C_OLDEST_CUDA)
    set(${reason} "it is of CUDA ${CMAKE_MATCH_1}, ${C2C_OLDEST_CUDA} or newer is needed" PARENT_SCOPE)
    return()
  endif()
  set(trial "${CMAKE_CURRENT_BINARY_DIR}/cuda_trial")
  file(REMOVE "${trial}/trial.o")
  file(WRITE "${trial}/trial.cu" "#include <cmath>\n#include <cstdint>\n"
       "__global__ void trial(float* x) { *x = std::sqrt(*x); }\n")
  execute_process(COMMAND "${C2C_NVCC}" ${c2c_nvcc_flags} ${c2c_gencode} -c "${trial}/trial.cu"
                  -o "${trial}/trial.o" OUTPUT_VARIABLE said ERROR_VARIABLE said)
  if(NOT EXISTS "${trial}/trial.o")
    string(REGEX MATCH "[^\n]*(error|fatal|unsupported)[^\n]*" said "${said}")
    set(${reason} "it cannot compile a kernel (${said})" PARENT_SCOPE)
    return()
  endif()
  # nvcc may be a script or a link to elsewhere: it knows itself where its toolkit is.
  execute_process(COMMAND "${C2C_NVCC}" --dryrun -c "${trial}/trial.cu" -o "${trial}/dry.o"
                  OUTPUT_VARIABLE said ERROR_VARIABLE said)
  string(REGEX MATCH "#\\$ TOP=([^\r\n]*)" said "${said}")
  get_filename_component(top "${CMAKE_MATCH_1}" REALPATH)
  file(GLOB targets "${top}/targets/*")
  find_path(C2C_CUDA_INCLUDE cuda_runtime_api.h HINTS "${top}" ${targets} PATH_SUFFIXES include
            NO_DEFAULT_PATH)
  find_library(C2C_CUDART cudart_static HINTS "${top}" ${targets} PATH_SUFFIXES lib64 lib
               NO_DEFAULT_PATH)
  if(NOT C2C_CUDA_INCLUDE OR NOT C2C_CUDART)
    set(${reason} "its toolkit in '${top}' lacks cuda_runtime_api.h or libcudart_static.a"
        PARENT_SCOPE)
    return()
  endif()
  set(${reason} "" PARENT_SCOPE)
endfunction()

set(C2C_CUDA OFF)
find_program(C2C_NVCC nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATH_SUFFIXES bin)
if(C2C_EXT_CUDA STREQUAL "1" AND NOT C2C_NVCC)
  message(FATAL_ERROR "C2C_EXT_CUDA=1 needs nvcc, and none was found on PATH, in CUDA_HOME or in "
                      "CUDA_PATH. Install the CUDA toolkit, or build with C2C_EXT_CUDA=0.")
endif()
if(C2C_NVCC AND NOT C2C_EXT_CUDA STREQUAL "0")
  c2c_try_nvcc(reason)
  if(reason STREQUAL "")
    set(C2C_CUDA ON)
  elseif(C2C_EXT_CUDA STREQUAL "1")
    message(FATAL_ERROR "C2C_EXT_CUDA=1, but ${C2C_NVCC} cannot be used: ${reason}.")
  else()
    message(STATUS "Without CUDA kernels: ${C2C_NVCC} cannot be used: ${reason}.")
  endif()
endif()

# ---- the libraries; called where torch_cpu_shims is known --------------------------------------
# Object of one .cu file; further arguments are nvcc's.
function(c2c_nvcc_object source result)
  get_filename_component(name "${source}" NAME)
  set(object "${CMAKE_CURRENT_BINARY_DIR}/cuda/${name}.o")
  file(MAKE_DIRECTORY "${CMAKE_CURRENT_BINARY_DIR}/cuda")
  set(depfile)
  if(CMAKE_GENERATOR MATCHES "Ninja" OR NOT CMAKE_VERSION VERSION_LESS 3.20)
    set(depfile DEPFILE "${object}.d")
  endif()
  add_custom_command(
    OUTPUT "${object}"
    COMMAND "${C2C_NVCC}" ${c2c_nvcc_flags} ${ARGN} -MMD -MF "${object}.d"
            -c "${CMAKE_CURRENT_SOURCE_DIR}/${source}" -o "${object}"
    DEPENDS "${CMAKE_CURRENT_SOURCE_DIR}/${source}" ${depfile}
    COMMENT "nvcc ${source}" VERBATIM)
  set(${result} "${object}" PARENT_SCOPE)
endfunction()

function(c2c_add_cuda_libraries)
  # Object files beside C++ sources; libcudart's symbols stay inside, torch has its own copy.
  if(C2C_CUDA)
    set(objects)
    foreach(source IN LISTS c2c_cuda_kernels)
      c2c_nvcc_object("${source}" object ${c2c_gencode})
      list(APPEND objects "${object}")
    endforeach()
    add_library(c2c_ext_cuda SHARED ${c2c_cuda_host} ${objects})
    target_include_directories(c2c_ext_cuda SYSTEM PRIVATE "${C2C_CUDA_INCLUDE}")
    target_link_libraries(c2c_ext_cuda PRIVATE torch_cpu_shims "${C2C_CUDART}" rt pthread
                          ${CMAKE_DL_LIBS} "-Wl,--exclude-libs,ALL")
    c2c_op_options(c2c_ext_cuda)
    if("${C2C_EXT_CUDA_ARCHITECTURES}" MATCHES "90a(-real)?(;|$)")
      target_compile_definitions(c2c_ext_cuda PRIVATE C2C_HAS_SM_90A)
    endif()
  endif()

  set_source_files_properties(${c2c_cuda_kernels} PROPERTIES LANGUAGE CXX COMPILE_OPTIONS "-x;c++")
  add_library(c2c_ext_emulated SHARED EXCLUDE_FROM_ALL ${c2c_cuda_host} ${c2c_cuda_kernels})
  target_compile_definitions(c2c_ext_emulated PRIVATE C2C_EMULATE)
  # Kernels read memory as wider types, and have nvcc unroll loops (csrc/cuda/emulation.h).
  target_compile_options(c2c_ext_emulated PRIVATE -fno-strict-aliasing -Wno-unknown-pragmas)
  target_link_libraries(c2c_ext_emulated PRIVATE torch_cpu_shims)
  c2c_op_options(c2c_ext_emulated)
endfunction()
