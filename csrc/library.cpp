// The kernels as CPU implementations of torch.ops.dtme, through torch's stable ABI, and what `_C` tells about itself.
//
// Schemas, checks of arguments and gradients are Python's (dtme_kernels/*/op.py); here tensors become views, results
// are allocated, and the kernels of the best instruction set that this machine has are called. Some sizes are checked
// again: who calls torch.ops.dtme passes by Python's checks.

#include <pybind11/pybind11.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "kernels.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using namespace dtme;

// --- which kernels ---------------------------------------------------------------------------------------------------

struct Kernels {
  const char* name;
  bool (*runs_here)();
#define DTME_KERNEL(function) decltype(&portable::function) function
  DTME_KERNEL(accumulate_covariance);
  DTME_KERNEL(covariance_backward);
  DTME_KERNEL(count_conflicts);
  DTME_KERNEL(projected_dots);
  DTME_KERNEL(projected_dots_backward);
  DTME_KERNEL(modulate);
  DTME_KERNEL(modulate_backward);
  DTME_KERNEL(attend);
  DTME_KERNEL(attend_backward);
#undef DTME_KERNEL
};

#define DTME_KERNELS(isa, runs_here)                                                                             \
  Kernels {                                                                                                      \
    #isa, runs_here, isa::accumulate_covariance, isa::covariance_backward, isa::count_conflicts,                 \
        isa::projected_dots, isa::projected_dots_backward, isa::modulate, isa::modulate_backward, isa::attend,   \
        isa::attend_backward                                                                                     \
  }

// the best first
const Kernels ALL[] = {
#if defined(__x86_64__)
    DTME_KERNELS(avx512,
                 [] {
                   return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
                 }),
    DTME_KERNELS(avx2, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }),
#endif
    DTME_KERNELS(portable, [] { return true; }),
};

const Kernels* best() {
  for (const Kernels& kernels : ALL)
    if (kernels.runs_here()) return &kernels;
  return nullptr;
}
const Kernels* kernels = best();

void run(int64_t n, int64_t grain, Parallel::Function function, void* context) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, n, grain, function, context));
}
Parallel parallel() { return {run, torch::stable::get_num_threads()}; }

// --- tensors as views ------------------------------------------------------------------------------------------------

Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::Double: return Dtype::float64;
    case ScalarType::Half: return Dtype::float16;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    case ScalarType::Bool: return Dtype::boolean;
    default: STD_TORCH_CHECK(false, "dtme: tensors must be floating point, or bool as a mask"); std::abort();
  }
}

