// Which elements dropout keeps: a function of seed, offset and position alone (Philox4x32-10,
// Salmon et al. 2011), so that threads, chunks and devices agree. No torch header.
#pragma once

#include <cstdint>

#include "../scalar_math.h"

namespace c2c {

// Dropout of one feed-forward block's output [streams of the call, rows, cols], by kernel value.
// The element in column `col` of a row (`dropout_row`) is kept iff word col % 4 of
//   philox(seed, offset, first_group + col / 4)
// is at least `threshold`.
struct Dropout {
  uint64_t seed = 0, offset = 0;
  // [batch]: a seed per row of the caches in place of `seed`, where the kernels run; null: none.
  const int64_t* row_seeds = nullptr;
  uint64_t rows = 0, tokens = 0;  // of the call, of each of its caches' rows
  uint64_t first_stream = 0;      // the block's number times the streams of the call
  uint32_t threshold = 0;         // probability * 2^32; 0: nothing is dropped
  double scale = 1;               // of what is kept, 1 / (1 - probability); in S
};

namespace {

struct DropoutRow {
  uint64_t seed, first_group;
};

// What row `row` of stream `stream` draws. With one seed the rows of the call are counted; with one
// per row of the caches its tokens are, from the last, so that neither the other rows nor padding
// in front of it change what it draws.
C2C_HOST_DEVICE DropoutRow dropout_row(const Dropout& d, uint64_t stream, uint64_t row,
                                       uint64_t cols) {
  const uint64_t groups = (cols + 3) / 4;
  if (d.row_seeds == nullptr) {
    return {d.seed, ((d.first_stream + stream) * d.rows + row) * groups};
  }
  constexpr uint64_t kMostTokens = uint64_t{1} << 31;
  const uint64_t before_last = d.tokens - 1 - row % d.tokens;
  return {static_cast<uint64_t>(d.row_seeds[row / d.tokens]),
          ((d.first_stream + stream) * kMostTokens + before_last) * groups};
}

struct PhiloxWords {
  uint32_t word[4];
};

// Philox4x32-10: key = seed, counter = [group, offset], low words first.
C2C_HOST_DEVICE PhiloxWords philox(uint64_t seed, uint64_t offset, uint64_t group) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  uint32_t c0 = static_cast<uint32_t>(group), c1 = static_cast<uint32_t>(group >> 32);
  uint32_t c2 = static_cast<uint32_t>(offset), c3 = static_cast<uint32_t>(offset >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * c0, b = uint64_t{0xCD9E8D57u} * c2;
    const uint32_t n0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    const uint32_t n2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(b);
    c3 = static_cast<uint32_t>(a);
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace
}  // namespace c2c
