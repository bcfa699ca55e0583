// Runs run_hopper on the CPU (C2C_EMULATE: its products are plain loops, epilogues and the order of
// stages are the GPU's own code) and compares with the fuser's formulas in float64, rounded where
// the kernels round. test_hopper.py compiles and runs this.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "../csrc/cuda/hopper_gemm.h"

using namespace c2c;
using namespace c2c::cuda;

namespace {

using Numbers = std::vector<double>;

struct Case {
  const char* name;
  Activation activation = Activation::kGelu;
  Integration integration = Integration::kResidual;
  bool accumulate = false, in_place = false, reads_receiver = true, folded = true;
  bool weighted = true, mapped = true, chunks = false;
  int blocks = 1;  // of the projection branch
};

constexpr int kStreams = 2, kBatch = 2, kTokens = 75, kSharerTokens = 90, kCapacity = 77;
constexpr int kHidden = 256, kInner = 128;
constexpr HeadShape kSharer{3, 8}, kReceiver{4, 96};  // a head crosses tiles of 128 columns
constexpr int kSharerWidth = 24, kWidth = 384;

std::mt19937 random_bits(7);
double uniform() { return static_cast<double>(random_bits()) / 4294967296.0 * 2 - 1; }

void fail(const Case& c, const char* type, const std::string& what) {
  std::printf("%s, %s: %s\n", c.name, type, what.c_str());
  std::exit(1);
}

template <class T>
double rounded(double x) {
  T narrowed;
  narrow(static_cast<float>(x), &narrowed);
  return widen(narrowed);
}
template <class T>
std::vector<T> narrowed(const Numbers& from) {
  std::vector<T> to(from.size());
  for (size_t i = 0; i < from.size(); ++i) narrow(static_cast<float>(from[i]), &to[i]);
  return to;
}
// Random values of T, or float, as float64.
template <class T>
Numbers values(size_t count, double scale) {
  Numbers x(count);
  for (double& v : x) v = rounded<T>(uniform() * scale);
  return x;
}

// out[n] = matrix [n, k] in
Numbers times(const double* matrix, const Numbers& in, int n) {
  Numbers out(n);
  for (int i = 0; i < n; ++i) {
    const double* row = matrix + i * in.size();
    for (size_t k = 0; k < in.size(); ++k) out[i] += row[k] * in[k];
  }
  return out;
}

template <class T>
struct Check {
  const Case& c;
  const int in_width = kSharerWidth + (c.reads_receiver ? kWidth : 0);
  const int weighting = c.weighted ? kHidden : 0;
  const int out_depth = c.folded ? kInner + kHidden : kHidden;
  const int deep = c.folded ? c.blocks - 1 : c.blocks;

  Numbers matrix(int rows, int cols) {
    return values<T>(static_cast<size_t>(kStreams) * rows * cols, 2.0 / std::sqrt(cols));
  }
  const Numbers in = matrix(kHidden, in_width), w1 = matrix(kInner, kHidden),
                w2 = matrix(kHidden, kInner), branch = matrix(kInner + weighting, kHidden),
                out = matrix(kWidth, out_depth);
  std::vector<Numbers> deep_w2, deep_w1;
  const Numbers in_bias = values<float>(kStreams * kHidden, 1),
                out_bias = values<float>(kStreams * kWidth, 1),
                head = values<float>(kStreams * kReceiver.heads * 2 * kHidden, 0.1),
                head_bias = values<float>(kStreams * kReceiver.heads, 1);
  // base is [B, N, H, D] in memory, out [B, H, N, D] with room behind the tokens.
  const size_t base_size = kBatch * kTokens * kWidth, out_size = kBatch * kCapacity * kWidth;
  const Numbers sharer = values<T>(kStreams * kBatch * kSharerTokens * kSharerWidth, 1),
                base = values<T>(kStreams * base_size, 1),
                before = values<T>(kStreams * out_size, 1);
  std::vector<int64_t> map;

