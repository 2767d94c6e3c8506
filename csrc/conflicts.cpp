// Pairwise conflicts of task gradients in the range and in the null space (Eq. 4).
//
// A block of tokens stays in the second cache while it is rotated and its dot products are taken: no coordinate is ever
// written to memory. The rotation is nearly all of the work, so the larger of the two spaces is not rotated into: with
// an orthonormal basis its dot product is the whole one, <g_i, g_j>, less that of the other space. Where the result is
// so small that rounding could have made its sign, that pair at that token is rotated after all.

#include <atomic>

#include "pairs.h"

namespace dtme::DTME_ISA {
namespace {

constexpr int64_t FEW_ROWS = 64, FEW_COLUMNS = 32;  // rotated as a whole: nothing is won by a second look

template <class S>
constexpr double ROUNDING = std::numeric_limits<S>::epsilon() / 2;

// How far the basis is from orthonormal, ||1 - U U^T||_F, seen along a few directions: an estimate that a basis would
// have to be made for to escape. NaN where the basis has one.
template <class S>
double distance_from_orthonormal(const S* basis, int64_t p) {
  constexpr int DIRECTIONS = 8;
  std::vector<double> u(p * DIRECTIONS, 0.0), v(p * DIRECTIONS);
  uint64_t state = 0x9e3779b97f4a7c15;
  for (double& x : v) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    x = state >> 63 ? 1 : -1;
  }
  for (int64_t c = 0; c < p; c++)  // u = U^T v
    for (int64_t e = 0; e < p; e++)
      for (int d = 0; d < DIRECTIONS; d++) u[e * DIRECTIONS + d] += basis[c * p + e] * v[c * DIRECTIONS + d];
  double square = 0;
  for (int64_t c = 0; c < p; c++) {  // v - U u
    double left[DIRECTIONS];
    for (int d = 0; d < DIRECTIONS; d++) left[d] = v[c * DIRECTIONS + d];
    for (int64_t e = 0; e < p; e++)
      for (int d = 0; d < DIRECTIONS; d++) left[d] -= basis[c * p + e] * u[e * DIRECTIONS + d];
    for (double x : left) square += x * x / DIRECTIONS;
  }
  return 4 * std::sqrt(square);  // 4: from 8 directions, of one bad eigenvector, it is rarely estimated lower by more
}

// --- counting --------------------------------------------------------------------------------------------------------

// What all threads read: the ranks cut the columns of the basis into segments, one of which may be left out at first.
template <class S>
struct Plan {
  const Gradients& grads;
  std::vector<int64_t> cuts;  // 0, the ranks, p
  int64_t skipped = -1;       // segment; -1 for none
  double doubt = 0;           // a difference below this, times both norms, may have either sign
  bool usable, count_zero;
  std::vector<int64_t> starts;  // of every segment among the columns rotated into
  Panels<S> direct, rest;

  int64_t num_ranks() const { return cuts.size() - 2; }
  int64_t width(int64_t segment) const { return cuts[segment + 1] - cuts[segment]; }

  Plan(const Gradients& grads, const S* basis, std::vector<int64_t> cuts_, int64_t skipped, double doubt, bool usable,
       bool count_zero)
      : grads(grads),
        cuts(std::move(cuts_)),
        skipped(skipped),
        doubt(doubt),
        usable(usable),
        count_zero(count_zero),
        direct(grads.width, grads.width - (skipped < 0 ? 0 : width(skipped))),
        rest(grads.width, skipped < 0 ? 0 : width(skipped)) {
    int64_t start = 0, p = grads.width;
    for (int64_t s = 0; s + 1 < int64_t(cuts.size()); s++) {
      starts.push_back(s == skipped ? -1 : start);
      for (int64_t c = 0; c < p; c++)
        (s == skipped ? rest : direct).put_row(c, basis + c * p + cuts[s], s == skipped ? 0 : start, width(s));
      if (s != skipped) start += width(s);
    }
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

  void count_block(int64_t first_token, int64_t tokens) {
    doubtful.clear();
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
    if (!doubtful.empty()) settle();
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
    int64_t pair, i, j;            // i and j: rows of the block
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

  // Rotate the doubtful gradients into the segment left out as well, and take the signs of what is found.
  void settle() {
    std::vector<int64_t> place(tokens_at_once * num_tasks, -1);
    int64_t rows = 0;
    for (const Doubt& doubt : doubtful)
      for (int64_t row : {doubt.i, doubt.j})
        if (place[row] < 0) {
          std::copy_n(g + row * p, p, some + rows * p);
          place[row] = rows++;
        }
    rotate(plan.rest, some, rows);
    for (const Doubt& doubt : doubtful) {
      double found;
      dot<1>(h + place[doubt.i] * width, h + place[doubt.j] * width, 0, plan.rest.n, &found);
      auto known = [&](int64_t s) { return s == plan.skipped ? found : doubt.segments[s]; };
      for (int64_t r = 0; r < plan.num_ranks(); r++)
        add_signs(doubt.pair, r, sum(0, r + 1, known), sum(r + 1, segments, known));
    }
  }
};

template <class S>
void count(const Parallel& parallel, const Gradients& grads, const View& basis, std::vector<int64_t> cuts,
           bool count_zero, std::atomic<int64_t>* sums) {
  int64_t p = grads.width, rows = grads.num_tasks * grads.count, skipped = -1;
  Buffer<S> u(p * p);
  read_matrix<S>(u, basis);
  bool usable = std::all_of(static_cast<S*>(u), u + p * p, [](S x) { return std::isfinite(x); });
  double doubt = 0;
  for (int64_t s = 0; s + 1 < int64_t(cuts.size()); s++)
    if (skipped < 0 || cuts[s + 1] - cuts[s] > cuts[skipped + 1] - cuts[skipped]) skipped = s;
  if (usable && rows > FEW_ROWS && cuts[skipped + 1] - cuts[skipped] >= FEW_COLUMNS) {
    double distance = distance_from_orthonormal<S>(u, p);
    doubt = distance + ROUNDING<S> * (BLOCK + p / BLOCK);
    if (!(distance < 1e-3)) skipped = -1;  // everything would be doubtful
  } else {
    skipped = -1;
  }
  Plan<S> plan(grads, u, std::move(cuts), skipped, doubt, usable, count_zero);
  int64_t step = grads.tokens_at_once(), blocks = (grads.count + step - 1) / step;
  parallel(blocks, 1, [&](int64_t begin, int64_t end) {
    Counter<S> counter(plan);
    for (int64_t block = begin; block < end; block++)
      counter.count_block(block * step, std::min(step, grads.count - block * step));
    counter.add_to(sums);
  });
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
