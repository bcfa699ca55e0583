// c2c::fuse_ on the CPU: matrix products in panel_gemm, everything between them in row_kernels.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <numeric>
#include <stdexcept>

#include "../fuse_op.h"
#include "stages.h"

namespace c2c {
namespace {

using cpu::for_rows;
using cpu::HeadShape;
using cpu::Matrices;
using cpu::PanelGemm;
using cpu::RoundedRows;
using cpu::Row;
using cpu::RowKernels;
using torch::headeronly::ScalarType;

// Scratch is bounded, by what threads have in their caches: more streams x tokens than fit are done
// in chunks, streams first, so that every weight is read once as long as all tokens of one stream
// fit.
constexpr int64_t kScratchBytesPerThread = int64_t{8} << 20;
constexpr int64_t kMaxScratchBytes = int64_t{128} << 20;

struct StreamViews {
  CacheView out, base, sharer;
};

// Tokens to fuse, and tokens that the map leaves as they are.
struct Rows {
  std::vector<Row> fused, kept;
};

Rows resolve_rows(const FuseSizes& s, const std::optional<Tensor>& token_map) {
  Rows rows;
  rows.fused.reserve(s.batch * s.tokens);
  const auto* map = token_map ? static_cast<const int64_t*>(token_map->const_data_ptr()) : nullptr;
  const int64_t token_stride = map ? token_map->stride(token_map->dim() - 1) : 0;
  const int64_t batch_stride = map && token_map->dim() == 2 ? token_map->stride(0) : 0;
  for (int64_t b = 0; b < s.batch; ++b) {
    for (int64_t n = 0; n < s.tokens; ++n) {
      const int64_t source = map ? map[b * batch_stride + n * token_stride] : n;
      const bool mapped = source >= 0 && source < s.sharer_tokens;
      (mapped ? rows.fused : rows.kept)
          .push_back({static_cast<int32_t>(b), static_cast<int32_t>(n),
                      static_cast<int32_t>(mapped ? source : -1)});
    }
  }
  return rows;
}

// One chunk: streams [first, first + streams) x the given rows.
template <class T>
class Chunk {
 public:
  Chunk(const FuseSizes& sizes, const PackedWeights& weights, CacheType type, Activation activation,
        Integration integration, bool accumulate)
      : s_(sizes),
        w_(weights),
        k_(cpu::row_kernels<T>(type)),
        type_(type),
        gemm_(cpu::panel_gemm<T>(type)),
        native_(gemm_.multiply_native != nullptr),
        activation_(activation),
        integration_(integration),
        accumulate_(accumulate) {}

  int64_t scratch_elements_per_row() const {
    const auto columns = buffer_columns();
    return std::accumulate(columns.begin(), columns.end(), int64_t{0});
  }

