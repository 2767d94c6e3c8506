// Pairwise conflicts of task gradients in the range and in the null space (Eq. 4).
//
// A block of tokens stays in the second cache while it is rotated and its dot products are taken: no coordinate is ever
// written to memory. The rotation is nearly all of the work, so the larger of the two spaces is not rotated into: with
// an orthonormal basis its dot product is the whole one, <g_i, g_j>, less that of the other space. How far the two may
// be apart, by the basis and by rounding, is bounded from above; where the result is no larger than that, the pair at
// that token is rotated after all. So a sign is that of the rotation whether or not it was rotated for.

#include <atomic>
#include <optional>

#include "pairs.h"

namespace dtme::DTME_ISA {
namespace {

constexpr int64_t FEW_COLUMNS = 32;  // are always rotated into: nothing is won by a second look
constexpr double WORST = 1e-3;       // bound from which on nearly every sign would be in doubt
constexpr int64_t LOOKS = 16;        // one block of so many shows how many signs are

template <class S>
constexpr double ROUNDING = std::numeric_limits<S>::epsilon() / 2;

// --- how far off a dot product may be --------------------------------------------------------------------------------

// How much rounding may change a product U^T U by `multiply_in_blocks`: its ||.||_F, in parts of ||U||_2^2. The sum
// over k rows of U has rank k, so its ||.||_F is at most sqrt(k) ||U||_2^2; an addition takes at most ROUNDING of that,
// and a product that is rounded by itself ROUNDING of ||U||_2^2.
template <class T>
double rounding_of_square(int64_t p) {
  double roundings = 0;
  for (int64_t k = 1; k <= p; k++) {
    roundings += 1 + std::sqrt((k - 1) % BLOCK + 1);
    if (k % BLOCK == 0 || k == p) roundings += std::sqrt(k);
  }
  return roundings * ROUNDING<T>;
}

// An upper bound of ||U^T U - 1||_F, and so of ||1 - U U^T||_2, for all columns of the panels together; infinity where
// that is WORST or more, or where there is a NaN. A sum over tiles of the upper triangle, in order.
template <class T>
double distance_from_orthonormal(const Parallel& parallel, std::initializer_list<const Panels<T>*> columns) {
  std::vector<std::pair<const T*, int64_t>> panels;  // and their columns
  int64_t p = (*columns.begin())->depth;
  for (const Panels<T>* x : columns)
    for (int64_t j = 0; j < x->n; j += PANEL<T>) panels.emplace_back(x->at(0, j), std::min(x->n - j, PANEL<T>));
  int64_t side = panels.size(), tiles = side * (side + 1) / 2;
  std::vector<double> squares(tiles);
  std::atomic<bool> too_far = false;
  parallel(tiles, 1, [&](int64_t begin, int64_t end) {
    Buffer<T> tile(PANEL<T> * PANEL<T>);
    for (int64_t task = begin; task < end && !too_far; task++) {
      int64_t row = 0, column = task;
      while (column > row) column -= ++row;
      auto [left, m] = panels[row];
      auto [right, n] = panels[column];
      multiply_in_blocks<T>(m, n, p, {left, 1, PANEL<T>}, {right, 0, PANEL<T>}, tile, PANEL<T>);
      double square = 0;
      for (int64_t i = 0; i < m; i++) {
        if (row == column) tile[i * PANEL<T> + i] -= 1;  // exact, near 1
#pragma omp simd reduction(+ : square)
        for (int64_t j = 0; j < n; j++) square += double(tile[i * PANEL<T> + j]) * tile[i * PANEL<T> + j];
      }
      squares[task] = row == column ? square : 2 * square;
      if (!(square < WORST * WORST)) too_far = true;
    }
  });
  double square = 0;
  for (double x : squares) square += x;
  // 1.01: ||U||_2^2 is not quite 1, products of errors, and the rounding of this sum
  double distance = 1.01 * (std::sqrt(square) + rounding_of_square<T>(p));
  return too_far || !(distance < WORST) ? std::numeric_limits<double>::infinity() : distance;
}

// How far <g_i, g_j> and the sum of its parts in all spaces may be apart, in units of both norms, for a basis so far
// from orthonormal. An addition to all coordinates of g takes at most ROUNDING of the norm of what they have come to,
// that of the part of g already used: in blocks, whose norms add up to sqrt(number of blocks) of that of g; likewise
// products, rounded by themselves; then sums of blocks. Both gradients have such errors in all spaces together.
template <class S>
double doubt_of_dots(double distance, int64_t p) {
  double blocks = double((p + BLOCK - 1) / BLOCK), length = double(std::min(p, BLOCK));
  double rotated = ROUNDING<S> * (length * std::sqrt(blocks) + std::sqrt(p) + blocks);
  return 1.01 * (distance + 2 * rotated + 4 * double(p) * ROUNDING<double>);
}

// --- counting --------------------------------------------------------------------------------------------------------

// What all threads read: the ranks cut the columns of the basis into segments, one of which may be left out at first.
template <class S>
struct Plan {
  const Gradients& grads;
  std::vector<int64_t> cuts;  // 0, the ranks, p
  int64_t skipped = -1;       // segment; -1 for none
  bool count_zero;
  double doubt = 0;  // a difference below this, times both norms, may have either sign
  std::atomic<bool> usable = true;
  std::vector<int64_t> starts;  // of every segment among the columns rotated into
  Panels<S> direct, rest;

