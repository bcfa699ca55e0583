// Launches of the fused tensor-core path (fused_gemm.h), and its one kernel that is no matrix
// product: the weights of the heads.
#include <limits>

#include "fused_gemm.cuh"
#include "fused_gemm.h"
#include "fused_inputs.cuh"
#include "fused_outputs.cuh"

namespace c2c::cuda {
namespace {

// ---- which tile for how many rows: the one place ------------------------------------------------
// Up to 64 rows every weight is read exactly once. The choice rests on the predictions at the head
// of fused_gemm.cuh; nothing has been measured.
//                         rows, columns, depth, stages, warps down x across, blocks per SM
using Tile16 = GemmTile<16, 64, 64, 5, 1, 4, 4>;
using Tile32 = GemmTile<32, 64, 64, 5, 1, 4, 3>;
using Tile64 = GemmTile<64, 128, 64, 4, 2, 4, 2>;
using Tile128 = GemmTile<128, 128, 32, 4, 2, 4, 2>;
using Tile192 = GemmTile<192, 128, 64, 3, 4, 2, 1>;

enum class Tiles { k16, k32, k64, k128, k192 };
struct TileChoice {
  int64_t up_to_rows;
  Tiles tiles;
};
constexpr int64_t kAnyRows = std::numeric_limits<int64_t>::max();
constexpr TileChoice kTileTable[] = {{16, Tiles::k16},   {32, Tiles::k32},
                                     {64, Tiles::k64},   {128, Tiles::k128},
                                     {192, Tiles::k192}, {kAnyRows, Tiles::k128}};
static_assert(Tile64::kBytes + 64 * 2 * sizeof(RowPlace) <= 99 * 1024 &&
                  Tile64::kBytes > Tile128::kBytes,
              "99 KB are enough for all but 192 rows");
constexpr int kMaxWidth = 1 << 30;     // sums of two widths are int
constexpr int kMaxGrid = 65535;        // blocks, down and deep
constexpr int64_t kRowAlignment = 16;  // of every row of scratch, in bytes

int64_t parts(int64_t count, int64_t of) { return (count + of - 1) / of; }
int64_t padded(int64_t cols) { return parts(cols, kVector) * kVector; }  // whole 16-byte vectors
int64_t padded_bytes(int64_t floats) {
  return parts(floats * static_cast<int64_t>(sizeof(float)), kRowAlignment) * kRowAlignment;
}
bool vectors(int64_t cols) { return cols % kVector == 0; }

// Scratch of one row of one stream.
struct RowBytes {
  int64_t z, y, squares, weights;
  int64_t all() const { return z + y + squares + weights; }
};
RowBytes row_bytes(const FusedCall& c) {
  return {padded(c.hidden) * 2, padded(c.inner + c.weighting) * 2,
          padded_bytes(parts(c.hidden, kSquaresCols)),
          padded_bytes(c.weighting > 0 ? c.receiver.heads : 0)};
}

// ---- w = sigmoid(head_weight [z1 ; act_weight] + head_bias)
// --------------------------------------- A warp takes kHeadRows rows x kHeads heads and holds the
// rows' inputs in registers. Sums in parts: one long running sum would be less exact, and each
// logit scales a whole head.
constexpr int kHeadRows = 4, kHeads = 8, kHeadWarps = 8;
static_assert(kHeadRows * kHeads == 32, "a lane writes one weight");

template <class T>
struct HeadWeights {
  MatrixInput<T, 2> input;
  const float* weight;  // [streams, heads, input.depth]
  const float* bias;    // [streams, heads]
  float* out;           // [streams, rows, heads]
  int rows, heads;
  bool vector;  // rows of `weight` are whole aligned 16 bytes
};

template <class T>
__global__ void __launch_bounds__(32 * kHeadWarps) head_weights_kernel(const HeadWeights<T> p) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int warps = static_cast<int>(blockDim.x) / 32;
  const int stream = static_cast<int>(blockIdx.z);
  const int first_row = (static_cast<int>(blockIdx.x) * warps + warp) * kHeadRows;
  const int first_head = static_cast<int>(blockIdx.y) * kHeads;
  if (first_row >= p.rows) return;  // the whole warp
  const int rows = p.rows - first_row, heads = p.heads - first_head, depth = p.input.depth;
  const auto input = p.input.block(stream, first_row, rows, nullptr);
  const float* const weight =
      p.weight + (static_cast<int64_t>(stream) * p.heads + first_head) * depth;

