// Attention over shared and task keys (Sec. 4.3): softmax(scale * q [k ; k_task]^T + mask) [v ; v_task].
//
// The keys and values of a head, those of its task behind the shared ones, are laid out once, in panels; then a few
// dozen queries at a time meet all of them: a row of scores is complete before its softmax and nothing is rescaled.
// Scores, and in the backward pass their gradients, never leave the cache.

#include "gemm.h"

namespace dtme::DTME_ISA {
namespace {

constexpr int64_t SCORE_BYTES = 128 << 10;  // of one block of queries
constexpr int64_t MOST_QUERIES = 96;
constexpr int64_t FEW_QUERIES = 4;  // of all heads that share a key; of 6 the other way is as fast

struct Sizes {
  int64_t streams, images, heads, key_heads, queries, shared, task, d;

  explicit Sizes(const Attention& a)
      : streams(a.query.size[0]),
        images(a.query.size[1]),
        heads(a.query.size[2]),
        key_heads(a.key.size[2]),
        queries(a.query.size[3]),
        shared(a.key.size[3]),
        task(a.task_key.size[2]),
        d(a.query.size[4]) {}

  int64_t keys() const { return shared + task; }
  int64_t units() const { return streams * images * key_heads; }
  int64_t group() const { return heads / key_heads; }
  int64_t queries_at_once(int64_t size_of_number) const {
    int64_t fit = SCORE_BYTES / size_of_number / std::max<int64_t>(keys(), 1) / ROWS * ROWS;
    return std::clamp<int64_t>(fit, ROWS, MOST_QUERIES);
  }
};

// One head of one image in one stream: where it lies in tensors (T, B, H, ...) and (T, H, ...).
struct Head {
  int64_t stream, image, head;
  int64_t in(const View& x) const { return stream * x.stride[0] + image * x.stride[1] + head * x.stride[2]; }
  int64_t in_task(const View& x) const { return stream * x.stride[0] + head * x.stride[1]; }
};

inline Head key_head(const Sizes& size, int64_t unit) {
  return {unit / size.key_heads / size.images, unit / size.key_heads % size.images, unit % size.key_heads};
}

// e^x for x <= 0: 2^n e^r with |r| <= ln(2) / 2, and the series of e^r
inline float exponential(float x) {
  constexpr float LOG2_E = 1.44269504f, LN2_HIGH = 0.693359375f, LN2_LOW = -2.12194440e-4f;
  float clipped = x < -87 ? -87 : x;
  int32_t n = int32_t(clipped * LOG2_E - 0.5f);  // to zero, which is to nearest here
  float r = (clipped - float(n) * LN2_HIGH) - float(n) * LN2_LOW;
  float e = r * (1 / 5040.0f) + 1 / 720.0f;
  e = e * r + 1 / 120.0f;
  e = e * r + 1 / 24.0f;
  e = e * r + 1 / 6.0f;
  e = e * r + 0.5f;
  e = e * r + 1;
  e = e * r + 1;
  int32_t power = x < -87 ? 0 : (n + 127) << 23;  // chosen among integers: so the loop around it is vectorised
  return e * std::bit_cast<float>(power);
}
inline double exponential(double x) { return std::exp(x); }

// scores *= scale, + mask, then their exponentials less the greatest; returns 1 / sum, 0 where nothing is visible. NaN
// stays NaN.
template <class S>
inline S softmax(S* __restrict s, int64_t n, S scale, const S* mask) {
  constexpr S NONE = -std::numeric_limits<S>::infinity();
  S greatest = NONE, sum = 0;
  if (mask) {
#pragma omp simd
    for (int64_t j = 0; j < n; j++) s[j] = s[j] * scale + mask[j];
  } else {
#pragma omp simd
    for (int64_t j = 0; j < n; j++) s[j] *= scale;
  }
#pragma omp simd reduction(max : greatest)
  for (int64_t j = 0; j < n; j++) greatest = s[j] > greatest ? s[j] : greatest;
  if (greatest == NONE) {
    for (int64_t j = 0; j < n; j++) s[j] = s[j] == NONE ? 0 : s[j];
    return 0;
  }
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; j++) sum += s[j] = exponential(s[j] - greatest);
  return 1 / sum;
}

// What is added to the scores of one query: of the shared keys by mask or causality, 0 for task keys. One a thread.
template <class S>
class Mask {
 public:
  Mask(const Attention& a, const Sizes& size)
      : mask(a.mask), causal(a.causal), shared(size.shared), row(size.keys(), S(0)) {}

