#include "check_call.h"

#include <torch/csrc/stable/ops.h>

#include "../check_arguments.h"
#include "gradients.h"

namespace c2c::train {
namespace {

bool is_floating(ScalarType type) {
  return type == ScalarType::Double || type == ScalarType::Float || type == ScalarType::BFloat16 ||
         type == ScalarType::Half;
}

void check_device(const std::string& name, const Tensor& t, const Tensor& first) {
  if (t.is_cpu() != first.is_cpu() || t.get_device() != first.get_device()) {
    fail(name, " must be on the device of base[0] (", device_name(first), "), got ",
         device_name(t));
  }
}

void check_sizes(const std::string& name, const Tensor& t, const std::vector<int64_t>& sizes,
                 const char* rule) {
  check_rank(name, t, static_cast<int64_t>(sizes.size()));
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (t.size(d) != sizes[d]) {
      fail(name, " dim ", d, " must equal ", sizes[d], " (", rule, "), got ", t.size(d));
    }
  }
}

void check_streams(Call& call, Placement placement) {
  Sizes& s = call.sizes;
  s.streams = static_cast<int64_t>(call.base.size());
  if (s.streams == 0) fail("base must have at least one entry, got 0");
  if (call.sharer.size() != call.base.size()) {
    fail("sharer must have ", s.streams, " entries (one per stream, as base), got ",
         call.sharer.size());
  }
  const Tensor& first = call.base[0];
  const Tensor& source = call.sharer[0];
  check_rank("base[0]", first, 4);
  check_rank("sharer[0]", source, 4);
  call.type = first.scalar_type();
  if (!is_floating(call.type)) {
    fail("base[0] must be float64, float32, bfloat16 or float16, got ", dtype_name(call.type));
  }
  call.sums = call.type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const bool on_gpu = placement == Placement::kCuda;
  if (on_gpu ? !first.is_cuda() : !first.is_cpu()) {
    fail("base[0] must be on ", on_gpu ? "a GPU, as another argument is" : "the CPU", ", got ",
         device_name(first));
  }
  s.batch = first.size(0), s.tokens = first.size(2), s.sharer_tokens = source.size(2);
  s.receiver = {first.size(1), first.size(3)};
  s.sharer = {source.size(1), source.size(3)};
  for (const auto& [side, shape] : {std::pair{"base", s.receiver}, {"sharer", s.sharer}}) {
    for (const int64_t value : {shape.heads, shape.dim, shape.width()}) {
      if (value < 1 || value > kMaxWidth) {
        fail(side, "[0] must have heads, head dim and their product in 1..", kMaxWidth, ", got ",
             shape.heads, " heads of ", shape.dim);
      }
    }
  }
  if (s.batch > INT32_MAX || s.tokens > INT32_MAX || s.sharer_tokens > INT32_MAX) {
    fail("base and sharer must have batch and token counts below 2^31");
  }
  for (int64_t g = 0; g < s.streams; ++g) {
    check_sizes(item("base", g), call.base[g],
                {s.batch, s.receiver.heads, s.tokens, s.receiver.dim}, "as base[0]");
    check_like(item("base", g), call.base[g], first, "base[0]");
    check_sizes(item("sharer", g), call.sharer[g],
                {s.batch, s.sharer.heads, s.sharer_tokens, s.sharer.dim},
                "base[0]'s batch, sharer[0]'s heads, tokens and head dim");
    check_like(item("sharer", g), call.sharer[g], first, "base[0]");
  }
}

void check_token_map(const Call& call) {
  const Sizes& s = call.sizes;
  if (!call.token_map) {
    if (s.sharer_tokens < s.tokens) {
      fail("sharer[0] dim 2 (tokens) must be at least ", s.tokens,
           " (base's tokens) without a token_map, got ", s.sharer_tokens);
    }
    return;
  }
  const Tensor& map = *call.token_map;
  if (map.scalar_type() != ScalarType::Long) {
    fail("token_map must be int64, got ", dtype_name(map.scalar_type()));
  }
  check_device("token_map", map, call.base[0]);
  if (map.dim() == 2) {
    check_sizes("token_map", map, {s.batch, s.tokens}, "base's batch and tokens");
  } else if (map.dim() == 1) {
    check_sizes("token_map", map, {s.tokens}, "base's tokens");
  } else {
    fail("token_map must be [N] or [B, N], got ", map.dim(), " dimensions");
  }
}

void check_row_seeds(Call& call) {
  if (!call.row_seeds) return;
  Tensor& seeds = *call.row_seeds;
  if (seeds.scalar_type() != ScalarType::Long) {
    fail("row_seeds must be int64, got ", dtype_name(seeds.scalar_type()));
  }
  check_device("row_seeds", seeds, call.base[0]);
  check_sizes("row_seeds", seeds, {call.sizes.batch}, "base's batch");
  if (!seeds.is_contiguous()) seeds = torch::stable::contiguous(seeds);
}

void check_gate(const Call& call) {
  if (!call.gate) return;
  const Sizes& s = call.sizes;
  const Tensor& gate = *call.gate;
  check_rank("gate", gate, 4);
  if (gate.scalar_type() != call.sums) {
    fail("gate must be ", dtype_name(call.sums), " for ", dtype_name(call.type), " caches, got ",
         dtype_name(gate.scalar_type()));
  }
  check_device("gate", gate, call.base[0]);
  if (gate.size(0) != s.streams) {
    fail("gate dim 0 must equal ", s.streams, " (streams), got ", gate.size(0));
  }
  const std::array<int64_t, 4> full{s.streams, s.batch, s.receiver.heads, s.tokens};
  for (int d = 1; d < 4; ++d) {
    if (gate.size(d) != 1 && gate.size(d) != full[d]) {
      fail("gate dim ", d, " must be 1 or ", full[d], " (",
           d == 1   ? "batch"
           : d == 2 ? "receiver heads"
                    : "tokens",
           "), got ", gate.size(d));
    }
  }
}

void check_parameters(Call& call) {
  Sizes& s = call.sizes;
  Parameters& p = call.parameters;
  check_rank("in_bias", p.in_bias, 2);
  check_rank("proj_w1", p.proj_w1, 4);
  const int64_t g = s.streams;
  const int64_t h = s.hidden = p.in_bias.size(1);
  const int64_t m = s.inner = p.proj_w1.size(2);
  const int64_t blocks = s.blocks = p.proj_w1.size(1);
  const int64_t width = s.receiver.width(), heads = s.receiver.heads;
  for (const auto& [name, value, most] : {std::tuple{"in_bias dim 1 (hidden)", h, kMaxWidth},
                                          {"proj_w1 dim 2 (inner)", m, kMaxWidth},
                                          {"proj_w1 dim 1 (blocks)", blocks, int64_t{1024}}}) {
    if (value < 1 || value > most) fail(name, " must be in 1..", most, ", got ", value);
  }
  const auto check = [&](const char* name, Tensor& t, const std::vector<int64_t>& sizes) {
    check_sizes(name, t, sizes, "the streams and the shape group's other parameters");
    if (!is_floating(t.scalar_type())) {
      fail(name, " must be float64, float32, bfloat16 or float16, got ",
           dtype_name(t.scalar_type()));
    }
    check_device(name, t, call.base[0]);
    if (!t.is_contiguous()) t = torch::stable::contiguous(t);
  };
  check("in_weight", p.in_weight, {g, h, s.input_width()});
  check("in_bias", p.in_bias, {g, h});
  check("shared_norm", p.shared_norm, {g, h});
  check("shared_w1", p.shared_w1, {g, m, h});
  check("shared_w2", p.shared_w2, {g, h, m});
  check("proj_norm", p.proj_norm, {g, blocks, h});
  check("proj_w1", p.proj_w1, {g, blocks, m, h});
  check("proj_w2", p.proj_w2, {g, blocks, h, m});
  check("out_weight", p.out_weight, {g, width, h});
  check("out_bias", p.out_bias, {g, width});
  const std::array<std::tuple<const char*, std::optional<Tensor>*, std::vector<int64_t>>, 5> branch{
      {{"weight_norm", &p.weight_norm, {g, h}},
       {"weight_w1", &p.weight_w1, {g, h, h}},
       {"weight_w2", &p.weight_w2, {g, h, h}},
       {"head_weight", &p.head_weight, {g, heads, h}},
       {"head_bias", &p.head_bias, {g, heads}}}};
  for (const auto& [name, tensor, sizes] : branch) {
    if (tensor->has_value() != p.weight_norm.has_value()) {
      fail(name, " must be given if and only if weight_norm is, got ",
           tensor->has_value() ? "a tensor" : "none");
    }
    if (tensor->has_value()) check(name, **tensor, sizes);
  }
  s.weighting = p.weight_norm ? h : 0;
}

}  // namespace

