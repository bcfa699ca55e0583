// The Hopper product: sums = x weight^T for all streams of a launch, and the epilogue on top.
//
// A block computes 128 rows x 128 columns of one stream. Its last warp copies slices of 64 inputs,
// three ahead, with the bulk tensor copy engine; two warpgroups multiply 64 rows each by all 128
// columns (wgmma.m64n128k16, both operands in shared memory, float32 sums in 64 registers) and then
// run the epilogue. Two blocks share a multiprocessor, so that one can multiply while the other is
// in its epilogue: at 1024 inputs a tile takes 8,192 cycles of the tensor cores, and GELU of its
// 16,384 sums some 3,500 of the float32 units. 128 x 256 would read a quarter less from L2, but its
// sums fill the registers: one block a multiprocessor, and idle tensor cores during epilogues.
//
// A warpgroup without rows multiplies nothing: 170 rows take the tensor cores as long as 192.
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

struct Ring {};
inline Ring open_ring(int) { return {}; }
inline void copy_slices(const Ring&, const Operand&, const Operand&, int) {}

template <class T>
void multiply_slices(const Ring&, const Operand& x, const Operand& weight, int, const Part& at,
                     float (&sums)[kSums]) {
  for (int i = 0; i < kSums; ++i) {
    const T* const a = x.row<T>(at.stream, at.row + i / 2 % 2 * 8);
    const T* const b = weight.row<T>(at.stream, at.col + i / 4 * 8 + i % 2);
    if (a == nullptr || b == nullptr) continue;
    for (int k = 0; k < x.depth; ++k) sums[i] += widen(a[k]) * widen(b[k]);
  }
}

#else

using Operand = CUtensorMap;

// The slices in shared memory and their barriers, as addresses.
struct Ring {
  uint32_t stages, barriers;

  __device__ __forceinline__ uint32_t x(int slice) const {
    return stages + x_offset(stage_of(slice));
  }
  __device__ __forceinline__ uint32_t weight(int slice) const {
    return stages + weight_offset(stage_of(slice));
  }
  __device__ __forceinline__ uint32_t full(int slice) const {
    return barriers + stage_of(slice) * 8;
  }
  __device__ __forceinline__ uint32_t empty(int slice) const {
    return barriers + (kStages + stage_of(slice)) * 8;
  }
};

// All threads of the block; `rows` of its tile.
__device__ __forceinline__ Ring open_ring(int rows) {
  __shared__ uint64_t barriers[2 * kStages];
  const Ring ring{align_stages(shared_address(dynamic_shared<unsigned char>())),
                  shared_address(barriers)};
  if (threadIdx.x == 0) {
    for (int slice = 0; slice < kStages; ++slice) {
      init_barrier(ring.full(slice), kFullArrivals);
      init_barrier(ring.empty(slice), empty_arrivals(rows));
    }
    fence_barrier_init();
  }
  __syncthreads();
  return ring;
}

// The warp behind the consumers, of which one thread does it all.
__device__ __forceinline__ void copy_slices(const Ring& ring, const Operand& x,
                                            const Operand& weight, int slices) {
  if (threadIdx.x != kConsumerThreads) return;
  const int row = static_cast<int>(blockIdx.y) * kTileRows;
  const int col = static_cast<int>(blockIdx.x) * kTileCols;
  const int stream = static_cast<int>(blockIdx.z);
#pragma unroll 1
  for (int slice = 0; slice < slices; ++slice) {
    wait_barrier(ring.empty(slice), empty_parity(slice));
    arrive_expecting(ring.full(slice), kStageBytes);
    copy_box(ring.x(slice), &x, slice * kSlice, row, stream, ring.full(slice));
    copy_box(ring.weight(slice), &weight, slice * kSlice, col, stream, ring.full(slice));
  }
}

// A consumer warpgroup's rows; adds to the sums.
template <class T>
__device__ __forceinline__ void multiply_slices(const Ring& ring, const Operand&, const Operand&,
                                                int slices, const Part&, float (&sums)[kSums]) {
  const int consumer = static_cast<int>(threadIdx.x) / kWarpgroup;
  const bool first_lane = threadIdx.x % 32 == 0;
  settle(sums);
#pragma unroll 1
  for (int slice = 0; slice < slices; ++slice) {
    wait_barrier(ring.full(slice), full_parity(slice));
    fence_products();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      multiply(sums, operand_descriptor(ring.x(slice) + operand_offset(consumer, step)),
               operand_descriptor(ring.weight(slice) + operand_offset(0, step)), T{});
    }
    commit_products();
    // All but this slice's products are done: the slice before has been read. The tensor cores have
    // this one to do meanwhile.
    wait_products<1>();
    if (slice > 0) arrive_if(first_lane, ring.empty(slice - 1));
  }
  wait_products<0>();
  settle(sums);
}

#endif

template <class T, class Epilogue>
__global__ void __launch_bounds__(kThreads, kBlocks)
    hopper_gemm_kernel(const __grid_constant__ Operand x, const __grid_constant__ Operand weight,
                       int slices, int rows, const __grid_constant__ Epilogue epilogue) {
#if defined(C2C_EMULATE) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  const int thread = static_cast<int>(threadIdx.x);
  const int tile_rows =
      rows - static_cast<int>(blockIdx.y) * kTileRows;  // more in all but the last
  const Ring ring = open_ring(tile_rows);
  if (thread >= kConsumerThreads) {
    copy_slices(ring, x, weight, slices);
  } else if (thread / kWarpgroup < consumers_of(tile_rows)) {
    const Part at{static_cast<int>(blockIdx.z),
                  static_cast<int>(blockIdx.y) * kTileRows + thread_row(thread),
                  static_cast<int>(blockIdx.x) * kTileCols + thread_col(thread)};
    float sums[kSums];
    const auto state = epilogue.begin(sums, at);
    multiply_slices<T>(ring, x, weight, slices, at, sums);
    epilogue.end(sums, at, state);
  }
#elif defined(__CUDA_ARCH__)
  __trap();  // check_hopper_device keeps the host from coming here
#endif
}

}  // namespace
}  // namespace c2c::cuda::hopper