  int64_t num_ranks() const { return cuts.size() - 2; }
  int64_t width(int64_t segment) const { return cuts[segment + 1] - cuts[segment]; }

  Plan(const Parallel& parallel, const Gradients& grads, const View& basis, const std::vector<int64_t>& cuts_,
       int64_t skipped, bool count_zero)
      : grads(grads),
        cuts(cuts_),
        skipped(skipped),
        count_zero(count_zero),
        direct(grads.width, grads.width - (skipped < 0 ? 0 : width(skipped))),
        rest(grads.width, skipped < 0 ? 0 : width(skipped)) {
    for (int64_t s = 0, start = 0; s + 1 < int64_t(cuts.size()); s++) {
      starts.push_back(s == skipped ? -1 : start);
      if (s != skipped) start += width(s);
    }
    parallel(grads.width, 64, [&](int64_t begin, int64_t end) {
      for_rows<S>(basis, begin, end, [&](int64_t c, const S* row) {
        for (int64_t s = 0; s + 1 < int64_t(cuts.size()); s++)
          (s == skipped ? rest : direct).put_row(c, row + cuts[s], s == skipped ? 0 : starts[s], width(s));
        S finite = 0;
#pragma omp simd reduction(+ : finite)
        for (int64_t e = 0; e < grads.width; e++) finite += row[e] * 0;
        if (finite != 0) usable = false;
      });
    });
  }
};

// One thread's memory and counts.
template <class S>
class Counter {
 public:
  explicit Counter(const Plan<S>& plan)
      : plan(plan),
        num_tasks(plan.grads.num_tasks),
        p(plan.grads.width),
        pairs(plan.grads.num_pairs()),
        segments(plan.cuts.size() - 1),
        tokens_at_once(plan.grads.tokens_at_once()),
        width(round_up(std::max(plan.direct.n, plan.rest.n), LANES<S>)),
        g(tokens_at_once * num_tasks * p),
        h(tokens_at_once * num_tasks * width),
        some(plan.skipped < 0 ? 0 : tokens_at_once * num_tasks * p),
        dots((segments + 1) * pairs),
        state(tokens_at_once * num_tasks),
        norms(tokens_at_once * num_tasks),
        counts((2 * plan.num_ranks() + 2) * pairs, 0) {}

  int64_t rotated_again = 0;  // rows

