// Dot products of task gradients in the range and in the null space, token by token (Eq. 4), and their gradient.

#include "pairs.h"

namespace dtme::DTME_ISA {

void projected_dots(const Parallel& parallel, const View& grads, const View& basis, int64_t rank, const View& range,
                    const View& null) {
  with_wide_type(grads.dtype, [&](auto type) {
    using S = decltype(type);
    Gradients x(grads);
    int64_t p = x.width, width = round_up(p, LANES<S>), num_tasks = x.num_tasks;
    int64_t step = x.tokens_at_once(), blocks = (x.count + step - 1) / step;
    Panels<S> u(p, p);
    for_rows<S>(basis, 0, p, [&](int64_t c, const S* row) { u.put_row(c, row, 0, p); });
    parallel(blocks, 1, [&](int64_t begin, int64_t end) {
      Buffer<S> g(step * num_tasks * p), h(step * num_tasks * width);
      std::vector<double> dots(x.num_pairs());
      for (int64_t block = begin; block < end; block++) {
        int64_t first = block * step, tokens = std::min(step, x.count - first);
        x.load<S>(g, first, tokens);
        multiply_in_blocks<S>(tokens * num_tasks, p, p, {g, p, 1}, u, h, width);
        for (int64_t token = 0; token < tokens; token++)
          for (bool is_null : {false, true}) {
            const S* coordinates = h + token * num_tasks * width + (is_null ? rank : 0);
            pair_dots<S>(coordinates, width, num_tasks, is_null ? p - rank : rank, dots.data());
            auto to = static_cast<S*>((is_null ? null : range).data) + first + token;
            for (int64_t pair = 0; pair < x.num_pairs(); pair++) to[pair * x.count] = S(dots[pair]);
          }
      }
    });
  });
}

namespace {

// dh_i = sum_j w_ij h_j of one token, w the range gradient for c < m, the null gradient behind it; both (P, tokens)
template <class S>
void mix(const S* h, S* dh, int64_t width, const Gradients& x, int64_t rank, const S* range, const S* null) {
  std::fill_n(dh, x.num_tasks * width, S(0));
  for (int64_t i = 0, pair = 0; i < x.num_tasks; i++)
    for (int64_t j = i + 1; j < x.num_tasks; j++, pair++)
      for (auto [a, b] : {std::pair{i, j}, std::pair{j, i}}) {
        S* to = dh + a * width;
        const S* from = h + b * width;
        S in_range = range[pair * x.count], in_null = null[pair * x.count];
#pragma omp simd
        for (int64_t c = 0; c < rank; c++) to[c] += in_range * from[c];
#pragma omp simd
        for (int64_t c = rank; c < x.width; c++) to[c] += in_null * from[c];
      }
}

template <class S>
void backward(const Parallel& parallel, const S* grad_range, const S* grad_null, const Gradients& x, const View& basis,
              int64_t rank, const View& d_grads, const View& d_basis) {
  int64_t p = x.width, width = round_up(p, LANES<S>), num_tasks = x.num_tasks;
  Panels<S> u(p, p), transposed(p, p);
  Buffer<S> du(p * width, S(0));
  for_rows<S>(basis, 0, p, [&](int64_t c, const S* row) {
    u.put_row(c, row, 0, p);
    transposed.put_column(c, row);
  });
  Gradients dx(d_grads);
  int64_t step = x.tokens_at_once(), stretch = std::min(16 * step, x.count);
  Buffer<S> g(stretch * num_tasks * p), dh(stretch * num_tasks * width);
  for (int64_t start = 0; start < x.count; start += stretch) {
    int64_t tokens = std::min(stretch, x.count - start);
    parallel((tokens + step - 1) / step, 1, [&](int64_t begin, int64_t end) {
      Buffer<S> h(step * num_tasks * width);
      for (int64_t block = begin; block < end; block++) {
        int64_t first = block * step, count = std::min(step, tokens - first), n = count * num_tasks;
        S *own_g = g + first * num_tasks * p, *own_dh = dh + first * num_tasks * width;
        x.load<S>(own_g, start + first, count);
        multiply<false, S>(n, p, p, {own_g, p, 1}, u, h, width);
        for (int64_t token = 0; token < count; token++) {
          int64_t row = token * num_tasks * width, i = start + first + token;
          mix<S>(h + row, own_dh + row, width, x, rank, grad_range + i, grad_null + i);
        }
        multiply<false, S>(n, p, p, {own_dh, width, 1}, transposed, h, width);  // dg = U dh
        for (int64_t row = 0; row < n; row++)
          dx.put<S>(h + row * width, start + first + row / num_tasks, row % num_tasks * dx.apart);
      }
    });
    // dU += g^T dh: every row of dU has one owner, so any number of threads gives the same bits
    parallel((p + ROWS - 1) / ROWS, 1, [&](int64_t begin, int64_t end) {
      int64_t c = begin * ROWS, count = std::min(end * ROWS, p) - c;
      Right<S> right{dh, PANEL<S>, width};
      multiply<true, S>(count, p, tokens * num_tasks, {g + c, 1, p}, right, du + c * width, width);
    });
  }
  Rows out(d_basis);
  for (int64_t c = 0; c < p; c++) out.put<S>(du + c * width, c);
}

}  // namespace

void projected_dots_backward(const Parallel& parallel, const View& grad_range, const View& grad_null, const View& grads,
                             const View& basis, int64_t rank, const View& d_grads, const View& d_basis) {
  with_wide_type(grads.dtype, [&](auto type) {
    using S = decltype(type);
    auto range = static_cast<const S*>(grad_range.data), null = static_cast<const S*>(grad_null.data);
    backward<S>(parallel, range, null, Gradients(grads), basis, rank, d_grads, d_basis);
  });
}

}  // namespace dtme::DTME_ISA
