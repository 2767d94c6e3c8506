// Modulation and its layer norm (Sec. 4.3): one read of the tokens, a write a stream; backward likewise.
//
// Tokens stay in the first cache while every stream that shares them is formed. A few rows are worked on together:
// their sums wait for each other less, and what they share is loaded once. The variance is taken around the mean, in a
// second pass over numbers that are cached.

#include "vector.h"

namespace dtme::DTME_ISA {
namespace {

constexpr int TOGETHER = 4;           // rows
constexpr int64_t CACHED = 1 << 13;   // numbers of tokens that one stream after the other works on,
constexpr int64_t MOST_CACHED = 32;   // and rows of them: what they add to a sum is summed first
constexpr int64_t GRAIN = 1 << 14;    // numbers worth a thread
constexpr int64_t STREAMED = 8 << 20; // bytes of results that no second cache holds until they are read
constexpr int64_t MOST_PARTS = 64;    // of the tokens, each with its own sums of parameter gradients

// (T, p) of any dtype, as rows of S
template <class S>
struct Table {
  int64_t p;
  Buffer<S> data;
  explicit Table(const View& x) : p(x.size[x.dim - 1]), data(Rows(x).count * p) {
    Rows rows(x);
    for (int64_t t = 0; t < rows.count; t++) rows.copy<S>(data + t * p, t);
  }
  const S* operator[](int64_t t) const { return data + t * p; }
};

// Which row of the tokens feeds row i of stream t; `own` streams have gradients of their own, even of the same tokens.
struct Tokens : Rows {
  bool own;
  int64_t per_stream;
  explicit Tokens(const View& x) : Rows(x, 1), own(x.size[0] > 1), per_stream(own ? x.stride[0] : 0) {}
};

inline int64_t rows_cached(int64_t p) { return std::clamp<int64_t>(CACHED / p, TOGETHER, MOST_CACHED); }

// J rows at a time, as many as are left at the end: f(integral_constant J, first row).
template <class F>
inline void for_groups(int64_t first, int64_t last, const F& f) {
  for (; first + TOGETHER <= last; first += TOGETHER) f(std::integral_constant<int, TOGETHER>(), first);
  for (; first < last; first++) f(std::integral_constant<int, 1>(), first);
}

template <class S, int J>
using Sums = Sum<S>[J];

// y = w x + b, and the sums of y; with STREAM also to `result`, past the caches
template <class S, int J, bool STREAM = false>
inline void scale_and_shift(const S* const (&x)[J], const S* w, const S* b, S* const (&y)[J], Sums<S, J>& sums,
                            int64_t p, S* const* result = nullptr) {
  for_places<S>(p, [&](auto at) DTME_INLINE {
    auto scale = at(w), shift = at(b);
    for (int j = 0; j < J; j++) {
      __builtin_prefetch(x[j] + J * p + at.c);  // of the next rows: every page is a new stream to the hardware's own
      auto formed = scale * at(x[j]) + shift;
      at.put(y[j], formed);
      if constexpr (STREAM) stream(result[j] + at.c, formed);  // not with the norm's: memory is busy throughout
      at.add(sums[j], formed);
    }
  });
}

template <class S, int J>
struct Statistics {
  S mean[J], rest[J], inverse_std[J];
  Statistics(S* const (&y)[J], const Sums<S, J>& sums, int64_t p, S eps) {
    Sums<S, J> rests, squares;
    for (int j = 0; j < J; j++) mean[j] = sums[j].total() / p;
    for_places<S>(p, [&](auto at) DTME_INLINE {
      for (int j = 0; j < J; j++) {
        auto near = at(y[j]) - mean[j];
        at.add(rests[j], near);
        at.add(squares[j], near * near);
      }
    });
    for (int j = 0; j < J; j++) {
      rest[j] = rests[j].total() / p;  // of the mean, below its last digit: much where deviations are far smaller
      inverse_std[j] = 1 / std::sqrt(std::max(squares[j].total() / p - rest[j] * rest[j], S(0)) + eps);
    }
  }
  template <class V>
  V centred(V y, int j) const { return y - mean[j] - rest[j]; }
};

// Every row begins at a whole vector, if the rows are whole vectors.
inline bool aligned(const View& x) {
  return reinterpret_cast<uintptr_t>(x.data) % VECTOR_BYTES == 0;
}

template <class S>
void forward(const Parallel& parallel, const View& tokens, const View& weight, const View& bias,
             const View& norm_weight, const View& norm_bias, S eps, const View& modulated, const View& normalized) {
  bool with_norm = normalized.data;
  Tokens x(tokens);
  if (x.count == 0) return;
  Rows out(modulated, 1), norm(with_norm ? normalized : modulated, 1);
  int64_t streams = weight.size[0], p = x.width, cached = rows_cached(p);
  Table<S> w(weight), b(bias), gain(with_norm ? norm_weight : bias), shift(with_norm ? norm_bias : bias);
  bool in_place = out.place<S>(0) && (!with_norm || norm.place<S>(0));
  int64_t bytes = (with_norm ? 2 : 1) * streams * x.count * p * int64_t(sizeof(S));
  bool streamed = in_place && bytes > STREAMED && p % LANES<S> == 0 && aligned(modulated) && aligned(normalized);
  auto group = [&]<int J>(std::integral_constant<int, J>, int64_t i, int64_t t, S* scratch) {
    const S* in[J];
    S *y[J], *z[J], *final_y[J];
    for (int j = 0; j < J; j++) {
      in[j] = x.get<S>(scratch + j * p, i + j, t * x.per_stream);
      final_y[j] = out.place<S>(i + j, t * modulated.stride[0]);
      y[j] = in_place && !streamed ? final_y[j] : scratch + (TOGETHER + j) * p;
      z[j] = in_place && with_norm ? norm.place<S>(i + j, t * normalized.stride[0]) : scratch + (2 * TOGETHER + j) * p;
    }
    Sums<S, J> sums;
    if (streamed) {
      scale_and_shift<S, J, true>(in, w[t], b[t], y, sums, p, final_y);
    } else {
      scale_and_shift<S, J>(in, w[t], b[t], y, sums, p);
    }
    if (with_norm) {
      Statistics<S, J> of(y, sums, p, eps);
      for_places<S>(p, [&](auto at) DTME_INLINE {
        auto scale = at(gain[0]), more = at(shift[0]);
        for (int j = 0; j < J; j++) {
          auto normed = of.centred(at(y[j]), j) * of.inverse_std[j] * scale + more;
          if (streamed) {
            stream(z[j] + at.c, normed);
          } else {
            at.put(z[j], normed);
          }
        }
      });
    }
    if (in_place) return;
    for (int j = 0; j < J; j++) {
      out.put<S>(y[j], i + j, t * modulated.stride[0]);
      if (with_norm) norm.put<S>(z[j], i + j, t * normalized.stride[0]);
    }
  };
  parallel(x.count, std::max<int64_t>(1, GRAIN / (streams * p)), [&](int64_t begin, int64_t end) {
    Buffer<S> scratch(3 * TOGETHER * p);
    for (int64_t first = begin; first < end; first += cached)
      for (int64_t t = 0; t < streams; t++)
        for_groups(first, std::min(first + cached, end), [&](auto j, int64_t i) { group(j, i, t, scratch); });
    if (streamed) finish_streaming();
  });
}

// Sums of one part of the tokens: rows d_weight and d_bias of every stream, d_norm_weight, d_norm_bias.
template <class S>
struct Partial {
  int64_t streams, p;
  Buffer<S> data;
  Partial(int64_t parts, int64_t streams, int64_t p)
      : streams(streams), p(p), data(parts * (2 * streams + 2) * p, S(0)) {}
  S* row(int64_t part, int64_t which) { return data + (part * (2 * streams + 2) + which) * p; }
  // row += more, and more = 0
  void add(int64_t part, int64_t which, S* more) {
    S* sum = row(part, which);
    for_places<S>(p, [&](auto at) DTME_INLINE { at.put(sum, at(sum) + at(more)); });
    std::fill_n(more, p, S(0));
  }
  // One row of all parts together, in order.
  void reduce(int64_t parts, int64_t which, const Rows& to, int64_t index) {
    S* sum = row(0, which);
    for (int64_t part = 1; part < parts; part++) {
      const S* more = row(part, which);
      for_places<S>(p, [&](auto at) DTME_INLINE { at.put(sum, at(sum) + at(more)); });
    }
    to.put<S>(sum, index);
  }
};

// What reaches y = w x + b through its norm, whose gradient is dz; adds to the sums of the norm's parameters.
template <class S, int J>
inline void norm_backward(S* const (&y)[J], const Sums<S, J>& sums_y, const S* const (&dz)[J], const S* gain, S eps,
                          S* const (&dy)[J], S* d_gain, S* d_shift, int64_t p) {
  Statistics<S, J> of(y, sums_y, p, eps);
  Sums<S, J> sums, products;
  for_places<S>(p, [&](auto at) DTME_INLINE {
    auto scale = at(gain);
    for (int j = 0; j < J; j++) {
      __builtin_prefetch(dz[j] + J * p + at.c);
      auto ds = at(dz[j]) * scale;
      at.add(sums[j], ds);
      at.add(products[j], ds * of.centred(at(y[j]), j));
    }
  });
  S mean[J], mean_product[J];  // of ds, and of ds with s
  for (int j = 0; j < J; j++) {
    mean[j] = sums[j].total() / p;
    mean_product[j] = products[j].total() * of.inverse_std[j] / p;
  }
  for_places<S>(p, [&](auto at) DTME_INLINE {
    auto scale = at(gain), more_gain = at(d_gain), more_shift = at(d_shift);
    for (int j = 0; j < J; j++) {
      auto s = of.centred(at(y[j]), j) * of.inverse_std[j], up = at(dz[j]);
      at.put(dy[j], (up * scale - mean[j] - s * mean_product[j]) * of.inverse_std[j]);
      more_gain += up * s;
      more_shift += up;
    }
    at.put(d_gain, more_gain);
    at.put(d_shift, more_shift);
  });
}

template <class S>
void backward(const Parallel& parallel, const View& grad_modulated, const View& grad_normalized, const View& tokens,
              const View& weight, const View& bias, const View& norm_weight, S eps, const View& d_tokens,
              const View& d_weight, const View& d_bias, const View& d_norm_weight, const View& d_norm_bias) {
  bool with_norm = d_norm_weight.data;
  Tokens x(tokens), dx(d_tokens);
  Rows direct(grad_modulated, 1), normed(with_norm ? grad_normalized : grad_modulated, 1);
  int64_t streams = weight.size[0], p = x.width, cached = rows_cached(p);
  Table<S> w(weight), b(with_norm ? bias : weight), gain(with_norm ? norm_weight : weight);
  // as many parts as the shape says, not the threads: the sums are the same whoever takes them
  int64_t parts = std::clamp<int64_t>(x.count * streams * p / GRAIN / 2, 1, MOST_PARTS);
  Partial<S> partial(parts, streams, p);
  // sums_of_rows: d_weight, d_bias, d_norm_weight, d_norm_bias
  auto group = [&]<int J>(std::integral_constant<int, J>, int64_t i, int64_t t, S* sums_of_rows, S* scratch,
                          S* dx_rows) {
    const S *in[J], *up[J], *dz[J];
    S *y[J], *through[J];
    for (int j = 0; j < J; j++) {
      S* own = scratch + 5 * j * p;
      in[j] = x.get<S>(own, i + j, t * x.per_stream);
      up[j] = direct.get<S>(own + p, i + j, t * grad_modulated.stride[0]);
      dz[j] = with_norm ? normed.get<S>(own + 2 * p, i + j, t * grad_normalized.stride[0]) : nullptr;
      y[j] = own + 3 * p;
      through[j] = own + 4 * p;
    }
    if (with_norm) {
      Sums<S, J> sums;
      scale_and_shift<S, J>(in, w[t], b[t], y, sums, p);
      norm_backward<S, J>(y, sums, dz, gain[0], eps, through, sums_of_rows + 2 * p, sums_of_rows + 3 * p, p);
    }
    S *d_weight_row = sums_of_rows, *d_bias_row = sums_of_rows + p;
    for_places<S>(p, [&](auto at) DTME_INLINE {
      auto scale = at(w[t]), dw = at(d_weight_row), db = at(d_bias_row);
      for (int j = 0; j < J; j++) {
        __builtin_prefetch(up[j] + J * p + at.c);
        auto g = at(up[j]);
        if (with_norm) g += at(through[j]);
        dw += g * at(in[j]);
        db += g;
        at.put(dx_rows + j * p, at(dx_rows + j * p) + g * scale);
      }
      at.put(d_weight_row, dw);
      at.put(d_bias_row, db);
    });
  };
  parallel(parts, 1, [&](int64_t begin, int64_t end) {
    Buffer<S> scratch(5 * TOGETHER * p), rows(cached * p), sums(4 * p, S(0));
    for (int64_t part = begin; part < end; part++) {
      int64_t first = part * x.count / parts, stop = (part + 1) * x.count / parts;
      for (; first < stop; first += cached) {
        int64_t last = std::min(first + cached, stop);
        for (int64_t t = 0; t < streams; t++) {
          if (t == 0 || x.own) std::fill_n(static_cast<S*>(rows), (last - first) * p, S(0));
          for_groups(first, last, [&](auto j, int64_t i) { group(j, i, t, sums, scratch, rows + (i - first) * p); });
          partial.add(part, t, sums);
          partial.add(part, streams + t, sums + p);
          if (t < streams - 1 && !x.own) continue;
          for (int64_t i = first; i < last; i++) dx.put<S>(rows + (i - first) * p, i, t * dx.per_stream);
        }
        partial.add(part, 2 * streams, sums + 2 * p);
        partial.add(part, 2 * streams + 1, sums + 3 * p);
      }
    }
  });
  for (int64_t t = 0; t < streams; t++) {
    partial.reduce(parts, t, Rows(d_weight), t);
    partial.reduce(parts, streams + t, Rows(d_bias), t);
  }
  if (!with_norm) return;
  partial.reduce(parts, 2 * streams, Rows(d_norm_weight), 0);
  partial.reduce(parts, 2 * streams + 1, Rows(d_norm_bias), 0);
}

}  // namespace

void modulate(const Parallel& parallel, const View& tokens, const View& weight, const View& bias,
              const View& norm_weight, const View& norm_bias, double eps, const View& modulated,
              const View& normalized) {
  with_wide_type(tokens.dtype, [&](auto type) {
    using S = decltype(type);
    forward<S>(parallel, tokens, weight, bias, norm_weight, norm_bias, S(eps), modulated, normalized);
  });
}

void modulate_backward(const Parallel& parallel, const View& grad_modulated, const View& grad_normalized,
                       const View& tokens, const View& weight, const View& bias, const View& norm_weight, double eps,
                       const View& d_tokens, const View& d_weight, const View& d_bias, const View& d_norm_weight,
                       const View& d_norm_bias) {
  with_wide_type(tokens.dtype, [&](auto type) {
    using S = decltype(type);
    backward<S>(parallel, grad_modulated, grad_normalized, tokens, weight, bias, norm_weight, S(eps), d_tokens,
                d_weight, d_bias, d_norm_weight, d_norm_bias);
  });
}

}  // namespace dtme::DTME_ISA
