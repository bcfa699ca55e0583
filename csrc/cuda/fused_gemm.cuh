// Batched product on tensor cores, out[g] = output(input[g] weight[g]^T), for the fused path: what
// is read and what becomes of the sums are policies: fused_inputs.cuh, fused_outputs.cuh.
//
// Grid: column tiles x row tiles x streams, columns fastest, so that the blocks that read the same
// rows run side by side and share them through L2, and all blocks of a stream share its weights.
// A block: cp.async copies `kStages` slices of `kDepth` inputs ahead into swizzled shared memory,
// ldmatrix and mma.sync.m16n8k16 multiply them into float32 sums; these then go through shared
// memory, so that 8 neighbouring columns come to one thread and memory is accessed 16 bytes at a
// time. Nothing depends on the order of blocks, and every sum has a fixed order.
//
// Traffic in bytes at the real shape (in 1152, hidden = inner = out = 1024, 8 heads, 16 bits):
//   launch     weights/stream  read/row/stream           written/row/stream
//   in              2.36 M     2304 both caches          2048 z0
//   w1              2.10 M     2048 z0                   2048 a
//   w2              2.10 M     2048 a + 2048 z0          2048 z1
//   branches        4.19 M     2048 z1                   4096 act_proj, act_weight
//   head            0.07 M     4096 z1, act_weight         32 w
//   out             4.19 M     4096 act_proj, z1         2048 out
//                              + 2048 base + 32 w
// Statistics add 4 bytes per row, stream and 64 columns. In all 15.0 MB a stream and 33 KB a row
// and stream: 0.84 GB + 1.85 MB per token for 56 streams, and 0.84 GFLOP per token.
//
// Predictions for 56 streams, nothing measured. DRAM: 4.3 TB/s, of all traffic above, although L2
// keeps much of the intermediates. L2: what blocks read, weights once per row tile and rows once
// per column tile, at an assumed 5.5 TB/s. Tensor cores: rows padded to whole tiles, at 790
// TFLOP/s, of which mma.sync is said to reach some 60% on Hopper. Six launches add some 0.02 ms.
//   rows  tile         shared  DRAM      L2        tensor cores  expected
//      1  16 x  64      51 KB  0.20 ms   0.16 ms   0.02 ms       0.22 ms
//     64  64 x 128      98 KB  0.22 ms   0.23 ms   0.07 ms       0.25 ms
//    170  192 x 128    125 KB  0.27 ms   0.36 ms   0.20 ms       0.45 ms
//   2048  128 x 128     73 KB  1.1 ms    4.9 ms    2.2 ms        5 ms
// For many rows this path is meant for sm_80 (312 TFLOP/s); on Hopper, hopper_gemm is.
#pragma once

#include <cstdint>

#include "../scalar_math.h"
#include "device.h"

namespace c2c::cuda {

constexpr int kVector = 8;  // 16-bit elements in 16 bytes, the widest access
constexpr unsigned kAllLanes = 0xffffffffu;
// Columns of one part of a row's sum of squares. The same for every tile, so that a token's bits do
// not depend on how many others are fused with it.
constexpr int kSquaresCols = 64;

// What one block computes and how. Warps lie in a grid of kWarpsDown x kWarpsAcross.
template <int kRows_, int kCols_, int kDepth_, int kStages_, int kWarpsDown_, int kWarpsAcross_,
          int kBlocks_>
struct GemmTile {
  static constexpr int kRows = kRows_, kCols = kCols_;
  static constexpr int kDepth = kDepth_;    // inputs of one stage
  static constexpr int kStages = kStages_;  // stages in shared memory; one is being multiplied
  static constexpr int kWarpsDown = kWarpsDown_, kWarpsAcross = kWarpsAcross_;
  static constexpr int kBlocks = kBlocks_;  // per multiprocessor, for the compiler's registers
  static constexpr int kThreads = 32 * kWarpsDown * kWarpsAcross;
  static constexpr int kWarpRows = kRows / kWarpsDown, kWarpCols = kCols / kWarpsAcross;
  static constexpr int kChunks = kDepth / kVector;  // 16-byte chunks of one row of a stage
  static constexpr int kStageElements = (kRows + kCols) * kDepth;
  // Sums: 8 extra columns spread the rows that a warp writes over all banks.
  static constexpr int kSumStride = kCols + 8;
  static constexpr int kLanesPerRow = kCols / kVector;
  static constexpr int kPasses = kRows * kLanesPerRow / kThreads;  // chunks that a thread writes
  static constexpr int kStageBytes = kStages * kStageElements * 2;
  static constexpr int kSumBytes = kRows * kSumStride * static_cast<int>(sizeof(float));
  static constexpr int kBytes = kStageBytes > kSumBytes ? kStageBytes : kSumBytes;

