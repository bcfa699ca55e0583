// c2c::fuse_ on the CPU: GEMMs through torch's dispatcher, everything between them in row_kernels.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <numeric>
#include <stdexcept>

#include "../ops.h"
#include "../scalar_math.h"
#include "row_kernels.h"

namespace c2c {
namespace {

using cpu::CacheType;
using cpu::CacheView;
using cpu::HeadShape;
using cpu::Row;
using cpu::RowKernels;
using torch::headeronly::ScalarType;

// Scratch is bounded: more streams x tokens than fit are done in chunks, streams first, so that
// every weight is read once as long as all tokens of one stream fit.
constexpr int64_t kScratchBytes = int64_t{128} << 20;
constexpr int64_t kElementsPerTask = 16384;  // below this a second thread does not pay

CacheType cache_type(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
      return CacheType::kFloat64;
    case ScalarType::BFloat16:
      return CacheType::kBfloat16;
    case ScalarType::Half:
      return CacheType::kFloat16;
    default:
      return CacheType::kFloat32;
  }
}

Activation parse_activation(const std::string& name) {
  if (name == "gelu") return Activation::kGelu;
  if (name == "relu") return Activation::kRelu;
  if (name == "silu") return Activation::kSilu;
  throw std::runtime_error("c2c_ext.fuse: activation must be gelu, relu or silu, got " + name);
}

Integration parse_integration(const std::string& name) {
  if (name == "residual") return Integration::kResidual;
  if (name == "interpolation") return Integration::kInterpolation;
  if (name == "replacement") return Integration::kReplacement;
  throw std::runtime_error(
      "c2c_ext.fuse: integration must be residual, interpolation or replacement, got " + name);
}

CacheView view_of(const Tensor& t) {
  return {t.data_ptr(), {t.stride(0), t.stride(1), t.stride(2), t.stride(3)}};
}

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

template <class T>
struct Matrices {  // `streams` matrices [rows, cols] at a row stride, one after another
  T* data;
  int64_t stream_stride, row_stride;
};

// out[g] = a[g] @ w[g]^T for the streams of a chunk, through aten::bmm.out.
template <class T>
void gemm(const Matrices<T>& out, const Matrices<T>& a, const Tensor& weight, int64_t first_stream,
          int64_t streams, int64_t rows) {
  const int64_t n = weight.size(1), k = weight.size(2);
  const auto type = sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float;
  const torch::stable::Device device(torch::headeronly::DeviceType::CPU);
  const auto matrix = [&](T* data, std::array<int64_t, 3> size, std::array<int64_t, 3> stride) {
    return torch::stable::from_blob(data, {size.data(), size.size()},
                                    {stride.data(), stride.size()}, device, type);
  };
  T* w = static_cast<T*>(weight.data_ptr()) + first_stream * n * k;
  const Tensor lhs = matrix(a.data, {streams, rows, k}, {a.stream_stride, a.row_stride, 1});
  const Tensor rhs = matrix(w, {streams, k, n}, {n * k, 1, k});
  const Tensor result =
      matrix(out.data, {streams, rows, n}, {out.stream_stride, out.row_stride, 1});
  std::array<StableIValue, 3> stack{torch::stable::detail::from(lhs),
                                    torch::stable::detail::from(rhs),
                                    torch::stable::detail::from(result)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::bmm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // takes the returned reference
}

// Calls f(stream, first row, row count) for all streams x rows, in parallel.
template <class F>
void for_rows(int64_t streams, int64_t rows, int64_t elements_per_row, const F& f) {
  const int64_t block =
      std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, elements_per_row));
  const int64_t blocks = (rows + block - 1) / block;
  torch::stable::parallel_for(0, streams * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = (i % blocks) * block;
      f(i / blocks, first, std::min(block, rows - first));
    }
  });
}

// One chunk: streams [first, first + streams) x the given rows.
template <class T>
class Chunk {
 public:
  Chunk(const FuseSizes& sizes, const PackedWeights& weights, const RowKernels<T>& kernels,
        Activation activation, Integration integration, bool accumulate)
      : s_(sizes),
        w_(weights),
        k_(kernels),
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

    const Matrices<T> c = packed(a_, in);
    for_rows(streams, count, in, [&](int64_t g, int64_t r, int64_t n) {
      k_.gather(views[g].sharer, sharer_shape, views[g].base, read_shape, rows + r, n,
                row(c, g, r));
    });
    const Matrices<T> z0 = packed(z_, h);
    multiply(z0, c, w_.in_weight);
    for_rows(streams, count, h, [&](int64_t g, int64_t r, int64_t n) {
      k_.bias_stats(row(z0, g, r), vector(w_.in_bias, g), n, h, rstd(g, r));
    });

