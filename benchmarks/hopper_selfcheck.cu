// Compares every stage of csrc/cuda/hopper_gemm.h with a plain loop on the GPU, then times them at
// the real shape. Needs a Hopper GPU and nothing but the CUDA toolkit. From the repository's root:
//
//   nvcc -std=c++17 -O3 -gencode=arch=compute_90a,code=sm_90a -o /tmp/hopper_selfcheck \
//     benchmarks/hopper_selfcheck.cu csrc/cuda/hopper_gemm.cu && /tmp/hopper_selfcheck
//
// Prints a line per check and per timing; the exit code is 1 if a check failed.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "../csrc/cuda/hopper_gemm.h"

// A name and no using directive outside: nvcc takes scalar_math.h's unnamed namespace for this
// file's.
namespace selfcheck {

using namespace c2c;
using namespace c2c::cuda;

void require(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  std::printf("FAILED %s: %s\n", what, cudaGetErrorString(status));
  std::exit(1);
}

// Device memory; freed at the end of the program's one use of it.
template <class T>
struct Buffer {
  T* data = nullptr;
  size_t size;

  explicit Buffer(size_t size) : size(size) {
    require(cudaMalloc(&data, std::max<size_t>(size, 1) * sizeof(T)), "cudaMalloc");
    poison();
  }
  ~Buffer() { cudaFree(data); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  void poison() { require(cudaMemset(data, 0xff, size * sizeof(T)), "cudaMemset"); }  // NaN
  std::vector<T> host() const {
    std::vector<T> copy(size);
    require(cudaMemcpy(copy.data(), data, size * sizeof(T), cudaMemcpyDeviceToHost), "copy back");
    return copy;
  }
  void set(const std::vector<T>& from) {
    require(cudaMemcpy(data, from.data(), size * sizeof(T), cudaMemcpyHostToDevice), "copy");
  }
};

template <class T>
__global__ void random_kernel(T* to, size_t size, float scale, uint32_t seed) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < size;
       i += size_t{gridDim.x} * blockDim.x) {
    uint32_t x = static_cast<uint32_t>(i) * 0x9e3779b9u ^ seed * 0x85ebca6bu;
    x = (x ^ x >> 16) * 0x7feb352du;
    x = (x ^ x >> 15) * 0x846ca68bu;
    x ^= x >> 16;
    narrow((static_cast<float>(x) / 2147483648.f - 1.f) * scale, &to[i]);
  }
}

uint32_t next_seed = 1;
template <class T>
void randomize(Buffer<T>& buffer, float scale) {
  random_kernel<<<1024, 256>>>(buffer.data, buffer.size, scale, next_seed++);
  require(cudaDeviceSynchronize(), "random_kernel");
}

// sums[g, r, c] = x[g, r] . weight[g, c], one thread each.
template <class T>
__global__ void plain_product_kernel(Matrices x, const T* weight, int rows, int cols, int depth,
                                     float* sums) {
  const int c = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  const int r = static_cast<int>(blockIdx.y), g = static_cast<int>(blockIdx.z);
  if (c >= cols) return;
  const T* a = static_cast<const T*>(x.data) + g * x.stream_stride + r * x.row_stride;
  const T* b = weight + (static_cast<size_t>(g) * cols + c) * depth;
  float sum = 0.f;
  for (int k = 0; k < depth; ++k) sum += widen(a[k]) * widen(b[k]);
  sums[(static_cast<size_t>(g) * rows + r) * cols + c] = sum;
}

// ---- one product with everything that its epilogues read and write -----------------------------

constexpr int kTokens = 97;  // of a batch row in the output stage
constexpr HeadShape kHeads{8, 128};

template <class T>
struct Stage {
  const CacheType type;
  const int streams, rows, cols, depth;
  const int x_stride = depth + 64, z_stride = cols + 8;  // columns of wider matrices
  Buffer<T> x{static_cast<size_t>(streams) * rows * x_stride};
  Buffer<T> weight{static_cast<size_t>(streams) * cols * depth};
  Buffer<T> z_in{static_cast<size_t>(streams) * rows * z_stride}, z{z_in.size};
  Buffer<float> bias{static_cast<size_t>(streams) * cols};
  Buffer<float> squares{static_cast<size_t>(streams) * rows * (cols / 128)};
  Buffer<float> x_squares{static_cast<size_t>(streams) * rows * (depth / 128)};
  std::vector<float> sums;

