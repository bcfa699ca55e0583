// What every op's checks of its arguments are made of: each throws std::runtime_error that names
// the argument, the rule and what came.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

namespace c2c {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMaxWidth = int64_t{1} << 24;  // so that sums of products of sizes fit 64 bits

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  message << "c2c_ext.fuse: ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline std::string item(const char* list, int64_t index) {
  return std::string(list) + "[" + std::to_string(index) + "]";
}

inline const char* dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
      return "float64";
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Long:
      return "int64";
    default:
      return "another dtype";
  }
}

inline std::string device_name(const Tensor& t) {
  return t.is_cpu() ? "cpu" : (t.is_cuda() ? "cuda:" : "device ") + std::to_string(t.get_device());
}

inline void check_dim(const std::string& name, const Tensor& t, int64_t dim, const char* meaning,
                      int64_t expected, const char* rule) {
  if (t.size(dim) != expected) {
    fail(name, " dim ", dim, " (", meaning, ") must equal ", expected, " (", rule, "), got ",
         t.size(dim));
  }
}

inline void check_rank(const std::string& name, const Tensor& t, int64_t rank) {
  if (t.dim() != rank) fail(name, " must have ", rank, " dimensions, got ", t.dim());
}

inline void check_like(const std::string& name, const Tensor& t, const Tensor& first,
                       const std::string& first_name) {
  if (t.scalar_type() != first.scalar_type()) {
    fail(name, " must have the dtype of ", first_name, " (", dtype_name(first.scalar_type()),
         "), got ", dtype_name(t.scalar_type()));
  }
  if (t.is_cpu() != first.is_cpu() || t.get_device() != first.get_device()) {
    fail(name, " must be on the device of ", first_name, " (", device_name(first), "), got ",
         device_name(t));
  }
}

}  // namespace c2c
