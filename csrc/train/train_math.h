// The scalar functions of the training fusion beside those of scalar_math.h. No torch header.
#pragma once

#include "../scalar_math.h"

namespace c2c {
namespace {

template <class T>
struct Activated {
  T value, slope;
};

// An activation and its derivative. relu's is 0 at 0.
template <Activation kActivation, class T>
C2C_HOST_DEVICE Activated<T> activate_with_slope(T x) {
  if constexpr (kActivation == Activation::kGelu) {
    const T below = T(0.5) * (T(1) + erf_fitted(x * T(0.70710678118654752440)));
    const T density = T(0.39894228040143267794) * exp_clamped(T(-0.5) * x * x);
    return {x * below, below + x * density};
  } else if constexpr (kActivation == Activation::kRelu) {
    return {x < T(0) ? T(0) : x, x <= T(0) ? T(0) : (x != x ? x : T(1))};
  } else {
    const T s = sigmoid(x);
    return {x * s, s * (T(1) + x * (T(1) - s))};
  }
}

// The fused value of one channel: base t, gate g, weight w, projection p.
template <Integration kIntegration, class T>
C2C_HOST_DEVICE T integrate_gated(T t, T g, T w, T p) {
  if constexpr (kIntegration == Integration::kResidual) {
    return t + g * w * p;
  } else if constexpr (kIntegration == Integration::kInterpolation) {
    return t + g * w * (p - t);
  } else {
    return (T(1) - g) * t + g * w * p;
  }
}

// d out / d base.
template <Integration kIntegration, class T>
C2C_HOST_DEVICE T base_slope(T g, T w) {
  if constexpr (kIntegration == Integration::kResidual) {
    return T(1);
  } else if constexpr (kIntegration == Integration::kInterpolation) {
    return T(1) - g * w;
  } else {
    return T(1) - g;
  }
}

}  // namespace
}  // namespace c2c
