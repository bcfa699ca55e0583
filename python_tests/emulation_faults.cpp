// Wrong kernels, each with what test_emulation.py expects the emulation to notice.
#include <vector>

#include "emulation_checks.h"

namespace {

using namespace c2c;

constexpr int kThreads = 96;

// ---- what is missing shows in the result
// --------------------------------------------------------- Thread i reads what thread i + step
// wrote.
__global__ void neighbour_kernel(int step, bool barrier, float* out) {
  __shared__ float values[kThreads];
  const int i = threadIdx.x;
  values[i] = static_cast<float>(i);
  if (barrier) __syncthreads();
  out[i] = values[(i + step + kThreads) % kThreads];
}

void check_neighbours(int step, bool barrier = false) {
  std::vector<float> out(kThreads);
  run(neighbour_kernel, 1, kThreads, 0, step, barrier, out.data());
  for (int i = 0; i < kThreads - 1; ++i) {
    if (i + step >= 0) expect(out[i] == static_cast<float>(i + step), "the neighbour's value");
  }
}
void missing_barrier_before_reading_a_later_thread() { check_neighbours(1); }
void missing_barrier_before_reading_an_earlier_thread() { check_neighbours(-1); }

// The same inside a warp, right behind an operation of the whole warp.
__global__ void lanes_kernel(int step, float* out) {
  __shared__ float values[32];
  const int lane = threadIdx.x;
  const float x = __shfl_xor_sync(~0u, static_cast<float>(lane ^ 1), 1);
  values[lane] = x;
  if (lane > 0 && lane < 31) out[lane] = values[lane + step];
}

void check_lanes(int step) {
  std::vector<float> out(32);
  run(lanes_kernel, 1, 32, 0, step, out.data());
  for (int lane = 2; lane < 30; ++lane) {
    expect(out[lane] == static_cast<float>(lane + step), "the neighbour's value");
  }
}
void missing_syncwarp_before_reading_a_later_lane() { check_lanes(1); }
void missing_syncwarp_before_reading_an_earlier_lane() { check_lanes(-1); }

// The second value is written while others may still read the first.
__global__ void rewrite_kernel(bool backwards, float* out) {
  __shared__ float value;
  const int i = threadIdx.x;
  const int writer = backwards ? kThreads - 1 : 0;
  for (int round = 0; round < 2; ++round) {
    if (i == writer) value = static_cast<float>(round);
    __syncthreads();
    out[round * kThreads + i] = value;
  }
}

void check_rewrite(bool backwards) {
  std::vector<float> out(2 * kThreads);
  run(rewrite_kernel, 1, kThreads, 0, backwards, out.data());
  for (int i = 0; i < 2 * kThreads; ++i) {
    expect(out[i] == static_cast<float>(i / kThreads), "the value of the round");
  }
}
void missing_barrier_before_the_first_thread_writes_again() { check_rewrite(false); }
void missing_barrier_before_the_last_thread_writes_again() { check_rewrite(true); }

__global__ void unwaited_kernel(const float* in, float* out) {
  float* tile = dynamic_shared<float>();
  cp_async_16(tile + 4 * threadIdx.x, in + 4 * threadIdx.x, true);
  cp_async_commit();
  __syncthreads();
  out[threadIdx.x] = tile[4 * threadIdx.x];
}

void missing_wait() {
  const std::vector<float> in(128, 1.f);
  std::vector<float> out(32);
  run(unwaited_kernel, 1, 32, 512, in.data(), out.data());
  expect(out[0] == 1.f, "what was copied");
}

__global__ void block_order_kernel(int* last) { *last = blockIdx.x; }

void a_result_that_depends_on_the_order_of_blocks() {
  int last = -1;
  run(block_order_kernel, 4, 1, 0, &last);
  expect(last == 3, "the last block");
}

// ---- what is an error
// ----------------------------------------------------------------------------
__global__ void write_kernel(int at) { dynamic_shared<float>()[at] = 0.f; }

void overrun_of_dynamic_shared_memory() { run(write_kernel, 1, 1, 7 * sizeof(float), 7); }
void underrun_of_dynamic_shared_memory() { run(write_kernel, 1, 1, 7 * sizeof(float), -1); }

// Only a sanitizer sees this one.
__global__ void read_kernel(int at, float* out) { *out = dynamic_shared<float>()[at]; }
void read_behind_dynamic_shared_memory() {
  float out;
  run(read_kernel, 1, 1, 7 * sizeof(float), 7, &out);
}
__global__ void divergent_kernel() {
  if (threadIdx.x < 32) {
    __syncthreads();  // the first barrier
  } else {
    __syncthreads();
  }
}
void divergent_barrier() { run(divergent_kernel, 1, 64, 0); }

__global__ void barrier_or_shuffle_kernel(float* out) {
  if (threadIdx.x == 3) {
    __syncthreads();
  } else {
    *out = __shfl_xor_sync(~0u, 1.f, 1);
  }
}
void barrier_that_one_lane_reaches() {
  float out;
  run(barrier_or_shuffle_kernel, 1, 32, 0, &out);
}

__global__ void two_shuffles_kernel(float* out) {
  if (threadIdx.x < 16) {
    *out = __shfl_xor_sync(~0u, 1.f, 1);
  } else {
    *out = __shfl_xor_sync(~0u, 1.f, 1);
  }
}
void shuffles_that_do_not_meet() {
  float out;
  run(two_shuffles_kernel, 1, 32, 0, &out);
}

__global__ void shuffle_kernel(unsigned lanes, int width, float* out) {
  *out = __shfl_xor_sync(lanes, 1.f, 1, width);
}
void shuffle_of_a_lane_that_is_not_there() {
  float out;
  run(shuffle_kernel, 1, 31, 0, ~0u, 32, &out);
}
void shuffle_whose_mask_lacks_the_caller() {
  float out;
  run(shuffle_kernel, 1, 32, 0, 0xfffffffeu, 32, &out);
}
void shuffle_of_a_wrong_width() {
  float out;
  run(shuffle_kernel, 1, 32, 0, ~0u, 12, &out);
}

__global__ void mma_kernel(float* out) {
  if (threadIdx.x == 31) return;
  float d[4] = {};
  const uint32_t a[4] = {}, b[2] = {};
  mma_m16n8k16(d, a, b, Bfloat16{});
  *out = d[0];
}
void product_without_a_lane() {
  float out;
  run(mma_kernel, 1, 32, 0, &out);
}

__global__ void copy_kernel(const float* in, float* out, int from, int to) {
  cp_async_16((out ? out : dynamic_shared<float>()) + to, in + from, true);
}
void check_copy(int from, int to, bool to_global = false) {
  std::vector<float> in(16), out(16);
  run(copy_kernel, 1, 1, 64, static_cast<const float*>(in.data()), to_global ? out.data() : nullptr,
      from, to);
}
void copy_from_a_misaligned_address() { check_copy(1, 0); }
void copy_to_a_misaligned_address() { check_copy(0, 2); }
void copy_to_global_memory() { check_copy(0, 0, true); }
void copy_to_behind_shared_memory() { check_copy(0, 16); }

__global__ void rows_kernel(int offset) {
  uint32_t r[4];
  ldmatrix_x4(r, dynamic_shared<uint16_t>() + 8 * threadIdx.x + offset);
}
void matrix_rows_at_misaligned_addresses() { run(rows_kernel, 1, 32, 544, 4); }
void matrix_rows_behind_shared_memory() { run(rows_kernel, 1, 32, 504, 0); }

__global__ void empty_kernel() {}
void too_many_threads() { run(empty_kernel, 1, dim3(32, 33), 0); }
void too_many_blocks() { run(empty_kernel, dim3(1, 65536), 1, 0); }
void too_much_shared_memory() { run(empty_kernel, 1, 1, kMaxDynamicShared + 1); }

// ---- after an error
// ------------------------------------------------------------------------------
int unwound = 0;
struct Unwinding {
  ~Unwinding() { ++unwound; }
};
__global__ void failing_kernel() {
  const Unwinding unwinding;
  if (threadIdx.x == 40) throw std::runtime_error("thread 40");
  __syncthreads();
}

void the_next_launch_is_right_after_an_error() {
  for (int i = 0; i < 3; ++i) {
    std::string message;
    try {
      run(failing_kernel, 2, 64, 0);
    } catch (const std::runtime_error& error) {
      message = error.what();
    }
    expect(message == "thread 40", "the kernel's own exception, got '" + message + "'");
    try {
      run(divergent_kernel, 1, 64, 0);
    } catch (const std::runtime_error&) {
    }
    check_neighbours(1, true);
    check_neighbours(-1, true);
  }
}

void every_thread_is_unwound_after_an_error() {
  try {
    run(failing_kernel, 1, 64, 0);
  } catch (const std::runtime_error&) {
  }
  std::printf("%d unwound\n", unwound);
}

}  // namespace

