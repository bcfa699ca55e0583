// c2c::fuse_ on CUDA tensors: matrix products through torch's bmm, everything between them in
// row_kernels.cu, about a dozen launches for all streams of a chunk; or, where it was asked for,
// fused_gemm.cu and hopper_gemm.cu for what they run. No host synchronisation.
// Compiled with C2C_EMULATE it is c2c_emulated::fuse_, which runs the same kernels on CPU tensors.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>

#include "../fuse_op.h"
#include "arguments.h"
#include "fused_gemm.h"
#include "hopper_gemm.h"
#include "runtime.h"

namespace c2c {
namespace {

using cuda::Block;
using cuda::check_width;
using cuda::Combine;
using cuda::Device;
using cuda::FusedCall;
using cuda::FusedWeights;
using cuda::head_shape;
using cuda::HeadShape;
using cuda::kMaxStreams;
using cuda::kPlacement;
using cuda::Matrices;
using cuda::Path;
using cuda::Streams;
using cuda::Tokens;
using cuda::view_of;
using torch::headeronly::ScalarType;

// Scratch is at most this plus the size of the fused caches, up to kMoreScratchBytes, which many
// rows fill a GPU with: more streams x tokens are done in chunks, streams first, so that every
// weight is read once as long as all tokens of a stream fit.
constexpr int64_t kScratchBytes = int64_t{64} << 20;
constexpr int64_t kMoreScratchBytes = int64_t{1} << 30;
constexpr int64_t kMaxRows = int64_t{1} << 30;  // of one launch
constexpr int64_t kAlignment = 16;              // of every row of scratch, in bytes

std::vector<const void*> addresses(const std::vector<Tensor>& tensors) {
  std::vector<const void*> result;
  for (const Tensor& t : tensors) result.push_back(t.const_data_ptr());
  return result;
}

class Fusion {
 public:
  explicit Fusion(const FuseRequest& request)
      : call_(request.call),
        s_(call_.sizes),
        w_(request.weights),
        device_(*call_.streams[0].base),
        scalar_(call_.streams[0].base->scalar_type()),
        type_(cache_type(scalar_)),
        size_(static_cast<int64_t>(call_.streams[0].base->element_size())),
        sums_size_(scalar_ == ScalarType::Double ? 8 : 4),
        tokens_(cuda::tokens_of(request.token_map, s_.batch, s_.tokens, s_.sharer_tokens)),
        activation_(request.activation),
        integration_(request.integration),
        accumulate_(request.accumulate),
        path_(cuda::chosen_path(device_, type_, s_.batch * s_.tokens)),
        deep_w2_(addresses(w_.deep_w2)),
        deep_w1_(addresses(w_.deep_w1)) {}

  void run() { run(path_, {0, s_.streams, 0, s_.batch * s_.tokens}); }

 private:
  // Streams and rows of the call.
  struct Part {
    int64_t first_stream, streams, first_row, rows;
  };

  // Does the part on `path` in as few chunks as its scratch allows. A path leaves what it does not
  // run to the next.
  void run(Path path, const Part& part) {
    const int64_t fused_bytes = s_.streams * s_.batch * s_.tokens * s_.receiver.width() * size_;
    const int64_t bytes =
        cuda::scratch_limit(kScratchBytes + std::min(fused_bytes, kMoreScratchBytes));
    const int64_t per_row = bytes_per_row(path);
    const int64_t most = std::max<int64_t>(1, bytes / per_row);  // rows of all streams
    const int64_t rows = equal_part(part.rows, std::min(most, kMaxRows));
    const int64_t streams =
        equal_part(part.streams, std::clamp<int64_t>(most / rows, 1, kMaxStreams));
    for (int64_t g = 0; g < part.streams; g += streams) {
      for (int64_t r = 0; r < part.rows; r += rows) {
        const Part chunk{part.first_stream + g, std::min(streams, part.streams - g),
                         part.first_row + r, std::min(rows, part.rows - r)};
        if (!run_chunk(path, chunk, scratch(streams * rows * per_row))) {
          run(path == Path::kHopper ? Path::kFused : Path::kPlain, chunk);
        }
      }
    }
  }

  bool run_chunk(Path path, const Part& chunk, void* scratch) {
    first_ = chunk.first_stream;
    block_ = {static_cast<int>(chunk.streams), chunk.first_row, chunk.rows};
    Streams views;
    for (int64_t i = 0; i < chunk.streams; ++i) {
      const StreamTensors& t = call_.streams[first_ + i];
      views.view[i] = {view_of(*t.out), view_of(*t.base), view_of(*t.sharer)};
    }
    if (path == Path::kHopper) return cuda::run_hopper(fused_call(views, scratch), stream());
    if (path == Path::kFused) return cuda::run_fused(fused_call(views, scratch), stream());
    run_plain(views, static_cast<char*>(scratch));
    return true;
  }

