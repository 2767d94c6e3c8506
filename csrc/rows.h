// Rows of any dtype and stride, read and written as rows of float or double; and memory to hold them.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>

#include "kernels.h"

namespace dtme::DTME_ISA {

// --- one number ------------------------------------------------------------------------------------------------------

struct float16 {
  uint16_t bits;
};
struct bfloat16 {
  uint16_t bits;
};

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(bool x) { return x; }
inline float widen(bfloat16 x) { return std::bit_cast<float>(uint32_t(x.bits) << 16); }
inline float widen(float16 x) {
  uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13, sign = uint32_t(x.bits & 0x8000) << 16;
  uint32_t finite = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) * 0x1p112f);  // also where subnormal
  return std::bit_cast<float>((magnitude >= 0x0f800000 ? magnitude | 0x7f800000 : finite) | sign);
}

template <class T>
inline T narrow(float x) {
  return T(x);
}
template <>
inline bfloat16 narrow(float x) {
  uint32_t bits = std::bit_cast<uint32_t>(x);
  uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to nearest, ties to even
  return {uint16_t((bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x40 : rounded)};
}
template <>
inline float16 narrow(float x) {
  uint32_t bits = std::bit_cast<uint32_t>(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  uint32_t normal = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  uint32_t subnormal = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000;
  uint32_t huge = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
  return {uint16_t(sign | (magnitude >= 0x47800000 ? huge : magnitude < 0x38800000 ? subnormal : normal))};
}

// --- one row ---------------------------------------------------------------------------------------------------------

template <class F>
inline void with_type(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::float32: return f(float());
    case Dtype::float64: return f(double());
    case Dtype::float16: return f(float16());
    case Dtype::bfloat16: return f(bfloat16());
    case Dtype::boolean: return f(bool());
  }
}

template <class S>
constexpr Dtype dtype_of = sizeof(S) == 4 ? Dtype::float32 : Dtype::float64;

template <class S>
inline void read(S* __restrict to, const void* from, Dtype dtype, int64_t stride, int64_t n) {
  with_type(dtype, [=](auto type) {
    auto x = static_cast<const decltype(type)*>(from);
    if (stride == 1) {
#pragma omp simd
      for (int64_t i = 0; i < n; i++) to[i] = S(widen(x[i]));
    } else {
      for (int64_t i = 0; i < n; i++) to[i] = S(widen(x[i * stride]));
    }
  });
}

template <class S>
inline void write(void* to, Dtype dtype, int64_t stride, const S* __restrict from, int64_t n) {
  with_type(dtype, [=](auto type) {
    using T = decltype(type);
    auto x = static_cast<T*>(to);
    if constexpr (std::is_same_v<T, double>) {
      for (int64_t i = 0; i < n; i++) x[i * stride] = from[i];
    } else if (stride == 1) {
#pragma omp simd
      for (int64_t i = 0; i < n; i++) x[i] = narrow<T>(float(from[i]));
    } else {
      for (int64_t i = 0; i < n; i++) x[i * stride] = narrow<T>(float(from[i]));
    }
  });
}

// --- all rows of a tensor --------------------------------------------------------------------------------------------

// The last dimension is a row; all others, from `first` on, count the rows. Those before `first` are added by hand.
struct Rows {
  View x;
  int first;
  int64_t count = 1, width, stride;

  explicit Rows(const View& view, int first = 0) : x(view), first(first) {
    for (int i = first; i < x.dim - 1; i++) count *= x.size[i];
    width = x.size[x.dim - 1];
    stride = x.stride[x.dim - 1];
  }

  // `before`: elements that the dimensions before `first` account for
  void* at(int64_t row, int64_t before = 0) const {
    for (int i = x.dim - 2; i > first; i--) {
      before += row % x.size[i] * x.stride[i];
      row /= x.size[i];
    }
    if (first < x.dim - 1) before += row * x.stride[first];
    return static_cast<char*>(x.data) + before * bytes(x.dtype);
  }

  // The row as it lies in memory where it can be used so, else in `scratch`.
  template <class S>
  const S* get(S* scratch, int64_t row, int64_t before = 0) const {
    const void* from = at(row, before);
    if (x.dtype == dtype_of<S> && stride == 1) return static_cast<const S*>(from);
    read(scratch, from, x.dtype, stride, width);
    return scratch;
  }
  template <class S>
  void copy(S* to, int64_t row, int64_t before = 0) const {
    read(to, at(row, before), x.dtype, stride, width);
  }
  template <class S>
  void put(const S* from, int64_t row, int64_t before = 0) const {
    write(at(row, before), x.dtype, stride, from, width);
  }
  // Where a row of the result can be formed in place, else null.
  template <class S>
  S* place(int64_t row, int64_t before = 0) const {
    return x.dtype == dtype_of<S> && stride == 1 ? static_cast<S*>(at(row, before)) : nullptr;
  }
};

// --- memory ----------------------------------------------------------------------------------------------------------

constexpr int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// The size of a buffer where no tensor has as many numbers: what overflows does not fit into memory either.
inline int64_t product(int64_t a, int64_t b) {
  int64_t n;
  if (__builtin_mul_overflow(a, b, &n)) throw std::bad_alloc();
  return n;
}

// Aligned to a cache line; not initialised.
template <class S>
class Buffer {
 public:
  explicit Buffer(int64_t n)
      : data_(static_cast<S*>(operator new(product(std::max<int64_t>(n, 1), sizeof(S)), LINE))) {}
  Buffer(int64_t n, S value) : Buffer(n) { std::fill_n(data_, n, value); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { operator delete(data_, LINE); }
  operator S*() { return data_; }
  operator const S*() const { return data_; }

 private:
  static constexpr std::align_val_t LINE{64};
  S* data_;
};

// f(float()) or f(double()): what numbers of this dtype are computed in
template <class F>
inline void with_wide_type(Dtype dtype, const F& f) {
  if (dtype == Dtype::float64) return f(double());
  f(float());
}

}  // namespace dtme::DTME_ISA
