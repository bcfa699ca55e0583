// The CPU's half of device.h (C2C_EMULATE): CUDA's names, and the same functions with the meaning
// that the CUDA programming guide and the PTX ISA give them. Stricter than a GPU where a fault
// would otherwise stay unseen: shared memory and the targets of copies in flight hold NaNs,
// misaligned or wrong addresses, barriers and warp operations that do not meet are errors. Build
// with -fno-strict-aliasing, for kernels read memory as wider types, and -Wno-unknown-pragmas.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>

#include "../scalar_math.h"
#include "emulation_block.h"

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

struct CUstream_st;
using cudaStream_t = CUstream_st*;

struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

namespace c2c {
namespace emulation {

// ---- shuffles ----------------------------------------------------------------------------------
template <class T>
struct Exchange {
  T value;
  int source;  // lane
  T result;
};

// What `source` holds; poison where it does not take part.
template <class T>
T exchange(const char* what, uint32_t lanes, T value, int source, Place place) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8),
                "shuffles take numbers of 4 or 8 bytes");
  Exchange<T> own{value, source, T()};
  Runner::get().warp_operation(what, lanes, place, &own, [](void* const* operands, uint32_t lanes) {
    for (int lane = 0; lane < 32; ++lane) {
      if (!(lanes >> lane & 1u)) continue;
      auto& to = *static_cast<Exchange<T>*>(operands[lane]);
      std::memset(&to.result, kPoison, sizeof(T));
      if (lanes >> to.source & 1u) {
        to.result = static_cast<const Exchange<T>*>(operands[to.source])->value;
      }
    }
  });
  return own.result;
}

inline int checked_width(const char* what, int width, Place place) {
  if (width < 1 || width > 32 || (width & (width - 1)) != 0) {
    Runner::get().fail(
        std::string(what) + ": width must be 1, 2, 4, 8, 16 or 32, got " + std::to_string(width),
        place);
  }
  return width;
}

// ---- asynchronous copies -----------------------------------------------------------------------
inline void check_address(const char* what, const void* p, std::size_t bytes, bool shared,
                          Place place) {
  Runner& runner = Runner::get();
  if (reinterpret_cast<std::uintptr_t>(p) % bytes != 0) {
    runner.fail(std::string(what) + ": the " + (shared ? "shared" : "global") +
                    " address is no multiple of " + std::to_string(bytes),
                place);
  }
  if (runner.is_shared(p, bytes) != shared) {
    runner.fail(std::string(what) + (shared ? ": the address is not in the block's shared memory"
                                            : ": the global address is in shared memory"),
                place);
  }
}

// The target holds poison until the wait, when the source is read.
inline void start_copy(const char* what, void* shared, const void* global, std::size_t bytes,
                       bool valid, Place place) {
  check_address(what, shared, bytes, true, place);
  check_address(what, global, bytes, false, place);
  std::memset(shared, kPoison, bytes);
  Runner::Thread& thread = Runner::get().thread();
  thread.copies.push_back({shared, valid ? global : nullptr, bytes, thread.groups});
}

inline void land_copies(int newest) {
  Runner::Thread& thread = Runner::get().thread();
  std::size_t landed = 0;
  for (; landed < thread.copies.size(); ++landed) {
    const Runner::Copy& copy = thread.copies[landed];
    if (copy.group >= thread.groups - newest) break;
    if (copy.from) {
      std::memcpy(copy.to, copy.from, copy.bytes);
    } else {
      std::memset(copy.to, 0, copy.bytes);
    }
  }
  thread.copies.erase(thread.copies.begin(), thread.copies.begin() + landed);
}

// ---- matrix fragments --------------------------------------------------------------------------
constexpr uint32_t kWholeWarp = 0xffffffffu;

struct MatrixLoad {
  const void* row;
  uint32_t* registers;
};