  const S* of(const Head& head, int64_t query) {
    constexpr S NONE = -std::numeric_limits<S>::infinity();
    if (mask.data) {
      auto from = static_cast<const char*>(mask.data) + (head.in(mask) + query * mask.stride[3]) * bytes(mask.dtype);
      read<S>(row, from, mask.dtype, mask.stride[4], shared);
      if (mask.dtype == Dtype::boolean)
        for (int64_t j = 0; j < shared; j++) row[j] = row[j] != 0 ? 0 : NONE;
    } else if (causal) {
      for (int64_t j = 0; j < shared; j++) row[j] = j <= query ? 0 : NONE;
    } else {
      return nullptr;
    }
    return row;
  }

 private:
  const View& mask;
  bool causal;
  int64_t shared;
  Buffer<S> row;
};

// All keys, or all values, of a head: shared(row) for j < N, then task(row).
template <class S, class F>
void for_each_key(const Sizes& size, const Head& head, const View& shared, const View& task, const F& f) {
  Buffer<S> scratch(size.d);
  Rows x(shared, 3), y(task, 2);
  for (int64_t j = 0; j < size.shared; j++) f(j, x.get<S>(scratch, j, head.in(shared)));
  for (int64_t j = 0; j < size.task; j++) f(size.shared + j, y.get<S>(scratch, j, head.in_task(task)));
}

template <class S>
void copy_rows(S* to, int64_t width, const View& x, const Head& head, int64_t first, int64_t count) {
  Rows rows(x, 3);
  for (int64_t i = 0; i < count; i++) rows.copy<S>(to + i * width, first + i, head.in(x));
}

// --- forward ---------------------------------------------------------------------------------------------------------

template <class S>
void forward(const Parallel& parallel, const Attention& a, const View& output) {
  Sizes size(a);
  int64_t keys = size.keys(), d = size.d, padded_keys = round_up(keys, LANES<S>), width = round_up(d, LANES<S>);
  int64_t most = size.queries_at_once(sizeof(S)), blocks = (size.queries + most - 1) / most;
  bool split = size.units() < 4 * parallel.threads;  // no number depends on it
  int64_t parts = split ? blocks : 1, blocks_of_part = split ? 1 : blocks;
  parallel(size.units() * parts, 1, [&](int64_t begin, int64_t end) {
    Panels<S> key(d, keys);
    Buffer<S> value(keys * width, S(0)), query(most * d), scores(most * padded_keys), out(most * width);
    Mask<S> mask(a, size);
    int64_t laid_out = -1;
    for (int64_t part = begin; part < end; part++) {
      int64_t unit = part / parts;
      Head head = key_head(size, unit);
      if (unit != laid_out) {
        for_each_key<S>(size, head, a.key, a.task_key, [&](int64_t j, const S* row) { key.put_column(j, row); });
        for_each_key<S>(size, head, a.value, a.task_value,
                        [&](int64_t j, const S* row) { std::copy_n(row, d, value + j * width); });
        laid_out = unit;
      }
      int64_t first_block = part % parts * blocks_of_part;
      for (int64_t i = 0; i < size.group() * blocks_of_part; i++) {
        Head own{head.stream, head.image, head.head * size.group() + i % size.group()};
        int64_t first = (first_block + i / size.group()) * most, count = std::min(most, size.queries - first);
        copy_rows<S>(query, d, a.query, own, first, count);
        multiply<false, S>(count, keys, d, {query, d, 1}, key, scores, padded_keys);
        Rows to(output, 3);
        Buffer<S> inverse_sums(count);
        for (int64_t q = 0; q < count; q++)
          inverse_sums[q] = softmax<S>(scores + q * padded_keys, keys, S(a.scale), mask.of(own, first + q));
        multiply<false, S>(count, d, keys, {scores, padded_keys, 1}, Right<S>{value, PANEL<S>, width}, out, width);
        for (int64_t q = 0; q < count; q++) {
          S* row = out + q * width;
          for (int64_t c = 0; c < d; c++) row[c] *= inverse_sums[q];
          to.put<S>(row, first + q, own.in(output));
        }
      }
    }
  });
}

// As forward, of a few queries, as when text is written: laying keys and values out would take longer than all
// products, so they are read where they lie, once.
template <class S>
void forward_few(const Parallel& parallel, const Attention& a, const View& output) {
  Sizes size(a);
  int64_t keys = size.keys(), d = size.d, group = size.group(), rows = group * size.queries;
  parallel(size.units(), 1, [&](int64_t begin, int64_t end) {
    Buffer<S> query(rows * d), scores(rows * keys), out(rows * d);
    Mask<S> mask(a, size);
    for (int64_t unit = begin; unit < end; unit++) {
      Head head = key_head(size, unit);
      auto own = [&](int64_t row) {
        return Head{head.stream, head.image, head.head * group + row / size.queries};
      };
      for (int64_t i = 0; i < rows; i += size.queries) copy_rows<S>(query + i * d, d, a.query, own(i), 0, size.queries);
      for_each_key<S>(size, head, a.key, a.task_key, [&](int64_t j, const S* key) {
        for (int64_t i = 0; i < rows; i++) {
          const S* one = query + i * d;
          S sum = 0;
#pragma omp simd reduction(+ : sum)
          for (int64_t c = 0; c < d; c++) sum += one[c] * key[c];
          scores[i * keys + j] = sum;
        }
      });
      Buffer<S> inverse_sums(rows);
      for (int64_t i = 0; i < rows; i++)
        inverse_sums[i] = softmax<S>(scores + i * keys, keys, S(a.scale), mask.of(own(i), i % size.queries));
      std::fill_n(static_cast<S*>(out), rows * d, S(0));
      for_each_key<S>(size, head, a.value, a.task_value, [&](int64_t j, const S* value) {
        for (int64_t i = 0; i < rows; i++) {
          S* __restrict to = out + i * d;
          S weight = scores[i * keys + j];
#pragma omp simd
          for (int64_t c = 0; c < d; c++) to[c] += weight * value[c];
        }
      });
      Rows to(output, 3);
      for (int64_t i = 0; i < rows; i++) {
        S* row = out + i * d;
        for (int64_t c = 0; c < d; c++) row[c] *= inverse_sums[i];
        to.put<S>(row, i % size.queries, own(i).in(output));
      }
    }
  });
}

// --- backward --------------------------------------------------------------------------------------------------------

// One thread's memory. Of one head: keys, and keys and values in panels, and the sums of their gradients; of a block of
// queries: the queries, their outputs' gradients, probabilities and gradients of the scores.
template <class S>
struct Backward {
  const Attention& a;
  Sizes size;
  int64_t keys, d, padded_keys, width, most;
  Panels<S> key_panels, value_panels;
  Buffer<S> key, d_key, d_value, query, grad, d_query, p, ds;
  Mask<S> mask;

