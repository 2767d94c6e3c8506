// C += x^T x and its gradient against plain loops.
#include "checks.h"

namespace dtme::test {
namespace {

void check_covariance(const std::vector<Tensor>& tokens, Dtype sums_dtype) {
  std::vector<Output> sums;
  std::vector<View> from, to;
  for (const Tensor& x : tokens) {
    int64_t p = x.view.size[x.view.dim - 1], rows = x.count / p;
    Tensor sum_of = random(sums_dtype, {p, p}, Layout(sums.size() % EXPANDED));
    Doubles before = sum_of.values(), t = x.values();
    Numbers c(before.begin(), before.end());
    for (int64_t i = 0; i < p; i++)
      for (int64_t j = 0; j <= i; j++) {  // C += x^T x
        Number more = sum(rows, [&](int64_t k) { return Number(t[k * p + i]) * t[k * p + j]; });
        c[i * p + j] += more;
        if (i != j) c[j * p + i] += more;
      }
    from.push_back(x.view);
    to.push_back(sum_of.view);
    sums.push_back({"covariance of layer " + to_string(sums.size()), sum_of, c});
  }
  // float32 where some layers are: then their bound holds for all
  check(sums_dtype == float32 || tokens.size() > 1 ? float32 : float64, sums, [&](const Parallel& on) {
    kernels->accumulate_covariance(on, to.size(), to.data(), from.data());
  });
}

void check_covariance_backward(const Tensor& tokens, Dtype grad_dtype, Layout layout) {
  int64_t p = tokens.view.size[tokens.view.dim - 1];
  Tensor grad = random(grad_dtype, {p, p}, layout);
  Tensor d_tokens(tokens.view.dtype, {tokens.view.size, tokens.view.size + tokens.view.dim}, Layout(layout % EXPANDED));
  Doubles x = tokens.values(), g = grad.values();
  Numbers dx;
  for (int64_t i = 0; i < tokens.count; i++)  // dx = (G + G^T) x
    dx.push_back(sum(p, [&](int64_t k) {
      return Number(x[i / p * p + k]) * (Number(g[k * p + i % p]) + g[i % p * p + k]);
    }));
  check(grad_dtype, {{"d_tokens", d_tokens, dx}}, [&](const Parallel& on) {
    kernels->covariance_backward(on, grad.view, tokens.view, d_tokens.view);
  });
}

}  // namespace

void test_covariance() {
  for (int64_t p : {1, 5, 33, 70, 130})
    for (Dtype sums : {float32, float64}) {
      name_of_case = "p = " + to_string(p);
      std::vector<Tensor> tokens{random(float32, {3, 100, p}, TRANSPOSED), random(float64, {257, p}, OFFSET),
                                 random(bfloat16, {2, 2, 7, p}, SPACED),   random(float32, {0, p}),
                                 random(float16, {1, p}),                  random(float32, {4, 70, p}, EXPANDED)};
      check_covariance(tokens, sums);
      check_covariance({random(float64, {300, p})}, float64);
      for (size_t i = 0; i < tokens.size(); i++)
        check_covariance_backward(tokens[i], tokens[i].view.dtype == float64 ? float64 : sums, Layout(i % FAR));
    }
  name_of_case = "more than is packed at a time";
  check_covariance({random(float32, {66000, 33}), random(float16, {300, 33})}, float32);
  check_covariance({}, float32);
  far([] {
    check_covariance({random(float32, {3, 70}, FAR)}, float32);
    check_covariance_backward(random(float32, {3, 70}, FAR), float32, DENSE);
  });
}

}  // namespace dtme::test