  float sums[kHeadRows][kHeads] = {};
#pragma unroll 1
  for (int k = lane * kVector; k < depth; k += 32 * kVector) {
    float x[kHeadRows][kVector];
    const auto column = input.column(k);
#pragma unroll
    for (int r = 0; r < kHeadRows; ++r) {
      const uint4 eight = column.vector && r >= rows
                              ? uint4{0, 0, 0, 0}
                              : read_eight<T>(column.vector, r < rows ? depth - k : 0, [&](int i) {
                                  return input.address(input.column(k + i), r);
                                });
      widen_eight<T>(eight, x[r]);
    }
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      if (h >= heads) break;
      const float* from = weight + static_cast<int64_t>(h) * depth + k;
      float w[kVector];
      if (p.vector) {
        read_floats(from, w);
      } else {
#pragma unroll
        for (int i = 0; i < kVector; ++i) w[i] = k + i < depth ? from[i] : 0.f;
      }
#pragma unroll
      for (int r = 0; r < kHeadRows; ++r) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) sums[r][h] += x[r][i] * w[i];
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kHeadRows; ++r) {
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      float total = sums[r][h];
#pragma unroll
      for (int lanes = 16; lanes > 0; lanes /= 2) {
        total += __shfl_xor_sync(kAllLanes, total, lanes);
      }
      if (lane == r * kHeads + h && r < rows && h < heads) {
        const int head = first_head + h;
        p.out[(static_cast<int64_t>(stream) * p.rows + first_row + r) * p.heads + head] =
            sigmoid(total + p.bias[static_cast<int64_t>(stream) * p.heads + head]);
      }
    }
  }
}

// ---- the stages, in the order of cpu/fuse_cpu.cpp
// ------------------------------------------------ z: z0, then z1, then what every further block of
// the projection makes of it, in place. y: what the shared block has inside, then [act_proj |
// act_weight], act_proj being rewritten by each block. The head is done before z1 is overwritten.
template <class T, class Tile>
class Stages {
 public:
  Stages(const FusedCall& call, cudaStream_t stream)
      : c_(call),
        stream_(stream),
        rows_(static_cast<int>(call.rows)),
        hidden_(static_cast<int>(call.hidden)),
        inner_(static_cast<int>(call.inner)),
        weighting_(static_cast<int>(call.weighting)) {
    const RowBytes bytes = row_bytes(call);
    const int64_t rows = call.streams * call.rows;
    char* scratch = static_cast<char*>(call.scratch);
    z_ = matrix(scratch, padded(hidden_));
    y_ = matrix(scratch += rows * bytes.z, padded(inner_ + weighting_));
    a_ = matrix(scratch, padded(inner_));
    squares_ = {reinterpret_cast<float*>(scratch += rows * bytes.y), rows_,
                static_cast<int>(parts(hidden_, kSquaresCols))};
    weights_ = reinterpret_cast<float*>(scratch + rows * bytes.squares);
  }

