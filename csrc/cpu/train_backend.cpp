#include "train_backend.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "stages.h"

namespace c2c::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using train::Chunk;
using train::element_size;

// Streams enough for all threads; more would only take memory.
constexpr int64_t kScratchBytesPerThread = int64_t{32} << 20;
constexpr int64_t kMaxScratchBytes = int64_t{512} << 20;

// Rows from `first` on of stream `g` of the chunk; none of a matrix that is not there.
Rows rows_of(const train::Matrices& m, int64_t g, int64_t first) {
  if (m.data == nullptr) return {};
  return {static_cast<char*>(m.data) +
              (g * m.stream_stride + first * m.row_stride) * element_size(m.type),
          m.row_stride};
}

HeadShape head_shape(const KVShape& shape) { return {shape.heads, shape.dim}; }

}  // namespace

TrainBackend::TrainBackend(const train::Call& call)
    : call_(call),
      kernels_(train_kernels(cache_type(call.type))),
      products_(cache_type(call.type)),
      sums_size_(element_size(call.sums)) {
  const train::Sizes& s = call.sizes;
  const auto& map = call.token_map;
  const auto* values = map ? static_cast<const int64_t*>(map->const_data_ptr()) : nullptr;
  const int64_t token_stride = map ? map->stride(map->dim() - 1) : 0;
  const int64_t batch_stride = map && map->dim() == 2 ? map->stride(0) : 0;
  rows_.reserve(s.rows());
  for (int64_t b = 0; b < s.batch; ++b) {
    for (int64_t n = 0; n < s.tokens; ++n) {
      const int64_t source = map ? values[b * batch_stride + n * token_stride] : n;
      const bool mapped = source >= 0 && source < s.sharer_tokens;
      rows_.push_back({static_cast<int32_t>(b), static_cast<int32_t>(n),
                       static_cast<int32_t>(mapped ? source : -1)});
    }
  }
}

int64_t TrainBackend::scratch_bytes() const {
  const int64_t threads = torch::stable::get_num_threads();
  return std::min(kMaxScratchBytes, kScratchBytesPerThread * threads);
}

Tensor TrainBackend::empty(const std::vector<int64_t>& sizes, ScalarType type) const {
  return torch::stable::empty(sizes, type, std::nullopt, device());
}

void TrainBackend::multiply(int64_t streams, int64_t rows, int64_t cols, int64_t depth,
                            const Matrices& out, const Matrices& a, const Matrices& b) const {
  products_.multiply(streams, rows, cols, depth, out, a, b);
}

void TrainBackend::gather(Chunk chunk, const Matrices& c) const {
  const train::Sizes& s = call_.sizes;
  const HeadShape read{s.reads_receiver ? s.receiver.heads : 0, s.receiver.dim};
  for_rows(chunk.streams, s.rows(), s.input_width(), [&](int64_t g, int64_t r, int64_t n) {
    kernels_.gather(view_of(call_.sharer[chunk.first + g]), head_shape(s.sharer),
                    view_of(call_.base[chunk.first + g]), read, rows_.data() + r, n,
                    rows_of(c, g, r));
  });
}

void TrainBackend::bias_norm(Chunk chunk, const Matrices& z, const void* bias,
                             const Matrices& n) const {
  const int64_t cols = call_.sizes.hidden;
  for_rows(chunk.streams, call_.sizes.rows(), cols, [&](int64_t g, int64_t r, int64_t count) {
    std::vector<char> scratch(kScratchRows * cols * sums_size_);
    kernels_.bias_norm(rows_of(z, g, r), vector(bias, g, cols), rows_of(n, g, r), count, cols,
                       scratch.data());
  });
}

void TrainBackend::activate(Chunk chunk, int64_t cols, const Matrices& u, const Matrices& h) const {
  for_rows(chunk.streams, call_.sizes.rows(), cols, [&](int64_t g, int64_t r, int64_t n) {
    kernels_.activate(call_.activation, rows_of(u, g, r), rows_of(h, g, r), n, cols);
  });
}

void TrainBackend::residual_norm(Chunk chunk, const Matrices& z, const Matrices& delta,
                                 const Dropout& dropout, const Matrices& out,
                                 const Matrices& n) const {
  const int64_t cols = call_.sizes.hidden, rows = call_.sizes.rows();
  for_rows(chunk.streams, rows, cols, [&](int64_t g, int64_t r, int64_t count) {
    std::vector<char> scratch(kScratchRows * cols * sums_size_);
    kernels_.residual_norm(rows_of(z, g, r), rows_of(delta, g, r), dropout, chunk.first + g, r,
                           rows_of(out, g, r), rows_of(n, g, r), count, cols, scratch.data());
  });
}

