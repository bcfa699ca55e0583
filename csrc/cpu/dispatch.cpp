// Picks, once, the kernels compiled for the best instruction set that this CPU runs.
#include <array>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "panel_gemm.h"
#include "row_kernels.h"
#include "train_kernels.h"

namespace c2c::cpu {

#define C2C_DECLARE_KERNELS(isa)              \
  RowKernels<double> float64_kernels_##isa(); \
  RowKernels<float> float32_kernels_##isa();  \
  RowKernels<float> bfloat16_kernels_##isa(); \
  RowKernels<float> float16_kernels_##isa();  \
  PanelGemm<double> float64_gemm_##isa();     \
  PanelGemm<float> float32_gemm_##isa();      \
  PanelGemm<float> bfloat16_gemm_##isa();     \
  PanelGemm<float> float16_gemm_##isa();      \
  TrainKernels train_kernels_##isa(CacheType type);

C2C_DECLARE_KERNELS(baseline)
#if defined(C2C_X86_VARIANTS)
C2C_DECLARE_KERNELS(avx2)
C2C_DECLARE_KERNELS(avx512)
C2C_DECLARE_KERNELS(avx512bf16)
#endif

namespace {

struct Tables {
  RowKernels<double> rows64;
  RowKernels<float> rows32, rows_bf16, rows_fp16;
  PanelGemm<double> gemm64;
  PanelGemm<float> gemm32, gemm_bf16, gemm_fp16;
  std::array<TrainKernels, 4> train;  // by CacheType
};

#define C2C_TRAIN(isa, type) train_kernels_##isa(CacheType::type)
#define C2C_TABLES(isa)                                                              \
  Tables {                                                                           \
    float64_kernels_##isa(), float32_kernels_##isa(), bfloat16_kernels_##isa(),      \
        float16_kernels_##isa(), float64_gemm_##isa(), float32_gemm_##isa(),         \
        bfloat16_gemm_##isa(), float16_gemm_##isa(), {                               \
      C2C_TRAIN(isa, kFloat64), C2C_TRAIN(isa, kFloat32), C2C_TRAIN(isa, kBfloat16), \
          C2C_TRAIN(isa, kFloat16)                                                   \
    }                                                                                \
  }

constexpr std::array<const char*, 4> kSets{"baseline", "avx2", "avx512", "avx512bf16"};

// C2C_EXT_CPU_ISA in the environment lowers the choice, for tests and for comparing.
size_t highest_allowed() {
  const char* value = std::getenv("C2C_EXT_CPU_ISA");
  const std::string limit = value == nullptr ? "" : value;
  if (limit.empty()) return kSets.size() - 1;
  for (size_t i = 0; i < kSets.size(); ++i) {
    if (limit == kSets[i]) return i;
  }
  throw std::runtime_error(
      "c2c_ext: C2C_EXT_CPU_ISA must be baseline, avx2, avx512 or avx512bf16, got " + limit);
}

const Tables& tables() {
  static const Tables chosen = [] {
    [[maybe_unused]] const size_t highest = highest_allowed();
#if defined(C2C_X86_VARIANTS)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl");
    if (highest >= 3 && avx512 && __builtin_cpu_supports("avx512bf16")) {
      return C2C_TABLES(avx512bf16);
    }
    if (highest >= 2 && avx512) return C2C_TABLES(avx512);
    if (highest >= 1 && avx2) return C2C_TABLES(avx2);
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
      return tables().rows_bf16;
    case CacheType::kFloat16:
      return tables().rows_fp16;
    default:
      return tables().rows32;
  }
}

template <>
const RowKernels<double>& row_kernels<double>(CacheType) {
  return tables().rows64;
}

template <>
const PanelGemm<float>& panel_gemm<float>(CacheType type) {
  switch (type) {
    case CacheType::kBfloat16:
      return tables().gemm_bf16;
    case CacheType::kFloat16:
      return tables().gemm_fp16;
    default:
      return tables().gemm32;
  }
}

template <>
const PanelGemm<double>& panel_gemm<double>(CacheType) {
  return tables().gemm64;
}

const TrainKernels& train_kernels(CacheType type) {
  return tables().train[static_cast<size_t>(type)];
}

const char* instruction_set() { return tables().rows32.instruction_set; }

}  // namespace c2c::cpu