  void run(const StreamViews* views, int64_t first, int64_t streams, const Row* rows, int64_t count,
           T* scratch) {
    first_ = first, streams_ = streams, count_ = count;
    for (size_t i = 0; i < buffers().size(); ++i) {
      *buffers()[i] = scratch;
      scratch += streams * count * buffer_columns()[i];
    }
    const int64_t h = s_.hidden, m = s_.inner;
    const HeadShape sharer_shape{s_.sharer.heads, s_.sharer.dim};
    const HeadShape receiver_shape{s_.receiver.heads, s_.receiver.dim};
    const HeadShape read_shape{s_.reads_receiver ? receiver_shape.heads : 0, receiver_shape.dim};
    const int64_t in = input_width(), width = s_.receiver.width();

    // Where products read bfloat16, the stage that makes an input leaves it rounded in a row
    // [activated | z], with the gathered one or the activated one at its beginning; z0, z1, p last.
    const Matrices<T> c = packed(a_, in);
    for_rows(streams, count, in, [&](int64_t g, int64_t r, int64_t n) {
      if (native_) {
        k_.gather_rounded(views[g].sharer, sharer_shape, views[g].base, read_shape, rows + r, n,
                          rounded_rows(0, g, r));
      } else {
        k_.gather(views[g].sharer, sharer_shape, views[g].base, read_shape, rows + r, n,
                  c.row(g, r));
      }
    });
    const Matrices<T> z0 = packed(z_, h);
    multiply(z0, h, c, in, w_.in_weight, 0);
    for_rows(streams, count, h, [&](int64_t g, int64_t r, int64_t n) {
      k_.bias_stats(z0.row(g, r), vector(w_.in_bias, g), n, h, rstd(g, r), rounded_rows(m, g, r));
    });

    const Matrices<T> a = packed(a_, m);
    multiply(a, m, z0, h, w_.w1, m);
    activate_input(a, a, m);
    const Matrices<T> delta = packed(d_, h);
    multiply(delta, h, a, m, w_.w2, 0);
    // y = [activated projection | z1 | activated weighting]: out_weight reads the first two,
    // head_weight the last two.
    const Matrices<T> y = packed(y_, m + h + s_.weighting);
    const Matrices<T> z1 = column(y, m), weighting = column(y, m + h);
    residual(z0, delta, z1, true);

    const Matrices<T> branches = packed(a_, m + s_.weighting);
    multiply(branches, m + s_.weighting, z1, h, w_.branch_w1, m);
    if (s_.weighting > 0) scale_activate(column(branches, m), weighting, s_.weighting);
    const bool deep = !w_.deep_w2.empty();
    // q = [activated projection | input of its block]; y itself at depth 3 with a folded output.
    const Matrices<T> q = deep ? packed(q_, m + h) : y;
    activate_input(branches, q, m);
    Matrices<T> p = z1;
    for (size_t i = 0; i < w_.deep_w2.size(); ++i) {
      multiply(delta, h, q, m, w_.deep_w2[i], 0);
      const bool another_block = i < w_.deep_w1.size();
      residual(p, delta, column(q, m), another_block);
      p = column(q, m);
      if (another_block) {
        const Matrices<T> inner = packed(a_, m);
        multiply(inner, m, p, h, w_.deep_w1[i], m);
        activate_input(inner, q, m);
      }
    }

    const Matrices<T> head = packed(s_heads_, s_.receiver.heads);
    if (s_.weighting > 0) {
      for_rows(streams, count, s_.receiver.heads * 2 * h, [&](int64_t g, int64_t r, int64_t n) {
        k_.head_logits(z1.row(g, r), z1.row_stride, matrix(w_.head_weight, g), n, 2 * h,
                       s_.receiver.heads, head.row(g, r));
      });
    }
    const Matrices<T> projected = packed(d_, width);
    multiply(projected, width, s_.folded ? q : p, s_.folded ? m + h : h, w_.out_weight,
             s_.folded ? 0 : m);
    for_rows(streams, count, width, [&](int64_t g, int64_t r, int64_t n) {
      k_.combine(views[g].base, views[g].out, receiver_shape, rows + r, n, projected.row(g, r),
                 vector(w_.out_bias, g), s_.weighting > 0 ? head.row(g, r) : nullptr,
                 vector(w_.head_bias, g), integration_, accumulate_);
    });
  }

 private:
  int64_t input_width() const {
    return s_.sharer.width() + (s_.reads_receiver ? s_.receiver.width() : 0);
  }

  // Columns of the eight buffers, in the order of `buffers()`.
  std::array<int64_t, 8> buffer_columns() const {
    const int64_t h = s_.hidden, m = s_.inner;
    const int64_t q = w_.deep_w2.empty() ? 0 : m + h;
    return {std::max(input_width(), m + h),
            h,
            std::max(s_.receiver.width(), h),
            m + h + s_.weighting,
            q,
            s_.weighting > 0 ? s_.receiver.heads : 0,
            1,
            cpu::rounded_elements(gemm_, rounded_columns())};
  }
  // [activated | z | zero], or the gathered input and a zero.
  int64_t rounded_columns() const { return std::max(input_width(), s_.inner + s_.hidden) + 1; }
  std::array<T**, 8> buffers() { return {&a_, &z_, &d_, &y_, &q_, &s_heads_, &rstd_, &rounded_}; }

