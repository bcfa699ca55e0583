// c2c::fuse and c2c::fuse_backward on the CPU.
#include <torch/csrc/stable/library.h>

#include "../train/ops_train.h"
#include "train_backend.h"

STABLE_TORCH_LIBRARY_IMPL(c2c, CPU, m) {
  m.impl("fuse", TORCH_BOX(&c2c::train::fuse_op<c2c::cpu::TrainBackend>));
  m.impl("fuse_backward", TORCH_BOX(&c2c::train::fuse_backward_op<c2c::cpu::TrainBackend>));
}
