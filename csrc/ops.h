// Arguments of the fusion ops after checking, and the host functions behind them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace c2c {

using torch::stable::Tensor;

// The packed weights of one shape group: G open streams, `num_keys` key streams first.
struct PackedWeights {
  Tensor in_weight;             // [G, hidden, sharer width + receiver width]
  Tensor in_bias;               // [G, hidden]
  Tensor w1;                    // [G, inner, hidden]
  Tensor w2;                    // [G, hidden, inner]
  Tensor branch_w1;             // [G, inner + hidden, hidden]
  std::vector<Tensor> deep_w2;  // [G, hidden, inner] each
  std::vector<Tensor> deep_w1;  // [G, inner, hidden] each
  Tensor out_weight;            // [G, receiver width, inner + hidden (folded) or hidden]
  Tensor out_bias;              // [G, receiver width]
  Tensor head_weight;           // [G, receiver heads, hidden + hidden]
  Tensor head_bias;             // [G, receiver heads]
};

struct StreamTensors {
  const Tensor* out;     // [B, Ht, N, Dt]
  const Tensor* base;    // [B, Ht, N, Dt]
  const Tensor* sharer;  // [B, Hs, S, Ds]
};

// Sizes that every stream of a checked call shares.
struct FuseSizes {
  int64_t streams, batch, tokens, sharer_tokens;
  int64_t sharer_heads, sharer_dim, receiver_heads, receiver_dim;
  int64_t hidden, inner;
  bool folded;  // the projection branch's last W2 is folded into out_weight
};

struct FuseCall {
  std::vector<StreamTensors> streams;
  FuseSizes sizes;
};

// Checks every argument of c2c::fuse_ on the host and resolves streams. Throws std::runtime_error
// naming the argument, the rule and both numbers.
FuseCall check_fuse(const std::vector<Tensor>& out_keys, const std::vector<Tensor>& out_values,
                    const std::vector<Tensor>& base_keys, const std::vector<Tensor>& base_values,
                    const std::vector<Tensor>& sharer_keys,
                    const std::vector<Tensor>& sharer_values,
                    const std::optional<Tensor>& token_map, const std::vector<int64_t>& layers,
                    const std::vector<int64_t>& sources, int64_t num_keys, int64_t sharer_heads,
                    const PackedWeights& weights);

// c2c::fuse_ on CPU tensors.
void fuse_cpu(std::vector<Tensor> out_keys, std::vector<Tensor> out_values,
              std::vector<Tensor> base_keys, std::vector<Tensor> base_values,
              std::vector<Tensor> sharer_keys, std::vector<Tensor> sharer_values,
              std::optional<Tensor> token_map, std::vector<int64_t> layers,
              std::vector<int64_t> sources, int64_t num_keys, int64_t sharer_heads,
              Tensor in_weight, Tensor in_bias, Tensor w1, Tensor w2, Tensor branch_w1,
              std::vector<Tensor> deep_w2, std::vector<Tensor> deep_w1, Tensor out_weight,
              Tensor out_bias, Tensor head_weight, Tensor head_bias, std::string activation,
              bool accumulate);

}  // namespace c2c
