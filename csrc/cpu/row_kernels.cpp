// The CPU kernels between the GEMMs (see row_kernels.h). CMake compiles this file once per
// instruction set with C2C_ISA naming it; nothing here may have external linkage but the table.
#include "row_kernels.h"

#include <cstring>
#include <type_traits>

#include "../scalar_math.h"

#ifndef C2C_ISA
#error "C2C_ISA must name the instruction set this file is compiled for"
#endif
#define C2C_STRING_(x) #x
#define C2C_STRING(x) C2C_STRING_(x)
#define C2C_JOIN_(a, b) a##b
#define C2C_JOIN(a, b) C2C_JOIN_(a, b)

namespace c2c::cpu {
namespace {

constexpr int kLanes = 16;  // partial sums, so that a reduction vectorises in a fixed order
// Rows and heads whose partial sums fit the registers together.
#if defined(__AVX512F__)
constexpr int kTile = 4;
#else
constexpr int kTile = 2;
#endif

template <class C>
const C* token(const CacheView& view, int64_t batch, int64_t head, int64_t n) {
  return static_cast<const C*>(view.data) + batch * view.stride[0] + head * view.stride[1] +
         n * view.stride[2];
}
template <class C>
C* mutable_token(const CacheView& view, int64_t batch, int64_t head, int64_t n) {
  return static_cast<C*>(view.data) + batch * view.stride[0] + head * view.stride[1] +
         n * view.stride[2];
}

void copy_token(const CacheView& view, HeadShape shape, int64_t batch, int64_t n, uint16_t* to) {
  for (int64_t head = 0; head < shape.heads; ++head, to += shape.dim) {
    const Bfloat16* from = token<Bfloat16>(view, batch, head, n);
    if (view.stride[3] == 1) {
      for (int64_t d = 0; d < shape.dim; ++d) to[d] = from[d].bits;
    } else {
      for (int64_t d = 0; d < shape.dim; ++d) to[d] = from[d * view.stride[3]].bits;
    }
  }
}

void gather_rounded(const CacheView& sharer, HeadShape sharer_shape, const CacheView& base,
                    HeadShape base_shape, const Row* rows, int64_t count, RoundedRows c) {
  const int64_t sharer_width = sharer_shape.heads * sharer_shape.dim;
  const int64_t width = sharer_width + base_shape.heads * base_shape.dim;
  for (int64_t r = 0; r < count; ++r) {
    uint16_t* to = c.data + r * c.stride;
    copy_token(sharer, sharer_shape, rows[r].batch, rows[r].source, to);
    copy_token(base, base_shape, rows[r].batch, rows[r].token, to + sharer_width);
    to[width] = 0;
  }
}

template <class C, class T>
void widen_token(const CacheView& view, HeadShape shape, int64_t batch, int64_t n, T* to) {
  for (int64_t head = 0; head < shape.heads; ++head, to += shape.dim) {
    const C* from = token<C>(view, batch, head, n);
    if (view.stride[3] == 1) {
      for (int64_t d = 0; d < shape.dim; ++d) to[d] = widen(from[d]);
    } else {
      for (int64_t d = 0; d < shape.dim; ++d) to[d] = widen(from[d * view.stride[3]]);
    }
  }
}

template <class C, class T>
void gather(const CacheView& sharer, HeadShape sharer_shape, const CacheView& base,
            HeadShape base_shape, const Row* rows, int64_t count, T* c) {
  const int64_t sharer_width = sharer_shape.heads * sharer_shape.dim;
  const int64_t base_width = base_shape.heads * base_shape.dim;
  for (int64_t r = 0; r < count; ++r, c += sharer_width + base_width) {
    widen_token<C>(sharer, sharer_shape, rows[r].batch, rows[r].source, c);
    widen_token<C>(base, base_shape, rows[r].batch, rows[r].token, c + sharer_width);
  }
}

void round_row(const float* x, int64_t cols, uint16_t* out) {
  for (int64_t i = 0; i < cols; ++i) {
    Bfloat16 rounded;
    narrow(x[i], &rounded);
    out[i] = rounded.bits;
  }
  out[cols] = 0;
}
void round_row(const double*, int64_t, uint16_t*) {}  // never asked for

template <class T>
struct Lanes {
  typedef T type __attribute__((vector_size(kLanes * sizeof(T))));
};

// out[r][j] = x[r] . y[j]. Several side by side: the additions of one dot product wait for each
// other, and what is loaded serves all of them.
template <int kRows, int kCount, class T>
void dots(const T* x, int64_t ldx, const T* y, int64_t cols, T* out, int64_t ldo) {
  using Vector = typename Lanes<T>::type;
  Vector partial[kRows][kCount] = {};
  int64_t i = 0;
  for (; i + kLanes <= cols; i += kLanes) {
    Vector theirs[kCount];
    for (int j = 0; j < kCount; ++j) std::memcpy(&theirs[j], y + j * cols + i, sizeof(Vector));
    for (int r = 0; r < kRows; ++r) {
      Vector ours;
      std::memcpy(&ours, x + r * ldx + i, sizeof(Vector));
      for (int j = 0; j < kCount; ++j) partial[r][j] += ours * theirs[j];
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int j = 0; j < kCount; ++j) {
      for (int64_t rest = i; rest < cols; ++rest) {
        partial[r][j][rest % kLanes] += x[r * ldx + rest] * y[j * cols + rest];
      }
      T sum = 0;
      for (int lane = 0; lane < kLanes; ++lane) sum += partial[r][j][lane];
      out[r * ldo + j] = sum;
    }
  }
}

template <class T>
T reciprocal_rms(const T* z, int64_t cols) {
  T squares;
  dots<1, 1>(z, 0, z, cols, &squares, 0);
  return T(1) / std::sqrt(squares / static_cast<T>(cols) + static_cast<T>(kRmsEps));
}

template <class T>
void bias_stats(T* z, const T* bias, int64_t count, int64_t cols, T* rstd, RoundedRows rounded) {
  for (int64_t r = 0; r < count; ++r, z += cols) {
    for (int64_t i = 0; i < cols; ++i) z[i] += bias[i];
    rstd[r] = reciprocal_rms(z, cols);
    if (rounded.data != nullptr) round_row(z, cols, rounded.data + r * rounded.stride);
  }
}

template <Activation kActivation, class T>
void scale_activate_as(const T* a, int64_t lda, const T* rstd, int64_t count, int64_t cols, T* out,
                       int64_t ldo) {
  for (int64_t r = 0; r < count; ++r, a += lda, out += ldo) {
    const T scale = rstd[r];
    for (int64_t i = 0; i < cols; ++i) out[i] = activate<kActivation>(scale * a[i]);
  }
}

template <Activation kActivation, class T>
void scale_activate_rounded_as(const T* a, int64_t lda, const T* rstd, int64_t count, int64_t cols,
                               RoundedRows out) {
  for (int64_t r = 0; r < count; ++r, a += lda) {
    const T scale = rstd[r];
    uint16_t* to = out.data + r * out.stride;
    for (int64_t i = 0; i < cols; ++i) {
      Bfloat16 rounded;
      narrow(static_cast<float>(activate<kActivation>(scale * a[i])), &rounded);
      to[i] = rounded.bits;
    }
  }
}

template <class T>
void scale_activate(const T* a, int64_t lda, const T* rstd, int64_t count, int64_t cols,
                    Activation activation, T* out, int64_t ldo) {
  switch (activation) {
    case Activation::kGelu:
      return scale_activate_as<Activation::kGelu>(a, lda, rstd, count, cols, out, ldo);
    case Activation::kRelu:
      return scale_activate_as<Activation::kRelu>(a, lda, rstd, count, cols, out, ldo);
    case Activation::kSilu:
      return scale_activate_as<Activation::kSilu>(a, lda, rstd, count, cols, out, ldo);
  }
}

template <class T>
void scale_activate_rounded(const T* a, int64_t lda, const T* rstd, int64_t count, int64_t cols,
                            Activation activation, RoundedRows out) {
  switch (activation) {
    case Activation::kGelu:
      return scale_activate_rounded_as<Activation::kGelu>(a, lda, rstd, count, cols, out);
    case Activation::kRelu:
      return scale_activate_rounded_as<Activation::kRelu>(a, lda, rstd, count, cols, out);
    case Activation::kSilu:
      return scale_activate_rounded_as<Activation::kSilu>(a, lda, rstd, count, cols, out);
  }
}

template <class T>
void residual_stats(const T* z, int64_t ldz, const T* delta, int64_t count, int64_t cols, T* out,
                    int64_t ldo, T* rstd, RoundedRows rounded) {
  for (int64_t r = 0; r < count; ++r, z += ldz, delta += cols, out += ldo) {
    for (int64_t i = 0; i < cols; ++i) out[i] = z[i] + delta[i];
    if (rstd != nullptr) rstd[r] = reciprocal_rms(out, cols);
    if (rounded.data != nullptr) round_row(out, cols, rounded.data + r * rounded.stride);
  }
}

template <int kRows, class T>
void head_rows(const T* x, int64_t ldx, const T* weight, int64_t cols, int64_t heads, T* logits) {
  int64_t head = 0;
  for (; head + kTile <= heads; head += kTile) {
    dots<kRows, kTile>(x, ldx, weight + head * cols, cols, logits + head, heads);
  }
  for (; head < heads; ++head) {
    dots<kRows, 1>(x, ldx, weight + head * cols, cols, logits + head, heads);
  }
}

template <class T>
void head_logits(const T* x, int64_t ldx, const T* weight, int64_t count, int64_t cols,
                 int64_t heads, T* logits) {
  int64_t r = 0;
  for (; r + kTile <= count; r += kTile) {
    head_rows<kTile>(x + r * ldx, ldx, weight, cols, heads, logits + r * heads);
  }
  for (; r < count; ++r) head_rows<1>(x + r * ldx, ldx, weight, cols, heads, logits + r * heads);
}

template <Integration kIntegration, class C, class T>
void combine_as(const CacheView& base, const CacheView& out, HeadShape shape, const Row* rows,
                int64_t count, const T* projected, const T* projected_bias, const T* weighting,
                const T* weighting_bias, bool accumulate) {
  const CacheView& from = accumulate ? out : base;
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t head = 0; head < shape.heads; ++head) {
      const T w = weighting == nullptr
                      ? T(1)
                      : sigmoid(weighting[r * shape.heads + head] + weighting_bias[head]);
      const T* p = projected + (r * shape.heads + head) * shape.dim;
      const T* bias = projected_bias + head * shape.dim;
      const C* f = token<C>(from, rows[r].batch, head, rows[r].token);
      const C* t = token<C>(base, rows[r].batch, head, rows[r].token);
      C* o = mutable_token<C>(out, rows[r].batch, head, rows[r].token);
      const auto fused = [&](const C& f_d, const C& t_d, int64_t d) {
        return integrate<kIntegration, T>(widen(f_d), widen(t_d), w, p[d] + bias[d], accumulate);
      };
      if (base.stride[3] == 1 && out.stride[3] == 1) {
        for (int64_t d = 0; d < shape.dim; ++d) narrow(fused(f[d], t[d], d), &o[d]);
      } else {
        for (int64_t d = 0; d < shape.dim; ++d) {
          narrow(fused(f[d * from.stride[3]], t[d * base.stride[3]], d), &o[d * out.stride[3]]);
        }
      }
    }
  }
}

