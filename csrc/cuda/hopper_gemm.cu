// The launchers of hopper_gemm.h: tensor maps for the copy engine, one kernel per stage and type.
#include <stdexcept>
#include <type_traits>

#include "hopper_gemm.cuh"
#include "hopper_gemm.h"

#if !defined(C2C_EMULATE)
#include <cudaTypedefs.h>
#endif

namespace c2c::cuda {
namespace {

using hopper::ActivateEpilogue;
using hopper::BiasEpilogue;
using hopper::hopper_gemm_kernel;
using hopper::Operand;
using hopper::OutputEpilogue;
using hopper::ResidualEpilogue;
using hopper::RowSquares;

#if defined(C2C_EMULATE)

Operand operand(const char*, CacheType, const Matrices& matrix, int rows, int depth, int, int) {
  return {matrix.data, rows, depth, matrix.stream_stride, matrix.row_stride};
}

#else

void check(const char* what, cudaError_t status) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // torch's next check would report it a second time
  throw std::runtime_error(std::string("c2c_ext.fuse: ") + what +
                           " failed: " + cudaGetErrorString(status));
}

// The driver's function, found at run time: nothing links with libcuda, which machines without a
// GPU do not have.
PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found{};
    check("looking for cuTensorMapEncodeTiled in the driver",
          cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                           cudaEnableDefault, &found));
    if (found != cudaDriverEntryPointSuccess || function == nullptr) {
      throw std::runtime_error(
          "c2c_ext.fuse: the hopper path needs a driver for CUDA 12.0 or newer, this one has no "
          "cuTensorMapEncodeTiled");
    }
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
  }();
  return encode;
}

// A map of [streams, rows, depth] in boxes of one stream, `box_rows` rows and one slice, as
// hopper_layout.h wants them in shared memory. What a box has outside becomes zeros, also between
// the last row of a stream and the first of the next.
Operand operand(const char* name, CacheType type, const Matrices& matrix, int rows, int depth,
                int streams, int box_rows) {
  const cuuint64_t size[] = {static_cast<cuuint64_t>(depth), static_cast<cuuint64_t>(rows),
                             static_cast<cuuint64_t>(streams)};
  const cuuint64_t stride[] = {static_cast<cuuint64_t>(matrix.row_stride) * 2,  // bytes
                               static_cast<cuuint64_t>(matrix.stream_stride) * 2};
  const cuuint32_t box[] = {hopper::kSlice, static_cast<cuuint32_t>(box_rows), 1};
  const cuuint32_t every[] = {1, 1, 1};
  CUtensorMap map;
  const CUresult status =
      tensor_map_encoder()(&map,
                           type == CacheType::kBfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                        : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                           3, matrix.data, size, stride, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE,
                           CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                           CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    throw std::runtime_error(std::string("c2c_ext.fuse: kernel ") + name +
                             " could not be launched on this GPU: cuTensorMapEncodeTiled "
                             "answered CUresult " +
                             std::to_string(static_cast<int>(status)));
  }
  return map;
}

#endif

template <class T, class Epilogue>
void run(const char* name, const HopperProduct& p, const Epilogue& epilogue, cudaStream_t stream) {
  const Matrices weights{const_cast<void*>(p.weight), static_cast<int64_t>(p.cols) * p.depth,
                         p.depth};
  const dim3 grid(static_cast<unsigned>(p.cols / hopper::kTileCols),
                  static_cast<unsigned>((p.rows + hopper::kTileRows - 1) / hopper::kTileRows),
                  static_cast<unsigned>(p.streams));
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;  // no map has an empty side
  launch(name, hopper_gemm_kernel<T, Epilogue>, grid, dim3(hopper::kThreads), hopper::kSharedBytes,
         stream, operand(name, p.type, p.x, p.rows, p.depth, p.streams, hopper::kTileRows),
         operand(name, p.type, weights, p.cols, p.depth, p.streams, hopper::kTileCols),
         hopper::slices_of(p.depth), p.rows, epilogue);
}

// Calls f(T{}) with the C++ type of the caches.
template <class F>
void with_type(CacheType type, const F& f) {
  if (type == CacheType::kBfloat16) return f(Bfloat16{});
  if (type == CacheType::kFloat16) return f(Float16{});
  throw std::runtime_error("c2c_ext.fuse: the hopper kernels are for bfloat16 and float16");
}

}  // namespace

