// Every op schema of c2c. Loading the shared library made of this registers them.
#include "ops.h"

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(c2c, m) {
  // Fuses the open streams of one shape group. Reads base, writes out (which may be base itself);
  // the lists hold one tensor per layer of the receiver (out, base) or the sharer. Streams that
  // `layers` does not name are not touched. token_map: int64 [N] or [B, N], sharer token of every
  // receiver token; values outside 0 .. S-1 leave the token as it is.
  m.def(
      "fuse_(Tensor(a!)[] out_keys, Tensor(b!)[] out_values, Tensor[] base_keys, "
      "Tensor[] base_values, Tensor[] sharer_keys, Tensor[] sharer_values, Tensor? token_map, "
      "int[] layers, int[] sources, int num_keys, int sharer_heads, int sharer_dim, "
      "int receiver_heads, int receiver_dim, Tensor in_weight, Tensor in_bias, Tensor w1, "
      "Tensor w2, Tensor branch_w1, Tensor[] deep_w2, Tensor[] deep_w1, Tensor out_weight, "
      "Tensor out_bias, Tensor head_weight, Tensor head_bias, str activation, str integration, "
      "bool accumulate) -> ()");

  // What fuse_ checks of the memory that it writes to, for fusions in place that do not call it.
  // Reads addresses and strides only, on any device.
  m.def(
      "check_inplace(Tensor[] keys, Tensor[] values, Tensor[] sharer_keys, "
      "Tensor[] sharer_values) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(c2c, CPU, m) {
  m.impl("fuse_", TORCH_BOX(&c2c::fuse_cpu));
  m.impl("check_inplace", TORCH_BOX(&c2c::check_inplace));
}

STABLE_TORCH_LIBRARY_IMPL(c2c, CUDA, m) { m.impl("check_inplace", TORCH_BOX(&c2c::check_inplace)); }
