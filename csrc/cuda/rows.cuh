// What kernels share that have a block of threads per row: columns by packs, sums over a block, one
// token of a cache.
#pragma once

#include <cmath>
#include <type_traits>

#include "row_kernels.h"

namespace c2c::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 128;

// The type that values of C are summed in.
template <class C>
using Sums = std::conditional_t<std::is_same_v<C, double>, double, float>;

// Neighbours that are loaded or stored at once, in accesses of up to 16 bytes.
template <class C, int kCount>
struct alignas(kCount * sizeof(C) < 16 ? kCount * sizeof(C) : 16) Pack {
  C x[kCount];
};

template <class C>
constexpr int kPack = static_cast<int>(16 / sizeof(C));

template <class C, int kCount>
__device__ bool aligned(const C* p) {
  return reinterpret_cast<uintptr_t>(p) % alignof(Pack<C, kCount>) == 0;
}

template <int kCount, class C>
__device__ Pack<C, kCount> load(const C* from) {
  return *reinterpret_cast<const Pack<C, kCount>*>(from);
}

// 32 bits of neighbours, from the first on.
template <class C>
__device__ uint32_t word_of(const C* x) {
  if constexpr (sizeof(C) == 2) {
    return x[0].bits | static_cast<uint32_t>(x[1].bits) << 16;
  } else {
    return bit_cast<uint32_t>(x[0]);
  }
}

template <int kCount, class C>
__device__ void store(const Pack<C, kCount>& pack, C* to) {
  if constexpr (sizeof(pack) == 16 && sizeof(C) < 8) {
    constexpr int kWord = 4 / sizeof(C);
    store_16(to, {word_of(pack.x), word_of(pack.x + kWord), word_of(pack.x + 2 * kWord),
                  word_of(pack.x + 3 * kWord)});
  } else {
    *reinterpret_cast<Pack<C, kCount>*>(to) = pack;
  }
}

// Calls f(column, integral constant: how many from there on) for the columns that fall to `thread`
// of `threads`: packs first where all rows are aligned for them, then what is left one by one.
// kUnroll rounds are begun at once; most kernels have one or two, not worth counting them first.
template <int kCount, int kUnroll = 1, class F>
__device__ void for_columns(int64_t cols, bool packed, int thread, int threads, const F& f) {
  const int64_t packs_end = packed ? cols / kCount * kCount : 0;
#pragma unroll kUnroll
  for (int64_t i = int64_t{thread} * kCount; i < packs_end; i += int64_t{threads} * kCount) {
    f(i, std::integral_constant<int, kCount>{});
  }
#pragma unroll 1
  for (int64_t i = packs_end + thread; i < cols; i += threads) {
    f(i, std::integral_constant<int, 1>{});
  }
}

template <int kCount, class F>
__device__ void for_columns(int64_t cols, bool packed, const F& f) {
  for_columns<kCount>(cols, packed, static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x), f);
}

// Row `row` of stream blockIdx.y.
template <class C>
__device__ C* row_of(const Matrices& m, int64_t row) {
  return static_cast<C*>(m.data) + blockIdx.y * m.stream_stride + row * m.row_stride;
}

template <class T>
__device__ T warp_sum(T v) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) v += __shfl_xor_sync(~0u, v, mask);
  return v;
}

// v[i] becomes its sum over the block's threads, in every thread. Once per kernel: the shared array
// is not guarded against a second use.
template <int kCount, class T>
__device__ void block_sums(T (&v)[kCount]) {
  __shared__ T partial[kCount][kMaxThreads / kWarp];
  for (int i = 0; i < kCount; ++i) {
    const T sum = warp_sum(v[i]);
    if (threadIdx.x % kWarp == 0) partial[i][threadIdx.x / kWarp] = sum;
  }
  __syncthreads();
  for (int i = 0; i < kCount; ++i) {
    v[i] = 0;
    for (unsigned warp = 0; warp < blockDim.x / kWarp; ++warp) v[i] += partial[i][warp];
  }
}