const char* TrainBackend::vector(const void* vectors, int64_t g, int64_t cols) const {
  return vectors == nullptr ? nullptr : static_cast<const char*>(vectors) + g * cols * sums_size_;
}

FusedRows TrainBackend::fused_rows(Chunk chunk, int64_t g, int64_t first, int64_t count,
                                   const Matrices& projected, const void* out_bias,
                                   const Matrices& logits, const void* head_bias) const {
  const train::Sizes& s = call_.sizes;
  FusedRows fused{view_of(call_.base[chunk.first + g]),
                  head_shape(s.receiver),
                  rows_.data() + first,
                  count,
                  rows_of(projected, g, first),
                  vector(out_bias, g, s.receiver.width()),
                  rows_of(logits, g, first),
                  vector(head_bias, g, s.receiver.heads),
                  {},
                  call_.integration};
  if (call_.gate) {
    const Tensor& gate = *call_.gate;
    fused.gate.data = static_cast<const char*>(gate.const_data_ptr()) +
                      (chunk.first + g) * gate.stride(0) * sums_size_;
    for (int d = 0; d < 3; ++d) {
      fused.gate.stride[d] = gate.size(d + 1) == 1 ? 0 : gate.stride(d + 1);
    }
  }
  return fused;
}

void TrainBackend::combine(Chunk chunk, const Matrices& projected, const void* out_bias,
                           const Matrices& logits, const void* head_bias,
                           const std::vector<Tensor>& out) const {
  const train::Sizes& s = call_.sizes;
  for_rows(chunk.streams, s.rows(), s.receiver.width(), [&](int64_t g, int64_t r, int64_t n) {
    kernels_.combine(fused_rows(chunk, g, r, n, projected, out_bias, logits, head_bias),
                     view_of(out[chunk.first + g]));
  });
}

void TrainBackend::combine_backward(Chunk chunk, const std::vector<Tensor>& grad_out,
                                    const Matrices& projected, const void* out_bias,
                                    const Matrices& logits, const void* head_bias,
                                    const Matrices& d_projected, const Matrices& d_logits,
                                    void* d_gate, const std::vector<Tensor>* grad_base) const {
  const train::Sizes& s = call_.sizes;
  const int64_t gates = s.rows() * s.receiver.heads;
  for_rows(chunk.streams, s.rows(), s.receiver.width(), [&](int64_t g, int64_t r, int64_t n) {
    std::vector<char> scratch(3 * s.receiver.dim * sums_size_);
    const FusedGradients to{
        rows_of(d_projected, g, r), rows_of(d_logits, g, r),
        grad_base == nullptr ? CacheView{} : view_of((*grad_base)[chunk.first + g]),
        d_gate == nullptr ? nullptr : static_cast<char*>(d_gate) + g * gates * sums_size_,
        s.tokens};
    kernels_.combine_backward(fused_rows(chunk, g, r, n, projected, out_bias, logits, head_bias),
                              view_of(grad_out[chunk.first + g]), to, scratch.data());
  });
}

void TrainBackend::dropout_backward(Chunk chunk, const Matrices& dz, const Dropout& dropout,
                                    const Matrices& dd) const {
  const int64_t cols = call_.sizes.hidden, rows = call_.sizes.rows();
  for_rows(chunk.streams, rows, cols, [&](int64_t g, int64_t r, int64_t n) {
    kernels_.dropout_backward(rows_of(dz, g, r), dropout, chunk.first + g, r, rows_of(dd, g, r), n,
                              cols);
  });
}

void TrainBackend::activate_backward(Chunk chunk, int64_t cols, const Matrices& u,
                                     const Matrices& d, const Matrices& h) const {
  for_rows(chunk.streams, call_.sizes.rows(), cols, [&](int64_t g, int64_t r, int64_t n) {
    kernels_.activate_backward(call_.activation, rows_of(u, g, r), rows_of(d, g, r),
                               rows_of(h, g, r), n, cols);
  });
}

void TrainBackend::norm_backward(Chunk chunk, const Matrices& z, const Matrices& dn,
                                 const Matrices& first, const Matrices& second, const Matrices& dz,
                                 const Matrices& n) const {
  const int64_t cols = call_.sizes.hidden;
  for_rows(chunk.streams, call_.sizes.rows(), cols, [&](int64_t g, int64_t r, int64_t count) {
    std::vector<char> scratch(kScratchRows * cols * sums_size_);
    kernels_.norm_backward(rows_of(z, g, r), rows_of(dn, g, r), rows_of(first, g, r),
                           rows_of(second, g, r), rows_of(dz, g, r), rows_of(n, g, r), count, cols,
                           scratch.data());
  });
}

