// c2c::stage_*: the stages of c2c::fuse_ on the CPU one by one, for tests and benchmarks.
#include <sstream>
#include <stdexcept>
#include <vector>

#include "../fuse_op.h"
#include "stages.h"

namespace c2c {
namespace {

using cpu::for_rows;
using cpu::HeadShape;
using cpu::Matrices;
using cpu::Row;
using torch::headeronly::ScalarType;

template <class... Parts>
void check(bool holds, const Parts&... parts) {
  if (holds) return;
  std::ostringstream message;
  message << "c2c::stage_";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

bool is_cache_type(const Tensor& t) {
  const ScalarType type = t.scalar_type();
  return type == ScalarType::Double || type == ScalarType::Float || type == ScalarType::BFloat16 ||
         type == ScalarType::Half;
}

// The dtype of sums for caches or weights of a dtype.
ScalarType sums_of(ScalarType type) {
  return type == ScalarType::Double ? type : ScalarType::Float;
}

// A contiguous tensor of the given dtype and shape; -1 stands for any size.
void check_tensor(const char* op, const char* name, const Tensor& t, ScalarType dtype,
                  const std::vector<int64_t>& shape) {
  check(
      t.is_cpu() && t.scalar_type() == dtype && t.is_contiguous(), op, ": ", name,
      " must be a contiguous CPU tensor in the dtype of sums (float64 for float64, else float32)");
  check(t.dim() == static_cast<int64_t>(shape.size()), op, ": ", name, " must have ", shape.size(),
        " dimensions, got ", t.dim());
  for (size_t d = 0; d < shape.size(); ++d) {
    check(shape[d] < 0 || t.size(d) == shape[d], op, ": ", name, " dim ", d, " must equal ",
          shape[d], ", got ", t.size(d));
  }
}

void check_sums(const char* op, const char* name, const Tensor& t) {
  check(t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::Double, op, ": ",
        name, " must be float32 or float64");
}

void check_cache(const char* op, const char* name, const Tensor& t, const Tensor& like) {
  check(t.is_cpu() && is_cache_type(t) && t.scalar_type() == like.scalar_type() && t.dim() == 4, op,
        ": ", name, " must be a [B, H, N, D] CPU tensor of a cache dtype, as the other caches");
}

template <class T>
Matrices<T> matrices(const Tensor& t) {  // [G, M, cols]
  return {static_cast<T*>(t.data_ptr()), t.size(1) * t.size(2), t.size(2)};
}

template <class T>
T* vector(const Tensor& t, int64_t g) {  // row g of [G, n]
  return static_cast<T*>(t.data_ptr()) + g * t.size(1);
}

// Calls f(T{}) with the C++ type of sums.
template <class F>
void with_type(ScalarType type, const F& f) {
  if (type == ScalarType::Double) {
    f(double{});
  } else {
    f(float{});
  }
}

CacheType sums_type(ScalarType type) {
  return type == ScalarType::Double ? CacheType::kFloat64 : CacheType::kFloat32;
}

std::vector<Row> all_rows(const Tensor& base) {
  std::vector<Row> rows;
  for (int64_t b = 0; b < base.size(0); ++b) {
    for (int64_t n = 0; n < base.size(2); ++n) {
      rows.push_back({static_cast<int32_t>(b), static_cast<int32_t>(n), static_cast<int32_t>(n)});
    }
  }
  return rows;
}

}  // namespace

void stage_gather(Tensor out, Tensor sharer, Tensor base) {
  check_cache("gather", "sharer", sharer, base);
  check_cache("gather", "base", base, base);
  check(sharer.size(0) == base.size(0) && sharer.size(2) >= base.size(2),
        "gather: sharer must have the batch and at least the tokens of base");
  const HeadShape s{sharer.size(1), sharer.size(3)}, t{base.size(1), base.size(3)};
  const int64_t width = s.heads * s.dim + t.heads * t.dim;
  check_tensor("gather", "out", out, sums_of(base.scalar_type()),
               {base.size(0) * base.size(2), width});
  const std::vector<Row> rows = all_rows(base);
  with_type(out.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto& kernels = cpu::row_kernels<T>(cache_type(base.scalar_type()));
    T* to = static_cast<T*>(out.data_ptr());
    for_rows(1, static_cast<int64_t>(rows.size()), width, [&](int64_t, int64_t r, int64_t n) {
      kernels.gather(view_of(sharer), s, view_of(base), t, rows.data() + r, n, to + r * width);
    });
  });
}

void stage_bias_stats(Tensor z, Tensor rstd, Tensor bias) {
  check_sums("bias_stats", "z", z);
  check_tensor("bias_stats", "z", z, z.scalar_type(), {-1, -1, -1});
  check_tensor("bias_stats", "rstd", rstd, z.scalar_type(), {z.size(0), z.size(1)});
  check_tensor("bias_stats", "bias", bias, z.scalar_type(), {z.size(0), z.size(2)});
  with_type(z.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto& kernels = cpu::row_kernels<T>(sums_type(z.scalar_type()));
    const auto m = matrices<T>(z);
    for_rows(z.size(0), z.size(1), z.size(2), [&](int64_t g, int64_t r, int64_t n) {
      kernels.bias_stats(m.row(g, r), vector<T>(bias, g), n, z.size(2), vector<T>(rstd, g) + r, {});
    });
  });
}

