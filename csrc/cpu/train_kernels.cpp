// The CPU kernels of the training ops (see train_kernels.h). CMake compiles this file once per
// instruction set with C2C_ISA naming it; nothing here may have external linkage but the table.
#include "train_kernels.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "../train/train_math.h"
#include "panel_gemm.h"

#ifndef C2C_ISA
#error "C2C_ISA must name the instruction set this file is compiled for"
#endif
#define C2C_JOIN_(a, b) a##b
#define C2C_JOIN(a, b) C2C_JOIN_(a, b)

namespace c2c::cpu {
namespace {

constexpr int kLanes = 16;  // partial sums, so that a reduction vectorises in a fixed order

template <class C>
C* row(const Rows& rows, int64_t r) {
  return static_cast<C*>(rows.data) + r * rows.stride;
}

template <class C>
C* token(const CacheView& view, int64_t batch, int64_t head, int64_t n) {
  return static_cast<C*>(view.data) + batch * view.stride[0] + head * view.stride[1] +
         n * view.stride[2];
}

template <class C, class S>
void load(const C* from, int64_t stride, int64_t count, S* to) {
  if (stride == 1) {
    for (int64_t i = 0; i < count; ++i) to[i] = widen(from[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = widen(from[i * stride]);
  }
}

template <class T>
T dot(const T* x, const T* y, int64_t count) {
  typedef T Vector __attribute__((vector_size(kLanes * sizeof(T))));
  Vector partial = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    Vector a, b;
    std::memcpy(&a, x + i, sizeof(Vector));
    std::memcpy(&b, y + i, sizeof(Vector));
    partial += a * b;
  }
  for (; i < count; ++i) partial[i % kLanes] += x[i] * y[i];
  T sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += partial[lane];
  return sum;
}

template <class T>
T reciprocal_rms(const T* z, int64_t cols) {
  return T(1) / std::sqrt(dot(z, z, cols) / static_cast<T>(cols) + static_cast<T>(kRmsEps));
}

// What dropout multiplies columns [first, first + count) of a row by; first is a multiple of 4.
// Several groups side by side, so that the rounds vectorise.
constexpr int64_t kDropoutColumns = 64;
template <class S>
void dropout_factors(const Dropout& d, uint64_t row_group, int64_t first, int64_t count,
                     S* factors) {
  constexpr int kGroups = kDropoutColumns / 4;
  uint32_t words[kGroups][4];
  const uint64_t group = row_group + static_cast<uint64_t>(first / 4);
  for (int j = 0; j < kGroups; ++j) {
    const PhiloxWords w = philox(d.seed, d.offset, group + static_cast<uint64_t>(j));
    for (int k = 0; k < 4; ++k) words[j][k] = w.word[k];
  }
  const S scale = static_cast<S>(d.scale);
  for (int64_t i = 0; i < count; ++i) {
    factors[i] = words[i / 4][i % 4] >= d.threshold ? scale : S(0);
  }
}

// f(first column, columns, factors) for all columns of a row.
template <class S, class F>
void for_dropout(const Dropout& d, int64_t row, int64_t cols, const F& f) {
  const uint64_t row_group =
      d.first_group + static_cast<uint64_t>(row) * static_cast<uint64_t>((cols + 3) / 4);
  S factors[kDropoutColumns];
  for (int64_t first = 0; first < cols; first += kDropoutColumns) {
    const int64_t count = std::min(kDropoutColumns, cols - first);
    dropout_factors(d, row_group, first, count, factors);
    f(first, count, factors);
  }
}

template <class C>
void copy_token(const CacheView& view, HeadShape shape, int64_t batch, int64_t n, C* to) {
  for (int64_t head = 0; head < shape.heads; ++head, to += shape.dim) {
    const C* from = token<C>(view, batch, head, n);
    if (view.stride[3] == 1) {
      std::memcpy(to, from, shape.dim * sizeof(C));
    } else {
      for (int64_t d = 0; d < shape.dim; ++d) to[d] = from[d * view.stride[3]];
    }
  }
}

template <class C>
void gather(const CacheView& sharer, HeadShape sharer_shape, const CacheView& base,
            HeadShape base_shape, const Row* rows, int64_t count, Rows c) {
  const int64_t sharer_width = sharer_shape.heads * sharer_shape.dim;
  const int64_t width = sharer_width + base_shape.heads * base_shape.dim;
  for (int64_t r = 0; r < count; ++r) {
    C* to = row<C>(c, r);
    if (rows[r].source < 0) {
      std::memset(static_cast<void*>(to), 0, width * sizeof(C));
      continue;
    }
    copy_token(sharer, sharer_shape, rows[r].batch, rows[r].source, to);
    copy_token(base, base_shape, rows[r].batch, rows[r].token, to + sharer_width);
  }
}

template <class C, class S>
void write_norm(const S* z, int64_t cols, C* n) {
  const S rstd = reciprocal_rms(z, cols);
  for (int64_t i = 0; i < cols; ++i) narrow(z[i] * rstd, &n[i]);
}

// As stored: rounded to C.
template <class C, class S>
S store(S value, C* to) {
  narrow(value, to);
  return widen(*to);
}

template <class C, class S>
void bias_norm(Rows z, const void* bias, Rows n, int64_t count, int64_t cols, void* scratch) {
  S* wide = static_cast<S*>(scratch);
  const S* b = static_cast<const S*>(bias);
  for (int64_t r = 0; r < count; ++r) {
    C* own = row<C>(z, r);
    if (b == nullptr) {
      load(own, 1, cols, wide);
    } else {
      for (int64_t i = 0; i < cols; ++i) wide[i] = store<C, S>(widen(own[i]) + b[i], &own[i]);
    }
    write_norm(wide, cols, row<C>(n, r));
  }
}

template <class F>
void for_activation(Activation activation, const F& f) {
  switch (activation) {
    case Activation::kGelu:
      return f(std::integral_constant<Activation, Activation::kGelu>());
    case Activation::kRelu:
      return f(std::integral_constant<Activation, Activation::kRelu>());
    case Activation::kSilu:
      return f(std::integral_constant<Activation, Activation::kSilu>());
  }
}

template <class F>
void for_integration(Integration integration, const F& f) {
  switch (integration) {
    case Integration::kResidual:
      return f(std::integral_constant<Integration, Integration::kResidual>());
    case Integration::kInterpolation:
      return f(std::integral_constant<Integration, Integration::kInterpolation>());
    case Integration::kReplacement:
      return f(std::integral_constant<Integration, Integration::kReplacement>());
  }
}

template <class C>
void activate_rows(Activation activation, Rows u, Rows h, int64_t count, int64_t cols) {
  for_activation(activation, [&](auto kind) {
    for (int64_t r = 0; r < count; ++r) {
      const C* from = row<C>(u, r);
      C* to = row<C>(h, r);
      for (int64_t i = 0; i < cols; ++i)
        narrow(activate<decltype(kind)::value>(widen(from[i])), &to[i]);
    }
  });
}

template <class C, class S>
void residual_norm(Rows z, Rows delta, const Dropout& dropout, int64_t first_row, Rows out, Rows n,
                   int64_t count, int64_t cols, void* scratch) {
  S* wide = static_cast<S*>(scratch);
  for (int64_t r = 0; r < count; ++r) {
    const C *from = row<C>(z, r), *d = row<C>(delta, r);
    C* to = row<C>(out, r);
    if (dropout.threshold == 0) {
      for (int64_t i = 0; i < cols; ++i)
        wide[i] = store<C, S>(widen(from[i]) + widen(d[i]), &to[i]);
    } else {
      for_dropout<S>(dropout, first_row + r, cols, [&](int64_t first, int64_t width, const S* by) {
        for (int64_t j = 0; j < width; ++j) {
          const int64_t i = first + j;
          wide[i] = store<C, S>(widen(from[i]) + by[j] * widen(d[i]), &to[i]);
        }
      });
    }
    if (n.data != nullptr) write_norm(wide, cols, row<C>(n, r));
  }
}

// Gate and weight of one head of a row.
template <class S>
S gate_of(const GateView& gate, const Row& row, int64_t head) {
  return gate.data == nullptr
             ? S(1)
             : static_cast<const S*>(gate.data)[row.batch * gate.stride[0] + head * gate.stride[1] +
                                                row.token * gate.stride[2]];
}
template <class C, class S>
S weight_of(const FusedRows& f, int64_t r, int64_t head) {
  if (f.logits.data == nullptr) return S(1);
  return sigmoid(widen(row<C>(f.logits, r)[head]) + static_cast<const S*>(f.head_bias)[head]);
}

template <Integration kIntegration, class C, class S>
void combine_row(const FusedRows& f, const CacheView& out, int64_t r) {
  const Row& at = f.rows[r];
  for (int64_t head = 0; head < f.shape.heads; ++head) {
    const C* t = token<C>(f.base, at.batch, head, at.token);
    C* o = token<C>(out, at.batch, head, at.token);
    const int64_t step = f.base.stride[3];
    const S g = at.source < 0 ? S(0) : gate_of<S>(f.gate, at, head);
    if (g == S(0)) {
      for (int64_t d = 0; d < f.shape.dim; ++d) o[d] = t[d * step];
      continue;
    }
    const S w = weight_of<C, S>(f, r, head);
    const C* p = row<C>(f.projected, r) + head * f.shape.dim;
    const S* bias = static_cast<const S*>(f.out_bias) + head * f.shape.dim;
    const auto value = [&](const C& t_d, int64_t d) {
      return integrate_gated<kIntegration, S>(widen(t_d), g, w, widen(p[d]) + bias[d]);
    };
    if (step == 1) {
      for (int64_t d = 0; d < f.shape.dim; ++d) narrow(value(t[d], d), &o[d]);
    } else {
      for (int64_t d = 0; d < f.shape.dim; ++d) narrow(value(t[d * step], d), &o[d]);
    }
  }
}

template <class C, class S>
void combine(const FusedRows& fused, const CacheView& out) {
  for_integration(fused.integration, [&](auto kind) {
    for (int64_t r = 0; r < fused.count; ++r) {
      combine_row<decltype(kind)::value, C, S>(fused, out, r);
    }
  });
}

template <Integration kIntegration, class C, class S>
void combine_backward_row(const FusedRows& f, const CacheView& grad_out, const FusedGradients& to,
                          int64_t r, S* scratch) {
  const Row& at = f.rows[r];
  const int64_t dim = f.shape.dim;
  S *o = scratch, *t = scratch + dim, *v = scratch + 2 * dim;
  for (int64_t head = 0; head < f.shape.heads; ++head) {
    load(token<C>(grad_out, at.batch, head, at.token), grad_out.stride[3], dim, o);
    C* d_p = row<C>(to.projected, r) + head * dim;
    C* d_logit = to.logits.data == nullptr ? nullptr : row<C>(to.logits, r) + head;
    C* d_t = to.base.data == nullptr ? nullptr : token<C>(to.base, at.batch, head, at.token);
    S* d_gate = to.gate == nullptr ? nullptr
                                   : static_cast<S*>(to.gate) +
                                         (at.batch * f.shape.heads + head) * to.tokens + at.token;
    const S g = at.source < 0 ? S(0) : gate_of<S>(f.gate, at, head);
    const S w = at.source < 0 ? S(0) : weight_of<C, S>(f, r, head);
    const S slope = g == S(0) ? S(1) : base_slope<kIntegration, S>(g, w);
    if (d_t != nullptr) {
      for (int64_t d = 0; d < dim; ++d) narrow(slope * o[d], &d_t[d]);
    }
    if (g == S(0)) {
      for (int64_t d = 0; d < dim; ++d) narrow(S(0), &d_p[d]);
      if (d_logit != nullptr) narrow(S(0), d_logit);
      d_logit = nullptr;
    } else {
      for (int64_t d = 0; d < dim; ++d) narrow(g * w * o[d], &d_p[d]);
    }
    if (at.source < 0) {
      if (d_gate != nullptr) *d_gate = S(0);
      continue;
    }
    if (d_logit == nullptr && d_gate == nullptr) continue;
    const C* p = row<C>(f.projected, r) + head * dim;
    const S* bias = static_cast<const S*>(f.out_bias) + head * dim;
    for (int64_t d = 0; d < dim; ++d) v[d] = widen(p[d]) + bias[d];
    if (kIntegration != Integration::kResidual) {
      load(token<C>(f.base, at.batch, head, at.token), f.base.stride[3], dim, t);
    }
    if (kIntegration == Integration::kInterpolation) {
      for (int64_t d = 0; d < dim; ++d) v[d] -= t[d];
    }
    const S sum = dot(o, v, dim);
    if (d_logit != nullptr) narrow(g * w * (S(1) - w) * sum, d_logit);
    if (d_gate != nullptr) {
      *d_gate = w * sum - (kIntegration == Integration::kReplacement ? dot(o, t, dim) : S(0));
    }
  }
}

template <class C, class S>
void combine_backward(const FusedRows& fused, const CacheView& grad_out, const FusedGradients& to,
                      void* scratch) {
  for_integration(fused.integration, [&](auto kind) {
    for (int64_t r = 0; r < fused.count; ++r) {
      combine_backward_row<decltype(kind)::value, C, S>(fused, grad_out, to, r,
                                                        static_cast<S*>(scratch));
    }
  });
}

template <class C, class S>
void dropout_backward(Rows dz, const Dropout& dropout, int64_t first_row, Rows dd, int64_t count,
                      int64_t cols) {
  for (int64_t r = 0; r < count; ++r) {
    const C* from = row<C>(dz, r);
    C* to = row<C>(dd, r);
    for_dropout<S>(dropout, first_row + r, cols, [&](int64_t first, int64_t width, const S* by) {
      for (int64_t j = 0; j < width; ++j) narrow(by[j] * widen(from[first + j]), &to[first + j]);
    });
  }
}

template <class C>
void activate_backward(Activation activation, Rows u, Rows d, Rows h, int64_t count, int64_t cols) {
  for_activation(activation, [&](auto kind) {
    for (int64_t r = 0; r < count; ++r) {
      const C* from = row<C>(u, r);
      C *gradient = row<C>(d, r), *to = row<C>(h, r);
      for (int64_t i = 0; i < cols; ++i) {
        const auto a = activate_with_slope<decltype(kind)::value>(widen(from[i]));
        narrow(widen(gradient[i]) * a.slope, &gradient[i]);
        narrow(a.value, &to[i]);
      }
    }
  });
}

template <class C, class S>
void norm_backward(Rows z, Rows dn, Rows first, Rows second, Rows dz, Rows n, int64_t count,
                   int64_t cols, void* scratch) {
  S *wide = static_cast<S*>(scratch), *gradient = wide + cols, *rest = wide + 2 * cols;
  for (int64_t r = 0; r < count; ++r) {
    load(row<C>(z, r), 1, cols, wide);
    load(row<C>(dn, r), 1, cols, gradient);
    load(row<C>(first, r), 1, cols, rest);
    if (second.data != nullptr) {
      const C* more = row<C>(second, r);
      for (int64_t i = 0; i < cols; ++i) rest[i] += widen(more[i]);
    }
    const S rstd = reciprocal_rms(wide, cols);
    // mean(dn * n) n = along z
    const S along = dot(gradient, wide, cols) / static_cast<S>(cols) * rstd * rstd;
    C *to = row<C>(dz, r), *normed = row<C>(n, r);
    for (int64_t i = 0; i < cols; ++i) {
      narrow(rest[i] + rstd * (gradient[i] - along * wide[i]), &to[i]);
      narrow(rstd * wide[i], &normed[i]);
    }
  }
}

// In double: a bias gets the sum of thousands of rows.
template <class X, class S>
void column_sums(Rows x, int64_t count, int64_t cols, void* out) {
  double sums[kSumColumns] = {};
  for (int64_t r = 0; r < count; ++r) {
    const X* from = row<X>(x, r);
    for (int64_t i = 0; i < cols; ++i) sums[i] += static_cast<double>(widen(from[i]));
  }
  for (int64_t i = 0; i < cols; ++i) static_cast<S*>(out)[i] = static_cast<S>(sums[i]);
}

template <class C>
void add_base(Rows dc, HeadShape shape, const Row* rows, int64_t count,
              const CacheView& grad_base) {
  for (int64_t r = 0; r < count; ++r) {
    if (rows[r].source < 0) continue;
    for (int64_t head = 0; head < shape.heads; ++head) {
      const C* from = row<C>(dc, r) + head * shape.dim;
      C* to = token<C>(grad_base, rows[r].batch, head, rows[r].token);
      for (int64_t d = 0; d < shape.dim; ++d) narrow(widen(to[d]) + widen(from[d]), &to[d]);
    }
  }
}

template <class C, class S>
void scatter(Rows dc, HeadShape shape, const int64_t* starts, const int64_t* readers, int64_t batch,
             int64_t first, int64_t count, const CacheView& grad_sharer, void* scratch) {
  S* sum = static_cast<S*>(scratch);
  for (int64_t i = first; i < first + count; ++i) {
    for (int64_t head = 0; head < shape.heads; ++head) {
      std::fill(sum, sum + shape.dim, S(0));
      for (int64_t k = starts[i]; k < starts[i + 1]; ++k) {
        const C* from = row<C>(dc, readers[k]) + head * shape.dim;
        for (int64_t d = 0; d < shape.dim; ++d) sum[d] += widen(from[d]);
      }
      C* to = token<C>(grad_sharer, batch, head, i);
      for (int64_t d = 0; d < shape.dim; ++d) narrow(sum[d], &to[d]);
    }
  }
}

template <class C, class S>
void narrow_rows(Rows from, Rows to, int64_t count, int64_t cols) {
  for (int64_t r = 0; r < count; ++r) {
    const S* x = row<S>(from, r);
    C* y = row<C>(to, r);
    for (int64_t i = 0; i < cols; ++i) narrow(x[i], &y[i]);
  }
}

template <class S>
void add_rows(Rows from, Rows to, int64_t count, int64_t cols) {
  for (int64_t r = 0; r < count; ++r) {
    const S* x = row<S>(from, r);
    S* y = row<S>(to, r);
    for (int64_t i = 0; i < cols; ++i) y[i] += x[i];
  }
}

constexpr int64_t kBlock = 16;  // rows and columns that are transposed together

// to[i * ldt + j] = from[j * ldf + i] for i < rows, j < cols, both at most kBlock.
template <class C, class S>
void transpose_block(const C* from, int64_t ldf, int64_t rows, int64_t cols, S* to, int64_t ldt) {
  if (rows == kBlock && cols == kBlock) {
    S tile[kBlock][kBlock];
    for (int64_t j = 0; j < kBlock; ++j) load(from + j * ldf, 1, kBlock, tile[j]);
    for (int64_t i = 0; i < kBlock; ++i) {
      for (int64_t j = 0; j < kBlock; ++j) to[i * ldt + j] = tile[j][i];
    }
    return;
  }
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < cols; ++j) to[i * ldt + j] = widen(from[j * ldf + i]);
  }
}

template <class C, class S>
void pack_rows(StridedMatrix from, int64_t count, int64_t depth, void* rows) {
  const C* data = static_cast<const C*>(from.data);
  S* to = static_cast<S*>(rows);
  if (from.column_stride == 1) {
    for (int64_t r = 0; r < count; ++r) load(data + r * from.row_stride, 1, depth, to + r * depth);
    return;
  }
  for (int64_t r = 0; r < count; r += kBlock) {
    for (int64_t k = 0; k < depth; k += kBlock) {
      transpose_block(data + r + k * from.column_stride, from.column_stride,
                      std::min(kBlock, count - r), std::min(kBlock, depth - k), to + r * depth + k,
                      depth);
    }
  }
}

template <class C, class S>
void pack_panels(StridedMatrix from, int64_t depth, int64_t cols, void* panels) {
  S* to = static_cast<S*>(panels);
  for (int64_t c = 0; c < cols; c += kPanel, to += depth * kPanel) {
    const int64_t wide = std::min(kPanel, cols - c);
    const C* data = static_cast<const C*>(from.data) + c * from.column_stride;
    if (wide < kPanel) std::fill(to, to + depth * kPanel, S(0));
    if (from.column_stride == 1) {
      for (int64_t k = 0; k < depth; ++k) {
        load(data + k * from.row_stride, 1, wide, to + k * kPanel);
      }
    } else {
      for (int64_t k = 0; k < depth; k += kBlock) {
        transpose_block(data + k, from.column_stride, std::min(kBlock, depth - k), wide,
                        to + k * kPanel, kPanel);
      }
    }
  }
}

template <class C, class S>
TrainKernels table() {
  return {gather<C>,
          bias_norm<C, S>,
          activate_rows<C>,
          residual_norm<C, S>,
          combine<C, S>,
          combine_backward<C, S>,
          dropout_backward<C, S>,
          activate_backward<C>,
          norm_backward<C, S>,
          column_sums<C, S>,
          column_sums<S, S>,
          add_base<C>,
          scatter<C, S>,
          narrow_rows<C, S>,
          add_rows<S>,
          pack_rows<C, S>,
          pack_panels<C, S>};
}

}  // namespace

TrainKernels C2C_JOIN(train_kernels_, C2C_ISA)(CacheType type) {
  switch (type) {
    case CacheType::kFloat64:
      return table<double, double>();
    case CacheType::kBfloat16:
      return table<Bfloat16, float>();
    case CacheType::kFloat16:
      return table<Float16, float>();
    default:
      return table<float, float>();
  }
}

}  // namespace c2c::cpu
