// Small matrix products.
//
// A product of the sizes met here (a few dozen rows) is over before a library has looked at its arguments; this one
// reads operands where they lie, gives the same bits on any number of threads, and is tested without torch.
#pragma once

#include "vector.h"

namespace dtme::DTME_ISA {

constexpr int ROWS = 6;  // multiplied together, with PANEL columns: their sums fill three quarters of the registers
constexpr int VECTORS = VECTOR_BYTES == 64 ? 4 : 2;
template <class S>
constexpr int64_t PANEL = VECTORS * LANES<S>;

// a[i, k] at rows * i + steps * k; b[k, j] at j / PANEL * panels + steps * k + j % PANEL
template <class S>
struct Left {
  const S* data;
  int64_t rows, steps;
};
template <class S>
struct Right {
  const S* data;
  int64_t panels, steps;
};

// Not inlined: its registers are its own.
template <class S, int R, int N, bool ADD>
__attribute__((noinline)) void multiply_tile(int64_t depth, Left<S> a, const S* __restrict b, int64_t steps,
                                             S* __restrict c, int64_t ldc) {
  using V = Vector<S>;
  V sum[R][N] = {};
  for (int64_t k = 0; k < depth; k++) {
    V row[N];
#pragma GCC unroll 8
    for (int j = 0; j < N; j++) row[j] = load<V>(b + k * steps + j * LANES<S>);
#pragma GCC unroll 8
    for (int i = 0; i < R; i++) {
      S x = a.data[i * a.rows + k * a.steps];
#pragma GCC unroll 8
      for (int j = 0; j < N; j++) sum[i][j] += x * row[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; i++) {
#pragma GCC unroll 8
    for (int j = 0; j < N; j++) {
      S* to = c + i * ldc + j * LANES<S>;
      store(to, ADD ? load<V>(to) + sum[i][j] : sum[i][j]);
    }
  }
}

template <class S, int N, bool ADD>
inline void multiply_panel(int64_t m, int64_t depth, Left<S> a, const S* b, int64_t steps, S* c, int64_t ldc) {
  int64_t i = 0;
  auto tile = [&]<int R>(std::integral_constant<int, R>) {
    multiply_tile<S, R, N, ADD>(depth, {a.data + i * a.rows, a.rows, a.steps}, b, steps, c + i * ldc, ldc);
  };
  for (; i + ROWS <= m; i += ROWS) tile(std::integral_constant<int, ROWS>());
  switch (m - i) {
    case 5: return tile(std::integral_constant<int, 5>());
    case 4: return tile(std::integral_constant<int, 4>());
    case 3: return tile(std::integral_constant<int, 3>());
    case 2: return tile(std::integral_constant<int, 2>());
    case 1: return tile(std::integral_constant<int, 1>());
  }
}

// c (m, n), row stride ldc, = or += a (m, depth) b (depth, n). b and c are touched up to a whole vector of columns.
// Every number is a sum in the order of k: the same whatever m and n are.
template <bool ADD, class S>
inline void multiply(int64_t m, int64_t n, int64_t depth, Left<S> a, Right<S> b, S* c, int64_t ldc) {
  for (int64_t j = 0; j < n; j += PANEL<S>) {
    const S* panel = b.data + j / PANEL<S> * b.panels;
    int64_t vectors = (std::min(n - j, PANEL<S>) + LANES<S> - 1) / LANES<S>;
    if constexpr (VECTORS == 4) {
      if (vectors == 4) multiply_panel<S, 4, ADD>(m, depth, a, panel, b.steps, c + j, ldc);
      if (vectors == 3) multiply_panel<S, 3, ADD>(m, depth, a, panel, b.steps, c + j, ldc);
    }
    if (vectors == 2) multiply_panel<S, 2, ADD>(m, depth, a, panel, b.steps, c + j, ldc);
    if (vectors == 1) multiply_panel<S, 1, ADD>(m, depth, a, panel, b.steps, c + j, ldc);
  }
}

// The same with sums of at most `BLOCK` products each, and their sum: a rounding error of BLOCK + depth / BLOCK.
constexpr int64_t BLOCK = 64;
template <class S>
inline void multiply_in_blocks(int64_t m, int64_t n, int64_t depth, Left<S> a, Right<S> b, S* c, int64_t ldc) {
  for (int64_t j = 0; j < n; j += PANEL<S>) {
    for (int64_t k = 0; k < depth; k += BLOCK) {
      Left<S> left{a.data + k * a.steps, a.rows, a.steps};
      Right<S> right{b.data + j / PANEL<S> * b.panels + k * b.steps, b.panels, b.steps};
      int64_t columns = std::min(n - j, PANEL<S>), deep = std::min(depth - k, BLOCK);
      (k ? multiply<true, S> : multiply<false, S>)(m, columns, deep, left, right, c + j, ldc);
    }
  }
}

// --- operands laid out for it ----------------------------------------------------------------------------------------

// b (depth, n) in panels, PANEL columns of all its rows next to each other, zeros behind the last column.
template <class S>
struct Panels {
  int64_t depth, n;
  Buffer<S> data;

  Panels(int64_t depth, int64_t n) : depth(depth), n(n), data(round_up(n, PANEL<S>) * depth) { clear_tail(); }
  operator Right<S>() const { return {data, depth * PANEL<S>, PANEL<S>}; }
  S* at(int64_t k, int64_t j) { return data + index(k, j); }
  const S* at(int64_t k, int64_t j) const { return data + index(k, j); }

  // b[k, first:first + count] = row
  void put_row(int64_t k, const S* row, int64_t first, int64_t count) {
    for (int64_t j = first; j < first + count;) {
      int64_t columns = std::min(first + count - j, PANEL<S> - j % PANEL<S>);
      std::copy_n(row + j - first, columns, at(k, j));
      j += columns;
    }
  }
  // b[:, j] = column
  void put_column(int64_t j, const S* column) {
    S* to = at(0, j);
    for (int64_t k = 0; k < depth; k++) to[k * PANEL<S>] = column[k];
  }

 private:
  int64_t index(int64_t k, int64_t j) const { return (j / PANEL<S> * depth + k) * PANEL<S> + j % PANEL<S>; }
  void clear_tail() {
    if (n % PANEL<S> == 0) return;
    for (int64_t k = 0; k < depth; k++) std::fill(at(k, n), at(k, n / PANEL<S> * PANEL<S>) + PANEL<S>, S(0));
  }
};

}  // namespace dtme::DTME_ISA