template <int kMatrices, bool kTransposed>
void load_matrices(const char* what, uint32_t* registers, const void* row, Place place) {
  Runner& runner = Runner::get();
  if (runner.lane() < 8 * kMatrices) check_address(what, row, 16, true, place);
  MatrixLoad own{row, registers};
  runner.warp_operation(what, kWholeWarp, place, &own, [](void* const* operands, uint32_t) {
    uint16_t elements[8 * kMatrices][8];
    for (int lane = 0; lane < 8 * kMatrices; ++lane) {
      std::memcpy(elements[lane], static_cast<const MatrixLoad*>(operands[lane])->row, 16);
    }
    for (int lane = 0; lane < 32; ++lane) {
      const int i = lane / 4, j = 2 * (lane % 4);
      uint32_t* const to = static_cast<const MatrixLoad*>(operands[lane])->registers;
      for (int m = 0; m < kMatrices; ++m) {
        const auto* matrix = elements + 8 * m;
        const uint32_t low = kTransposed ? matrix[j][i] : matrix[i][j];
        const uint32_t high = kTransposed ? matrix[j + 1][i] : matrix[i][j + 1];
        to[m] = low | high << 16;
      }
    }
  });
}

struct Fragments {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};

template <class T>
float low_half(uint32_t pair) {
  return widen(T{static_cast<uint16_t>(pair)});
}
template <class T>
float high_half(uint32_t pair) {
  return widen(T{static_cast<uint16_t>(pair >> 16)});
}
inline float tf32(uint32_t bits) { return bit_cast<float>(bits & 0xffffe000u); }

// d += a b once both are spread out; summed in float32 in the order of k.
template <int kDepth>
void multiply_spread(void* const* operands, const float (&a)[16][kDepth],
                     const float (&b)[kDepth][8]) {
  float d[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const float* from = static_cast<const Fragments*>(operands[lane])->d;
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) d[g + 8 * (i / 2)][2 * t + i % 2] = from[i];
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < kDepth; ++k) {
      for (int column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    float* to = static_cast<const Fragments*>(operands[lane])->d;
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) to[i] = d[g + 8 * (i / 2)][2 * t + i % 2];
  }
}

template <class T>
void multiply_halves(void* const* operands, uint32_t) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& from = *static_cast<const Fragments*>(operands[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      const int row = g + 8 * (i % 2), k = 2 * t + 8 * (i / 2);
      a[row][k] = low_half<T>(from.a[i]);
      a[row][k + 1] = high_half<T>(from.a[i]);
    }
    for (int i = 0; i < 2; ++i) {
      b[2 * t + 8 * i][g] = low_half<T>(from.b[i]);
      b[2 * t + 8 * i + 1][g] = high_half<T>(from.b[i]);
    }
  }
  multiply_spread<16>(operands, a, b);
}

inline void multiply_tf32(void* const* operands, uint32_t) {
  float a[16][8], b[8][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& from = *static_cast<const Fragments*>(operands[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) a[g + 8 * (i % 2)][t + 4 * (i / 2)] = tf32(from.a[i]);
    for (int i = 0; i < 2; ++i) b[t + 4 * i][g] = tf32(from.b[i]);
  }
  multiply_spread<8>(operands, a, b);
}

inline void multiply(const char* what, float* d, const uint32_t* a, const uint32_t* b,
                     Complete complete, Place place) {
  Fragments own{d, a, b};
  Runner::get().warp_operation(what, kWholeWarp, place, &own, complete);
}

}  // namespace emulation

// ---- what device.h documents -------------------------------------------------------------------
namespace {

using emulation::Place;

template <class T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(emulation::Runner::get().dynamic_shared());
}

inline void cp_async_16(void* shared, const void* global, bool valid, Place place = Place::here()) {
  emulation::start_copy("cp_async_16", shared, global, 16, valid, place);
}
inline void cp_async_4(void* shared, const void* global, bool valid, Place place = Place::here()) {
  emulation::start_copy("cp_async_4", shared, global, 4, valid, place);
}
inline void cp_async_commit() { ++emulation::Runner::get().thread().groups; }
template <int kNewest>
void cp_async_wait() {
  emulation::land_copies(kNewest);
}

