// How the CUDA ops' host code hands torch's tensors to kernels.
#pragma once

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>

#include "../ops.h"
#include "kernels.h"

namespace c2c::cuda {

#ifdef C2C_EMULATE
constexpr Placement kPlacement = Placement::kCpuRows;
#else
constexpr Placement kPlacement = Placement::kCuda;
#endif

using c2c::cache_type;
using c2c::view_of;

inline HeadShape head_shape(const KVShape& shape) {
  return {static_cast<int>(shape.heads), static_cast<int>(shape.dim)};
}

// token_map: int64 [N] or [B, N].
inline Tokens tokens_of(const std::optional<Tensor>& token_map, int64_t batch, int64_t tokens,
                        int64_t sharer_tokens) {
  Tokens result{nullptr, 0, 0, batch, tokens, sharer_tokens};
  if (token_map) {
    result.map = static_cast<const int64_t*>(token_map->const_data_ptr());
    result.batch_stride = token_map->dim() == 2 ? token_map->stride(0) : 0;
    result.token_stride = token_map->stride(token_map->dim() - 1);
  }
  return result;
}

inline void check_width(const char* side, const KVShape& shape) {
  if (shape.width() > INT32_MAX) {
    throw std::runtime_error(std::string("c2c_ext.fuse: ") + side + "_heads times " + side +
                             "_dim must be below 2^31 on a GPU, got " +
                             std::to_string(shape.width()));
  }
}

}  // namespace c2c::cuda