  explicit Check(const Case& c) : c(c) {
    for (int i = 0; i < deep; ++i) deep_w2.push_back(matrix(kHidden, kInner));
    for (int i = 0; i + 1 < c.blocks; ++i) deep_w1.push_back(matrix(kInner, kHidden));
    for (int i = 0; i < kBatch * kTokens; ++i) {
      const int kind = static_cast<int>(random_bits() % 8);
      const int token = static_cast<int>(random_bits() % kSharerTokens);
      map.push_back(kind == 0 ? -1 : kind == 1 ? kSharerTokens + i : token);
    }
  }

  static double activated(Activation activation, double x) {
    switch (activation) {
      case Activation::kGelu:
        return x / 2 * (1 + std::erf(x / std::sqrt(2.0)));
      case Activation::kRelu:
        return x > 0 ? x : 0;
      default:
        return x / (1 + std::exp(-x));
    }
  }
  // round(activation(matrix rmsnorm(z)))
  Numbers inner(const double* matrix, const Numbers& z, int n) const {
    double squares = 0;
    for (const double v : z) squares += v * v;
    Numbers a = times(matrix, z, n);
    for (double& v : a) {
      v = rounded<T>(activated(c.activation, v / std::sqrt(squares / z.size() + kRmsEps)));
    }
    return a;
  }
  Numbers added(Numbers z, const Numbers& more) const {
    for (size_t i = 0; i < z.size(); ++i) z[i] = rounded<T>(z[i] + more[i]);
    return z;
  }
  static Numbers joined(Numbers a, const Numbers& b) {
    a.insert(a.end(), b.begin(), b.end());
    return a;
  }

  double base_at(int g, int b, int n, int i) const {
    return base[g * base_size + (static_cast<size_t>(b) * kTokens + n) * kWidth + i];
  }
  static size_t out_index(int b, int n, int i) {
    const int head = i / kReceiver.dim, d = i % kReceiver.dim;
    return ((static_cast<size_t>(b) * kReceiver.heads + head) * kCapacity + n) * kReceiver.dim + d;
  }

  // What out must hold at this token, P and w included.
  Numbers fused(int g, int b, int n, int source) const {
    Numbers x;
    for (int head = 0; head < kSharer.heads; ++head) {
      for (int d = 0; d < kSharer.dim; ++d) {
        x.push_back(
            sharer[(((static_cast<size_t>(g) * kBatch + b) * kSharer.heads + head) * kSharerTokens +
                    source) *
                       kSharer.dim +
                   d]);
      }
    }
    for (int i = 0; c.reads_receiver && i < kWidth; ++i) x.push_back(base_at(g, b, n, i));
    const auto part = [&](const Numbers& all) { return all.data() + all.size() / kStreams * g; };
    const Numbers z0 =
        added(times(part(in), x, kHidden), Numbers(part(in_bias), part(in_bias) + kHidden));
    const Numbers z1 = added(z0, times(part(w2), inner(part(w1), z0, kInner), kHidden));
    const Numbers both = inner(part(branch), z1, kInner + weighting);
    Numbers a(both.begin(), both.begin() + kInner), p = z1;
    for (int i = 0; i < deep; ++i) {
      p = added(p, times(part(deep_w2[i]), a, kHidden));
      if (i < c.blocks - 1) a = inner(part(deep_w1[i]), p, kInner);
    }
    const Numbers projected = times(part(out), c.folded ? joined(a, p) : p, kWidth);
    Numbers logits;
    if (c.weighted) {
      logits = times(part(head), joined(z1, Numbers(both.begin() + kInner, both.end())),
                     kReceiver.heads);
    }
    Numbers result(kWidth);
    for (int i = 0; i < kWidth; ++i) {
      const int h = i / kReceiver.dim;
      const double w = c.weighted ? 1 / (1 + std::exp(-logits[h] - part(head_bias)[h])) : 1;
      const double t = base_at(g, b, n, i);
      const double from = c.accumulate ? before[g * out_size + out_index(b, n, i)] : t;
      result[i] = integrate_plainly(from, t, w, projected[i] + part(out_bias)[i]);
    }
    return result;
  }
  double integrate_plainly(double from, double t, double w, double p) const {
    switch (c.integration) {
      case Integration::kResidual:
        return from + w * p;
      case Integration::kInterpolation:
        return from + w * (p - t);
      default:
        return from + w * p - t;
    }
  }

