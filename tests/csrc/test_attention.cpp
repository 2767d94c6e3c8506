// Attention over shared and task keys and its gradients against plain loops.
#include "checks.h"

namespace dtme::test {
namespace {

struct Case {
  Dtype dtype;
  int64_t streams, images, heads, key_heads, queries, shared, task, d;
  char mask;  // none (or NaN in the first query), causal, bool for all heads, additive, additive for all queries
  Layout from, to;
};
struct Attended {
  Numbers out, dq, dk, dv, d_task_k, d_task_v, ds;
};

// in: query, key, value, task_key, task_value and the output's gradient; added: (T, B, H, N, S) or nothing
Attended attended(const Case& a, const Tensor* in, const Doubles& added, double scale) {
  int64_t keys = a.shared + a.task, d = a.d;
  Doubles q = in[0].values(), k = in[1].values(), v = in[2].values(), kt = in[3].values(), vt = in[4].values();
  Doubles grad = in[5].values();
  Attended o{Numbers(q.size()),  Numbers(q.size()),  Numbers(k.size()), Numbers(v.size()),
             Numbers(kt.size()), Numbers(vt.size()), Numbers(added.size())};
  for (int64_t row = 0; row < a.streams * a.images * a.heads * a.queries; row++) {
    int64_t image = row / a.queries / a.heads, head = row / a.queries % a.heads / (a.heads / a.key_heads);
    int64_t of_shared = (image * a.key_heads + head) * a.shared;
    int64_t of_task = (image / a.images * a.key_heads + head) * a.task - a.shared;
    auto pick = [&](auto& shared, auto& task, int64_t j) {
      return j < a.shared ? &shared[(of_shared + j) * d] : &task[(of_task + j) * d];
    };
    auto dot = [&](const double* x, const double* y) {
      return sum(d, [&](int64_t c) { return Number(x[c]) * y[c]; });
    };
    Numbers p(keys), dp(keys);
    double greatest = -INF;
    for (int64_t j = 0; j < keys; j++) {
      double more = j < a.shared && added.size() ? added[row * a.shared + j] : 0;
      if (j < a.shared && a.mask == 'c' && j > row % a.queries) more = -INF;
      p[j] = more == -INF ? Number(-INF) : dot(&q[row * d], pick(k, kt, j)) * scale + more;
      dp[j] = dot(&grad[row * d], pick(v, vt, j));
      greatest = std::max(greatest, p[j].x);
    }
    for (Number& x : p) x = x.x == -INF ? Number(0) : exponential(x - greatest);
    Number total = sum(keys, [&](int64_t j) { return p[j]; });
    for (Number& x : p) x = total.x == 0 ? Number(0) : x * inverse(total);
    Number mean = sum(keys, [&](int64_t j) { return p[j] * dp[j]; });
    for (int64_t j = 0; j < keys; j++) {
      Number ds = p[j] * (dp[j] - mean);
      if (j < a.shared && added.size()) o.ds[row * a.shared + j] = ds;
      for (int64_t c = 0; c < d; c++) {
        o.out[row * d + c] += p[j] * pick(v, vt, j)[c];
        o.dq[row * d + c] += ds * scale * pick(k, kt, j)[c];
        pick(o.dk, o.d_task_k, j)[c] += ds * scale * q[row * d + c];
        pick(o.dv, o.d_task_v, j)[c] += p[j] * grad[row * d + c];
      }
    }
  }
  return o;
}

// (T, B, H, N, S), with strides of 0 where all share it; here and there it hides a key, and all of them at first.
Tensor mask_of(const Case& a) {
  Sizes full{a.streams, a.images, a.heads, a.queries, a.shared}, own = full;
  if (a.mask == 'b') own = {1, 1, 1, a.queries, a.shared};
  if (a.mask == 'r') own[3] = 1;
  Tensor mask = random(a.mask == 'b' ? boolean : a.mask == 'r' ? wide(a.dtype) : a.dtype, own, a.to);
  for (int64_t j = 0; j < mask.count; j++)
    if (j < a.shared || (j % 7 == 0 && a.mask != 'b')) mask.put(j, -INF);
  for (int i = 0; i < 5; i++)
    if (own[i] != full[i]) mask.count *= mask.view.size[i] = full[i], mask.view.stride[i] = 0;
  return mask;
}

void check_attention(const Case& a) {
  name_of_case = "N = " + to_string(a.queries) + ", S = " + to_string(a.shared) + ", t = " + to_string(a.task) +
                 ", d = " + to_string(a.d) + ", mask " + a.mask;
  Dtype type = a.dtype;
  Sizes q{a.streams, a.images, a.heads, a.queries, a.d}, k{a.streams, a.images, a.key_heads, a.shared, a.d};
  Sizes task{a.streams, a.key_heads, a.task, a.d}, scores{q[0], q[1], q[2], q[3], a.shared};
  Tensor in[] = {random(type, q, a.from),    random(type, k, a.from), random(type, k, a.to),
                 random(type, task, a.from), random(type, task),      random(type, q, a.from)};
  Tensor out(type, q, a.to), dq(type, q, a.to), dk(type, k, a.to), dv(type, k), d_task_k(type, task, a.to);
  Tensor d_task_v(type, task), ds(wide(type), scores, a.queries % 2 ? DENSE : OFFSET);
  if (a.mask == 'N') in[0].put(0, NOT_A_NUMBER);
  Attention attention{in[0].view, in[1].view, in[2].view,     in[3].view,
                      in[4].view, {},         a.mask == 'c', 2 / std::sqrt(a.d)};
  Doubles added;
  bool masked = std::string("abr").find(a.mask) != std::string::npos;
  Tensor mask = mask_of(a);
  if (masked) {
    attention.mask = mask.view;
    added = mask.values();
    if (a.mask == 'b') std::transform(added.begin(), added.end(), added.begin(), [](double x) { return x ? 0 : -INF; });
  }
  Attended expected = attended(a, in, added, attention.scale);
  check(wide(type), {{"output", out, expected.out}}, [&](const Parallel& on) {
    kernels->attend(on, attention, out.view);
  });
  std::vector<Output> grads{{"d_query", dq, expected.dq}, {"d_key", dk, expected.dk}, {"d_value", dv, expected.dv}};
  grads.push_back({"d_task_key", d_task_k, expected.d_task_k});
  grads.push_back({"d_task_value", d_task_v, expected.d_task_v});
  if (masked) grads.push_back({"d_scores", ds, expected.ds});
  check(wide(type), grads, [&](const Parallel& on) {
    kernels->attend_backward(on, attention, in[5].view, dq.view, dk.view, dv.view, d_task_k.view, d_task_v.view,
                             masked ? ds.view : View{});
  });
}

// Tensors without an element, of sizes that together have more task keys than an int64 counts.
void check_overflow() {
  name_of_case = "more than can be counted";
  auto none = [](const Sizes& size) {
    View view;
    for (int64_t n : size) view.size[view.dim++] = n;
    return view;
  };
  View queries = none({1, int64_t(1) << 47, 1, 0, 1}), task = none({1, 1, 1 << 17, 1});
  bool caught = false;
  try {
    kernels->attend_backward(PARALLELS[0], {queries, queries, queries, task, task, {}, false, 1}, queries, queries,
                             queries, queries, task, task, {});
  } catch (const std::bad_alloc&) {
    caught = true;
  }
  expect(caught, "exception", 1, caught);
}

}  // namespace

void test_attention() {
  const Case cases[] = {
      {float32, 2, 2, 4, 2, 7, 9, 6, 16, 'n', DENSE, DENSE},
      {float32, 1, 1, 1, 1, 1, 1, 0, 1, 'n', DENSE, DENSE},
      {float64, 2, 3, 2, 1, 1, 0, 6, 33, 'n', OFFSET, SPACED},
      {float32, 1, 2, 3, 3, 5, 0, 6, 16, 'b', DENSE, DENSE},
      {float16, 2, 1, 2, 2, 20, 20, 0, 33, 'c', SPACED, OFFSET},
      {bfloat16, 1, 2, 4, 1, 19, 23, 6, 64, 'b', OFFSET, DENSE},
      {float32, 2, 2, 2, 2, 17, 33, 0, 1, 'b', TRANSPOSED, DENSE},
      {float64, 1, 2, 2, 2, 40, 30, 6, 16, 'a', DENSE, OFFSET},
      {float32, 2, 2, 4, 2, 30, 40, 6, 33, 'r', EXPANDED, DENSE},
      {float16, 1, 1, 2, 2, 9, 50, 6, 64, 'a', DENSE, OFFSET},
      {float32, 2, 1, 2, 1, 200, 60, 6, 33, 'c', DENSE, TRANSPOSED},
      {float64, 1, 1, 1, 1, 101, 35, 6, 64, 'b', DENSE, DENSE},
      {float32, 1, 1, 1, 1, 31, 1500, 6, 16, 'n', DENSE, DENSE},
      {float32, 1, 2, 2, 2, 0, 5, 6, 16, 'n', DENSE, DENSE},
      {float32, 2, 2, 2, 2, 5, 0, 0, 16, 'n', DENSE, DENSE},
      {bfloat16, 30, 2, 1, 1, 3, 4, 2, 5, 'r', SPACED, DENSE},
      {float32, 1, 1, 2, 1, 3, 4, 2, 5, 'N', DENSE, DENSE},
  };
  for (const Case& each : cases) check_attention(each);
  check_overflow();
  far([] { check_attention({float32, 1, 1, 1, 1, 3, 3, 3, 16, 'a', FAR, FAR}); });
}

}  // namespace dtme::test
