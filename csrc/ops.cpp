// Every op schema of c2c. Loading the shared library made of this registers them.
#include <torch/csrc/stable/library.h>

#include "fuse_op.h"

STABLE_TORCH_LIBRARY(c2c, m) {
  m.def(c2c::kFuseSchema);
  m.def(c2c::kFuseTrainSchema);
  m.def(c2c::kFuseTrainBackwardSchema);

  // What fuse_ checks of the memory that it writes to, for fusions in place that do not call it.
  // Reads addresses and strides only, on any device.
  m.def(
      "check_inplace(Tensor[] keys, Tensor[] values, Tensor[] sharer_keys, "
      "Tensor[] sharer_values) -> ()");

  // Its stages on the CPU, one by one, for tests and benchmarks (see ops.h for the shapes).
  m.def("stage_gather(Tensor(a!) out, Tensor sharer, Tensor base) -> ()");
  m.def("stage_bias_stats(Tensor(a!) z, Tensor(b!) rstd, Tensor bias) -> ()");
  m.def("stage_multiply(Tensor(a!) out, Tensor x, Tensor panels) -> ()");
  m.def("stage_scale_activate(Tensor(a!) out, Tensor x, Tensor rstd, str activation) -> ()");
  m.def("stage_residual_stats(Tensor(a!) out, Tensor(b!) rstd, Tensor z, Tensor delta) -> ()");
  m.def("stage_head(Tensor(a!) logits, Tensor x, Tensor weight) -> ()");
  m.def(
      "stage_combine(Tensor(a!) out, Tensor base, Tensor projected, Tensor bias, Tensor logits, "
      "Tensor head_bias, str integration) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(c2c, CPU, m) {
  m.impl("fuse_", TORCH_BOX((&c2c::fuse_<c2c::Placement::kCpu, c2c::fuse_cpu>)));
  m.impl("check_inplace", TORCH_BOX(&c2c::check_inplace));
  m.impl("stage_gather", TORCH_BOX(&c2c::stage_gather));
  m.impl("stage_bias_stats", TORCH_BOX(&c2c::stage_bias_stats));
  m.impl("stage_multiply", TORCH_BOX(&c2c::stage_multiply));
  m.impl("stage_scale_activate", TORCH_BOX(&c2c::stage_scale_activate));
  m.impl("stage_residual_stats", TORCH_BOX(&c2c::stage_residual_stats));
  m.impl("stage_head", TORCH_BOX(&c2c::stage_head));
  m.impl("stage_combine", TORCH_BOX(&c2c::stage_combine));
}

// fuse_ on CUDA tensors is a library of its own (cuda/fuse_cuda.cpp).
STABLE_TORCH_LIBRARY_IMPL(c2c, CUDA, m) { m.impl("check_inplace", TORCH_BOX(&c2c::check_inplace)); }
