// A checked call of the training ops c2c::fuse and c2c::fuse_backward, for every device.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "../ops.h"
#include "dropout.h"

namespace c2c::train {

using torch::headeronly::ScalarType;

// The parameters of one shape group as FuserGroup has them, in their own dtypes, contiguous.
// Undefined where a call has none (std::nullopt).
struct Parameters {
  Tensor in_weight;    // [G, hidden, sharer width + receiver width], or sharer width alone
  Tensor in_bias;      // [G, hidden]
  Tensor shared_norm;  // [G, hidden]
  Tensor shared_w1;    // [G, inner, hidden]
  Tensor shared_w2;    // [G, hidden, inner]
  Tensor proj_norm;    // [G, P, hidden]
  Tensor proj_w1;      // [G, P, inner, hidden]
  Tensor proj_w2;      // [G, P, hidden, inner]
  Tensor out_weight;   // [G, receiver width, hidden]
  Tensor out_bias;     // [G, receiver width]
  std::optional<Tensor> weight_norm;  // [G, hidden]
  std::optional<Tensor> weight_w1;    // [G, hidden, hidden]
  std::optional<Tensor> weight_w2;    // [G, hidden, hidden]
  std::optional<Tensor> head_weight;  // [G, receiver heads, hidden]
  std::optional<Tensor> head_bias;    // [G, receiver heads]
};

struct Sizes {
  int64_t streams;  // G
  int64_t batch, tokens, sharer_tokens;
  KVShape sharer, receiver;
  int64_t hidden, inner;
  int64_t blocks;     // P, of the projection; at least 1
  int64_t weighting;  // inner width of the weighting branch: hidden, or 0 without weighting
  bool reads_receiver;

  int64_t rows() const { return batch * tokens; }
  int64_t input_width() const { return sharer.width() + (reads_receiver ? receiver.width() : 0); }
};

struct Call {
  Sizes sizes;
  ScalarType type;  // of the caches, and of everything that is stored between the kernels
  ScalarType sums;  // float64 for float64 caches, else float32: what kernels compute in
  Activation activation;
  Integration integration;
  std::vector<Tensor> base;         // [B, Ht, N, Dt] per stream, any strides
  std::vector<Tensor> sharer;       // [B, Hs, S, Ds] per stream, any strides
  std::optional<Tensor> token_map;  // int64 [N] or [B, N]
  std::optional<Tensor> gate;       // sums [G, 1|B, 1|Ht, 1|N], any strides; none: 1
  Parameters parameters;
  double dropout;  // probability
  uint64_t seed, offset;
  std::optional<Tensor> row_seeds;  // int64 [B], contiguous: one seed per row in place of `seed`
  bool recompute;
};

}  // namespace c2c::train