  static_assert(kWarpRows % 16 == 0 && kWarpCols % 16 == 0, "whole fragments per warp");
  static_assert(kChunks == 4 || kChunks == 8, "chunk_at knows these");
  static_assert(kRows * kChunks % kThreads == 0 && kCols * kChunks % kThreads == 0,
                "every thread copies as many chunks");
  static_assert(kCols % kSquaresCols == 0, "whole parts of the sums of squares");
  static_assert(kLanesPerRow <= 32 && kThreads % kLanesPerRow == 0, "a row belongs to one warp");
  static_assert(kRows * kLanesPerRow % kThreads == 0 && (kPasses < 4 || kPasses % 4 == 0),
                "every thread writes as many chunks, in whole groups");
};

// Where chunk `chunk` of row `row` lies in a stage, in chunks. Any eight rows from a multiple of
// eight on, which ldmatrix reads at once, have it in eight different quarters of a bank line.
template <class Tile>
__device__ __forceinline__ int chunk_at(int row, int chunk) {
  return row * Tile::kChunks + (chunk ^ (Tile::kChunks == 8 ? row & 7 : (row >> 1) & 3));
}

// Copies columns [k, k + kDepth) of kRows rows of `source` to a stage. Zeros where it has none.
template <class T, class Tile, int kRows, class Source>
__device__ __forceinline__ void load_stage(T* stage, const Source& source, int k) {
  const int chunk = static_cast<int>(threadIdx.x) % Tile::kChunks;
  const int first_row = static_cast<int>(threadIdx.x) / Tile::kChunks;
  constexpr int kStep = Tile::kThreads / Tile::kChunks;
  const int col = k + chunk * kVector;
  const auto column = source.column(col);
  if (column.vector) {
#pragma unroll
    for (int i = 0; i < kRows / kStep; ++i) {
      const int row = first_row + i * kStep;
      const T* from = source.address(column, row);
      const bool valid = from != nullptr;
      cp_async_16(stage + chunk_at<Tile>(row, chunk) * kVector, valid ? from : column.data, valid);
    }
  } else {  // unaligned or strided: one by one
#pragma unroll 1
    for (int row = first_row; row < kRows; row += kStep) {
      T* to = stage + chunk_at<Tile>(row, chunk) * kVector;
#pragma unroll 1
      for (int i = 0; i < kVector; ++i) {
        const T* from = source.address(source.column(col + i), row);
        to[i] = from != nullptr ? *from : T{};
      }
    }
  }
}

// sums += rows x columns of one stage, for this warp's part of the tile.
template <class T, class Tile>
__device__ __forceinline__ void multiply_stage(
    const T* stage, float (&sums)[Tile::kWarpRows / 16][Tile::kWarpCols / 8][4]) {
  constexpr int kDown = Tile::kWarpRows / 16, kAcross = Tile::kWarpCols / 8;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int row = warp / Tile::kWarpsAcross * Tile::kWarpRows + lane % 16;
  const int col = warp % Tile::kWarpsAcross * Tile::kWarpCols + lane / 16 * 8 + lane % 8;
  const T* weights = stage + Tile::kRows * Tile::kDepth;
#pragma unroll
  for (int chunk = 0; chunk < Tile::kChunks; chunk += 2) {
    uint32_t a[kDown][4], b[kAcross][2];
#pragma unroll
    for (int i = 0; i < kDown; ++i) {
      ldmatrix_x4(a[i], stage + chunk_at<Tile>(row + 16 * i, chunk + lane / 16) * kVector);
    }
#pragma unroll
    for (int j = 0; j < kAcross; j += 2) {
      uint32_t pair[4];
      ldmatrix_x4(pair, weights + chunk_at<Tile>(col + 8 * j, chunk + lane / 8 % 2) * kVector);
      b[j][0] = pair[0], b[j][1] = pair[1], b[j + 1][0] = pair[2], b[j + 1][1] = pair[3];
    }
#pragma unroll
    for (int i = 0; i < kDown; ++i) {
#pragma unroll
      for (int j = 0; j < kAcross; ++j) mma_m16n8k16(sums[i][j], a[i], b[j], T{});
    }
  }
}

// This warp's sums into the tile [kRows, kSumStride] in shared memory.
template <class Tile>
__device__ __forceinline__ void store_sums(
    float* tile, const float (&sums)[Tile::kWarpRows / 16][Tile::kWarpCols / 8][4]) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int row = warp / Tile::kWarpsAcross * Tile::kWarpRows + lane / 4;
  const int col = warp % Tile::kWarpsAcross * Tile::kWarpCols + lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < Tile::kWarpRows / 16; ++i) {
#pragma unroll
    for (int j = 0; j < Tile::kWarpCols / 8; ++j) {
      float* to = tile + (row + 16 * i) * Tile::kSumStride + col + 8 * j;
      *reinterpret_cast<float2*>(to) = {sums[i][j][0], sums[i][j][1]};
      *reinterpret_cast<float2*>(to + 8 * Tile::kSumStride) = {sums[i][j][2], sums[i][j][3]};
    }
  }
}

