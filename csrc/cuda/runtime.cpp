// Torch's side of the CUDA op (see runtime.h), through the stable ABI.
#include "runtime.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "dispatch_table.h"

#ifndef C2C_EMULATE
#include <dlfcn.h>
#endif

namespace c2c::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#ifndef C2C_EMULATE
// Looked up in the libtorch_cuda that the process has loaded: a build against a CPU torch, which
// has none, cannot link with it.
using GetStream = AOTITorchError (*)(int32_t device_index, void** stream);

GetStream find_get_stream() {
  constexpr const char* kLibrary = "libtorch_cuda.so";
  constexpr const char* kSymbol = "aoti_torch_get_current_cuda_stream";
  void* library = dlopen(kLibrary, RTLD_LAZY | RTLD_NOLOAD);
  void* symbol = library == nullptr ? nullptr : dlsym(library, kSymbol);
  if (symbol == nullptr) {
    throw std::runtime_error(std::string("c2c_ext.fuse: CUDA kernels need a torch with CUDA; ") +
                             kLibrary + (library == nullptr ? " is not loaded" : " has no ") +
                             (library == nullptr ? "" : kSymbol));
  }
  return reinterpret_cast<GetStream>(symbol);
}
#endif

#ifdef C2C_EMULATE
// A capability that no GPU has, so that tests see what `auto` makes of a table.
constexpr std::array<DispatchRow, 1> kTable{{{1, CacheType::kBfloat16, 4, 16, Path::kFused}}};
#else
constexpr const auto& kTable = kDispatchTable;
#endif

// The table's path, if this build has it.
Path measured_path(int capability, CacheType type, int64_t rows) {
  const Path path = fastest_path(kTable, capability, type, rows);
#ifndef C2C_HAS_SM_90A
  if (path == Path::kHopper) return Path::kPlain;
#endif
  return path;
}

Tensor matrices(const Strided& m, int64_t streams, int64_t rows, int64_t cols,
                torch::stable::Device device) {
  const std::array<int64_t, 3> sizes{streams, rows, cols};
  const std::array<int64_t, 3> strides{m.stream_stride, m.row_stride, m.column_stride};
  return torch::stable::from_blob(m.data, sizes, strides, device, m.type);
}

// `bmm.dtype_out`, which torch has on GPUs alone, where out's dtype is another.
void batch_multiply(const Tensor& a, const Tensor& b, const Tensor& out) {
  using torch::stable::detail::from;
  if (out.scalar_type() == a.scalar_type()) {
    std::array<StableIValue, 3> stack{from(a), from(b), from(out)};
    TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("aten::bmm", "out", stack.data(), TORCH_ABI_VERSION));
    torch::stable::detail::to<Tensor>(stack[0]);  // `out` again, a reference of its own
    return;
  }
#ifdef C2C_EMULATE
  const auto widened = [&](const Tensor& x) {
    Tensor wide = torch::stable::empty(x.sizes(), out.scalar_type(), std::nullopt, x.device());
    return torch::stable::copy_(wide, x);
  };
  batch_multiply(widened(a), widened(b), out);
#else
  std::array<StableIValue, 4> stack{from(a), from(b), from(out.scalar_type()), from(out)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::bmm", "dtype_out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);
#endif
}

}  // namespace

#ifdef C2C_EMULATE
struct Device::Guard {};

Device::Device(const Tensor& on) : device_(on.device()), stream_() {}

int Device::capability() const {
  const char* value = std::getenv("C2C_EMULATE_CAPABILITY");
  return value == nullptr ? 0 : std::atoi(value);
}
#else
struct Device::Guard {
  explicit Guard(int32_t index) : torch(index) {}
  torch::stable::accelerator::DeviceGuard torch;
};