void TrainBackend::column_sums(Chunk chunk, int64_t rows, int64_t cols, const Matrices& x,
                               void* out) const {
  const auto sum = x.type == call_.type ? kernels_.column_sums : kernels_.column_sums_wide;
  const int64_t blocks = (cols + kSumColumns - 1) / kSumColumns;
  torch::stable::parallel_for(0, chunk.streams * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t g = i / blocks, first = i % blocks * kSumColumns;
      sum(rows_of(x.columns_from(first), g, 0), rows, std::min(kSumColumns, cols - first),
          static_cast<char*>(out) + (g * cols + first) * sums_size_);
    }
  });
}

namespace {

// gradient[g] [b, h, n] = the sums of d_gate[g] [B, H, N], in double.
template <class S>
void sum_gate_as(const train::Sizes& s, int64_t streams, const S* d_gate, const Tensor& gradient,
                 S* to) {
  const int64_t b = gradient.size(1), h = gradient.size(2), n = gradient.size(3);
  const int64_t gates = s.rows() * s.receiver.heads;
  std::vector<double> sums(b * h * n);
  for (int64_t g = 0; g < streams; ++g) {
    std::fill(sums.begin(), sums.end(), 0.0);
    const S* from = d_gate + g * gates;
    for (int64_t i = 0; i < s.batch; ++i) {
      for (int64_t j = 0; j < s.receiver.heads; ++j) {
        double* row = sums.data() + ((b == 1 ? 0 : i) * h + (h == 1 ? 0 : j)) * n;
        for (int64_t k = 0; k < s.tokens; ++k) row[n == 1 ? 0 : k] += static_cast<double>(*from++);
      }
    }
    for (const double sum : sums) *to++ = static_cast<S>(sum);
  }
}

}  // namespace

void TrainBackend::sum_gate(Chunk chunk, const void* d_gate, const Tensor& grad_gate) const {
  const int64_t per_stream = grad_gate.numel() / grad_gate.size(0);
  char* to = static_cast<char*>(grad_gate.data_ptr()) + chunk.first * per_stream * sums_size_;
  if (sums_size_ == 8) {
    sum_gate_as(call_.sizes, chunk.streams, static_cast<const double*>(d_gate), grad_gate,
                reinterpret_cast<double*>(to));
  } else {
    sum_gate_as(call_.sizes, chunk.streams, static_cast<const float*>(d_gate), grad_gate,
                reinterpret_cast<float*>(to));
  }
}

void TrainBackend::add_base(Chunk chunk, const Matrices& dc,
                            const std::vector<Tensor>& grad_base) const {
  const train::Sizes& s = call_.sizes;
  for_rows(chunk.streams, s.rows(), s.receiver.width(), [&](int64_t g, int64_t r, int64_t n) {
    kernels_.add_base(rows_of(dc, g, r), head_shape(s.receiver), rows_.data() + r, n,
                      view_of(grad_base[chunk.first + g]));
  });
}

TrainBackend::Readers TrainBackend::readers() const {
  const train::Sizes& s = call_.sizes;
  Readers result;
  result.starts.assign(s.batch * s.sharer_tokens + 1, 0);
  for (const Row& row : rows_) {
    if (row.source >= 0) ++result.starts[row.batch * s.sharer_tokens + row.source + 1];
  }
  for (size_t i = 1; i < result.starts.size(); ++i) result.starts[i] += result.starts[i - 1];
  result.rows.resize(result.starts.back());
  std::vector<int64_t> next = result.starts;
  for (size_t r = 0; r < rows_.size(); ++r) {
    if (rows_[r].source < 0) continue;
    result.rows[next[rows_[r].batch * s.sharer_tokens + rows_[r].source]++] =
        static_cast<int64_t>(r);
  }
  return result;
}

void TrainBackend::scatter_sharer(Chunk chunk, const Matrices& dc,
                                  const std::vector<Tensor>& grad_sharer) const {
  const train::Sizes& s = call_.sizes;
  const Readers read_by = readers();
  // Streams x batch rows, in blocks of sharer tokens.
  for_rows(chunk.streams * s.batch, s.sharer_tokens, s.sharer.width(),
           [&](int64_t i, int64_t first, int64_t n) {
             std::vector<char> scratch(s.sharer.dim * sums_size_);
             const int64_t g = i / s.batch, batch = i % s.batch;
             kernels_.scatter(rows_of(dc, g, 0), head_shape(s.sharer),
                              read_by.starts.data() + batch * s.sharer_tokens, read_by.rows.data(),
                              batch, first, n, view_of(grad_sharer[chunk.first + g]),
                              scratch.data());
           });
}

}  // namespace c2c::cpu
