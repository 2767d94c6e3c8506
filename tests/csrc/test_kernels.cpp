// The kernels of one instruction set against plain loops in double: test_kernels portable|avx2|avx512.
//
// Every result is formed by one thread, by four, and piece by piece from the end, and must have the same bits each time.
// Buffers are exactly as large as their views need, so that AddressSanitizer sees an access outside; outputs are NaN
// before a call, and what lies between their elements must stay as it was.

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <new>
#include <source_location>
#include <string>
#include <thread>
#include <vector>

#include "kernels.h"

namespace {

using namespace dtme;
using enum Dtype;
using Where = std::source_location;
using Sizes = std::vector<int64_t>;
using Doubles = std::vector<double>;
constexpr double INF = std::numeric_limits<double>::infinity(), NOT_A_NUMBER = std::numeric_limits<double>::quiet_NaN();

// --- which kernels, and who runs them --------------------------------------------------------------------------------

struct Kernels {
  std::string name;
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
};
#define DTME_KERNELS(isa)                                                                                        \
  isa::accumulate_covariance, isa::covariance_backward, isa::count_conflicts, isa::projected_dots,               \
      isa::projected_dots_backward, isa::modulate, isa::modulate_backward, isa::attend, isa::attend_backward
const Kernels ALL[] = {
    {"portable", [] { return true; }, DTME_KERNELS(portable)},
#if defined(__x86_64__)
    {"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }, DTME_KERNELS(avx2)},
    {"avx512",
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
     },
     DTME_KERNELS(avx512)},
#endif
};
const Kernels* kernels = nullptr;

void alone(int64_t n, int64_t, Parallel::Function f, void* context) {
  if (n > 0) f(0, n, context);
}
void on_threads(int64_t n, int64_t grain, Parallel::Function f, void* context) {
  int64_t parts = n > grain ? std::min<int64_t>(n, 4) : 1;
  std::vector<std::thread> threads;
  for (int64_t i = 1; i < parts; i++) threads.emplace_back(f, n * i / parts, n * (i + 1) / parts, context);
  alone(n / parts, grain, f, context);
  for (std::thread& thread : threads) thread.join();
}
// Shows what depends on where a part begins, or on what ran before it.
void from_the_end(int64_t n, int64_t grain, Parallel::Function f, void* context) {
  if (n <= grain) return alone(n, grain, f, context);
  while (n-- > 0) f(n, n + 1, context);
}
const Parallel PARALLELS[] = {{alone, 1}, {on_threads, 4}, {from_the_end, 1000}};

// --- reports ---------------------------------------------------------------------------------------------------------

std::string context;  // the case that is being checked
int64_t checks = 0, failures = 0;
double worst = 0;  // error, as a part of what is tolerated

void expect(bool ok, const char* what, double expected, double got, int64_t index, const Where& where) {
  checks++;
  if (ok) return;
  failures++;
  printf("FAILED %s[%lld], %s: %s:%u: expected %.10g, got %.10g\n", what, (long long)index, context.c_str(),
         where.file_name(), unsigned(where.line()), expected, got);
}

// --- numbers of every dtype ------------------------------------------------------------------------------------------

Dtype wide(Dtype dtype) { return dtype == float64 ? float64 : float32; }
int bytes_of(Dtype dtype) { return dtype == float64 ? 8 : dtype == float32 ? 4 : dtype == boolean ? 1 : 2; }
int fraction_bits(Dtype dtype) { return dtype == float64 ? 52 : dtype == float32 ? 23 : dtype == float16 ? 10 : 7; }
double epsilon(Dtype dtype) { return std::ldexp(1, -fraction_bits(dtype)); }
double smallest(Dtype dtype) { return dtype == float16 ? 0x1p-24 : dtype == bfloat16 ? 0x1p-133 : 0x1p-149; }

// The two dtypes of 16 bits, in arithmetic, so that nothing is shared with the tricks of the kernels.
double decode(uint16_t bits, int fraction_bits) {
  int top = (1 << (15 - fraction_bits)) - 1, exponent = bits >> fraction_bits & top, bias = top >> 1;
  int fraction = bits & ((1 << fraction_bits) - 1);
  double size = std::ldexp(fraction + (exponent ? 1 << fraction_bits : 0), std::max(exponent, 1) - bias - fraction_bits);
  if (exponent == top) size = fraction ? NOT_A_NUMBER : INF;
  return bits >> 15 ? -size : size;
}
uint16_t encode(double x, int fraction_bits) {
  int top = (1 << (15 - fraction_bits)) - 1, bias = top >> 1, inf = top << fraction_bits, sign = std::signbit(x) << 15;
  if (std::isnan(x)) return inf | 1;
  if (x == 0 || std::isinf(x)) return sign | (x == 0 ? 0 : inf);
  int exponent = std::clamp(std::ilogb(x), 1 - bias, bias + 1);
  double steps = std::nearbyint(std::ldexp(std::abs(x), fraction_bits - exponent));  // to nearest, ties to even
  return sign | int(std::min<double>(steps + std::ldexp(exponent + bias - 1, fraction_bits), inf));
}

// --- tensors ---------------------------------------------------------------------------------------------------------

// OFFSET: behind three elements, rows longer than needed. SPACED: every other element. EXPANDED: one row everywhere.
enum Layout { DENSE, OFFSET, SPACED, TRANSPOSED, EXPANDED };

struct Free {
  void operator()(char* p) const { operator delete(p, std::align_val_t(64)); }
};

struct Tensor {
  View view;
  int64_t count = 1, bytes = 0;
  std::unique_ptr<char, Free> memory;  // aligned, as torch's is: some kernels write past the caches only then

