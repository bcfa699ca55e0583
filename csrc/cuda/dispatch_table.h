// Written by tools/fill_dispatch.py from benchmarks/results/: do not edit.
#pragma once

#include "dispatch.h"

namespace c2c::cuda {

// No path has been measured on a GPU.
constexpr std::array<DispatchRow, 0> kDispatchTable{};

}  // namespace c2c::cuda
