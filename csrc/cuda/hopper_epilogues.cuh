// What the sums of a Hopper product begin with and what becomes of them, in registers: one epilogue
// per stage. Plain code over the layout of hopper_layout.h, which also runs under emulation.
//
// begin() is called before the product, while its first slices are on their way: what is added to
// the sums is what they begin with. end() rounds and stores.
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

// sums = bias, for both rows. 8-byte aligned.
__device__ __forceinline__ void begin_with_bias(const float* bias, int cols, const Part& at,
                                                float (&sums)[kSums]) {
  const float* const from = bias + static_cast<int64_t>(at.stream) * cols + at.col;
  C2C_HOPPER_UNROLL
  for (int group = 0; group < kGroups; ++group) {
    const float2 pair = *reinterpret_cast<const float2*>(from + 8 * group);
    C2C_HOPPER_UNROLL
    for (int lower = 0; lower < 2; ++lower) {
      sums[sum_index(group, lower)] = pair.x;
      sums[sum_index(group, lower) + 1] = pair.y;
    }
  }
}

// z = the rounded sums, and its sums of squares unless squares.data is null.
template <class T>
__device__ __forceinline__ void end_with_squares(const float (&sums)[kSums], const Part& at,
                                                 const Matrices& z, const RowSquares& squares) {
  C2C_HOPPER_UNROLL
  for (int lower = 0; lower < 2; ++lower) {
    const int row = at.row + 8 * lower;
    float part = 0.f;
    if (row < squares.rows) {
      T* const to = element<T>(z, at.stream, row, at.col);
      C2C_HOPPER_UNROLL
      for (int group = 0; group < kGroups; ++group) {
        const int i = sum_index(group, lower);
        const uint32_t pair = round_pair(sums[i], sums[i + 1], T{});
        store_pair(to + 8 * group, pair);
        part += squares_of<T>(pair);
      }
    }
    if (squares.data != nullptr) squares.write(part, at, row);
  }
}

struct NoState {};

template <class T>
struct BiasEpilogue {
  Matrices z;
  const float* bias;
  RowSquares squares;
  int cols;

  __device__ __forceinline__ NoState begin(float (&sums)[kSums], const Part& at) const {
    begin_with_bias(bias, cols, at, sums);
    return {};
  }
  __device__ __forceinline__ void end(const float (&sums)[kSums], const Part& at, NoState) const {
    end_with_squares<T>(sums, at, z, squares);
  }
};

template <class T>
struct ResidualEpilogue {
  Matrices z_in, z;  // may be one: what a thread reads, it alone writes, later
  RowSquares squares;

  __device__ __forceinline__ NoState begin(float (&sums)[kSums], const Part& at) const {
    C2C_HOPPER_UNROLL
    for (int lower = 0; lower < 2; ++lower) {
      // Behind the last row the last one again, which is not stored: no branch between threads, for
      // the compiler runs products one by one where a branch writes the sums that they begin with.
      const int row = at.row + 8 * lower;
      const T* const from =
          element<T>(z_in, at.stream, row < squares.rows ? row : squares.rows - 1, at.col);
      C2C_HOPPER_UNROLL
      for (int group = 0; group < kGroups; ++group) {
        const int i = sum_index(group, lower);
        const Pair add = widen_pair<T>(load_pair(from + 8 * group));
        sums[i] = add.first;
        sums[i + 1] = add.second;
      }
    }
    return {};
  }
  __device__ __forceinline__ void end(const float (&sums)[kSums], const Part& at, NoState) const {
    end_with_squares<T>(sums, at, z, squares);
  }
};

template <class T, Activation kActivation>
struct ActivateEpilogue {
  RowSquares squares;  // of x
  Matrices first, second;
  int first_cols, depth;

  // Groups whose activations are computed side by side: more would not fit the registers.
  static constexpr int kAtOnce = 2;

  struct Scale {
    float of_row[2];
  };

  __device__ __forceinline__ Scale begin(float (&sums)[kSums], const Part& at) const {
    C2C_HOPPER_UNROLL
    for (int i = 0; i < kSums; ++i) sums[i] = 0.f;
    Scale scale;
    C2C_HOPPER_UNROLL
    for (int lower = 0; lower < 2; ++lower) {
      const int row = at.row + 8 * lower;
      const float* const parts = squares.of(at.stream, row < squares.rows ? row : 0);
      float total = 0.f;
      for (int tile = 0; tile < squares.tiles; ++tile) total += parts[tile];
      scale.of_row[lower] =
          1.f / std::sqrt(total / static_cast<float>(depth) + static_cast<float>(kRmsEps));
    }
    return scale;
  }
  // The factor as it is, but not before `pair` is known: first_cols is a multiple of kTileCols,
  // which the compiler does not know.
  __device__ __forceinline__ float behind(uint32_t pair, float factor) const {
    const uint32_t none = static_cast<uint32_t>(first_cols) % kTileCols;
    return bit_cast<float>(bit_cast<uint32_t>(factor) | (pair & none));
  }
  // The norm's factor meets float32 sums, so that float16 cannot overflow before it.
  __device__ __forceinline__ void end(const float (&sums)[kSums], const Part& at,
                                      const Scale& scale) const {
    const bool in_first = at.col < first_cols;  // all of the tile
    const Matrices matrix = in_first ? first : second;
    const int col = in_first ? at.col : at.col - first_cols;
    C2C_HOPPER_UNROLL
    for (int lower = 0; lower < 2; ++lower) {
      const int row = at.row + 8 * lower;
      if (row >= squares.rows) continue;
      T* const to = element<T>(matrix, at.stream, row, col);
      float factor = scale.of_row[lower];
      C2C_HOPPER_UNROLL
      for (int group = 0; group < kGroups; ++group) {
        const int i = sum_index(group, lower);
        const uint32_t pair = round_pair(activate<kActivation>(factor * sums[i]),
                                         activate<kActivation>(factor * sums[i + 1]), T{});
        store_pair(to + 8 * group, pair);
        if (group % kAtOnce == kAtOnce - 1) factor = behind(pair, factor);
      }
    }
  }
};

