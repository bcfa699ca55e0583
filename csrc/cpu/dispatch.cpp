// Picks, once, the row kernels compiled for the best instruction set that this CPU runs.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "row_kernels.h"

namespace c2c::cpu {

#define C2C_DECLARE_KERNELS(isa)              \
  RowKernels<double> float64_kernels_##isa(); \
  RowKernels<float> float32_kernels_##isa();  \
  RowKernels<float> bfloat16_kernels_##isa(); \
  RowKernels<float> float16_kernels_##isa();

C2C_DECLARE_KERNELS(baseline)
#if defined(C2C_X86_VARIANTS)
C2C_DECLARE_KERNELS(avx2)
C2C_DECLARE_KERNELS(avx512)
#endif

namespace {

struct Tables {
  RowKernels<double> float64;
  RowKernels<float> float32;
  RowKernels<float> bfloat16;
  RowKernels<float> float16;
};

#define C2C_TABLES(isa)                                                         \
  Tables {                                                                      \
    float64_kernels_##isa(), float32_kernels_##isa(), bfloat16_kernels_##isa(), \
        float16_kernels_##isa()                                                 \
  }

// C2C_EXT_CPU_ISA in the environment lowers the choice, for tests and for comparing.
bool allowed(const char* isa) {
  static const std::string limit = [] {
    const char* value = std::getenv("C2C_EXT_CPU_ISA");
    return std::string(value == nullptr ? "" : value);
  }();
  if (limit.empty() || limit == "avx512") return true;
  if (limit == "avx2") return std::strcmp(isa, "avx512") != 0;
  if (limit == "baseline") return false;
  throw std::runtime_error("c2c_ext: C2C_EXT_CPU_ISA must be baseline, avx2 or avx512, got " +
                           limit);
}

const Tables& tables() {
  static const Tables chosen = [] {
#if defined(C2C_X86_VARIANTS)
    __builtin_cpu_init();
    if (allowed("avx512") && __builtin_cpu_supports("avx512f") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma")) {
      return C2C_TABLES(avx512);
    }
    if (allowed("avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
      return C2C_TABLES(avx2);
    }
#endif
    return C2C_TABLES(baseline);
  }();
  return chosen;
}

}  // namespace

template <>
const RowKernels<float>& row_kernels<float>(CacheType type) {
  switch (type) {
    case CacheType::kBfloat16:
      return tables().bfloat16;
    case CacheType::kFloat16:
      return tables().float16;
    default:
      return tables().float32;
  }
}

template <>
const RowKernels<double>& row_kernels<double>(CacheType) {
  return tables().float64;
}

const char* instruction_set() { return tables().float32.instruction_set; }

}  // namespace c2c::cpu
