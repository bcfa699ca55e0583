// The Python module c2c_ext._C: its import loads libc2c_ext.so, which registers the ops.
#include <pybind11/pybind11.h>

#include <sstream>
#include <string>

#include "build_config.h"
#include "cpu/row_kernels.h"
#include "cuda/dispatch_table.h"

namespace {

pybind11::list cuda_architectures() {
  pybind11::list list;
  std::istringstream entries(C2C_CUDA_ARCHITECTURES);
  for (std::string entry; std::getline(entries, entry, ';');) list.append(entry);
  return list;
}

const char* name_of(c2c::cuda::CacheType type) {
  switch (type) {
    case c2c::cuda::CacheType::kFloat64:
      return "float64";
    case c2c::cuda::CacheType::kFloat32:
      return "float32";
    case c2c::cuda::CacheType::kBfloat16:
      return "bfloat16";
    case c2c::cuda::CacheType::kFloat16:
      return "float16";
  }
  return "";
}

const char* name_of(c2c::cuda::Path path) {
  switch (path) {
    case c2c::cuda::Path::kPlain:
      return "plain";
    case c2c::cuda::Path::kFused:
      return "fused";
    case c2c::cuda::Path::kHopper:
      return "hopper";
  }
  return "";
}

pybind11::list cuda_dispatch() {
  pybind11::list list;
  for (const c2c::cuda::DispatchRow& row : c2c::cuda::kDispatchTable) {
    list.append(pybind11::make_tuple(row.capability, name_of(row.type), row.above, row.up_to,
                                     name_of(row.path)));
  }
  return list;
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["version"] = C2C_VERSION;
  info["compiler"] = C2C_COMPILER;
  info["flags"] = C2C_FLAGS;
  info["cuda_architectures"] = cuda_architectures();
  info["cuda_dispatch"] = cuda_dispatch();
  info["abi_target"] = C2C_ABI_TARGET;
  info["built_with_torch"] = C2C_BUILT_WITH_TORCH;
  info["cpu_instruction_set"] = c2c::cpu::instruction_set();
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled ops of c2c_ext: importing this module registers torch.ops.c2c.*";
  m.def("build_info", &build_info,
        "Version, compiler, flags, CUDA architectures, which CUDA path was measured to be the "
        "fastest where (cuda_paths.DispatchRow), stable-ABI target, and the instruction set that "
        "the CPU kernels run with.");
}