int main(int argc, char** argv) {
  return run_check(argc, argv,
                   {
                       CHECK(missing_barrier_before_reading_a_later_thread),
                       CHECK(missing_barrier_before_reading_an_earlier_thread),
                       CHECK(missing_syncwarp_before_reading_a_later_lane),
                       CHECK(missing_syncwarp_before_reading_an_earlier_lane),
                       CHECK(missing_barrier_before_the_first_thread_writes_again),
                       CHECK(missing_barrier_before_the_last_thread_writes_again),
                       CHECK(missing_wait),
                       CHECK(a_result_that_depends_on_the_order_of_blocks),
                       CHECK(overrun_of_dynamic_shared_memory),
                       CHECK(underrun_of_dynamic_shared_memory),
                       CHECK(read_behind_dynamic_shared_memory),
                       CHECK(divergent_barrier),
                       CHECK(barrier_that_one_lane_reaches),
                       CHECK(shuffles_that_do_not_meet),
                       CHECK(shuffle_of_a_lane_that_is_not_there),
                       CHECK(shuffle_whose_mask_lacks_the_caller),
                       CHECK(shuffle_of_a_wrong_width),
                       CHECK(product_without_a_lane),
                       CHECK(copy_from_a_misaligned_address),
                       CHECK(copy_to_a_misaligned_address),
                       CHECK(copy_to_global_memory),
                       CHECK(copy_to_behind_shared_memory),
                       CHECK(matrix_rows_at_misaligned_addresses),
                       CHECK(matrix_rows_behind_shared_memory),
                       CHECK(too_many_threads),
                       CHECK(too_many_blocks),
                       CHECK(too_much_shared_memory),
                       CHECK(the_next_launch_is_right_after_an_error),
                       CHECK(every_thread_is_unwound_after_an_error),
                   });
}