ScalarType wide(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

void append(View& view, int64_t size, int64_t stride) {
  view.size[view.dim] = size;
  view.stride[view.dim++] = stride;
}

View start(const Tensor& x) {
  View view;
  view.data = const_cast<void*>(x.const_data_ptr());
  view.dtype = dtype_of(x);
  return view;
}

// All dimensions; `lead` of size 1 in front.
View view_of(const Tensor& x, int lead = 0) {
  STD_TORCH_CHECK(x.dim() + lead <= MAX_DIM, "dtme: a tensor of ", x.dim(), " dimensions");
  View view = start(x);
  while (lead--) append(view, 1, 0);
  for (int64_t i = 0; i < x.dim(); i++) append(view, x.size(i), x.stride(i));
  return view;
}

// (kept..., rows..., p): the rows merged into as few dimensions as their strides allow, at least one. `owner` keeps the
// copy of a tensor that has too many.
View rows_of(Tensor& owner, int keep = 0) {
  View view = start(owner);
  int64_t last = owner.dim() - 1;
  for (int64_t i = 0; i < keep; i++) append(view, owner.size(i), owner.stride(i));
  for (int64_t i = keep; i < last; i++) {
    int64_t size = owner.size(i), stride = owner.stride(i);
    int before = view.dim - 1;
    if (size == 1 && view.dim > keep) continue;
    if (view.dim > keep && (view.size[before] == 1 || view.stride[before] == size * stride)) {
      view.size[before] *= size;
      view.stride[before] = stride;
    } else if (view.dim < MAX_DIM - 1) {
      append(view, size, stride);
    } else {
      owner = torch::stable::contiguous(owner);
      return rows_of(owner, keep);
    }
  }
  if (view.dim == keep) append(view, 1, 0);
  append(view, owner.size(last), owner.stride(last));
  return view;
}

Tensor empty(const Tensor& like, std::vector<int64_t> size, std::optional<ScalarType> dtype = std::nullopt) {
  return torch::stable::new_empty(like, size, dtype);
}
std::vector<int64_t> sizes_of(const Tensor& x) { return {x.sizes().begin(), x.sizes().end()}; }
Tensor empty_as(const Tensor& x) { return empty(x, sizes_of(x)); }

// --- covariance ------------------------------------------------------------------------------------------------------

void token_covariance_(Tensor sums, std::vector<Tensor> tokens) {
  std::vector<View> targets, sources;
  View all = view_of(sums);
  bool fits = (all.dtype == Dtype::float32 || all.dtype == Dtype::float64) && (all.dim == 2 || all.dim == 3) &&
              all.size[all.dim - 1] == all.size[all.dim - 2] &&
              int64_t(tokens.size()) == (all.dim == 3 ? all.size[0] : 1);
  for (const Tensor& x : tokens) fits &= x.dim() > 0 && x.size(x.dim() - 1) == all.size[all.dim - 1];
  STD_TORCH_CHECK(fits, "dtme: the accumulator must be float32 or float64, (p, p) or (D, p, p) for D tokens (..., p)");
  for (size_t i = 0; i < tokens.size(); i++) {
    View target = view_of(sums);
    if (all.dim == 3) {
      target = start(sums);
      target.data = static_cast<char*>(all.data) + i * all.stride[0] * (all.dtype == Dtype::float64 ? 8 : 4);
      append(target, all.size[1], all.stride[1]);
      append(target, all.size[2], all.stride[2]);
    }
    targets.push_back(target);
    sources.push_back(rows_of(tokens[i]));
  }
  kernels->accumulate_covariance(parallel(), tokens.size(), targets.data(), sources.data());
}

Tensor token_covariance(Tensor tokens) {
  int64_t p = tokens.size(tokens.dim() - 1);
  Tensor sum = torch::stable::new_zeros(tokens, {p, p}, wide(tokens));
  View target = view_of(sum), source = rows_of(tokens);
  kernels->accumulate_covariance(parallel(), 1, &target, &source);
  return sum;
}

Tensor token_covariance_backward(Tensor grad, Tensor tokens) {
  Tensor d_tokens = empty_as(tokens);
  kernels->covariance_backward(parallel(), view_of(grad), rows_of(tokens), rows_of(d_tokens));
  return d_tokens;
}

// --- conflicts -------------------------------------------------------------------------------------------------------

void check_basis(const Tensor& grads, const Tensor& basis) {
  int64_t p = grads.dim() > 1 ? grads.size(grads.dim() - 1) : -1;
  STD_TORCH_CHECK(basis.dim() == 2 && basis.size(0) == p && basis.size(1) == p,
                  "dtme: grads must be (K, ..., p), and the basis (p, p)");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> count_conflicts(Tensor grads, Tensor basis, std::vector<int64_t> ranks,
                                                           bool count_zero_gradients) {
  check_basis(grads, basis);
  int64_t num_tasks = grads.size(0), num_ranks = ranks.size();
  for (int64_t i = 0; i < num_ranks; i++)
    STD_TORCH_CHECK((i == 0 || ranks[i - 1] < ranks[i]) && ranks[i] >= 0 && ranks[i] <= basis.size(0),
                    "dtme: ranks must increase from 0 to p");
  auto zeros = [&](std::vector<int64_t> size) { return torch::stable::new_zeros(grads, size, ScalarType::Long); };
  Tensor range = zeros({num_ranks, num_tasks, num_tasks}), null = zeros({num_ranks, num_tasks, num_tasks});
  Tensor valid = zeros({num_tasks, num_tasks}), nonfinite = zeros({});
  auto data = [](const Tensor& x) { return static_cast<int64_t*>(x.mutable_data_ptr()); };
  kernels->count_conflicts(parallel(), rows_of(grads, 1), view_of(basis), num_ranks, ranks.data(), count_zero_gradients,
                           data(range), data(null), data(valid), data(nonfinite));
  return {range, null, valid, nonfinite};
}

std::tuple<Tensor, Tensor> projected_dots(Tensor grads, Tensor basis, int64_t rank) {
  check_basis(grads, basis);
  STD_TORCH_CHECK(rank >= 0 && rank <= basis.size(0), "dtme: the rank must be 0 to p");
  std::vector<int64_t> size = sizes_of(grads);
  size.pop_back();
  size[0] = size[0] * (size[0] - 1) / 2;
  Tensor range = empty(grads, size, wide(grads)), null = empty(grads, size, wide(grads));
  View to_range = start(range), to_null = start(null);
  kernels->projected_dots(parallel(), rows_of(grads, 1), view_of(basis), rank, to_range, to_null);
  return {range, null};
}

std::tuple<Tensor, Tensor> projected_dots_backward(Tensor grad_range, Tensor grad_null, Tensor grads, Tensor basis,
                                                   int64_t rank) {
  Tensor d_grads = empty_as(grads), d_basis = empty_as(basis);
  Tensor up_range = torch::stable::contiguous(grad_range), up_null = torch::stable::contiguous(grad_null);
  kernels->projected_dots_backward(parallel(), start(up_range), start(up_null), rows_of(grads, 1), view_of(basis), rank,
                                   rows_of(d_grads, 1), view_of(d_basis));
  return {d_grads, d_basis};
}

// --- modulation ------------------------------------------------------------------------------------------------------

// (B, N, p) or (T, B, N, p) -> (1 or T, rows, p)
View tokens_view(Tensor& tokens) {
  if (tokens.dim() == 4) return rows_of(tokens, 1);
  View rows = rows_of(tokens), view = start(tokens);
  append(view, 1, 0);
  for (int i = 0; i < rows.dim; i++) append(view, rows.size[i], rows.stride[i]);
  return view;
}

Tensor empty_streams(const Tensor& tokens, const Tensor& weight) {
  STD_TORCH_CHECK((tokens.dim() == 3 || tokens.dim() == 4) && weight.dim() == 2 &&
                      weight.size(1) == tokens.size(tokens.dim() - 1) &&
                      (tokens.dim() == 3 || tokens.size(0) == weight.size(0)),
                  "dtme: tokens must be (B, N, p) or (T, B, N, p), and the weight (T, p)");
  int64_t first = tokens.dim() - 3;
  return empty(tokens, {weight.size(0), tokens.size(first), tokens.size(first + 1), tokens.size(first + 2)});
}

Tensor modulate(Tensor tokens, Tensor weight, Tensor bias) {
  Tensor out = empty_streams(tokens, weight);
  kernels->modulate(parallel(), tokens_view(tokens), view_of(weight), view_of(bias), {}, {}, 0, rows_of(out, 1), {});
  return out;
}

std::tuple<Tensor, Tensor, Tensor> modulate_backward(Tensor grad, Tensor tokens, Tensor weight) {
  Tensor d_tokens = empty_as(tokens), d_weight = empty_as(weight), d_bias = empty_as(weight);
  kernels->modulate_backward(parallel(), rows_of(grad, 1), {}, tokens_view(tokens), view_of(weight), {}, {}, 0,
                             tokens_view(d_tokens), view_of(d_weight), view_of(d_bias), {}, {});
  return {d_tokens, d_weight, d_bias};
}

std::tuple<Tensor, Tensor> modulate_layer_norm(Tensor tokens, Tensor weight, Tensor bias, Tensor norm_weight,
                                               Tensor norm_bias, double eps) {
  Tensor modulated = empty_streams(tokens, weight), normalized = empty_streams(tokens, weight);
  kernels->modulate(parallel(), tokens_view(tokens), view_of(weight), view_of(bias), view_of(norm_weight, 1),
                    view_of(norm_bias, 1), eps, rows_of(modulated, 1), rows_of(normalized, 1));
  return {modulated, normalized};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> modulate_layer_norm_backward(Tensor grad_modulated,
                                                                                Tensor grad_normalized, Tensor tokens,
                                                                                Tensor weight, Tensor bias,
                                                                                Tensor norm_weight, double eps) {
  Tensor d_tokens = empty_as(tokens), d_weight = empty_as(weight), d_bias = empty_as(bias);
  Tensor d_norm_weight = empty_as(norm_weight), d_norm_bias = empty_as(norm_weight);
  kernels->modulate_backward(parallel(), rows_of(grad_modulated, 1), rows_of(grad_normalized, 1), tokens_view(tokens),
                             view_of(weight), view_of(bias), view_of(norm_weight, 1), eps, tokens_view(d_tokens),
                             view_of(d_weight), view_of(d_bias), view_of(d_norm_weight, 1), view_of(d_norm_bias, 1));
  return {d_tokens, d_weight, d_bias, d_norm_weight, d_norm_bias};
}

// --- attention -------------------------------------------------------------------------------------------------------

// Whether a mask has one row for all of dimension i of (T, B, H, N, S). Its stride does not tell: it may be expanded.
bool broadcasts(const Tensor& mask, int64_t i) {
  int64_t own = i - 5 + mask.dim();
  return own < 0 || mask.size(own) == 1;
}

// (T, B, H, N, S) of a mask that broadcasts to it
View mask_view(const std::optional<Tensor>& mask, const View& query, const View& key) {
  if (!mask) return {};
  View view = start(*mask);
  int64_t full[] = {query.size[0], query.size[1], query.size[2], query.size[3], key.size[3]};
  for (int64_t i = 0; i < 5; i++) append(view, full[i], broadcasts(*mask, i) ? 0 : mask->stride(i - 5 + mask->dim()));
  return view;
}

Attention attention_of(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& task_key,
                       const Tensor& task_value, const std::optional<Tensor>& mask, bool causal,
                       std::optional<double> scale) {
  int lead = query.dim() == 4;  // one stream
  Attention a{view_of(query, lead), view_of(key, lead), view_of(value, lead), view_of(task_key, lead),
              view_of(task_value, lead), {}, causal, 0};
  a.mask = mask_view(mask, a.query, a.key);
  a.scale = scale.value_or(1 / std::sqrt(double(a.query.size[4])));
  return a;
}

// As the reference returns it: merging heads is a view.
std::tuple<Tensor, Tensor> attend(const Attention& a, const Tensor& like, std::vector<int64_t> size) {
  int64_t dim = size.size();
  std::swap(size[dim - 3], size[dim - 2]);
  Tensor output = torch::stable::transpose(empty(like, size), dim - 3, dim - 2);
  kernels->attend(parallel(), a, view_of(output, dim == 4));
  std::swap(size[dim - 3], size[dim - 2]);
  size.pop_back();
  size.insert(size.begin(), 2);
  return {output, torch::stable::new_zeros(like, size, ScalarType::Float)};
}

std::tuple<Tensor, Tensor> expanded_attention_forward(Tensor query, Tensor key, Tensor value, Tensor task_key,
                                                      Tensor task_value, std::optional<Tensor> mask, bool causal,
                                                      std::optional<double> scale) {
  return attend(attention_of(query, key, value, task_key, task_value, mask, causal, scale), query, sizes_of(query));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> expanded_attention_backward(
    Tensor grad, Tensor /* output */, Tensor /* statistics */, Tensor query, Tensor key, Tensor value, Tensor task_key,
    Tensor task_value, std::optional<Tensor> mask, bool causal, std::optional<double> scale, bool mask_grad) {
  Attention a = attention_of(query, key, value, task_key, task_value, mask, causal, scale);
  int lead = query.dim() == 4;
  Tensor d_query = empty_as(query), d_key = empty_as(key), d_value = empty_as(value);
  Tensor d_task_key = empty_as(task_key), d_task_value = empty_as(task_value), d_mask = empty(query, {0});
  View scores;
  if (mask_grad) {
    d_mask = empty(query, {a.mask.size, a.mask.size + 5}, wide(query));
    scores = view_of(d_mask);
  }
  kernels->attend_backward(parallel(), a, view_of(grad, lead), view_of(d_query, lead), view_of(d_key, lead),
                           view_of(d_value, lead), view_of(d_task_key, lead), view_of(d_task_value, lead), scores);
  if (mask_grad) {
    std::vector<int64_t> shared;
    for (int64_t i = 0; i < 5; i++)
      if (broadcasts(*mask, i)) shared.push_back(i);
    if (!shared.empty()) d_mask = torch::stable::sum(d_mask, shared, true);
    d_mask = torch::stable::to(torch::stable::reshape(d_mask, mask->sizes()), mask->scalar_type());
  }
  return {d_query, d_key, d_value, d_task_key, d_task_value, d_mask};
}

// Dimension `at` of a packed tensor taken at `i`, and the rest in the order of `dims`.
View unpack(const Tensor& packed, int at, int64_t i, std::vector<int> dims) {
  View view = start(packed);
  int64_t size = view.dtype == Dtype::float64 ? 8 : view.dtype == Dtype::float32 ? 4 : 2;
  view.data = static_cast<char*>(view.data) + i * packed.stride(at) * size;
  for (int dim : dims) append(view, packed.size(dim), packed.stride(dim));
  return view;
}
View of_qkv(const Tensor& qkv, int64_t i) { return unpack(qkv, 3, i, {0, 1, 4, 2, 5}); }
View of_task(const Tensor& task_kv, int64_t i) { return unpack(task_kv, 2, i, {0, 3, 1, 4}); }

// qkv (T, B, N, 3, H, d) and task_kv (T, t, 2, H, d)
Attention packed(const Tensor& qkv, const Tensor& task_kv, std::optional<double> scale) {
  return {of_qkv(qkv, 0), of_qkv(qkv, 1), of_qkv(qkv, 2), of_task(task_kv, 0), of_task(task_kv, 1), {}, false,
          scale.value_or(1 / std::sqrt(double(qkv.size(5))))};
}

std::tuple<Tensor, Tensor> packed_attention(Tensor qkv, Tensor task_kv, std::optional<double> scale) {
  Attention a = packed(qkv, task_kv, scale);
  return attend(a, qkv, {a.query.size, a.query.size + 5});
}

std::tuple<Tensor, Tensor> packed_attention_backward(Tensor grad, Tensor /* output */, Tensor /* statistics */,
                                                     Tensor qkv, Tensor task_kv, std::optional<double> scale) {
  Tensor d_qkv = empty_as(qkv), d_task_kv = empty_as(task_kv);
  kernels->attend_backward(parallel(), packed(qkv, task_kv, scale), view_of(grad), of_qkv(d_qkv, 0), of_qkv(d_qkv, 1),
                           of_qkv(d_qkv, 2), of_task(d_task_kv, 0), of_task(d_task_kv, 1), {});
  return {d_qkv, d_task_kv};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dtme, CPU, m) {
  m.impl("token_covariance", TORCH_BOX(&token_covariance));
  m.impl("token_covariance_", TORCH_BOX(&token_covariance_));
  m.impl("token_covariance_backward", TORCH_BOX(&token_covariance_backward));
  m.impl("count_conflicts", TORCH_BOX(&count_conflicts));
  m.impl("projected_dots", TORCH_BOX(&projected_dots));
  m.impl("projected_dots_backward", TORCH_BOX(&projected_dots_backward));
  m.impl("modulate", TORCH_BOX(&modulate));
  m.impl("modulate_backward", TORCH_BOX(&modulate_backward));
  m.impl("modulate_layer_norm", TORCH_BOX(&modulate_layer_norm));
  m.impl("modulate_layer_norm_backward", TORCH_BOX(&modulate_layer_norm_backward));
  m.impl("expanded_attention_forward", TORCH_BOX(&expanded_attention_forward));
  m.impl("expanded_attention_backward", TORCH_BOX(&expanded_attention_backward));
  m.impl("packed_attention", TORCH_BOX(&packed_attention));
  m.impl("packed_attention_backward", TORCH_BOX(&packed_attention_backward));
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "The C++ CPU kernels of torch.ops.dtme, registered when this is imported; and facts about them.";
  m.def("build_facts", [] {
    pybind11::dict facts;
    facts["compiler"] = DTME_COMPILER;
    facts["flags"] = DTME_FLAGS;
    facts["torch_target"] = DTME_TORCH_TARGET;
    return facts;
  }, "Compiler, flags, and the oldest torch that this binary runs with.");
  m.def("instruction_sets", [] {
    pybind11::list names;
    for (const Kernels& each : ALL)
      if (each.runs_here()) names.append(each.name);
    return names;
  }, "Those that the kernels are built for and this machine has, the best first.");
  m.def("instruction_set", [] { return kernels->name; }, "Whose kernels run.");
  m.def("use_instruction_set", [](const std::string& name) {
    for (const Kernels& each : ALL)
      if (each.name == name && each.runs_here()) {
        kernels = &each;
        return;
      }
    throw pybind11::value_error("instruction set must be one of instruction_sets(), got '" + name + "'");
  }, "Run those of another, for tests and measurements.");
  m.def("num_threads", [] { return torch::stable::get_num_threads(); }, "As torch.get_num_threads().");
}