  Stage(CacheType type, int streams, int rows, int cols, int depth)
      : type(type), streams(streams), rows(rows), cols(cols), depth(depth) {
    randomize(x, 1.f);
    randomize(weight, 2.f / std::sqrt(static_cast<float>(depth)));
    randomize(z_in, 1.f);
    randomize(bias, 1.f);
    randomize(x_squares, 0.5f);
    std::vector<float> positive = x_squares.host();
    for (float& v : positive) v = 128.f * (0.1f + std::abs(v));
    x_squares.set(positive);
  }
  void compute_sums() {
    Buffer<float> to(static_cast<size_t>(streams) * rows * cols);
    plain_product_kernel<<<dim3((cols + 127) / 128, rows, streams), 128>>>(
        x_matrix(), weight.data, rows, cols, depth, to.data);
    require(cudaDeviceSynchronize(), "plain_product_kernel");
    sums = to.host();
  }
  Matrices x_matrix() const { return {x.data, int64_t{rows} * x_stride, x_stride}; }
  Matrices z_matrix(const Buffer<T>& buffer, int first = 0) const {
    return {buffer.data + first, int64_t{rows} * z_stride, z_stride};
  }
  HopperProduct product() const {
    return {type, streams, rows, cols, depth, x_matrix(), weight.data};
  }
  double flops() const { return 2.0 * streams * rows * cols * depth; }
};

int failures = 0;

// ||got - want|| / ||want|| at most `bound`; NaN never passes.
void report(const std::string& what, const std::vector<double>& got,
            const std::vector<double>& want, double bound) {
  double error = 0, norm = 0, worst = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    const double d = got[i] - want[i];
    error += d * d, norm += want[i] * want[i];
    worst = std::abs(d) > worst || d != d ? std::abs(d) : worst;
  }
  const double relative = std::sqrt(error / norm);
  const bool good = got.size() == want.size() && relative <= bound;
  failures += !good;
  std::printf("%-6s %-58s relative %.2e (allowed %.0e)  largest %.2e\n", good ? "ok" : "FAILED",
              what.c_str(), relative, bound, worst);
}

// The columns of z that are no padding, and whether the padding was left alone.
template <class T>
std::vector<double> columns(const Stage<T>& s, const std::vector<T>& z) {
  std::vector<double> values;
  values.reserve(static_cast<size_t>(s.streams) * s.rows * s.cols);
  for (size_t row = 0; row < static_cast<size_t>(s.streams) * s.rows; ++row) {
    for (int c = 0; c < s.z_stride; ++c) {
      const T v = z[row * s.z_stride + c];
      if (c < s.cols) {
        values.push_back(widen(v));
      } else if (v.bits != 0xffff) {
        values.push_back(NAN);  // makes the sizes differ
      }
    }
  }
  return values;
}
template <class T>
std::vector<double> tile_squares(const Stage<T>& s, const std::vector<double>& z) {
  std::vector<double> sums(z.size() / 128);
  for (size_t i = 0; i < z.size(); ++i) sums[i / 128] += z[i] * z[i];
  return sums;
}
std::vector<double> widened(const std::vector<float>& from) { return {from.begin(), from.end()}; }