  void count_block(int64_t first_token, int64_t tokens) {
    size_t before = doubtful.size();
    load(first_token, tokens);
    rotate(plan.direct, g, tokens * num_tasks);
    for (int64_t token = 0; token < tokens; token++) {
      int64_t row = token * num_tasks;
      double* total = dots.data() + segments * pairs;
      if (plan.skipped >= 0) pair_dots<S>(g + row * p, p, num_tasks, p, total);
      for (int64_t s = 0; s < segments; s++)
        if (s != plan.skipped)
          pair_dots<S>(h + row * width + plan.starts[s], width, num_tasks, plan.width(s), dots.data() + s * pairs);
      for (int64_t i = 0, pair = 0; i < num_tasks; i++)
        for (int64_t j = i + 1; j < num_tasks; j++, pair++) count_pair(pair, row, i, j);
    }
    keep(before);
  }

  // Rotate the doubtful gradients into the segment left out as well, and take the signs of what is found.
  void settle() {
    if (doubtful.empty()) return;
    rotate(plan.rest, some, kept);
    for (const Doubt& doubt : doubtful) {
      double found;
      dot<1>(h + doubt.i * width, h + doubt.j * width, 0, plan.rest.n, &found);
      auto known = [&](int64_t s) { return s == plan.skipped ? found : doubt.segments[s]; };
      for (int64_t r = 0; r < plan.num_ranks(); r++)
        add_signs(doubt.pair, r, sum(0, r + 1, known), sum(r + 1, segments, known));
    }
    rotated_again += kept;
    doubtful.clear();
    kept = 0;
  }

  // range (R, K, K), null (R, K, K), valid (K, K), nonfinite (): integers, so that any order of threads will do
  void add_to(std::atomic<int64_t>* sums) const {
    int64_t square = num_tasks * num_tasks, kinds = 2 * plan.num_ranks() + 2;
    for (int64_t kind = 0; kind < kinds; kind++)
      for (int64_t i = 0, pair = 0; i < num_tasks; i++)
        for (int64_t j = i + 1; j < num_tasks; j++, pair++) {
          int64_t n = counts[kind * pairs + pair];
          if (kind == kinds - 1) {
            sums[kind * square] += n;
          } else {
            sums[kind * square + i * num_tasks + j] += n;
            sums[kind * square + j * num_tasks + i] += n;
          }
        }
  }

 private:
  enum State : char { NORMAL, ZERO, NONFINITE };
  struct Doubt {
    int64_t pair, i, j;            // i and j: rows of the block, then of those kept
    std::vector<double> segments;  // the dots that are known
  };

  const Plan<S>& plan;
  int64_t num_tasks, p, pairs, segments, tokens_at_once, width;
  Buffer<S> g, h, some;
  std::vector<double> dots;  // (segments + 1, pairs) of one token, the last row of the whole space
  std::vector<State> state;
  std::vector<double> norms;
  std::vector<int64_t> counts;  // range of every rank, null of every rank, valid, nonfinite; (., pairs)
  std::vector<Doubt> doubtful;
  int64_t kept = 0;  // rows

  // Gradients of extreme size are brought near 1 by a power of two, which no sign depends on.
  void load(int64_t first_token, int64_t tokens) {
    constexpr S LOW = 0x1p-40, HIGH = 0x1p40;
    for (int64_t token = 0; token < tokens; token++) {
      for (int64_t task = 0; task < num_tasks; task++) {
        int64_t row = token * num_tasks + task;
        S* x = g + row * p;
        plan.grads.copy(x, first_token + token, task * plan.grads.apart);
        S peak = 0, finite = 0;
#pragma omp simd reduction(max : peak) reduction(+ : finite)
        for (int64_t c = 0; c < p; c++) {
          S size = std::abs(x[c]);
          peak = size > peak ? size : peak;
          finite += x[c] * 0;
        }
        state[row] = finite != 0 ? NONFINITE : peak == 0 ? ZERO : NORMAL;
        if (state[row] == NONFINITE) std::fill_n(x, p, S(0));
        if (state[row] == NORMAL && (peak < LOW || peak > HIGH)) {
          int exponent = -std::ilogb(peak);
          for (int64_t c = 0; c < p; c++) x[c] = std::scalbn(x[c], exponent);
        }
        if (plan.skipped >= 0) {
          double square;
          dot<1>(x, x, 0, p, &square);
          norms[row] = std::sqrt(square);
        }
      }
    }
  }

