// Every primitive of the emulation against a plain computation, for test_emulation.py.
#include "emulation_checks.h"

#include <cmath>
#include <limits>
#include <random>
#include <vector>

namespace {

using namespace c2c;

std::vector<float> random_numbers(std::size_t count, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<float> numbers(count);
  for (float& x : numbers) x = normal(generator);
  return numbers;
}

// ---- threads and blocks
// --------------------------------------------------------------------------
__global__ void number_kernel(int* visits) {
  const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const int threads = blockDim.x * blockDim.y * blockDim.z;
  ++visits[block * threads + thread];
}

void every_thread_of_every_block_runs_once() {
  std::vector<int> visits(2 * 3 * 4 * 5 * 3 * 7);
  run(number_kernel, dim3(2, 3, 4), dim3(5, 3, 7), 0, visits.data());
  for (int count : visits) expect(count == 1, "one visit, got " + std::to_string(count));
  run(number_kernel, dim3(2, 0, 4), dim3(5, 3, 7), 0, static_cast<int*>(nullptr));  // empty
}

// ---- shared memory
// -------------------------------------------------------------------------------
constexpr int kThreads = 96;

template <class T>
__global__ void reverse_block_kernel(T* out, bool* poisoned) {
  __shared__ T tile[kThreads];
  T* dynamic = dynamic_shared<T>();
  const unsigned i = threadIdx.x;
  if (i == 0) {
    const auto is_poison = [](const void* p) {
      const auto* bytes = static_cast<const unsigned char*>(p);
      return bytes[0] == 0xff && bytes[kThreads * sizeof(T) - 1] == 0xff;
    };
    *poisoned = is_poison(tile) && is_poison(dynamic) && *poisoned;
  }
  __syncthreads();
  tile[i] = static_cast<T>(i);
  __syncthreads();
  dynamic[i] = tile[kThreads - 1 - i];
  __syncthreads();
  out[blockIdx.x * kThreads + i] = dynamic[kThreads - 1 - i] + T(1000) * dynamic[i];
}

template <class T>
void check_reverse_block() {
  std::vector<T> out(4 * kThreads);
  bool poisoned = true;
  run(reverse_block_kernel<T>, 4, kThreads, kThreads * sizeof(T), out.data(), &poisoned);
  for (int i = 0; i < 4 * kThreads; ++i) {
    const int j = i % kThreads;
    expect(out[i] == T(j + 1000 * (kThreads - 1 - j)), "the block's numbers, both ways round");
  }
  expect(poisoned, "NaNs in all shared memory when a block starts");
}

void shared_memory_is_the_blocks_own_and_starts_poisoned() {
  check_reverse_block<float>();
  check_reverse_block<double>();
  check_reverse_block<int>();
}

// ---- shuffles
// ------------------------------------------------------------------------------------
template <class T>
__global__ void shuffle_kernel(T* out) {
  const int lane = threadIdx.x;
  const T own = static_cast<T>(100 + lane);
  T* row = out + lane;
  row[0] = __shfl_xor_sync(~0u, own, 5);
  row[32] = __shfl_xor_sync(~0u, own, 16, 8);
  row[64] = __shfl_down_sync(~0u, own, 3);
  row[96] = __shfl_down_sync(~0u, own, 3, 8);
  row[128] = __shfl_sync(~0u, own, 7);
  row[160] = __shfl_sync(~0u, own, lane + 1, 4);
  // Halves of the warp apart, the lower one twice.
  row[192] = lane < 16 ? __shfl_xor_sync(0xffffu, own, 1) : own;
  row[224] = __shfl_xor_sync(lane < 16 ? 0xffffu : 0xffff0000u, own, 2);
}

template <class T>
void check_shuffles() {
  std::vector<T> out(256);
  run(shuffle_kernel<T>, 1, 32, 0, out.data());
  for (int lane = 0; lane < 32; ++lane) {
    const int expected[8] = {lane ^ 5,
                             lane < 16 ? lane : lane ^ 16,  // earlier groups can be read
                             lane + 3 < 32 ? lane + 3 : lane,
                             lane % 8 + 3 < 8 ? lane + 3 : lane,
                             7,
                             lane / 4 * 4 + (lane + 1) % 4,
                             lane < 16 ? lane ^ 1 : lane,
                             lane ^ 2};
    for (int k = 0; k < 8; ++k) {
      expect(out[32 * k + lane] == T(100 + expected[k]),
             "shuffle " + std::to_string(k) + " of lane " + std::to_string(lane));
    }
  }
}

void shuffles_exchange_lanes() {
  check_shuffles<float>();
  check_shuffles<int>();
  check_shuffles<unsigned>();
  check_shuffles<double>();
}

__global__ void absent_source_kernel(float* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_sync(0xffffu, 1.f, 20);
}

void a_source_outside_the_mask_gives_poison() {
  std::vector<float> out(16, 0.f);
  run(absent_source_kernel, 1, 32, 0, out.data());
  for (float x : out) expect(std::isnan(x), "NaN from a lane that took no part");
}

// A partial last warp, lanes that returned, and sums that cross warps.
__global__ void sum_kernel(const float* x, int count, float* sum) {
  __shared__ float parts[3];
  const int i = threadIdx.x;
  __shared__ float values[80];
  if (i >= 80) return;
  values[i] = i < count ? x[i] : 0.f;
  __syncwarp();
  const float pair = values[i] + values[i ^ 1];
  __syncwarp();
  values[i] = pair;
  __syncthreads();
  if (i % 32 == 0) {
    float part = 0.f;
    for (int k = i; k < i + 32 && k < 80; k += 2) part += values[k];
    parts[i / 32] = part;
  }
  __syncthreads();
  if (i == 0) *sum = parts[0] + parts[1] + parts[2];
}

void returned_threads_hold_up_no_barrier() {
  float sum = 0.f, expected = 0.f;
  std::vector<float> x(77);
  for (int i = 0; i < 77; ++i) expected += x[i] = static_cast<float>(i * i);
  run(sum_kernel, 1, 90, 0, x.data(), 77, &sum);
  expect(sum == expected, "the block's sum");
}

// ---- asynchronous copies
// -------------------------------------------------------------------------
__global__ void pipeline_kernel(const float* in, float* out, int rows, int valid_rows) {
  float* tile = dynamic_shared<float>();  // [2, 32, 4]
  const int i = threadIdx.x;
  const auto fetch = [&](int row) {
    if (row < rows) {
      cp_async_16(tile + (row % 2 * 32 + i) * 4, in + (row * 32 + i) * 4, row < valid_rows);
    }
    cp_async_commit();
  };
  fetch(0);
  for (int row = 0; row < rows; ++row) {
    fetch(row + 1);
    cp_async_wait<1>();
    __syncthreads();
    for (int k = 0; k < 4; ++k) {
      out[(row * 32 + i) * 4 + k] = tile[(row % 2 * 32 + 31 - i) * 4 + k];
    }
    __syncthreads();
  }
}

void copies_arrive_group_by_group() {
  const int rows = 5, valid = 4;
  std::vector<float> in = random_numbers(valid * 128, 1), out(rows * 128);
  run(pipeline_kernel, 1, 32, 2 * 128 * sizeof(float), in.data(), out.data(), rows, valid);
  for (int i = 0; i < rows * 128; ++i) {
    const int row = i / 128, mirrored = row * 128 + (31 - i % 128 / 4) * 4 + i % 4;
    expect(out[i] == (row < valid ? in[mirrored] : 0.f), "what was copied, zeros where not valid");
  }
}

__global__ void landing_kernel(const float* in, float* out) {
  __shared__ float tile[3];
  const auto look = [&](int at) {
    for (int k = 0; k < 3; ++k) out[at + k] = tile[k];
  };
  for (int k = 0; k < 3; ++k) tile[k] = 7.f;
  cp_async_4(tile, in, true);
  cp_async_commit();
  cp_async_4(tile + 1, in + 1, true);
  cp_async_commit();
  cp_async_4(tile + 2, in + 2, false);
  look(0);  // three in flight
  cp_async_wait<1>();
  look(3);  // one has arrived
  cp_async_wait<0>();
  look(6);  // two: the third was never committed
  cp_async_commit();
  cp_async_wait<0>();
  look(9);
}

void targets_of_copies_in_flight_hold_poison() {
  const float in[2] = {1.f, 2.f};
  std::vector<float> out(12);
  run(landing_kernel, 1, 1, 0, static_cast<const float*>(in), out.data());
  const float poison = std::numeric_limits<float>::quiet_NaN();
  const float expected[12] = {poison, poison, poison, 1.f, poison, poison,
                              1.f,    2.f,    poison, 1.f, 2.f,    0.f};
  for (int i = 0; i < 12; ++i) {
    const bool same = std::isnan(expected[i]) ? std::isnan(out[i]) : out[i] == expected[i];
    expect(same, "copy " + std::to_string(i % 3) + " after step " + std::to_string(i / 3));
  }
}

// ---- matrix fragments
// ---------------------------------------------------------------------------- Four 8 x 8 matrices,
// each element its own number, rows 48 bytes apart.
template <int kMatrices, bool kTransposed>
__global__ void matrices_kernel(uint32_t* out) {
  __shared__ __align__(16) uint16_t rows[32][24];
  const int lane = threadIdx.x;
  for (int k = 0; k < 8; ++k) rows[lane][k] = static_cast<uint16_t>(lane * 8 + k);
  __syncwarp();
  uint32_t r[kMatrices];
  if constexpr (kMatrices == 4) {
    kTransposed ? ldmatrix_x4_trans(r, rows[lane]) : ldmatrix_x4(r, rows[lane]);
  } else {
    const void* row = lane < 16 ? rows[lane] : nullptr;
    kTransposed ? ldmatrix_x2_trans(r, row) : ldmatrix_x2(r, row);
  }
  for (int m = 0; m < kMatrices; ++m) out[lane * kMatrices + m] = r[m];
}

template <int kMatrices, bool kTransposed>
void check_matrices() {
  std::vector<uint32_t> out(32 * kMatrices);
  run(matrices_kernel<kMatrices, kTransposed>, 1, 32, 0, out.data());
  for (int lane = 0; lane < 32; ++lane) {
    for (int m = 0; m < kMatrices; ++m) {
      for (unsigned e = 0; e < 2; ++e) {
        const unsigned i = lane / 4, j = 2 * (lane % 4) + e;
        const unsigned element = 64 * m + (kTransposed ? 8 * j + i : 8 * i + j);
        expect((out[lane * kMatrices + m] >> 16 * e & 0xffffu) == element,
               "matrix " + std::to_string(m) + " in lane " + std::to_string(lane));
      }
    }
  }
}

void matrices_load_by_rows_and_transposed() {
  check_matrices<4, false>();
  check_matrices<4, true>();
  check_matrices<2, false>();
  check_matrices<2, true>();
}

// d = c + a b through fragments gathered one element at a time, as the PTX ISA tabulates them.
template <class T>
__global__ void mma_kernel(const T* a, const T* b, const float* c, float* d) {  // [16, 16], [16, 8]
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  const auto pair = [](T low, T high) { return low.bits | static_cast<uint32_t>(high.bits) << 16; };
  uint32_t fa[4], fb[2];
  for (int i = 0; i < 8; i += 2) {
    const int row = i < 2 || (i >= 4 && i < 6) ? g : g + 8, k = t * 2 + (i < 4 ? 0 : 8);
    fa[i / 2] = pair(a[row * 16 + k], a[row * 16 + k + 1]);
  }
  for (int i = 0; i < 4; i += 2) {
    const int k = t * 2 + (i < 2 ? 0 : 8);
    fb[i / 2] = pair(b[k * 8 + g], b[(k + 1) * 8 + g]);
  }
  float fd[4];
  const auto place = [&](int i) { return (i < 2 ? g : g + 8) * 8 + t * 2 + (i & 1); };
  for (int i = 0; i < 4; ++i) fd[i] = c[place(i)];
  mma_m16n8k16(fd, fa, fb, T{});
  for (int i = 0; i < 4; ++i) d[place(i)] = fd[i];
}

__global__ void mma_tf32_kernel(const float* a, const float* b, const float* c, float* d) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  uint32_t fa[4], fb[2];
  for (int i = 0; i < 4; ++i) {
    const int row = i == 0 || i == 2 ? g : g + 8, k = i < 2 ? t : t + 4;
    fa[i] = bit_cast<uint32_t>(a[row * 8 + k]);
  }
  for (int i = 0; i < 2; ++i) fb[i] = bit_cast<uint32_t>(b[(t + 4 * i) * 8 + g]);
  float fd[4];
  const auto place = [&](int i) { return (i < 2 ? g : g + 8) * 8 + t * 2 + (i & 1); };
  for (int i = 0; i < 4; ++i) fd[i] = c[place(i)];
  mma_m16n8k8_tf32(fd, fa, fb);
  for (int i = 0; i < 4; ++i) d[place(i)] = fd[i];
}

