// Host-side checks of the fusion op's arguments, shared by every device.
#include <algorithm>
#include <array>

#include "check_arguments.h"
#include "cpu/panel_gemm.h"
#include "ops.h"
#include "scalar_math.h"

namespace c2c {
namespace {

using torch::headeronly::ScalarType;

// A packed weight: contiguous, of the given shape, in the compute dtype, on the caches' device.
void check_weight(const std::string& name, const Tensor& t, std::initializer_list<int64_t> shape,
                  ScalarType dtype, const Tensor& cache) {
  check_rank(name, t, static_cast<int64_t>(shape.size()));
  int64_t dim = 0;
  for (const int64_t expected : shape) {
    check_dim(name, t, dim++, "packed weight", expected, "the shape group's other weights");
  }
  if (t.scalar_type() != dtype) {
    fail(name, " must be ", dtype_name(dtype), " for ", dtype_name(cache.scalar_type()),
         " caches on ", device_name(cache), ", got ", dtype_name(t.scalar_type()));
  }
  if (t.is_cpu() != cache.is_cpu() || t.get_device() != cache.get_device()) {
    fail(name, " must be on the caches' device (", device_name(cache), "), got ", device_name(t));
  }
  if (!t.is_contiguous()) fail(name, " must be contiguous");
}

int64_t element_size(ScalarType type) {
  return type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2;
}

// Memory that a view touches, for overlap tests. Strides and offsets in elements.
struct Extent {
  uintptr_t low, high;  // bytes, [low, high)
  std::array<int64_t, 4> size, stride;
  const Tensor* tensor;
  std::string name;
  int64_t stream;
  bool written;
};

Extent extent_of(const Tensor& t, std::string name, int64_t stream, bool written) {
  Extent e{0, 0, {}, {}, &t, std::move(name), stream, written};
  int64_t last = 0;
  for (int64_t d = 0; d < 4; ++d) {
    e.size[d] = t.size(d);
    e.stride[d] = t.size(d) > 1 ? t.stride(d) : 0;
    last += (e.size[d] - 1) * e.stride[d];
  }
  const int64_t bytes = element_size(t.scalar_type());
  e.low = reinterpret_cast<uintptr_t>(t.const_data_ptr());
  e.high = e.low + (last + 1) * bytes;
  return e;
}

bool overlaps_itself(const Extent& e) {
  std::array<int, 4> order{0, 1, 2, 3};
  std::sort(order.begin(), order.end(), [&](int a, int b) { return e.stride[a] < e.stride[b]; });
  int64_t reach = 0;
  for (const int d : order) {
    if (e.size[d] <= 1) continue;
    if (e.stride[d] <= reach) return true;
    reach += (e.size[d] - 1) * e.stride[d];
  }
  return false;
}

// Is there an index difference d with sum(d[k] * stride[k]) == delta, d[k] in [-(b-1), a-1]?
bool reachable(int64_t delta, const Extent& a, const Extent& b, const std::array<int, 4>& order,
               int position) {
  if (position == 4) return delta == 0;
  const int k = order[position];
  const int64_t stride = a.stride[k] != 0 ? a.stride[k] : b.stride[k];
  if (stride == 0) return reachable(delta, a, b, order, position + 1);
  int64_t rest = 0;  // what the dimensions after this one can still add or take away
  for (int p = position + 1; p < 4; ++p) {
    const int d = order[p];
    rest += std::max(a.size[d], b.size[d]) * std::max(a.stride[d], b.stride[d]);
  }
  const int64_t low = std::max(-(b.size[k] - 1), (delta - rest) / stride - 1);
  const int64_t high = std::min(a.size[k] - 1, (delta + rest) / stride + 1);
  for (int64_t d = low; d <= high; ++d) {
    if (reachable(delta - d * stride, a, b, order, position + 1)) return true;
  }
  return false;
}

// Exact where both views step through memory alike, as views of one cache do; others count as
// overlapping where their extents meet.
bool overlap(const Extent& a, const Extent& b) {
  if (a.low >= b.high || b.low >= a.high) return false;
  const int64_t bytes = element_size(a.tensor->scalar_type());
  const int64_t delta = static_cast<int64_t>(b.low) - static_cast<int64_t>(a.low);
  if (delta % bytes != 0 || bytes != element_size(b.tensor->scalar_type())) return true;
  for (int k = 0; k < 4; ++k) {
    if (a.stride[k] != b.stride[k] && a.stride[k] != 0 && b.stride[k] != 0) return true;
  }
  std::array<int, 4> order{0, 1, 2, 3};
  std::sort(order.begin(), order.end(), [&](int x, int y) {
    return std::max(a.stride[x], b.stride[x]) > std::max(a.stride[y], b.stride[y]);
  });
  return reachable(delta / bytes, a, b, order, 0);
}

bool same_view(const Extent& a, const Extent& b) {
  return a.low == b.low && a.size == b.size && a.stride == b.stride;
}

// Over whole models and not only this call's streams: the calls for the other shape groups use the
// same lists, and none may have written when one is refused.
void check_overlaps(const std::vector<Tensor>& out_keys, const std::vector<Tensor>& out_values,
                    const std::vector<Tensor>& base_keys, const std::vector<Tensor>& base_values,
                    const std::vector<Tensor>& sharer_keys,
                    const std::vector<Tensor>& sharer_values, const PackedWeights* weights) {
  std::vector<Extent> extents;
  const auto add = [&](const char* list, const std::vector<Tensor>& tensors, int64_t first_stream,
                       bool written) {
    for (size_t i = 0; i < tensors.size(); ++i) {
      const Tensor& t = tensors[i];
      if (t.dim() != 4 || t.numel() == 0) continue;  // another group's business, or nothing
      const int64_t stream = first_stream < 0 ? -1 : first_stream + 2 * static_cast<int64_t>(i);
      extents.push_back(extent_of(t, item(list, i), stream, written));
    }
  };
  add("out_keys", out_keys, 0, true);
  add("out_values", out_values, 1, true);
  add("receiver_keys", base_keys, 0, false);
  add("receiver_values", base_values, 1, false);
  add("sharer_keys", sharer_keys, -1, false);
  add("sharer_values", sharer_values, -1, false);
  const auto add_weight = [&](std::string name, const Tensor& t) {  // contiguous: checked before
    if (t.numel() == 0) return;
    const auto low = reinterpret_cast<uintptr_t>(t.const_data_ptr());
    const auto high = low + t.numel() * element_size(t.scalar_type());
    extents.push_back(
        {low, high, {1, 1, 1, t.numel()}, {0, 0, 0, 1}, &t, std::move(name), -1, false});
  };
  if (weights != nullptr) {
    const PackedWeights& w = *weights;
    for (const auto& [name, t] : {std::pair{"in_weight", &w.in_weight},
                                  {"in_bias", &w.in_bias},
                                  {"w1", &w.w1},
                                  {"w2", &w.w2},
                                  {"branch_w1", &w.branch_w1},
                                  {"out_weight", &w.out_weight},
                                  {"out_bias", &w.out_bias},
                                  {"head_weight", &w.head_weight},
                                  {"head_bias", &w.head_bias}}) {
      add_weight(name, *t);
    }
    for (size_t i = 0; i < w.deep_w2.size(); ++i) add_weight(item("deep_w2", i), w.deep_w2[i]);
    for (size_t i = 0; i < w.deep_w1.size(); ++i) add_weight(item("deep_w1", i), w.deep_w1[i]);
  }
  std::sort(extents.begin(), extents.end(),
            [](const Extent& a, const Extent& b) { return a.low < b.low; });
  for (size_t i = 0; i < extents.size(); ++i) {
    const Extent& a = extents[i];
    if (a.written && overlaps_itself(a)) {
      fail(a.name, " must not overlap itself (expanded or interleaved view)");
    }
    for (size_t j = i + 1; j < extents.size() && extents[j].low < a.high; ++j) {
      const Extent& b = extents[j];
      if (!a.written && !b.written) continue;
      if (a.stream == b.stream && same_view(a, b)) continue;  // in place
      if (overlap(a, b)) {
        fail((a.written ? a : b).name, " must not overlap ", (a.written ? b : a).name,
             ": it is written while the other is read or written");
      }
    }
  }
}

}  // namespace

void check_inplace(std::vector<Tensor> keys, std::vector<Tensor> values,
                   std::vector<Tensor> sharer_keys, std::vector<Tensor> sharer_values) {
  check_overlaps(keys, values, {}, {}, sharer_keys, sharer_values, nullptr);
}

Activation parse_activation(const std::string& name) {
  if (name == "gelu") return Activation::kGelu;
  if (name == "relu") return Activation::kRelu;
  if (name == "silu") return Activation::kSilu;
  fail("activation must be gelu, relu or silu, got ", name);
}

Integration parse_integration(const std::string& name) {
  if (name == "residual") return Integration::kResidual;
  if (name == "interpolation") return Integration::kInterpolation;
  if (name == "replacement") return Integration::kReplacement;
  fail("integration must be residual, interpolation or replacement, got ", name);
}

FuseCall check_fuse(Placement placement, const std::vector<Tensor>& out_keys,
                    const std::vector<Tensor>& out_values, const std::vector<Tensor>& base_keys,
                    const std::vector<Tensor>& base_values, const std::vector<Tensor>& sharer_keys,
                    const std::vector<Tensor>& sharer_values,
                    const std::optional<Tensor>& token_map, const std::vector<int64_t>& layers,
                    const std::vector<int64_t>& sources, int64_t num_keys, KVShape sharer_shape,
                    KVShape receiver_shape, int64_t inner, bool reads_receiver,
                    const PackedWeights& w) {
  const auto receiver_layers = static_cast<int64_t>(base_keys.size());
  const auto sharer_layers = static_cast<int64_t>(sharer_keys.size());
  const auto check_length = [](const char* name, const auto& list, int64_t expected,
                               const char* rule) {
    if (static_cast<int64_t>(list.size()) != expected) {
      fail(name, " must have ", expected, " entries (", rule, "), got ", list.size());
    }
  };
  check_length("receiver_values", base_values, receiver_layers, "as receiver_keys");
  check_length("out_keys", out_keys, receiver_layers, "as receiver_keys");
  check_length("out_values", out_values, receiver_layers, "as receiver_keys");
  check_length("sharer_values", sharer_values, sharer_layers, "as sharer_keys");
  const auto g = static_cast<int64_t>(layers.size());
  check_length("sources", sources, g, "one per stream, as layers");
  if (num_keys < 0 || num_keys > g) fail("num_keys must be in 0..", g, ", got ", num_keys);
  const auto check_size = [](const char* name, int64_t value) {
    if (value < 1 || value > kMaxWidth) {
      fail(name, " must be in 1..", kMaxWidth, ", got ", value);
    }
  };
  check_size("sharer_heads", sharer_shape.heads);
  check_size("sharer_dim", sharer_shape.dim);
  check_size("receiver_heads", receiver_shape.heads);
  check_size("receiver_dim", receiver_shape.dim);
  check_size("inner", inner);

  FuseCall call{};
  FuseSizes& s = call.sizes;
  s.streams = g;
  if (g == 0) return call;
  for (int64_t i = 0; i < g; ++i) {
    if (layers[i] < 0 || layers[i] >= receiver_layers) {
      fail(item("layers", i), " must be in 0..", receiver_layers - 1, " (receiver layers), got ",
           layers[i]);
    }
    if (sources[i] < 0 || sources[i] >= sharer_layers) {
      fail(item("sources", i), " must be in 0..", sharer_layers - 1, " (sharer layers), got ",
           sources[i]);
    }
    const auto begin = layers.begin() + (i < num_keys ? 0 : num_keys);
    if (std::find(begin, layers.begin() + i, layers[i]) != layers.begin() + i) {
      fail(item("layers", i), " must not name a stream twice, got ", layers[i], " again");
    }
  }

  // Sizes from the weights.
  check_rank("in_bias", w.in_bias, 2);
  check_rank("head_bias", w.head_bias, 2);
  s.hidden = w.in_bias.size(1);
  check_size("in_bias dim 1 (hidden)", s.hidden);
  s.inner = inner;
  s.sharer = sharer_shape;
  s.receiver = receiver_shape;
  s.reads_receiver = reads_receiver;
  const bool weighted = w.head_bias.size(1) != 0;
  s.weighting = weighted ? s.hidden : 0;
  const int64_t width = s.receiver.width();

  // Caches.
  const bool first_is_key = num_keys > 0;
  const Tensor& first = first_is_key ? base_keys[layers[0]] : base_values[layers[0]];
  const std::string first_name =
      item(first_is_key ? "receiver_keys" : "receiver_values", layers[0]);
  check_rank(first_name, first, 4);
  const ScalarType dtype = first.scalar_type();
  if (dtype != ScalarType::Double && dtype != ScalarType::Float && dtype != ScalarType::BFloat16 &&
      dtype != ScalarType::Half) {
    fail(first_name, " must be float64, float32, bfloat16 or float16");
  }
  // One tensor on a GPU brings the call to the GPU's kernels; all others are compared with the
  // first.
  const bool on_gpu = placement == Placement::kCuda;
  if (on_gpu ? !first.is_cuda() : !first.is_cpu()) {
    fail(first_name, " must be on ", on_gpu ? "a GPU, as another argument is" : "the CPU", ", got ",
         device_name(first));
  }
  s.batch = first.size(0);
  s.tokens = first.size(2);
  bool sharer_seen = false;
  call.streams.reserve(g);
  for (int64_t i = 0; i < g; ++i) {
    const bool is_key = i < num_keys;
    const int64_t layer = layers[i], source = sources[i];
    const Tensor& out = is_key ? out_keys[layer] : out_values[layer];
    const Tensor& base = is_key ? base_keys[layer] : base_values[layer];
    const Tensor& sharer = is_key ? sharer_keys[source] : sharer_values[source];
    const std::string out_name = item(is_key ? "out_keys" : "out_values", layer);
    const std::string base_name = item(is_key ? "receiver_keys" : "receiver_values", layer);
    const std::string sharer_name = item(is_key ? "sharer_keys" : "sharer_values", source);
    for (const auto& [name, tensor] : {std::pair{base_name, &base}, std::pair{out_name, &out}}) {
      check_rank(name, *tensor, 4);
      check_like(name, *tensor, first, first_name);
      check_dim(name, *tensor, 0, "batch", s.batch, first_name.c_str());
      check_dim(name, *tensor, 1, "heads", s.receiver.heads, "the fuser's receiver heads");
      check_dim(name, *tensor, 2, "tokens", s.tokens, first_name.c_str());
      check_dim(name, *tensor, 3, "head dim", s.receiver.dim, "the fuser's receiver head dim");
    }
    check_rank(sharer_name, sharer, 4);
    check_like(sharer_name, sharer, first, first_name);
    check_dim(sharer_name, sharer, 0, "batch", s.batch, first_name.c_str());
    check_dim(sharer_name, sharer, 1, "heads", s.sharer.heads, "the fuser's sharer heads");
    check_dim(sharer_name, sharer, 3, "head dim", s.sharer.dim, "the fuser's sharer head dim");
    if (!sharer_seen) {
      s.sharer_tokens = sharer.size(2);
      sharer_seen = true;
    }
    check_dim(sharer_name, sharer, 2, "tokens", s.sharer_tokens, "the other sharer tensors");
    call.streams.push_back({&out, &base, &sharer});
  }
  if (s.batch > INT32_MAX || s.tokens > INT32_MAX || s.sharer_tokens > INT32_MAX) {
    fail("batch and token counts must be below 2^31");
  }
  if (token_map) {
    if (token_map->scalar_type() != ScalarType::Long) {
      fail("token_map must be int64, got ", dtype_name(token_map->scalar_type()));
    }
    if (token_map->is_cpu() != first.is_cpu() || token_map->get_device() != first.get_device()) {
      fail("token_map must be on the caches' device (", device_name(first), "), got ",
           device_name(*token_map));
    }
    const int64_t rank = token_map->dim();
    if (rank != 1 && rank != 2) fail("token_map must be [N] or [B, N], got ", rank, " dimensions");
    check_dim("token_map", *token_map, rank - 1, "tokens", s.tokens, "the receiver's tokens");
    if (rank == 2) check_dim("token_map", *token_map, 0, "batch", s.batch, "the caches' batch");
  } else if (s.sharer_tokens < s.tokens) {
    fail("sharer_keys dim 2 (tokens) must be at least ", s.tokens,
         " (the receiver's tokens) without a token_map, got ", s.sharer_tokens);
  }

  // Weights.
  const ScalarType sums = dtype == ScalarType::Double ? dtype : ScalarType::Float;
  const auto check_vector = [&](const std::string& name, const Tensor& t,
                                std::initializer_list<int64_t> shape) {
    check_weight(name, t, shape, sums, first);
  };
  const auto check_matrix = [&](const std::string& name, const Tensor& t, int64_t rows,
                                int64_t cols) {
    if (placement == Placement::kCpu) {
      const int64_t pair = dtype == ScalarType::BFloat16 ? 2 : 1;
      const int64_t panel = cpu::kPanel;
      check_weight(name, t, {g, (rows + panel - 1) / panel, (cols + pair - 1) / pair, panel, pair},
                   dtype, first);
    } else {
      check_weight(name, t, {g, rows, cols}, dtype, first);
    }
  };
  const int64_t h = s.hidden, m = s.inner;
  check_matrix("in_weight", w.in_weight, h, s.sharer.width() + (reads_receiver ? width : 0));
  check_vector("in_bias", w.in_bias, {g, h});
  check_matrix("w1", w.w1, m, h);
  check_matrix("w2", w.w2, h, m);
  check_matrix("branch_w1", w.branch_w1, m + s.weighting, h);
  s.folded = w.deep_w2.size() == w.deep_w1.size();
  if (!s.folded && w.deep_w2.size() != w.deep_w1.size() + 1) {
    fail("deep_w2 must have as many entries as deep_w1 (", w.deep_w1.size(), ") or one more, got ",
         w.deep_w2.size());
  }
  for (size_t i = 0; i < w.deep_w2.size(); ++i) {
    check_matrix(item("deep_w2", i), w.deep_w2[i], h, m);
  }
  for (size_t i = 0; i < w.deep_w1.size(); ++i) {
    check_matrix(item("deep_w1", i), w.deep_w1[i], m, h);
  }
  check_matrix("out_weight", w.out_weight, width, s.folded ? m + h : h);
  check_vector("out_bias", w.out_bias, {g, width});
  const int64_t heads = weighted ? s.receiver.heads : 0;
  check_vector("head_weight", w.head_weight, {g, heads, weighted ? h + h : 0});
  check_vector("head_bias", w.head_bias, {g, heads});
  check_overlaps(out_keys, out_values, base_keys, base_values, sharer_keys, sharer_values, &w);
  return call;
}

}  // namespace c2c