  Tensor(Dtype dtype, const Sizes& size, Layout layout = DENSE) {
    int64_t unit = layout == SPACED ? 2 : 1, first = layout == OFFSET ? 3 : 0, last = first;
    view.dtype = dtype;
    view.dim = size.size();
    for (int k = 0; k < view.dim; k++) {
      int i = layout == TRANSPOSED ? k : view.dim - 1 - k;
      count *= view.size[i] = size[i];
      view.stride[i] = layout == EXPANDED && k > 0 ? 0 : unit;
      last += (size[i] - 1) * view.stride[i];
      unit = unit * size[i] + (layout == OFFSET && k == 0 ? 2 : 0);
    }
    if (count) bytes = (last + 1) * bytes_of(dtype);
    memory.reset(static_cast<char*>(operator new(bytes, std::align_val_t(64))));
    std::memset(memory.get(), 0xff, bytes);  // a NaN of every dtype
    if (count) view.data = memory.get() + first * bytes_of(dtype);  // null without elements, as in torch
  }

  void* at(int64_t i) const {
    int64_t offset = 0;
    for (int k = view.dim - 1; k >= 0; i /= view.size[k--]) offset += i % view.size[k] * view.stride[k];
    return static_cast<char*>(view.data) + offset * bytes_of(view.dtype);
  }
  double get(int64_t i) const {
    if (view.dtype == float64) return *static_cast<double*>(at(i));
    if (view.dtype == float32) return *static_cast<float*>(at(i));
    if (view.dtype == boolean) return *static_cast<bool*>(at(i));
    return decode(*static_cast<uint16_t*>(at(i)), fraction_bits(view.dtype));
  }
  void put(int64_t i, double x) {
    if (view.dtype == float64) *static_cast<double*>(at(i)) = x;
    else if (view.dtype == float32) *static_cast<float*>(at(i)) = float(x);
    else if (view.dtype == boolean) *static_cast<bool*>(at(i)) = x > 0;
    else *static_cast<uint16_t*>(at(i)) = encode(x, fraction_bits(view.dtype));
  }
  Doubles values() const {
    Doubles x(count);
    for (int64_t i = 0; i < count; i++) x[i] = get(i);
    return x;
  }
  std::vector<char> snapshot() const { return {memory.get(), memory.get() + bytes}; }
};

double uniform() {  // in [-1, 1)
  static uint64_t state = 1;
  state = state * 6364136223846793005u + 1442695040888963407u;
  return double(int64_t(state) >> 11) * 0x1p-52;
}
template <class F>
Tensor filled(Tensor x, const F& value) {
  for (int64_t i = 0; i < x.count; i++) x.put(i, value(i));
  return x;
}
Tensor random(Dtype dtype, const Sizes& size, Layout layout = DENSE) {
  return filled(Tensor(dtype, size, layout), [](int64_t) { return uniform(); });
}

// Calls on every Parallel, from the same contents of the outputs.
template <class F>
void run(const std::vector<Tensor*>& outputs, const F& call, Where where = Where::current()) {
  std::vector<std::vector<char>> before, found;
  for (Tensor* out : outputs) before.push_back(out->snapshot());
  for (const Parallel& parallel : PARALLELS) {
    for (size_t i = 0; i < outputs.size(); i++) std::copy(before[i].begin(), before[i].end(), outputs[i]->memory.get());
    call(parallel);
    for (size_t i = 0; i < outputs.size(); i++) {
      if (&parallel == PARALLELS) found.push_back(outputs[i]->snapshot());
      bool same = outputs[i]->snapshot() == found[i];
      expect(same, "same bits on any threads, output ", 1, same, i, where);
    }
  }
  for (size_t i = 0; i < outputs.size(); i++) {
    for (int64_t k = 0; k < outputs[i]->count; k++)  // what the view reaches may change, and nothing else
      std::memcpy(before[i].data() + (static_cast<char*>(outputs[i]->at(k)) - outputs[i]->memory.get()),
                  outputs[i]->at(k), bytes_of(outputs[i]->view.dtype));
    bool same = outputs[i]->snapshot() == before[i];
    expect(same, "untouched between elements, output ", 1, same, i, where);
  }
}

// --- arithmetic of the oracles ---------------------------------------------------------------------------------------

// A number, and how far rounding on the way may take it, to first order in units of epsilon.
struct Number {
  double x, e;
  Number(double x = 0) : x(x), e(std::abs(x)) {}
  Number(double x, double e) : x(x), e(e) {}
  Number& operator+=(Number b) { return x += b.x, e += b.e, *this; }
};
using Numbers = std::vector<Number>;
Number operator+(Number a, Number b) { return {a.x + b.x, a.e + b.e}; }
Number operator-(Number a, Number b) { return {a.x - b.x, a.e + b.e}; }
Number operator*(Number a, Number b) {
  double product = a.x * b.x;
  return {product, std::abs(a.x) * b.e + std::abs(b.x) * a.e + std::abs(product)};
}
Number inverse(Number a) { return {1 / a.x, (a.e / std::abs(a.x) + 1) / std::abs(a.x)}; }
Number square_root(Number a) { return {std::sqrt(a.x), (a.e / a.x / 2 + 1) * std::sqrt(a.x)}; }
Number exponential(Number a) { return {std::exp(a.x), std::exp(a.x) * (a.e + 1)}; }
template <class F>
Number sum(int64_t n, const F& f) {
  Number total;
  for (int64_t i = 0; i < n; i++) total += f(i);
  return total;
}

// `computed`: the dtype of the arithmetic
void near(const char* what, const Tensor& out, const Numbers& expected, Dtype computed, Where where = Where::current()) {
  constexpr double SLACK = 2;  // for constants that the bounds leave out, and the order of a sum
  int64_t bad = out.count == int64_t(expected.size()) ? -1 : 0;
  for (int64_t i = 0; i < out.count && bad < 0; i++) {
    double bound = SLACK * epsilon(computed) * expected[i].e + 0.51 * epsilon(out.view.dtype) * std::abs(expected[i].x);
    double error = std::abs(out.get(i) - expected[i].x) / (bound + smallest(out.view.dtype));
    if (!(error <= 1)) bad = i;
    worst = std::max(worst, error);
  }
  expect(bad < 0, what, bad < 0 ? 0 : expected[bad].x, bad < 0 ? 0 : out.get(bad), bad, where);
}

// --- covariance ------------------------------------------------------------------------------------------------------

// C += x^T x, the upper triangle a mirror of the lower
Numbers covariance(const Tensor& tokens, const Doubles& before) {
  int64_t p = tokens.view.size[tokens.view.dim - 1], rows = tokens.count / p;
  Doubles x = tokens.values();
  Numbers c(before.begin(), before.end());
  for (int64_t i = 0; i < p; i++)
    for (int64_t j = 0; j <= i; j++) {
      Number more = sum(rows, [&](int64_t k) { return Number(x[k * p + i]) * x[k * p + j]; });
      c[i * p + j] += more;
      if (i != j) c[j * p + i] += more;
    }
  return c;
}

void check_covariance(const std::vector<Tensor>& tokens, Dtype sums_dtype) {
  std::vector<Tensor> sums;
  std::vector<Tensor*> outputs;
  std::vector<Numbers> expected;
  std::vector<View> from, to;
  for (const Tensor& x : tokens) {
    int64_t p = x.view.size[x.view.dim - 1];
    sums.push_back(random(sums_dtype, {p, p}, Layout(sums.size() % EXPANDED)));
    from.push_back(x.view);
    to.push_back(sums.back().view);
    expected.push_back(covariance(x, sums.back().values()));
  }
  for (Tensor& sum : sums) outputs.push_back(&sum);
  run(outputs, [&](const Parallel& on) { kernels->accumulate_covariance(on, to.size(), to.data(), from.data()); });
  for (size_t i = 0; i < sums.size(); i++) near("covariance", sums[i], expected[i], wide(tokens[i].view.dtype));
}

void check_covariance_backward(const Tensor& tokens, Dtype grad_dtype, Layout layout) {
  int64_t p = tokens.view.size[tokens.view.dim - 1], rows = tokens.count / p;
  Sizes size(tokens.view.size, tokens.view.size + tokens.view.dim);
  Tensor grad = random(grad_dtype, {p, p}, layout), d_tokens(tokens.view.dtype, size, Layout(layout % EXPANDED));
  run({&d_tokens}, [&](const Parallel& on) {
    kernels->covariance_backward(on, grad.view, tokens.view, d_tokens.view);
  });
  Doubles x = tokens.values(), g = grad.values();
  Numbers expected;
  for (int64_t i = 0; i < rows * p; i++)
    expected.push_back(sum(p, [&](int64_t k) {
      return Number(x[i / p * p + k]) * (Number(g[k * p + i % p]) + g[i % p * p + k]);
    }));
  near("d_tokens", d_tokens, expected, grad_dtype);
}

void test_covariance() {
  for (int64_t p : {1, 5, 33, 70, 130})
    for (Dtype sums : {float32, float64}) {
      context = "covariance, p = " + std::to_string(p);
      std::vector<Tensor> tokens;
      tokens.push_back(random(float32, {3, 100, p}, TRANSPOSED));
      tokens.push_back(random(float64, {257, p}, OFFSET));
      tokens.push_back(random(bfloat16, {2, 2, 7, p}, SPACED));
      tokens.push_back(random(float32, {0, p}));
      tokens.push_back(random(float16, {1, p}));
      tokens.push_back(random(float32, {4, 70, p}, EXPANDED));
      check_covariance(tokens, sums);
      for (size_t i = 0; i < tokens.size(); i++)
        check_covariance_backward(tokens[i], tokens[i].view.dtype == float64 ? float64 : sums, Layout(i % 5));
    }
  context = "covariance, more than is packed at a time";
  std::vector<Tensor> tokens;
  tokens.push_back(random(float32, {66000, 33}));
  tokens.push_back(random(float16, {300, 33}));
  check_covariance(tokens, float32);
  check_covariance({}, float32);
}

// --- conflicts -------------------------------------------------------------------------------------------------------

// An orthonormal basis, its vectors the columns: Gram-Schmidt, twice over.
Doubles orthonormal(int64_t p) {
  Doubles u(p * p);
  for (double& x : u) x = uniform();
  for (int64_t i = 0; i < 2 * p; i++) {
    int64_t c = i / 2;
    for (int64_t b = 0; b <= c; b++) {
      double dot = 0;
      for (int64_t k = 0; k < p; k++) dot += u[k * p + b] * u[k * p + c];
      for (int64_t k = 0; k < p; k++) b < c ? u[k * p + c] -= dot * u[k * p + b] : u[k * p + c] /= std::sqrt(dot);
    }
  }
  return u;
}

struct Counts {
  Sizes range, null, valid, nonfinite;
  Counts(int64_t ranks, int64_t tasks)
      : range(ranks * tasks * tasks), null(range.size()), valid(tasks * tasks), nonfinite(1) {}
  bool operator==(const Counts&) const = default;
};

// What is counted, and in `doubtful` how many of these signs rounding may turn.
Counts count(const Tensor& grads, const Tensor& basis, const Sizes& ranks, bool count_zero, Counts& doubtful) {
  int64_t tasks = grads.view.size[0], p = basis.view.size[0], tokens = grads.count / tasks / p;
  Doubles g = grads.values(), u = basis.values(), h(tasks * p), norm(tasks), peak(tasks);
  bool usable = std::all_of(u.begin(), u.end(), [](double x) { return std::isfinite(x); });
  Counts counts(ranks.size(), tasks);
  for (int64_t token = 0; token < tokens; token++) {
    for (int64_t i = 0; i < tasks; i++) {
      double* x = &g[(i * tokens + token) * p];
      peak[i] = norm[i] = 0;
      for (int64_t c = 0; c < p; c++) peak[i] = std::isfinite(x[c]) ? std::max(peak[i], std::abs(x[c])) : NOT_A_NUMBER;
      for (int64_t c = 0; c < p; c++) x[c] = peak[i] > 0 ? std::ldexp(x[c], -std::ilogb(peak[i])) : 0;
      for (int64_t c = 0; c < p; c++) norm[i] += x[c] * x[c];
      std::fill_n(&h[i * p], p, 0);
      for (int64_t k = 0; k < p; k++)
        for (int64_t c = 0; c < p; c++) h[i * p + c] += x[k] * u[k * p + c];
    }
    for (int64_t i = 0; i < tasks; i++)
      for (int64_t j = 0; j < tasks; j++) {
        bool finite = usable && !std::isnan(peak[i]) && !std::isnan(peak[j]);
        counts.nonfinite[0] += i < j && !finite;
        if (i == j || !finite || (!count_zero && (peak[i] == 0 || peak[j] == 0))) continue;
        counts.valid[i * tasks + j]++;
        double doubt = 32 * epsilon(wide(grads.view.dtype)) * std::sqrt(norm[i] * norm[j]);
        for (size_t r = 0; r < ranks.size(); r++) {
          int64_t at = (r * tasks + i) * tasks + j;
          double dots[2] = {};
          for (int64_t c = 0; c < p; c++) dots[c >= ranks[r]] += h[i * p + c] * h[j * p + c];
          counts.range[at] += dots[0] <= 0;
          counts.null[at] += dots[1] <= 0;
          doubtful.range[at] += dots[0] != 0 && std::abs(dots[0]) <= doubt;  // of nothing the sign is certain
          doubtful.null[at] += dots[1] != 0 && std::abs(dots[1]) <= doubt;
        }
      }
  }
  return counts;
}

// In a weak space every sign is in doubt: one of 2,000 may differ there, and none elsewhere.
void check_counts(const Tensor& grads, const Tensor& basis, const Sizes& ranks, bool count_zero, bool weak = false) {
  int64_t tasks = grads.view.size[0];
  Counts doubtful(ranks.size(), tasks), expected = count(grads, basis, ranks, count_zero, doubtful);
  Counts first(ranks.size(), tasks);
  for (const Parallel& parallel : PARALLELS) {
    Counts got(ranks.size(), tasks);
    kernels->count_conflicts(parallel, grads.view, basis.view, ranks.size(), ranks.data(), count_zero, got.range.data(),
                             got.null.data(), got.valid.data(), got.nonfinite.data());
    if (&parallel == PARALLELS) first = got;
    expect(got == first, "same counts on any threads", 1, 0, 0, Where::current());
  }
  auto compare = [&](const char* what, const Sizes& got, const Sizes& expected, const Sizes& allowed) {
    for (size_t i = 0; i < got.size(); i++)
      expect(std::abs(got[i] - expected[i]) <= allowed[i], what, expected[i], got[i], i, Where::current());
  };
  Sizes few(expected.range.size(), expected.valid[1] / 2000), none(tasks * tasks);
  compare("range", first.range, expected.range, weak ? few : doubtful.range);
  compare("null", first.null, expected.null, weak ? few : doubtful.null);
  compare("valid", first.valid, expected.valid, none);
  compare("nonfinite", first.nonfinite, expected.nonfinite, none);
}

void check_dots(const Tensor& grads, const Tensor& basis, int64_t rank, Layout layout) {
  int64_t tasks = grads.view.size[0], p = basis.view.size[0], tokens = grads.count / tasks / p;
  int64_t pairs = tasks * (tasks - 1) / 2;
  Dtype dtype = wide(grads.view.dtype);
  Tensor range(dtype, {pairs, tokens}), null(dtype, {pairs, tokens});
  run({&range, &null}, [&](const Parallel& on) {
    kernels->projected_dots(on, grads.view, basis.view, rank, range.view, null.view);
  });
  Tensor up_range = random(dtype, {pairs, tokens}), up_null = random(dtype, {pairs, tokens});
  Sizes size(grads.view.size, grads.view.size + grads.view.dim);
  Tensor d_grads(grads.view.dtype, size, layout), d_basis(basis.view.dtype, {p, p}, layout);
  run({&d_grads, &d_basis}, [&](const Parallel& on) {
    kernels->projected_dots_backward(on, up_range.view, up_null.view, grads.view, basis.view, rank, d_grads.view,
                                     d_basis.view);
  });
  Doubles g = grads.values(), u = basis.values(), up[2] = {up_range.values(), up_null.values()};
  Numbers h(tasks * tokens * p), dh(h.size()), dots[2] = {Numbers(pairs * tokens), Numbers(pairs * tokens)};
  for (size_t i = 0; i < h.size(); i++)
    h[i] = sum(p, [&](int64_t k) { return Number(g[i / p * p + k]) * u[k * p + i % p]; });
  for (int64_t i = 0, pair = 0; i < tasks; i++)
    for (int64_t j = i + 1; j < tasks; j++, pair++)
      for (int64_t n = 0; n < tokens * p; n++) {
        int64_t a = i * tokens * p + n, b = j * tokens * p + n, to = pair * tokens + n / p, is_null = n % p >= rank;
        dots[is_null][to] += h[a] * h[b];
        dh[a] += Number(up[is_null][to]) * h[b];
        dh[b] += Number(up[is_null][to]) * h[a];
      }
  Numbers dg(h.size()), du(p * p);
  for (size_t i = 0; i < h.size(); i++)
    for (int64_t k = 0; k < p; k++) {
      dg[i] += dh[i / p * p + k] * u[i % p * p + k];
      du[i % p * p + k] += Number(g[i]) * dh[i / p * p + k];
    }
  near("range", range, dots[0], dtype);
  near("null", null, dots[1], dtype);
  near("d_grads", d_grads, dg, dtype);
  near("d_basis", d_basis, du, dtype);
}

// Gradients of extreme size, and such that are none; one everywhere if they are expanded.
void plant(Tensor& grads, int64_t tokens, int64_t p) {
  const double sizes[] = {1e30, 1e-30, 0, NOT_A_NUMBER, INF};
  for (int64_t token = 0; token < std::min<int64_t>(tokens, 10); token += 2)
    for (int64_t c = 0; c < p; c++) {
      int64_t i = ((token / 2 % 2) * tokens + token) * p + c;
      grads.put(i, token < 6 || c == p / 2 ? grads.get(i) * sizes[token / 2] : grads.get(i));
    }
}

void test_conflicts() {
  constexpr Dtype DTYPES[] = {float32, bfloat16, float64, float16};
  int i = 0;
  for (int64_t p : {1, 5, 33, 70, 130}) {
    Doubles u = orthonormal(p);
    for (int64_t tasks = 2; tasks <= 9; tasks++, i++) {
      int64_t tokens = Sizes{41, 1, 90, 0, 24}[i % 5];
      Dtype dtype = DTYPES[(i + i / 4) % 4];
      context = "p = " + std::to_string(p) + ", K = " + std::to_string(tasks) + ", case " + std::to_string(i);
      Sizes size = i % 3 ? Sizes{tasks, tokens, p} : Sizes{tasks, 1, tokens, p};
      Tensor grads = random(dtype, size, Layout(i % 5));
      // in the basis of half precision nothing is orthonormal, that of float32 is not quite
      Tensor basis(i % 7 == 6 ? bfloat16 : i % 2 ? float32 : wide(dtype), {p, p}, Layout(i % EXPANDED));
      for (int64_t k = 0; k < p * p; k++) basis.put(k, u[k]);
      check_dots(grads, basis, i % 8 ? p * (i % 4) / 4 : p, Layout((i + 1) % EXPANDED));
      if (p > 1) check_counts(grads, basis, {p / 8, p / 3 + 1, p / 2 + 1, p}, false);
      if (i % 5 != EXPANDED) plant(grads, tokens, p);
      check_counts(grads, basis, {0, 7 * p / 8 + 1}, i % 2);
      check_counts(grads, basis, {p / 8}, i % 3 == 0);
      if (i % 8 == 0) basis.put(p - 1, NOT_A_NUMBER);
      check_counts(grads, basis, {}, true);
    }
    context = "whole numbers, p = " + std::to_string(p);  // every sign is certain, many products are zero
    auto one_or_zero = [&](int64_t i) { return i / p == i % p; };
    auto digit = [&](int64_t) { return std::nearbyint(uniform()); };
    Tensor grads = filled(Tensor(float32, {3, 100, p}), digit);
    check_counts(grads, filled(Tensor(float32, {p, p}), one_or_zero), {p / 4, p}, true);
  }
  context = "several stretches";
  check_dots(random(float32, {2, 3100, 5}), random(float32, {5, 5}), 2, DENSE);
  for (Dtype dtype : {float32, float64}) {
    int64_t p = 130, tokens = 4000, tasks = 3;
    Doubles u = orthonormal(p);
    Tensor basis = filled(Tensor(dtype, {p, p}), [&](int64_t k) { return u[k]; });
    for (int64_t rank : {20, 60, 110}) {
      context = "weak null space, rank " + std::to_string(rank);
      Tensor grads(dtype, {tasks, tokens, p}, OFFSET);
      for (int64_t row = 0; row < tasks * tokens; row++) {
        Doubles x(p);
        for (int64_t k = 0; k < p; k++) {
          double z = uniform() * (k < rank ? 1000 : 1);
          for (int64_t c = 0; c < p; c++) x[c] += u[c * p + k] * z;
        }
        for (int64_t c = 0; c < p; c++) grads.put(row * p + c, x[c]);
      }
      check_counts(grads, basis, {rank}, false, true);
    }
  }
}

// --- modulation ------------------------------------------------------------------------------------------------------

// All 65,536 numbers of 16 bits, times one that leaves no rounding to float32.
void test_numbers() {
  for (Dtype dtype : {float16, bfloat16}) {
    context = dtype == float16 ? "every float16" : "every bfloat16";
    Tensor x(dtype, {1, 1024, 64}), out(dtype, {1, 1024, 64}), zero = filled(Tensor(float32, {1, 64}), [](int64_t) { return 0; });
    for (int64_t i = 0; i < x.count; i++) *static_cast<uint16_t*>(x.at(i)) = uint16_t(i);
    for (double factor : {1.0, 0.400390625, 1.0009765625, 0x1p-6}) {
      Tensor weight = filled(Tensor(float32, {1, 64}), [&](int64_t) { return factor; });
      run({&out}, [&](const Parallel& on) { kernels->modulate(on, x.view, weight.view, zero.view, {}, {}, 0, out.view, {}); });
      int64_t bad = 0;
      for (int64_t i = 0; i < x.count; i++) {
        double expected = decode(encode(float(x.get(i) * factor), fraction_bits(dtype)), fraction_bits(dtype));
        if (expected != out.get(i) && !(std::isnan(expected) && std::isnan(out.get(i)))) bad++;
      }
      expect(bad == 0, "wrongly rounded", 0, bad, 0, Where::current());
    }
  }
}

struct Modulation {
  Tensor tokens, weight, bias, gain, shift, grad, grad_normed;
  double eps = 1e-6;
};
struct Modulated {
  Numbers y, z, dx, dw, db, d_gain, d_shift;
};

// y = w x + b, s = (y - mean) / std, z = gain s + shift; dy = grad + (ds - mean ds - s mean(ds s)) / std
Modulated modulated(const Modulation& in, bool with_norm) {
  int64_t p = in.weight.view.size[1], streams = in.weight.view.size[0], rows = in.grad.count / p / streams;
  bool own = in.tokens.view.size[0] > 1;
  Doubles tokens = in.tokens.values(), w = in.weight.values(), b = in.bias.values(), gain = in.gain.values();
  Doubles shift = in.shift.values(), grad = in.grad.values(), grad_normed = in.grad_normed.values();
  Numbers params(streams * p), row(p);
  Modulated out{Numbers(in.grad.count), Numbers(in.grad.count), Numbers(in.tokens.count), params, params, row, row};
  for (int64_t i = 0; i < streams * rows; i++) {
    int64_t t = i / rows, of_tokens = (own ? i : i % rows) * p;
    Number* y = &out.y[i * p];
    for (int64_t c = 0; c < p; c++) y[c] = Number(w[t * p + c]) * tokens[of_tokens + c] + b[t * p + c];
    Number per = inverse(double(p)), mean = sum(p, [&](int64_t c) { return y[c]; }) * per;
    Number variance = sum(p, [&](int64_t c) { return (y[c] - mean) * (y[c] - mean); }) * per;
    Number inverse_std = inverse(square_root(variance + in.eps));
    auto s = [&](int64_t c) { return (y[c] - mean) * inverse_std; };
    auto ds = [&](int64_t c) { return Number(grad_normed[i * p + c]) * gain[c]; };
    Number mean_ds = sum(p, ds) * per, mean_product = sum(p, [&](int64_t c) { return ds(c) * s(c); }) * per;
    for (int64_t c = 0; c < p; c++) {
      Number dy = grad[i * p + c];
      if (with_norm) dy += (ds(c) - mean_ds - s(c) * mean_product) * inverse_std;
      out.z[i * p + c] = s(c) * gain[c] + shift[c];
      out.dx[of_tokens + c] += dy * w[t * p + c];
      out.dw[t * p + c] += dy * tokens[of_tokens + c];
      out.db[t * p + c] += dy;
      out.d_gain[c] += Number(grad_normed[i * p + c]) * s(c);
      out.d_shift[c] += grad_normed[i * p + c];
    }
  }
  return out;
}

void check_modulation(Dtype dtype, Dtype params, Sizes size, int64_t streams, Layout in_layout, Layout layout) {
  int64_t p = size.back();
  Sizes out_size = size, one = {1, p}, table = {streams, p};
  out_size[0] = streams;
  Modulation in{random(dtype, size, in_layout), random(params, table, layout), random(params, table),
                random(params, one, in_layout), random(params, one), random(dtype, out_size, in_layout),
                random(dtype, out_size, layout)};
  for (bool with_norm : {false, true}) {
    Modulated expected = modulated(in, with_norm);
    Tensor y(dtype, out_size, layout), z(dtype, out_size, layout), dx(dtype, size, layout), dw(params, table, layout);
    Tensor db(params, table), d_gain(params, one, layout), d_shift(params, one);
    View gain = with_norm ? in.gain.view : View{}, shift = with_norm ? in.shift.view : View{};
    View up = with_norm ? in.grad_normed.view : View{}, bias = with_norm ? in.bias.view : View{};
    std::vector<Tensor*> forward{&y}, backward{&dx, &dw, &db};
    if (with_norm) forward.push_back(&z), backward.push_back(&d_gain), backward.push_back(&d_shift);
    auto if_norm = [&](const Tensor& x) { return with_norm ? x.view : View{}; };
    run(forward, [&](const Parallel& on) {
      kernels->modulate(on, in.tokens.view, in.weight.view, in.bias.view, gain, shift, in.eps, y.view, if_norm(z));
    });
    run(backward, [&](const Parallel& on) {
      kernels->modulate_backward(on, in.grad.view, up, in.tokens.view, in.weight.view, bias, gain, in.eps, dx.view,
                                 dw.view, db.view, if_norm(d_gain), if_norm(d_shift));
    });
    near("modulated", y, expected.y, wide(dtype));
    near("d_tokens", dx, expected.dx, wide(dtype));
    near("d_weight", dw, expected.dw, wide(dtype));
    near("d_bias", db, expected.db, wide(dtype));
    if (!with_norm) continue;
    near("normalized", z, expected.z, wide(dtype));
    near("d_norm_weight", d_gain, expected.d_gain, wide(dtype));
    near("d_norm_bias", d_shift, expected.d_shift, wide(dtype));
  }
}

void test_modulation() {
  int i = 0;
  for (int64_t p : {1, 5, 33, 70, 130})
    for (Dtype dtype : {float32, float64, float16, bfloat16})
      for (int64_t streams : {1, 3}) {
        i++;
        context = "modulation, p = " + std::to_string(p) + ", case " + std::to_string(i);
        Sizes size = Sizes(i % 2 ? Sizes{i % 3 ? 1 : streams, 7, 9, p} : Sizes{i % 3 ? streams : 1, Sizes{0, 1, 23}[i % 3], p});
        check_modulation(dtype, i % 3 ? wide(dtype) : dtype, size, streams, Layout(i % 5), Layout(i / 2 % EXPANDED));
      }
  context = "modulation, several parts";
  check_modulation(float32, float32, {1, 500, 70}, 4, SPACED, DENSE);
  check_modulation(float16, float32, {2, 3, 250, 70}, 2, DENSE, TRANSPOSED);
  context = "modulation, past the caches";  // results of more than 4 MiB, aligned or not
  check_modulation(float32, float32, {1, 4001, 96}, 3, DENSE, DENSE);
  check_modulation(float64, float64, {2, 1100, 128}, 2, DENSE, DENSE);
  check_modulation(float32, float32, {1, 4001, 96}, 3, DENSE, OFFSET);
}

// --- attention -------------------------------------------------------------------------------------------------------

struct Case {
  Dtype dtype;
  int64_t streams, images, heads, key_heads, queries, shared, task, d;
  char mask;  // 'n'one, 'c'ausal, 'b'ool for all images and heads, 'a'dditive, 's'ame additive row for all queries
  Layout in, out;
};

struct Attended {
  Numbers out, dq, dk, dv, d_task_k, d_task_v, ds;
};

Attended attended(const Case& a, const Tensor* in, const Doubles& mask, double scale) {  // in: q, k, v, kt, vt, grad
  int64_t keys = a.shared + a.task, d = a.d;
  Doubles q = in[0].values(), k = in[1].values(), v = in[2].values(), kt = in[3].values(), vt = in[4].values();
  Doubles grad = in[5].values();
  Numbers none(q.size());
  Attended o{none, none, Numbers(k.size()), Numbers(v.size()), Numbers(kt.size()), Numbers(vt.size()), {}};
  for (int64_t row = 0; row < a.streams * a.images * a.heads * a.queries; row++) {
    int64_t image = row / a.queries / a.heads, head = row / a.queries % a.heads / (a.heads / a.key_heads);
    int64_t of_shared = (image * a.key_heads + head) * a.shared;
    int64_t of_task = (image / a.images * a.key_heads + head) * a.task - a.shared;
    auto pick = [&](auto& shared, auto& task, int64_t j) {
      return j < a.shared ? &shared[(of_shared + j) * d] : &task[(of_task + j) * d];
    };
    auto with = [&](const double* x, auto& shared, auto& task, int64_t j) {
      return sum(d, [&, y = pick(shared, task, j)](int64_t c) { return Number(x[c]) * y[c]; });
    };
    Numbers p(keys);
    double greatest = -INF;
    for (int64_t j = 0; j < keys; j++) {
      double more = j >= a.shared ? 0 : mask.size() ? mask[row * a.shared + j] : a.mask == 'c' && j > row % a.queries ? -INF : 0;
      p[j] = more == -INF ? Number(-INF, 0) : with(&q[row * d], k, kt, j) * scale + more;
      greatest = std::max(greatest, p[j].x);
    }
    for (Number& x : p) x = x.x == -INF ? Number(0) : exponential(x - greatest);
    Number total = sum(keys, [&](int64_t j) { return p[j]; });
    for (Number& x : p) x = total.x > 0 ? x * inverse(total) : Number(0);
    auto dp = [&](int64_t j) { return with(&grad[row * d], v, vt, j); };
    Number mean = sum(keys, [&](int64_t j) { return p[j] * dp(j); });
    for (int64_t j = 0; j < keys; j++) {
      Number ds = p[j] * (dp(j) - mean);
      if (j < a.shared) o.ds.push_back(ds);
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

// (T, B, H, N, S), with strides of 0 where all share it. Of a bool mask the first query sees nothing.
Tensor mask_of(const Case& a) {
  bool shared = a.mask == 'b', row = a.mask == 's';
  int64_t full[] = {a.streams, a.images, a.heads, a.queries, a.shared};
  Tensor mask = random(shared ? boolean : row ? wide(a.dtype) : a.dtype,
                       {shared ? 1 : full[0], shared ? 1 : full[1], shared ? 1 : full[2], row ? 1 : full[3], full[4]}, a.out);
  for (int64_t j = 0; j < (shared ? std::min(mask.count, a.shared) : 0); j++) mask.put(j, 0);
  for (int64_t j = 0; j < mask.count && !shared; j += 7) mask.put(j, -INF);
  for (int i = 0; i < 5; i++)
    if (mask.view.size[i] != full[i]) {
      mask.count = mask.count * full[i];
      mask.view.size[i] = full[i];
      mask.view.stride[i] = 0;
    }
  return mask;
}

void check_attention(const Case& a) {
  context = "attention, N = " + std::to_string(a.queries) + ", S = " + std::to_string(a.shared) + ", t = " +
            std::to_string(a.task) + ", d = " + std::to_string(a.d) + ", mask " + a.mask;
  Sizes q{a.streams, a.images, a.heads, a.queries, a.d}, k{a.streams, a.images, a.key_heads, a.shared, a.d};
  Sizes task{a.streams, a.key_heads, a.task, a.d};
  Tensor in[] = {random(a.dtype, q, a.in), random(a.dtype, k, a.in), random(a.dtype, k, a.out),
                 random(a.dtype, task, a.in), random(a.dtype, task), random(a.dtype, q, a.in)};
  Tensor out(a.dtype, q, a.out), dq(a.dtype, q, a.out), dk(a.dtype, k, a.out), dv(a.dtype, k), d_task_k(a.dtype, task, a.out);
  Tensor d_task_v(a.dtype, task), ds(wide(a.dtype), {q[0], q[1], q[2], q[3], a.shared}, a.queries % 2 ? DENSE : OFFSET);
  Tensor mask = mask_of(a);
  bool masked = a.mask != 'n' && a.mask != 'c';
  Doubles added = masked ? mask.values() : Doubles();
  if (a.mask == 'b')
    for (double& x : added) x = x ? 0 : -INF;
  Attention attention{in[0].view, in[1].view, in[2].view, in[3].view, in[4].view, {}, a.mask == 'c', 2.0 / std::sqrt(a.d)};
  if (masked) attention.mask = mask.view;
  Attended expected = attended(a, in, added, attention.scale);
  run({&out}, [&](const Parallel& on) { kernels->attend(on, attention, out.view); });
  std::vector<Tensor*> outputs{&dq, &dk, &dv, &d_task_k, &d_task_v};
  if (masked) outputs.push_back(&ds);
  run(outputs, [&](const Parallel& on) {
    kernels->attend_backward(on, attention, in[5].view, dq.view, dk.view, dv.view, d_task_k.view, d_task_v.view,
                             masked ? ds.view : View{});
  });
  near("output", out, expected.out, wide(a.dtype));
  near("d_query", dq, expected.dq, wide(a.dtype));
  near("d_key", dk, expected.dk, wide(a.dtype));
  near("d_value", dv, expected.dv, wide(a.dtype));
  near("d_task_key", d_task_k, expected.d_task_k, wide(a.dtype));
  near("d_task_value", d_task_v, expected.d_task_v, wide(a.dtype));
  if (masked) near("d_scores", ds, expected.ds, wide(a.dtype));
}

void test_attention() {
  const Case cases[] = {
      {float32, 2, 2, 4, 2, 7, 9, 6, 16, 'n', DENSE, DENSE},      {float32, 1, 1, 1, 1, 1, 1, 0, 1, 'n', DENSE, DENSE},
      {float64, 2, 3, 2, 1, 1, 0, 6, 33, 'n', OFFSET, SPACED},    {float32, 1, 2, 3, 3, 5, 0, 6, 16, 'b', DENSE, DENSE},
      {float16, 2, 1, 2, 2, 20, 20, 0, 33, 'c', SPACED, OFFSET},  {bfloat16, 1, 2, 4, 1, 19, 23, 6, 64, 'b', OFFSET, DENSE},
      {float32, 2, 2, 2, 2, 17, 33, 0, 1, 'b', TRANSPOSED, DENSE}, {float64, 1, 2, 2, 2, 40, 30, 6, 16, 'a', DENSE, OFFSET},
      {float32, 2, 2, 4, 2, 30, 40, 6, 33, 's', EXPANDED, DENSE}, {float16, 1, 1, 2, 2, 9, 50, 6, 64, 'a', DENSE, OFFSET},
      {float32, 2, 1, 2, 1, 200, 60, 6, 33, 'c', DENSE, TRANSPOSED}, {float64, 1, 1, 1, 1, 101, 35, 6, 64, 'b', DENSE, DENSE},
      {float32, 1, 1, 1, 1, 31, 1500, 6, 16, 'n', DENSE, DENSE},  {float32, 1, 2, 2, 2, 0, 5, 6, 16, 'n', DENSE, DENSE},
      {float32, 2, 2, 2, 2, 5, 0, 0, 16, 'n', DENSE, DENSE},      {bfloat16, 30, 2, 1, 1, 3, 4, 2, 5, 's', SPACED, DENSE},
  };
  for (const Case& each : cases) check_attention(each);
}

// --- rows that lie far apart -----------------------------------------------------------------------------------------

// Three rows 2^30 elements from each other, so that the last is past 2^31, give the same bits as the same rows together.
void test_far() {
  constexpr int64_t APART = (int64_t(1) << 30) + 64, P = 70, ROWS = 3, BYTES = (ROWS * APART) * 4;
  context = "offsets past 2^31";
  void* region = mmap(nullptr, BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (region == MAP_FAILED) {
    printf("skipped: %s\n", context.c_str());
    return;
  }
  auto view = [&](const Sizes& size, int apart, int64_t first) {  // dimension `apart` has the large stride
    View x = Tensor(float32, size).view;
    x.data = static_cast<float*>(region) + first;
    x.stride[apart] = APART;
    return x;
  };
  Tensor rows = random(float32, {1, ROWS, P}), weight = random(float32, {1, P}), bias = random(float32, {1, P});
  Tensor gain = random(float32, {1, P}), basis = random(float32, {P, P}), normed(float32, {1, ROWS, P});
  Tensor near_y(float32, {1, ROWS, P}), near_sum = filled(Tensor(float32, {P, P}), [](int64_t) { return 0; });
  for (int64_t i = 0; i < rows.count; i++) static_cast<float*>(region)[i / P * APART + i % P] = rows.get(i);
  Tensor far_sum = filled(Tensor(float32, {P, P}), [](int64_t) { return 0; });
  View far_rows = view({1, ROWS, P}, 1, 0), far_y = view({1, ROWS, P}, 1, 4096), far_tasks = view({ROWS, 1, P}, 0, 0);
  View tasks = rows.view;
  std::swap(tasks.size[0], tasks.size[1]);
  std::swap(tasks.stride[0], tasks.stride[1]);
  for (const Parallel& on : PARALLELS) {
    kernels->accumulate_covariance(on, 1, &near_sum.view, &rows.view);
    kernels->accumulate_covariance(on, 1, &far_sum.view, &far_rows);
    for (const auto& [x, y] : {std::pair(&rows.view, &near_y.view), std::pair(&far_rows, &far_y)})
      kernels->modulate(on, *x, weight.view, bias.view, gain.view, bias.view, 1e-6, *y, normed.view);
    Counts near_counts(1, ROWS), far_counts(1, ROWS);
    int64_t rank = 30;
    for (const auto& [x, n] : {std::pair(&tasks, &near_counts), std::pair(&far_tasks, &far_counts)})
      kernels->count_conflicts(on, *x, basis.view, 1, &rank, true, n->range.data(), n->null.data(), n->valid.data(),
                               n->nonfinite.data());
    expect(near_sum.snapshot() == far_sum.snapshot(), "covariance", 1, 0, 0, Where::current());
    expect(near_counts == far_counts && near_counts.valid[1] == 1, "counts", 1, 0, 0, Where::current());
    for (int64_t i = 0; i < rows.count; i++) {
      double far = static_cast<float*>(region)[4096 + i / P * APART + i % P];
      expect(near_y.get(i) == far, "modulated", near_y.get(i), far, i, Where::current());
    }
  }
  munmap(region, BYTES);
}

}  // namespace

int main(int argc, char** argv) {
  for (const Kernels& each : ALL)
    if (argc == 2 && each.name == argv[1]) kernels = &each;
  if (!kernels) {
    printf("test_kernels portable|avx2|avx512\n");
    return 2;
  }
  if (!kernels->runs_here()) {
    printf("skipped: this machine has no %s\n", argv[1]);
    return 77;
  }
  for (auto test : {test_numbers, test_covariance, test_conflicts, test_modulation, test_attention, test_far}) test();
  printf("%s: %lld checks, %lld failed; the largest error was %.2f of what is tolerated\n", argv[1], (long long)checks,
         (long long)failures, worst);
  return failures ? 1 : 0;
}
