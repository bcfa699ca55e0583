// The Hopper product: sums = x weight^T for all streams of a launch, and the epilogue on top.
//
// A block computes 128 rows x 128 columns of one stream. Its last warp copies slices of 64 inputs,
// three ahead, with the bulk tensor copy engine; two warpgroups multiply 64 rows each by all 128
// columns (wgmma.m64n128k16, both operands in shared memory, float32 sums in 64 registers) and then
// run the epilogue. Two blocks share a multiprocessor, so that one can multiply while the other is
// in its epilogue: at 1024 inputs a tile takes 8,192 cycles of the tensor cores, and GELU of its
// 16,384 sums some 5,000 of the float32 units. 128 x 256 would read a quarter less from L2, but its
// sums fill the registers: one block a multiprocessor, and idle tensor cores during epilogues.
//
// 9 warps of at most 96 registers: 20 warps of 96 fit a multiprocessor (5 in each quarter), so two
// blocks of 9. The copying warp is no warpgroup of its own, hence nothing is left to move between
// warps by setmaxnreg.
//
// Grid: column tiles x row tiles x streams, columns fastest: the blocks that run at the same time
// share rows of x and all of a stream's weight in L2.
//
// Prediction for the real shape (56 streams, 2048 rows, 1.73 TFLOP in five products), not measured:
// at least 2.2 ms by the tensor cores (790 TFLOP/s) and 0.9 ms by memory. Blocks read 26.8 GB
// through L2, which is the nearest limit: a published kernel with this tile and ring reached 500 to
// 550 TFLOP/s on an H100, that is 8 TB/s. So 3.2 ms if epilogues hide behind the other block's
// product, 4.2 ms if two blocks run in step and they do not.
//
// Under emulation the sums come from a plain loop: wgmma and the copy engine are not emulated, what
// is before and behind them runs as it is.
#pragma once

#include <cstdint>

#include "device.h"
#include "hopper_epilogues.cuh"
#include "hopper_layout.h"

#if !defined(C2C_EMULATE)
#include "hopper_ptx.cuh"
#endif

namespace c2c::cuda::hopper {
namespace {

#if defined(C2C_EMULATE)

// [streams, rows, depth]
struct Operand {
  const void* data;
  int rows, depth;
  int64_t stream_stride, row_stride;

  template <class T>
  const T* row(int stream, int r) const {  // null behind the last one, where boxes hold zeros
    return r < rows ? static_cast<const T*>(data) + stream * stream_stride + r * row_stride
                    : nullptr;
  }
};

template <class T>
bool multiply_tile(const Operand& x, const Operand& weight, int, float (&sums)[kSums]) {
  const int thread = static_cast<int>(threadIdx.x), stream = static_cast<int>(blockIdx.z);
  if (thread >= kConsumerThreads) return false;
  const int first_row = static_cast<int>(blockIdx.y) * kTileRows + thread_row(thread);
  const int first_col = static_cast<int>(blockIdx.x) * kTileCols + thread_col(thread);
  for (int i = 0; i < kSums; ++i) {
    const T* const a = x.row<T>(stream, first_row + i / 2 % 2 * 8);
    const T* const b = weight.row<T>(stream, first_col + i / 4 * 8 + i % 2);
    if (a == nullptr || b == nullptr) continue;
    for (int k = 0; k < x.depth; ++k) sums[i] += widen(a[k]) * widen(b[k]);
  }
  return true;
}

#else

using Operand = CUtensorMap;

// Adds the block's tile to this thread's sums; false for the warp that copies, which has none.
template <class T>
__device__ __forceinline__ bool multiply_tile(const Operand& x, const Operand& weight, int slices,
                                              float (&sums)[kSums]) {
  __shared__ uint64_t barriers[2 * kStages];
  const uint32_t stages = align_stages(shared_address(dynamic_shared<unsigned char>()));
  const auto full = [&](int slice) { return shared_address(barriers + stage_of(slice)); };
  const auto empty = [&](int slice) { return shared_address(barriers + kStages + stage_of(slice)); };
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      init_barrier(full(stage), kFullArrivals);
      init_barrier(empty(stage), kEmptyArrivals);
    }
    fence_barrier_init();
  }
  __syncthreads();

  if (thread >= kConsumerThreads) {
    if (thread > kConsumerThreads) return false;
    const int row = static_cast<int>(blockIdx.y) * kTileRows;
    const int col = static_cast<int>(blockIdx.x) * kTileCols;
    const int stream = static_cast<int>(blockIdx.z);
    for (int slice = 0; slice < slices; ++slice) {
      const int stage = stage_of(slice);
      wait_barrier(empty(slice), empty_parity(slice));
      arrive_expecting(full(slice), kStageBytes);
      copy_box(stages + x_offset(stage), &x, slice * kSlice, row, stream, full(slice));
      copy_box(stages + weight_offset(stage), &weight, slice * kSlice, col, stream, full(slice));
    }
    return false;
  }

  const int consumer = thread / kWarpgroup;
  const bool first_lane = thread % 32 == 0;
#pragma unroll 1
  for (int slice = 0; slice < slices; ++slice) {
    const uint32_t x_rows = stages + x_offset(stage_of(slice));
    const uint32_t weight_rows = stages + weight_offset(stage_of(slice));
    wait_barrier(full(slice), full_parity(slice));
    fence_products();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      multiply(sums, operand_descriptor(x_rows + operand_offset(consumer, step)),
               operand_descriptor(weight_rows + operand_offset(0, step)), T{});
    }
    commit_products();
    // All but this slice's products are done: the one before has been read. The tensor cores have
    // this slice to do meanwhile.
    wait_products<1>();
    if (slice > 0) arrive_if(first_lane, empty(slice - 1));
  }
  wait_products<0>();
  settle(sums);
  return true;
}

#endif

template <class T, class Epilogue>
__global__ void __launch_bounds__(kThreads, kBlocks)
    hopper_gemm_kernel(const __grid_constant__ Operand x, const __grid_constant__ Operand weight,
                       int slices, const __grid_constant__ Epilogue epilogue) {
#if defined(C2C_EMULATE) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  float sums[kSums] = {};
  if (!multiply_tile<T>(x, weight, slices, sums)) return;
  const int thread = static_cast<int>(threadIdx.x);
  epilogue(sums, Part{static_cast<int>(blockIdx.z),
                      static_cast<int>(blockIdx.y) * kTileRows + thread_row(thread),
                      static_cast<int>(blockIdx.x) * kTileCols + thread_col(thread)});
#elif defined(__CUDA_ARCH__)
  __trap();  // check_hopper_device keeps the host from coming here
#endif
}

}  // namespace
}  // namespace c2c::cuda::hopper
