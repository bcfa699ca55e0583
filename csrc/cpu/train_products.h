// Batched matrix products of the training ops on the CPU, by torch's own mm.
#pragma once

#include "../train/matrices.h"
#include "train_kernels.h"

namespace c2c::cpu {

// out[g] = a[g] @ b[g] for `streams` products [rows, depth] @ [depth, cols], as train/fuse_train.h
// has it. 16-bit inputs are widened block by block and multiplied in float32: exact products, and
// much faster than torch's own 16-bit ones where the CPU has no instructions for them. The same
// bits whatever the number of threads.
void multiply_on_cpu(const TrainKernels& kernels, int64_t streams, int64_t rows, int64_t cols,
                     int64_t depth, const train::Matrices& out, const train::Matrices& a,
                     const train::Matrices& b);

}  // namespace c2c::cpu