template <class T, class Input, class Weight, class Output>
struct FusedGemm {
  Input input;    // rows of every stream
  Weight weight;  // columns of every stream, as rows of inputs
  Output output;
  int rows, cols, depth;
};

// What a block needs beside its tile: whatever the policies keep per row.
template <class Tile, class Input, class Output>
constexpr int fused_gemm_bytes() {
  return Tile::kBytes + Tile::kRows * (Input::kRowBytes + Output::kRowBytes);
}

template <class T, class Tile, class Input, class Weight, class Output>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    fused_gemm_kernel(const FusedGemm<T, Input, Weight, Output> gemm) {
  char* const shared = dynamic_shared<char>();
  char* const input_rows = shared + Tile::kBytes;
  char* const output_rows = input_rows + Tile::kRows * Input::kRowBytes;
  T* const stages = reinterpret_cast<T*>(shared);
  const int stream = static_cast<int>(blockIdx.z);
  const int first_row = static_cast<int>(blockIdx.y) * Tile::kRows;
  const int first_col = static_cast<int>(blockIdx.x) * Tile::kCols;
  const int rows = gemm.rows - first_row < Tile::kRows ? gemm.rows - first_row : Tile::kRows;

  gemm.input.template prepare<Tile>(stream, first_row, rows, input_rows);
  if constexpr (Input::kRowBytes > 0) __syncthreads();
  const auto input = gemm.input.block(stream, first_row, rows, input_rows);
  const auto weight = gemm.weight.block(stream, first_col, gemm.cols - first_col, nullptr);
  const auto load = [&](int step) {
    T* const stage = stages + step % Tile::kStages * Tile::kStageElements;
    load_stage<T, Tile, Tile::kRows>(stage, input, step * Tile::kDepth);
    load_stage<T, Tile, Tile::kCols>(stage + Tile::kRows * Tile::kDepth, weight,
                                     step * Tile::kDepth);
  };

  const int steps = (gemm.depth + Tile::kDepth - 1) / Tile::kDepth;
#pragma unroll 1
  for (int step = 0; step < Tile::kStages - 1; ++step) {
    if (step < steps) load(step);
    cp_async_commit();
  }
  // While the first copies are on their way; read after the barriers below.
  gemm.output.template prepare<Tile>(stream, first_row, rows, output_rows);
  float sums[Tile::kWarpRows / 16][Tile::kWarpCols / 8][4] = {};
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<Tile::kStages - 2>();
    __syncthreads();  // everyone's copies have come, and the stage of step - 1 has been read
    if (step + Tile::kStages - 1 < steps) load(step + Tile::kStages - 1);
    cp_async_commit();  // also where empty: a step is a group
    multiply_stage<T, Tile>(stages + step % Tile::kStages * Tile::kStageElements, sums);
  }
  cp_async_wait<0>();
  __syncthreads();  // the last stage has been read

  float* const tile = reinterpret_cast<float*>(shared);
  store_sums<Tile>(tile, sums);
  __syncthreads();
  const auto output = gemm.output.block(stream, first_row, output_rows);
  const int thread = static_cast<int>(threadIdx.x);
  const int tile_col = thread % Tile::kLanesPerRow * kVector;
  const auto column = output.column(first_col + tile_col, gemm.cols);
  constexpr int kStep = Tile::kThreads / Tile::kLanesPerRow;
  constexpr int kGroup = Tile::kPasses < 4 ? Tile::kPasses : 4;
#pragma unroll 1
  for (int pass = 0; pass < Tile::kPasses; pass += kGroup) {
    const int first = thread / Tile::kLanesPerRow + pass * kStep;
    typename Output::Fetched fetched[kGroup] = {};  // several rows at once: reading takes long
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const int row = first + i * kStep;
      if (row < rows && column.count > 0) fetched[i] = output.fetch(column, row);
    }
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const int row = first + i * kStep;
      float squares = 0.f;
      if (row < rows && column.count > 0) {
        squares = output.write(column, row, tile + row * Tile::kSumStride + tile_col, fetched[i]);
      }
      if constexpr (Output::kSquares) {
#pragma unroll
        for (int lanes = 1; lanes < kSquaresCols / kVector; lanes *= 2) {
          squares += __shfl_xor_sync(kAllLanes, squares, lanes);
        }
        if (row < rows && column.count > 0 && tile_col % kSquaresCols == 0) {
          output.write_squares(row, column.col / kSquaresCols, squares);
        }
      }
    }
  }
}

}  // namespace c2c::cuda
