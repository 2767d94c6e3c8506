// The kernels of one instruction set against plain loops in double: test_kernels portable|avx2|avx512.
//
// Every result is formed by one thread, by four, and piece by piece from the end, and must have the same bits each
// time. Buffers are exactly as large as their views need, so that AddressSanitizer sees an access outside; outputs are
// NaN before a call, and what lies between their elements must stay so.

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <source_location>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "kernels.h"

namespace {

using namespace dtme;
using enum Dtype;
using std::to_string;
using Where = std::source_location;
using Sizes = std::vector<int64_t>;
using Doubles = std::vector<double>;
constexpr double INF = std::numeric_limits<double>::infinity(), NOT_A_NUMBER = std::numeric_limits<double>::quiet_NaN();

// --- which kernels, and who runs them --------------------------------------------------------------------------------

#define DTME_EACH(f)                                                                               \
  f(accumulate_covariance) f(covariance_backward) f(count_conflicts) f(projected_dots)             \
      f(projected_dots_backward) f(modulate) f(modulate_backward) f(attend) f(attend_backward)
#define DTME_MEMBER(function) decltype(&portable::function) function;
#define DTME_OF_PORTABLE(function) portable::function,
#define DTME_OF_AVX2(function) avx2::function,
#define DTME_OF_AVX512(function) avx512::function,
struct Kernels {
  std::string name;
  bool (*runs_here)();
  DTME_EACH(DTME_MEMBER)
};
const Kernels ALL[] = {
    {"portable", [] { return true; }, DTME_EACH(DTME_OF_PORTABLE)},
#if defined(__x86_64__)
    {"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }, DTME_EACH(DTME_OF_AVX2)},
    {"avx512",
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
     },
     DTME_EACH(DTME_OF_AVX512)},
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

// --- numbers of every dtype ------------------------------------------------------------------------------------------

Dtype wide(Dtype dtype) { return dtype == float64 ? float64 : float32; }
int bytes_of(Dtype dtype) { return dtype == float64 ? 8 : dtype == float32 ? 4 : dtype == boolean ? 1 : 2; }
int fraction_bits(Dtype dtype) { return dtype == float64 ? 52 : dtype == float32 ? 23 : dtype == float16 ? 10 : 7; }
double rounding(Dtype dtype) { return std::ldexp(0.5, -fraction_bits(dtype)); }

// The two dtypes of 16 bits, in arithmetic, so that nothing is shared with the tricks of the kernels.
double decode(uint16_t bits, int fraction_bits) {
  int top = (1 << (15 - fraction_bits)) - 1, exponent = bits >> fraction_bits & top, bias = top >> 1;
  int fraction = bits & ((1 << fraction_bits) - 1), hidden = exponent ? 1 << fraction_bits : 0;
  double size = std::ldexp(fraction + hidden, std::max(exponent, 1) - bias - fraction_bits);
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

// A number, and how far rounding on the way may take it: to first order, in roundings of its dtype.
struct Number {
  double x, e = 0;
  Number(double x = 0, double e = 0) : x(x), e(e) {}
  Number& operator+=(Number b) { return x += b.x, e += b.e + std::abs(x), *this; }
};
using Numbers = std::vector<Number>;
Number operator+(Number a, Number b) { return a += b; }
Number operator-(Number a, Number b) { return a += Number(-b.x, b.e); }
Number operator*(Number a, Number b) {
  return {a.x * b.x, std::abs(a.x) * b.e + std::abs(b.x) * a.e + std::abs(a.x * b.x)};
}
Number inverse(Number a) { return {1 / a.x, (a.e / std::abs(a.x) + 1) / std::abs(a.x)}; }
Number square_root(Number a) { return {std::sqrt(a.x), (a.e / a.x / 2 + 1) * std::sqrt(a.x)}; }
Number exponential(Number a) { return {std::exp(a.x), std::exp(a.x) * (a.e + 4)}; }
template <class F>
Number sum(int64_t n, const F& f) {  // in blocks, as none of the kernels adds more than this one after the other
  Number total, block;
  for (int64_t i = 0; i < n; i++) {
    block += f(i);
    if (i % 256 == 255 || i == n - 1) total += std::exchange(block, Number());
  }
  return total;
}

// --- tensors ---------------------------------------------------------------------------------------------------------

// OFFSET: behind three elements, rows longer than needed. SPACED: every other element. EXPANDED: one row everywhere.
// FAR: rows 2^30 elements from each other, so that the third is past 2^31.
enum Layout { DENSE, OFFSET, SPACED, TRANSPOSED, EXPANDED, FAR };

struct Tensor {
  View view;
  int64_t count = 1, bytes = 0;
  std::shared_ptr<char> memory;

  Tensor(Dtype dtype, const Sizes& size, Layout layout = DENSE) {
    int64_t unit = layout == SPACED ? 2 : 1, first = layout == OFFSET ? 3 : 0, last = first;
    view.dtype = dtype;
    view.dim = size.size();
    for (int k = 0; k < view.dim; k++) {
      int i = layout == TRANSPOSED ? k : view.dim - 1 - k;
      count *= view.size[i] = size[i];
      view.stride[i] = layout == EXPANDED && k > 0 ? 0 : unit;
      last += (size[i] - 1) * view.stride[i];
      unit = layout == FAR && k == 0 ? (int64_t(1) << 30) + 64 : unit * size[i] + (layout == OFFSET && k == 0 ? 2 : 0);
    }
    if (count) bytes = (last + 1) * bytes_of(dtype);
    if (layout == FAR) {  // untouched, and costs nothing where no row lies
      void* map = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (map == MAP_FAILED) throw std::bad_alloc();
      memory.reset(static_cast<char*>(map), [n = bytes](char* p) { munmap(p, n); });
    } else {  // aligned, as torch's: only then do some kernels write past the caches
      constexpr std::align_val_t LINE{64};
      memory.reset(static_cast<char*>(operator new(bytes, LINE)), [](char* p) { operator delete(p, LINE); });
      std::memset(memory.get(), 0xff, bytes);  // a NaN of every dtype
    }
    if (count) view.data = memory.get() + first * bytes_of(dtype);  // null without elements, as in torch
    if (layout == FAR) scatter(std::vector<char>(count * bytes_of(dtype), char(0xff)));
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
    if (view.dtype == float32) *static_cast<float*>(at(i)) = float(x);
    if (view.dtype == boolean) *static_cast<bool*>(at(i)) = x > 0;
    if (bytes_of(view.dtype) == 2) *static_cast<uint16_t*>(at(i)) = encode(x, fraction_bits(view.dtype));
  }
  Doubles values() const {
    Doubles x(count);
    for (int64_t i = 0; i < count; i++) x[i] = get(i);
    return x;
  }
  std::vector<char> gather() const {
    int64_t each = bytes_of(view.dtype);
    std::vector<char> to(count * each);
    for (int64_t i = 0; i < count; i++) std::memcpy(&to[i * each], at(i), each);
    return to;
  }
  void scatter(const std::vector<char>& from) {
    int64_t each = bytes_of(view.dtype);
    for (int64_t i = 0; i < count; i++) std::memcpy(at(i), &from[i * each], each);
  }
};

template <class F>
Tensor filled(Tensor x, const F& value) {
  for (int64_t i = 0; i < x.count; i++) x.put(i, value(i));
  return x;
}
double uniform() {  // in [-1, 1)
  static uint64_t state = 1;
  state = state * 6364136223846793005u + 1442695040888963407u;
  return double(int64_t(state) >> 11) * 0x1p-52;
}
Tensor random(Dtype dtype, const Sizes& size, Layout layout = DENSE) {
  return filled(Tensor(dtype, size, layout), [](int64_t) { return uniform(); });
}

// --- checks ----------------------------------------------------------------------------------------------------------

std::string name_of_case;
int64_t checks = 0, failures = 0;
double worst = 0;  // error, as a part of what is tolerated

void expect(bool ok, const std::string& what, double expected, double got, const Where& where = Where::current()) {
  checks++;
  if (ok) return;
  failures++;
  printf("FAILED %s, %s: %s:%u: expected %.10g, got %.10g\n", what.c_str(), name_of_case.c_str(), where.file_name(),
         unsigned(where.line()), expected, got);
}

struct Output {
  std::string name;
  Tensor tensor;
  Numbers expected;
};

// What f(parallel) leaves in the outputs; `computed`: the dtype of its arithmetic.
template <class F>
void check(Dtype computed, std::vector<Output> outputs, const F& f, Where where = Where::current()) {
  constexpr double SLACK = 2;  // the order of a sum is not that of the kernels
  std::vector<std::vector<char>> before, found;
  for (Output& out : outputs) before.push_back(out.tensor.gather());
  for (const Parallel& parallel : PARALLELS) {
    for (size_t i = 0; i < outputs.size(); i++) outputs[i].tensor.scatter(before[i]);
    f(parallel);
    for (size_t i = 0; i < outputs.size(); i++) {
      if (&parallel == PARALLELS) found.push_back(outputs[i].tensor.gather());
      expect(outputs[i].tensor.gather() == found[i], outputs[i].name + " has the same bits on threads", 1, 0, where);
    }
  }
  for (auto& [name, x, expected] : outputs) {
    double last = rounding(x.view.dtype), least = x.view.dtype == float16 ? 0x1p-25 : 0x1p-134;
    int64_t bad = x.count == int64_t(expected.size()) ? -1 : 0;
    for (int64_t i = 0; i < x.count && bad < 0; i++) {
      double bound = SLACK * rounding(computed) * expected[i].e, got = x.get(i), error = std::abs(got - expected[i].x);
      if (std::isnan(got) && std::isnan(expected[i].x)) continue;
      error /= bound + (std::abs(expected[i].x) + bound) * last + least;
      worst = std::max(worst, error);
      if (!(error <= 1)) bad = i;
    }
    expect(bad < 0, name + "[" + to_string(bad) + "]", bad < 0 ? 0 : expected[bad].x, bad < 0 ? 0 : x.get(bad), where);
    if (x.bytes >> 32) continue;
    x.scatter(std::vector<char>(x.count * bytes_of(x.view.dtype), char(0xff)));
    bool untouched = std::all_of(x.memory.get(), x.memory.get() + x.bytes, [](char c) { return c == char(0xff); });
    expect(untouched, name + " untouched between its elements", 1, 0, where);
  }
}

// --- covariance ------------------------------------------------------------------------------------------------------

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
}

// --- conflicts -------------------------------------------------------------------------------------------------------

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
}

// --- modulation ------------------------------------------------------------------------------------------------------

// All 65,536 numbers of 16 bits, times some that leave no rounding to float32.
void test_numbers() {
  for (Dtype dtype : {float16, bfloat16})
    for (double factor : {1.0, 0.400390625, 1.0009765625, 0x1p-6}) {
      name_of_case = (dtype == float16 ? "float16" : "bfloat16") + (" times " + to_string(factor));
      Tensor x(dtype, {1, 1024, 64}), out(dtype, {1, 1024, 64});
      Tensor weight = filled(Tensor(float32, {1, 64}), [&](int64_t) { return factor; });
      Tensor bias = filled(Tensor(float32, {1, 64}), [&](int64_t) { return 0; });
      for (int64_t i = 0; i < x.count; i++) *static_cast<uint16_t*>(x.at(i)) = uint16_t(i);
      kernels->modulate(PARALLELS[0], x.view, weight.view, bias.view, {}, {}, 0, out.view, {});
      for (int64_t i = 0; i < x.count; i++) {
        double rounded = decode(encode(float(x.get(i) * factor), fraction_bits(dtype)), fraction_bits(dtype));
        bool nan = std::isnan(rounded) && std::isnan(out.get(i));
        expect(nan || rounded == out.get(i), "product", rounded, out.get(i));
      }
    }
}

struct Modulation {
  Tensor tokens, weight, bias, gain, shift, up_y, up_z;
  double eps = 1e-6;
};
struct Modulated {
  Numbers y, z, dx, dw, db, d_gain, d_shift;
};

// y = w x + b, s = (y - mean) / std, z = gain s + shift; dy = up_y + (ds - mean ds - s mean(ds s)) / std
Modulated modulated(const Modulation& in, bool with_norm) {
  int64_t p = in.weight.view.size[1], streams = in.weight.view.size[0], rows = in.up_y.count / p / streams;
  Doubles x = in.tokens.values(), w = in.weight.values(), b = in.bias.values(), gain = in.gain.values();
  Doubles shift = in.shift.values(), up_y = in.up_y.values(), up_z = in.up_z.values();
  Numbers params(streams * p), row(p), all(in.up_y.count);
  Modulated out{all, all, Numbers(x.size()), params, params, row, row};
  for (int64_t i = 0; i < streams * rows; i++) {
    int64_t at = i * p, of_x = (in.tokens.view.size[0] > 1 ? i : i % rows) * p, of_w = i / rows * p;
    Number* y = &out.y[at];
    for (int64_t c = 0; c < p; c++) y[c] = Number(w[of_w + c]) * x[of_x + c] + b[of_w + c];
    Number per = inverse(double(p)), mean = sum(p, [&](int64_t c) { return y[c]; }) * per;
    Number variance = sum(p, [&](int64_t c) { return (y[c] - mean) * (y[c] - mean); }) * per;
    Number inverse_std = inverse(square_root(variance + in.eps));
    auto s = [&](int64_t c) { return (y[c] - mean) * inverse_std; };
    auto ds = [&](int64_t c) { return Number(up_z[at + c]) * gain[c]; };
    Number mean_ds = sum(p, ds) * per, mean_product = sum(p, [&](int64_t c) { return ds(c) * s(c); }) * per;
    for (int64_t c = 0; c < p; c++) {
      Number dy = up_y[at + c];
      if (with_norm) dy += (ds(c) - mean_ds - s(c) * mean_product) * inverse_std;
      out.z[at + c] = s(c) * gain[c] + shift[c];
      out.dx[of_x + c] += dy * w[of_w + c];
      out.dw[of_w + c] += dy * x[of_x + c];
      out.db[of_w + c] += dy;
      out.d_gain[c] += Number(up_z[at + c]) * s(c);
      out.d_shift[c] += up_z[at + c];
    }
  }
  return out;
}

void check_modulation(Dtype dtype, Dtype params, Sizes size, int64_t streams, Layout from, Layout to) {
  int64_t p = size.back();
  Sizes full = size, one{1, p}, table{streams, p};
  full[0] = streams;
  Modulation in{random(dtype, size, from), random(params, table, to), random(params, table), random(params, one, from),
                random(params, one),       random(dtype, full, from), random(dtype, full, to)};
  for (bool with_norm : {false, true}) {
    Modulated expected = modulated(in, with_norm);
    Tensor y(dtype, full, to), z(dtype, full, to), dx(dtype, size, to), dw(params, table, to), db(params, table);
    Tensor d_gain(params, one, to), d_shift(params, one);
    std::vector<Output> outputs{{"modulated", y, expected.y}}, grads{{"d_tokens", dx, expected.dx}};
    grads.push_back({"d_weight", dw, expected.dw});
    grads.push_back({"d_bias", db, expected.db});
    if (with_norm) {
      outputs.push_back({"normalized", z, expected.z});
      grads.push_back({"d_norm_weight", d_gain, expected.d_gain});
      grads.push_back({"d_norm_bias", d_shift, expected.d_shift});
    }
    auto norm = [&](const Tensor& x) { return with_norm ? x.view : View{}; };
    check(wide(dtype), outputs, [&](const Parallel& on) {
      kernels->modulate(on, in.tokens.view, in.weight.view, in.bias.view, norm(in.gain), norm(in.shift), in.eps, y.view,
                        norm(z));
    });
    check(wide(dtype), grads, [&](const Parallel& on) {
      kernels->modulate_backward(on, in.up_y.view, norm(in.up_z), in.tokens.view, in.weight.view, norm(in.bias),
                                 norm(in.gain), in.eps, dx.view, dw.view, db.view, norm(d_gain), norm(d_shift));
    });
  }
}

void test_modulation() {
  int64_t i = 0;
  for (int64_t p : {1, 5, 33, 70, 130})
    for (Dtype dtype : {float32, float64, float16, bfloat16})
      for (int64_t streams : {1, 3}) {
        name_of_case = "p = " + to_string(p) + ", T = " + to_string(streams) + ", case " + to_string(++i);
        int64_t own = i % 3 == 0 ? 1 : streams;
        Sizes size = i / 4 % 2 ? Sizes{own, 7, 9, p} : Sizes{own, Sizes{0, 1, 23}[i % 3], p};
        check_modulation(dtype, i % 3 ? wide(dtype) : dtype, size, streams, Layout(i % FAR), Layout(i / 2 % EXPANDED));
      }
  name_of_case = "several parts";
  check_modulation(float32, float32, {1, 500, 70}, 4, SPACED, DENSE);
  check_modulation(float16, float32, {2, 3, 250, 70}, 2, DENSE, TRANSPOSED);
  name_of_case = "past the caches";  // results of more than 4 MiB, aligned or not
  check_modulation(float32, float32, {1, 4001, 96}, 3, DENSE, DENSE);
  check_modulation(float64, float64, {2, 1100, 128}, 2, DENSE, DENSE);
  check_modulation(float32, float32, {1, 4001, 96}, 3, DENSE, OFFSET);
}

// --- attention -------------------------------------------------------------------------------------------------------

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
}

