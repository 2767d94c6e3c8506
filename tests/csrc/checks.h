// Of every C++ unit test: tensors of every dtype and layout, references that carry the error a result may have, and the
// check of a kernel against them.
//
// Every result is formed by one thread, by four, and piece by piece from the end, and must have the same bits each
// time. Buffers are exactly as large as their views need, so that AddressSanitizer sees an access outside; outputs are
// NaN before a call, and what lies between their elements must stay so.
#pragma once

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

#include "instruction_sets.h"

namespace dtme::test {

using enum Dtype;
using std::to_string;
using Where = std::source_location;
using Sizes = std::vector<int64_t>;
using Doubles = std::vector<double>;
constexpr double INF = std::numeric_limits<double>::infinity(), NOT_A_NUMBER = std::numeric_limits<double>::quiet_NaN();

// What each file tests, with the kernels that main.cpp has chosen.
void test_covariance();
void test_conflicts();
void test_modulation();
void test_attention();

// --- which kernels, and who runs them --------------------------------------------------------------------------------

inline const Kernels* kernels = nullptr;

inline void alone(int64_t n, int64_t, Parallel::Function f, void* context) {
  if (n > 0) f(0, n, context);
}
inline void on_threads(int64_t n, int64_t grain, Parallel::Function f, void* context) {
  int64_t parts = n > grain ? std::min<int64_t>(n, 4) : 1;
  std::vector<std::thread> threads;
  for (int64_t i = 1; i < parts; i++) threads.emplace_back(f, n * i / parts, n * (i + 1) / parts, context);
  alone(n / parts, grain, f, context);
  for (std::thread& thread : threads) thread.join();
}
// Shows what depends on where a part begins, or on what ran before it.
inline void from_the_end(int64_t n, int64_t grain, Parallel::Function f, void* context) {
  if (n <= grain) return alone(n, grain, f, context);
  while (n-- > 0) f(n, n + 1, context);
}
const Parallel PARALLELS[] = {{alone, 1}, {on_threads, 4}, {from_the_end, 1000}};

// --- numbers of every dtype ------------------------------------------------------------------------------------------

inline Dtype wide(Dtype dtype) { return dtype == float64 ? float64 : float32; }
inline int bytes_of(Dtype dtype) { return dtype == float64 ? 8 : dtype == float32 ? 4 : dtype == boolean ? 1 : 2; }
inline int fraction_bits(Dtype dtype) {
  return dtype == float64 ? 52 : dtype == float32 ? 23 : dtype == float16 ? 10 : 7;
}
inline double rounding(Dtype dtype) { return std::ldexp(0.5, -fraction_bits(dtype)); }

// The two dtypes of 16 bits, in arithmetic, so that nothing is shared with the tricks of the kernels.
inline double decode(uint16_t bits, int fraction_bits) {
  int top = (1 << (15 - fraction_bits)) - 1, exponent = bits >> fraction_bits & top, bias = top >> 1;
  int fraction = bits & ((1 << fraction_bits) - 1), hidden = exponent ? 1 << fraction_bits : 0;
  double size = std::ldexp(fraction + hidden, std::max(exponent, 1) - bias - fraction_bits);
  if (exponent == top) size = fraction ? NOT_A_NUMBER : INF;
  return bits >> 15 ? -size : size;
}
inline uint16_t encode(double x, int fraction_bits) {
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
inline Number operator+(Number a, Number b) { return a += b; }
inline Number operator-(Number a, Number b) { return a += Number(-b.x, b.e); }
inline Number operator*(Number a, Number b) {
  return {a.x * b.x, std::abs(a.x) * b.e + std::abs(b.x) * a.e + std::abs(a.x * b.x)};
}
inline Number inverse(Number a) { return {1 / a.x, (a.e / std::abs(a.x) + 1) / std::abs(a.x)}; }
inline Number square_root(Number a) { return {std::sqrt(a.x), (a.e / a.x / 2 + 1) * std::sqrt(a.x)}; }
inline Number exponential(Number a) { return {std::exp(a.x), std::exp(a.x) * (a.e + 4)}; }
template <class F>
Number sum(int64_t n, const F& f) {  // in blocks: none of the kernels adds more than this one after the other
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
inline double uniform() {  // in [-1, 1)
  static uint64_t state = 1;
  state = state * 6364136223846793005u + 1442695040888963407u;
  return double(int64_t(state) >> 11) * 0x1p-52;
}
inline Tensor random(Dtype dtype, const Sizes& size, Layout layout = DENSE) {
  return filled(Tensor(dtype, size, layout), [](int64_t) { return uniform(); });
}

// --- checks ----------------------------------------------------------------------------------------------------------

inline std::string name_of_case;
inline int64_t checks = 0, failures = 0;
inline double worst = 0;  // error, as a part of what is tolerated

inline void expect(bool ok, const std::string& what, double expected, double got,
                   const Where& where = Where::current()) {
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

// Layouts whose offsets pass 2^31, on a machine that reserves the memory.
template <class F>
void far(const F& f) {
  name_of_case = "offsets past 2^31";
  try {
    f();
  } catch (const std::bad_alloc&) {
    printf("skipped: %s, for which this machine reserves no memory\n", name_of_case.c_str());
  }
}

}  // namespace dtme::test