  // Kernels that still use what it replaces are in front of those that get that memory again.
  void* scratch(int64_t bytes) {
    if (!scratch_.has_value() || scratch_->numel() < bytes) {
      scratch_.reset();
      scratch_ = device_.scratch(bytes);
    }
    return scratch_->data_ptr();
  }

  int64_t input_width() const {
    return s_.sharer.width() + (s_.reads_receiver ? s_.receiver.width() : 0);
  }
  bool deep() const { return !w_.deep_w2.empty(); }
  bool weighted() const { return s_.weighting > 0; }

  // Columns of the buffers. `wide` holds in turn the gathered input, what blocks have inside, and
  // the projection; `normed` a norm or what a block adds.
  int64_t wide_columns() const {
    return std::max({input_width(), s_.inner + s_.weighting, s_.receiver.width()});
  }
  int64_t y_columns() const { return s_.inner + s_.hidden + s_.weighting; }
  int64_t q_columns() const { return deep() ? s_.inner + s_.hidden : 0; }

  static int64_t row_bytes(int64_t columns, int64_t size) {
    return parts(columns * size, kAlignment) * kAlignment;
  }
  // Of scratch, for one row of one stream.
  int64_t bytes_per_row(Path path) const {
    if (path == Path::kPlain) {
      return row_bytes(wide_columns(), size_) + row_bytes(s_.hidden, size_) +
             row_bytes(y_columns(), size_) + row_bytes(q_columns(), size_) +
             row_bytes(weighted() ? s_.receiver.heads : 0, sums_size_);
    }
    FusedCall call = fused_sizes();
    call.streams = call.rows = 1;
    return static_cast<int64_t>(path == Path::kHopper ? cuda::hopper_scratch_bytes(call)
                                                      : cuda::fused_scratch_bytes(call));
  }

  FusedCall fused_sizes() const {
    FusedCall call{};
    call.type = type_;
    call.activation = activation_;
    call.integration = integration_;
    call.accumulate = accumulate_;
    call.reads_receiver = s_.reads_receiver;
    call.folded = s_.folded;
    call.sharer = head_shape(s_.sharer);
    call.receiver = head_shape(s_.receiver);
    call.hidden = s_.hidden;
    call.inner = s_.inner;
    call.weighting = s_.weighting;
    call.tokens = tokens_;
    call.weights.deep_w2_count = static_cast<int>(deep_w2_.size());
    call.weights.deep_w1_count = static_cast<int>(deep_w1_.size());
    return call;
  }
  // The chunk as run_fused takes it.
  FusedCall fused_call(const Streams& views, void* scratch) const {
    const auto matrix = [](const Tensor& t) { return t.const_data_ptr(); };
    const auto floats = [](const Tensor& t) {
      return static_cast<const float*>(t.const_data_ptr());
    };
    FusedCall call = fused_sizes();
    FusedWeights& w = call.weights;
    w.in_weight = matrix(w_.in_weight);
    w.in_bias = floats(w_.in_bias);
    w.w1 = matrix(w_.w1);
    w.w2 = matrix(w_.w2);
    w.branch_w1 = matrix(w_.branch_w1);
    w.deep_w2 = deep_w2_.data();
    w.deep_w1 = deep_w1_.data();
    w.out_weight = matrix(w_.out_weight);
    w.out_bias = floats(w_.out_bias);
    w.head_weight = floats(w_.head_weight);
    w.head_bias = floats(w_.head_bias);
    call.first_stream = first_;
    call.streams = block_.streams;
    call.first_row = block_.first_row;
    call.rows = block_.rows;
    call.views = &views;
    call.scratch = scratch;
    return call;
  }