template <class C, class T>
void combine(const CacheView& base, const CacheView& out, HeadShape shape, const Row* rows,
             int64_t count, const T* projected, const T* projected_bias, const T* weighting,
             const T* weighting_bias, Integration integration, bool accumulate) {
  const auto run = [&](auto kernel) {
    kernel(base, out, shape, rows, count, projected, projected_bias, weighting, weighting_bias,
           accumulate);
  };
  switch (integration) {
    case Integration::kResidual:
      return run(combine_as<Integration::kResidual, C, T>);
    case Integration::kInterpolation:
      return run(combine_as<Integration::kInterpolation, C, T>);
    case Integration::kReplacement:
      return run(combine_as<Integration::kReplacement, C, T>);
  }
}

template <class C>
void copy(const CacheView& base, const CacheView& out, HeadShape shape, const Row* rows,
          int64_t count) {
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t head = 0; head < shape.heads; ++head) {
      const C* t = token<C>(base, rows[r].batch, head, rows[r].token);
      C* o = mutable_token<C>(out, rows[r].batch, head, rows[r].token);
      for (int64_t d = 0; d < shape.dim; ++d) o[d * out.stride[3]] = t[d * base.stride[3]];
    }
  }
}

template <class C, class T>
RowKernels<T> table() {
  return {C2C_STRING(C2C_ISA),
          gather<C, T>,
          std::is_same_v<C, Bfloat16> ? gather_rounded : nullptr,
          bias_stats<T>,
          scale_activate<T>,
          scale_activate_rounded<T>,
          residual_stats<T>,
          head_logits<T>,
          combine<C, T>,
          copy<C>};
}

}  // namespace

RowKernels<double> C2C_JOIN(float64_kernels_, C2C_ISA)() { return table<double, double>(); }
RowKernels<float> C2C_JOIN(float32_kernels_, C2C_ISA)() { return table<float, float>(); }
RowKernels<float> C2C_JOIN(bfloat16_kernels_, C2C_ISA)() { return table<Bfloat16, float>(); }
RowKernels<float> C2C_JOIN(float16_kernels_, C2C_ISA)() { return table<Float16, float>(); }

}  // namespace c2c::cpu
