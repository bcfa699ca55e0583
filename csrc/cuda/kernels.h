// Launchers of the CUDA kernels and their parameters: raw pointers and strides, no torch header.
//
// Rows of intermediates are [streams, rows, cols] with explicit strides; row m of a call is token
// m % tokens of batch row m / tokens. A launch works on the rows [first_row, first_row + rows) of
// one chunk of streams.
#pragma once

#include <cstdint>

#include "../cache_view.h"

namespace c2c::cuda {

using c2c::CacheType;
using c2c::CacheView;

constexpr int kMaxStreams = 128;  // of one launch

struct StreamViews {
  CacheView out, base, sharer;  // out.data is written
};

// By value as a kernel parameter: 15 KB (CUDA >= 12.1, sm_70).
struct Streams {
  StreamViews view[kMaxStreams];
};

// Which sharer token goes with row m: map value or, without a map, m's own token; -1 (the token
// stays as it is) where that is outside [0, sharer_tokens).
struct Tokens {
  const int64_t* map;  // nullptr: identity
  int64_t batch_stride, token_stride;
  int64_t batch, tokens, sharer_tokens;
};

struct HeadShape {
  int heads, dim;
};

}  // namespace c2c::cuda