  void run(CacheType type, const char* type_name) {
    std::vector<std::vector<T>> kept;
    const auto device = [&](const Numbers& x) {
      kept.push_back(narrowed<T>(x));
      return kept.back().data();
    };
    std::vector<std::vector<float>> kept_floats;
    const auto floats = [&](const Numbers& x) {
      kept_floats.emplace_back(x.begin(), x.end());
      return kept_floats.back().data();
    };
    std::vector<const void*> w2s, w1s;
    for (const Numbers& w : deep_w2) w2s.push_back(device(w));
    for (const Numbers& w : deep_w1) w1s.push_back(device(w));
    T* const shared_from = device(sharer);
    T* const target = device(before);
    T* base_memory = device(base);
    int64_t base_stride[] = {int64_t{kTokens} * kWidth, kReceiver.dim, kWidth, 1};
    const int64_t out_stride[] = {int64_t{kCapacity} * kWidth, kCapacity * kReceiver.dim,
                                  kReceiver.dim, 1};
    size_t base_step = base_size;
    if (c.in_place) {
      for (int g = 0; g < kStreams; ++g) {
        for_all([&](int b, int n, int i) {
          narrow(static_cast<float>(base_at(g, b, n, i)),
                 &target[g * out_size + out_index(b, n, i)]);
        });
      }
      base_memory = target, base_step = out_size;
      std::copy(out_stride, out_stride + 4, base_stride);
    }
    std::vector<Streams> views(1);
    for (int g = 0; g < kStreams; ++g) {
      StreamViews& v = views[0].view[g];
      v.out = {target + g * out_size, {}};
      v.base = {base_memory + g * base_step, {}};
      v.sharer = {
          shared_from + g * kBatch * kSharerTokens * kSharerWidth,
          {int64_t{kSharerTokens} * kSharerWidth, kSharerTokens * kSharer.dim, kSharer.dim, 1}};
      std::copy(out_stride, out_stride + 4, v.out.stride);
      std::copy(base_stride, base_stride + 4, v.base.stride);
    }
    const FusedWeights weights{device(in),
                               floats(in_bias),
                               device(w1),
                               device(w2),
                               device(branch),
                               w2s.data(),
                               w1s.data(),
                               static_cast<int>(w2s.size()),
                               static_cast<int>(w1s.size()),
                               device(out),
                               floats(out_bias),
                               c.weighted ? floats(head) : nullptr,
                               c.weighted ? floats(head_bias) : nullptr};
    const Tokens tokens{
        c.mapped ? map.data() : nullptr, kTokens, 1, kBatch, kTokens, kSharerTokens};
    FusedCall call{type,
                   c.activation,
                   c.integration,
                   c.accumulate,
                   c.reads_receiver,
                   c.folded,
                   kSharer,
                   kReceiver,
                   kHidden,
                   kInner,
                   weighting,
                   tokens,
                   weights,
                   0,
                   kStreams,
                   0,
                   kBatch * kTokens,
                   views.data(),
                   nullptr};
    const auto run_chunk = [&](int g, int streams, int row, int rows) {
      Streams part = views[0];
      std::copy(views[0].view + g, views[0].view + g + streams, part.view);
      call.views = &part;
      call.first_stream = g, call.streams = streams, call.first_row = row, call.rows = rows;
      const size_t bytes = hopper_scratch_bytes(call);
      std::vector<unsigned char> scratch(bytes + 512, 0xff);  // NaN
      auto* const begin = reinterpret_cast<unsigned char*>(
          (reinterpret_cast<uintptr_t>(scratch.data()) + 255) / 256 * 256);
      call.scratch = begin;
      if (!run_hopper(call, nullptr)) fail(c, type_name, "refused: " + hopper_obstacle(call));
      for (size_t i = bytes; begin + i < scratch.data() + scratch.size(); ++i) {
        if (begin[i] != 0xff) fail(c, type_name, "wrote behind its scratch");
      }
    };
    if (c.chunks) {
      for (int g = 0; g < kStreams; ++g) {
        run_chunk(g, 1, 0, 100);
        run_chunk(g, 1, 100, kBatch * kTokens - 100);
      }
    } else {
      run_chunk(0, kStreams, 0, kBatch * kTokens);
    }
    compare(target, type_name, type == CacheType::kBfloat16 ? 1.0 / 128 : 1.0 / 1024);
  }

