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

Tensor matrices(const void* data, std::array<int64_t, 3> sizes, std::array<int64_t, 3> strides,
                torch::stable::Device device, ScalarType type) {
  return torch::stable::from_blob(const_cast<void*>(data), sizes, strides, device, type);
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

void Device::multiply(ScalarType type, const Block& block, const Matrices& out, int64_t cols,
                      const Matrices& x, int64_t depth, const void* weight) const {
  const int64_t g = block.streams, rows = block.rows;
  const Tensor to =
      matrices(out.data, {g, rows, cols}, {out.stream_stride, out.row_stride, 1}, device_, type);
  const Tensor input =
      matrices(x.data, {g, rows, depth}, {x.stream_stride, x.row_stride, 1}, device_, type);
  const Tensor transposed =
      matrices(weight, {g, depth, cols}, {cols * depth, 1, depth}, device_, type);
  std::array<StableIValue, 3> stack{torch::stable::detail::from(input),
                                    torch::stable::detail::from(transposed),
                                    torch::stable::detail::from(to)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::bmm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // `to` again, a reference of its own
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
