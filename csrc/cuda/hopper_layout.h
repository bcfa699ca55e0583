// The index arithmetic of the Hopper product (hopper_gemm.cuh): tile, shared memory, operand
// descriptor, fragments and barrier phases. Constant expressions without any CUDA, so that
// python_tests/hopper_layout_checks.cpp checks them on a machine without a GPU.
#pragma once

#include <cstdint>

#include "../scalar_math.h"

namespace c2c::cuda::hopper {

// ---- tile --------------------------------------------------------------------------------------

constexpr int kTileRows = 128;  // rows of x
constexpr int kTileCols = 128;  // rows of the weight
constexpr int kSlice = 64;      // inputs of one stage: 128 bytes a row, one span of the swizzle
constexpr int kStages = 3;      // slices in shared memory

constexpr int kWarpgroup = 128;  // threads
constexpr int kConsumers = 2;    // warpgroups; each multiplies 64 rows by all columns of the tile
constexpr int kConsumerThreads = kConsumers * kWarpgroup;
constexpr int kThreads = kConsumerThreads + 32;  // the last warp copies
constexpr int kBlocks = 2;                       // of one multiprocessor

// wgmma.m64n128k16
constexpr int kWgmmaRows = 64, kWgmmaCols = 128, kWgmmaDepth = 16;
constexpr int kSums = kWgmmaRows * kWgmmaCols / kWarpgroup;  // accumulators of a thread

static_assert(kTileRows == kConsumers * kWgmmaRows && kTileCols == kWgmmaCols,
              "one wgmma per warpgroup and 16 inputs");

// ---- shared memory -----------------------------------------------------------------------------
// A stage holds kTileRows rows of x, then kTileCols rows of the weight, 128 bytes each. The copy
// engine swizzles them (CU_TENSOR_MAP_SWIZZLE_128B): with the stage at a multiple of 1024 bytes,
// the 16-byte chunk c of row r lies where chunk c ^ (r % 8) would lie without.

constexpr int kRowBytes = kSlice * 2;
constexpr int kSwizzleBytes = 8 * kRowBytes;  // the pattern repeats after eight rows
constexpr int kXBytes = kTileRows * kRowBytes;
constexpr int kWeightBytes = kTileCols * kRowBytes;
constexpr int kStageBytes = kXBytes + kWeightBytes;
// The block's dynamic shared memory begins anywhere.
constexpr int kSharedBytes = kStages * kStageBytes + kSwizzleBytes;

static_assert(kRowBytes == 128, "as wide as the swizzle");
static_assert(kXBytes % kSwizzleBytes == 0 && kStageBytes % kSwizzleBytes == 0, "stay aligned");
// 228 KB a multiprocessor; a block takes 1 KB more than it asks for, and the barriers.
static_assert(kBlocks * (kSharedBytes + 2 * 1024) <= 228 * 1024, "kBlocks blocks fit");

C2C_HOST_DEVICE constexpr uint32_t align_stages(uint32_t address) {
  return (address + kSwizzleBytes - 1) / kSwizzleBytes * kSwizzleBytes;
}
C2C_HOST_DEVICE constexpr uint32_t x_offset(int stage) { return stage * kStageBytes; }
C2C_HOST_DEVICE constexpr uint32_t weight_offset(int stage) {
  return stage * kStageBytes + kXBytes;
}

// From an operand's rows in a stage to what one wgmma reads: 64 rows further for every consumer (x
// alone), 32 bytes further for every 16 inputs. The hardware swizzles the sum of address and
// offsets, so a step inside the 128 bytes of a row is a plain addition.
C2C_HOST_DEVICE constexpr uint32_t operand_offset(int consumer, int step) {
  return consumer * kWgmmaRows * kRowBytes + step * kWgmmaDepth * 2;
}
constexpr int kSteps = kSlice / kWgmmaDepth;

// The matrix descriptor of wgmma (PTX ISA, "Matrix Descriptor Format") of a K-major operand.
//   bits  0-13  start address / 16. Shared addresses have at most 18 bits.
//   bits 16-29  leading byte offset / 16: from one swizzle span to the next along K. An operand has
//               32 bytes of K, inside one span, so it is never used; 1 is what the ISA assumes.
//   bits 32-45  stride byte offset / 16: from eight rows to the next eight, 1024 bytes, so 64
//   bits 49-51  base offset: where in the swizzle pattern the operand begins, in rows; its first
//               row is at a multiple of 1024 bytes, so 0. (Steps along K add less than a row.)
//   bits 62-63  swizzle: 1 = 128 bytes
//   all others  0
C2C_HOST_DEVICE constexpr uint64_t operand_descriptor(uint32_t address) {
  return static_cast<uint64_t>((address & 0x3ffffu) >> 4) | uint64_t{1} << 16 |
         static_cast<uint64_t>(kSwizzleBytes >> 4) << 32 | uint64_t{1} << 62;
}

// ---- fragments ---------------------------------------------------------------------------------
// Sums of wgmma.m64n128k16 (PTX ISA, "Accumulator D"): warp w of the warpgroup has rows 16 w to
// 16 w + 15, lane l of it rows l / 4 and l / 4 + 8, and of every eight columns 2 (l % 4) and the
// next. In a thread's registers columns lie side by side, then its two rows, then groups of eight
// columns.

// First row in the tile of consumer thread `thread`; its other one is 8 below.
C2C_HOST_DEVICE constexpr int thread_row(int thread) {
  return thread / kWarpgroup * kWgmmaRows + thread % kWarpgroup / 32 * 16 + thread % 32 / 4;
}
// First column in the tile; then the next one, and the same of every eight columns.
C2C_HOST_DEVICE constexpr int thread_col(int thread) { return thread % 4 * 2; }

constexpr int kGroups = kWgmmaCols / 8;
// Register of: group of eight columns, upper (0) or lower (1) row. The next holds the next column.
C2C_HOST_DEVICE constexpr int sum_index(int group, int lower) { return group * 4 + lower * 2; }

// ---- barriers ----------------------------------------------------------------------------------
// Slice i goes through stage i % kStages, whose barriers complete one phase per use: `full` when
// the bytes of the slice have arrived (one arrival, which announces them), `empty` when every
// consumer warp has read them (one arrival each). Waiting for parity p returns once the phase p is
// complete; on a fresh barrier phase 1 counts as complete, so the first round of `empty` waits for
// nothing.

constexpr int kFullArrivals = 1;
constexpr int kEmptyArrivals = kConsumerThreads / 32;  // where all consumers have rows

// Of a tile with so many rows. A consumer without rows multiplies nothing and frees no stage.
C2C_HOST_DEVICE constexpr int consumers_of(int rows) {
  return rows >= kTileRows ? kConsumers : (rows + kWgmmaRows - 1) / kWgmmaRows;
}
C2C_HOST_DEVICE constexpr int empty_arrivals(int rows) {
  return consumers_of(rows) * (kWarpgroup / 32);
}
static_assert(empty_arrivals(kTileRows) == kEmptyArrivals && empty_arrivals(1) == 4, "a warp each");

C2C_HOST_DEVICE constexpr int stage_of(int slice) { return slice % kStages; }
// What a consumer waits for before it reads slice `slice`: use number slice / kStages of the stage.
C2C_HOST_DEVICE constexpr uint32_t full_parity(int slice) { return slice / kStages & 1; }
// What the copier waits for before it overwrites the stage: that the use before has been read.
C2C_HOST_DEVICE constexpr uint32_t empty_parity(int slice) { return (slice / kStages & 1) ^ 1; }

C2C_HOST_DEVICE constexpr int slices_of(int depth) { return (depth + kSlice - 1) / kSlice; }

}  // namespace c2c::cuda::hopper