    const Matrices<T> a = packed(a_, m);
    multiply(a, z0, w_.w1);
    scale_activate(a, a, m);
    const Matrices<T> delta = packed(d_, h);
    multiply(delta, a, w_.w2);
    // y = [activated projection | z1 | activated weighting]: out_weight reads the first two,
    // head_weight the last two.
    const Matrices<T> y = packed(y_, m + h + s_.weighting);
    const Matrices<T> z1 = column(y, m), weighting = column(y, m + h);
    residual(z0, delta, z1, true);

    const Matrices<T> branches = packed(a_, m + s_.weighting);
    multiply(branches, z1, w_.branch_w1);
    if (s_.weighting > 0) scale_activate(column(branches, m), weighting, s_.weighting);
    const bool deep = !w_.deep_w2.empty();
    // q = [activated projection | input of its block]; y itself at depth 3 with a folded output.
    const Matrices<T> q = deep ? packed(q_, m + h) : y;
    scale_activate(branches, q, m);
    Matrices<T> p = z1;
    for (size_t i = 0; i < w_.deep_w2.size(); ++i) {
      multiply(delta, q, w_.deep_w2[i]);
      const bool another_block = i < w_.deep_w1.size();
      residual(p, delta, column(q, m), another_block);
      p = column(q, m);
      if (another_block) {
        const Matrices<T> inner = packed(a_, m);
        multiply(inner, p, w_.deep_w1[i]);
        scale_activate(inner, q, m);
      }
    }

    const Matrices<T> head = packed(s_heads_, s_.receiver.heads);
    if (s_.weighting > 0) {
      for_rows(streams, count, s_.receiver.heads * 2 * h, [&](int64_t g, int64_t r, int64_t n) {
        k_.head_logits(row(z1, g, r), z1.row_stride, matrix(w_.head_weight, g), n, 2 * h,
                       s_.receiver.heads, row(head, g, r));
      });
    }
    const Matrices<T> projected = packed(d_, width);
    multiply(projected, s_.folded ? q : p, w_.out_weight);
    for_rows(streams, count, width, [&](int64_t g, int64_t r, int64_t n) {
      k_.combine(views[g].base, views[g].out, receiver_shape, rows + r, n, row(projected, g, r),
                 vector(w_.out_bias, g), s_.weighting > 0 ? row(head, g, r) : nullptr,
                 vector(w_.head_bias, g), integration_, accumulate_);
    });
  }

 private:
  int64_t input_width() const {
    return s_.sharer.width() + (s_.reads_receiver ? s_.receiver.width() : 0);
  }

  // Columns of the seven buffers, in the order of `buffers()`.
  std::array<int64_t, 7> buffer_columns() const {
    const int64_t h = s_.hidden, m = s_.inner;
    const int64_t q = w_.deep_w2.empty() ? 0 : m + h;
    return {std::max(input_width(), m + h),
            h,
            std::max(s_.receiver.width(), h),
            m + h + s_.weighting,
            q,
            s_.weighting > 0 ? s_.receiver.heads : 0,
            1};
  }
  std::array<T**, 7> buffers() { return {&a_, &z_, &d_, &y_, &q_, &s_heads_, &rstd_}; }

  Matrices<T> packed(T* data, int64_t cols) const { return {data, count_ * cols, cols}; }
  static Matrices<T> column(const Matrices<T>& x, int64_t first) {
    return {x.data + first, x.stream_stride, x.row_stride};
  }
  static T* row(const Matrices<T>& x, int64_t g, int64_t r) {
    return x.data + g * x.stream_stride + r * x.row_stride;
  }
  T* rstd(int64_t g, int64_t r) const { return rstd_ + g * count_ + r; }
  const T* vector(const Tensor& t, int64_t g) const {
    return static_cast<const T*>(t.const_data_ptr()) + (first_ + g) * t.size(1);
  }
  const T* matrix(const Tensor& t, int64_t g) const {
    return static_cast<const T*>(t.const_data_ptr()) + (first_ + g) * t.size(1) * t.size(2);
  }
  void multiply(const Matrices<T>& out, const Matrices<T>& x, const Tensor& weight) const {
    gemm(out, x, weight, first_, streams_, count_);
  }
  void scale_activate(const Matrices<T>& from, const Matrices<T>& to, int64_t cols) const {
    for_rows(streams_, count_, cols, [&](int64_t g, int64_t r, int64_t n) {
      k_.scale_activate(row(from, g, r), from.row_stride, rstd(g, r), n, cols, activation_,
                        row(to, g, r), to.row_stride);
    });
  }
  // to = z + delta, with the statistics of to if a norm follows.
  void residual(const Matrices<T>& z, const Matrices<T>& delta, const Matrices<T>& to,
                bool stats) const {
    for_rows(streams_, count_, s_.hidden, [&](int64_t g, int64_t r, int64_t n) {
      k_.residual_stats(row(z, g, r), z.row_stride, row(delta, g, r), n, s_.hidden, row(to, g, r),
                        to.row_stride, stats ? rstd(g, r) : nullptr);
    });
  }

  const FuseSizes& s_;
  const PackedWeights& w_;
  const RowKernels<T>& k_;
  Activation activation_;
  Integration integration_;
  bool accumulate_;
  int64_t first_ = 0, streams_ = 0, count_ = 0;
  T *a_ = nullptr, *z_ = nullptr, *d_ = nullptr, *y_ = nullptr, *q_ = nullptr, *s_heads_ = nullptr,
    *rstd_ = nullptr;
};

