// Which kernels `auto` takes: those that were the fastest where all were measured on a GPU of the
// same compute capability, and the plain path everywhere else. No torch header, no CUDA header.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "kernels.h"

namespace c2c::cuda {

// Which kernels run.
enum class Path {
  kPlain,   // torch's bmm and row_kernels.cu
  kFused,   // everything in our own matrix products (mma.sync)
  kHopper,  // the same for sm_90a (wgmma)
};

// Calls of `above` + 1 to `up_to` rows (batch * tokens); the last were measured.
struct DispatchRow {
  int capability;  // 10 * major + minor
  CacheType type;
  int64_t above, up_to;
  Path path;
};

// What `table` says of a call; kPlain where it says nothing.
template <std::size_t kCount>
constexpr Path fastest_path(const std::array<DispatchRow, kCount>& table, int capability,
                            CacheType type, int64_t rows) {
  for (const DispatchRow& row : table) {
    if (row.capability == capability && row.type == type && row.above < rows && rows <= row.up_to) {
      return row.path;
    }
  }
  return Path::kPlain;
}

}  // namespace c2c::cuda
