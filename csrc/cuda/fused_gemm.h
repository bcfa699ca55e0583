// The fused tensor-core path of c2c::fuse_ on CUDA: about six launches for all streams of a chunk.
// No torch header: the host code of the op fills a FusedCall and owns the memory.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../scalar_math.h"
#include "device.h"
#include "kernels.h"

namespace c2c::cuda {

// The packed weights of a shape group (PackedWeights of ../ops.h): contiguous over ALL of its
// streams, matrices in the caches' dtype and row-major, the rest float32.
struct FusedWeights {
  const void* in_weight;       // [G, hidden, sharer width + receiver width], or sharer width alone
  const float* in_bias;        // [G, hidden]
  const void* w1;              // [G, inner, hidden]
  const void* w2;              // [G, hidden, inner]
  const void* branch_w1;       // [G, inner + weighting, hidden]
  const void* const* deep_w2;  // deep_w2_count x [G, hidden, inner]; host array
  const void* const* deep_w1;  // deep_w1_count x [G, inner, hidden]; host array
  int deep_w2_count, deep_w1_count;
  const void* out_weight;    // [G, receiver width, inner + hidden (folded) or hidden]
  const float* out_bias;     // [G, receiver width]
  const float* head_weight;  // [G, receiver heads, hidden + hidden]; not read without weighting
  const float* head_bias;    // [G, receiver heads]; not read without weighting
};

// One chunk: `streams` streams from first_stream on, x rows [first_row, first_row + rows) of the
// tokens.batch * tokens.tokens rows of the call. Chunks of one call may run in any order, one after
// the other, with the same scratch.
struct FusedCall {
  CacheType type;
  Activation activation;
  Integration integration;
  bool accumulate;      // out += what the integration would change base by
  bool reads_receiver;  // the projection reads [s ; t]; otherwise s alone
  bool folded;          // out_weight reads [act ; input of the last block]; otherwise its output
  HeadShape sharer, receiver;
  int64_t hidden, inner;
  int64_t weighting;  // inner width of the weighting branch: hidden, or 0 without weighting
  Tokens tokens;
  FusedWeights weights;
  int64_t first_stream, streams;  // streams <= kMaxStreams
  int64_t first_row, rows;
  const Streams* views;  // host; view[i] belongs to stream first_stream + i
  void* scratch;         // device, fused_scratch_bytes(call) bytes, 16-byte aligned
};

// Bytes of scratch that this chunk needs: so many per stream and row. Reads only sizes.
size_t fused_scratch_bytes(const FusedCall& call);

// Fuses the chunk on `stream`. Tokens without a sharer's token are copied from base where out is
// not base itself and nothing accumulates. Returns false, with nothing launched, for what this path
// does not run: float32 and float64 caches, and chunks beyond the limits of a grid. Throws
// std::runtime_error naming the kernel if a launch fails.
bool run_fused(const FusedCall& call, cudaStream_t stream);

}  // namespace c2c::cuda