template <class T>
void run_fuse(const FuseCall& call, const PackedWeights& weights,
              const std::optional<Tensor>& token_map, CacheType type, Activation activation,
              Integration integration, bool accumulate) {
  const FuseSizes& s = call.sizes;
  const RowKernels<T>& kernels = cpu::row_kernels<T>(type);
  const Rows rows = resolve_rows(s, token_map);
  std::vector<StreamViews> views;
  views.reserve(s.streams);
  for (const StreamTensors& t : call.streams) {
    views.push_back({view_of(*t.out), view_of(*t.base), view_of(*t.sharer)});
  }
  const HeadShape shape{s.receiver.heads, s.receiver.dim};
  if (!accumulate) {
    for_rows(s.streams, static_cast<int64_t>(rows.kept.size()), shape.heads * shape.dim,
             [&](int64_t g, int64_t r, int64_t n) {
               if (views[g].out.data != views[g].base.data) {
                 kernels.copy(views[g].base, views[g].out, shape, rows.kept.data() + r, n);
               }
             });
  }
  const auto count = static_cast<int64_t>(rows.fused.size());
  if (count == 0) return;

  Chunk<T> chunk(s, weights, kernels, activation, integration, accumulate);
  const int64_t row_elements = chunk.scratch_elements_per_row();
  const int64_t budget = kScratchBytes / static_cast<int64_t>(sizeof(T)) / row_elements;  // rows
  const int64_t chunk_rows = std::clamp<int64_t>(budget, 1, count);
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

void fuse_cpu(std::vector<Tensor> out_keys, std::vector<Tensor> out_values,
              std::vector<Tensor> base_keys, std::vector<Tensor> base_values,
              std::vector<Tensor> sharer_keys, std::vector<Tensor> sharer_values,
              std::optional<Tensor> token_map, std::vector<int64_t> layers,
              std::vector<int64_t> sources, int64_t num_keys, int64_t sharer_heads,
              int64_t sharer_dim, int64_t receiver_heads, int64_t receiver_dim, Tensor in_weight,
              Tensor in_bias, Tensor w1, Tensor w2, Tensor branch_w1, std::vector<Tensor> deep_w2,
              std::vector<Tensor> deep_w1, Tensor out_weight, Tensor out_bias, Tensor head_weight,
              Tensor head_bias, std::string activation, std::string integration, bool accumulate) {
  const PackedWeights weights{in_weight, in_bias,    w1,       w2,          branch_w1, deep_w2,
                              deep_w1,   out_weight, out_bias, head_weight, head_bias};
  const Activation act = parse_activation(activation);
  const Integration how = parse_integration(integration);
  const FuseCall call = check_fuse(
      out_keys, out_values, base_keys, base_values, sharer_keys, sharer_values, token_map, layers,
      sources, num_keys, {sharer_heads, sharer_dim}, {receiver_heads, receiver_dim}, weights);
  if (call.sizes.streams == 0 || call.sizes.batch * call.sizes.tokens == 0) return;
  const CacheType type = cache_type(call.streams[0].base->scalar_type());
  if (type == CacheType::kFloat64) {
    run_fuse<double>(call, weights, token_map, type, act, how, accumulate);
  } else {
    run_fuse<float>(call, weights, token_map, type, act, how, accumulate);
  }
}

}  // namespace c2c
