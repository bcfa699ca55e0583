#include "matrices.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

namespace c2c::train {

Tensor view_of(const Matrices& m, std::array<int64_t, 3> sizes, torch::stable::Device device) {
  const std::array<int64_t, 3> strides{m.stream_stride, m.row_stride, m.column_stride};
  return torch::stable::from_blob(m.data, sizes, strides, device, m.type);
}

void copy(const Tensor& to, const Tensor& from) {
  Tensor target = to;
  torch::stable::copy_(target, from);
}

void multiply_elements(const Tensor& to, const Tensor& a, const Tensor& b) {
  if (element_size(to.scalar_type()) >
      std::max(element_size(a.scalar_type()), element_size(b.scalar_type()))) {
    copy(to, a);  // torch would round the product to the dtype of a and b
    return multiply_elements(to, to, b);
  }
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                    torch::stable::detail::from(to)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::mul", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // `to` again, a reference of its own
}

}  // namespace c2c::train