void compare_product(const std::vector<double>& a, const std::vector<double>& b,
                     const std::vector<float>& c, const std::vector<float>& d) {
  const int depth = static_cast<int>(a.size()) / 16;
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      double exact = c[row * 8 + column], size = std::fabs(exact);
      for (int k = 0; k < depth; ++k) {
        exact += a[row * depth + k] * b[k * 8 + column];
        size += std::fabs(a[row * depth + k] * b[k * 8 + column]);
      }
      const double bound = size * (depth + 1) * std::numeric_limits<float>::epsilon() / 2;
      expect(std::fabs(d[row * 8 + column] - exact) <= bound,
             "element " + std::to_string(row) + ", " + std::to_string(column) + " of the product");
    }
  }
}

template <class T>
void check_mma() {
  std::vector<T> a(256), b(128);
  std::vector<double> wide_a(256), wide_b(128);
  const std::vector<float> x = random_numbers(384, 2), c = random_numbers(128, 3);
  for (int i = 0; i < 256; ++i) narrow(x[i], &a[i]), wide_a[i] = widen(a[i]);
  for (int i = 0; i < 128; ++i) narrow(x[256 + i], &b[i]), wide_b[i] = widen(b[i]);
  std::vector<float> d(128);
  run(mma_kernel<T>, 1, 32, 0, static_cast<const T*>(a.data()), static_cast<const T*>(b.data()),
      c.data(), d.data());
  compare_product(wide_a, wide_b, c, d);
}

