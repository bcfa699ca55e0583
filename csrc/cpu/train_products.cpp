#include "train_products.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <vector>

namespace c2c::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using train::element_size;
using train::Matrices;

// One task computes a block of this size by one call on one thread, so that a block's bits depend
// on nothing but its operands.
constexpr int64_t kBlockRows = 256, kBlockCols = 512;
constexpr int64_t kBlockDepth = 4096;  // of what is widened at a time

struct Matrix {  // one matrix, or a block of it
  char* data;
  int64_t row_stride, column_stride;
  ScalarType type;

  Matrix block(int64_t row, int64_t column) const {
    return {data + (row * row_stride + column * column_stride) * element_size(type), row_stride,
            column_stride, type};
  }
};

Matrix matrix(const Matrices& m, int64_t g) {
  return {static_cast<char*>(m.data) + g * m.stream_stride * element_size(m.type), m.row_stride,
          m.column_stride, m.type};
}

Tensor tensor(const Matrix& m, int64_t rows, int64_t cols) {
  const std::array<int64_t, 2> sizes{rows, cols}, strides{m.row_stride, m.column_stride};
  return torch::stable::from_blob(
      m.data, sizes, strides, torch::stable::Device(torch::headeronly::DeviceType::CPU), m.type);
}

// out = a @ b, or out += a @ b.
void product(const Matrix& out, const Matrix& a, const Matrix& b, int64_t rows, int64_t cols,
             int64_t depth, bool add) {
  using torch::stable::detail::from;
  const Tensor to = tensor(out, rows, cols), x = tensor(a, rows, depth), y = tensor(b, depth, cols);
  if (add) {
    std::array<StableIValue, 5> stack{from(to), from(x), from(y), from(1.0), from(1.0)};
    TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("aten::addmm_", "", stack.data(), TORCH_ABI_VERSION));
    torch::stable::detail::to<Tensor>(stack[0]);  // `to` again, a reference of its own
  } else {
    std::array<StableIValue, 3> stack{from(x), from(y), from(to)};
    TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
    torch::stable::detail::to<Tensor>(stack[0]);
  }
}

// [rows, cols] of `from` in float32 in `buffer`, laid out as `from` is.
Matrix widened(const TrainKernels& kernels, const Matrix& from, int64_t rows, int64_t cols,
               float* buffer) {
  const bool by_rows = from.column_stride == 1;
  const int64_t outer = by_rows ? rows : cols, inner = by_rows ? cols : rows;
  kernels.widen({from.data, by_rows ? from.row_stride : from.column_stride}, {buffer, inner}, outer,
                inner);
  return {reinterpret_cast<char*>(buffer), by_rows ? inner : 1, by_rows ? 1 : inner,
          ScalarType::Float};
}

}  // namespace

void multiply_on_cpu(const TrainKernels& kernels, int64_t streams, int64_t rows, int64_t cols,
                     int64_t depth, const Matrices& out, const Matrices& a, const Matrices& b) {
  const int64_t row_blocks = (rows + kBlockRows - 1) / kBlockRows;
  const int64_t column_blocks = (cols + kBlockCols - 1) / kBlockCols;
  const int64_t tasks = streams * row_blocks * column_blocks;
  if (tasks == 0) return;
  const bool narrow = element_size(a.type) == 2;
  const int64_t part = narrow ? std::min(depth, kBlockDepth) : depth;
  // At least two: a single one would run outside of a parallel region, where mm uses all threads.
  torch::stable::parallel_for(0, std::max<int64_t>(tasks, 2), 1, [&](int64_t begin, int64_t end) {
    std::vector<float> wide_a, wide_b, wide_out;
    if (narrow) {
      wide_a.resize(std::min(rows, kBlockRows) * part);
      wide_b.resize(std::min(cols, kBlockCols) * part);
      wide_out.resize(std::min(rows, kBlockRows) * std::min(cols, kBlockCols));
    }
    for (int64_t i = begin; i < std::min(end, tasks); ++i) {
      const int64_t g = i / (row_blocks * column_blocks);
      const int64_t c = i / row_blocks % column_blocks * kBlockCols;
      const int64_t r = i % row_blocks * kBlockRows;
      const int64_t n = std::min(kBlockRows, rows - r), wide = std::min(kBlockCols, cols - c);
      const Matrix to = matrix(out, g).block(r, c), x = matrix(a, g).block(r, 0),
                   y = matrix(b, g).block(0, c);
      if (!narrow) {
        product(to, x, y, n, wide, depth, false);
        continue;
      }
      const bool direct = to.type == ScalarType::Float;
      const Matrix sums =
          direct ? to
                 : Matrix{reinterpret_cast<char*>(wide_out.data()), wide, 1, ScalarType::Float};
      for (int64_t k = 0; k == 0 || k < depth; k += kBlockDepth) {
        const int64_t deep = std::min(kBlockDepth, depth - k);
        product(sums, widened(kernels, x.block(0, k), n, deep, wide_a.data()),
                widened(kernels, y.block(k, 0), deep, wide, wide_b.data()), n, wide, deep, k > 0);
      }
      if (!direct) kernels.narrow({sums.data, wide}, {to.data, to.row_stride}, n, wide);
    }
  });
}

}  // namespace c2c::cpu
