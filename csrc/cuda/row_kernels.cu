// The CUDA kernels between the matrix products (see row_kernels.h): a block of threads per row and
// stream, 16 bytes an access where addresses allow it.
#include "row_kernels.h"
#include "rows.cuh"

namespace c2c::cuda {
namespace {

constexpr int kHeadRows = 4;  // rows that one read of a head's weights serves

template <class C>
__device__ void copy_token(const Token<C>& from, int64_t width, C* to) {
  const bool packed = from.packed() && aligned<C, kPack<C>>(to);
  for_columns<kPack<C>>(width, packed, [&](int64_t i, auto count) {
    store(load<decltype(count)::value>(from.at(i)), to + i);
  });
}

template <class C>
__global__ void __launch_bounds__(kMaxThreads)
    gather_kernel(const __grid_constant__ Streams streams, HeadShape sharer, HeadShape receiver,
                  Tokens tokens, int64_t first_row, Matrices c) {
  const StreamViews& view = streams.view[blockIdx.y];
  const Place place = place_of(tokens, first_row + blockIdx.x);
  const int64_t sharer_width = int64_t{sharer.heads} * sharer.dim;
  const int64_t receiver_width = int64_t{receiver.heads} * receiver.dim;
  C* to = row_of<C>(c, blockIdx.x);
  if (place.source < 0) {
    const bool packed = aligned<C, kPack<C>>(to);
    for_columns<kPack<C>>(sharer_width + receiver_width, packed, [&](int64_t i, auto count) {
      store(Pack<C, decltype(count)::value>{}, to + i);
    });
    return;
  }
  copy_token(token_of<C>(view.sharer, sharer, place.batch, place.source), sharer_width, to);
  copy_token(token_of<C>(view.base, receiver, place.batch, place.token), receiver_width,
             to + sharer_width);
}

// z = z_in + add, where add is a bias (row stride 0) or a residual, and z's norm.
template <class C, class A>
__global__ void __launch_bounds__(kMaxThreads)
    add_stats_kernel(int64_t cols, Matrices z_in, Matrices add, Matrices z, Matrices normed) {
  using T = Sums<C>;
  const C* x = row_of<C>(z_in, blockIdx.x);
  const A* a = row_of<A>(add, blockIdx.x);
  C* to = row_of<C>(z, blockIdx.x);
  const bool norm = normed.data != nullptr;
  C* n = norm ? row_of<C>(normed, blockIdx.x) : to;
  const bool packed = aligned<C, kPack<C>>(x) && aligned<A, kPack<C>>(a) &&
                      aligned<C, kPack<C>>(to) && aligned<C, kPack<C>>(n);
  T squares = 0;
  for_columns<kPack<C>>(cols, packed, [&](int64_t i, auto count) {
    constexpr int kCount = decltype(count)::value;
    const auto left = load<kCount>(x + i);
    const auto right = load<kCount>(a + i);
    Pack<C, kCount> sum;
    for (int k = 0; k < kCount; ++k) {
      narrow(widen(left.x[k]) + widen(right.x[k]), &sum.x[k]);
      const T rounded = widen(sum.x[k]);
      squares += rounded * rounded;
    }
    store(sum, to + i);
  });
  if (!norm) return;
  // Every thread reads the very columns that it has just written.
  write_norm(squares, to, n, cols, packed);
}

template <Activation kActivation, class C>
__device__ void activate_row(const C* x, C* to, int64_t cols) {
  const bool packed = aligned<C, kPack<C>>(x) && aligned<C, kPack<C>>(to);
  for_columns<kPack<C>>(cols, packed, [&](int64_t i, auto count) {
    constexpr int kCount = decltype(count)::value;
    auto pack = load<kCount>(x + i);
    for (int k = 0; k < kCount; ++k) narrow(activate<kActivation>(widen(pack.x[k])), &pack.x[k]);
    store(pack, to + i);
  });
}

template <Activation kActivation, class C>
__global__ void __launch_bounds__(kMaxThreads)
    activate_kernel(Matrices x, int64_t first_cols, Matrices first, int64_t second_cols,
                    Matrices second) {
  const C* from = row_of<C>(x, blockIdx.x);
  activate_row<kActivation>(from, row_of<C>(first, blockIdx.x), first_cols);
  if (second_cols > 0) {
    activate_row<kActivation>(from + first_cols, row_of<C>(second, blockIdx.x), second_cols);
  }
}

// A block per kHeadRows rows, a warp per head.
template <class C>
__global__ void __launch_bounds__(kMaxThreads)
    head_kernel(int64_t rows, int64_t cols, int heads, Matrices x, const Sums<C>* weight,
                Matrices logits) {
  using T = Sums<C>;
  constexpr int kCount = static_cast<int>(16 / sizeof(T));
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t first = int64_t{blockIdx.x} * kHeadRows;
  const C* row[kHeadRows];
  bool rows_aligned = true;
  for (int r = 0; r < kHeadRows; ++r) {  // past the end, the last one again: read, never written
    row[r] = row_of<C>(x, first + r < rows ? first + r : rows - 1);
    rows_aligned = rows_aligned && aligned<C, kCount>(row[r]);
  }
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  for (int head = static_cast<int>(threadIdx.x) / kWarp; head < heads; head += warps) {
    const T* w = weight + (int64_t{blockIdx.y} * heads + head) * cols;
    T sums[kHeadRows] = {};
    const bool packed = rows_aligned && aligned<T, kCount>(w);
    for_columns<kCount, 4>(cols, packed, lane, kWarp, [&](int64_t i, auto count) {
      constexpr int kWidth = decltype(count)::value;
      const auto factors = load<kWidth>(w + i);
      for (int r = 0; r < kHeadRows; ++r) {
        const auto values = load<kWidth>(row[r] + i);
        for (int k = 0; k < kWidth; ++k) sums[r] += factors.x[k] * widen(values.x[k]);
      }
    });
    for (int r = 0; r < kHeadRows; ++r) {
      const T sum = warp_sum(sums[r]);
      if (lane == 0 && first + r < rows) row_of<T>(logits, first + r)[head] = sum;
    }
  }
}

template <Integration kIntegration, class C>
__global__ void __launch_bounds__(kMaxThreads)
    combine_kernel(const __grid_constant__ Streams streams, HeadShape receiver, Tokens tokens,
                   int64_t first_row, Matrices projected, const Sums<C>* bias, Matrices logits,
                   const Sums<C>* head_bias, bool accumulate) {
  using T = Sums<C>;
  const StreamViews& view = streams.view[blockIdx.y];
  const Place place = place_of(tokens, first_row + blockIdx.x);
  const int64_t width = int64_t{receiver.heads} * receiver.dim;
  const Token<C> base = token_of<C>(view.base, receiver, place.batch, place.token);
  const Token<C> out = token_of<C>(view.out, receiver, place.batch, place.token);
  const bool caches_packed = base.packed() && out.packed();
  if (place.source < 0) {
    if (accumulate || base.data == out.data) return;
    for_columns<kPack<C>>(width, caches_packed, [&](int64_t i, auto count) {
      store(load<decltype(count)::value>(base.at(i)), out.at(i));
    });
    return;
  }
  const C* p = row_of<C>(projected, blockIdx.x);
  const T* b = bias + blockIdx.y * width;
  const T* head_logits = logits.data == nullptr ? nullptr : row_of<T>(logits, blockIdx.x);
  const bool packed = caches_packed && aligned<C, kPack<C>>(p) && aligned<T, kPack<C>>(b);
  for_columns<kPack<C>>(width, packed, [&](int64_t i, auto count) {
    constexpr int kCount = decltype(count)::value;
    const unsigned head = base.head_of(i);
    const T w =
        head_logits == nullptr
            ? T(1)
            : sigmoid(head_logits[head] + head_bias[int64_t{blockIdx.y} * receiver.heads + head]);
    const auto before = load<kCount>(base.at(i));
    const auto from = accumulate ? load<kCount>(out.at(i)) : before;
    const auto values = load<kCount>(p + i);
    const auto biases = load<kCount>(b + i);
    Pack<C, kCount> fused;
    for (int k = 0; k < kCount; ++k) {
      const T projection = widen(values.x[k]) + biases.x[k];
      narrow(integrate<kIntegration, T>(widen(from.x[k]), widen(before.x[k]), w, projection,
                                        accumulate),
             &fused.x[k]);
    }
    store(fused, out.at(i));
  });
}

template <class C, class A>
void launch_add_stats(const char* name, const Block& block, int64_t cols, const Matrices& z_in,
                      const Matrices& add, const Matrices& z, const Matrices& normed,
                      cudaStream_t stream) {
  launch(name, add_stats_kernel<C, A>, grid_of(block), threads_of<C>(cols), 0, stream, cols, z_in,
         add, z, normed);
}

}  // namespace

void launch_gather(CacheType type, const Block& block, const Streams& streams, HeadShape sharer,
                   HeadShape receiver, const Tokens& tokens, const Matrices& c,
                   cudaStream_t stream) {
  const int64_t width = int64_t{sharer.heads} * sharer.dim + int64_t{receiver.heads} * receiver.dim;
  with_type(type, [&](auto zero) {
    using C = decltype(zero);
    launch("gather", gather_kernel<C>, grid_of(block), threads_of<C>(width), 0, stream, streams,
           sharer, receiver, tokens, block.first_row, c);
  });
}

void launch_bias_stats(CacheType type, const Block& block, int64_t cols, const Matrices& z,
                       const void* bias, const Matrices& normed, cudaStream_t stream) {
  with_type(type, [&](auto zero) {
    using C = decltype(zero);
    const Matrices add{const_cast<void*>(bias), cols, 0};
    launch_add_stats<C, Sums<C>>("bias_stats", block, cols, z, add, z, normed, stream);
  });
}

void launch_residual_stats(CacheType type, const Block& block, int64_t cols, const Matrices& z_in,
                           const Matrices& delta, const Matrices& z, const Matrices& normed,
                           cudaStream_t stream) {
  with_type(type, [&](auto zero) {
    using C = decltype(zero);
    launch_add_stats<C, C>("residual_stats", block, cols, z_in, delta, z, normed, stream);
  });
}

void launch_activate(CacheType type, Activation activation, const Block& block, const Matrices& x,
                     int64_t first_cols, const Matrices& first, int64_t second_cols,
                     const Matrices& second, cudaStream_t stream) {
  with_type(type, [&](auto zero) {
    using C = decltype(zero);
    const auto run = [&](auto kernel) {
      const int64_t widest = first_cols > second_cols ? first_cols : second_cols;
      launch("activate", kernel, grid_of(block), threads_of<C>(widest), 0, stream, x, first_cols,
             first, second_cols, second);
    };
    switch (activation) {
      case Activation::kGelu:
        return run(&activate_kernel<Activation::kGelu, C>);
      case Activation::kRelu:
        return run(&activate_kernel<Activation::kRelu, C>);
      case Activation::kSilu:
        return run(&activate_kernel<Activation::kSilu, C>);
    }
  });
}

void launch_head(CacheType type, const Block& block, int64_t cols, int heads, const Matrices& x,
                 const void* weight, const Matrices& logits, cudaStream_t stream) {
  with_type(type, [&](auto zero) {
    using C = decltype(zero);
    const int warps = heads < kMaxThreads / kWarp ? heads : kMaxThreads / kWarp;
    launch("head", head_kernel<C>, grid_of(block, kHeadRows),
           dim3(static_cast<unsigned>(warps * kWarp)), 0, stream, block.rows, cols, heads, x,
           static_cast<const Sums<C>*>(weight), logits);
  });
}

void launch_combine(CacheType type, const Block& block, const Streams& streams, HeadShape receiver,
                    const Tokens& tokens, const Combine& combine, cudaStream_t stream) {
  const int64_t width = int64_t{receiver.heads} * receiver.dim;
  with_type(type, [&](auto zero) {
    using C = decltype(zero);
    using T = Sums<C>;
    const auto run = [&](auto kernel) {
      launch("combine", kernel, grid_of(block), threads_of<C>(width), 0, stream, streams, receiver,
             tokens, block.first_row, combine.projected, static_cast<const T*>(combine.bias),
             combine.logits, static_cast<const T*>(combine.head_bias), combine.accumulate);
    };
    switch (combine.integration) {
      case Integration::kResidual:
        return run(&combine_kernel<Integration::kResidual, C>);
      case Integration::kInterpolation:
        return run(&combine_kernel<Integration::kInterpolation, C>);
      case Integration::kReplacement:
        return run(&combine_kernel<Integration::kReplacement, C>);
    }
  });
}

}  // namespace c2c::cuda