  void run_plain(const Streams& views, char* scratch) {
    const auto buffer = [&](int64_t columns, int64_t size) {
      const int64_t bytes = row_bytes(columns, size);
      const Matrices result{scratch, block_.rows * (bytes / size), bytes / size};
      scratch += block_.streams * block_.rows * bytes;
      return result;
    };
    const Matrices wide = buffer(wide_columns(), size_);
    const Matrices normed = buffer(s_.hidden, size_);
    // y = [activated projection | z | activated weighting]: out_weight reads the first two,
    // head_weight the last two.
    const Matrices y = buffer(y_columns(), size_);
    const Matrices deep_q = buffer(q_columns(), size_);
    const Matrices logits = buffer(weighted() ? s_.receiver.heads : 0, sums_size_);
    const int64_t h = s_.hidden, m = s_.inner;
    const Matrices z = column(y, m), weighting = column(y, m + h);

    const HeadShape receiver = head_shape(s_.receiver);
    const HeadShape read{s_.reads_receiver ? receiver.heads : 0, receiver.dim};
    cuda::launch_gather(type_, block_, views, head_shape(s_.sharer), read, tokens_, wide, stream());
    multiply(z, h, wide, input_width(), w_.in_weight);
    cuda::launch_bias_stats(type_, block_, h, z, row(w_.in_bias, sums_size_), normed, stream());

    multiply(wide, m, normed, h, w_.w1);
    activate(wide, m, wide, 0, wide);
    multiply(normed, h, wide, m, w_.w2);
    residual(z, normed, z, true);

    multiply(wide, m + s_.weighting, normed, h, w_.branch_w1);
    // q = [activated projection | input of its block]; y itself at depth 3 with a folded output.
    const Matrices q = deep() ? deep_q : y;
    activate(wide, m, q, s_.weighting, weighting);
    Matrices p = z;
    for (size_t i = 0; i < w_.deep_w2.size(); ++i) {
      const bool another_block = i < w_.deep_w1.size();
      multiply(normed, h, q, m, w_.deep_w2[i]);
      residual(p, normed, column(q, m), another_block);
      p = column(q, m);
      if (another_block) {
        multiply(wide, m, normed, h, w_.deep_w1[i]);
        activate(wide, m, q, 0, q);
      }
    }

    if (weighted()) {
      cuda::launch_head(type_, block_, 2 * h, receiver.heads, z, row(w_.head_weight, sums_size_),
                        logits, stream());
    }
    multiply(wide, s_.receiver.width(), s_.folded ? q : p, s_.folded ? m + h : h, w_.out_weight);
    const Combine combine{integration_,
                          accumulate_,
                          wide,
                          row(w_.out_bias, sums_size_),
                          weighted() ? logits : Matrices{nullptr, 0, 0},
                          row(w_.head_bias, sums_size_)};
    cuda::launch_combine(type_, block_, views, receiver, tokens_, combine, stream());
  }

  cudaStream_t stream() const { return device_.stream(); }
  Matrices column(const Matrices& x, int64_t first) const {
    return {static_cast<char*>(x.data) + first * size_, x.stream_stride, x.row_stride};
  }
  // The chunk's part of a weight [G, ..].
  const void* row(const Tensor& weight, int64_t size) const {
    const int64_t per_stream = weight.numel() / weight.size(0);
    return static_cast<const char*>(weight.const_data_ptr()) + first_ * per_stream * size;
  }
  void multiply(const Matrices& out, int64_t cols, const Matrices& x, int64_t depth,
                const Tensor& weight) const {
    device_.multiply(scalar_, block_, out, cols, x, depth, row(weight, size_));
  }
  void activate(const Matrices& x, int64_t first_cols, const Matrices& first, int64_t second_cols,
                const Matrices& second) const {
    cuda::launch_activate(type_, activation_, block_, x, first_cols, first, second_cols, second,
                          stream());
  }
  // to = from + delta, and, where a norm follows, the norm in place of delta.
  void residual(const Matrices& from, const Matrices& delta, const Matrices& to, bool norm) const {
    cuda::launch_residual_stats(type_, block_, s_.hidden, from, delta, to,
                                norm ? delta : Matrices{nullptr, 0, 0}, stream());
  }

  const FuseCall& call_;
  const FuseSizes& s_;
  const PackedWeights& w_;
  const Device device_;
  const ScalarType scalar_;
  const CacheType type_;
  const int64_t size_, sums_size_;  // bytes of an element
  const Tokens tokens_;
  const Activation activation_;
  const Integration integration_;
  const bool accumulate_;
  const Path path_;
  const std::vector<const void*> deep_w2_, deep_w1_;
  std::optional<Tensor> scratch_;
  int64_t first_ = 0;  // stream of the chunk
  Block block_{};
};

}  // namespace

void fuse_cuda(const FuseRequest& request) {
  check_width("sharer", request.call.sizes.sharer);
  check_width("receiver", request.call.sizes.receiver);
  Fusion(request).run();
}

}  // namespace c2c

#ifdef C2C_EMULATE
STABLE_TORCH_LIBRARY(c2c_emulated, m) { m.def(c2c::kFuseSchema); }
STABLE_TORCH_LIBRARY_IMPL(c2c_emulated, CPU, m) {
  m.impl("fuse_", TORCH_BOX((&c2c::fuse_<c2c::cuda::kPlacement, c2c::fuse_cuda>)));
}
#else
STABLE_TORCH_LIBRARY_IMPL(c2c, CUDA, m) {
  m.impl("fuse_", TORCH_BOX((&c2c::fuse_<c2c::cuda::kPlacement, c2c::fuse_cuda>)));
}
#endif
