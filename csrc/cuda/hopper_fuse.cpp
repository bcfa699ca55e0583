// The hopper path of c2c::fuse_: the stages of one chunk in order. Each product writes what the
// next one reads; gather and weighting head are row kernels.
#include <algorithm>
#include <cstdint>
#include <string>

#include "hopper_gemm.h"
#include "hopper_layout.h"

namespace c2c::cuda {
namespace {

constexpr int64_t kTile = hopper::kTileCols;
constexpr int64_t kElement = 2;                                   // bytes
constexpr uintptr_t kAlignment = 256;                             // of every buffer
constexpr int64_t kMaxRows = int64_t{65535} * hopper::kTileRows;  // of one grid

int64_t width(HeadShape shape) { return int64_t{shape.heads} * shape.dim; }
int64_t input_width(const FusedCall& c) {
  return width(c.sharer) + (c.reads_receiver ? width(c.receiver) : 0);
}
bool deep(const FusedCall& c) { return c.weights.deep_w2_count > 0; }

// `wide` holds in turn the gathered input and what blocks have inside. y = [activated projection |
// z1 | activated weighting]: out_weight reads the first two, the head the last two. q = [activated
// projection | input of its block] where there is more than one block.
struct Buffers {
  Matrices wide, z0, y, q;
  Matrices logits;  // float32
  float* squares;   // [streams, rows, hidden / 128], of the matrix that is normed next
  size_t bytes;
};

Buffers lay_out(const FusedCall& c, void* scratch) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(scratch);
  uintptr_t end = begin;
  const auto buffer = [&](int64_t cols, int64_t size) {
    const Matrices matrix{reinterpret_cast<void*>(end), c.rows * cols, cols};
    const auto bytes = static_cast<uintptr_t>(c.streams * c.rows * cols * size);
    end += (bytes + kAlignment - 1) / kAlignment * kAlignment;
    return matrix;
  };
  Buffers b{};
  b.wide = buffer(std::max(input_width(c), c.inner), kElement);
  b.z0 = buffer(c.hidden, kElement);
  b.y = buffer(c.inner + c.hidden + c.weighting, kElement);
  b.q = buffer(deep(c) ? c.inner + c.hidden : 0, kElement);
  b.logits = buffer(c.weighting > 0 ? c.receiver.heads : 0, sizeof(float));
  b.squares = static_cast<float*>(buffer(c.hidden / kTile, sizeof(float)).data);
  b.bytes = end - begin;
  return b;
}

Matrices column(const Matrices& matrix, int64_t first) {
  return {static_cast<char*>(matrix.data) + first * kElement, matrix.stream_stride,
          matrix.row_stride};
}

bool aligned(const void* p, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

// Is any pair of neighbouring channels, from an even one on, four aligned bytes?
bool paired(const CacheView& view, const FusedCall& c) {
  const int64_t size[] = {c.tokens.batch, c.receiver.heads, c.tokens.tokens};
  for (int d = 0; d < 3; ++d) {
    if (size[d] > 1 && view.stride[d] % 2 != 0) return false;
  }
  return view.stride[3] == 1 && aligned(view.data, 4);
}

std::string multiple(const char* what, int64_t of, int64_t got) {
  if (got > 0 && got % of == 0) return "";
  return std::string(what) + " must be a multiple of " + std::to_string(of) + ", got " +
         std::to_string(got);
}

class Chunk {
 public:
  Chunk(const FusedCall& call, cudaStream_t stream)
      : c_(call),
        w_(call.weights),
        b_(lay_out(call, call.scratch)),
        block_{static_cast<int>(call.streams), call.first_row, call.rows},
        stream_(stream) {}

  void run() const {
    const int64_t h = c_.hidden, m = c_.inner;
    const Matrices z1 = column(b_.y, m), weighting = column(b_.y, m + h);
    const HeadShape read{c_.reads_receiver ? c_.receiver.heads : 0, c_.receiver.dim};
    launch_gather(c_.type, block_, *c_.views, c_.sharer, read, c_.tokens, b_.wide, stream_);
    launch_hopper_bias(product(h, b_.wide, input_width(c_), w_.in_weight), of(w_.in_bias, h), b_.z0,
                       b_.squares, stream_);

    activate(b_.z0, w_.w1, m, b_.wide, b_.wide);
    launch_hopper_residual(product(h, b_.wide, m, w_.w2), b_.z0, z1, b_.squares, stream_);

    const Matrices q = deep(c_) ? b_.q : b_.y;
    activate(z1, w_.branch_w1, m + c_.weighting, q, weighting);
    Matrices p = z1;
    for (int i = 0; i < w_.deep_w2_count; ++i) {
      const bool another_block = i < w_.deep_w1_count;
      launch_hopper_residual(product(h, q, m, w_.deep_w2[i]), p, column(q, m),
                             another_block ? b_.squares : nullptr, stream_);
      p = column(q, m);
      if (another_block) activate(p, w_.deep_w1[i], m, q, q);
    }

    const bool weighted = c_.weighting > 0;
    if (weighted) {
      launch_head(c_.type, block_, 2 * h, c_.receiver.heads, z1,
                  of(w_.head_weight, c_.receiver.heads * 2 * h), b_.logits, stream_);
    }
    const HopperOutput output{c_.receiver,
                              c_.tokens,
                              c_.first_row,
                              of(w_.out_bias, width(c_.receiver)),
                              weighted ? static_cast<const float*>(b_.logits.data) : nullptr,
                              weighted ? of(w_.head_bias, c_.receiver.heads) : nullptr,
                              c_.integration,
                              c_.accumulate};
    launch_hopper_output(
        product(width(c_.receiver), c_.folded ? q : p, c_.folded ? m + h : h, w_.out_weight),
        *c_.views, output, stream_);
  }

 private:
  // This chunk's part of a vector [G, size].
  const float* of(const float* vectors, int64_t size) const {
    return vectors + c_.first_stream * size;
  }
  // x weight^T, weight being this chunk's part of [G, cols, depth].
  HopperProduct product(int64_t cols, const Matrices& x, int64_t depth, const void* weights) const {
    return {c_.type,
            static_cast<int>(c_.streams),
            static_cast<int>(c_.rows),
            static_cast<int>(cols),
            static_cast<int>(depth),
            x,
            static_cast<const char*>(weights) + c_.first_stream * cols * depth * kElement};
  }
  // The first `inner` columns to `first`, the others to `second`.
  void activate(const Matrices& z, const void* weights, int64_t cols, const Matrices& first,
                const Matrices& second) const {
    launch_hopper_activate(product(cols, z, c_.hidden, weights), c_.activation, b_.squares, first,
                           static_cast<int>(c_.inner), second, stream_);
  }

  const FusedCall& c_;
  const FusedWeights& w_;
  const Buffers b_;
  const Block block_;
  const cudaStream_t stream_;
};

}  // namespace

std::string hopper_obstacle(const FusedCall& c) {
  if (c.type != CacheType::kBfloat16 && c.type != CacheType::kFloat16) {
    return "caches must be bfloat16 or float16";
  }
  for (const std::string& rule :
       {multiple("hidden", kTile, c.hidden), multiple("inner", kTile, c.inner),
        multiple("receiver_heads times receiver_dim", kTile, width(c.receiver)),
        multiple("receiver_dim", 32, c.receiver.dim),
        multiple("the input's width", 8, input_width(c))}) {
    if (!rule.empty()) return rule;
  }
  if (c.weighting != 0 && c.weighting != c.hidden) {
    return "the weighting branch must be hidden wide";
  }
  if (c.streams > kMaxStreams || c.rows > kMaxRows) {
    return "a chunk has at most " + std::to_string(kMaxStreams) + " streams and " +
           std::to_string(kMaxRows) + " rows, got " + std::to_string(c.streams) + " and " +
           std::to_string(c.rows);
  }
  if (c.tokens.batch * c.tokens.tokens > INT32_MAX) {
    return "batch times tokens must be below 2^31, got " +
           std::to_string(c.tokens.batch * c.tokens.tokens);
  }
  const FusedWeights& w = c.weights;
  bool all_aligned = aligned(w.in_weight, 16) && aligned(w.w1, 16) && aligned(w.w2, 16) &&
                     aligned(w.branch_w1, 16) && aligned(w.out_weight, 16) &&
                     aligned(w.in_bias, 8) && aligned(w.out_bias, 8);
  for (int i = 0; i < w.deep_w2_count; ++i) all_aligned = all_aligned && aligned(w.deep_w2[i], 16);
  for (int i = 0; i < w.deep_w1_count; ++i) all_aligned = all_aligned && aligned(w.deep_w1[i], 16);
  if (!all_aligned) return "packed weights must begin at multiples of 16 bytes";
  for (int64_t g = 0; g < c.streams; ++g) {
    if (!paired(c.views->view[g].base, c) || !paired(c.views->view[g].out, c)) {
      return "the receiver's channels must lie side by side in aligned pairs (stream " +
             std::to_string(c.first_stream + g) + ")";
    }
  }
  return "";
}

size_t hopper_scratch_bytes(const FusedCall& call) { return lay_out(call, nullptr).bytes; }

bool run_hopper(const FusedCall& call, cudaStream_t stream) {
  if (!hopper_supports(call)) return false;
  if (call.streams == 0 || call.rows == 0) return true;
  check_hopper_device();
  Chunk(call, stream).run();
  return true;
}

}  // namespace c2c::cuda
