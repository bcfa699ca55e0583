// The instructions of sm_90a that the Hopper product uses: barriers with byte counts (mbarrier),
// the bulk tensor copy engine (TMA) and warpgroup products (wgmma). Addresses of shared memory are
// 32-bit. Only nvcc reads this file.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "../scalar_math.h"
#include "hopper_layout.h"

namespace c2c::cuda::hopper {

// ---- barriers in shared memory -----------------------------------------------------------------

__device__ __forceinline__ void init_barrier(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// After init_barrier and before the block's barrier: the copy engine sees initialised barriers.
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Arrives, and adds `bytes` to what the phase waits for.
__device__ __forceinline__ void arrive_expecting(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// By a predicate and not a branch: wgmma needs converged warps.
__device__ __forceinline__ void arrive_if(bool arrives, uint32_t barrier) {
  asm volatile(
      "{\n"
      ".reg .pred arrives;\n"
      "setp.ne.b32 arrives, %1, 0;\n"
      "@arrives mbarrier.arrive.shared::cta.b64 _, [%0];\n"
      "}" ::"r"(barrier),
      "r"(static_cast<int>(arrives))
      : "memory");
}

// Until the phase of this parity is complete. Acquires what was released by its arrivals.
__device__ __forceinline__ void wait_barrier(uint32_t barrier, uint32_t parity) {
  uint32_t complete;
  do {
    asm volatile(
        "{\n"
        ".reg .pred complete;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 complete, [%1], %2;\n"
        "selp.u32 %0, 1, 0, complete;\n"
        "}"
        : "=r"(complete)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (complete == 0);
}

// ---- copies ------------------------------------------------------------------------------------

// One box of the map at (column, row, stream) to shared memory; counts its bytes on the barrier,
// those outside the tensor too, which become zeros.
__device__ __forceinline__ void copy_box(uint32_t shared, const CUtensorMap* map, int column,
                                         int row, int stream, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4}], [%5];" ::"r"(shared),
      "l"(map), "r"(column), "r"(row), "r"(stream), "r"(barrier)
      : "memory");
}

// ---- products ----------------------------------------------------------------------------------

// Before the first product that uses registers which other instructions have written.
__device__ __forceinline__ void fence_products() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until at most the kNewest newest groups are being multiplied.
template <int kNewest>
__device__ __forceinline__ void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kNewest) : "memory");
}
// Keeps the compiler from reading sums before the wait in front of this.
__device__ __forceinline__ void settle(float (&sums)[kSums]) {
#pragma unroll
  for (int i = 0; i < kSums; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

// Operands: sums %0 to %63, descriptors of x %64 and of the weight %65. Then: add to the sums, both
// operands as they are (1, 1: not negated) and K-major (0, 0: not transposed).
#define C2C_WGMMA_M64N128K16(TYPES)                                                       \
  asm volatile(                                                                           \
      "{\n"                                                                               \
      ".reg .pred add;\n"                                                                 \
      "setp.eq.b32 add, 0, 0;\n"                                                          \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPES                                \
      " "                                                                                 \
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "  \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "  \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, " \
      "%64, %65, add, 1, 1, 0, 0;\n"                                                      \
      "}"                                                                                 \
      : C2C_SUMS_8(0), C2C_SUMS_8(8), C2C_SUMS_8(16), C2C_SUMS_8(24), C2C_SUMS_8(32),     \
        C2C_SUMS_8(40), C2C_SUMS_8(48), C2C_SUMS_8(56)                                    \
      : "l"(x), "l"(weight)                                                               \
      : "memory")
#define C2C_SUMS_8(i)                                                                        \
  "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3]), "+f"(sums[i + 4]), \
      "+f"(sums[i + 5]), "+f"(sums[i + 6]), "+f"(sums[i + 7])

// sums += x weight^T for 64 rows, 128 columns and 16 inputs; only starts it. All four warps of the
// warpgroup take part.
__device__ __forceinline__ void multiply(float (&sums)[kSums], uint64_t x, uint64_t weight,
                                         Bfloat16) {
  C2C_WGMMA_M64N128K16("bf16.bf16");
}
__device__ __forceinline__ void multiply(float (&sums)[kSums], uint64_t x, uint64_t weight,
                                         Float16) {
  C2C_WGMMA_M64N128K16("f16.f16");
}

#undef C2C_SUMS_8
#undef C2C_WGMMA_M64N128K16

}  // namespace c2c::cuda::hopper