// --- what is unusual -------------------------------------------------------------------------------------------------

void test_far() {
  try {
    check_covariance({random(float32, {3, 70}, FAR)}, float32);
    check_covariance_backward(random(float32, {3, 70}, FAR), float32, DENSE);
    check_modulation(float32, float32, {1, 3, 70}, 1, FAR, FAR);
    check_counts(random(float32, {3, 1, 70}, FAR), random(float32, {70, 70}), {30}, true);
    check_dots(random(float32, {3, 1, 70}, FAR), random(float32, {70, 70}), 30, DENSE);
    check_attention({float32, 1, 1, 1, 1, 3, 3, 3, 16, 'a', FAR, FAR});
  } catch (const std::bad_alloc&) {
    printf("skipped: offsets past 2^31, for which this machine reserves no memory\n");
  }
}

// Last: what fails here ends the process.
void test_empty() {
  name_of_case = "no tokens in two dimensions";
  check_modulation(float32, float32, {1, 2, 0, 16}, 2, DENSE, DENSE);
}

}  // namespace

int main(int argc, char** argv) {
  setvbuf(stdout, nullptr, _IOLBF, 0);
  for (const Kernels& each : ALL)
    if (argc == 2 && each.name == argv[1]) kernels = &each;
  if (!kernels) return printf("test_kernels portable|avx2|avx512\n"), 2;
  if (!kernels->runs_here()) return printf("skipped: this machine has no %s\n", argv[1]), 77;
  void (*const tests[])() = {test_numbers,    test_covariance, test_conflicts, test_modulation,
                             test_attention, test_far,        test_empty};
  for (auto test : tests) test();
  printf("%s: %lld checks, %lld failed; the largest error was %.2f of what is tolerated\n", argv[1], (long long)checks,
         (long long)failures, worst);
  return failures ? 1 : 0;
}
