// The CUDA kernels between the matrix products of the training op that see no cache (see
// train_kernels.h): a block of threads per row and stream, but for the sums over rows.
#include "../train/train_math.h"
#include "rows.cuh"
#include "train_kernels.h"

namespace c2c::cuda {
namespace {

// ---- between the products
// ------------------------------------------------------------------------

// What dropout makes of neighbours in one row, the first of which is column `column`.
class DroppedRow {
 public:
  __device__ DroppedRow(const Dropout& dropout, uint64_t stream, uint64_t row, uint64_t cols)
      : dropout_(dropout), row_(dropout_row(dropout, stream, row, cols)) {}

  // values[k] = kept ? scale * values[k] : 0.
  template <int kCount, class T>
  __device__ void apply(int64_t column, T (&values)[kCount]) const {
    // Packs begin at multiples of their size, so that one of two lies in half a group.
    constexpr int kPerGroup = kCount < 4 ? kCount : 4;
    for (int first = 0; first < kCount; first += kPerGroup) {
      const int64_t at = column + first;
      const PhiloxWords words =
          philox(row_.seed, dropout_.offset, row_.first_group + static_cast<uint64_t>(at) / 4);
      const int word = static_cast<int>(at % 4);
      for (int k = 0; k < kPerGroup; ++k) {
        const bool keep = pick(words, word + k) >= dropout_.threshold;
        values[first + k] = keep ? values[first + k] * static_cast<T>(dropout_.scale) : T(0);
      }
    }
  }

 private:
  // Without an index that is known at run time only, which would put the words on the stack.
  static __device__ uint32_t pick(const PhiloxWords& words, int i) {
    const uint32_t low = i == 0 ? words.word[0] : words.word[1];
    const uint32_t high = i == 2 ? words.word[2] : words.word[3];
    return i < 2 ? low : high;
  }