template <class T>
void check_bias_and_residual(Stage<T>& s, const std::string& name, double eps) {
  launch_hopper_bias(s.product(), s.bias.data, s.z_matrix(s.z), s.squares.data, nullptr);
  require(cudaDeviceSynchronize(), "hopper_bias");
  const auto bias = s.bias.host();
  std::vector<double> want(s.sums.begin(), s.sums.end());
  for (size_t i = 0; i < want.size(); ++i) {
    want[i] += bias[i / (static_cast<size_t>(s.rows) * s.cols) * s.cols + i % s.cols];
  }
  const auto got = columns(s, s.z.host());
  report(name + " bias", got, want, eps);
  report(name + " bias, squares", widened(s.squares.host()), tile_squares(s, got), 1e-5);

  const auto z_in = s.z_in.host();
  s.squares.poison();
  launch_hopper_residual(s.product(), s.z_matrix(s.z_in), s.z_matrix(s.z), s.squares.data, nullptr);
  require(cudaDeviceSynchronize(), "hopper_residual");
  for (size_t i = 0; i < want.size(); ++i) {
    want[i] = static_cast<double>(s.sums[i]) + widen(z_in[i / s.cols * s.z_stride + i % s.cols]);
  }
  const auto other = columns(s, s.z.host());
  report(name + " residual", other, want, eps);
  report(name + " residual, squares", widened(s.squares.host()), tile_squares(s, other), 1e-5);
  // In place, without squares, and a second time from the same input: the same bits.
  launch_hopper_residual(s.product(), s.z_matrix(s.z_in), s.z_matrix(s.z_in), nullptr, nullptr);
  require(cudaDeviceSynchronize(), "hopper_residual in place");
  const auto once = s.z_in.host();
  s.z_in.set(z_in);
  launch_hopper_residual(s.product(), s.z_matrix(s.z_in), s.z_matrix(s.z_in), nullptr, nullptr);
  require(cudaDeviceSynchronize(), "hopper_residual in place");
  const auto again = s.z_in.host();
  const bool same = std::memcmp(once.data(), again.data(), once.size() * sizeof(T)) == 0;
  failures += !same;
  std::printf("%-6s %s\n", same ? "ok" : "FAILED", (name + " the same bits twice").c_str());
  s.z_in.set(z_in);
}

double activated(Activation activation, double x) {
  switch (activation) {
    case Activation::kGelu:
      return x / 2 * (1 + std::erf(x / std::sqrt(2.0)));
    case Activation::kRelu:
      return std::max(x, 0.0);
    default:
      return x / (1 + std::exp(-x));
  }
}

template <class T>
void check_activate(Stage<T>& s, const std::string& name, double eps) {
  const auto squares = s.x_squares.host();
  const int tiles = s.depth / 128, first_cols = s.cols / 2 / 128 * 128;
  for (const Activation activation : {Activation::kGelu, Activation::kRelu, Activation::kSilu}) {
    s.z.poison();
    launch_hopper_activate(s.product(), activation, s.x_squares.data, s.z_matrix(s.z), first_cols,
                           s.z_matrix(s.z, first_cols), nullptr);
    require(cudaDeviceSynchronize(), "hopper_activate");
    std::vector<double> want(s.sums.begin(), s.sums.end());
    for (size_t i = 0; i < want.size(); ++i) {
      double total = 0;
      for (int tile = 0; tile < tiles; ++tile) total += squares[i / s.cols * tiles + tile];
      want[i] = activated(activation, want[i] / std::sqrt(total / s.depth + kRmsEps));
    }
    const char* const names[] = {"gelu", "relu", "silu"};
    report(name + " activate " + names[static_cast<int>(activation)], columns(s, s.z.host()), want,
           eps);
  }
}

