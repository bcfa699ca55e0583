// What becomes of the sums of a Hopper product while they are in registers: one epilogue per stage.
// Plain code over the layout of hopper_layout.h, which also runs under emulation.
//
// A thread has 16 pairs of neighbouring columns in each of two rows, and the four lanes of a quad
// have the same rows: a warp reads or writes eight rows of 16 consecutive bytes at once, the other
// half of each sector right after. That is 0.25 sectors a cycle of the product, far below what L2
// takes, so nothing is staged through shared memory.
#pragma once

#include <cmath>
#include <cstdint>

#include "device.h"
#include "hopper_layout.h"
#include "kernels.h"
#include "row_kernels.h"

#if defined(__CUDACC__)
#define C2C_HOPPER_UNROLL _Pragma("unroll")
#else
#define C2C_HOPPER_UNROLL
#endif

namespace c2c::cuda::hopper {
namespace {

// What one thread has of the tile: rows `row` and row + 8 of the launch, columns col + 8 j and the
// next one for every group j.
struct Part {
  int stream, row, col;
};

// ---- pairs of 16-bit values in memory, the first in the low half ------------------------------

struct Pair {
  float first, second;
};

#if defined(C2C_EMULATE)
template <class T>
uint32_t round_pair(float first, float second, T) {
  T low, high;
  narrow(first, &low);
  narrow(second, &high);
  return low.bits | static_cast<uint32_t>(high.bits) << 16;
}
#else  // one instruction for both
__device__ __forceinline__ uint32_t round_pair(float first, float second, Bfloat16) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}
__device__ __forceinline__ uint32_t round_pair(float first, float second, Float16) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}
#endif

template <class T>
__device__ __forceinline__ Pair widen_pair(uint32_t pair) {
  return {widen(T{static_cast<uint16_t>(pair)}), widen(T{static_cast<uint16_t>(pair >> 16)})};
}

template <class T>
__device__ __forceinline__ uint32_t load_pair(const T* from) {
  return *reinterpret_cast<const uint32_t*>(from);
}
template <class T>
__device__ __forceinline__ void store_pair(T* to, uint32_t pair) {
  *reinterpret_cast<uint32_t*>(to) = pair;
}

template <class T>
__device__ __forceinline__ T* element(const Matrices& matrix, int stream, int row, int col) {
  return static_cast<T*>(matrix.data) + stream * matrix.stream_stride + row * matrix.row_stride +
         col;
}

// ---- sums of squares ---------------------------------------------------------------------------

// [streams, rows, tiles]
struct RowSquares {
  float* data;
  int rows, tiles;

  __device__ __forceinline__ float* of(int stream, int row) const {
    return data + (static_cast<int64_t>(stream) * rows + row) * tiles;
  }
  // The quad's four parts of a row; every lane of the warp comes here, also without a row.
  __device__ __forceinline__ void write(float part, const Part& at, int row) const {
    part += __shfl_xor_sync(~0u, part, 1);
    part += __shfl_xor_sync(~0u, part, 2);
    if (threadIdx.x % 4 == 0 && row < rows) of(at.stream, row)[blockIdx.x] = part;
  }
};

template <class T>
__device__ __forceinline__ float squares_of(uint32_t pair) {
  const Pair values = widen_pair<T>(pair);
  return values.first * values.first + values.second * values.second;
}

// ---- epilogues ---------------------------------------------------------------------------------

template <class T>
struct BiasEpilogue {
  Matrices z;
  const float* bias;
  RowSquares squares;
  int rows, cols;

  __device__ __forceinline__ void operator()(const float (&sums)[kSums], const Part& at) const {
    const float* const b = bias + static_cast<int64_t>(at.stream) * cols + at.col;
    C2C_HOPPER_UNROLL
    for (int lower = 0; lower < 2; ++lower) {
      const int row = at.row + 8 * lower;
      float part = 0.f;
      if (row < rows) {
        T* const to = element<T>(z, at.stream, row, at.col);
        C2C_HOPPER_UNROLL
        for (int group = 0; group < kGroups; ++group) {
          const int i = sum_index(group, lower);
          const float2 add = *reinterpret_cast<const float2*>(b + 8 * group);
          const uint32_t pair = round_pair(sums[i] + add.x, sums[i + 1] + add.y, T{});
          store_pair(to + 8 * group, pair);
          part += squares_of<T>(pair);
        }
      }
      squares.write(part, at, row);
    }
  }
};

template <class T, Activation kActivation>
struct ActivateEpilogue {
  RowSquares squares;  // of x
  Matrices first, second;
  int rows, first_cols, depth;

