// The CPU kernels between the GEMMs. Raw pointers and strides, no torch header; row_kernels.cpp is
// compiled once per instruction set and `row_kernels` picks the best one this CPU runs.
#pragma once

#include <cstdint>

#include "../cache_view.h"

namespace c2c {

enum class Activation;
enum class Integration;

namespace cpu {

struct HeadShape {
  int64_t heads;
  int64_t dim;
};

// One token to fuse: sharer token `source` goes with receiver token `token` of batch row `batch`.
struct Row {
  int32_t batch;
  int32_t token;
  int32_t source;
};

// Where a kernel leaves a row rounded to bfloat16 as well, as products of the CPU's own read it,
// and a zero behind it: they read pairs. `data` null: nowhere.
struct RoundedRows {
  uint16_t* data = nullptr;
  int64_t stride = 0;
};

// T: double for float64 caches, float for all others. `count` rows everywhere.
template <class T>
struct RowKernels {
  const char* instruction_set;

  // c[r] = [sharer heads flattened ; receiver heads flattened], widened.
  void (*gather)(const CacheView& sharer, HeadShape sharer_shape, const CacheView& base,
                 HeadShape base_shape, const Row* rows, int64_t count,
                 T* c);  // [count, sharer width + base width]

  // The same without widening, for bfloat16 caches; null for others.
  void (*gather_rounded)(const CacheView& sharer, HeadShape sharer_shape, const CacheView& base,
                         HeadShape base_shape, const Row* rows, int64_t count, RoundedRows c);

  // z += bias; rstd[r] = 1 / sqrt(mean(z[r]^2) + eps).
  void (*bias_stats)(T* z,           // [count, cols]
                     const T* bias,  // [cols]
                     int64_t count, int64_t cols,
                     T* rstd,  // [count]
                     RoundedRows rounded);

  // out[r] = activation(rstd[r] * a[r]).
  void (*scale_activate)(const T* a, int64_t lda,  // [count, cols], row stride lda
                         const T* rstd,            // [count]
                         int64_t count, int64_t cols, Activation activation, T* out,
                         int64_t ldo);  // [count, cols], row stride ldo; may be a

  // The same, rounded to bfloat16; after an odd last column whatever is there stays.
  void (*scale_activate_rounded)(const T* a, int64_t lda, const T* rstd, int64_t count,
                                 int64_t cols, Activation activation, RoundedRows out);

  // out = z + delta; rstd as above, skipped if null.
  void (*residual_stats)(const T* z, int64_t ldz,  // [count, cols]
                         const T* delta,           // [count, cols], contiguous
                         int64_t count, int64_t cols, T* out, int64_t ldo,  // may be z
                         T* rstd,                                           // [count] or null
                         RoundedRows rounded);                              // of out

  // logits[r] = weight x[r], summed in parts. A GEMM's one long running sum over 2 * hidden terms
  // made these logits less exact than the unfolded ones, and each scales a whole head.
  void (*head_logits)(const T* x, int64_t ldx,  // [count, cols], row stride ldx
                      const T* weight,          // [heads, cols]
                      int64_t count, int64_t cols, int64_t heads,
                      T* logits);  // [count, heads]

  // out = the integration of base and P = projected + projected_bias, weighted by w =
  // sigmoid(weighting + weighting_bias), or 1 where weighting is null; rounded once. With
  // accumulate: out += what the integration would change base by.
  void (*combine)(const CacheView& base, const CacheView& out, HeadShape shape, const Row* rows,
                  int64_t count,
                  const T* projected,       // [count, heads * dim]
                  const T* projected_bias,  // [heads * dim]
                  const T* weighting,       // [count, heads] or null
                  const T* weighting_bias,  // [heads]
                  Integration integration, bool accumulate);

  // out = base for these tokens, bit for bit.
  void (*copy)(const CacheView& base, const CacheView& out, HeadShape shape, const Row* rows,
               int64_t count);
};

template <class T>
const RowKernels<T>& row_kernels(CacheType type);
template <>
const RowKernels<float>& row_kernels<float>(CacheType type);
template <>
const RowKernels<double>& row_kernels<double>(CacheType type);

// "avx512bf16", "avx512", "avx2" or "baseline".
// Exported, as the only function: the Python module reports it.
__attribute__((visibility("default"))) const char* instruction_set();

}  // namespace cpu
}  // namespace c2c