Call check_call(Placement placement, const Arguments& a, const Parameters& parameters) {
  Call call{{},
            {},
            {},
            parse_activation(a.activation),
            parse_integration(a.integration),
            a.base,
            a.sharer,
            a.token_map,
            a.gate,
            parameters,
            a.dropout,
            static_cast<uint64_t>(a.seed),
            static_cast<uint64_t>(a.offset),
            a.row_seeds,
            a.recompute};
  call.sizes.reads_receiver = a.reads_receiver;
  check_streams(call, placement);
  check_token_map(call);
  check_gate(call);
  check_row_seeds(call);
  check_parameters(call);
  if (!(a.dropout >= 0 && a.dropout < 1)) fail("dropout must be in [0, 1), got ", a.dropout);
  return call;
}

void check_backward(const Call& call, const std::vector<Tensor>& grad_out,
                    const std::vector<Tensor>& saved, const std::vector<int64_t>& saved_columns,
                    const std::vector<bool>& needed) {
  const Sizes& s = call.sizes;
  const Tensor& first = call.base[0];
  if (static_cast<int64_t>(grad_out.size()) != s.streams) {
    fail("grad_out must have ", s.streams, " entries (one per stream), got ", grad_out.size());
  }
  for (int64_t g = 0; g < s.streams; ++g) {
    check_sizes(item("grad_out", g), grad_out[g],
                {s.batch, s.receiver.heads, s.tokens, s.receiver.dim}, "as base");
    check_like(item("grad_out", g), grad_out[g], first, "base[0]");
  }
  const size_t expected = call.recompute ? 0 : saved_columns.size();
  if (saved.size() != expected) {
    fail("saved must have ", expected, " entries, as forward returned, got ", saved.size());
  }
  for (size_t i = 0; i < saved.size(); ++i) {
    const std::string name = item("saved", static_cast<int64_t>(i));
    check_sizes(name, saved[i], {s.streams, s.rows(), saved_columns[i]}, "as forward returned");
    check_like(name, saved[i], first, "base[0]");
    if (!saved[i].is_contiguous()) fail(name, " must be contiguous");
  }
  if (static_cast<int>(needed.size()) != kNeededCount) {
    fail("needed must have ", kNeededCount, " entries, got ", needed.size());
  }
  const Needed wanted = needed_of(needed);
  if (wanted.gate && !call.gate) fail("needed must not want gate without one");
  if (s.weighting == 0 && (wanted.weight_norm || wanted.weight_w1 || wanted.weight_w2 ||
                           wanted.head_weight || wanted.head_bias)) {
    fail("needed must not want gradients of a weighting branch without one");
  }
}

}  // namespace c2c::train