  void for_all(const std::function<void(int, int, int)>& f) const {
    for (int b = 0; b < kBatch; ++b) {
      for (int n = 0; n < kTokens; ++n) {
        for (int i = 0; i < kWidth; ++i) f(b, n, i);
      }
    }
  }

  // Roundings may fall the other way here and there, by a unit or two in the last place, `eps`.
  void compare(const T* target, const char* type_name, double eps) const {
    double worst = 0, moved = 0;
    for (int g = 0; g < kStreams; ++g) {
      std::vector<bool> written(out_size);
      for (int b = 0; b < kBatch; ++b) {
        for (int n = 0; n < kTokens; ++n) {
          const int64_t source = c.mapped ? map[b * kTokens + n] : n;
          const bool stays = source < 0 || source >= kSharerTokens;
          const Numbers truth = stays ? Numbers() : fused(g, b, n, static_cast<int>(source));
          double squares = 0;
          for (const double v : truth) squares += v * v;
          for (int i = 0; i < kWidth; ++i) {
            const size_t at = out_index(b, n, i);
            const double got = widen(target[g * out_size + at]);
            written[at] = true;
            if (stays) {
              const double want = c.accumulate ? before[g * out_size + at] : base_at(g, b, n, i);
              if (got != want) fail(c, type_name, "a token that stays was changed");
              continue;
            }
            const double bound = 2 * eps * (std::abs(truth[i]) + std::sqrt(squares / kWidth));
            const double error = std::abs(got - truth[i]) / bound;
            worst = error > worst || error != error ? error : worst;
            moved = std::max(moved, std::abs(truth[i] - base_at(g, b, n, i)));
          }
        }
      }
      for (size_t i = 0; i < out_size; ++i) {
        if (!written[i] && widen(target[g * out_size + i]) != before[g * out_size + i]) {
          fail(c, type_name, "wrote behind the tokens");
        }
      }
    }
    if (!(worst <= 1)) fail(c, type_name, "error " + std::to_string(worst) + " of what is allowed");
    if (moved < 0.1) fail(c, type_name, "the fusion changed nothing");
    std::printf("%s, %s: error %.2f of what is allowed\n", c.name, type_name, worst);
  }
};

template <class T>
void check(CacheType type, const char* type_name, const Case& c) {
  Check<T>(c).run(type, type_name);
}

Case make(const char* name, const std::function<void(Case&)>& change) {
  Case c{name};
  change(c);
  return c;
}

}  // namespace

int main() {
  const std::vector<Case> cases{
      make("gelu, residual", [](Case&) {}),
      make("in place, without a map", [](Case& c) { c.in_place = true, c.mapped = false; }),
      make("chunks of rows and streams", [](Case& c) { c.chunks = true; }),
      make("three blocks, silu", [](Case& c) { c.blocks = 3, c.activation = Activation::kSilu; }),
      make("not folded, relu", [](Case& c) { c.folded = false, c.activation = Activation::kRelu; }),
      make("two blocks, not folded, interpolation, accumulating",
           [](Case& c) {
             c.blocks = 2, c.folded = false, c.accumulate = true;
             c.integration = Integration::kInterpolation;
           }),
      make("without weighting, sharer alone, replacement",
           [](Case& c) {
             c.weighted = c.reads_receiver = false;
             c.integration = Integration::kReplacement;
           }),
      make("replacement, accumulating, chunks", [](Case& c) {
        c.accumulate = c.chunks = true;
        c.integration = Integration::kReplacement;
      })};
  for (const Case& c : cases) check<Bfloat16>(CacheType::kBfloat16, "bfloat16", c);
  for (int i = 0; i < 3; ++i) check<Float16>(CacheType::kFloat16, "float16", cases[i]);
}
