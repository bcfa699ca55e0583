// c2c::fuse_ as every device has it: its arguments, checked once, go to what runs them.
#pragma once

#include "ops.h"

namespace c2c {

// A checked call that has something to do. Refers to the arguments of the op.
struct FuseRequest {
  FuseCall call;
  const PackedWeights& weights;
  const std::optional<Tensor>& token_map;
  Activation activation;
  Integration integration;
  bool accumulate;
};

void fuse_cpu(const FuseRequest& request);
void fuse_cuda(const FuseRequest& request);

// kFuseSchema with its tensors at `placement`, run by `run`.
template <Placement placement, void (*run)(const FuseRequest&)>
void fuse_(std::vector<Tensor> out_keys, std::vector<Tensor> out_values,
           std::vector<Tensor> base_keys, std::vector<Tensor> base_values,
           std::vector<Tensor> sharer_keys, std::vector<Tensor> sharer_values,
           std::optional<Tensor> token_map, std::vector<int64_t> layers,
           std::vector<int64_t> sources, int64_t num_keys, int64_t sharer_heads, int64_t sharer_dim,
           int64_t receiver_heads, int64_t receiver_dim, int64_t inner, bool reads_receiver,
           Tensor in_weight, Tensor in_bias, Tensor w1, Tensor w2, Tensor branch_w1,
           std::vector<Tensor> deep_w2, std::vector<Tensor> deep_w1, Tensor out_weight,
           Tensor out_bias, Tensor head_weight, Tensor head_bias, std::string activation,
           std::string integration, bool accumulate) {
  const PackedWeights weights{in_weight, in_bias,    w1,       w2,          branch_w1, deep_w2,
                              deep_w1,   out_weight, out_bias, head_weight, head_bias};
  const Activation act = parse_activation(activation);
  const Integration how = parse_integration(integration);
  FuseCall call =
      check_fuse(placement, out_keys, out_values, base_keys, base_values, sharer_keys,
                 sharer_values, token_map, layers, sources, num_keys, {sharer_heads, sharer_dim},
                 {receiver_heads, receiver_dim}, inner, reads_receiver, weights);
  if (call.sizes.streams == 0 || call.sizes.batch * call.sizes.tokens == 0) return;
  run({std::move(call), weights, token_map, act, how, accumulate});
}

}  // namespace c2c