template <class T>
__device__ T block_sum(T v) {
  T sum[1] = {v};
  block_sums(sum);
  return sum[0];
}

// n = x / sqrt(mean(x^2) + kRmsEps) for a block's row x [cols]; `squares`: the sum of the thread's
// own columns of x^2. n may be x.
template <class C, class T>
__device__ void write_norm(T squares, const C* x, C* n, int64_t cols, bool packed) {
  const T mean = block_sum(squares) / static_cast<T>(cols);
  const T scale = T(1) / std::sqrt(mean + static_cast<T>(kRmsEps));
  for_columns<kPack<C>>(cols, packed, [&](int64_t i, auto count) {
    auto pack = load<decltype(count)::value>(x + i);
    for (C& value : pack.x) narrow(widen(value) * scale, &value);
    store(pack, n + i);
  });
}

// A receiver token and the sharer token that it is fused with.
struct Place {
  int64_t batch, token, source;  // source -1: the token stays
};

__device__ inline Place place_of(const Tokens& t, int64_t row) {
  Place place{row / t.tokens, row % t.tokens, 0};
  place.source = t.map == nullptr
                     ? place.token
                     : t.map[place.batch * t.batch_stride + place.token * t.token_stride];
  if (place.source < 0 || place.source >= t.sharer_tokens) place.source = -1;
  return place;
}

// One token of a cache: channel d of head h is at data[h * head_stride + d * channel_stride].
template <class C>
struct Token {
  C* data;
  int64_t head_stride, channel_stride;
  unsigned dim;

  // A pack lies inside one head and is aligned in all of them.
  __device__ bool packed() const {
    return channel_stride == 1 && dim % kPack<C> == 0 && head_stride % kPack<C> == 0 &&
           aligned<C, kPack<C>>(data);
  }
  __device__ C* head(int64_t h) const { return data + h * head_stride; }
  // i counts the channels of all heads.
  __device__ unsigned head_of(int64_t i) const { return static_cast<unsigned>(i) / dim; }
  __device__ C* at(int64_t i) const {
    const unsigned h = head_of(i);
    return head(h) + (i - int64_t{h} * dim) * channel_stride;
  }
};

template <class C>
__device__ Token<C> token_of(const CacheView& view, HeadShape shape, int64_t batch, int64_t token) {
  C* data = static_cast<C*>(const_cast<void*>(view.data));
  return {data + batch * view.stride[0] + token * view.stride[2], view.stride[1], view.stride[3],
          static_cast<unsigned>(shape.dim)};
}

// ---- launching ---------------------------------------------------------------------------------

// Calls f(C{}) with the C++ type of the caches.
template <class F>
void with_type(CacheType type, const F& f) {
  switch (type) {
    case CacheType::kFloat64:
      return f(double{});
    case CacheType::kFloat32:
      return f(float{});
    case CacheType::kBfloat16:
      return f(Bfloat16{});
    case CacheType::kFloat16:
      return f(Float16{});
  }
}

inline dim3 grid_of(const Block& block, int64_t rows_per_block = 1) {
  return dim3(static_cast<unsigned>((block.rows + rows_per_block - 1) / rows_per_block),
              static_cast<unsigned>(block.streams));
}

// Blocks for one thread each of `threads` per stream.
inline dim3 blocks_of(int64_t threads, int streams) {
  return dim3(static_cast<unsigned>((threads + kMaxThreads - 1) / kMaxThreads),
              static_cast<unsigned>(streams));
}

// Whole warps, and no more than have a pack to do.
template <class C>
dim3 threads_of(int64_t cols) {
  const int64_t per_warp = kWarp * kPack<C>;
  const int64_t warps = (cols + per_warp - 1) / per_warp;
  return dim3(warps >= kMaxThreads / kWarp ? kMaxThreads : static_cast<unsigned>(warps) * kWarp);
}

}  // namespace
}  // namespace c2c::cuda
