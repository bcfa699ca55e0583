// The CPU kernels of the training ops (see train_kernels.h). CMake compiles this file once per
// instruction set with C2C_ISA naming it; nothing here may have external linkage but the table.
#include "train_kernels.h"

#include <algorithm>
#include <type_traits>

#include "train_cache_rows.h"
#include "train_packing.h"
#include "train_rows.h"

#ifndef C2C_ISA
#error "C2C_ISA must name the instruction set this file is compiled for"
#endif
#define C2C_JOIN_(a, b) a##b
#define C2C_JOIN(a, b) C2C_JOIN_(a, b)

namespace c2c::cpu {
namespace {

// What dropout multiplies columns [first, first + count) of a row by; first is a multiple of 4.
// Several groups side by side, so that the rounds vectorise.
constexpr int64_t kDropoutColumns = 64;
template <class S>
void dropout_factors(const Dropout& d, DropoutRow row, int64_t first, int64_t count, S* factors) {
  constexpr int kGroups = kDropoutColumns / 4;
  uint32_t words[kGroups][4];
  const uint64_t group = row.first_group + static_cast<uint64_t>(first / 4);
  for (int j = 0; j < kGroups; ++j) {
    const PhiloxWords w = philox(row.seed, d.offset, group + static_cast<uint64_t>(j));
    for (int k = 0; k < 4; ++k) words[j][k] = w.word[k];
  }
  const S scale = static_cast<S>(d.scale);
  for (int64_t i = 0; i < count; ++i) {
    factors[i] = words[i / 4][i % 4] >= d.threshold ? scale : S(0);
  }
}

// f(first column, columns, factors) for all columns of a row.
template <class S, class F>
void for_dropout(const Dropout& d, int64_t stream, int64_t row, int64_t cols, const F& f) {
  const DropoutRow drawn = dropout_row(d, static_cast<uint64_t>(stream), static_cast<uint64_t>(row),
                                       static_cast<uint64_t>(cols));
  S factors[kDropoutColumns];
  for (int64_t first = 0; first < cols; first += kDropoutColumns) {
    const int64_t count = std::min(kDropoutColumns, cols - first);
    dropout_factors(d, drawn, first, count, factors);
    f(first, count, factors);
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
void residual_norm(Rows z, Rows delta, const Dropout& dropout, int64_t stream, int64_t first_row,
                   Rows out, Rows n, int64_t count, int64_t cols, void* scratch) {
  S* wide = static_cast<S*>(scratch);
  for (int64_t r = 0; r < count; ++r) {
    const C *from = row<C>(z, r), *d = row<C>(delta, r);
    C* to = row<C>(out, r);
    if (dropout.threshold == 0) {
      for (int64_t i = 0; i < cols; ++i)
        wide[i] = store<C, S>(widen(from[i]) + widen(d[i]), &to[i]);
    } else {
      for_dropout<S>(dropout, stream, first_row + r, cols,
                     [&](int64_t first, int64_t width, const S* by) {
                       for (int64_t j = 0; j < width; ++j) {
                         const int64_t i = first + j;
                         wide[i] = store<C, S>(widen(from[i]) + by[j] * widen(d[i]), &to[i]);
                       }
                     });
    }
    if (n.data != nullptr) write_norm(wide, cols, row<C>(n, r));
  }
}

template <class C, class S>
void dropout_backward(Rows dz, const Dropout& dropout, int64_t stream, int64_t first_row, Rows dd,
                      int64_t count, int64_t cols) {
  for (int64_t r = 0; r < count; ++r) {
    const C* from = row<C>(dz, r);
    C* to = row<C>(dd, r);
    for_dropout<S>(dropout, stream, first_row + r, cols,
                   [&](int64_t first, int64_t width, const S* by) {
                     for (int64_t j = 0; j < width; ++j)
                       narrow(by[j] * widen(from[first + j]), &to[first + j]);
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
          pack_panels<C, S>,
          std::is_same_v<C, Bfloat16> ? pack_even_rows : nullptr,
          std::is_same_v<C, Bfloat16> ? pack_pairs : nullptr};
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