void stage_multiply(Tensor out, Tensor x, Tensor panels) {
  check_sums("multiply", "x", x);
  check(panels.is_cpu() && is_cache_type(panels) && panels.is_contiguous() && panels.dim() == 5,
        "multiply: panels must be a contiguous [G, n / 16, k / pair, 16, pair] CPU tensor of a "
        "cache dtype");
  const ScalarType sums = sums_of(panels.scalar_type());
  check_tensor("multiply", "x", x, sums, {panels.size(0), -1, -1});
  check_tensor("multiply", "out", out, sums, {panels.size(0), x.size(1), -1});
  const CacheType type = cache_type(panels.scalar_type());
  const int64_t pair = cpu::weight_pair(type), depth = x.size(2), cols = out.size(2);
  check(panels.size(1) == (cols + cpu::kPanel - 1) / cpu::kPanel &&
            panels.size(2) == (depth + pair - 1) / pair && panels.size(3) == cpu::kPanel &&
            panels.size(4) == pair,
        "multiply: panels must stand for [G, ", cols, ", ", depth, "] (the columns of out and x)");
  if (out.numel() == 0) return;
  with_type(sums, [&](auto zero) {
    using T = decltype(zero);
    const auto& gemm = cpu::panel_gemm<T>(type);
    const int64_t streams = x.size(0), rows = x.size(1);
    const int64_t elements = streams * rows * cpu::rounded_elements(gemm, depth);
    const Tensor scratch = torch::stable::empty({&elements, 1}, sums);
    const int64_t ld = cpu::rounded_stride(depth);
    const Matrices<uint16_t> rounded{static_cast<uint16_t*>(scratch.data_ptr()), rows * ld, ld};
    cpu::round_inputs(gemm, streams, rows, matrices<T>(x), depth, rounded);
    cpu::multiply(gemm, type, streams, rows, matrices<T>(out), cols, matrices<T>(x), depth,
                  panels.const_data_ptr(), rounded);
  });
}

void stage_scale_activate(Tensor out, Tensor x, Tensor rstd, std::string activation) {
  const Activation kind = parse_activation(activation);
  check_sums("scale_activate", "x", x);
  check_tensor("scale_activate", "x", x, x.scalar_type(), {-1, -1, -1});
  check_tensor("scale_activate", "out", out, x.scalar_type(), {x.size(0), x.size(1), x.size(2)});
  check_tensor("scale_activate", "rstd", rstd, x.scalar_type(), {x.size(0), x.size(1)});
  with_type(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto& kernels = cpu::row_kernels<T>(sums_type(x.scalar_type()));
    const auto from = matrices<T>(x), to = matrices<T>(out);
    for_rows(x.size(0), x.size(1), x.size(2), [&](int64_t g, int64_t r, int64_t n) {
      kernels.scale_activate(from.row(g, r), from.row_stride, vector<T>(rstd, g) + r, n, x.size(2),
                             kind, to.row(g, r), to.row_stride);
    });
  });
}

