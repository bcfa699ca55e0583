// Host-side checks of the training ops' arguments, shared by every device.
#pragma once

#include "call.h"

namespace c2c::train {

// The arguments of c2c::fuse beside the parameters, as they come.
struct Arguments {
  const std::vector<Tensor>&base, &sharer;
  const std::optional<Tensor>&token_map, &gate;
  const std::string &activation, &integration;
  bool reads_receiver;
  double dropout;
  int64_t seed, offset;
  const std::optional<Tensor>& row_seeds;
  bool recompute;
};

// Throws std::runtime_error naming the argument, the rule and what came. Parameters that are not
// contiguous are copied.
Call check_call(Placement placement, const Arguments& arguments, const Parameters& parameters);

// What fuse_backward takes beyond that: gradients of the outputs, and what forward saved, of the
// given columns.
void check_backward(const Call& call, const std::vector<Tensor>& grad_out,
                    const std::vector<Tensor>& saved, const std::vector<int64_t>& saved_columns,
                    const std::vector<bool>& needed);

}  // namespace c2c::train
