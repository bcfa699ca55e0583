// The training kernels that read or write the caches: gather, combine and its backward, and where
// the gradients of what was gathered go. Part of train_kernels.cpp.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "train_rows.h"

namespace c2c::cpu {
namespace {

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

}  // namespace
}  // namespace c2c::cpu