void launch_hopper_bias(const HopperProduct& p, const float* bias, const Matrices& z,
                        float* squares, cudaStream_t stream) {
  with_type(p.type, [&](auto zero) {
    using T = decltype(zero);
    run<T>(
        "hopper_bias", p,
        BiasEpilogue<T>{z, bias, RowSquares{squares, p.rows, p.cols / hopper::kTileCols}, p.cols},
        stream);
  });
}

void launch_hopper_activate(const HopperProduct& p, Activation activation, const float* squares,
                            const Matrices& first, int first_cols, const Matrices& second,
                            cudaStream_t stream) {
  const RowSquares of_x{const_cast<float*>(squares), p.rows, p.depth / hopper::kTileCols};
  with_type(p.type, [&](auto zero) {
    using T = decltype(zero);
    const auto with = [&](auto epilogue) { run<T>("hopper_activate", p, epilogue, stream); };
    switch (activation) {
      case Activation::kGelu:
        return with(
            ActivateEpilogue<T, Activation::kGelu>{of_x, first, second, first_cols, p.depth});
      case Activation::kRelu:
        return with(
            ActivateEpilogue<T, Activation::kRelu>{of_x, first, second, first_cols, p.depth});
      case Activation::kSilu:
        return with(
            ActivateEpilogue<T, Activation::kSilu>{of_x, first, second, first_cols, p.depth});
    }
  });
}

void launch_hopper_residual(const HopperProduct& p, const Matrices& z_in, const Matrices& z,
                            float* squares, cudaStream_t stream) {
  with_type(p.type, [&](auto zero) {
    using T = decltype(zero);
    run<T>("hopper_residual", p,
           ResidualEpilogue<T>{z_in, z, RowSquares{squares, p.rows, p.cols / hopper::kTileCols}},
           stream);
  });
}

void launch_hopper_output(const HopperProduct& p, const Streams& streams, const HopperOutput& o,
                          cudaStream_t stream) {
  with_type(p.type, [&](auto zero) {
    using T = decltype(zero);
    const auto with_both = [&](auto integration, auto accumulate) {
      run<T>("hopper_output", p,
             OutputEpilogue<T, decltype(integration)::value, decltype(accumulate)::value>{
                 streams, o.tokens, o.receiver, o.first_row, o.bias, o.logits, o.head_bias, p.rows,
                 p.cols},
             stream);
    };
    const auto with = [&](auto integration) {
      return o.accumulate ? with_both(integration, std::true_type{})
                          : with_both(integration, std::false_type{});
    };
    switch (o.integration) {
      case Integration::kResidual:
        return with(std::integral_constant<Integration, Integration::kResidual>{});
      case Integration::kInterpolation:
        return with(std::integral_constant<Integration, Integration::kInterpolation>{});
      case Integration::kReplacement:
        return with(std::integral_constant<Integration, Integration::kReplacement>{});
    }
  });
}

void check_hopper_device() {
#if !defined(C2C_EMULATE)
  int device = 0, major = 0, minor = 0;
  check("asking for the current GPU", cudaGetDevice(&device));
  check("asking for the GPU's compute capability",
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  check("asking for the GPU's compute capability",
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  if (major != 9 || minor != 0) {  // sm_90a code runs on no later GPU either
    throw std::runtime_error(
        "c2c_ext.fuse: the hopper path needs a GPU of compute capability 9.0, got " +
        std::to_string(major) + "." + std::to_string(minor));
  }
  cudaFuncAttributes attributes{};
  const auto kernel = hopper_gemm_kernel<Bfloat16, BiasEpilogue<Bfloat16>>;
  check("looking for the hopper kernels",
        cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)));
  // All others have a stub without sums, sm_90 too; no process recovers from running it.
  if (attributes.numRegs < hopper::kSums) {
    throw std::runtime_error(
        "c2c_ext.fuse: the hopper path needs a build with code for sm_90a, this one has none: "
        "C2C_EXT_CUDA_ARCHITECTURES must contain 90a-real");
  }
#endif
}

}  // namespace c2c::cuda