inline void store_16(void* global, const uint4& words, Place place = Place::here()) {
  emulation::check_address("store_16", global, 16, false, place);
  *static_cast<uint4*>(global) = words;
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, Place place = Place::here()) {
  emulation::load_matrices<4, false>("ldmatrix_x4", r, row, place);
}
inline void ldmatrix_x2(uint32_t (&r)[2], const void* row, Place place = Place::here()) {
  emulation::load_matrices<2, false>("ldmatrix_x2", r, row, place);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, Place place = Place::here()) {
  emulation::load_matrices<4, true>("ldmatrix_x4_trans", r, row, place);
}
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row, Place place = Place::here()) {
  emulation::load_matrices<2, true>("ldmatrix_x2_trans", r, row, place);
}

inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Bfloat16,
                         Place place = Place::here()) {
  emulation::multiply("mma_m16n8k16", d, a, b, emulation::multiply_halves<Bfloat16>, place);
}
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Float16,
                         Place place = Place::here()) {
  emulation::multiply("mma_m16n8k16", d, a, b, emulation::multiply_halves<Float16>, place);
}
inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             Place place = Place::here()) {
  emulation::multiply("mma_m16n8k8_tf32", d, a, b, emulation::multiply_tf32, place);
}

template <class... P, class... A>
void launch(const char* name, void (*kernel)(P...), dim3 grid, dim3 block, std::size_t shared_bytes,
            cudaStream_t, A... args) {
  static_assert(sizeof...(P) == sizeof...(A), "launch needs one argument per parameter");
  static_assert((std::size_t{0} + ... + sizeof(P)) <= kMaxParameterBytes, "too many parameters");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  const std::tuple<P...> parameters{static_cast<P>(args)...};
  emulation::Runner::get().run(name, grid, block, shared_bytes,
                               [&] { std::apply(kernel, parameters); });
}

}  // namespace
}  // namespace c2c

// ---- CUDA's own --------------------------------------------------------------------------------
inline void __syncthreads(c2c::emulation::Place place = c2c::emulation::Place::here()) {
  c2c::emulation::Runner::get().barrier("__syncthreads", place);
}
inline void __syncwarp(unsigned lanes = ~0u,
                       c2c::emulation::Place place = c2c::emulation::Place::here()) {
  c2c::emulation::Runner::get().warp_operation(
      "__syncwarp", lanes, place, nullptr, [](void* const*, uint32_t) {}, true);
}

// Groups of `width` lanes exchange among themselves; without such a lane, the own value.
template <class T>
T __shfl_sync(unsigned lanes, T value, int source, int width = 32,
              c2c::emulation::Place place = c2c::emulation::Place::here()) {
  const char* what = "__shfl_sync";
  const int last = c2c::emulation::checked_width(what, width, place) - 1;
  const int lane = c2c::emulation::Runner::get().lane();
  return c2c::emulation::exchange(what, lanes, value, (lane & ~last) | (source & last), place);
}
template <class T>
T __shfl_xor_sync(unsigned lanes, T value, int bits, int width = 32,
                  c2c::emulation::Place place = c2c::emulation::Place::here()) {
  const char* what = "__shfl_xor_sync";
  const int last = c2c::emulation::checked_width(what, width, place) - 1;
  const int lane = c2c::emulation::Runner::get().lane();
  const int source = (lane ^ bits) & 31;
  return c2c::emulation::exchange(what, lanes, value, source > (lane | last) ? lane : source,
                                  place);
}
template <class T>
T __shfl_down_sync(unsigned lanes, T value, unsigned distance, int width = 32,
                   c2c::emulation::Place place = c2c::emulation::Place::here()) {
  const char* what = "__shfl_down_sync";
  const int last = c2c::emulation::checked_width(what, width, place) - 1;
  const unsigned lane = static_cast<unsigned>(c2c::emulation::Runner::get().lane());
  const unsigned source = lane + (distance & 31u);
  const bool in_group = source <= (lane | static_cast<unsigned>(last));
  return c2c::emulation::exchange(what, lanes, value, static_cast<int>(in_group ? source : lane),
                                  place);
}