  Matrices<T> packed(T* data, int64_t cols) const { return {data, count_ * cols, cols}; }
  static Matrices<T> column(const Matrices<T>& x, int64_t first) {
    return {x.data + first, x.stream_stride, x.row_stride};
  }
  T* rstd(int64_t g, int64_t r) const { return rstd_ + g * count_ + r; }
  const T* vector(const Tensor& t, int64_t g) const {
    return static_cast<const T*>(t.const_data_ptr()) + (first_ + g) * t.size(1);
  }
  const T* matrix(const Tensor& t, int64_t g) const {
    return static_cast<const T*>(t.const_data_ptr()) + (first_ + g) * t.size(1) * t.size(2);
  }
  // Rows of bfloat16 inputs from `column` on; nowhere if products read none.
  Matrices<uint16_t> rounded(int64_t column) const {
    const int64_t stride = cpu::rounded_stride(rounded_columns());
    return {reinterpret_cast<uint16_t*>(rounded_) + column, count_ * stride, stride};
  }
  RoundedRows rounded_rows(int64_t column, int64_t g, int64_t r) const {
    if (!native_) return {};
    const Matrices<uint16_t> all = rounded(column);
    return {all.row(g, r), all.row_stride};
  }
  // out[g] = x[g] @ weight[g]^T; weight stands for [G, cols, depth]. Where products read bfloat16,
  // x was left rounded at `column`.
  void multiply(const Matrices<T>& out, int64_t cols, const Matrices<T>& x, int64_t depth,
                const Tensor& weight, int64_t column) const {
    const int64_t stream = weight.numel() / weight.size(0) * cpu::weight_size(type_);
    const auto* weights = static_cast<const char*>(weight.const_data_ptr()) + first_ * stream;
    cpu::multiply(gemm_, type_, streams_, count_, out, cols, x, depth, weights, rounded(column));
  }
  // scale_activate where nothing but the next product reads the result.
  void activate_input(const Matrices<T>& from, const Matrices<T>& to, int64_t cols) const {
    if (!native_) return scale_activate(from, to, cols);
    for_rows(streams_, count_, cols, [&](int64_t g, int64_t r, int64_t n) {
      k_.scale_activate_rounded(from.row(g, r), from.row_stride, rstd(g, r), n, cols, activation_,
                                rounded_rows(0, g, r));
    });
  }
  void scale_activate(const Matrices<T>& from, const Matrices<T>& to, int64_t cols) const {
    for_rows(streams_, count_, cols, [&](int64_t g, int64_t r, int64_t n) {
      k_.scale_activate(from.row(g, r), from.row_stride, rstd(g, r), n, cols, activation_,
                        to.row(g, r), to.row_stride);
    });
  }
  // to = z + delta, with the statistics of to if a norm follows.
  void residual(const Matrices<T>& z, const Matrices<T>& delta, const Matrices<T>& to,
                bool stats) const {
    for_rows(streams_, count_, s_.hidden, [&](int64_t g, int64_t r, int64_t n) {
      k_.residual_stats(z.row(g, r), z.row_stride, delta.row(g, r), n, s_.hidden, to.row(g, r),
                        to.row_stride, stats ? rstd(g, r) : nullptr, rounded_rows(s_.inner, g, r));
    });
  }

  const FuseSizes& s_;
  const PackedWeights& w_;
  const RowKernels<T>& k_;
  const CacheType type_;
  const PanelGemm<T>& gemm_;
  const bool native_;  // products read inputs rounded to bfloat16
  Activation activation_;
  Integration integration_;
  bool accumulate_;
  int64_t first_ = 0, streams_ = 0, count_ = 0;
  T *a_ = nullptr, *z_ = nullptr, *d_ = nullptr, *y_ = nullptr, *q_ = nullptr, *s_heads_ = nullptr,
    *rstd_ = nullptr, *rounded_ = nullptr;
};

template <class T>
void run(const FuseRequest& request, CacheType type) {
  const FuseSizes& s = request.call.sizes;
  const RowKernels<T>& kernels = cpu::row_kernels<T>(type);
  const Rows rows = resolve_rows(s, request.token_map);
  std::vector<StreamViews> views;
  views.reserve(s.streams);
  for (const StreamTensors& t : request.call.streams) {
    views.push_back({view_of(*t.out), view_of(*t.base), view_of(*t.sharer)});
  }
  const HeadShape shape{s.receiver.heads, s.receiver.dim};
  if (!request.accumulate) {
    for_rows(s.streams, static_cast<int64_t>(rows.kept.size()), shape.heads * shape.dim,
             [&](int64_t g, int64_t r, int64_t n) {
               if (views[g].out.data != views[g].base.data) {
                 kernels.copy(views[g].base, views[g].out, shape, rows.kept.data() + r, n);
               }
             });
  }
  const auto count = static_cast<int64_t>(rows.fused.size());
  if (count == 0) return;

  Chunk<T> chunk(s, request.weights, type, request.activation, request.integration,
                 request.accumulate);
  const int64_t row_elements = chunk.scratch_elements_per_row();
  const int64_t bytes =
      std::min(kMaxScratchBytes, kScratchBytesPerThread * torch::stable::get_num_threads());
  const int64_t budget = bytes / static_cast<int64_t>(sizeof(T)) / row_elements;  // rows
  const int64_t chunk_rows = equal_part(count, std::max<int64_t>(budget, 1));
  const int64_t chunk_streams = std::clamp<int64_t>(budget / chunk_rows, 1, s.streams);
  const int64_t scratch_size = chunk_streams * chunk_rows * row_elements;
  const Tensor scratch = torch::stable::empty(
      {&scratch_size, 1}, sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float);
  for (int64_t g = 0; g < s.streams; g += chunk_streams) {
    for (int64_t r = 0; r < count; r += chunk_rows) {
      chunk.run(views.data() + g, g, std::min(chunk_streams, s.streams - g), rows.fused.data() + r,
                std::min(chunk_rows, count - r), static_cast<T*>(scratch.data_ptr()));
    }
  }
}

}  // namespace

void fuse_cpu(const FuseRequest& request) {
  const CacheType type = cache_type(request.call.streams[0].base->scalar_type());
  if (type == CacheType::kFloat64) {
    run<double>(request, type);
  } else {
    run<float>(request, type);
  }
}

}  // namespace c2c
