// What counting conflicts and returning their dot products share: gradients as rows, and dots of pairs of them.
#pragma once

#include <utility>
#include <vector>

#include "gemm.h"

namespace dtme::DTME_ISA {

// The task gradients (K, tokens, p) as rows of S.
struct Gradients : Rows {
  int64_t num_tasks, apart;
  explicit Gradients(const View& grads) : Rows(grads, 1), num_tasks(grads.size[0]), apart(grads.stride[0]) {}

  int64_t num_pairs() const { return num_tasks * (num_tasks - 1) / 2; }
  // at a time and thread: with their coordinates in the L2 cache
  int64_t tokens_at_once() const {
    constexpr int64_t NUMBERS = 3 << 15, MOST_ROWS = 384;
    return std::max<int64_t>(1, std::min(MOST_ROWS, NUMBERS / width) / num_tasks);
  }
  // to[token, task] = the gradients of a block
  template <class S>
  void load(S* to, int64_t first, int64_t tokens) const {
    for (int64_t row = 0; row < tokens * num_tasks; row++)
      copy<S>(to + row * width, first + row / num_tasks, row % num_tasks * apart);
  }
};

// products[j] = <x, y_j>, J rows of y at a distance. In double: what is left of large sums counts.
template <int J, class S>
inline void dot(const S* __restrict x, const S* __restrict y, int64_t distance, int64_t n, double* products) {
  double s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
  for (int64_t c = 0; c < n; c++) {
    double v = x[c];
    s0 += v * double(y[c]);
    if constexpr (J > 1) s1 += v * double(y[distance + c]);
    if constexpr (J > 2) s2 += v * double(y[2 * distance + c]);
    if constexpr (J > 3) s3 += v * double(y[3 * distance + c]);
  }
  double sums[] = {s0, s1, s2, s3};
  for (int j = 0; j < J; j++) products[j] = sums[j];
}

// <x_i, x_j> for j > i in the order of itertools.combinations; x (K, n), rows at a distance.
template <class S>
void pair_dots(const S* x, int64_t distance, int64_t num_tasks, int64_t n, double* products) {
  for (int64_t i = 0; i < num_tasks; i++) {
    for (int64_t j = i + 1; j < num_tasks;) {
      const S *a = x + i * distance, *b = x + j * distance;
      int64_t left = num_tasks - j, taken = std::min<int64_t>(left, 4);
      if (taken == 4) dot<4>(a, b, distance, n, products);
      if (taken == 3) dot<3>(a, b, distance, n, products);
      if (taken == 2) dot<2>(a, b, distance, n, products);
      if (taken == 1) dot<1>(a, b, distance, n, products);
      products += taken;
      j += taken;
    }
  }
}

// f(c, row) for rows [begin, end) of a matrix. Where it is the columns that lie together, as torch.linalg.eigh leaves
// them, rows are read 64 at a time, in blocks of 16 columns: whole cache lines on both sides.
template <class S, class F>
void for_rows(const View& matrix, int64_t begin, int64_t end, const F& f) {
  constexpr int64_t TOGETHER = 64, COLUMNS = 16;
  Rows rows(matrix);
  int64_t p = rows.width, apart = matrix.stride[0];
  if (std::abs(apart) >= std::abs(rows.stride)) {
    Buffer<S> scratch(p);
    for (int64_t c = begin; c < end; c++) f(c, rows.get<S>(scratch, c));
    return;
  }
  int64_t padded = p + COLUMNS;  // no power of two, which would leave few sets of the cache
  Buffer<S> some(TOGETHER * padded), block(COLUMNS * TOGETHER);
  for (int64_t first = begin; first < end; first += TOGETHER) {
    int64_t count = std::min(TOGETHER, end - first);
    for (int64_t column = 0; column < p; column += COLUMNS) {
      int64_t columns = std::min(COLUMNS, p - column);
      for (int64_t e = 0; e < columns; e++)
        read<S>(block + e * TOGETHER, rows.at(first, (column + e) * rows.stride), matrix.dtype, apart, count);
      for (int64_t i = 0; i < count; i++)
        for (int64_t e = 0; e < columns; e++) some[i * padded + column + e] = block[e * TOGETHER + i];
    }
    for (int64_t i = 0; i < count; i++) f(first + i, some + i * padded);
  }
}

}  // namespace dtme::DTME_ISA
