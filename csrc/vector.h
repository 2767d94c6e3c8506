// Numbers by the register: what a loop needs that compilers do not make of plain code, several sums side by side.
#pragma once

#include "rows.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace dtme::DTME_ISA {

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64;
#elif defined(__AVX2__)
constexpr int VECTOR_BYTES = 32;
#else
constexpr int VECTOR_BYTES = 16;
#endif

template <class S>
constexpr int64_t LANES = VECTOR_BYTES / sizeof(S);

template <class S>
struct VectorOf {
  typedef S type __attribute__((vector_size(VECTOR_BYTES)));
};
template <class S>
using Vector = typename VectorOf<S>::type;

template <class T, class S>
inline T load(const S* from) {
  T x;
  std::memcpy(&x, from, sizeof x);
  return x;
}
template <class T, class S>
inline void store(S* to, T x) {
  std::memcpy(to, &x, sizeof x);
}

// Past the caches, for results too large to be found there again: memory is not read before it is written. `to` is
// aligned to a vector where T is one. `finish_streaming` before another thread may look.
template <class T, class S>
inline void stream(S* to, T x) {
#if defined(__x86_64__)
  if constexpr (sizeof(T) == 16) return _mm_stream_ps(reinterpret_cast<float*>(to), (__m128)x);
#endif
#if defined(__AVX2__)
  if constexpr (sizeof(T) == 32) return _mm256_stream_ps(reinterpret_cast<float*>(to), (__m256)x);
#endif
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 64) return _mm512_stream_ps(reinterpret_cast<float*>(to), (__m512)x);
#endif
  store(to, x);
}
inline void finish_streaming() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// A sum in a register, and one of what is left behind the last whole vector.
template <class S>
struct Sum {
  Vector<S> lanes = {};
  S rest = 0;

  S total() const {
    S numbers[LANES<S>], total = 0;
    store(numbers, lanes);
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < LANES<S>; i++) total += numbers[i];
    return total + rest;
  }
};

// A place in rows of the same length: T is a vector of numbers, or behind the last whole vector a single one.
template <class S, class T>
struct Place {
  int64_t c;
  T operator()(const S* row) const { return load<T>(row + c); }
  void put(S* row, T x) const { store(row + c, x); }
  void add(Sum<S>& sum, T x) const {
    if constexpr (sizeof(T) == sizeof(S)) {
      sum.rest += x;
    } else {
      sum.lanes += x;
    }
  }
};

// f(place) for all places of a row of n. Inlined, and f should be: what f refers to then stays in registers.
#define DTME_INLINE __attribute__((always_inline))
template <class S, class F>
DTME_INLINE inline void for_places(int64_t n, const F& f) {
  int64_t c = 0;
  for (; c + LANES<S> <= n; c += LANES<S>) f(Place<S, Vector<S>>{c});
  for (; c < n; c++) f(Place<S, S>{c});
}

}  // namespace dtme::DTME_ISA