Device::Device(const Tensor& on) : device_(on.device()), stream_(nullptr) {
  static const GetStream get_stream = find_get_stream();
  const int32_t index = on.get_device_index();
  guard_ = std::make_unique<Guard>(index);
  // The runtime that these kernels are linked with need not be torch's own copy.
  if (const cudaError_t status = cudaSetDevice(index); status != cudaSuccess) {
    throw std::runtime_error("c2c_ext.fuse: GPU " + std::to_string(index) +
                             " cannot be used: " + cudaGetErrorString(status));
  }
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(get_stream(index, &stream));
  stream_ = static_cast<cudaStream_t>(stream);
}

int Device::capability() const {
  static std::array<std::atomic<int>, 64> known{};  // by GPU; 0: not asked yet
  const int32_t index = device_.index();
  const auto ask = [index](cudaDeviceAttr which) {
    int answer = 0;
    const cudaError_t status = cudaDeviceGetAttribute(&answer, which, index);
    if (status != cudaSuccess) {
      throw std::runtime_error(
          "c2c_ext.fuse: GPU " + std::to_string(index) +
          " does not tell its compute capability: " + cudaGetErrorString(status));
    }
    return answer;
  };
  const bool kept = index >= 0 && static_cast<std::size_t>(index) < known.size();
  int capability = kept ? known[index].load(std::memory_order_relaxed) : 0;
  if (capability == 0) {
    capability =
        10 * ask(cudaDevAttrComputeCapabilityMajor) + ask(cudaDevAttrComputeCapabilityMinor);
    if (kept) known[index].store(capability, std::memory_order_relaxed);
  }
  return capability;
}
#endif

Device::~Device() = default;

Tensor Device::scratch(int64_t bytes) const {
  const std::array<int64_t, 1> size{bytes};
  return torch::stable::empty(size, ScalarType::Byte, std::nullopt, device_);
}

void Device::multiply(int64_t streams, int64_t rows, int64_t cols, int64_t depth,
                      const Strided& out, const Strided& a, const Strided& b) const {
  batch_multiply(matrices(a, streams, rows, depth, device_),
                 matrices(b, streams, depth, cols, device_),
                 matrices(out, streams, rows, cols, device_));
}

void Device::multiply(ScalarType type, const Block& block, const Matrices& out, int64_t cols,
                      const Matrices& x, int64_t depth, const void* weight) const {
  const auto strided = [&](const Matrices& m) {
    return Strided{m.data, m.stream_stride, m.row_stride, 1, type};
  };
  const Strided transposed{const_cast<void*>(weight), cols * depth, 1, depth, type};
  multiply(block.streams, block.rows, cols, depth, strided(out), strided(x), transposed);
}

Path chosen_path(const Device& device, CacheType type, int64_t rows) {
  const char* value = std::getenv("C2C_EXT_CUDA_PATH");
  const std::string name = value == nullptr || *value == '\0' ? "auto" : value;
  if (name == "auto") return measured_path(device.capability(), type, rows);
  if (name == "plain") return Path::kPlain;
  if (name == "fused") return Path::kFused;
  if (name == "hopper") return Path::kHopper;
  throw std::runtime_error(
      "c2c_ext.fuse: C2C_EXT_CUDA_PATH must be plain, fused, hopper or auto, got " + name);
}

int64_t scratch_limit(int64_t bytes) {
#ifdef C2C_EMULATE
  if (const char* value = std::getenv("C2C_EMULATE_SCRATCH")) return std::atoll(value);
#endif
  return bytes;
}

}  // namespace c2c::cuda

#ifndef C2C_EMULATE
// For c2c_ext/cuda_library.py: the newest CUDA that the GPU's driver knows (13000 is 13.0; 0: there
// is no driver), and the CUDA of this library's runtime. Neither needs a GPU.
extern "C" __attribute__((visibility("default"))) void c2c_cuda_versions(int* driver,
                                                                         int* runtime) {
  if (cudaDriverGetVersion(driver) != cudaSuccess) *driver = 0;
  if (cudaRuntimeGetVersion(runtime) != cudaSuccess) *runtime = 0;
}
#endif
