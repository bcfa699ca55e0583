// Which elements dropout keeps: a function of seed, offset and position alone (Philox4x32-10,
// Salmon et al. 2011), so that threads, chunks and devices agree. No torch header.
#pragma once

#include <cstdint>

#include "../scalar_math.h"

namespace c2c {

// Dropout of one feed-forward block's output [streams of the call, rows, cols], by kernel value.
// Element (stream, row, col) belongs to group
//   (first_group + (stream * rows + row) * ceil(cols / 4) + col / 4), word col % 4,
// and is kept iff that word of philox(seed, offset, group) is at least `threshold`.
struct Dropout {
  uint64_t seed = 0, offset = 0;
  uint64_t first_group = 0;  // the block's number times streams * rows * ceil(cols / 4)
  uint32_t threshold = 0;    // probability * 2^32; 0: nothing is dropped
  double scale = 1;          // of what is kept, 1 / (1 - probability); in S
};

// probability in [0, 1).
inline Dropout dropout_of(double probability, uint64_t seed, uint64_t offset,
                          uint64_t first_group) {
  return {seed, offset, first_group, static_cast<uint32_t>(probability * 4294967296.0),
          1 / (1 - probability)};
}

namespace {

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
