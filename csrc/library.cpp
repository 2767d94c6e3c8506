// The kernels as CPU implementations of torch.ops.dtme, through torch's stable ABI, and what `_C` tells about itself.
//
// Schemas, gradients and checks are Python's (dtme_kernels/*/op.py): nothing comes here that has not passed
// Operator._run of dtme_kernels/registry.py. Here tensors become views, results are allocated, and the kernels of the
// best instruction set that this machine has are called.

#include <pybind11/pybind11.h>
#include <torch/csrc/stable/library.h>

#include <string>

#include "instruction_sets.h"
#include "tensors.h"

namespace {

using namespace dtme;

// --- which kernels ---------------------------------------------------------------------------------------------------

const Kernels* best() {
  for (const Kernels& each : INSTRUCTION_SETS)
    if (each.runs_here()) return &each;
  return nullptr;
}
const Kernels* kernels = best();

void run(int64_t n, int64_t grain, Parallel::Function function, void* context) {
  torch::stable::parallel_for(0, n, grain, [=](int64_t begin, int64_t end) { function(begin, end, context); });
}
Parallel parallel() { return {run, torch::stable::get_num_threads()}; }

// --- covariance ------------------------------------------------------------------------------------------------------

void token_covariance_(Tensor sums, std::vector<Tensor> tokens) {
  bool grouped = sums.dim() == 3;
  int64_t p = sums.size(sums.dim() - 1), layers = tokens.size();
  sums.mutable_data_ptr();  // a lazy clone becomes a real one before it is written to
  std::vector<View> targets, sources;
  for (int64_t i = 0; i < layers; i++) {
    targets.push_back(start(sums, 0, grouped ? i : 0));
    for (int64_t at = grouped; at < sums.dim(); at++) append(targets[i], p, sums.stride(at));
    sources.push_back(rows_of(tokens[i]));
  }
  kernels->accumulate_covariance(parallel(), layers, targets.data(), sources.data());
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

std::tuple<Tensor, Tensor, Tensor, Tensor> count_conflicts(Tensor grads, Tensor basis, Sizes ranks,
                                                           bool count_zero_gradients) {
  int64_t num_tasks = grads.size(0), num_ranks = ranks.size();
  auto zeros = [&](Sizes size) { return torch::stable::new_zeros(grads, size, ScalarType::Long); };
  Tensor range = zeros({num_ranks, num_tasks, num_tasks}), null = zeros({num_ranks, num_tasks, num_tasks});
  Tensor valid = zeros({num_tasks, num_tasks}), nonfinite = zeros({});
  auto data = [](const Tensor& x) { return static_cast<int64_t*>(x.mutable_data_ptr()); };
  kernels->count_conflicts(parallel(), rows_of(grads, 1), view_of(basis), num_ranks, ranks.data(), count_zero_gradients,
                           data(range), data(null), data(valid), data(nonfinite));
  return {range, null, valid, nonfinite};
}

// (P, ...): a number for every pair of tasks and token
Sizes pairs_of(const Tensor& grads) {
  Sizes size = sizes_of(grads);
  size.pop_back();
  size[0] = size[0] * (size[0] - 1) / 2;
  return size;
}

std::tuple<Tensor, Tensor> projected_dots(Tensor grads, Tensor basis, int64_t rank) {
  Sizes size = pairs_of(grads);
  Tensor range = empty(grads, size, wide(grads)), null = empty(grads, size, wide(grads));
  kernels->projected_dots(parallel(), rows_of(grads, 1), view_of(basis), rank, start(range), start(null));
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

// (T, B, N, p) of all streams
Sizes streams_of(const Tensor& tokens, const Tensor& weight) {
  Sizes size = sizes_of(tokens);
  if (tokens.dim() == 3) size.insert(size.begin(), weight.size(0));
  return size;
}

Tensor modulate(Tensor tokens, Tensor weight, Tensor bias) {
  Tensor out = empty(tokens, streams_of(tokens, weight));
  kernels->modulate(parallel(), tokens_view(tokens), view_of(weight), view_of(bias), {}, {}, 0, rows_of(out, 1), {});
  return out;
}

std::tuple<Tensor, Tensor, Tensor> modulate_backward(Tensor grad, Tensor tokens, Tensor weight) {
  Tensor d_tokens = empty_as(tokens), d_weight = empty_as(weight), d_bias = empty_as(weight);
  kernels->modulate_backward(parallel(), rows_of(grad, 1), {}, tokens_view(tokens), view_of(weight), {}, {}, 0,
                             tokens_view(d_tokens), view_of(d_weight), view_of(d_bias), {}, {});
  return {d_tokens, d_weight, d_bias};
}

std::tuple<Tensor, Tensor, Tensor> modulate_layer_norm_forward(Tensor tokens, Tensor weight, Tensor bias,
                                                               Tensor norm_weight, Tensor norm_bias, double eps) {
  Sizes size = streams_of(tokens, weight);
  Tensor modulated = empty(tokens, size), normalized = empty(tokens, size);
  kernels->modulate(parallel(), tokens_view(tokens), view_of(weight), view_of(bias), view_of(norm_weight, 1),
                    view_of(norm_bias, 1), eps, rows_of(modulated, 1), rows_of(normalized, 1));
  // the backward forms the statistics again, from rows that are cached
  return {modulated, normalized, torch::stable::new_zeros(tokens, {2, size[0], size[1], size[2]}, ScalarType::Float)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> modulate_layer_norm_backward(
    Tensor grad_modulated, Tensor grad_normalized, Tensor /* statistics */, Tensor tokens, Tensor weight, Tensor bias,
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
  View view = start(*mask, 0, 0, true);
  Sizes full = {query.size[0], query.size[1], query.size[2], query.size[3], key.size[3]};
  for (int64_t i = 0; i < 5; i++) {
    int64_t own = i - 5 + mask->dim();
    append(view, full[i], broadcasts(*mask, i) ? 0 : mask->stride(own));
  }
  return view;
}

// With the scale it is given, or 1 / sqrt(d)
Attention with_scale(Attention a, std::optional<double> scale) {
  a.scale = scale.value_or(1 / std::sqrt(double(a.query.size[4])));
  return a;
}

Attention attention_of(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& task_key,
                       const Tensor& task_value, const std::optional<Tensor>& mask, bool causal,
                       std::optional<double> scale) {
  int lead = query.dim() == 4;  // one stream
  Attention a{view_of(query, lead), view_of(key, lead), view_of(value, lead), view_of(task_key, lead),
              view_of(task_value, lead), {}, causal, 0};
  a.mask = mask_view(mask, a.query, a.key);
  return with_scale(a, scale);
}

// As the reference returns it: merging heads is a view. And zeros for the statistics, which only Triton's kernels want, in
// the shape that attention/arguments.py gives them.
std::tuple<Tensor, Tensor> attend(const Attention& a, const Tensor& like, Sizes size) {
  int64_t dim = size.size();
  std::swap(size[dim - 3], size[dim - 2]);
  Tensor output = torch::stable::transpose(empty(like, size), dim - 3, dim - 2);
  kernels->attend(parallel(), a, view_of(output, dim == 4));
  std::swap(size[dim - 3], size[dim - 2]);
  size.pop_back();
  bool additive = a.mask.dim && a.mask.dtype != Dtype::boolean;
  size.insert(size.end() - 1, additive || wide(like) == like.scalar_type() ? 2 : 1);
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
  mask_grad &= mask && dtype_of(*mask) != Dtype::boolean;
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
    Sizes shared;
    for (int64_t i = 0; i < 5; i++)
      if (broadcasts(*mask, i)) shared.push_back(i);
    if (!shared.empty()) d_mask = torch::stable::sum(d_mask, shared, true);
    d_mask = torch::stable::to(torch::stable::reshape(d_mask, mask->sizes()), mask->scalar_type());
  }
  return {d_query, d_key, d_value, d_task_key, d_task_value, d_mask};
}

// Dimension `at` of a packed tensor taken at `i`, and the rest in the order of `dims`.
View unpack(const Tensor& packed, int at, int64_t i, std::vector<int> dims) {
  View view = start(packed, at, i);
  for (int dim : dims) append(view, packed.size(dim), packed.stride(dim));
  return view;
}
View of_qkv(const Tensor& qkv, int64_t i) { return unpack(qkv, 3, i, {0, 1, 4, 2, 5}); }
View of_task(const Tensor& task_kv, int64_t i) { return unpack(task_kv, 2, i, {0, 3, 1, 4}); }

// qkv (T, B, N, 3, H, d) and task_kv (T, t, 2, H, d)
Attention packed(const Tensor& qkv, const Tensor& task_kv, std::optional<double> scale) {
  Attention a{of_qkv(qkv, 0), of_qkv(qkv, 1), of_qkv(qkv, 2), of_task(task_kv, 0), of_task(task_kv, 1), {}, false, 0};
  return with_scale(a, scale);
}

std::tuple<Tensor, Tensor> packed_attention(Tensor qkv, Tensor task_kv, std::optional<double> scale) {
  Attention a = packed(qkv, task_kv, scale);
  return attend(a, qkv, {a.query.size, a.query.size + 5});
}

std::tuple<Tensor, Tensor> packed_attention_backward(Tensor grad, Tensor /* output */, Tensor /* statistics */,
                                                     Tensor qkv, Tensor task_kv, std::optional<double> scale) {
  Attention a = packed(qkv, task_kv, scale);
  Tensor d_qkv = empty_as(qkv), d_task_kv = empty_as(task_kv);
  kernels->attend_backward(parallel(), a, view_of(grad), of_qkv(d_qkv, 0), of_qkv(d_qkv, 1),
                           of_qkv(d_qkv, 2), of_task(d_task_kv, 0), of_task(d_task_kv, 1), {});
  return {d_qkv, d_task_kv};
}

// Every operator's last argument, impl, says what is to run it; here that is settled.
template <auto function>
void without_impl(StableIValue* stack, uint64_t num_args, uint64_t num_outputs) {
  torch::stable::detail::to<std::string>(stack[num_args - 1]);  // takes what the handle owns
  function(stack, num_args - 1, num_outputs);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dtme, CPU, m) {
  m.impl("token_covariance", without_impl<TORCH_BOX(&token_covariance)>);
  m.impl("token_covariance_", without_impl<TORCH_BOX(&token_covariance_)>);
  m.impl("token_covariance_backward", without_impl<TORCH_BOX(&token_covariance_backward)>);
  m.impl("count_conflicts", without_impl<TORCH_BOX(&count_conflicts)>);
  m.impl("projected_dots", without_impl<TORCH_BOX(&projected_dots)>);
  m.impl("projected_dots_backward", without_impl<TORCH_BOX(&projected_dots_backward)>);
  m.impl("modulate", without_impl<TORCH_BOX(&modulate)>);
  m.impl("modulate_backward", without_impl<TORCH_BOX(&modulate_backward)>);
  m.impl("modulate_layer_norm_forward", without_impl<TORCH_BOX(&modulate_layer_norm_forward)>);
  m.impl("modulate_layer_norm_backward", without_impl<TORCH_BOX(&modulate_layer_norm_backward)>);
  m.impl("expanded_attention_forward", without_impl<TORCH_BOX(&expanded_attention_forward)>);
  m.impl("expanded_attention_backward", without_impl<TORCH_BOX(&expanded_attention_backward)>);
  m.impl("packed_attention", without_impl<TORCH_BOX(&packed_attention)>);
  m.impl("packed_attention_backward", without_impl<TORCH_BOX(&packed_attention_backward)>);
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
    for (const Kernels& each : INSTRUCTION_SETS)
      if (each.runs_here()) names.append(each.name);
    return names;
  }, "Those that the kernels are built for and this machine has, the best first.");
  m.def("instruction_set", [] { return kernels->name; }, "Whose kernels run.");
  m.def("use_instruction_set", [](const std::string& name) {
    for (const Kernels& each : INSTRUCTION_SETS)
      if (each.name == name && each.runs_here()) {
        kernels = &each;
        return;
      }
    throw pybind11::value_error("instruction set must be one of instruction_sets(), got '" + name + "'");
  }, "Run those of another, for tests and measurements.");
  m.def("num_threads", [] { return torch::stable::get_num_threads(); }, "As torch.get_num_threads().");
}