template <class T, Integration kIntegration, bool kAccumulate>
struct OutputEpilogue {
  Streams streams;
  Tokens tokens;
  HeadShape shape;
  int64_t first_row;
  const float* bias;
  const float* logits;
  const float* head_bias;
  int rows, cols;

  // Groups that are read before the first of them is written: the compiler cannot know that out
  // does not overlap what is read next, and would wait for each. As many as there are registers
  // for; they lie in one head.
  static constexpr int kAtOnce = kAccumulate ? 2 : 4;

  __device__ __forceinline__ NoState begin(float (&sums)[kSums], const Part& at) const {
    begin_with_bias(bias, cols, at, sums);
    return {};
  }
  __device__ __forceinline__ void end(const float (&sums)[kSums], const Part& at, NoState) const {
    C2C_HOPPER_UNROLL
    for (int lower = 0; lower < 2; ++lower) {
      const int row = at.row + 8 * lower;
      if (row < rows) write_row(sums, at, lower, row);
    }
  }

  // Head 0, channel 0.
  __device__ __forceinline__ static T* token_of(const CacheView& view, int batch, int token) {
    return static_cast<T*>(const_cast<void*>(view.data)) + batch * view.stride[0] +
           token * view.stride[2];
  }

  __device__ __forceinline__ float weight(int stream, int row, int head) const {
    const int64_t heads = shape.heads;
    return sigmoid(logits[(static_cast<int64_t>(stream) * rows + row) * heads + head] +
                   head_bias[stream * heads + head]);
  }

  __device__ __forceinline__ void write_row(const float (&sums)[kSums], const Part& at, int lower,
                                            int row) const {
    const StreamViews& view = streams.view[at.stream];
    const auto m = static_cast<uint32_t>(first_row + row);  // 32 bits divide in fewer registers
    const auto batch = static_cast<int>(m / static_cast<uint32_t>(tokens.tokens));
    const auto token = static_cast<int>(m % static_cast<uint32_t>(tokens.tokens));
    const int64_t source =
        tokens.map == nullptr
            ? token
            : tokens.map[batch * tokens.batch_stride + token * tokens.token_stride];
    const bool stays = source < 0 || source >= tokens.sharer_tokens;
    if (stays && (kAccumulate || view.base.data == view.out.data)) return;

    int head = at.col / shape.dim;
    int channel = at.col % shape.dim;
    const T* t_at = token_of(view.base, batch, token) + head * view.base.stride[1] + channel;
    T* out_at = token_of(view.out, batch, token) + head * view.out.stride[1] + channel;
    C2C_HOPPER_UNROLL
    for (int first = 0; first < kGroups; first += kAtOnce) {
      uint32_t base_pair[kAtOnce], from_pair[kAtOnce];
      C2C_HOPPER_UNROLL
      for (int k = 0; k < kAtOnce; ++k) {
        base_pair[k] = load_pair(t_at + 8 * k);
        from_pair[k] = kAccumulate ? load_pair(out_at + 8 * k) : base_pair[k];
      }
      const float w = logits == nullptr ? 1.f : weight(at.stream, row, head);
      C2C_HOPPER_UNROLL
      for (int k = 0; k < kAtOnce; ++k) {
        const int i = sum_index(first + k, lower);
        const Pair t = widen_pair<T>(base_pair[k]), from = widen_pair<T>(from_pair[k]);
        const uint32_t fused = round_pair(
            integrate<kIntegration>(from.first, t.first, w, sums[i], kAccumulate),
            integrate<kIntegration>(from.second, t.second, w, sums[i + 1], kAccumulate), T{});
        store_pair(out_at + 8 * k, stays ? base_pair[k] : fused);
      }
      channel += 8 * kAtOnce;
      const bool next_head = channel >= shape.dim;
      channel -= next_head ? shape.dim : 0;
      t_at += 8 * kAtOnce + (next_head ? view.base.stride[1] - shape.dim : 0);
      out_at += 8 * kAtOnce + (next_head ? view.out.stride[1] - shape.dim : 0);
      head += next_head;
    }
  }
};

}  // namespace
}  // namespace c2c::cuda::hopper