  Backward(const Attention& a, const Sizes& size)
      : a(a),
        size(size),
        keys(size.keys()),
        d(size.d),
        padded_keys(round_up(keys, LANES<S>)),
        width(round_up(d, LANES<S>)),
        most(size.queries_at_once(2 * sizeof(S))),
        key_panels(d, keys),
        value_panels(d, keys),
        key(keys * width, S(0)),
        d_key(keys * width),
        d_value(keys * width),
        query(most * width, S(0)),
        grad(most * width, S(0)),
        d_query(most * width),
        p(most * padded_keys),
        ds(most * padded_keys),
        mask(a, size) {}

  void enter(const Head& head) {
    for_each_key<S>(size, head, a.key, a.task_key, [&](int64_t j, const S* row) {
      key_panels.put_column(j, row);
      std::copy_n(row, d, key + j * width);
    });
    for_each_key<S>(size, head, a.value, a.task_value,
                    [&](int64_t j, const S* row) { value_panels.put_column(j, row); });
    std::fill_n(static_cast<S*>(d_key), keys * width, S(0));
    std::fill_n(static_cast<S*>(d_value), keys * width, S(0));
  }

  // dV = P^T dO, dS = P (dP - rowsum(P dP)) with dP = dO V^T, dQ = dS K, dK = dS^T Q
  void run(const Head& head, int64_t first, int64_t count, const View& grads, const View& d_queries,
           const View& d_scores) {
    copy_rows<S>(query, width, a.query, head, first, count);
    copy_rows<S>(grad, width, grads, head, first, count);
    multiply<false, S>(count, keys, d, {query, width, 1}, key_panels, p, padded_keys);
    multiply<false, S>(count, keys, d, {grad, width, 1}, value_panels, ds, padded_keys);
    for (int64_t q = 0; q < count; q++) {
      S *probability = p + q * padded_keys, *to = ds + q * padded_keys, mean = 0, scale = a.scale;
      S inverse_sum = softmax<S>(probability, keys, scale, mask.of(head, first + q));
#pragma omp simd reduction(+ : mean)
      for (int64_t j = 0; j < keys; j++) {
        probability[j] *= inverse_sum;
        mean += probability[j] * to[j];
      }
#pragma omp simd
      for (int64_t j = 0; j < keys; j++) to[j] = probability[j] * (to[j] - mean);
      if (d_scores.data) {
        S* row = static_cast<S*>(d_scores.data) + head.in(d_scores) + (first + q) * d_scores.stride[3];
        std::copy_n(to, size.shared, row);
      }
#pragma omp simd
      for (int64_t j = 0; j < keys; j++) to[j] *= scale;
    }
    multiply<false, S>(count, d, keys, {ds, padded_keys, 1}, Right<S>{key, PANEL<S>, width}, d_query, width);
    multiply<true, S>(keys, d, count, {ds, 1, padded_keys}, Right<S>{query, PANEL<S>, width}, d_key, width);
    multiply<true, S>(keys, d, count, {p, 1, padded_keys}, Right<S>{grad, PANEL<S>, width}, d_value, width);
    Rows to(d_queries, 3);
    for (int64_t q = 0; q < count; q++) to.put<S>(d_query + q * width, first + q, head.in(d_queries));
  }
};

// The gradient of a task's keys, or values: the sum over images of what each of its heads has found. In order.
template <class S>
void sum_images(const Parallel& parallel, const Sizes& size, const S* found, const View& d_task) {
  int64_t n = size.task * size.d;
  parallel(size.streams * size.key_heads, 1, [&](int64_t begin, int64_t end) {
    Buffer<S> sum(n);
    Rows to(d_task, 2);
    for (int64_t i = begin; i < end; i++) {
      Head head{i / size.key_heads, 0, i % size.key_heads};
      std::fill_n(static_cast<S*>(sum), n, S(0));
      for (int64_t image = 0; image < size.images; image++) {
        const S* from = found + ((head.stream * size.images + image) * size.key_heads + head.head) * n;
        for (int64_t j = 0; j < n; j++) sum[j] += from[j];
      }
      for (int64_t j = 0; j < size.task; j++) to.put<S>(sum + j * size.d, j, head.in_task(d_task));
    }
  });
}

template <class S>
void backward(const Parallel& parallel, const Attention& a, const View& grad, const View& d_query, const View& d_key,
              const View& d_value, const View& d_task_key, const View& d_task_value, const View& d_scores) {
  Sizes size(a);
  int64_t d = size.d, of_task = size.task * d;
  int64_t of_all = product(size.units(), of_task);
  Buffer<S> task_keys(of_all), task_values(of_all);
  parallel(size.units(), 1, [&](int64_t begin, int64_t end) {
    Backward<S> of(a, size);
    Rows to_key(d_key, 3), to_value(d_value, 3);
    for (int64_t unit = begin; unit < end; unit++) {
      Head head = key_head(size, unit);
      of.enter(head);
      for (int64_t member = 0; member < size.group(); member++) {
        Head own{head.stream, head.image, head.head * size.group() + member};
        for (int64_t first = 0; first < size.queries; first += of.most)
          of.run(own, first, std::min(of.most, size.queries - first), grad, d_query, d_scores);
      }
      for (int64_t j = 0; j < size.shared; j++) {
        to_key.put<S>(of.d_key + j * of.width, j, head.in(d_key));
        to_value.put<S>(of.d_value + j * of.width, j, head.in(d_value));
      }
      for (int64_t j = 0; j < size.task; j++) {
        std::copy_n(of.d_key + (size.shared + j) * of.width, d, task_keys + unit * of_task + j * d);
        std::copy_n(of.d_value + (size.shared + j) * of.width, d, task_values + unit * of_task + j * d);
      }
    }
  });
  sum_images<S>(parallel, size, task_keys, d_task_key);
  sum_images<S>(parallel, size, task_values, d_task_value);
}

}  // namespace

void attend(const Parallel& parallel, const Attention& a, const View& output) {
  Sizes size(a);
  bool few = size.group() * size.queries <= FEW_QUERIES;
  with_wide_type(a.query.dtype, [&](auto type) {
    (few ? forward_few<decltype(type)> : forward<decltype(type)>)(parallel, a, output);
  });
}

void attend_backward(const Parallel& parallel, const Attention& a, const View& grad, const View& d_query,
                     const View& d_key, const View& d_value, const View& d_task_key, const View& d_task_value,
                     const View& d_scores) {
  with_wide_type(a.query.dtype, [&](auto type) {
    backward<decltype(type)>(parallel, a, grad, d_query, d_key, d_value, d_task_key, d_task_value, d_scores);
  });
}

}  // namespace dtme::DTME_ISA