  Dropout dropout_;
  DropoutRow row_;
};

template <class C>
__global__ void __launch_bounds__(kMaxThreads)
    norm_kernel(int64_t cols, Matrices z, Matrices normed) {
  using T = Sums<C>;
  const C* x = row_of<C>(z, blockIdx.x);
  C* n = row_of<C>(normed, blockIdx.x);
  const bool packed = aligned<C, kPack<C>>(x) && aligned<C, kPack<C>>(n);
  T squares = 0;
  for_columns<kPack<C>>(cols, packed, [&](int64_t i, auto count) {
    const auto pack = load<decltype(count)::value>(x + i);
    for (const C& value : pack.x) squares += T(widen(value)) * widen(value);
  });
  write_norm(squares, x, n, cols, packed);
}

template <class C>
__global__ void __launch_bounds__(kMaxThreads)
    dropout_residual_kernel(int64_t cols, Matrices z_in, Matrices delta, Dropout dropout,
                            int64_t first_stream, Matrices z, Matrices normed) {
  using T = Sums<C>;
  const C* x = row_of<C>(z_in, blockIdx.x);
  const C* d = row_of<C>(delta, blockIdx.x);
  C* to = row_of<C>(z, blockIdx.x);
  const bool norm = normed.data != nullptr;
  C* n = norm ? row_of<C>(normed, blockIdx.x) : to;
  const DroppedRow dropped(dropout, static_cast<uint64_t>(first_stream) + blockIdx.y, blockIdx.x,
                           static_cast<uint64_t>(cols));
  const bool packed = aligned<C, kPack<C>>(x) && aligned<C, kPack<C>>(d) &&
                      aligned<C, kPack<C>>(to) && aligned<C, kPack<C>>(n);
  T squares = 0;
  for_columns<kPack<C>>(cols, packed, [&](int64_t i, auto count) {
    constexpr int kCount = decltype(count)::value;
    const auto left = load<kCount>(x + i);
    const auto right = load<kCount>(d + i);
    T added[kCount];
    for (int k = 0; k < kCount; ++k) added[k] = widen(right.x[k]);
    dropped.apply(i, added);
    Pack<C, kCount> sum;
    for (int k = 0; k < kCount; ++k) {
      narrow(widen(left.x[k]) + added[k], &sum.x[k]);
      const T rounded = widen(sum.x[k]);
      squares += rounded * rounded;
    }
    store(sum, to + i);
  });
  if (!norm) return;
  // Every thread reads the very columns that it has just written.
  write_norm(squares, to, n, cols, packed);
}

template <class C>
__global__ void __launch_bounds__(kMaxThreads)
    dropout_backward_kernel(int64_t cols, Matrices dz, Dropout dropout, int64_t first_stream,
                            Matrices d_delta) {
  const C* from = row_of<C>(dz, blockIdx.x);
  C* to = row_of<C>(d_delta, blockIdx.x);
  const DroppedRow dropped(dropout, static_cast<uint64_t>(first_stream) + blockIdx.y, blockIdx.x,
                           static_cast<uint64_t>(cols));
  const bool packed = aligned<C, kPack<C>>(from) && aligned<C, kPack<C>>(to);
  for_columns<kPack<C>>(cols, packed, [&](int64_t i, auto count) {
    constexpr int kCount = decltype(count)::value;
    auto pack = load<kCount>(from + i);
    Sums<C> values[kCount];
    for (int k = 0; k < kCount; ++k) values[k] = widen(pack.x[k]);
    dropped.apply(i, values);
    for (int k = 0; k < kCount; ++k) narrow(values[k], &pack.x[k]);
    store(pack, to + i);
  });
}

template <Activation kActivation, class C>
__global__ void __launch_bounds__(kMaxThreads)
    activate_backward_kernel(int64_t cols, Matrices u, Matrices d, Matrices activated) {
  const C* from = row_of<C>(u, blockIdx.x);
  C* gradient = row_of<C>(d, blockIdx.x);
  C* to = row_of<C>(activated, blockIdx.x);
  const bool packed =
      aligned<C, kPack<C>>(from) && aligned<C, kPack<C>>(gradient) && aligned<C, kPack<C>>(to);
  for_columns<kPack<C>>(cols, packed, [&](int64_t i, auto count) {
    constexpr int kCount = decltype(count)::value;
    auto pack = load<kCount>(from + i);
    auto slopes = load<kCount>(static_cast<const C*>(gradient) + i);
    for (int k = 0; k < kCount; ++k) {
      const auto at = activate_with_slope<kActivation, Sums<C>>(widen(pack.x[k]));
      narrow(widen(slopes.x[k]) * at.slope, &slopes.x[k]);
      narrow(at.value, &pack.x[k]);
    }
    store(slopes, gradient + i);
    store(pack, to + i);
  });
}

template <class C>
__global__ void __launch_bounds__(kMaxThreads)
    norm_backward_kernel(int64_t cols, Matrices z, Matrices dn, Matrices first, Matrices second,
                         Matrices dz, Matrices normed) {
  using T = Sums<C>;
  const C* x = row_of<C>(z, blockIdx.x);
  const C* d = row_of<C>(dn, blockIdx.x);
  const C* one = row_of<C>(first, blockIdx.x);
  const C* two = second.data == nullptr ? nullptr : row_of<C>(second, blockIdx.x);
  C* to = row_of<C>(dz, blockIdx.x);
  C* n = row_of<C>(normed, blockIdx.x);
  const bool packed = aligned<C, kPack<C>>(x) && aligned<C, kPack<C>>(d) &&
                      aligned<C, kPack<C>>(one) && aligned<C, kPack<C>>(two) &&
                      aligned<C, kPack<C>>(to) && aligned<C, kPack<C>>(n);
  T sums[2] = {};  // of z^2, of dn z
  for_columns<kPack<C>>(cols, packed, [&](int64_t i, auto count) {
    constexpr int kCount = decltype(count)::value;
    const auto values = load<kCount>(x + i);
    const auto slopes = load<kCount>(d + i);
    for (int k = 0; k < kCount; ++k) {
      const T value = widen(values.x[k]);
      sums[0] += value * value;
      sums[1] += value * widen(slopes.x[k]);
    }
  });
  block_sums(sums);
  const T scale = T(1) / std::sqrt(sums[0] / static_cast<T>(cols) + static_cast<T>(kRmsEps));
  const T mean = sums[1] * scale / static_cast<T>(cols);  // of dn n
  for_columns<kPack<C>>(cols, packed, [&](int64_t i, auto count) {
    constexpr int kCount = decltype(count)::value;
    auto values = load<kCount>(x + i);
    const auto slopes = load<kCount>(d + i);
    auto sum = load<kCount>(one + i);
    const auto more = two == nullptr ? Pack<C, kCount>{} : load<kCount>(two + i);
    for (int k = 0; k < kCount; ++k) {
      const T n_k = widen(values.x[k]) * scale;
      const T through = scale * (widen(slopes.x[k]) - n_k * mean);
      narrow(widen(sum.x[k]) + widen(more.x[k]) + through, &sum.x[k]);
      narrow(n_k, &values.x[k]);
    }
    store(sum, to + i);
    store(values, n + i);
  });
}

// ---- sums over rows
// ------------------------------------------------------------------------------

constexpr int64_t kLeastSumRows = 128;  // of one part
constexpr int64_t kMostSumParts = 1024;

int64_t rows_per_part(int64_t rows) {
  const int64_t spread = (rows + kMostSumParts - 1) / kMostSumParts;
  return spread > kLeastSumRows ? spread : kLeastSumRows;
}

// Block (x, y, z): columns from x * 32 * kCount on, stream y, the `each` rows of part z; a warp
// takes every fourth row, a lane kCount columns.
template <int kCount, class X, class T>
__global__ void __launch_bounds__(kMaxThreads)
    column_sums_kernel(int64_t rows, int64_t each, int64_t cols, Matrices x, T* partial) {
  constexpr int kWarps = kMaxThreads / kWarp;
  __shared__ T of_warps[kWarps][kWarp * kCount];
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t column = (int64_t{blockIdx.x} * kWarp + lane) * kCount;
  const int64_t first = blockIdx.z * each;
  const int64_t last = first + each < rows ? first + each : rows;
  T sums[kCount] = {};
  if (column < cols) {
    for (int64_t row = first + warp; row < last; row += kWarps) {
      const auto values = load<kCount>(static_cast<const X*>(row_of<X>(x, row)) + column);
      for (int k = 0; k < kCount; ++k) sums[k] += widen(values.x[k]);
    }
  }
  for (int k = 0; k < kCount; ++k) of_warps[warp][lane * kCount + k] = sums[k];
  __syncthreads();
  T* to = partial + (int64_t{blockIdx.y} * gridDim.z + blockIdx.z) * cols;
  for (int i = static_cast<int>(threadIdx.x); i < kWarp * kCount; i += kMaxThreads) {
    const int64_t own = int64_t{blockIdx.x} * kWarp * kCount + i;
    if (own >= cols) continue;
    T sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += of_warps[w][i];
    to[own] = sum;
  }
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads)
    add_parts_kernel(int64_t parts, int64_t cols, const T* partial, T* out) {
  const int64_t column = int64_t{blockIdx.x} * kMaxThreads + threadIdx.x;
  if (column >= cols) return;
  T sum = 0;
  for (int64_t part = 0; part < parts; ++part) {
    sum += partial[(blockIdx.y * parts + part) * cols + column];
  }
  out[blockIdx.y * cols + column] = sum;
}

struct GateSizes {
  int64_t batch, heads, tokens;         // of what is summed
  int64_t by_batch, by_head, by_token;  // of the sums: each as above, or 1
};

// Calls f(value) for what belongs to element `index` of stream blockIdx.y's sums, in parts of which
// `part` is the own one of `parts`.
template <class T, class F>
__device__ void for_gated(const GateSizes& s, const T* values, int64_t index, int64_t part,
                          int64_t parts, const F& f) {
  const int64_t token = index % s.by_token;
  const int64_t head = index / s.by_token % s.by_head;
  const int64_t batch = index / s.by_token / s.by_head;
  const int64_t batches = s.batch / s.by_batch, heads = s.heads / s.by_head;
  const int64_t tokens = s.tokens / s.by_token;
  const T* from = values + ((blockIdx.y * s.batch + batch) * s.heads + head) * s.tokens + token;
  for (int64_t i = part; i < batches * heads * tokens; i += parts) {
    const int64_t b = i / (heads * tokens), h = i / tokens % heads, n = i % tokens;
    f(from[(b * s.heads + h) * s.tokens + n]);
  }
}

// A block per sum.
template <class T>
__global__ void __launch_bounds__(kMaxThreads)
    sum_gate_kernel(GateSizes sizes, const T* values, T* sums) {
  T sum = 0;
  for_gated(sizes, values, blockIdx.x, threadIdx.x, blockDim.x, [&](T value) { sum += value; });
  sum = block_sum(sum);
  if (threadIdx.x == 0) sums[int64_t{blockIdx.y} * gridDim.x + blockIdx.x] = sum;
}

// A thread per sum, where few values belong to each.
template <class T>
__global__ void __launch_bounds__(kMaxThreads)
    sum_short_gate_kernel(GateSizes sizes, int64_t count, const T* values, T* sums) {
  const int64_t index = int64_t{blockIdx.x} * kMaxThreads + threadIdx.x;
  if (index >= count) return;
  T sum = 0;
  for_gated(sizes, values, index, 0, 1, [&](T value) { sum += value; });
  sums[blockIdx.y * count + index] = sum;
}

// ---- launching
// -----------------------------------------------------------------------------------

// Calls f(integral constant) of an activation.
template <class F>
void with_activation(Activation activation, const F& f) {
  switch (activation) {
    case Activation::kGelu:
      return f(std::integral_constant<Activation, Activation::kGelu>{});
    case Activation::kRelu:
      return f(std::integral_constant<Activation, Activation::kRelu>{});
    case Activation::kSilu:
      return f(std::integral_constant<Activation, Activation::kSilu>{});
  }
}

template <int kCount, class X, class T>
void launch_sums(const Block& block, int64_t cols, const Matrices& x, T* partial, T* out,
                 cudaStream_t stream) {
  const int64_t parts = column_sum_parts(block.rows);
  const int64_t tiles = (cols + kWarp * kCount - 1) / (kWarp * kCount);
  launch("column_sums", &column_sums_kernel<kCount, X, T>,
         dim3(static_cast<unsigned>(tiles), static_cast<unsigned>(block.streams),
              static_cast<unsigned>(parts)),
         dim3(kMaxThreads), 0, stream, block.rows, rows_per_part(block.rows), cols, x,
         parts == 1 ? out : partial);
  if (parts == 1) return;
  launch("add_parts", &add_parts_kernel<T>, blocks_of(cols, block.streams), dim3(kMaxThreads), 0,
         stream, parts, cols, static_cast<const T*>(partial), out);
}

template <class X, class T>
void launch_sums_of(const Block& block, int64_t cols, const Matrices& x, void* partial, void* out,
                    cudaStream_t stream) {
  constexpr int kCount = kPack<X>;
  const bool packed = reinterpret_cast<uintptr_t>(x.data) % (kCount * sizeof(X)) == 0 &&
                      cols % kCount == 0 && x.stream_stride % kCount == 0 &&
                      x.row_stride % kCount == 0;
  if (packed) {
    launch_sums<kCount, X>(block, cols, x, static_cast<T*>(partial), static_cast<T*>(out), stream);
  } else {
    launch_sums<1, X>(block, cols, x, static_cast<T*>(partial), static_cast<T*>(out), stream);
  }
}

}  // namespace

void launch_norm(CacheType type, const Block& block, int64_t cols, const Matrices& z,
                 const Matrices& normed, cudaStream_t stream) {
  with_type(type, [&](auto zero) {
    using C = decltype(zero);
    launch("norm", &norm_kernel<C>, grid_of(block), threads_of<C>(cols), 0, stream, cols, z,
           normed);
  });
}

void launch_dropout_residual(CacheType type, const Block& block, int64_t cols, const Matrices& z_in,
                             const Matrices& delta, const Dropout& dropout, int64_t first_stream,
                             const Matrices& z, const Matrices& normed, cudaStream_t stream) {
  with_type(type, [&](auto zero) {
    using C = decltype(zero);
    launch("dropout_residual", &dropout_residual_kernel<C>, grid_of(block), threads_of<C>(cols), 0,
           stream, cols, z_in, delta, dropout, first_stream, z, normed);
  });
}

void launch_dropout_backward(CacheType type, const Block& block, int64_t cols, const Matrices& dz,
                             const Dropout& dropout, int64_t first_stream, const Matrices& d_delta,
                             cudaStream_t stream) {
  with_type(type, [&](auto zero) {
    using C = decltype(zero);
    launch("dropout_backward", &dropout_backward_kernel<C>, grid_of(block), threads_of<C>(cols), 0,
           stream, cols, dz, dropout, first_stream, d_delta);
  });
}

void launch_activate_backward(CacheType type, Activation activation, const Block& block,
                              int64_t cols, const Matrices& u, const Matrices& d,
                              const Matrices& activated, cudaStream_t stream) {
  with_type(type, [&](auto zero) {
    using C = decltype(zero);
    with_activation(activation, [&](auto which) {
      launch("activate_backward", &activate_backward_kernel<decltype(which)::value, C>,
             grid_of(block), threads_of<C>(cols), 0, stream, cols, u, d, activated);
    });
  });
}

void launch_norm_backward(CacheType type, const Block& block, int64_t cols, const Matrices& z,
                          const Matrices& dn, const Matrices& first, const Matrices& second,
                          const Matrices& dz, const Matrices& n, cudaStream_t stream) {
  with_type(type, [&](auto zero) {
    using C = decltype(zero);
    launch("norm_backward", &norm_backward_kernel<C>, grid_of(block), threads_of<C>(cols), 0,
           stream, cols, z, dn, first, second, dz, n);
  });
}

int64_t column_sum_parts(int64_t rows) {
  const int64_t each = rows_per_part(rows);
  return rows > each ? (rows + each - 1) / each : 1;
}

void launch_column_sums(CacheType type, bool wide, const Block& block, int64_t cols,
                        const Matrices& x, void* partial, void* out, cudaStream_t stream) {
  with_type(type, [&](auto zero) {
    using C = decltype(zero);
    using T = Sums<C>;
    if (wide) return launch_sums_of<T, T>(block, cols, x, partial, out, stream);
    launch_sums_of<C, T>(block, cols, x, partial, out, stream);
  });
}

void launch_sum_gate(CacheType type, int streams, int64_t batch, int64_t heads, int64_t tokens,
                     const void* d_gate, const int64_t shape[3], void* grad, cudaStream_t stream) {
  const GateSizes sizes{batch, heads, tokens, shape[0], shape[1], shape[2]};
  const int64_t count = shape[0] * shape[1] * shape[2];
  const bool few = batch * heads * tokens <= count * kWarp;
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const T* from = static_cast<const T*>(d_gate);
    T* to = static_cast<T*>(grad);
    if (few) {
      launch("sum_short_gate", &sum_short_gate_kernel<T>, blocks_of(count, streams),
             dim3(kMaxThreads), 0, stream, sizes, count, from, to);
    } else {
      launch("sum_gate", &sum_gate_kernel<T>, blocks_of(count * kMaxThreads, streams),
             dim3(kMaxThreads), 0, stream, sizes, from, to);
    }
  };
  if (type == CacheType::kFloat64) return run(double{});
  run(float{});
}

}  // namespace c2c::cuda
