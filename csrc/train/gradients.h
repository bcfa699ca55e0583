// Which gradients c2c::fuse_backward returns, and where they are written.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <array>
#include <optional>
#include <stdexcept>
#include <vector>

#include "call.h"

namespace c2c::train {

// Which gradients a call wants, in the order in which they are returned.
struct Needed {
  bool base = false, sharer = false, gate = false;
  bool in_weight = false, in_bias = false;
  bool shared_norm = false, shared_w1 = false, shared_w2 = false;
  bool proj_norm = false, proj_w1 = false, proj_w2 = false;
  bool out_weight = false, out_bias = false;
  bool weight_norm = false, weight_w1 = false, weight_w2 = false;
  bool head_weight = false, head_bias = false;
};

// The wanted ones are defined: base and sharer one per stream, the rest in the shape and dtype of
// their input. All contiguous.
struct Gradients {
  std::vector<Tensor> base, sharer;
  std::optional<Tensor> gate;
  std::optional<Tensor> in_weight, in_bias, shared_norm, shared_w1, shared_w2;
  std::optional<Tensor> proj_norm, proj_w1, proj_w2, out_weight, out_bias;
  std::optional<Tensor> weight_norm, weight_w1, weight_w2, head_weight, head_bias;
};

constexpr int kNeededCount = 18;

// needed[i] in the order of Needed.
inline Needed needed_of(const std::vector<bool>& needed) {
  Needed n;
  const std::array<bool*, kNeededCount> fields{
      &n.base,      &n.sharer,      &n.gate,      &n.in_weight, &n.in_bias,     &n.shared_norm,
      &n.shared_w1, &n.shared_w2,   &n.proj_norm, &n.proj_w1,   &n.proj_w2,     &n.out_weight,
      &n.out_bias,  &n.weight_norm, &n.weight_w1, &n.weight_w2, &n.head_weight, &n.head_bias};
  for (int i = 0; i < kNeededCount; ++i) *fields[i] = needed[i];
  return n;
}

// Allocates what `n` wants into `to` and returns all of it in order. Zeros where there are no rows
// to compute them from.
template <class Backend>
std::vector<Tensor> allocate_gradients(const Call& call, const Needed& n, const Backend& backend,
                                       Gradients& to) {
  std::vector<Tensor> all;
  const auto add = [&](const Tensor& like) {
    std::vector<int64_t> sizes;
    for (int64_t d = 0; d < like.dim(); ++d) sizes.push_back(like.size(d));
    Tensor t = backend.empty(sizes, like.scalar_type());
    if (call.sizes.rows() == 0) torch::stable::zero_(t);
    all.push_back(t);
    return t;
  };
  if (n.base) {
    for (const Tensor& t : call.base) to.base.push_back(add(t));
  }
  if (n.sharer) {
    for (const Tensor& t : call.sharer) to.sharer.push_back(add(t));
  }
  if (n.gate) to.gate = add(*call.gate);
  const Parameters& p = call.parameters;
  if (n.in_weight) to.in_weight = add(p.in_weight);
  if (n.in_bias) to.in_bias = add(p.in_bias);
  if (n.shared_norm) to.shared_norm = add(p.shared_norm);
  if (n.shared_w1) to.shared_w1 = add(p.shared_w1);
  if (n.shared_w2) to.shared_w2 = add(p.shared_w2);
  if (n.proj_norm) to.proj_norm = add(p.proj_norm);
  if (n.proj_w1) to.proj_w1 = add(p.proj_w1);
  if (n.proj_w2) to.proj_w2 = add(p.proj_w2);
  if (n.out_weight) to.out_weight = add(p.out_weight);
  if (n.out_bias) to.out_bias = add(p.out_bias);
  if (n.weight_norm) to.weight_norm = add(*p.weight_norm);
  if (n.weight_w1) to.weight_w1 = add(*p.weight_w1);
  if (n.weight_w2) to.weight_w2 = add(*p.weight_w2);
  if (n.head_weight) to.head_weight = add(*p.head_weight);
  if (n.head_bias) to.head_bias = add(*p.head_bias);
  return all;
}

}  // namespace c2c::train
