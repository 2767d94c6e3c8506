// Counts of sign conflicts, dots and their gradients against plain loops.
#include "checks.h"

namespace dtme::test {
namespace {

// An orthonormal basis, its vectors the columns: Gram-Schmidt, twice over.
Doubles orthonormal(int64_t p) {
  Doubles u(p * p);
  for (double& x : u) x = uniform();
  for (int64_t i = 0, c = 0; i < 2 * p; c = ++i / 2)
    for (int64_t b = 0; b <= c; b++) {
      double dot = 0;
      for (int64_t k = 0; k < p; k++) dot += u[k * p + b] * u[k * p + c];
      for (int64_t k = 0; k < p; k++) b < c ? u[k * p + c] -= dot * u[k * p + b] : u[k * p + c] /= std::sqrt(dot);
    }
  return u;
}

struct Counts {
  Sizes range, null, valid, nonfinite;
  Counts(size_t ranks, int64_t tasks)
      : range(ranks * tasks * tasks), null(range), valid(tasks * tasks), nonfinite(1) {}
};

// What is counted; `doubtful`: how many of these signs rounding may turn.
Counts count(const Tensor& grads, const Tensor& basis, const Sizes& ranks, bool count_zero, Counts& doubtful) {
  int64_t tasks = grads.view.size[0], p = basis.view.size[0], tokens = grads.count / tasks / p;
  Doubles g = grads.values(), u = basis.values(), h(tasks * p), norm(tasks), peak(tasks);
  bool usable = std::all_of(u.begin(), u.end(), [](double x) { return std::isfinite(x); });
  Counts counts(ranks.size(), tasks);
  for (int64_t token = 0; token < tokens; token++) {
    for (int64_t i = 0; i < tasks; i++) {
      double *x = &g[(i * tokens + token) * p], *y = &h[i * p];
      peak[i] = norm[i] = 0;
      for (int64_t c = 0; c < p; c++) peak[i] = std::isfinite(x[c]) ? std::max(peak[i], std::abs(x[c])) : NOT_A_NUMBER;
      for (int64_t c = 0; c < p; c++) x[c] = peak[i] > 0 ? std::ldexp(x[c], -std::ilogb(peak[i])) : 0;
      for (int64_t c = 0; c < p; c++) norm[i] += x[c] * x[c];
      std::fill_n(y, p, 0);
      for (int64_t k = 0; k < p; k++)
        for (int64_t c = 0; c < p; c++) y[c] += x[k] * u[k * p + c];
    }
    for (int64_t pair = 0; pair < tasks * tasks; pair++) {
      int64_t i = pair / tasks, j = pair % tasks;
      bool finite = usable && !std::isnan(peak[i]) && !std::isnan(peak[j]);
      counts.nonfinite[0] += i < j && !finite;
      if (i == j || !finite || (!count_zero && (peak[i] == 0 || peak[j] == 0))) continue;
      counts.valid[pair]++;
      double doubt = 64 * rounding(wide(grads.view.dtype)) * std::sqrt(norm[i] * norm[j]);
      for (size_t r = 0; r < ranks.size(); r++) {
        double dots[2] = {};
        for (int64_t c = 0; c < p; c++) dots[c >= ranks[r]] += h[i * p + c] * h[j * p + c];
        counts.range[r * tasks * tasks + pair] += dots[0] <= 0;
        counts.null[r * tasks * tasks + pair] += dots[1] <= 0;
        doubtful.range[r * tasks * tasks + pair] += dots[0] != 0 && std::abs(dots[0]) <= doubt;
        doubtful.null[r * tasks * tasks + pair] += dots[1] != 0 && std::abs(dots[1]) <= doubt;
      }
    }
  }
  return counts;
}

// In a `weak` space every sign is in doubt: one of 2,000 may differ, where otherwise none but the doubtful may.
void check_counts(const Tensor& grads, const Tensor& basis, const Sizes& ranks, bool count_zero, bool weak = false) {
  int64_t tasks = grads.view.size[0];
  Counts allowed(ranks.size(), tasks), expected = count(grads, basis, ranks, count_zero, allowed);
  if (weak) allowed.range = allowed.null = Sizes(allowed.null.size(), expected.valid[1] / 2000);
  Counts first(ranks.size(), tasks);
  for (const Parallel& parallel : PARALLELS) {
    Counts got(ranks.size(), tasks);
    kernels->count_conflicts(parallel, grads.view, basis.view, ranks.size(), ranks.data(), count_zero, got.range.data(),
                             got.null.data(), got.valid.data(), got.nonfinite.data());
    if (&parallel == PARALLELS) first = got;
    for (auto member : {&Counts::range, &Counts::null, &Counts::valid, &Counts::nonfinite}) {
      const char* what = member == &Counts::range ? "range" : member == &Counts::null ? "null" : "valid or nonfinite";
      expect(got.*member == first.*member, std::string(what) + " is the same on threads", 1, 0);
      for (size_t i = 0; i < (got.*member).size(); i++) {
        int64_t apart = std::abs((got.*member)[i] - (expected.*member)[i]);
        expect(apart <= (allowed.*member)[i], std::string(what) + "[" + to_string(i) + "]", (expected.*member)[i],
               (got.*member)[i]);
      }
    }
  }
}

void check_dots(const Tensor& grads, const Tensor& basis, int64_t rank, Layout layout) {
  int64_t tasks = grads.view.size[0], p = basis.view.size[0], tokens = grads.count / tasks / p;
  Sizes size{tasks * (tasks - 1) / 2, tokens};
  Dtype dtype = wide(grads.view.dtype);
  Tensor range(dtype, size), null(dtype, size), up[] = {random(dtype, size), random(dtype, size)};
  Tensor d_grads(grads.view.dtype, {grads.view.size, grads.view.size + grads.view.dim}, layout);
  Tensor d_basis(basis.view.dtype, {p, p}, layout);
  Doubles g = grads.values(), u = basis.values(), w[2] = {up[0].values(), up[1].values()};
  Numbers h(tasks * tokens * p), dh(h), dg(h), du(p * p), dots[2] = {Numbers(range.count), Numbers(range.count)};
  for (size_t i = 0; i < h.size(); i++)
    h[i] = sum(p, [&](int64_t k) { return Number(g[i / p * p + k]) * u[k * p + i % p]; });
  for (int64_t i = 0, pair = 0; i < tasks; i++)
    for (int64_t j = i + 1; j < tasks; j++, pair++)
      for (int64_t n = 0; n < tokens * p; n++) {
        int64_t a = i * tokens * p + n, b = j * tokens * p + n, to = pair * tokens + n / p, is_null = n % p >= rank;
        dots[is_null][to] += h[a] * h[b];
        dh[a] += Number(w[is_null][to]) * h[b];
        dh[b] += Number(w[is_null][to]) * h[a];
      }
  for (size_t i = 0; i < h.size(); i++)
    for (int64_t k = 0; k < p; k++) {
      dg[i] += dh[i / p * p + k] * u[i % p * p + k];
      du[i % p * p + k] += Number(g[i]) * dh[i / p * p + k];
    }
  check(dtype, {{"range", range, dots[0]}, {"null", null, dots[1]}}, [&](const Parallel& on) {
    kernels->projected_dots(on, grads.view, basis.view, rank, range.view, null.view);
  });
  check(dtype, {{"d_grads", d_grads, dg}, {"d_basis", d_basis, du}}, [&](const Parallel& on) {
    kernels->projected_dots_backward(on, up[0].view, up[1].view, grads.view, basis.view, rank, d_grads.view,
                                     d_basis.view);
  });
}

void check_weak_null_space(Dtype dtype) {
  int64_t p = 130, tokens = 4000, tasks = 3;
  Doubles u = orthonormal(p);
  Tensor basis = filled(Tensor(dtype, {p, p}), [&](int64_t k) { return u[k]; });
  for (int64_t rank : {20, 60, 110}) {
    name_of_case = "weak null space, rank " + to_string(rank);
    Doubles g(tasks * tokens * p);
    for (int64_t i = 0; i < tasks * tokens * p; i++) {
      double z = uniform() * (i % p < rank ? 1000 : 1);
      for (int64_t c = 0; c < p; c++) g[i / p * p + c] += u[c * p + i % p] * z;
    }
    Tensor grads = filled(Tensor(dtype, {tasks, tokens, p}, OFFSET), [&](int64_t i) { return g[i]; });
    check_counts(grads, basis, {rank}, false, true);
  }
}

// A basis that has lost all of a direction, or a little of it, which both gradients have most of: what they have of it
// must not be taken for what the basis leaves to the other space. The direction is the difference of two channels that
// are alike in each of eight vectors of signs: no estimate along these would see it.
void check_lost_direction(Dtype dtype) {
  constexpr int64_t p = 130, tokens = 200;
  std::vector<int> signs(p);
  uint64_t state = 0x9e3779b97f4a7c15;
  for (int64_t i = 0; i < 8 * p; i++) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    signs[i / 8] = signs[i / 8] << 1 | int(state >> 63);
  }
  int64_t a = 0, b = 1;
  while (signs[a] != signs[b])
    if (++b == p) b = ++a + 1;
  for (double lost : {1.0, 1e-4})
    for (int64_t rank : {30, 100}) {
      name_of_case = "a lost direction, rank " + to_string(rank) + ", lost " + to_string(lost);
      Sizes order(p);  // of columns: both channels in the smaller space, c in the larger
      for (int64_t i = 0; i < p; i++) order[i] = i;
      std::swap(order[rank == 30 ? 0 : p - 1], order[a]);
      std::swap(order[rank == 30 ? 1 : p - 2], order[b]);
      int64_t c = rank == 30 ? 120 : 10;
      // U = 1 - lost v v^T, v = (e_a - e_b) / sqrt(2); g = v + x e_c and v - x e_c
      double x = lost == 1 ? 0.5 : 0.01, v = std::sqrt(0.5);
      Tensor basis = filled(Tensor(dtype, {p, p}), [&](int64_t i) {
        int64_t row = i / p, column = order[i % p];
        bool both = (row == a || row == b) && (column == a || column == b);
        return (row == column) - (both ? (row == column ? 0.5 : -0.5) * lost : 0);
      });
      Tensor grads = filled(Tensor(dtype, {2, tokens, p}), [&](int64_t i) {
        return i % p == a ? v : i % p == b ? -v : i % p == c ? (i < tokens * p ? x : -x) : 0;
      });
      check_counts(grads, basis, {rank}, false);
    }
}

}  // namespace