void stage_residual_stats(Tensor out, Tensor rstd, Tensor z, Tensor delta) {
  check_sums("residual_stats", "z", z);
  check_tensor("residual_stats", "z", z, z.scalar_type(), {-1, -1, -1});
  const std::vector<int64_t> shape{z.size(0), z.size(1), z.size(2)};
  check_tensor("residual_stats", "out", out, z.scalar_type(), shape);
  check_tensor("residual_stats", "delta", delta, z.scalar_type(), shape);
  check_tensor("residual_stats", "rstd", rstd, z.scalar_type(), {z.size(0), z.size(1)});
  with_type(z.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto& kernels = cpu::row_kernels<T>(sums_type(z.scalar_type()));
    const auto from = matrices<T>(z), add = matrices<T>(delta), to = matrices<T>(out);
    for_rows(z.size(0), z.size(1), z.size(2), [&](int64_t g, int64_t r, int64_t n) {
      kernels.residual_stats(from.row(g, r), from.row_stride, add.row(g, r), n, z.size(2),
                             to.row(g, r), to.row_stride, vector<T>(rstd, g) + r, {});
    });
  });
}

void stage_head(Tensor logits, Tensor x, Tensor weight) {
  check_sums("head", "x", x);
  check_tensor("head", "x", x, x.scalar_type(), {-1, -1, -1});
  check_tensor("head", "weight", weight, x.scalar_type(), {x.size(0), -1, x.size(2)});
  check_tensor("head", "logits", logits, x.scalar_type(), {x.size(0), x.size(1), weight.size(1)});
  with_type(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto& kernels = cpu::row_kernels<T>(sums_type(x.scalar_type()));
    const auto from = matrices<T>(x), w = matrices<T>(weight), to = matrices<T>(logits);
    const int64_t heads = weight.size(1), cols = x.size(2);
    for_rows(x.size(0), x.size(1), heads * cols, [&](int64_t g, int64_t r, int64_t n) {
      kernels.head_logits(from.row(g, r), cols, w.row(g, 0), n, cols, heads, to.row(g, r));
    });
  });
}

void stage_combine(Tensor out, Tensor base, Tensor projected, Tensor bias, Tensor logits,
                   Tensor head_bias, std::string integration) {
  const Integration how = parse_integration(integration);
  check_cache("combine", "base", base, base);
  check_cache("combine", "out", out, base);
  for (int64_t d = 0; d < 4; ++d) {
    check(out.size(d) == base.size(d), "combine: out dim ", d, " must equal ", base.size(d),
          " (base), got ", out.size(d));
    check(out.size(d) <= 1 || out.stride(d) > 0, "combine: out must not overlap itself");
  }
  const HeadShape shape{base.size(1), base.size(3)};
  const ScalarType sums = sums_of(base.scalar_type());
  const int64_t width = shape.heads * shape.dim, count = base.size(0) * base.size(2);
  check_tensor("combine", "projected", projected, sums, {count, width});
  check_tensor("combine", "bias", bias, sums, {width});
  check_tensor("combine", "logits", logits, sums, {count, shape.heads});
  check_tensor("combine", "head_bias", head_bias, sums, {shape.heads});
  const std::vector<Row> rows = all_rows(base);
  with_type(sums, [&](auto zero) {
    using T = decltype(zero);
    const auto data = [](const Tensor& t) { return static_cast<const T*>(t.const_data_ptr()); };
    const auto& kernels = cpu::row_kernels<T>(cache_type(base.scalar_type()));
    for_rows(1, count, width, [&](int64_t, int64_t r, int64_t n) {
      kernels.combine(view_of(base), view_of(out), shape, rows.data() + r, n,
                      data(projected) + r * width, data(bias), data(logits) + r * shape.heads,
                      data(head_bias), how, false);
    });
  });
}

}  // namespace c2c