  void rotate(const Panels<S>& columns, const S* rows, int64_t count) {
    multiply_in_blocks<S>(count, columns.n, p, {rows, p, 1}, columns, h, width);
  }

  void count_pair(int64_t pair, int64_t first_row, int64_t i, int64_t j) {
    State a = state[first_row + i], b = state[first_row + j];
    int64_t ranks = plan.num_ranks();
    if (a == NONFINITE || b == NONFINITE || !plan.usable) {
      counts[(2 * ranks + 1) * pairs + pair]++;
      return;
    }
    bool zero = a == ZERO || b == ZERO;
    if (zero && !plan.count_zero) return;
    counts[2 * ranks * pairs + pair]++;
    double limit = zero ? -1 : plan.doubt * norms[first_row + i] * norms[first_row + j];
    auto known = [&](int64_t s) { return dots[s * pairs + pair]; };
    if (plan.skipped >= 0) {
      for (int64_t r = 0; r < ranks; r++)
        if (std::abs(derived(r, known)) <= limit) {
          Doubt doubt{pair, first_row + i, first_row + j, {}};
          for (int64_t s = 0; s < segments; s++) doubt.segments.push_back(known(s));
          doubtful.push_back(std::move(doubt));
          return;
        }
    }
    for (int64_t r = 0; r < ranks; r++) {
      bool in_range = plan.skipped >= 0 && plan.skipped <= r;  // the segment left out
      double range = in_range ? derived(r, known) : sum(0, r + 1, known);
      double null = plan.skipped > r ? derived(r, known) : sum(r + 1, segments, known);
      add_signs(pair, r, range, null);
    }
  }

  void add_signs(int64_t pair, int64_t r, double range, double null) {
    counts[r * pairs + pair] += range <= 0;
    counts[(plan.num_ranks() + r) * pairs + pair] += null <= 0;
  }

  template <class F>
  static double sum(int64_t first, int64_t last, const F& dot_of) {
    double total = 0;
    for (int64_t s = first; s < last; s++) total += dot_of(s);
    return total;
  }

  // The side of rank r that holds the segment left out: the whole less the other side.
  template <class F>
  double derived(int64_t r, const F& known) const {
    return known(segments) - (plan.skipped <= r ? sum(r + 1, segments, known) : sum(0, r + 1, known));
  }

