// Every op schema of c2c, and the Python module whose import registers them.
#include "ops.h"

#include <pybind11/pybind11.h>
#include <torch/csrc/stable/library.h>

#include "build_config.h"
#include "cpu/row_kernels.h"

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
}

STABLE_TORCH_LIBRARY_IMPL(c2c, CPU, m) { m.impl("fuse_", TORCH_BOX(&c2c::fuse_cpu)); }

namespace {

pybind11::dict build_info() {
  pybind11::dict info;
  info["version"] = C2C_VERSION;
  info["compiler"] = C2C_COMPILER;
  info["flags"] = C2C_FLAGS;
  info["cuda_architectures"] = pybind11::list();
  info["abi_target"] = C2C_ABI_TARGET;
  info["built_with_torch"] = C2C_BUILT_WITH_TORCH;
  info["cpu_instruction_set"] = c2c::cpu::instruction_set();
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled ops of c2c_ext: importing this module registers torch.ops.c2c.*";
  m.def("build_info", &build_info,
        "Version, compiler, flags, CUDA architectures, stable-ABI target, and the instruction set "
        "that the CPU kernels run with.");
}
