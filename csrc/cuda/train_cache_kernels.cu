// The CUDA kernels of the training op that read or write caches and their gradients (see
// train_kernels.h): a block of threads per token and stream.
#include "../train/train_math.h"
#include "rows.cuh"
#include "train_kernels.h"

namespace c2c::cuda {
namespace {

template <class T>
__device__ T gate_of(const Gate& gate, const Place& place, unsigned head) {
  if (gate.data == nullptr) return T(1);
  return static_cast<const T*>(
      gate.data)[blockIdx.y * gate.stride[0] + place.batch * gate.stride[1] +
                 head * gate.stride[2] + place.token * gate.stride[3]];
}

// The weight of a head, sigmoid(logit); logits null: 1.
template <class C>
__device__ Sums<C> weight_of(const C* logits, const Sums<C>* bias, unsigned head) {
  using T = Sums<C>;
  return logits == nullptr ? T(1) : sigmoid(T(widen(logits[head])) + bias[head]);
}

template <Integration kIntegration, class C>
__global__ void __launch_bounds__(kMaxThreads, 8)  // 64 registers: ptxas spills where it takes 32
    gated_combine_kernel(const __grid_constant__ Streams streams, HeadShape receiver, Tokens tokens,
                         Weighted weighted) {
  using T = Sums<C>;
  const StreamViews& view = streams.view[blockIdx.y];
  const Place place = place_of(tokens, blockIdx.x);
  const int64_t width = int64_t{receiver.heads} * receiver.dim;
  const Token<C> base = token_of<C>(view.base, receiver, place.batch, place.token);
  const Token<C> out = token_of<C>(view.out, receiver, place.batch, place.token);
  const bool caches_packed = base.packed() && out.packed();
  if (place.source < 0) {
    for_columns<kPack<C>>(width, caches_packed, [&](int64_t i, auto count) {
      store(load<decltype(count)::value>(base.at(i)), out.at(i));
    });
    return;
  }
  const C* p = row_of<C>(weighted.projected, blockIdx.x);
  const T* b = static_cast<const T*>(weighted.bias) + blockIdx.y * width;
  const C* logits =
      weighted.logits.data == nullptr ? nullptr : row_of<C>(weighted.logits, blockIdx.x);
  const T* head_bias = static_cast<const T*>(weighted.head_bias) + blockIdx.y * receiver.heads;
  const bool packed = caches_packed && aligned<C, kPack<C>>(p) && aligned<T, kPack<C>>(b);
  for_columns<kPack<C>>(width, packed, [&](int64_t i, auto count) {
    constexpr int kCount = decltype(count)::value;
    const unsigned head = base.head_of(i);
    const T gate = gate_of<T>(weighted.gate, place, head);
    const T weight = weight_of(logits, head_bias, head);
    const auto before = load<kCount>(base.at(i));
    const auto values = load<kCount>(p + i);
    const auto biases = load<kCount>(b + i);
    Pack<C, kCount> fused;
    for (int k = 0; k < kCount; ++k) {
      const T projection = widen(values.x[k]) + biases.x[k];
      const T t = widen(before.x[k]);
      narrow(integrate_gated<kIntegration>(t, gate, weight, projection), &fused.x[k]);
      if (gate == T(0)) fused.x[k] = before.x[k];  // whatever the projection is
    }
    store(fused, out.at(i));
  });
}

// What a head of a row passes on to its gate's gradient [streams, batch, heads, tokens].
template <class T>
__device__ void set_gate_gradient(void* gradients, const Tokens& tokens, const Place& place,
                                  int heads, int head, T value) {
  if (gradients == nullptr) return;
  const int64_t matrix = blockIdx.y * tokens.batch + place.batch;
  static_cast<T*>(gradients)[(matrix * heads + head) * tokens.tokens + place.token] = value;
}

// A warp per head.
template <Integration kIntegration, class C>
__global__ void __launch_bounds__(kMaxThreads)
    combine_backward_kernel(const __grid_constant__ GradientStreams streams, HeadShape receiver,
                            Tokens tokens, Weighted weighted, CombineGradients gradients) {
  using T = Sums<C>;
  const GradientViews& view = streams.view[blockIdx.y];
  const Place place = place_of(tokens, blockIdx.x);
  const int heads = receiver.heads;
  const int64_t dim = receiver.dim, width = heads * dim;
  const Token<C> above = token_of<C>(view.grad_out, receiver, place.batch, place.token);
  const bool wants_base = view.grad_base.data != nullptr;
  const Token<C> d_base =
      wants_base ? token_of<C>(view.grad_base, receiver, place.batch, place.token) : above;
  C* dp = row_of<C>(gradients.projected, blockIdx.x);
  C* d_logits =
      gradients.logits.data == nullptr ? nullptr : row_of<C>(gradients.logits, blockIdx.x);
  const bool outer_packed = above.packed() && d_base.packed() && aligned<C, kPack<C>>(dp);
  if (place.source < 0) {
    for_columns<kPack<C>>(width, outer_packed, [&](int64_t i, auto count) {
      constexpr int kCount = decltype(count)::value;
      store(Pack<C, kCount>{}, dp + i);
      if (wants_base) store(load<kCount>(static_cast<const C*>(above.at(i))), d_base.at(i));
    });
    for (int head = static_cast<int>(threadIdx.x); head < heads; head += blockDim.x) {
      if (d_logits != nullptr) narrow(T(0), &d_logits[head]);
      set_gate_gradient(gradients.gate, tokens, place, heads, head, T(0));
    }
    return;
  }
  const Token<C> base = token_of<C>(view.base, receiver, place.batch, place.token);
  const C* p = row_of<C>(weighted.projected, blockIdx.x);
  const T* bias = static_cast<const T*>(weighted.bias) + blockIdx.y * width;
  const C* logits =
      weighted.logits.data == nullptr ? nullptr : row_of<C>(weighted.logits, blockIdx.x);
  const T* head_bias = static_cast<const T*>(weighted.head_bias) + blockIdx.y * heads;
  const bool packed =
      outer_packed && base.packed() && aligned<C, kPack<C>>(p) && aligned<T, kPack<C>>(bias);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  for (int head = static_cast<int>(threadIdx.x) / kWarp; head < heads; head += warps) {
    const int64_t first = head * dim;
    const C* o_head = above.head(head);
    const C* t_head = base.head(head);
    C* d_head = d_base.head(head);
    const T gate = gate_of<T>(weighted.gate, place, head);
    const T weight = weight_of(logits, head_bias, head);
    const bool closed = gate == T(0);  // nothing comes through, not even NaN
    const T factor = gate * weight;
    const T direct = closed ? T(1) : base_slope<kIntegration>(gate, weight);
    T sums[2] = {};  // of o V, and, where it counts by itself, of o t
    for_columns<kPack<C>>(dim, packed, lane, kWarp, [&](int64_t i, auto count) {
      constexpr int kCount = decltype(count)::value;
      const auto o = load<kCount>(o_head + i * above.channel_stride);
      const auto t = load<kCount>(t_head + i * base.channel_stride);
      const auto values = load<kCount>(p + first + i);
      const auto biases = load<kCount>(bias + first + i);
      Pack<C, kCount> d_projected, d_t;
      for (int k = 0; k < kCount; ++k) {
        const T o_k = widen(o.x[k]), t_k = widen(t.x[k]);
        T value = widen(values.x[k]) + biases.x[k];
        if constexpr (kIntegration == Integration::kInterpolation) value -= t_k;
        sums[0] += o_k * value;
        if constexpr (kIntegration == Integration::kReplacement) sums[1] += o_k * t_k;
        narrow(closed ? T(0) : factor * o_k, &d_projected.x[k]);
        narrow(direct * o_k, &d_t.x[k]);
      }
      store(d_projected, dp + first + i);
      if (wants_base) store(d_t, d_head + i * d_base.channel_stride);
    });
    const T with_values = warp_sum(sums[0]);
    const T with_base = kIntegration == Integration::kReplacement ? warp_sum(sums[1]) : T(0);
    if (lane != 0) continue;
    const T slope = closed ? T(0) : factor * (T(1) - weight) * with_values;
    if (d_logits != nullptr) narrow(slope, &d_logits[head]);
    set_gate_gradient(gradients.gate, tokens, place, heads, head, weight * with_values - with_base);
  }
}

template <class C>
__device__ Token<C> token_of(const Contiguous& caches, HeadShape shape, int64_t tokens,
                             int64_t batch, int64_t token) {
  const int64_t dim = shape.dim;
  return token_of<C>(
      CacheView{caches.data[blockIdx.y], {shape.heads * tokens * dim, tokens * dim, dim, 1}}, shape,
      batch, token);
}

template <class C>
__global__ void __launch_bounds__(kMaxThreads)
    add_base_kernel(const __grid_constant__ Contiguous caches, HeadShape receiver, Tokens tokens,
                    Matrices dc) {
  const Place place = place_of(tokens, blockIdx.x);
  if (place.source < 0) return;
  const Token<C> to = token_of<C>(caches, receiver, tokens.tokens, place.batch, place.token);
  const C* from = row_of<C>(dc, blockIdx.x);
  const bool packed = to.packed() && aligned<C, kPack<C>>(from);
  for_columns<kPack<C>>(int64_t{receiver.heads} * receiver.dim, packed, [&](int64_t i, auto count) {
    constexpr int kCount = decltype(count)::value;
    auto sum = load<kCount>(static_cast<const C*>(to.at(i)));
    const auto more = load<kCount>(from + i);
    for (int k = 0; k < kCount; ++k) {
      narrow(widen(sum.x[k]) + widen(more.x[k]), &sum.x[k]);
    }
    store(sum, to.at(i));
  });
}

// Thread i of a batch row's `blocks` looks for the smallest n from `from` on whose source is
// `wanted`: for i < sharer tokens the first reader of token i, else the reader after token
// i - sharer tokens (what is found for a token that stays is never read).
__global__ void __launch_bounds__(kMaxThreads)
    readers_kernel(Tokens tokens, unsigned blocks, Readers readers) {
  __shared__ int64_t sources[kMaxThreads];
  const int64_t count = tokens.tokens, targets = tokens.sharer_tokens;
  const int64_t batch = blockIdx.x / blocks, first_row = batch * count;
  const int64_t block_start = int64_t{blockIdx.x % blocks} * kMaxThreads;
  const int64_t i = block_start + threadIdx.x;
  const bool is_first = i < targets, is_next = !is_first && i < targets + count;
  int64_t wanted = i, from = 0;
  if (is_next) {
    wanted = place_of(tokens, first_row + i - targets).source;
    from = i - targets + 1;
  }
  int64_t found = count;
  // Nobody in the block looks before this token.
  const int64_t start = block_start < targets ? 0 : block_start - targets;
  for (int64_t tile = start; tile < count; tile += kMaxThreads) {
    const int64_t own = tile + threadIdx.x;
    sources[threadIdx.x] = own < count ? place_of(tokens, first_row + own).source : -1;
    __syncthreads();
    for (int k = 0; k < kMaxThreads; ++k) {
      const int64_t n = tile + k;
      if (found == count && n >= from && sources[k] == wanted) found = n;
    }
    __syncthreads();
  }
  if (is_first) readers.first[batch * targets + i] = found;
  if (is_next) readers.next[first_row + i - targets] = found;
}

// A block per sharer token.
template <class C>
__global__ void __launch_bounds__(kMaxThreads)
    scatter_sharer_kernel(const __grid_constant__ Contiguous caches, HeadShape sharer,
                          Tokens tokens, Readers readers, Matrices dc) {
  using T = Sums<C>;
  const int64_t batch = blockIdx.x / tokens.sharer_tokens;
  const int64_t token = blockIdx.x % tokens.sharer_tokens;
  const int64_t first_row = batch * tokens.tokens;
  const bool by_map = tokens.map != nullptr;
  const int64_t first = by_map ? readers.first[blockIdx.x] : token;
  const Token<C> to = token_of<C>(caches, sharer, tokens.sharer_tokens, batch, token);
  const bool packed = to.packed() && aligned<C, kPack<C>>(static_cast<C*>(dc.data)) &&
                      dc.stream_stride % kPack<C> == 0 && dc.row_stride % kPack<C> == 0;
  for_columns<kPack<C>>(int64_t{sharer.heads} * sharer.dim, packed, [&](int64_t i, auto count) {
    constexpr int kCount = decltype(count)::value;
    T sums[kCount] = {};
    for (int64_t n = first; n < tokens.tokens;
         n = by_map ? readers.next[first_row + n] : tokens.tokens) {
      const auto more = load<kCount>(static_cast<const C*>(row_of<C>(dc, first_row + n)) + i);
      for (int k = 0; k < kCount; ++k) sums[k] += widen(more.x[k]);
    }
    Pack<C, kCount> sum;
    for (int k = 0; k < kCount; ++k) narrow(sums[k], &sum.x[k]);
    store(sum, to.at(i));
  });
}

// Calls f(integral constant) of an integration.
template <class F>
void with_integration(Integration integration, const F& f) {
  switch (integration) {
    case Integration::kResidual:
      return f(std::integral_constant<Integration, Integration::kResidual>{});
    case Integration::kInterpolation:
      return f(std::integral_constant<Integration, Integration::kInterpolation>{});
    case Integration::kReplacement:
      return f(std::integral_constant<Integration, Integration::kReplacement>{});
  }
}

}  // namespace

void launch_gated_combine(CacheType type, const Block& block, const Streams& streams,
                          HeadShape receiver, const Tokens& tokens, const Weighted& weighted,
                          cudaStream_t stream) {
  const int64_t width = int64_t{receiver.heads} * receiver.dim;
  with_type(type, [&](auto zero) {
    using C = decltype(zero);
    with_integration(weighted.integration, [&](auto which) {
      launch("gated_combine", &gated_combine_kernel<decltype(which)::value, C>, grid_of(block),
             threads_of<C>(width), 0, stream, streams, receiver, tokens, weighted);
    });
  });
}

void launch_combine_backward(CacheType type, const Block& block, const GradientStreams& streams,
                             HeadShape receiver, const Tokens& tokens, const Weighted& weighted,
                             const CombineGradients& gradients, cudaStream_t stream) {
  const int warps = receiver.heads < kMaxThreads / kWarp ? receiver.heads : kMaxThreads / kWarp;
  with_type(type, [&](auto zero) {
    using C = decltype(zero);
    with_integration(weighted.integration, [&](auto which) {
      launch("combine_backward", &combine_backward_kernel<decltype(which)::value, C>,
             grid_of(block), dim3(static_cast<unsigned>(warps * kWarp)), 0, stream, streams,
             receiver, tokens, weighted, gradients);
    });
  });
}

void launch_add_base(CacheType type, const Block& block, const Contiguous& caches,
                     HeadShape receiver, const Tokens& tokens, const Matrices& dc,
                     cudaStream_t stream) {
  const int64_t width = int64_t{receiver.heads} * receiver.dim;
  with_type(type, [&](auto zero) {
    using C = decltype(zero);
    launch("add_base", &add_base_kernel<C>, grid_of(block), threads_of<C>(width), 0, stream, caches,
           receiver, tokens, dc);
  });
}

void launch_readers(const Tokens& tokens, const Readers& readers, cudaStream_t stream) {
  const unsigned blocks = blocks_of(tokens.sharer_tokens + tokens.tokens, 1).x;
  const dim3 grid(static_cast<unsigned>(tokens.batch * blocks));
  launch("readers", &readers_kernel, grid, dim3(kMaxThreads), 0, stream, tokens, blocks, readers);
}

void launch_scatter_sharer(CacheType type, int streams, const Contiguous& caches, HeadShape sharer,
                           const Tokens& tokens, const Readers& readers, const Matrices& dc,
                           cudaStream_t stream) {
  const Block block{streams, 0, tokens.batch * tokens.sharer_tokens};
  const int64_t width = int64_t{sharer.heads} * sharer.dim;
  with_type(type, [&](auto zero) {
    using C = decltype(zero);
    launch("scatter_sharer", &scatter_sharer_kernel<C>, grid_of(block), threads_of<C>(width), 0,
           stream, caches, sharer, tokens, readers, dc);
  });
}

}  // namespace c2c::cuda
