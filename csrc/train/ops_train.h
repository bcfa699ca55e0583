// The training ops' schemas and, for a device's Backend (fuse_train.h), the functions behind them:
//   m.impl("fuse", TORCH_BOX(&train::fuse_op<Backend>));
//   m.impl("fuse_backward", TORCH_BOX(&train::fuse_backward_op<Backend>));
#pragma once

#include "check_call.h"
#include "fuse_train.h"

namespace c2c::train {

// Backend has, beside what fuse_train.h lists, `static constexpr Placement kPlacement`.
template <class Backend>
std::tuple<std::vector<Tensor>, std::vector<Tensor>> fuse_op(
    std::vector<Tensor> base, std::vector<Tensor> sharer, std::optional<Tensor> token_map,
    std::optional<Tensor> gate, Tensor in_weight, Tensor in_bias, Tensor shared_norm,
    Tensor shared_w1, Tensor shared_w2, Tensor proj_norm, Tensor proj_w1, Tensor proj_w2,
    Tensor out_weight, Tensor out_bias, std::optional<Tensor> weight_norm,
    std::optional<Tensor> weight_w1, std::optional<Tensor> weight_w2,
    std::optional<Tensor> head_weight, std::optional<Tensor> head_bias, std::string activation,
    std::string integration, bool reads_receiver, double dropout, int64_t seed, int64_t offset,
    std::optional<Tensor> row_seeds, bool recompute) {
  const Call call = check_call(
      Backend::kPlacement,
      {base, sharer, token_map, gate, activation, integration, reads_receiver, dropout, seed,
       offset, row_seeds, recompute},
      {in_weight, in_bias, shared_norm, shared_w1, shared_w2, proj_norm, proj_w1, proj_w2,
       out_weight, out_bias, weight_norm, weight_w1, weight_w2, head_weight, head_bias});
  Fusion<Backend> fusion(call);
  const Sizes& s = call.sizes;
  std::vector<Tensor> out, saved;
  for (int64_t g = 0; g < s.streams; ++g) {
    out.push_back(
        fusion.backend().empty({s.batch, s.receiver.heads, s.tokens, s.receiver.dim}, call.type));
  }
  if (!recompute) {
    for (const int64_t columns : fusion.saved_columns()) {
      saved.push_back(fusion.backend().empty({s.streams, s.rows(), columns}, call.type));
    }
  }
  fusion.forward(out, saved);
  return {out, saved};
}

// The gradients that `needed` wants, in the order of Needed: base and sharer one per stream.
template <class Backend>
std::vector<Tensor> fuse_backward_op(
    std::vector<Tensor> grad_out, std::vector<Tensor> base, std::vector<Tensor> sharer,
    std::optional<Tensor> token_map, std::optional<Tensor> gate, Tensor in_weight, Tensor in_bias,
    Tensor shared_norm, Tensor shared_w1, Tensor shared_w2, Tensor proj_norm, Tensor proj_w1,
    Tensor proj_w2, Tensor out_weight, Tensor out_bias, std::optional<Tensor> weight_norm,
    std::optional<Tensor> weight_w1, std::optional<Tensor> weight_w2,
    std::optional<Tensor> head_weight, std::optional<Tensor> head_bias, std::string activation,
    std::string integration, bool reads_receiver, double dropout, int64_t seed, int64_t offset,
    std::optional<Tensor> row_seeds, bool recompute, std::vector<Tensor> saved,
    std::vector<bool> needed) {
  const Call call = check_call(
      Backend::kPlacement,
      {base, sharer, token_map, gate, activation, integration, reads_receiver, dropout, seed,
       offset, row_seeds, recompute},
      {in_weight, in_bias, shared_norm, shared_w1, shared_w2, proj_norm, proj_w1, proj_w2,
       out_weight, out_bias, weight_norm, weight_w1, weight_w2, head_weight, head_bias});
  Fusion<Backend> fusion(call);
  check_backward(call, grad_out, saved, fusion.saved_columns(), needed);
  const Needed wanted = needed_of(needed);
  Gradients gradients;
  const std::vector<Tensor> all = allocate_gradients(call, wanted, fusion.backend(), gradients);
  fusion.backward(grad_out, saved, wanted, gradients);
  return all;
}

}  // namespace c2c::train