void products_of_fragments_are_matrix_products() {
  check_mma<Bfloat16>();
  check_mma<Float16>();
  const std::vector<float> a = random_numbers(128, 4), b = random_numbers(64, 5);
  const std::vector<float> c = random_numbers(128, 6);
  std::vector<float> d(128);
  const auto truncated = [](const std::vector<float>& x) {
    std::vector<double> y;
    for (float v : x) y.push_back(bit_cast<float>(bit_cast<uint32_t>(v) >> 13 << 13));
    return y;
  };
  run(mma_tf32_kernel, 1, 32, 0, a.data(), b.data(), c.data(), d.data());
  compare_product(truncated(a), truncated(b), c, d);
}

}  // namespace

int main(int argc, char** argv) {
  return run_check(argc, argv,
                   {
                       CHECK(every_thread_of_every_block_runs_once),
                       CHECK(shared_memory_is_the_blocks_own_and_starts_poisoned),
                       CHECK(shuffles_exchange_lanes),
                       CHECK(a_source_outside_the_mask_gives_poison),
                       CHECK(returned_threads_hold_up_no_barrier),
                       CHECK(copies_arrive_group_by_group),
                       CHECK(targets_of_copies_in_flight_hold_poison),
                       CHECK(matrices_load_by_rows_and_transposed),
                       CHECK(products_of_fragments_are_matrix_products),
                   });
}
