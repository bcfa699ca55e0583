// The scalar functions of the fuser, branch-free so that compilers vectorise loops over them. No
// torch header: kernels of every device include this file.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define C2C_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define C2C_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace c2c {

constexpr double kRmsEps = 1e-6;  // inside the root, as in the published fusers

enum class Activation { kGelu, kRelu, kSilu };

// How the projection P, weighted by w, and the receiver's token t become the fused token.
enum class Integration {
  kResidual,       // t + w P
  kInterpolation,  // t + w (P - t)
  kReplacement,    // w P
};

// Everything below has internal linkage: row_kernels.cpp is compiled once per instruction set, and
// the linker must not merge those copies.
namespace {

template <class To, class From>
C2C_HOST_DEVICE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// exp to about 1 ulp; x is clamped to +-87, where float neither overflows nor becomes subnormal.
C2C_HOST_DEVICE float exp_clamped(float x) {
  x = x < -87.f ? -87.f : x;
  x = x > 87.f ? 87.f : x;
  // 1.5 * 2^23: adding it rounds to the nearest integer, which is then in the low bits.
  const float magic = 12582912.f;
  const float shifted = x * 1.44269504088896341f + magic;
  const float n = shifted - magic;
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;  // ln 2 in two parts
  float p = 1.f / 5040;                                          // Taylor; |r| <= ln(2) / 2
  p = p * r + 1.f / 720;
  p = p * r + 1.f / 120;
  p = p * r + 1.f / 24;
  p = p * r + 1.f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.f;
  p = p * r + 1.f;
  const uint32_t exponent = bit_cast<uint32_t>(shifted) - bit_cast<uint32_t>(magic) + 127u;
  return p * bit_cast<float>(exponent << 23);  // p is NaN where x is
}
C2C_HOST_DEVICE double exp_clamped(double x) { return std::exp(x); }

// a / b for 1 <= b < 2^126. On GPUs within 2 ulp: their exact division can branch to a subroutine,
// and then values that could be computed side by side are computed one after the other.
C2C_HOST_DEVICE float divide(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fdividef(a, b);
#else
  return a / b;
#endif
}
C2C_HOST_DEVICE double divide(double a, double b) { return a / b; }

// erf(x) = x P(x^2) / Q(x^2), a weighted least-squares fit (Lawson iteration on the linearised
// problem) over |x| <= 3.9: relative error 1.8e-8 before rounding. From 3.92 on, erf rounds to 1.
C2C_HOST_DEVICE float erf_fitted(float x) {
  float u = x < -3.9f ? -3.9f : x;
  u = u > 3.9f ? 3.9f : u;
  const float t = u * u;
  float p = 2.066457853533876e-06f;
  p = p * t + 0.0002850467969452182f;
  p = p * t + 0.0037379352262758357f;
  p = p * t + 0.05266678181245708f;
  p = p * t + 0.18965812595739695f;
  p = p * t + 1.1283791477542784f;
  float q = 3.826905867687606e-05f;
  q = q * t + 0.0011572653090082031f;
  q = q * t + 0.014913454369152831f;
  q = q * t + 0.11381522775602668f;
  q = q * t + 0.5014129216046084f;
  q = q * t + 1.f;
  const float fitted = divide(u * p, q);
  return x >= 3.92f ? 1.f : (x <= -3.92f ? -1.f : fitted);
}
C2C_HOST_DEVICE double erf_fitted(double x) { return std::erf(x); }

template <class T>
C2C_HOST_DEVICE T sigmoid(T x) {
  return divide(T(1), T(1) + exp_clamped(-x));
}

template <Activation kActivation, class T>
C2C_HOST_DEVICE T activate(T x) {
  if constexpr (kActivation == Activation::kGelu) {
    return T(0.5) * x * (T(1) + erf_fitted(x * T(0.70710678118654752440)));
  } else if constexpr (kActivation == Activation::kRelu) {
    return x < T(0) ? T(0) : x;  // keeps NaN
  } else {
    return x * sigmoid(x);
  }
}

// bfloat16 and float16 as bit patterns. Rounding is to nearest, ties to even; a NaN stays one. GPUs
// have instructions for it.
struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

C2C_HOST_DEVICE float widen(Bfloat16 x) {
  return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16);
}
C2C_HOST_DEVICE float widen(Float16 x) {
#if defined(__CUDA_ARCH__)
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
#else
  const uint32_t magnitude = x.bits & 0x7fffu;
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  // Re-biases the exponent by a product, which also normalises subnormals.
  const uint32_t finite =
      bit_cast<uint32_t>(bit_cast<float>(magnitude << 13) * bit_cast<float>(0x77800000u));
  const uint32_t special = (magnitude << 13) | 0x7f800000u;
  return bit_cast<float>(sign | (magnitude >= 0x7c00u ? special : finite));
#endif
}
C2C_HOST_DEVICE float widen(float x) { return x; }
C2C_HOST_DEVICE double widen(double x) { return x; }

C2C_HOST_DEVICE void narrow(float x, Bfloat16* out) {
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out->bits) : "f"(x));
#else
  const uint32_t u = bit_cast<uint32_t>(x);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  out->bits = static_cast<uint16_t>(x != x ? 0x7fc0u : rounded);
#endif
}
C2C_HOST_DEVICE void narrow(float x, Float16* out) {
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out->bits) : "f"(x));
#else
  const uint32_t u = bit_cast<uint32_t>(x);
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t magnitude = u & 0x7fffffffu;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^-14 the sum's last bit is worth 2^-24, the spacing of subnormal float16.
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t result = magnitude < 0x38800000u ? subnormal : normal;
  result = magnitude >= 0x477ff000u ? 0x7c00u : result;  // 65520 and above round to infinity
  result = magnitude > 0x7f800000u ? 0x7e00u : result;
  out->bits = static_cast<uint16_t>(sign | result);
#endif
}
C2C_HOST_DEVICE void narrow(float x, float* out) { *out = x; }
C2C_HOST_DEVICE void narrow(double x, double* out) { *out = x; }

// The fused value of one channel; `from` is the base, or with accumulate what is written to.
template <Integration kIntegration, class T>
C2C_HOST_DEVICE T integrate(T from, T base, T w, T p, bool accumulate) {
  if constexpr (kIntegration == Integration::kResidual) {
    return from + w * p;
  } else if constexpr (kIntegration == Integration::kInterpolation) {
    return from + w * (p - base);
  } else {
    return accumulate ? from + (w * p - base) : w * p;
  }
}

}  // namespace
}  // namespace c2c
