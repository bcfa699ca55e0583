#include "train_products.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <type_traits>

#include "panel_gemm.h"
#include "stages.h"

namespace c2c::cpu {
namespace {

using torch::headeronly::ScalarType;
using train::element_size;

// Of one running product: what a core goes through again and again stays in its caches. Longer sums
// (those over all rows of a call) are added up in parts of it.
constexpr int64_t kDepth = 1024;

template <class S>
constexpr ScalarType kType = sizeof(S) == 8 ? ScalarType::Double : ScalarType::Float;

// Element (row, column) of matrix g.
StridedMatrix block(const train::Matrices& m, int64_t g, int64_t row, int64_t column) {
  const int64_t offset = g * m.stream_stride + row * m.row_stride + column * m.column_stride;
  return {static_cast<char*>(m.data) + offset * element_size(m.type), m.row_stride,
          m.column_stride};
}

}  // namespace

Products::Products(CacheType type)
    : kernels_(train_kernels(type)),
      native_(type == CacheType::kBfloat16 && panel_gemm<float>(type).multiply_native != nullptr) {}

template <class S>
S* Products::Buffer::get(int64_t count) {
  if (count == 0) return nullptr;
  if (size < count) {
    const std::array<int64_t, 1> sizes{count};
    memory = torch::stable::empty(sizes, kType<S>);
    size = count;
  }
  return static_cast<S*>(memory.data_ptr());
}

template <class S>
void Products::multiply_as(int64_t streams, int64_t rows, int64_t cols, int64_t depth,
                           const train::Matrices& out, const train::Matrices& a,
                           const train::Matrices& b) {
  constexpr CacheType kWide = sizeof(S) == 8 ? CacheType::kFloat64 : CacheType::kFloat32;
  const CacheType type = native_ ? CacheType::kBfloat16 : kWide;
  const PanelGemm<S>& gemm = panel_gemm<S>(type);
  const int64_t part = std::min(depth, kDepth), even = (part + 1) / 2 * 2;
  const int64_t parts = std::max<int64_t>(1, (depth + kDepth - 1) / kDepth);
  // kDepth is even: only a product of one part has rows that a pair would read beyond.
  const bool as_is = a.column_stride == 1 && (native_ ? depth % 2 == 0 : a.type == kType<S>);
  S* own_rows = as_is ? nullptr : rows_.get<S>(streams * rows * even);
  const int64_t panels = (cols + kPanel - 1) / kPanel;
  S* own_panels = panels_.get<S>(streams * panels * kPanel * even);
  // Sums of the first part go where they belong, those of others are added to them.
  const bool direct = out.type == kType<S>;
  const int64_t sums = streams * rows * cols;
  S* own_sums = sums_.get<S>(sums * ((direct ? 0 : 1) + (parts > 1 ? 1 : 0)));
  const Matrices<S> own{own_sums, rows * cols, cols};
  const Matrices<S> first =
      direct ? Matrices<S>{static_cast<S*>(out.data), out.stream_stride, out.row_stride} : own;
  const Matrices<S> other = direct ? own : Matrices<S>{own_sums + sums, rows * cols, cols};
  for (int64_t p = 0; p < parts; ++p) {
    const int64_t k = p * kDepth, deep = std::min(part, depth - k);
    const int64_t length = native_ ? (deep + 1) / 2 * 2 : deep;  // of a row in own_rows
    if (!as_is) {
      for_rows(streams, rows, deep, [&](int64_t g, int64_t r, int64_t n) {
        const int64_t to = (g * rows + r) * length;
        if (native_) {
          kernels_.pack_even_rows(block(a, g, r, k), n, deep,
                                  reinterpret_cast<uint16_t*>(own_rows) + to);
        } else {
          kernels_.pack_rows(block(a, g, r, k), n, deep, own_rows + to);
        }
      });
    }
    for_rows(streams, panels, deep * kPanel, [&](int64_t g, int64_t i, int64_t n) {
      const int64_t wide = std::min(n * kPanel, cols - i * kPanel);
      const int64_t to = (g * panels + i) * kPanel * length;
      if (native_) {
        kernels_.pack_pairs(block(b, g, k, i * kPanel), deep, wide,
                            reinterpret_cast<uint16_t*>(own_panels) + to);
      } else {
        kernels_.pack_panels(block(b, g, k, i * kPanel), deep, wide, own_panels + to);
      }
    });
    const auto input = [&](auto* own_data) {
      using X = std::remove_pointer_t<decltype(own_data)>;
      return as_is ? Matrices<X>{static_cast<X*>(a.data) + k, a.stream_stride, a.row_stride}
                   : Matrices<X>{own_data, rows * length, length};
    };
    const Matrices<S>& to = p == 0 ? first : other;
    if (native_) {
      cpu::multiply<S>(gemm, type, streams, rows, to, cols, {}, deep, own_panels,
                       input(reinterpret_cast<uint16_t*>(own_rows)));
    } else {
      cpu::multiply<S>(gemm, type, streams, rows, to, cols, input(own_rows), deep, own_panels, {});
    }
    if (p == 0) continue;
    for_rows(streams, rows, cols, [&](int64_t g, int64_t r, int64_t n) {
      kernels_.add({to.row(g, r), to.row_stride}, {first.row(g, r), first.row_stride}, n, cols);
    });
  }
  if (direct) return;
  for_rows(streams, rows, cols, [&](int64_t g, int64_t r, int64_t n) {
    kernels_.narrow({first.row(g, r), first.row_stride}, {block(out, g, r, 0).data, out.row_stride},
                    n, cols);
  });
}

void Products::multiply(int64_t streams, int64_t rows, int64_t cols, int64_t depth,
                        const train::Matrices& out, const train::Matrices& a,
                        const train::Matrices& b) {
  if (a.type == ScalarType::Double) {
    multiply_as<double>(streams, rows, cols, depth, out, a, b);
  } else {
    multiply_as<float>(streams, rows, cols, depth, out, a, b);
  }
}

}  // namespace c2c::cpu