// Caches [B, H, N, D] of rows = B * kTokens tokens, the last batch row cut short.
template <class T>
void check_output(Stage<T>& s, const std::string& name, double eps) {
  const int batch = (s.rows + kTokens - 1) / kTokens;
  const size_t cache = static_cast<size_t>(batch) * kTokens * s.cols;
  const int64_t strides[] = {int64_t{kTokens} * s.cols, int64_t{kTokens} * kHeads.dim, kHeads.dim,
                             1};
  Buffer<T> base(cache * s.streams), out(cache * s.streams);
  Buffer<float> logits(static_cast<size_t>(s.streams) * s.rows * kHeads.heads);
  Buffer<float> head_bias(static_cast<size_t>(s.streams) * kHeads.heads);
  Buffer<int64_t> map(static_cast<size_t>(batch) * kTokens);
  randomize(base, 1.f), randomize(logits, 2.f), randomize(head_bias, 1.f);
  std::vector<int64_t> sources(map.size);
  for (size_t i = 0; i < map.size; ++i) sources[i] = i % 5 == 3 ? -1 : static_cast<int64_t>(i % 50);
  map.set(sources);
  std::vector<Streams> views(1);
  for (int g = 0; g < s.streams; ++g) {
    views[0].view[g].base.data = base.data + g * cache;
    views[0].view[g].out.data = out.data + g * cache;
    for (CacheView* view : {&views[0].view[g].base, &views[0].view[g].out}) {
      std::copy(strides, strides + 4, view->stride);
    }
  }
  const auto bias = s.bias.host(), row_logits = logits.host(), logit_bias = head_bias.host();
  const auto t = base.host();
  for (int variant = 0; variant < 6; ++variant) {
    const auto integration = static_cast<Integration>(variant / 2);
    const bool accumulate = variant % 2 == 1;
    randomize(out, 1.f);
    const auto before = out.host();
    const HopperOutput output{kHeads,      {map.data, kTokens, 1, batch, kTokens, 50},
                              0,           s.bias.data,
                              logits.data, head_bias.data,
                              integration, accumulate};
    launch_hopper_output(s.product(), views[0], output, nullptr);
    require(cudaDeviceSynchronize(), "hopper_output");
    const auto after = out.host();
    std::vector<double> got(after.size()), want(after.size());
    for (size_t i = 0; i < after.size(); ++i) got[i] = widen(after[i]), want[i] = widen(before[i]);
    for (size_t i = 0; i < s.sums.size(); ++i) {
      const int c = static_cast<int>(i % s.cols), head = c / kHeads.dim;
      const size_t row = i / s.cols % s.rows, g = i / s.cols / s.rows;
      const size_t at = g * cache + row / kTokens * strides[0] + head * strides[1] +
                        row % kTokens * strides[2] + c % kHeads.dim;
      const double clean = widen(t[at]), from = accumulate ? widen(before[at]) : clean;
      const double w = 1 / (1 + std::exp(-row_logits[i / s.cols * kHeads.heads + head] -
                                         logit_bias[g * kHeads.heads + head]));
      const double p = s.sums[i] + bias[g * s.cols + c];
      want[at] = sources[row] < 0                           ? from
                 : integration == Integration::kResidual    ? from + w * p
                 : integration == Integration::kReplacement ? from + w * p - clean
                                                            : from + w * (p - clean);
    }
    const char* const names[] = {"residual", "interpolation", "replacement"};
    report(name + " output " + names[variant / 2] + (accumulate ? ", accumulating" : ""), got, want,
           eps);
  }
}

template <class T>
void check_shape(CacheType type, int streams, int rows, int cols, int depth) {
  const bool bfloat16 = type == CacheType::kBfloat16;
  const double eps = bfloat16 ? 1.0 / 256 : 1.0 / 2048;  // one rounding, and room
  const std::string name = std::string(bfloat16 ? "bf16 " : "fp16 ") + std::to_string(streams) +
                           "x" + std::to_string(rows) + "x" + std::to_string(cols) + "x" +
                           std::to_string(depth);
  Stage<T> s(type, streams, rows, cols, depth);
  s.compute_sums();
  check_bias_and_residual(s, name, eps);
  if (depth % 128 == 0) check_activate(s, name, eps);
  if (cols == kHeads.heads * kHeads.dim) check_output(s, name, eps);
}

// ---- timings -----------------------------------------------------------------------------------

// Median of seven times ten launches, in milliseconds a launch.
double milliseconds(const std::function<void()>& launch) {
  cudaEvent_t begin, end;
  require(cudaEventCreate(&begin), "cudaEventCreate");
  require(cudaEventCreate(&end), "cudaEventCreate");
  std::vector<float> times(7);
  for (int i = 0; i < 5; ++i) launch();
  for (float& time : times) {
    require(cudaEventRecord(begin), "cudaEventRecord");
    for (int i = 0; i < 10; ++i) launch();
    require(cudaEventRecord(end), "cudaEventRecord");
    require(cudaEventSynchronize(end), "the timed launches");
    require(cudaEventElapsedTime(&time, begin, end), "cudaEventElapsedTime");
  }
  std::sort(times.begin(), times.end());
  return times[3] / 10;
}