void test_conflicts() {
  constexpr Dtype DTYPES[] = {float32, bfloat16, float64, float16};
  constexpr double EXTREMES[] = {1e30, 1e-30, 0, NOT_A_NUMBER, INF};
  int64_t i = 0;
  for (int64_t p : {1, 5, 33, 70, 130}) {
    Doubles u = orthonormal(p);
    for (int64_t tasks = 2; tasks <= 9; tasks++, i++) {
      name_of_case = "p = " + to_string(p) + ", K = " + to_string(tasks) + ", case " + to_string(i);
      int64_t tokens = Sizes{41, 1, 90, 0, 24}[i % 5];
      Dtype dtype = DTYPES[(i + i / 4) % 4];
      Tensor grads = random(dtype, i % 3 ? Sizes{tasks, tokens, p} : Sizes{tasks, 1, tokens, p}, Layout(i % FAR));
      // in the basis of half precision nothing is orthonormal, that of float32 is not quite
      Tensor basis(i % 7 == 6 ? bfloat16 : i % 2 ? float32 : wide(dtype), {p, p}, Layout(i % EXPANDED));
      for (int64_t k = 0; k < p * p; k++) basis.put(k, u[k]);
      check_dots(grads, basis, i % 8 ? p * (i % 4) / 4 : p, Layout((i + 1) % EXPANDED));
      if (p > 1) check_counts(grads, basis, {p / 8, p / 3 + 1, p / 2 + 1, p}, false);
      if (i % FAR != EXPANDED)
        for (int64_t k = 0; k < std::min<int64_t>(tokens, 10) * p; k++)  // of every other token, in one of two tasks
          if (int64_t e = k / p / 2, at = e % 2 * tokens * p + k; k / p % 2 && (e < 3 || k % p == p / 2))
            grads.put(at, grads.get(at) * EXTREMES[e]);
      check_counts(grads, basis, {0, 7 * p / 8 + 1}, i % 2);
      check_counts(grads, basis, {p / 8}, i % 3 == 0);
      if (i % 8 == 0) basis.put(p - 1, NOT_A_NUMBER);
      check_counts(grads, basis, {}, true);
    }
    name_of_case = "whole numbers, p = " + to_string(p);  // every sign is certain, many products are zero
    Tensor digits = filled(Tensor(float32, {3, 100, p}), [](int64_t) { return std::nearbyint(uniform()); });
    check_counts(digits, filled(Tensor(float32, {p, p}), [&](int64_t k) { return k / p == k % p; }), {p / 4, p}, true);
  }
  name_of_case = "several stretches";
  check_dots(random(float32, {2, 3100, 5}), random(float32, {5, 5}), 2, DENSE);
  for (Dtype dtype : {float32, float64}) check_weak_null_space(dtype);
  for (Dtype dtype : {float32, float64}) check_lost_direction(dtype);
  far([] {
    check_counts(random(float32, {3, 1, 70}, FAR), random(float32, {70, 70}), {30}, true);
    check_dots(random(float32, {3, 1, 70}, FAR), random(float32, {70, 70}), 30, DENSE);
  });
}

}  // namespace dtme::test
