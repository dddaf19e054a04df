# Whether the CUDA module can be built, and the reason if not.
#
# unet_rt_cuda_status(<status> <wanted> <sources...>): sets <status> to "built" or to a sentence saying why there will be
# no CUDA module. If it is built, UNET_RT_CUDA_COMPILER is the compiler, and UNET_RT_CUDA_ARCHITECTURES those of 7.5 to
# 12.0 that it knows: machine code for each, and the newest in a form that later devices compile themselves. <wanted> is UNET_RT_CUDA: with AUTO nothing here can fail, whatever is wrong with the compiler; with ON
# everything but "built" is an error.
#
# The compiler is tried in a project of its own: enable_language(CUDA) with a stale or odd nvcc (one that does not know
# the host compiler, or a script that no longer finds its toolkit) would end the configuration of a CPU build.

function(unet_rt_cuda_status result wanted)
  if(wanted STREQUAL "OFF")
    set(status "switched off when this was built (UNET_RT_CUDA=OFF)")
  else()
    _unet_rt_try_cuda(status)
    if(status STREQUAL "built" AND NOT ARGN)
      set(status "a CUDA compiler was found and works, but this version of unet-rt has no CUDA kernels")
    endif()
    if(wanted STREQUAL "ON" AND NOT status STREQUAL "built")
      message(FATAL_ERROR "UNET_RT_CUDA=ON, but the CUDA module cannot be built: ${status}.\n"
                          "Build without it (UNET_RT_CUDA=AUTO or OFF), or remove that obstacle.")
    endif()
  endif()
  message(STATUS "CUDA module: ${status}")
  set(${result} "${status}" PARENT_SCOPE)
  if(status STREQUAL "built")
    set(UNET_RT_CUDA_COMPILER "${compiler}" PARENT_SCOPE)
    set(UNET_RT_CUDA_ARCHITECTURES "${architectures}" PARENT_SCOPE)
  endif()
endfunction()

function(_unet_rt_try_cuda result)
  # The order in which CMake itself looks: cache or command line, environment, path, the toolkit's usual place.
  if(DEFINED CMAKE_CUDA_COMPILER)
    set(compiler "${CMAKE_CUDA_COMPILER}")
  elseif(DEFINED ENV{CUDACXX})
    set(compiler "$ENV{CUDACXX}")
  else()
    find_program(UNET_RT_NVCC nvcc HINTS ENV CUDA_PATH PATH_SUFFIXES bin PATHS /usr/local/cuda)
    mark_as_advanced(UNET_RT_NVCC)
    set(compiler "${UNET_RT_NVCC}")
  endif()
  if(NOT compiler)
    set(${result} "no CUDA compiler (nvcc) was found when this was built" PARENT_SCOPE)
    return()
  endif()
  # "compute_75" and so on, one a line; a compiler that lists none is told so by the trial.
  execute_process(COMMAND "${compiler}" --list-gpu-arch OUTPUT_VARIABLE known ERROR_VARIABLE ignored TIMEOUT 60)
  string(REGEX MATCHALL "[0-9]+" known "${known}")
  set(architectures)
  foreach(architecture IN ITEMS 75 80 86 89 90 100 120)
    list(FIND known ${architecture} place)
    if(place GREATER_EQUAL 0)
      list(APPEND architectures ${architecture}-real)
      set(newest ${architecture})
    endif()
  endforeach()
  set(oldest 75)
  if(architectures)
    list(GET architectures 0 oldest)
    list(APPEND architectures ${newest}-virtual)
  endif()
  set(folder "${CMAKE_CURRENT_BINARY_DIR}/try_cuda")
  file(REMOVE_RECURSE "${folder}")
  file(WRITE "${folder}/CMakeLists.txt" "cmake_minimum_required(VERSION 3.22)\nproject(try_cuda LANGUAGES CXX CUDA)\n"
                                        "add_library(try_cuda MODULE try.cu)\n"
                                        "target_compile_features(try_cuda PRIVATE cxx_std_17 cuda_std_17)\n")
  file(WRITE "${folder}/try.cu" "#include <cstdint>\n#include <cuda_runtime.h>\n"
                                "struct Body { float* x; };\n"
                                "__global__ void twice(const __grid_constant__ Body b) { b.x[threadIdx.x] *= 2; }\n"
                                "cudaError_t run(Body b) { twice<<<1, 32>>>(b); return cudaGetLastError(); }\n")
  # By hand first, which shows what the compiler has to say; then as CMake will use it.
  set(object "${folder}/try${CMAKE_CXX_OUTPUT_EXTENSION}")
  execute_process(COMMAND "${compiler}" -std=c++17 -c "${folder}/try.cu" -o "${object}"
                  RESULT_VARIABLE code OUTPUT_VARIABLE output ERROR_VARIABLE output TIMEOUT 120)
  if(code EQUAL 0 AND NOT EXISTS "${object}")
    set(code "it compiles nothing")
  endif()
  if(code EQUAL 0)
    set(options -G "${CMAKE_GENERATOR}" "-DCMAKE_CUDA_COMPILER=${compiler}" "-DCMAKE_CXX_COMPILER=${CMAKE_CXX_COMPILER}"
                "-DCMAKE_CUDA_ARCHITECTURES=${oldest}")
    if(CMAKE_MAKE_PROGRAM)
      list(APPEND options "-DCMAKE_MAKE_PROGRAM=${CMAKE_MAKE_PROGRAM}")
    endif()
    execute_process(COMMAND "${CMAKE_COMMAND}" -S "${folder}" -B "${folder}/build" ${options}
                    RESULT_VARIABLE code OUTPUT_VARIABLE output ERROR_VARIABLE output TIMEOUT 120)
  endif()
  if(code EQUAL 0)
    execute_process(COMMAND "${CMAKE_COMMAND}" --build "${folder}/build"
                    RESULT_VARIABLE code OUTPUT_VARIABLE output ERROR_VARIABLE output TIMEOUT 120)
  endif()
  if(code EQUAL 0)
    set(${result} "built" PARENT_SCOPE)
    set(compiler "${compiler}" PARENT_SCOPE)
    set(architectures "${architectures}" PARENT_SCOPE)
    return()
  endif()
  string(REGEX MATCH "[^\n]*(unsupported|fatal error|error:|not found|No such file)[^\n]*" line "${output}")
  if(NOT line)
    set(line "result: ${code}")
  endif()
  _unet_rt_one_line(line "${line}")
  set(${result} "the CUDA compiler ${compiler} was tried and does not work (${line})" PARENT_SCOPE)
endfunction()

# Fit for a C string literal and one line of output.
function(_unet_rt_one_line result text)
  string(REGEX REPLACE "[\"\\\\]" "'" text "${text}")
  string(REGEX REPLACE "[^!-~]+" " " text "${text}")
  string(STRIP "${text}" text)
  string(LENGTH "${text}" length)
  if(length GREATER 240)
    string(SUBSTRING "${text}" 0 240 text)
  endif()
  set(${result} "${text}" PARENT_SCOPE)
endfunction()
