// Arguments of the fusion ops after checking, and the host functions behind them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "cache_view.h"

namespace c2c {

using torch::stable::Tensor;

enum class Activation;  // scalar_math.h
enum class Integration;

// Fuses the open streams of one shape group. Reads base, writes out (which may be base itself); the
// lists hold one tensor per layer of the receiver (out, base) or the sharer. Streams that `layers`
// does not name are not touched. token_map: int64 [N] or [B, N], sharer token of every receiver
// token; values outside 0 .. S-1 leave the token as it is.
constexpr const char* kFuseSchema =
    "fuse_(Tensor(a!)[] out_keys, Tensor(b!)[] out_values, Tensor[] base_keys, "
    "Tensor[] base_values, Tensor[] sharer_keys, Tensor[] sharer_values, Tensor? token_map, "
    "int[] layers, int[] sources, int num_keys, int sharer_heads, int sharer_dim, "
    "int receiver_heads, int receiver_dim, int inner, bool reads_receiver, Tensor in_weight, "
    "Tensor in_bias, Tensor w1, "
    "Tensor w2, Tensor branch_w1, Tensor[] deep_w2, Tensor[] deep_w1, Tensor out_weight, "
    "Tensor out_bias, Tensor head_weight, Tensor head_bias, str activation, str integration, "
    "bool accumulate) -> ()";

// Training (train/fuse_train.h), functional. The streams of one shape group and their parameters as
// FuserGroup has them; gate: [G, 1|B, 1|Ht, 1|N]. `saved` is what the backward reads beside the
// inputs: nothing with recompute.
#define C2C_TRAIN_INPUTS                                                                    \
  "Tensor[] base, Tensor[] sharer, Tensor? token_map, Tensor? gate, "                       \
  "Tensor in_weight, Tensor in_bias, Tensor shared_norm, Tensor shared_w1, "                \
  "Tensor shared_w2, Tensor proj_norm, Tensor proj_w1, Tensor proj_w2, Tensor out_weight, " \
  "Tensor out_bias, Tensor? weight_norm, Tensor? weight_w1, Tensor? weight_w2, "            \
  "Tensor? head_weight, Tensor? head_bias, str activation, str integration, "               \
  "bool reads_receiver, float dropout, SymInt seed, SymInt offset, Tensor? row_seeds, "     \
  "bool recompute"
constexpr const char* kFuseTrainSchema =
    "fuse(" C2C_TRAIN_INPUTS ") -> (Tensor[] out, Tensor[] saved)";
// needed: of base, sharer, gate and every parameter in order; what it wants is returned in that
// order, base and sharer one per stream.
constexpr const char* kFuseTrainBackwardSchema =
    "fuse_backward(Tensor[] grad_out, " C2C_TRAIN_INPUTS
    ", Tensor[] saved, bool[] needed) -> Tensor[]";
#undef C2C_TRAIN_INPUTS

// Where the tensors of a call have to be, and how the packed matrices lie there.
enum class Placement {
  kCpu,      // matrices in panels (cpu/panel_gemm.h)
  kCuda,     // one GPU, matrices as they are
  kCpuRows,  // the CPU, matrices as they are: CUDA kernels emulated
};

// The packed weights of one shape group: G open streams, `num_keys` key streams first. Matrices are
// in the caches' dtype; on the CPU, [G, n, k] stands for panels [G, n / 16, k / pair, 16, pair],
// rounded up and filled with zeros (cpu/panel_gemm.h). Biases and the head are float64 for float64
// caches, else float32.
struct PackedWeights {
  Tensor in_weight;             // [G, hidden, sharer width + receiver width], or sharer width alone
  Tensor in_bias;               // [G, hidden]
  Tensor w1;                    // [G, inner, hidden]
  Tensor w2;                    // [G, hidden, inner]
  Tensor branch_w1;             // [G, inner + weighting, hidden]; weighting: hidden, or 0 without
  std::vector<Tensor> deep_w2;  // [G, hidden, inner] each
  std::vector<Tensor> deep_w1;  // [G, inner, hidden] each
  Tensor out_weight;            // [G, receiver width, inner + hidden (folded) or hidden]
  Tensor out_bias;              // [G, receiver width]
  Tensor head_weight;           // [G, receiver heads, hidden + hidden]; [G, 0, 0] without weighting
  Tensor head_bias;             // [G, receiver heads], [G, 0]
};

inline CacheType cache_type(torch::headeronly::ScalarType type) {
  using torch::headeronly::ScalarType;
  switch (type) {
    case ScalarType::Double:
      return CacheType::kFloat64;
    case ScalarType::BFloat16:
      return CacheType::kBfloat16;
    case ScalarType::Half:
      return CacheType::kFloat16;
    default:
      return CacheType::kFloat32;
  }
}

inline CacheView view_of(const Tensor& t) {
  return {t.data_ptr(), {t.stride(0), t.stride(1), t.stride(2), t.stride(3)}};
}

// (heads, head dim) of one layer's keys or values.
struct KVShape {
  int64_t heads, dim;
  int64_t width() const { return heads * dim; }
};

struct StreamTensors {
  const Tensor* out;     // [B, Ht, N, Dt]
  const Tensor* base;    // [B, Ht, N, Dt]
  const Tensor* sharer;  // [B, Hs, S, Ds]
};

// Sizes that every stream of a checked call shares.
struct FuseSizes {
  int64_t streams, batch, tokens, sharer_tokens;
  KVShape sharer, receiver;
  int64_t hidden, inner;
  int64_t weighting;    // inner width of the weighting branch: hidden, or 0 without weighting
  bool reads_receiver;  // the projection reads [s ; t]; otherwise s alone
  bool folded;          // the projection branch's last W2 is folded into out_weight
};

struct FuseCall {
  std::vector<StreamTensors> streams;
  FuseSizes sizes;
};

// Arguments of fuse_ by name; throw std::runtime_error for any other.
Activation parse_activation(const std::string& name);
Integration parse_integration(const std::string& name);

// Checks every argument of c2c::fuse_ on the host and resolves streams. Throws std::runtime_error
// naming the argument, the rule and both numbers.
FuseCall check_fuse(Placement placement, const std::vector<Tensor>& out_keys,
                    const std::vector<Tensor>& out_values, const std::vector<Tensor>& base_keys,
                    const std::vector<Tensor>& base_values, const std::vector<Tensor>& sharer_keys,
                    const std::vector<Tensor>& sharer_values,
                    const std::optional<Tensor>& token_map, const std::vector<int64_t>& layers,
                    const std::vector<int64_t>& sources, int64_t num_keys, KVShape sharer_shape,
                    KVShape receiver_shape, int64_t inner, bool reads_receiver,
                    const PackedWeights& weights);

// c2c::check_inplace: throws unless every key and value can be written without changing another one
// or a sharer's.
void check_inplace(std::vector<Tensor> keys, std::vector<Tensor> values,
                   std::vector<Tensor> sharer_keys, std::vector<Tensor> sharer_values);

// c2c::stage_*: single stages of fuse_cpu (cpu/stage_ops.cpp).
void stage_gather(Tensor out,           // [B * N, sharer width + receiver width]
                  Tensor sharer,        // [B, Hs, S, Ds]
                  Tensor base);         // [B, Ht, N, Dt]
void stage_bias_stats(Tensor z,         // [G, M, cols]
                      Tensor rstd,      // [G, M]
                      Tensor bias);     // [G, cols]
void stage_multiply(Tensor out,         // [G, M, n]
                    Tensor x,           // [G, M, k]
                    Tensor panels);     // [G, n / 16, k / pair, 16, pair]
void stage_scale_activate(Tensor out,   // [G, M, cols]
                          Tensor x,     // [G, M, cols]
                          Tensor rstd,  // [G, M]
                          std::string activation);
void stage_residual_stats(Tensor out,     // [G, M, cols]
                          Tensor rstd,    // [G, M]
                          Tensor z,       // [G, M, cols]
                          Tensor delta);  // [G, M, cols]
void stage_head(Tensor logits,            // [G, M, heads]
                Tensor x,                 // [G, M, cols]
                Tensor weight);           // [G, heads, cols]
void stage_combine(Tensor out,            // [B, H, N, D]
                   Tensor base,           // [B, H, N, D]
                   Tensor projected,      // [B * N, H * D]
                   Tensor bias,           // [H * D]
                   Tensor logits,         // [B * N, H]
                   Tensor head_bias,      // [H]
                   std::string integration);

}  // namespace c2c