  // Keep the gradients that the block's doubts, from `first` on, are about: a few rows take nearly as long to rotate as
  // many, so they wait for more.
  void keep(size_t first) {
    if (first == doubtful.size()) return;
    std::vector<Doubt> added(doubtful.begin() + first, doubtful.end());
    doubtful.resize(first);
    std::vector<int64_t> place(tokens_at_once * num_tasks, -1);
    for (const Doubt& doubt : added) place[doubt.i] = place[doubt.j] = 0;
    if (kept + std::count(place.begin(), place.end(), 0) > int64_t(place.size())) settle();
    for (int64_t row = 0; row < int64_t(place.size()); row++)
      if (place[row] == 0) {
        std::copy_n(g + row * p, p, some + kept * p);
        place[row] = kept++;
      }
    for (Doubt& doubt : added) {
      doubt.i = place[doubt.i];
      doubt.j = place[doubt.j];
      doubtful.push_back(std::move(doubt));
    }
  }
};

// The largest segment, or -1 where it is small.
int64_t largest_segment(const std::vector<int64_t>& cuts) {
  int64_t largest = 0;
  for (int64_t s = 1; s + 1 < int64_t(cuts.size()); s++)
    if (cuts[s + 1] - cuts[s] > cuts[largest + 1] - cuts[largest]) largest = s;
  return cuts[largest + 1] - cuts[largest] >= FEW_COLUMNS ? largest : -1;
}

double distance_in_double(const Parallel& parallel, const View& basis) {
  int64_t p = basis.size[0];
  Panels<double> columns(p, p);
  parallel(p, 64, [&](int64_t begin, int64_t end) {
    for_rows<double>(basis, begin, end, [&](int64_t c, const double* row) { columns.put_row(c, row, 0, p); });
  });
  return distance_from_orthonormal<double>(parallel, {&columns});
}

// Whether finding the distance in T, half of p^3 products, costs less than rotating so many rows into so many columns.
template <class S, class T>
bool pays(double rows, int64_t columns, int64_t p) {
  return rows * double(columns) > 0.5 * (sizeof(T) / sizeof(S)) * double(p) * double(p + PANEL<T>);
}

// The distance in float32 is soon found, but the bound of its rounding is loose. Where many signs turn out to be in
// doubt, or where it is too loose from the start, it is found in double.
template <class S>
void count(const Parallel& parallel, const Gradients& grads, const View& basis, const std::vector<int64_t>& cuts,
           bool count_zero, std::atomic<int64_t>* sums) {
  int64_t p = grads.width, rows = grads.num_tasks * grads.count, skipped = largest_segment(cuts);
  int64_t columns = skipped < 0 ? 0 : cuts[skipped + 1] - cuts[skipped];
  bool in_double = rounding_of_square<S>(p) > WORST / 2;
  if (!(in_double ? pays<S, double>(rows, columns, p) : pays<S, S>(rows, columns, p))) skipped = -1;
  std::optional<Plan<S>> plan(std::in_place, parallel, grads, basis, cuts, skipped, count_zero);
  if (skipped >= 0 && plan->usable) {
    double distance = in_double ? distance_in_double(parallel, basis)
                                : distance_from_orthonormal<S>(parallel, {&plan->direct, &plan->rest});
    plan->doubt = doubt_of_dots<S>(distance, p);
    if (!(distance < WORST)) plan.emplace(parallel, grads, basis, cuts, skipped = -1, count_zero);
  }
  std::atomic<int64_t> rotated_again = 0;
  int64_t step = grads.tokens_at_once(), blocks = (grads.count + step - 1) / step;
  auto run = [&](int64_t first, int64_t last) {
    parallel(last - first, 1, [&](int64_t begin, int64_t end) {
      Counter<S> counter(*plan);
      for (int64_t block = first + begin; block < first + end; block++)
        counter.count_block(block * step, std::min(step, grads.count - block * step));
      counter.settle();
      counter.add_to(sums);
      rotated_again += counter.rotated_again;
    });
  };
  bool loose = skipped >= 0 && !in_double && sizeof(S) < sizeof(double);
  int64_t look = loose && blocks >= LOOKS * parallel.threads ? blocks / LOOKS : 0;
  run(0, look);
  if (look && pays<S, double>(double(rotated_again) / look * (blocks - look), columns, p))
    plan->doubt = doubt_of_dots<S>(distance_in_double(parallel, basis), p);
  run(look, blocks);
}

}  // namespace

void count_conflicts(const Parallel& parallel, const View& grads, const View& basis, int64_t num_ranks,
                     const int64_t* ranks, bool count_zero_gradients, int64_t* range, int64_t* null, int64_t* valid,
                     int64_t* nonfinite) {
  Gradients g(grads);
  std::vector<int64_t> cuts{0};
  cuts.insert(cuts.end(), ranks, ranks + num_ranks);
  cuts.push_back(g.width);
  int64_t square = g.num_tasks * g.num_tasks;
  std::vector<std::atomic<int64_t>> sums((2 * num_ranks + 1) * square + 1);
  with_wide_type(grads.dtype, [&](auto type) {
    count<decltype(type)>(parallel, g, basis, cuts, count_zero_gradients, sums.data());
  });
  std::copy_n(sums.begin(), num_ranks * square, range);
  std::copy_n(sums.begin() + num_ranks * square, num_ranks * square, null);
  std::copy_n(sums.begin() + 2 * num_ranks * square, square, valid);
  *nonfinite = sums.back();
}

}  // namespace dtme::DTME_ISA