  __device__ __forceinline__ void operator()(const float (&sums)[kSums], const Part& at) const {
    const bool in_first = at.col < first_cols;  // all of the tile
    const Matrices matrix = in_first ? first : second;
    const int col = in_first ? at.col : at.col - first_cols;
    C2C_HOPPER_UNROLL
    for (int lower = 0; lower < 2; ++lower) {
      const int row = at.row + 8 * lower;
      if (row >= rows) continue;
      const float* const parts = squares.of(at.stream, row);
      float total = 0.f;
      for (int tile = 0; tile < squares.tiles; ++tile) total += parts[tile];
      // On the sums, not on x: float16 would lose small values before the product.
      const float scale =
          1.f / std::sqrt(total / static_cast<float>(depth) + static_cast<float>(kRmsEps));
      T* const to = element<T>(matrix, at.stream, row, col);
      C2C_HOPPER_UNROLL
      for (int group = 0; group < kGroups; ++group) {
        const int i = sum_index(group, lower);
        store_pair(to + 8 * group, round_pair(activate<kActivation>(scale * sums[i]),
                                              activate<kActivation>(scale * sums[i + 1]), T{}));
      }
    }
  }
};

template <class T>
struct ResidualEpilogue {
  Matrices z_in, z;    // may be one
  RowSquares squares;  // data null: no norm follows
  int rows;

  __device__ __forceinline__ void operator()(const float (&sums)[kSums], const Part& at) const {
    C2C_HOPPER_UNROLL
    for (int lower = 0; lower < 2; ++lower) {
      const int row = at.row + 8 * lower;
      float part = 0.f;
      if (row < rows) {
        const T* const from = element<T>(z_in, at.stream, row, at.col);
        T* const to = element<T>(z, at.stream, row, at.col);
        C2C_HOPPER_UNROLL
        for (int group = 0; group < kGroups; ++group) {
          const int i = sum_index(group, lower);
          const Pair add = widen_pair<T>(load_pair(from + 8 * group));
          const uint32_t pair = round_pair(sums[i] + add.first, sums[i + 1] + add.second, T{});
          store_pair(to + 8 * group, pair);
          part += squares_of<T>(pair);
        }
      }
      if (squares.data != nullptr) squares.write(part, at, row);
    }
  }
};

template <class T, Integration kIntegration>
struct OutputEpilogue {
  Streams streams;
  Tokens tokens;
  HeadShape shape;
  int64_t first_row;
  const float* bias;
  const float* logits;
  const float* head_bias;
  int rows, cols;
  bool accumulate;

  // Batch row b, head 0, token n.
  __device__ __forceinline__ static T* token_of(const CacheView& view, int64_t b, int64_t n) {
    return static_cast<T*>(const_cast<void*>(view.data)) + b * view.stride[0] +
           n * view.stride[2];
  }

  __device__ __forceinline__ void operator()(const float (&sums)[kSums], const Part& at) const {
    C2C_HOPPER_UNROLL
    for (int lower = 0; lower < 2; ++lower) {
      const int row = at.row + 8 * lower;
      if (row < rows) write_row(sums, at, lower, row);
    }
  }

  __device__ __forceinline__ void write_row(const float (&sums)[kSums], const Part& at, int lower,
                                            int row) const {
    const StreamViews& view = streams.view[at.stream];
    const int64_t m = first_row + row, b = m / tokens.tokens, n = m % tokens.tokens;
    const int64_t source =
        tokens.map == nullptr ? n : tokens.map[b * tokens.batch_stride + n * tokens.token_stride];
    const bool stays = source < 0 || source >= tokens.sharer_tokens;
    if (stays && (accumulate || view.base.data == view.out.data)) return;

    const T* const base = token_of(view.base, b, n);
    T* const out = token_of(view.out, b, n);
    const float* const p_bias = bias + static_cast<int64_t>(at.stream) * cols + at.col;
    const float* const row_logits =
        logits == nullptr
            ? nullptr
            : logits + (static_cast<int64_t>(at.stream) * rows + row) * shape.heads;
    const float* const logit_bias = head_bias + static_cast<int64_t>(at.stream) * shape.heads;
    int head = at.col / shape.dim, channel = at.col % shape.dim;
    float w = 1.f;
    C2C_HOPPER_UNROLL
    for (int group = 0; group < kGroups; ++group) {
      if (group > 0) {  // a group lies in one head
        channel += 8;
        if (channel >= shape.dim) channel -= shape.dim, ++head;
      }
      const T* const t_at = base + head * view.base.stride[1] + channel;
      T* const out_at = out + head * view.out.stride[1] + channel;
      if (stays) {
        store_pair(out_at, load_pair(t_at));
        continue;
      }
      if (logits != nullptr && (group == 0 || channel < 8)) {
        w = sigmoid(row_logits[head] + logit_bias[head]);
      }
      const int i = sum_index(group, lower);
      const float2 add = *reinterpret_cast<const float2*>(p_bias + 8 * group);
      const Pair t = widen_pair<T>(load_pair(t_at));
      const Pair from = accumulate ? widen_pair<T>(load_pair(out_at)) : t;
      const float first =
          integrate<kIntegration>(from.first, t.first, w, sums[i] + add.x, accumulate);
      const float second =
          integrate<kIntegration>(from.second, t.second, w, sums[i + 1] + add.y, accumulate);
      store_pair(out_at, round_pair(first, second, T{}));
    }
  }
};

}  // namespace
}  // namespace c2c::cuda::hopper