  void run() {
    const FusedWeights& w = c_.weights;
    const int sharer_width = c_.sharer.heads * c_.sharer.dim;
    const int width = c_.receiver.heads * c_.receiver.dim;
    const int in = sharer_width + (c_.reads_receiver ? width : 0);
    multiply(
        "fused_in", CacheInput<T>{*c_.views, c_.tokens, c_.sharer, c_.receiver, c_.first_row, in},
        w.in_weight, hidden_, in,
        NormedOutput<T, false>{output(z_, hidden_), vector(w.in_bias, hidden_), squares_, hidden_});
    activated("fused_w1", w.w1, a_, inner_);
    residual("fused_w2", a_, w.w2);
    activated("fused_branches", w.branch_w1, y_, inner_ + weighting_);
    if (weighting_ > 0) head();
    for (int i = 0; i < w.deep_w2_count; ++i) {
      residual("fused_deep_w2", y_, w.deep_w2[i]);
      if (i < w.deep_w1_count) activated("fused_deep_w1", w.deep_w1[i], y_, inner_);
    }
    const MatrixInput<T, 2> last =
        c_.folded ? side_by_side(y_, inner_, z_, hidden_) : side_by_side(z_, hidden_, z_, 0);
    multiply(
        "fused_out", last, w.out_weight, width, last.depth,
        FusedOutput<T>{*c_.views, c_.tokens, c_.receiver, c_.first_row, vector(w.out_bias, width),
                       weighting_ > 0 ? weights_ : nullptr, rows_, c_.integration, c_.accumulate});
  }

 private:
  Matrix<T> matrix(char* data, int64_t row_stride) const {
    return {reinterpret_cast<T*>(data), c_.rows * row_stride, row_stride};
  }
  static Matrix<const T> read_only(const Matrix<T>& m) {
    return {m.data, m.stream_stride, m.row_stride};
  }
  static OutputMatrix<T> output(const Matrix<T>& m, int cols) { return {m, vectors(cols)}; }
  static MatrixInput<T, 1> input(const Matrix<T>& m, int cols) {
    return {read_only(m), {}, cols, cols, vectors(cols)};
  }
  static MatrixInput<T, 2> side_by_side(const Matrix<T>& first, int first_cols,
                                        const Matrix<T>& second, int second_cols) {
    return {read_only(first), read_only(second), first_cols, first_cols + second_cols,
            vectors(first_cols) && vectors(second_cols)};
  }
  // The chunk's part of what has `cols` float32 per stream.
  const float* vector(const float* of, int64_t cols) const { return of + c_.first_stream * cols; }

  // output(input weight^T) for all streams and rows; weight: [G, cols, depth].
  template <class Input, class Output>
  void multiply(const char* name, const Input& input, const void* weight, int cols, int depth,
                const Output& output) const {
    using Weight = MatrixInput<T, 1>;
    const int64_t per_stream = static_cast<int64_t>(cols) * depth;
    const T* data = static_cast<const T*>(weight) + c_.first_stream * per_stream;
    const bool aligned = reinterpret_cast<uintptr_t>(data) % sizeof(uint4) == 0;
    const Weight columns{{data, per_stream, depth}, {}, depth, depth, aligned && vectors(depth)};
    const FusedGemm<T, Input, Weight, Output> gemm{input, columns, output, rows_, cols, depth};
    const dim3 grid(static_cast<unsigned>(parts(cols, Tile::kCols)),
                    static_cast<unsigned>(parts(rows_, Tile::kRows)),
                    static_cast<unsigned>(c_.streams));
    launch(name, fused_gemm_kernel<T, Tile, Input, Weight, Output>, grid, dim3(Tile::kThreads),
           fused_gemm_bytes<Tile, Input, Output>(), stream_, gemm);
  }
  // to = activation(weight rmsnorm(z)), `cols` columns.
  void activated(const char* name, const void* weight, const Matrix<T>& to, int cols) const {
    multiply(name, input(z_, hidden_), weight, cols, hidden_,
             ActivatedOutput<T>{output(to, cols), squares_, hidden_, c_.activation});
  }
  // z += weight from, `from` having `inner` columns.
  void residual(const char* name, const Matrix<T>& from, const void* weight) const {
    multiply(name, input(from, inner_), weight, hidden_, inner_,
             NormedOutput<T, true>{output(z_, hidden_), nullptr, squares_, hidden_});
  }
  void head() const {
    const Matrix<T> act_weight{y_.data + inner_, y_.stream_stride, y_.row_stride};
    MatrixInput<T, 2> from = side_by_side(z_, hidden_, act_weight, weighting_);
    from.vector = from.vector && vectors(inner_);
    const int heads = c_.receiver.heads;
    const float* weight = vector(c_.weights.head_weight, int64_t{heads} * from.depth);
    const HeadWeights<T> p{
        from,
        weight,
        vector(c_.weights.head_bias, heads),
        weights_,
        rows_,
        heads,
        from.depth % kVector == 0 && reinterpret_cast<uintptr_t>(weight) % sizeof(uint4) == 0};
    const int64_t warps = parts(rows_, kHeadRows);
    const int64_t block = warps < kHeadWarps ? warps : kHeadWarps;
    const dim3 grid(static_cast<unsigned>(parts(warps, block)),
                    static_cast<unsigned>(parts(heads, kHeads)), static_cast<unsigned>(c_.streams));
    launch("fused_head", head_weights_kernel<T>, grid, dim3(static_cast<unsigned>(32 * block)), 0,
           stream_, p);
  }