void time_stages(int streams, int rows) {
  using T = Bfloat16;
  double total = 0, flops = 0;
  const auto line = [&](const char* what, const Stage<T>& s, const std::function<void()>& launch) {
    const double ms = milliseconds(launch);
    total += ms, flops += s.flops();
    std::printf("time   %-10s %d x %d x %d x %d  %.3f ms  %.0f TFLOP/s\n", what, streams, rows,
                s.cols, s.depth, ms, s.flops() / ms / 1e9);
  };
  const auto type = CacheType::kBfloat16;
  {
    Stage<T> s(type, streams, rows, 1024, 1152);
    line("bias", s, [&] {
      launch_hopper_bias(s.product(), s.bias.data, s.z_matrix(s.z), s.squares.data, nullptr);
    });
  }
  for (const int cols : {1024, 2048}) {
    Stage<T> s(type, streams, rows, cols, 1024);
    line("activate", s, [&] {
      launch_hopper_activate(s.product(), Activation::kGelu, s.x_squares.data, s.z_matrix(s.z),
                             cols, s.z_matrix(s.z), nullptr);
    });
  }
  {
    Stage<T> s(type, streams, rows, 1024, 1024);
    line("residual", s, [&] {
      launch_hopper_residual(s.product(), s.z_matrix(s.z_in), s.z_matrix(s.z), s.squares.data,
                             nullptr);
    });
  }
  {
    Stage<T> s(type, streams, rows, 1024, 2048);
    Buffer<T> base(static_cast<size_t>(streams) * rows * 1024), out(base.size);
    randomize(base, 1.f);
    Buffer<float> logits(static_cast<size_t>(streams) * rows * 8), head_bias(streams * 8);
    randomize(logits, 1.f), randomize(head_bias, 1.f);
    std::vector<Streams> views(1);
    for (int g = 0; g < streams; ++g) {
      const int64_t at = int64_t{g} * rows * 1024;
      views[0].view[g].base = {base.data + at, {int64_t{rows} * 1024, int64_t{rows} * 128, 128, 1}};
      views[0].view[g].out = {out.data + at, {int64_t{rows} * 1024, int64_t{rows} * 128, 128, 1}};
    }
    const HopperOutput output{
        kHeads,         {nullptr, 0, 0, 1, rows, rows}, 0,    s.bias.data, logits.data,
        head_bias.data, Integration::kResidual,         false};
    line("output", s, [&] { launch_hopper_output(s.product(), views[0], output, nullptr); });
  }
  std::printf("time   all five   %d streams, %d rows  %.3f ms  %.0f TFLOP/s\n", streams, rows,
              total, flops / total / 1e9);
}

int run() {
  try {
    check_hopper_device();
    for (const int rows : {1, 64, 128, 129, 300}) {
      check_shape<Bfloat16>(CacheType::kBfloat16, 3, rows, 1024, 1024);
    }
    check_shape<Bfloat16>(CacheType::kBfloat16, 1, 200, 128, 64);   // one slice
    check_shape<Bfloat16>(CacheType::kBfloat16, 2, 200, 256, 200);  // part of a last slice
    check_shape<Bfloat16>(CacheType::kBfloat16, 2, 200, 2048, 1152);
    check_shape<Bfloat16>(CacheType::kBfloat16, 56, 260, 1024, 2048);
    check_shape<Float16>(CacheType::kFloat16, 3, 300, 1024, 1024);
    if (failures == 0) {
      for (const int rows : {170, 512, 2048, 8192}) time_stages(56, rows);
    }
  } catch (const std::exception& error) {
    std::printf("FAILED %s\n", error.what());
    return 1;
  }
  std::printf(failures == 0 ? "all checks passed\n" : "%d checks FAILED\n", failures);
  return failures != 0;
}

}  // namespace selfcheck

int main() { return selfcheck::run(); }
