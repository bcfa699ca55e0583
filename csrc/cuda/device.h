// What a kernel may use besides plain C++ and scalar_math.h. The same kernel source compiles for
// GPUs (nvcc, sm_80 upward) and, with C2C_EMULATE, as plain C++ that runs on the CPU (emulation.h).
//
// CUDA's own names: __global__ __device__ __host__ __forceinline__ __launch_bounds__ __align__
//   __grid_constant__ __shared__ (static arrays only), dim3, int2 int4 uint2 uint4 float2 float4,
//   threadIdx blockIdx blockDim gridDim, __syncthreads, __syncwarp, cudaStream_t,
//   __shfl_sync __shfl_xor_sync __shfl_down_sync (values of 4 or 8 bytes).
// From here: dynamic_shared, cp_async_*, store_16, ldmatrix_*, mma_*, launch. Nothing else; no
// atomics.
//
// A file that is not compiled by nvcc gets cudaStream_t and nothing more (launchers are declared
// with it).
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "../scalar_math.h"

namespace c2c {

constexpr std::size_t kMaxDynamicShared = 227 * 1024;  // of a block; sm_80 has 163 KB
constexpr std::size_t kMaxParameterBytes = 32764;      // of a kernel, since CUDA 12.1

}  // namespace c2c

#if defined(C2C_EMULATE)
#include "emulation.h"
#elif !defined(__CUDACC__)
#include <cuda_runtime_api.h>
#else
#include <cuda_runtime.h>

namespace c2c {
namespace {

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// The block's dynamic shared memory, 128-byte aligned.
template <class T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char c2c_dynamic_shared[];
  return reinterpret_cast<T*>(c2c_dynamic_shared);
}

// ---- asynchronous copies from global to shared memory ------------------------------------------
// Zeros are written, and nothing is read, where !valid. Both addresses are multiples of the size.

__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(__cvta_generic_to_global(global)), "r"(valid ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void cp_async_4(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)),
               "l"(__cvta_generic_to_global(global)), "r"(valid ? 4 : 0)
               : "memory");
}

// Closes a group: this thread's copies since the last commit.
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Until at most the kNewest newest groups of this thread are in flight. What other threads copied
// is there after a barrier behind their wait.
template <int kNewest>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kNewest) : "memory");
}

// One access of 16 aligned bytes. The compiler makes several of an array that it has in registers.
__device__ __forceinline__ void store_16(void* global, const uint4& words) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(global)),
               "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w)
               : "memory");
}

// ---- matrix fragments; every lane of the warp takes part ---------------------------------------
// 8 x 8 matrices of 16-bit elements, rows of 16 bytes: lane 8 i + j holds the address of row j of
// matrix i. Lane l gets elements 2 (l % 4) and the next of row l / 4 of matrix i in r[i].

__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}

// Lane l gets elements l / 4 of rows 2 (l % 4) and the next.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}

// d += a b; a is [16, k] row-major, b [k, 8] column-major, d [16, 8]. With g = lane / 4 and
// t = lane % 4, a register of 16-bit elements holds two neighbours in k, the first in the low half:
//   a[0..3]  rows g, g + 8, g, g + 8; k from 2 t, 2 t, 2 t + 8, 2 t + 8     (tf32: k = t, t, t + 4,
//   ..) b[0..1]  column g; k from 2 t, 2 t + 8                                  (tf32: k = t, t +
//   4) d[0..3]  rows g, g, g + 8, g + 8; columns 2 t, 2 t + 1, 2 t, 2 t + 1
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2], Bfloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2], Float16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Elements are bit patterns of float32; their low 13 bits are ignored.
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4],
                                                 const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// ---- launching ---------------------------------------------------------------------------------

inline void check_launch(cudaError_t status, const char* name) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // torch's next check would report it a second time
  throw std::runtime_error(std::string("c2c_ext.fuse: kernel ") + name +
                           " could not be launched on this GPU: " + cudaGetErrorString(status));
}

// Launches kernel(args...) on the current device; an empty grid is no launch. Throws
// std::runtime_error naming the kernel if the GPU refuses it.
template <class... P, class... A>
void launch(const char* name, void (*kernel)(P...), dim3 grid, dim3 block, std::size_t shared_bytes,
            cudaStream_t stream, A... args) {
  static_assert(sizeof...(P) == sizeof...(A), "launch needs one argument per parameter");
  static_assert((std::size_t{0} + ... + sizeof(P)) <= kMaxParameterBytes, "too many parameters");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  // The limit without asking is 48 KB, static arrays included.
  if (shared_bytes > 32 * 1024) {
    check_launch(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                      cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      static_cast<int>(shared_bytes)),
                 name);
  }
  const auto run = [&](P... parameters) {
    void* pointers[] = {const_cast<void*>(static_cast<const void*>(&parameters))..., nullptr};
    return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, pointers,
                            shared_bytes, stream);
  };
  check_launch(run(static_cast<P>(args)...), name);
}

}  // namespace
}  // namespace c2c
#endif