  const FusedCall& c_;
  const cudaStream_t stream_;
  const int rows_, hidden_, inner_, weighting_;
  Matrix<T> z_, y_, a_;
  RowSquares squares_;
  float* weights_;
};

template <class T, class Tile>
bool run_stages(const FusedCall& call, cudaStream_t stream) {
  if (parts(call.rows, Tile::kRows) > kMaxGrid) return false;
  Stages<T, Tile>(call, stream).run();
  return true;
}

// Bytes that a block may have on the current GPU: 227 KB on sm_90, 163 KB on sm_80, 99 KB on sm_86,
// sm_89 and sm_120.
int64_t shared_limit() {
#if defined(C2C_EMULATE)
  return kMaxDynamicShared;
#else
  int device = 0, bytes = 0;
  check_launch(cudaGetDevice(&device), "fused");
  check_launch(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
               "fused");
  return bytes;
#endif
}

template <class T>
bool run_typed(const FusedCall& call, cudaStream_t stream) {
  const TileChoice* choice = kTileTable;
  while (call.rows > choice->up_to_rows) ++choice;
  // All other tiles fit everywhere.
  constexpr int k192Bytes = fused_gemm_bytes<Tile192, CacheInput<T>, FusedOutput<T>>();
  if (choice->tiles == Tiles::k192 && k192Bytes > shared_limit()) ++choice;
  switch (choice->tiles) {
    case Tiles::k16:
      return run_stages<T, Tile16>(call, stream);
    case Tiles::k32:
      return run_stages<T, Tile32>(call, stream);
    case Tiles::k64:
      return run_stages<T, Tile64>(call, stream);
    case Tiles::k128:
      return run_stages<T, Tile128>(call, stream);
    case Tiles::k192:
      return run_stages<T, Tile192>(call, stream);
  }
  return false;
}

bool narrow_enough(const FusedCall& call) {
  const auto fits = [](int64_t cols) { return cols <= kMaxWidth; };
  return fits(int64_t{call.sharer.heads} * call.sharer.dim) &&
         fits(int64_t{call.receiver.heads} * call.receiver.dim) && fits(call.hidden) &&
         fits(call.inner) && call.receiver.heads <= kMaxGrid * kHeads &&
         call.streams <= kMaxStreams;
}

}  // namespace

size_t fused_scratch_bytes(const FusedCall& call) {
  return static_cast<size_t>(call.streams * call.rows * row_bytes(call).all());
}

bool run_fused(const FusedCall& call, cudaStream_t stream) {
  if (!narrow_enough(call)) return false;
  if (call.rows == 0 || call.streams == 0) return true;
  switch (call.type) {
    case CacheType::kBfloat16:
      return run_typed<Bfloat16>(call, stream);
    case CacheType::kFloat16:
      return run_typed<Float16>(call, stream);
    case CacheType::kFloat32:
    case CacheType::kFloat64:
      return false;
  }
  return false;
}

}  // namespace c2c::cuda
